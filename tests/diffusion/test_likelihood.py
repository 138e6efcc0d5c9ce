import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from pipeline.diffusion.likelihood import bits_per_dimension, decoder_log_likelihood, prior_term, variational_term
from pipeline.diffusion.process import DiffusionProcess
from pipeline.diffusion.schedule import Schedule

T = 1000
LEVELS = torch.arange(256, dtype=torch.float64) / 127.5 - 1


def noise_like(x0, seed=0):
    def noise(t):
        return torch.randn(x0.shape, generator=torch.Generator().manual_seed(seed + t), dtype=x0.dtype)

    return noise


@pytest.mark.parametrize("mean", [-3.0, -1.0, -0.2, 0.9999, 1.7])
@pytest.mark.parametrize("deviation", [1e-4, 0.004, 0.3, 20.0])
def test_the_decoders_256_probabilities_sum_to_one(mean, deviation):
    log_variance = torch.tensor(2 * math.log(deviation), dtype=torch.float64)
    total = decoder_log_likelihood(LEVELS, torch.full_like(LEVELS, mean), log_variance).exp().sum()
    torch.testing.assert_close(total, torch.ones((), dtype=torch.float64), rtol=1e-9, atol=0)


@pytest.mark.parametrize("log_variance", [-14.0, 40.0])
def test_the_decoder_stays_finite_far_off_the_mark_in_float32(log_variance):
    mean = torch.linspace(-4, 4, 256).flip(0).requires_grad_()
    log_variance = torch.full((256,), log_variance, requires_grad=True)
    value = decoder_log_likelihood(LEVELS.float(), mean, log_variance).sum()
    gradients = torch.autograd.grad(value, (mean, log_variance))
    assert all(torch.isfinite(tensor).all() for tensor in (value, *gradients))


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned"])
def test_the_terms_are_the_divergence_of_the_two_gaussians(variance):
    process, t = DiffusionProcess(Schedule.linear(T), variance=variance), torch.tensor([1, 2, 500, 999])
    generator = torch.Generator().manual_seed(0)
    x0 = torch.rand(4, 1, 3, 3, generator=generator, dtype=torch.float64) * 2 - 1
    xt = process.add_noise(x0, torch.randn(4, 1, 3, 3, generator=generator, dtype=torch.float64), t)
    output = torch.randn(4, 2 if variance == "learned" else 1, 3, 3, generator=generator, dtype=torch.float64)
    mean, true_variance = process.posterior(x0, xt, t)
    _, model_mean, log_variance = process.reverse(output, xt, t)
    expected = kl_divergence(Normal(mean, true_variance.sqrt()), Normal(model_mean, (log_variance / 2).exp()))
    got = variational_term(output, x0, xt, t, process)
    torch.testing.assert_close(got, expected.flatten(1).mean(1) / math.log(2))


def test_the_prior_term_is_the_divergence_from_the_standard_normal():
    schedule = Schedule.linear(T)
    x0 = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(2, 1, 2, 3)
    bar = schedule.alphas_cumprod[-1]
    expected = kl_divergence(Normal(bar.sqrt() * x0, (1 - bar).sqrt().expand_as(x0)), Normal(0.0, 1.0))
    torch.testing.assert_close(prior_term(x0, schedule), expected.flatten(1).mean(1) / math.log(2))


def test_an_oracle_pays_for_nothing_but_prior_and_decoder():
    process = DiffusionProcess(Schedule.linear(100), "sample", variance="fixed_small")
    x0 = LEVELS[torch.arange(0, 256, 16)].reshape(4, 1, 2, 2)
    bound = bits_per_dimension(lambda x, t: x0, x0, process, noise_like(x0))
    assert bound.terms.shape == (4, 100)
    torch.testing.assert_close(bound.terms[:, 1:], torch.zeros(4, 99, dtype=torch.float64), rtol=0, atol=1e-9)
    torch.testing.assert_close(bound.total, bound.prior + bound.terms[:, 0])


def test_the_optimal_network_needs_one_bit_for_black_or_white():
    schedule = Schedule.linear(T)
    x0 = torch.tensor([-1.0, 1.0]).repeat(512).reshape(1024, 1, 1, 1)

    def best(x, t):  # E[x_0 | x_t] for x_0 = ±1
        bar = schedule.alphas_cumprod[t].float().reshape(-1, 1, 1, 1)
        return torch.tanh(bar.sqrt() / (1 - bar) * x)

    def bound(variance):
        return bits_per_dimension(best, x0, DiffusionProcess(schedule, "sample", variance), noise_like(x0))

    small, large = bound("fixed_small"), bound("fixed_large")
    decoder = small.terms[:, 0].mean()  # the first level's noise is wider than a bin, for any network
    print(f"\n{small.total.mean():.4f} bits/dim, {decoder:.4f} the decoder's; fixed_large {large.total.mean():.4f}")
    assert 0.98 < small.total.mean() - decoder < 1.03
    assert large.total.mean() > small.total.mean()
