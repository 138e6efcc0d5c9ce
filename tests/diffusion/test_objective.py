import pytest
import torch

from pipeline.config import DiffusionSection
from pipeline.diffusion.objective import loss, weight
from pipeline.diffusion.process import DiffusionProcess
from pipeline.diffusion.schedule import Schedule, make_schedule

T = 1000
SCHEDULE = Schedule.linear(T)
PROCESS = DiffusionProcess(SCHEDULE)
LEARNED = DiffusionProcess(SCHEDULE, variance="learned")
SIMPLE = DiffusionSection()
TYPES = ["epsilon", "sample", "v_prediction"]


def batch(size=6, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    x0 = torch.rand(size, 2, 3, 5, generator=generator, dtype=dtype) * 2 - 1
    noise = torch.randn(size, 2, 3, 5, generator=generator, dtype=dtype)
    return x0, torch.linspace(0, T - 1, size).long(), noise


def test_a_silent_network_pays_the_mean_square_of_each_images_noise():
    x0, t, noise = batch()
    got = loss(lambda x, t: torch.zeros_like(x), x0, t, noise, PROCESS, SIMPLE)
    assert got.shape == (6,)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, torch.stack([(image**2).mean() for image in noise]))


@pytest.mark.parametrize("kind", TYPES)
def test_the_perfect_network_pays_nothing_and_sees_the_noisy_image(kind):
    (x0, t, noise), process = batch(), DiffusionProcess(SCHEDULE, kind)

    def perfect(x, steps):
        torch.testing.assert_close(x, process.add_noise(x0, noise, t), rtol=0, atol=0)
        assert torch.equal(steps, t)
        return process.target(x0, noise, t)

    assert loss(perfect, x0, t, noise, process, SIMPLE).max() == 0


@pytest.mark.parametrize("kind", TYPES)
def test_min_snr_weighs_the_same_error_of_the_image_alike_for_every_target(kind):
    (x0, t, noise), process = batch(dtype=torch.float64), DiffusionProcess(SCHEDULE, kind)
    guess = x0 + 0.1 * torch.sin(7 * noise)
    xt = process.add_noise(x0, noise, t)
    bar = SCHEDULE.alphas_cumprod[t][:, None, None, None]
    implied_noise = (xt - bar.sqrt() * guess) / (1 - bar).sqrt()
    output = process.target(guess, implied_noise, t)
    section = DiffusionSection(loss_weighting="min_snr", min_snr_gamma=3.0)
    got = loss(lambda x, t: output, x0, t, noise, process, section)
    snr = (bar / (1 - bar)).flatten()
    expected = snr.clamp(max=3.0) * (guess - x0).square().flatten(1).mean(1)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)


def test_min_snr_leaves_noisy_timesteps_of_epsilon_alone():
    weights = weight(torch.arange(T), PROCESS, DiffusionSection(loss_weighting="min_snr"))
    snr = SCHEDULE.alphas_cumprod / (1 - SCHEDULE.alphas_cumprod)
    torch.testing.assert_close(weights[snr < 5], torch.ones_like(weights[snr < 5]))
    assert weights[0] < 1e-3


def test_the_hybrid_loss_teaches_the_mean_by_the_simple_loss_alone():
    x0, t, noise = batch()
    output = torch.randn(6, 4, 3, 5, generator=torch.Generator().manual_seed(2)).mul(0.5).requires_grad_()
    simple = loss(lambda x, t: output[:, :2], x0, t, noise, PROCESS, SIMPLE)
    (mean_gradient,) = torch.autograd.grad(simple.sum(), output)
    hybrid = loss(lambda x, t: output, x0, t, noise, LEARNED, SIMPLE)
    (gradient,) = torch.autograd.grad(hybrid.sum(), output)
    torch.testing.assert_close(gradient[:, :2], mean_gradient[:, :2], rtol=0, atol=0)
    assert gradient[:, 2:].flatten(1).abs().sum(1).min() > 0
    assert (hybrid >= simple).all()


def test_the_learned_variance_is_that_of_the_prediction_error():
    # A network whose image is right needs the posterior's variance (mixture -1), a bad one more.
    x0, _, noise = batch()
    t = torch.full((6,), 300)
    mixture = torch.zeros(6, 2, 3, 5, requires_grad=True)

    def slope(prediction):
        output = torch.cat((prediction, mixture), 1)
        value = loss(lambda x, t: output, x0, t, noise, LEARNED, SIMPLE)
        return torch.autograd.grad(value.sum(), mixture)[0]

    assert (slope(noise) > 0).all()
    assert (slope(noise + 30) < 0).all()


def test_the_loss_is_float32_for_a_network_under_bf16_autocast():
    x0, t, noise = batch()
    kernel = torch.randn(2, 2, 1, 1)
    with torch.autocast("cpu", torch.bfloat16):
        got = loss(lambda x, t: torch.nn.functional.conv2d(x, kernel), x0, t, noise, PROCESS, SIMPLE)
    assert got.dtype == torch.float32


def test_images_in_16_bits_are_refused():
    x0, t, noise = batch()
    with pytest.raises(TypeError, match=r"x0 is torch\.bfloat16"):
        loss(lambda x, t: x, x0.bfloat16(), t, noise, PROCESS, SIMPLE)


def test_a_network_without_variances_cannot_learn_them():
    x0, t, noise = batch()
    with pytest.raises(ValueError, match="does not learn variances"):
        loss(lambda x, t: x, x0, t, noise, LEARNED, SIMPLE)


@pytest.mark.parametrize("kind", TYPES)
def test_the_loss_stays_on_its_device(kind):
    # On the meta device nothing has a value, so whatever would wait for one, or needs tables elsewhere, fails.
    x0, t, noise = (tensor.to("meta") for tensor in batch())
    process = DiffusionProcess(SCHEDULE, kind, variance="learned").to("meta")
    section = DiffusionSection(loss_weighting="min_snr")
    got = loss(lambda x, t: torch.cat((x, x), 1), x0, t, noise, process, section)
    assert (got.device.type, got.shape) == ("meta", (6,))


def test_sigmoid_weighs_log_snr_uniformly_and_soft_min_snr_is_a_smooth_minimum():
    process = DiffusionProcess(make_schedule("cosine", T), "epsilon")
    lam, t = process.schedule.log_snr, torch.arange(1, T)
    got = weight(t, process, DiffusionSection(loss_weighting="sigmoid", sigmoid_bias=-2.0))
    assert torch.allclose(got, torch.sigmoid(-2 - lam[1:]) * (lam[:-1] - lam[1:]) * (T - 1) / (lam[0] - lam[-1]))
    # A uniform t with this weight is a uniform log-SNR with sigmoid(b - log SNR): the integral over λ.
    integral = torch.log1p(torch.exp(-2 - lam[-1])) - torch.log1p(torch.exp(-2 - lam[0]))
    assert abs(float(got.mean() * (lam[0] - lam[-1]) / integral) - 1) < 0.02
    snr = lam.exp()
    soft = weight(torch.arange(T), process, DiffusionSection(loss_weighting="soft_min_snr")) * snr  # for x0
    assert torch.allclose(1 / soft, 1 / snr + 1 / 5)
