import itertools
import math
import types

import diffusers
import pytest
import torch

from pipeline.diffusion.samplers import Sampler, from_uint8, guided, sample, timesteps, to_uint8
from pipeline.diffusion.schedule import Schedule, make_schedule

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


# The judge: diffusers, in lockstep. Each of its steps starts from our pictures, so that errors do not add up.


def their_scheduler(kind, schedule_name, **options):
    return getattr(diffusers, kind)(num_train_timesteps=T, beta_schedule=SCHEDULES[schedule_name], **options)


def with_our_tables(scheduler, schedule):
    scheduler.betas, scheduler.alphas = schedule.betas, 1 - schedule.betas
    scheduler.alphas_cumprod = schedule.alphas_cumprod
    return scheduler


def largest_error(scheduler, schedule, sampler, prediction_type, denoise=network, **options):
    """Over all steps of ours and theirs, and the number of steps."""
    scheduler.set_timesteps(sampler.steps)
    before, error, steps = noise(T), 0.0, 0
    for t, x, _ in sample(denoise, before, schedule, sampler, noise, prediction_type):
        assert t == int(scheduler.timesteps[steps])
        output = denoise(before, torch.full((2,), t))
        theirs = scheduler.step(output, t, before, generator=torch.Generator().manual_seed(t), **options).prev_sample
        error = max(error, (theirs - x).abs().max().item())
        before, steps = x, steps + 1
    return error, steps


@pytest.mark.parametrize("clip", [True, False], ids=["clipped", "unclipped"])
@pytest.mark.parametrize("prediction_type", TYPES)
@pytest.mark.parametrize("name", SCHEDULES)
def test_ddpm_and_ddim_agree_with_diffusers_at_every_timestep(name, prediction_type, clip):
    schedule = make_schedule(name, T)
    options = {"prediction_type": prediction_type, "clip_sample": clip}
    ddpm = [Sampler("ddpm", T, variance=variance, clip=clip) for variance in ("fixed_small", "fixed_large")]
    cases = [("DDPMScheduler", sampler, {"variance_type": sampler.variance}, {}) for sampler in ddpm]
    cases += [
        ("DDIMScheduler", Sampler("ddim", T, eta=eta, clip=clip), {}, {"eta": eta, "use_clipped_model_output": clip})
        for eta in (0.0, 1.0)
    ]
    ours, shipped = [], []
    for kind, sampler, construction, call in cases:
        scheduler = their_scheduler(kind, name, **options, **construction)
        error, steps = largest_error(scheduler, schedule, sampler, prediction_type, **call)
        assert steps == T
        shipped.append(error)
        scheduler = with_our_tables(their_scheduler(kind, name, **options, **construction), schedule)
        ours.append(largest_error(scheduler, schedule, sampler, prediction_type, **call)[0])
    kinds = ["DDPM small", "DDPM large", "DDIM 0", "DDIM 1"]
    report = ", ".join(f"{kind} {a:.1e} ({b:.1e})" for kind, a, b in zip(kinds, ours, shipped))
    print(f"\n{name} {prediction_type} {'clipped' if clip else 'unclipped'}: {report}; in brackets as shipped")
    assert max(ours) < 1e-5
    assert max(shipped) < 2e-2


@pytest.mark.parametrize("name", SCHEDULES)
def test_learned_variance_agrees_with_diffusers_at_every_timestep(name):
    def denoise(x, t):
        return torch.cat((network(x, t), torch.sin(3 * x)), 1)

    schedule = make_schedule(name, T)
    scheduler = with_our_tables(their_scheduler("DDPMScheduler", name, variance_type="learned_range"), schedule)
    error, steps = largest_error(scheduler, schedule, Sampler("ddpm", T, variance="learned"), "epsilon", denoise)
    assert (error < 1e-5, steps) == (True, T)


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_strided_ddim_and_ddpm_agree_with_diffusers(spacing):
    schedule = make_schedule("linear", T)
    options = {"timestep_spacing": spacing}
    ddim = with_our_tables(their_scheduler("DDIMScheduler", "linear", **options), schedule)
    error, _ = largest_error(
        ddim, schedule, Sampler("ddim", 50, spacing=spacing), "epsilon", wild, use_clipped_model_output=True
    )
    assert error < 1e-5
    ddpm = with_our_tables(their_scheduler("DDPMScheduler", "linear", **options), schedule)
    error, _ = largest_error(ddpm, schedule, Sampler("ddpm", 50, spacing=spacing, variance="fixed_small"), "epsilon")
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
    sampler = Sampler("dpmpp", 20, spacing="trailing", clip=False)
    for t, step in zip(scheduler.timesteps, sample(network, x, schedule, sampler, no_noise, prediction_type)):
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
    ours = final(network, noise(T), schedule, Sampler("heun", 28, clip=False), no_noise, "epsilon")
    torch.testing.assert_close(ours, y.float(), rtol=0, atol=2e-4)


# Laws.


@pytest.mark.parametrize("spacing", ["uniform", "quadratic", "trailing", "leading"])
def test_timesteps_descend_without_repeats_and_are_as_many_as_asked(spacing):
    for total in (1, 2, 7, 100, 1000):
        for steps in {1, 2, 3, total // 3, total // 2, total - 1, total} & set(range(1, total + 1)):
            visited = timesteps(total, steps, spacing)
            assert len(visited) == steps
            assert all(a > b for a, b in itertools.pairwise(visited))
            assert 0 <= visited[-1] <= visited[0] <= total - 1
            if spacing != "leading":
                assert visited[0] == total - 1
            if spacing != "trailing" and steps > 1:
                assert visited[-1] == 0
        assert timesteps(total, total, spacing) == list(reversed(range(total)))


def test_spacings_are_those_of_diffusers_and_of_the_ddim_paper():
    for ours, theirs in (("uniform", "linspace"), ("leading", "leading"), ("trailing", "trailing")):
        for steps in (3, 10, 77, 250):
            scheduler = diffusers.DDIMScheduler(timestep_spacing=theirs)
            scheduler.set_timesteps(steps)
            assert timesteps(T, steps, ours) == scheduler.timesteps.tolist()
    assert timesteps(T, 4, "quadratic") == [999, 444, 111, 0]


@pytest.mark.parametrize("steps", [0, 1001])
def test_impossible_numbers_of_steps_are_refused(steps):
    with pytest.raises(ValueError, match="steps cannot be taken among 1000"):
        timesteps(T, steps, "uniform")


def every_sampler(steps):
    return [
        Sampler("ddpm", steps, variance="fixed_large"),
        Sampler("ddpm", steps, variance="fixed_small"),
        Sampler("ddim", steps),
        Sampler("ddim", steps, eta=1.0),
        Sampler("dpmpp", steps),
        Sampler("heun", steps),
    ]


def name_of(sampler):
    return f"{sampler.name}-{sampler.variance if sampler.name == 'ddpm' else sampler.eta}-{sampler.steps}"


@pytest.mark.parametrize("sampler", [*every_sampler(100), *every_sampler(7), *every_sampler(1)], ids=name_of)
def test_the_last_step_is_t_0_and_adds_no_noise(sampler):
    def only_before(t):
        assert t > 0
        return noise(t)

    schedule = Schedule.linear(100)
    steps = list(sample(wild, noise(1), schedule, sampler, only_before, "epsilon"))
    assert [step.t for step in steps] == timesteps(100, sampler.steps, "uniform")
    assert steps[-1].t == (0 if sampler.steps > 1 else 99)
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


@pytest.mark.parametrize(("name", "order"), [("ddim", 1), ("dpmpp", 2), ("heun", 2)])
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
        sampler = Sampler(name, steps + 1, clip=False)
        got = final(lambda x, t: denoise(x, t).double(), x, schedule, sampler, no_noise, "sample")
        return (got - exact).abs().max().item()

    coarse, fine = error(50), error(100)
    print(f"\n{name}: error {coarse:.1e} in 50 steps, {fine:.1e} in 100: order {math.log2(coarse / fine):.2f}")
    assert fine < 2e-2
    assert math.log2(coarse / fine) > order - 0.25


@pytest.mark.parametrize("sampler", every_sampler(200), ids=name_of)
def test_samplers_reproduce_the_mean_and_deviation_of_the_data(sampler):
    schedule = Schedule.linear(T)
    many = (8_000, 1, 1, 1)
    sampler = Sampler(sampler.name, 200, sampler.eta, "uniform", sampler.variance, clip=False)
    got = final(best_for_a_gaussian(schedule), noise(T, many), schedule, sampler, lambda t: noise(t, many), "sample")
    assert abs(got.mean() - MEAN) < 0.02
    assert abs(got.std() - DEVIATION) < 0.02


def gains_and_spreads(denoise, schedule, sampler, prediction_type="sample"):
    """Each step but the last of a sampler whose network is linear is x → gain · x + spread · noise + constant."""

    def path(start, added):
        x_T = torch.full((1, 1, 1, 1), start, dtype=torch.float64)
        steps = sample(denoise, x_T, schedule, sampler, lambda t: torch.full_like(x_T, added), prediction_type)
        return torch.tensor([start, *(step.x.item() for step in steps)], dtype=torch.float64)[:-1]

    rest = path(0.0, 0.0)
    moved, noisy = path(1.0, 0.0) - rest, path(0.0, 1.0) - rest
    gains = moved[1:] / moved[:-1]
    return gains.tolist(), (noisy[1:] - gains * noisy[:-1]).tolist()


@pytest.mark.parametrize("steps", [T, 50, 7])
@pytest.mark.parametrize(
    "sampler", [Sampler("ddpm", variance="fixed_small"), Sampler("ddim"), Sampler("ddim", eta=0.5)], ids=name_of
)
def test_the_way_to_a_known_picture_keeps_to_the_forward_process(sampler, steps):
    # Where x0 is known, every x on the way is √ᾱ x0 plus noise of variance 1-ᾱ, however few levels are visited.
    schedule = Schedule.linear(T)
    sampler = Sampler(sampler.name, steps, sampler.eta, "uniform", sampler.variance)
    bars = schedule.alphas_cumprod[timesteps(T, steps, "uniform")].tolist()
    variance, checked = 1 - bars[0], 0
    for bar, gain, spread in zip(bars[1:], *gains_and_spreads(lambda x, t: torch.full_like(x, 0.7), schedule, sampler)):
        variance, checked = gain**2 * variance + spread**2, checked + 1
        assert variance == pytest.approx(1 - bar, rel=1e-5)
    assert checked == steps - 1


@pytest.mark.parametrize("steps", [T, 50, 7])
def test_fixed_large_keeps_standard_normal_data_standard_normal(steps):
    # Ho et al. 2020, section 3.2: β is the right variance for x0 ~ N(0, 1), for which E[x0 | x_t] = √ᾱ x_t.
    schedule = Schedule.linear(T)

    def best(x, t):
        return schedule.alphas_cumprod[t].sqrt().reshape(-1, 1, 1, 1) * x

    sampler = Sampler("ddpm", steps, variance="fixed_large", clip=False)
    for gain, spread in zip(*gains_and_spreads(best, schedule, sampler)):
        assert gain**2 + spread**2 == pytest.approx(1, abs=1e-6)


def test_clipping_comes_before_the_posterior_mean():
    # From x = 0 the posterior mean of a clipped picture is x0's weight times ±1, far inside [-1, 1]; clipping the mean
    # instead would give ±1.
    schedule = Schedule.linear(T)
    (step, *_) = sample(
        lambda x, t: torch.full_like(x, 50.0),
        torch.zeros(SHAPE),
        schedule,
        Sampler("ddpm", T),
        lambda t: torch.zeros(SHAPE),
        "sample",
    )
    before, bar = schedule.alphas_cumprod[-2], schedule.alphas_cumprod[-1]
    weight = before.sqrt() * schedule.betas[-1] / (1 - bar)
    torch.testing.assert_close(step.x, torch.full(SHAPE, weight.item()))


@pytest.mark.parametrize("name", ["ddim", "heun"])
def test_a_clipped_picture_brings_its_own_noise(name):
    # With x0 clipped to 1, x must stay x0 and noise in the proportions of the next level.
    schedule = Schedule.linear(T)
    sampler = Sampler(name, 10)
    bars = schedule.alphas_cumprod[timesteps(T, 10, "uniform")]
    start = noise(T)
    step = next(sample(lambda x, t: torch.full_like(x, 50.0), start, schedule, sampler, no_noise, "sample"))
    epsilon = (start - bars[0].sqrt()) / (1 - bars[0]).sqrt()
    torch.testing.assert_close(step.x, (bars[1].sqrt() + (1 - bars[1]).sqrt() * epsilon).float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("sampler", every_sampler(5), ids=name_of)
def test_all_is_float32_and_without_a_graph_around_a_16_bit_network(sampler):
    weight = torch.ones((), requires_grad=True)

    def denoise(x, t):
        assert (x.dtype, t.dtype, t.shape) == (torch.float32, torch.int64, (2,))
        return torch.cat((weight * network(x, t), x), 1).bfloat16()

    for step in sample(denoise, noise(T), Schedule.linear(T), sampler, noise, "epsilon"):
        assert step.x.dtype == step.x0.dtype == torch.float32
        assert not step.x.requires_grad
    assert torch.is_grad_enabled()
    with pytest.raises(TypeError, match="needs float32"):
        next(sample(lambda x, t: x, noise(T).bfloat16(), Schedule.linear(T), sampler, noise, "epsilon"))


def test_guidance_takes_one_pass_of_both_labels():
    calls = []

    def conditional(x, t, labels):
        calls.append(labels.tolist())
        shift = labels.float().reshape(-1, 1, 1, 1)
        return torch.cat((x + shift, shift.expand_as(x)), 1)

    x, t, labels = noise(0), torch.tensor([5, 5]), torch.tensor([1, 2])
    output = guided(conditional, labels, 7, 3.0)(x, t)
    assert calls == [[1, 2, 7, 7]]
    shift = labels.reshape(-1, 1, 1, 1)
    torch.testing.assert_close(output[:, :1], x + 7 + 3 * (shift - 7))
    torch.testing.assert_close(output[:, 1:], shift.float().expand_as(x))  # the variance is not steered


def test_guidance_of_one_is_the_conditional_network():
    sizes = []

    def conditional(x, t, labels):
        sizes.append(len(x))
        return x * labels.reshape(-1, 1, 1, 1)

    x, t, labels = noise(0), torch.tensor([5, 5]), torch.tensor([1, 2])
    torch.testing.assert_close(guided(conditional, labels, 7, 1.0)(x, t), conditional(x, t, labels))
    assert sizes == [2, 2]
    torch.testing.assert_close(guided(conditional, labels, 7, 0.0)(x, t), 7 * x)


def test_uint8_is_the_nearest_level():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(from_uint8(levels)), levels)
    fine = torch.linspace(-1.2, 1.2, 9601, dtype=torch.float64)
    exact = (fine.clamp(-1, 1) + 1) / 2 * 255
    assert (to_uint8(fine).double() - exact).abs().max() <= 0.5
    assert abs((to_uint8(fine).double() - exact).mean()) < 0.01  # truncation would darken by half a level


def test_sampling_is_lazy():
    assert isinstance(sample(network, noise(T), Schedule.linear(T), Sampler(), noise, "epsilon"), types.GeneratorType)
