import diffusers
import pytest
import torch

from pipeline.diffusion import schedule as s
from pipeline.errors import ConfigError

T = 1000
TYPES = ["epsilon", "sample", "v_prediction"]
SCHEDULES = ["linear", "cosine"]


def pictures(dtype=torch.float32, batch=T, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x0 = torch.rand(batch, 1, 2, 2, generator=generator, dtype=dtype) * 2 - 1
    return x0, torch.randn(batch, 1, 2, 2, generator=generator, dtype=dtype)


def test_linear_runs_from_the_papers_first_beta_to_its_last():
    betas = s.Schedule.linear(T).betas
    assert betas.dtype == torch.float64
    torch.testing.assert_close(betas[[0, -1]], torch.tensor([1e-4, 0.02], dtype=torch.float64), rtol=1e-14, atol=0)
    torch.testing.assert_close(betas.diff(), torch.full((T - 1,), 0.0199 / 999, dtype=torch.float64))


def test_linear_ends_equally_noisy_for_any_number_of_timesteps():
    ends = [s.Schedule.linear(timesteps).alphas_cumprod[-1].log().item() for timesteps in (100, 1000, 4000)]
    assert max(ends) - min(ends) < 1.2  # ∫β is the same; -10 for T = 1000


def test_linear_with_too_few_timesteps_is_refused():
    with pytest.raises(ConfigError, match=r"diffusion.timesteps: 20 is too few .* at least 21, or cosine"):
        s.Schedule.linear(20)
    assert s.Schedule.linear(21).betas.max() < 1


def test_cosine_is_a_squared_cosine_until_its_betas_are_clipped():
    schedule = s.Schedule.cosine(T)
    edges = (torch.arange(1, T, dtype=torch.float64) / T + 0.008) / 1.008
    start = (1 + torch.cos(torch.tensor(0.008 / 1.008 * torch.pi, dtype=torch.float64))) / 2
    closed = (1 + torch.cos(edges * torch.pi)) / 2 / start
    torch.testing.assert_close(schedule.alphas_cumprod[:-1], closed, rtol=1e-9, atol=0)
    assert schedule.betas[-1] == 0.999


@pytest.mark.parametrize("name", SCHEDULES)
def test_forward_process_is_the_markov_chain_run_to_t(name):
    schedule = s.make_schedule(name, T)
    signal, variance, signals, deviations = 1.0, 0.0, [], []
    for beta in schedule.betas.tolist():
        signal, variance = (1 - beta) ** 0.5 * signal, (1 - beta) * variance + beta
        signals.append(signal)
        deviations.append(variance**0.5)
    one, zero, t = torch.ones(T, 1, 1, 1), torch.zeros(T, 1, 1, 1), torch.arange(T)
    torch.testing.assert_close(s.add_noise(one, zero, t, schedule).flatten(), torch.tensor(signals), rtol=1e-6, atol=0)
    # The standard deviation, not the variance, multiplies the noise.
    torch.testing.assert_close(
        s.add_noise(zero, one, t, schedule).flatten(), torch.tensor(deviations), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("name", SCHEDULES)
def test_posterior_is_bayes_rule(name):
    schedule = s.make_schedule(name, T)
    x0, xt = pictures(torch.float64)
    for t in (1, 2, 500, 998):
        beta, before = schedule.betas[t], schedule.alphas_cumprod[t - 1]
        precision = (1 - beta) / beta + 1 / (1 - before)  # of q(x_t | x_{t-1}) q(x_{t-1} | x_0)
        mean = ((1 - beta).sqrt() / beta * xt + before.sqrt() / (1 - before) * x0) / precision
        got_mean, got_variance = s.posterior(x0, xt, torch.full((T,), t), schedule)
        torch.testing.assert_close(got_mean, mean, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(got_variance.squeeze(), (1 / precision).expand(T), rtol=1e-9, atol=0)


def test_posterior_at_t_0_is_the_clean_picture_itself():
    x0, xt = pictures()
    mean, variance = s.posterior(x0, xt, torch.zeros(T, dtype=torch.int64), s.Schedule.linear(T))
    assert torch.equal(mean, x0)
    assert torch.equal(variance, torch.zeros(T, 1, 1, 1))


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_perfect_prediction_gives_back_picture_and_noise(name, kind):
    schedule, t = s.make_schedule(name, T), torch.arange(T)
    x0, noise = pictures(torch.float64)
    xt = s.add_noise(x0, noise, t, schedule)
    output = s.target(x0, noise, t, schedule, kind)
    torch.testing.assert_close(s.predict_x0(output, xt, t, schedule, kind), x0, rtol=0, atol=1e-10)
    torch.testing.assert_close(s.predict_noise(output, xt, t, schedule, kind), noise, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_timestep_has_its_true_noise_level_under_bf16_autocast(name):
    schedule, t = s.make_schedule(name, T), torch.arange(T)
    zero, one = torch.zeros(T, 1, 2, 2), torch.ones(T, 1, 2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        levels = s.add_noise(zero, one, t, schedule)
    assert levels.dtype == torch.float32
    torch.testing.assert_close(levels[:, 0, 0, 0].double(), (1 - schedule.alphas_cumprod).sqrt(), rtol=1e-6, atol=0)
    # What this guards against: with the tables in bfloat16, the first levels have no noise at all.
    noiseless = int(((1 - schedule.alphas_cumprod.bfloat16()) == 0).sum())
    assert noiseless == {"linear": 10, "cosine": 21}[name]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_pictures_are_refused(dtype):
    schedule, t = s.Schedule.linear(T), torch.zeros(2, dtype=torch.int64)
    full = torch.zeros(2, 1, 2, 2)
    half = full.to(dtype)
    for call in (
        lambda: s.add_noise(half, full, t, schedule),
        lambda: s.add_noise(full, half, t, schedule),
        lambda: s.velocity(half, full, t, schedule),
        lambda: s.predict_x0(half, full, t, schedule, "epsilon"),
        lambda: s.predict_noise(full, half, t, schedule, "epsilon"),
        lambda: s.posterior(half, full, t, schedule),
    ):
        with pytest.raises(TypeError, match="needs float32, whatever the autocast"):
            call()


def test_respaced_betas_compose_the_skipped_steps():
    full = s.Schedule.linear(T)
    visited = [0, 10, 500, 999]
    chain = full.respaced(visited)
    torch.testing.assert_close(chain.alphas_cumprod, full.alphas_cumprod[visited], rtol=0, atol=0)
    skipped = (1 - full.betas[11:501]).prod()
    torch.testing.assert_close(chain.betas[2], 1 - skipped, rtol=1e-12, atol=0)
    torch.testing.assert_close(full.respaced(range(T)).betas, full.betas, rtol=1e-10, atol=0)


@pytest.mark.parametrize("name", SCHEDULES)
def test_forward_process_agrees_with_diffusers_at_every_timestep(name):
    schedule, t = s.make_schedule(name, T), torch.arange(T)
    theirs = diffusers.DDPMScheduler(beta_schedule={"linear": "linear", "cosine": "squaredcos_cap_v2"}[name])
    torch.testing.assert_close(theirs.betas.double(), schedule.betas, rtol=0, atol=1e-7)
    x0, noise = pictures()
    as_shipped = (s.add_noise(x0, noise, t, schedule) - theirs.add_noise(x0, noise, t)).abs().max().item()
    theirs.alphas_cumprod = schedule.alphas_cumprod
    # It rounds the tables it is given to the dtype of the pictures, so give it pictures in float64 too.
    wide = [value.double() for value in (x0, noise)]
    errors = [
        (s.add_noise(x0, noise, t, schedule) - theirs.add_noise(*wide, t)).abs().max().item(),
        (s.velocity(x0, noise, t, schedule) - theirs.get_velocity(*wide, t)).abs().max().item(),
    ]
    print(f"\n{name}: forward process {errors[0]:.1e}, velocity {errors[1]:.1e}; as shipped {as_shipped:.1e}")
    assert max(errors) < 1e-5
    assert as_shipped < 1e-4
