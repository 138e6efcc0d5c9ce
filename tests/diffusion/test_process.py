import diffusers
import pytest
import torch

from pipeline.diffusion.process import DiffusionProcess
from pipeline.diffusion.schedule import Schedule, make_schedule

T = 1000
TYPES = ["epsilon", "sample", "v_prediction"]
SCHEDULES = ["linear", "cosine"]


def images(dtype=torch.float32, batch=T, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x0 = torch.rand(batch, 1, 2, 2, generator=generator, dtype=dtype) * 2 - 1
    return x0, torch.randn(batch, 1, 2, 2, generator=generator, dtype=dtype)


@pytest.mark.parametrize("name", SCHEDULES)
def test_forward_process_is_the_markov_chain_run_to_t(name):
    schedule = make_schedule(name, T)
    signal, variance, signals, deviations = 1.0, 0.0, [], []
    for beta in schedule.betas.tolist():
        signal, variance = (1 - beta) ** 0.5 * signal, (1 - beta) * variance + beta
        signals.append(signal)
        deviations.append(variance**0.5)
    one, zero, t = torch.ones(T, 1, 1, 1), torch.zeros(T, 1, 1, 1), torch.arange(T)
    torch.testing.assert_close(
        DiffusionProcess(schedule).add_noise(one, zero, t).flatten(), torch.tensor(signals), rtol=1e-6, atol=0
    )
    # The standard deviation, not the variance, multiplies the noise.
    torch.testing.assert_close(
        DiffusionProcess(schedule).add_noise(zero, one, t).flatten(), torch.tensor(deviations), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("name", SCHEDULES)
def test_posterior_is_bayes_rule(name):
    schedule = make_schedule(name, T)
    x0, xt = images(torch.float64)
    for t in (1, 2, 500, 998):
        beta, before = schedule.betas[t], schedule.alphas_cumprod[t - 1]
        precision = (1 - beta) / beta + 1 / (1 - before)  # of q(x_t | x_{t-1}) q(x_{t-1} | x_0)
        mean = ((1 - beta).sqrt() / beta * xt + before.sqrt() / (1 - before) * x0) / precision
        got_mean, got_variance = DiffusionProcess(schedule).posterior(x0, xt, torch.full((T,), t))
        torch.testing.assert_close(got_mean, mean, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(got_variance.squeeze(), (1 / precision).expand(T), rtol=1e-9, atol=0)


def test_posterior_at_t_0_is_the_clean_image_itself():
    x0, xt = images()
    mean, variance = DiffusionProcess(Schedule.linear(T)).posterior(x0, xt, torch.zeros(T, dtype=torch.int64))
    assert torch.equal(mean, x0)
    assert torch.equal(variance, torch.zeros(T, 1, 1, 1))


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_perfect_prediction_gives_back_image_and_noise(name, kind):
    process, t = DiffusionProcess(make_schedule(name, T), kind), torch.arange(T)
    x0, noise = images(torch.float64)
    xt = process.add_noise(x0, noise, t)
    output = process.target(x0, noise, t)
    torch.testing.assert_close(process.predict_x0(output, xt, t), x0, rtol=0, atol=1e-10)
    torch.testing.assert_close(process.predict_noise(output, xt, t), noise, rtol=0, atol=1e-10)
    torch.testing.assert_close(process.noise_of(x0, xt, t), noise, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_timestep_has_its_true_noise_level_under_bf16_autocast(name):
    schedule, t = make_schedule(name, T), torch.arange(T)
    zero, one = torch.zeros(T, 1, 2, 2), torch.ones(T, 1, 2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        levels = DiffusionProcess(schedule).add_noise(zero, one, t)
    assert levels.dtype == torch.float32
    torch.testing.assert_close(levels[:, 0, 0, 0].double(), (1 - schedule.alphas_cumprod).sqrt(), rtol=1e-6, atol=0)
    # What this guards against: with the tables in bfloat16, the first levels have no noise at all.
    noiseless = int(((1 - schedule.alphas_cumprod.bfloat16()) == 0).sum())
    assert noiseless == {"linear": 10, "cosine": 21}[name]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_images_are_refused(dtype):
    t = torch.zeros(2, dtype=torch.int64)
    process, velocity = (DiffusionProcess(Schedule.linear(T), kind) for kind in ("epsilon", "v_prediction"))
    full = torch.zeros(2, 1, 2, 2)
    half = full.to(dtype)
    for call in (
        lambda: process.add_noise(half, full, t),
        lambda: process.add_noise(full, half, t),
        lambda: velocity.target(half, full, t),
        lambda: process.predict_x0(half, full, t),
        lambda: process.predict_noise(full, half, t),
        lambda: process.noise_of(half, full, t),
        lambda: process.posterior(half, full, t),
    ):
        with pytest.raises(TypeError, match="needs float32, whatever the autocast"):
            call()


def test_the_learned_variance_lies_between_the_small_and_the_large():
    t = torch.arange(T)
    xt = torch.randn(T, 1, 1, 1, generator=torch.Generator().manual_seed(0))

    def log_variance(variance, mixture=None):
        output = torch.zeros_like(xt) if mixture is None else torch.cat((xt, torch.full_like(xt, mixture)), 1)
        return DiffusionProcess(Schedule.cosine(T), variance=variance).reverse(output, xt, t).log_variance

    torch.testing.assert_close(log_variance("learned", -1.0), log_variance("fixed_small"))
    torch.testing.assert_close(log_variance("learned", 1.0)[1:], log_variance("fixed_large")[1:])
    middle = (log_variance("fixed_small") + log_variance("fixed_large"))[1:] / 2
    torch.testing.assert_close(log_variance("learned", 0.0)[1:], middle)
    assert torch.isfinite(log_variance("fixed_large")).all()
    assert torch.isfinite(log_variance("fixed_small")).all()


@pytest.mark.parametrize("name", SCHEDULES)
def test_forward_process_agrees_with_diffusers_at_every_timestep(name):
    schedule, t = make_schedule(name, T), torch.arange(T)
    process = DiffusionProcess(schedule, "v_prediction")
    theirs = diffusers.DDPMScheduler(beta_schedule={"linear": "linear", "cosine": "squaredcos_cap_v2"}[name])
    torch.testing.assert_close(theirs.betas.double(), schedule.betas, rtol=0, atol=1e-7)
    x0, noise = images()
    as_shipped = (process.add_noise(x0, noise, t) - theirs.add_noise(x0, noise, t)).abs().max().item()
    theirs.alphas_cumprod = schedule.alphas_cumprod
    # It rounds the tables it is given to the dtype of the images, so give it images in float64 too.
    wide = [value.double() for value in (x0, noise)]
    errors = [
        (process.add_noise(x0, noise, t) - theirs.add_noise(*wide, t)).abs().max().item(),
        (process.target(x0, noise, t) - theirs.get_velocity(*wide, t)).abs().max().item(),
    ]
    print(f"\n{name}: forward process {errors[0]:.1e}, velocity {errors[1]:.1e}; as shipped {as_shipped:.1e}")
    assert max(errors) < 1e-5
    assert as_shipped < 1e-4
