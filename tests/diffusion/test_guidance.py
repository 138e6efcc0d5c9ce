import pytest
import torch

from pipeline.diffusion.guidance import autoguided, label_guided


def noise(seed):
    return torch.randn(2, 1, 2, 3, generator=torch.Generator().manual_seed(seed))


def test_guidance_needs_one_pass_for_both_labels():
    calls = []

    def conditional(x, t, labels):
        calls.append(labels.tolist())
        shift = labels.float().reshape(-1, 1, 1, 1)
        return torch.cat((x + shift, shift.expand_as(x)), 1)

    x, t, labels = noise(0), torch.tensor([5, 5]), torch.tensor([1, 2])
    output = label_guided(conditional, labels, 7, 3.0)(x, t)
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
    torch.testing.assert_close(label_guided(conditional, labels, 7, 1.0)(x, t), conditional(x, t, labels))
    assert sizes == [2, 2]
    torch.testing.assert_close(label_guided(conditional, labels, 7, 0.0)(x, t), 7 * x)


X, LABELS = noise(0), torch.tensor([1, 2])


def network(offset, passes):
    """One with learned variance, whose output tells it, the labels and the timestep; notes the batch of each pass."""

    def call(x, t, labels=None):
        passes.append(len(x))
        shift = offset + 0.1 * t.reshape(-1, 1, 1, 1) + (0 if labels is None else labels.reshape(-1, 1, 1, 1))
        return torch.cat((x * offset + shift, 10 * x + shift), 1)

    return call


def at(t):
    return torch.full((2,), t)


@pytest.mark.parametrize("kind", ["label", "guide"])
@pytest.mark.parametrize(("t", "inside"), [(99, False), (100, True), (350, True), (600, True), (601, False)])
def test_outside_its_interval_guidance_is_one_pass_of_the_plain_network(kind, t, inside):
    passes, of_guide = [], []
    good, bad = network(3.0, passes), network(0.5, of_guide)

    def steered(interval):
        if kind == "label":
            return label_guided(good, LABELS, 7, 2.5, interval)(X, at(t))
        return autoguided(good, bad, LABELS, 2.5, interval)(X, at(t))

    always, plain = steered(None), good(X, at(t), LABELS)
    assert (always[:, :1] - plain[:, :1]).abs().max() > 0.1
    passes.clear(), of_guide.clear()
    assert torch.equal(steered((100, 600)), always if inside else plain)
    assert passes == ([4] if inside and kind == "label" else [2])
    assert of_guide == ([2] if inside and kind == "guide" else [])


@pytest.mark.parametrize("labels", [None, LABELS], ids=["no labels", "labels"])
def test_autoguidance_leads_away_from_the_worse_network_and_keeps_the_better_ones_variance(labels):
    good, bad = network(3.0, []), network(0.5, [])
    (prediction, mixture), (worse, _) = (f(X, at(5), labels).split(1, dim=1) for f in (good, bad))
    for scale in (0.0, 0.5, 1.7, 4.0):
        output = autoguided(good, bad, labels, scale)(X, at(5))
        torch.testing.assert_close(output[:, :1], worse + scale * (prediction - worse))
        assert torch.equal(output[:, 1:], mixture)


def test_autoguidance_of_one_never_calls_the_guide():
    def never(x, t, labels):
        raise AssertionError("the guide was called")

    passes = []
    good = network(3.0, passes)
    assert torch.equal(autoguided(good, never, LABELS, 1.0)(X, at(5)), good(X, at(5), LABELS))
    assert torch.equal(autoguided(good, never, LABELS, 1.0, (0, 10))(X, at(5)), good(X, at(5), LABELS))
    assert passes == [2] * 4


def test_networks_in_16_bits_are_steered_in_the_precision_of_the_images():
    def narrow(network):
        return lambda x, t, labels: network(x, t, labels).bfloat16()

    good, bad = narrow(network(3.0, [])), narrow(network(0.5, []))
    for guided in (label_guided(good, LABELS, 7, 2.5), autoguided(good, bad, LABELS, 2.5)):
        output = guided(X, at(5))
        assert output.dtype == torch.float32
        assert not torch.equal(output, output.bfloat16().float())
