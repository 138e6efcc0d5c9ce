import math
import types

import diffusers
import pytest
import torch

from pipeline.config import SamplingOptions
from pipeline.diffusion.process import DiffusionProcess
from pipeline.diffusion.samplers import from_uint8, sample, to_uint8
from pipeline.diffusion.schedule import Schedule, make_schedule
from pipeline.diffusion.spacing import timesteps

T = 1000
TYPES = ["epsilon", "sample", "v_prediction"]
SCHEDULES = {"linear": "linear", "cosine": "squaredcos_cap_v2"}
SHAPE = (2, 1, 2, 3)


def noise(t, shape=SHAPE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(t))


def network(x, t):
    """Near the ideal ε of N(0, 1) data, so that x stays of order 1; with a part that differs at every timestep."""
    t = t.reshape(-1, 1, 1, 1)
    return (1 - Schedule.linear(T).alphas_cumprod[t]).sqrt().float() * x + 0.02 * torch.sin(3 * x + t / 37)


def wild(x, t):
    return 3 * torch.sin(5 * x) + x


def final(*args, **kwargs):
    *_, last = sample(*args, **kwargs)
    return last.x


def no_noise(t):
    raise AssertionError(f"noise asked for at t = {t}")


# The judge: diffusers, in lockstep. Each of its steps starts from our images, so that errors do not add up.


def their_scheduler(kind, schedule_name, **options):
    return getattr(diffusers, kind)(num_train_timesteps=T, beta_schedule=SCHEDULES[schedule_name], **options)


def with_our_tables(scheduler, schedule):
    scheduler.betas, scheduler.alphas = schedule.betas, 1 - schedule.betas
    scheduler.alphas_cumprod = schedule.alphas_cumprod
    return scheduler


def largest_error(scheduler, process, options, denoise=network, **call):
    """Over all steps of ours and theirs, and the number of steps."""
    scheduler.set_timesteps(options.steps)
    before, error, steps = noise(T), 0.0, 0
    for t, x, _ in sample(denoise, before, process, options, noise):
        assert t == int(scheduler.timesteps[steps])
        output = denoise(before, torch.full((2,), t))
        theirs = scheduler.step(output, t, before, generator=torch.Generator().manual_seed(t), **call).prev_sample
        error = max(error, (theirs - x).abs().max().item())
        before, steps = x, steps + 1
    return error, steps


@pytest.mark.parametrize(
    ("name", "prediction_type", "clip"),
    [*((name, kind, True) for name in SCHEDULES for kind in TYPES), ("cosine", "epsilon", False)],
)
def test_ddpm_and_ddim_agree_with_diffusers_at_every_timestep(name, prediction_type, clip):
    schedule = make_schedule(name, T)
    options = {"prediction_type": prediction_type, "clip_sample": clip}
    cases = [
        ("DDPMScheduler", variance, {"sampler": "ddpm"}, {"variance_type": variance}, {})
        for variance in ("fixed_small", "fixed_large")
    ]
    cases += [
        (
            "DDIMScheduler",
            "fixed_large",
            {"sampler": "ddim", "eta": eta},
            {},
            {"eta": eta, "use_clipped_model_output": clip},
        )
        for eta in (0.0, 1.0)
    ]
    ours, shipped = [], []
    for kind, variance, sampling, construction, call in cases:
        process = DiffusionProcess(schedule, prediction_type, variance, clip)
        all_steps = SamplingOptions(steps=T, spacing="uniform", **sampling)
        if prediction_type == "epsilon" and clip:  # their tables differ from ours whatever is predicted
            scheduler = their_scheduler(kind, name, **options, **construction)
            shipped.append(largest_error(scheduler, process, all_steps, **call)[0])
        scheduler = with_our_tables(their_scheduler(kind, name, **options, **construction), schedule)
        error, steps = largest_error(scheduler, process, all_steps, **call)
        assert steps == T
        ours.append(error)
    print(f"\n{name} {prediction_type} {'clipped' if clip else 'unclipped'}: {ours}, with their own tables {shipped}")
    assert max(ours) < 1e-5
    assert max(shipped, default=0) < 2e-2


@pytest.mark.parametrize("name", SCHEDULES)
def test_learned_variance_agrees_with_diffusers_at_every_timestep(name):
    def denoise(x, t):
        return torch.cat((network(x, t), torch.sin(3 * x)), 1)

    schedule = make_schedule(name, T)
    scheduler = with_our_tables(their_scheduler("DDPMScheduler", name, variance_type="learned_range"), schedule)
    process = DiffusionProcess(schedule, variance="learned")
    error, steps = largest_error(scheduler, process, SamplingOptions(sampler="ddpm", steps=T), denoise)
    assert (error < 1e-5, steps) == (True, T)


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_strided_ddim_and_ddpm_agree_with_diffusers(spacing):
    schedule = make_schedule("linear", T)
    options = {"timestep_spacing": spacing}
    ddim = with_our_tables(their_scheduler("DDIMScheduler", "linear", **options), schedule)
    strided = SamplingOptions(sampler="ddim", steps=50, spacing=spacing)
    error, _ = largest_error(ddim, DiffusionProcess(schedule), strided, wild, use_clipped_model_output=True)
    assert error < 1e-5
    ddpm = with_our_tables(their_scheduler("DDPMScheduler", "linear", **options), schedule)
    strided = SamplingOptions(sampler="ddpm", steps=50, spacing=spacing)
    error, _ = largest_error(ddpm, DiffusionProcess(schedule, variance="fixed_small"), strided)
    assert error < 1e-5


@pytest.mark.parametrize("prediction_type", TYPES)
def test_dpmpp_agrees_with_diffusers(prediction_type):
    schedule = make_schedule("linear", T)
    scheduler = their_scheduler(
        "DPMSolverMultistepScheduler", "linear", timestep_spacing="trailing", prediction_type=prediction_type
    )
    scheduler.alphas_cumprod = schedule.alphas_cumprod
    scheduler.set_timesteps(20)
    x = y = noise(T)
    options = SamplingOptions(sampler="dpmpp", steps=20, spacing="trailing", max_step_ratio=None)
    process = DiffusionProcess(schedule, prediction_type, clip=False)
    for t, step in zip(scheduler.timesteps, sample(network, x, process, options, no_noise), strict=True):
        assert step.t == int(t)
        y = scheduler.step(network(y, t.expand(2)), t, y).prev_sample
        torch.testing.assert_close(step.x, y, rtol=0, atol=2e-5)


def test_heun_agrees_with_diffusers():
    schedule = make_schedule("linear", T)
    scheduler = their_scheduler("HeunDiscreteScheduler", "linear")
    scheduler.alphas_cumprod = schedule.alphas_cumprod
    scheduler.set_timesteps(28)  # 999 = 27 · 37: all of its timesteps are integers
    bars = schedule.alphas_cumprod
    y = noise(T).double() / bars[-1].sqrt()  # it works in x/√ᾱ
    for t in scheduler.timesteps:
        output = network(scheduler.scale_model_input(y, t).float(), t.expand(2).long())
        y = scheduler.step(output, t, y).prev_sample
    options = SamplingOptions(sampler="heun", steps=28, spacing="uniform")
    ours = final(network, noise(T), DiffusionProcess(schedule, clip=False), options, no_noise)
    torch.testing.assert_close(ours, y.float(), rtol=0, atol=2e-4)


# Laws.


def every_sampler(steps):
    uniform = {"steps": steps, "spacing": "uniform"}
    return [
        SamplingOptions(sampler="ddpm", variance="fixed_large", **uniform),
        SamplingOptions(sampler="ddpm", variance="fixed_small", **uniform),
        SamplingOptions(sampler="ddim", **uniform),
        SamplingOptions(sampler="ddim", eta=1.0, **uniform),
        SamplingOptions(sampler="dpmpp", **uniform),
        SamplingOptions(sampler="dpmpp3m", **uniform),
        SamplingOptions(sampler="heun", **uniform),
    ]


def name_of(options):
    return f"{options.sampler}-{options.variance if options.sampler == 'ddpm' else options.eta}-{options.steps}"


@pytest.mark.parametrize("options", [*every_sampler(100), *every_sampler(7), *every_sampler(1)], ids=name_of)
def test_the_last_step_is_t_0_and_adds_no_noise(options):
    def only_before(t):
        assert t > 0
        return noise(t)

    schedule = Schedule.linear(100)
    process = DiffusionProcess(schedule, variance=options.variance)
    steps = list(sample(wild, noise(1), process, options, only_before))
    assert [step.t for step in steps] == timesteps(schedule, options.steps, "uniform")
    assert steps[-1].t == (0 if options.steps > 1 else 99)
    torch.testing.assert_close(steps[-1].x, steps[-1].x0, rtol=0, atol=1e-6)
    assert all(step.x.dtype == torch.float32 and step.x0.abs().max() <= 1 for step in steps)


MEAN, DEVIATION = 0.3, 0.4


def best_for_a_gaussian(schedule):
    """The ideal network, predicting x0, when all pixels are N(MEAN, DEVIATION²)."""

    def denoise(x, t):
        bar = schedule.alphas_cumprod[t].reshape(-1, 1, 1, 1)
        gain = bar.sqrt() * DEVIATION**2 / (bar * DEVIATION**2 + 1 - bar)
        return (MEAN + gain * (x - bar.sqrt() * MEAN)).float()

    return denoise


# The published coefficients of 3M are of formal order 2.
@pytest.mark.parametrize(("name", "order"), [("ddim", 1), ("dpmpp", 2), ("dpmpp3m", 2), ("heun", 2)])
def test_solvers_converge_to_the_flow_of_a_gaussian_at_their_order(name, order):
    schedule = Schedule.cosine(4096)
    bar = schedule.alphas_cumprod[4000].item()
    # The flow keeps quantiles: from N(√ᾱ MEAN, ᾱ DEVIATION² + 1-ᾱ) to N(MEAN, DEVIATION²). Seen from one level on,
    # by a schedule that ends there, so that all step sizes shrink together.
    schedule = schedule.respaced(range(4001))
    x = torch.linspace(-2, 2, 9, dtype=torch.float64).reshape(-1, 1, 1, 1)
    exact = MEAN + DEVIATION * (x - math.sqrt(bar) * MEAN) / math.sqrt(bar * DEVIATION**2 + 1 - bar)
    denoise = best_for_a_gaussian(schedule)

    def error(steps):
        options = SamplingOptions(sampler=name, steps=steps + 1, spacing="uniform", max_step_ratio=None)
        process = DiffusionProcess(schedule, "sample", clip=False)
        got = final(lambda x, t: denoise(x, t).double(), x, process, options, no_noise)
        return (got - exact).abs().max().item()

    coarse, fine = error(50), error(100)
    print(f"\n{name}: error {coarse:.1e} in 50 steps, {fine:.1e} in 100: order {math.log2(coarse / fine):.2f}")
    assert fine < 2e-2
    assert math.log2(coarse / fine) > order - 0.25


@pytest.mark.parametrize("options", every_sampler(200), ids=name_of)
def test_samplers_reproduce_the_mean_and_deviation_of_the_data(options):
    schedule = Schedule.linear(T)
    many = (8_000, 1, 1, 1)
    process = DiffusionProcess(schedule, "sample", options.variance, clip=False)
    got = final(best_for_a_gaussian(schedule), noise(T, many), process, options, lambda t: noise(t, many))
    assert abs(got.mean() - MEAN) < 0.02
    assert abs(got.std() - DEVIATION) < 0.02


def gains_and_spreads(denoise, process, options):
    """Each step but the last of a sampler whose network is linear is x → gain · x + spread · noise + constant."""

    def path(start, added):
        x_T = torch.full((1, 1, 1, 1), start, dtype=torch.float64)
        steps = sample(denoise, x_T, process, options, lambda t: torch.full_like(x_T, added))
        return torch.tensor([start, *(step.x.item() for step in steps)], dtype=torch.float64)[:-1]

    rest = path(0.0, 0.0)
    moved, noisy = path(1.0, 0.0) - rest, path(0.0, 1.0) - rest
    gains = moved[1:] / moved[:-1]
    return gains.tolist(), (noisy[1:] - gains * noisy[:-1]).tolist()


@pytest.mark.parametrize("steps", [T, 50, 7])
@pytest.mark.parametrize(("sampler", "eta"), [("ddpm", 0.0), ("ddim", 0.0), ("ddim", 0.5)])
def test_the_way_to_a_known_image_keeps_to_the_forward_process(sampler, eta, steps):
    # Where x0 is known, every x on the way is √ᾱ x0 plus noise of variance 1-ᾱ, however few levels are visited.
    schedule = Schedule.linear(T)
    process = DiffusionProcess(schedule, "sample", "fixed_small")
    options = SamplingOptions(sampler=sampler, steps=steps, eta=eta, spacing="uniform")
    bars = schedule.alphas_cumprod[timesteps(schedule, steps, "uniform")].tolist()
    variance, checked = 1 - bars[0], 0
    for bar, gain, spread in zip(bars[1:], *gains_and_spreads(lambda x, t: torch.full_like(x, 0.7), process, options)):
        variance, checked = gain**2 * variance + spread**2, checked + 1
        assert variance == pytest.approx(1 - bar, rel=1e-5)
    assert checked == steps - 1


@pytest.mark.parametrize("steps", [T, 50, 7])
def test_fixed_large_keeps_standard_normal_data_standard_normal(steps):
    # Ho et al. 2020, section 3.2: β is the right variance for x0 ~ N(0, 1), for which E[x0 | x_t] = √ᾱ x_t.
    schedule = Schedule.linear(T)

    def best(x, t):
        return schedule.alphas_cumprod[t].sqrt().reshape(-1, 1, 1, 1) * x

    process = DiffusionProcess(schedule, "sample", "fixed_large", clip=False)
    for gain, spread in zip(*gains_and_spreads(best, process, SamplingOptions(sampler="ddpm", steps=steps))):
        assert gain**2 + spread**2 == pytest.approx(1, abs=1e-6)


def test_clipping_comes_before_the_posterior_mean():
    # From x = 0 the posterior mean of a clipped image is x0's weight times ±1, far inside [-1, 1]; clipping the mean
    # instead would give ±1.
    schedule = Schedule.linear(T)
    process, options = DiffusionProcess(schedule, "sample"), SamplingOptions(sampler="ddpm", steps=T)
    zeros = torch.zeros(SHAPE)
    (step, *_) = sample(lambda x, t: torch.full_like(x, 50.0), zeros, process, options, lambda t: zeros)
    before, bar = schedule.alphas_cumprod[-2], schedule.alphas_cumprod[-1]
    weight = before.sqrt() * schedule.betas[-1] / (1 - bar)
    torch.testing.assert_close(step.x, torch.full(SHAPE, weight.item()))


@pytest.mark.parametrize("name", ["ddim", "heun"])
def test_a_clipped_image_brings_its_own_noise(name):
    # With x0 clipped to 1, x must stay x0 and noise in the proportions of the next level.
    schedule = Schedule.linear(T)
    process, options = DiffusionProcess(schedule, "sample"), SamplingOptions(sampler=name, steps=10, spacing="uniform")
    bars = schedule.alphas_cumprod[timesteps(schedule, 10, "uniform")]
    start = noise(T)
    step = next(sample(lambda x, t: torch.full_like(x, 50.0), start, process, options, no_noise))
    epsilon = (start - bars[0].sqrt()) / (1 - bars[0]).sqrt()
    torch.testing.assert_close(step.x, (bars[1].sqrt() + (1 - bars[1]).sqrt() * epsilon).float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("clip", [True, False], ids=["clipped", "unclipped"])
@pytest.mark.parametrize("options", every_sampler(7), ids=name_of)
def test_a_dynamic_threshold_keeps_estimates_in_range_and_divides_by_it(options, clip):
    wide = torch.tensor([-6.0, 0.5, -1.0, 2.0, 4.0, -0.25]).reshape(1, 1, 2, 3)  # the median of |x0| is 1.5
    narrow = torch.tensor([-6.0, 0.5, -0.75, 0.25, 4.0, -0.25]).reshape(1, 1, 2, 3)  # … 0.625: only clipped
    exact = torch.tensor([-1.0, 0.5 / 1.5, -1.0 / 1.5, 1.0, 1.0, -0.25 / 1.5]).reshape(1, 1, 2, 3)
    process = DiffusionProcess(Schedule.linear(T), "sample", options.variance, clip)
    options = options.model_copy(update={"dynamic_threshold": 0.5})
    estimates = torch.cat((wide, narrow))
    steps = list(sample(lambda x, t: estimates, noise(T), process, options, noise))
    for step in steps:
        assert step.x0.abs().max() <= 1
        torch.testing.assert_close(step.x0[:1], exact)
        assert torch.equal(step.x0[1:], narrow.clamp(-1, 1))
    torch.testing.assert_close(steps[-1].x, steps[-1].x0, rtol=0, atol=1e-6)
    plain = sample(
        lambda x, t: estimates, noise(T), process, options.model_copy(update={"dynamic_threshold": None}), noise
    )
    assert torch.equal(next(plain).x0, estimates.clamp(-1, 1) if clip else estimates)


@pytest.mark.parametrize("options", every_sampler(5), ids=name_of)
def test_all_is_float32_and_without_a_graph_around_a_16_bit_network(options):
    weight = torch.ones((), requires_grad=True)

    def denoise(x, t):
        assert (x.dtype, t.dtype, t.shape) == (torch.float32, torch.int64, (2,))
        return torch.cat((weight * network(x, t), x), 1).bfloat16()

    process = DiffusionProcess(Schedule.linear(T), variance=options.variance)
    for step in sample(denoise, noise(T), process, options, noise):
        assert step.x.dtype == step.x0.dtype == torch.float32
        assert not step.x.requires_grad
    assert torch.is_grad_enabled()
    with pytest.raises(TypeError, match="needs float32"):
        next(sample(lambda x, t: x, noise(T).bfloat16(), process, options, noise))


def test_uint8_is_the_nearest_level():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(from_uint8(levels)), levels)
    fine = torch.linspace(-1.2, 1.2, 9601, dtype=torch.float64)
    exact = (fine.clamp(-1, 1) + 1) / 2 * 255
    assert (to_uint8(fine).double() - exact).abs().max() <= 0.5
    assert abs((to_uint8(fine).double() - exact).mean()) < 0.01  # truncation would darken by half a level


def test_sampling_is_lazy():
    process = DiffusionProcess(Schedule.linear(T))
    assert isinstance(sample(network, noise(T), process, SamplingOptions(), noise), types.GeneratorType)
