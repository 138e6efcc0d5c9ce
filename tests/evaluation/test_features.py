import hashlib
import io
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pipeline.errors import ConfigError, DataError
from pipeline.evaluation import features

CPU = torch.device("cpu")


def resnet_weights(width=4, blocks=(1, 2, 1), classes=5, channels=3, seed=0):
    """Random weights under the names of akamaster's state_dict."""
    generator = np.random.default_rng(seed)
    weights = {}

    def add(name, *shape):
        weights[name] = generator.normal(0, 0.5, shape).astype(np.float32)

    def convolution(conv, norm, outputs, inputs):
        add(f"{conv}.weight", outputs, inputs, 3, 3)
        for part in ("weight", "bias", "running_mean"):
            add(f"{norm}.{part}", outputs)
        weights[f"{norm}.running_var"] = generator.uniform(0.5, 2, outputs).astype(np.float32)

    convolution("conv1", "bn1", width, channels)
    before = width
    for stage, count in enumerate(blocks):
        for block in range(count):
            base = f"layer{stage + 1}.{block}"
            convolution(f"{base}.conv1", f"{base}.bn1", width << stage, before)
            convolution(f"{base}.conv2", f"{base}.bn2", width << stage, width << stage)
            before = width << stage
    add("linear.weight", classes, before)
    add("linear.bias", classes)
    return weights


def as_published(weights, images):
    """The forward pass as akamaster/pytorch_resnet_cifar10 has it, in float64, from the weights alone."""
    weights = {name: torch.from_numpy(value).double() for name, value in weights.items()}

    def norm(x, name):
        mean, var, scale, shift = (
            weights[f"{name}.{part}"].view(-1, 1, 1) for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-5).sqrt() * scale + shift

    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).double().view(2, 1, 3, 1, 1)
    x = (images.double() / 255 - mean) / std
    x = F.relu(norm(F.conv2d(x, weights["conv1.weight"], padding=1), "bn1"))
    for base in sorted({name.rsplit(".", 2)[0] for name in weights if name.startswith("layer")}):
        first = weights[f"{base}.conv1.weight"]
        stride = 2 if len(first) != first.shape[1] else 1
        y = F.relu(norm(F.conv2d(x, first, stride=stride, padding=1), f"{base}.bn1"))
        y = norm(F.conv2d(y, weights[f"{base}.conv2.weight"], padding=1), f"{base}.bn2")
        if stride == 2:
            shortcut = torch.zeros_like(y)
            shortcut[:, len(first) // 4 : -(len(first) // 4)] = x[:, :, ::2, ::2]
            x = shortcut
        x = F.relu(y + x)
    pooled = F.avg_pool2d(x, x.shape[2:]).flatten(1)
    return pooled, pooled @ weights["linear.weight"].T + weights["linear.bias"]


def npz(path: Path, weights) -> str:
    np.savez(path, **weights)
    return str(path)


def random_images(count=5, channels=3, size=(32, 32), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, channels, *size), dtype=torch.uint8, generator=generator)


@pytest.fixture
def resnet(tmp_path):
    return npz(tmp_path / "resnet.npz", resnet_weights())


# --- a CIFAR ResNet ---


@pytest.mark.parametrize("size", [(32, 32), (9, 14), (64, 64)])
def test_a_resnet_gives_the_pooled_features_and_logits_of_the_published_code(size, resnet):
    images = random_images(size=size)
    found = features.load(resnet, CPU, size)(images)
    pooled, logits = as_published(resnet_weights(), images)
    torch.testing.assert_close(found.features, pooled.float(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.logits, logits.float(), rtol=1e-4, atol=1e-4)
    assert pooled.std() > 0.1


def test_grey_images_are_repeated_to_three_channels(resnet):
    extract, grey = features.load(resnet, CPU, (32, 32)), random_images(channels=1)
    assert torch.equal(extract(grey).features, extract(torch.cat([grey] * 3, dim=1)).features)


def test_the_same_batches_give_the_same_bits_and_others_the_same_features(resnet):
    extract, images = features.load(resnet, CPU, (32, 32)), random_images(24)
    whole = extract(images).features
    assert torch.equal(whole, extract(images).features)
    parts = torch.cat([extract(part).features for part in images.split(7)])
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-4)


def test_an_extractor_is_identified_by_its_file_and_its_preprocessing(resnet, tmp_path):
    other = npz(tmp_path / "other.npz", resnet_weights(seed=1))
    a, b, c = (features.load(url, CPU, (8, 8)) for url in (resnet, other, script(tmp_path / "c.pt", Means())))
    assert a.sha256 == hashlib.sha256(Path(resnet).read_bytes()).hexdigest()
    assert len({a.sha256, b.sha256, c.sha256}) == 3
    assert a.preprocessing == b.preprocessing != c.preprocessing


# --- TorchScript ---


class Means(nn.Module):
    """Like NVIDIA's: takes three channels, and tells features from class probabilities by an argument."""

    def forward(self, images: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        assert images.shape[1] == 3
        means = images.mean((2, 3))
        return means if return_features else means.softmax(1)


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.conv(images).mean((2, 3), keepdim=True)


class Maps(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images * 2


class Pair(nn.Module):
    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return images, images


def script(path: Path, module: nn.Module) -> str:
    torch.jit.script(module.eval()).save(str(path))
    return str(path)


@pytest.mark.parametrize("channels", [1, 3])
def test_torchscript_gets_values_from_0_to_255_and_return_features(channels, tmp_path):
    images = random_images(channels=channels)
    found = features.load(script(tmp_path / "means.pt", Means()), CPU, (32, 32))(images)
    torch.testing.assert_close(found.features, images.float().mean((2, 3)).expand(-1, 3))
    probabilities = images.float().mean((2, 3)).expand(-1, 3).softmax(1)  # what it returns without the argument
    torch.testing.assert_close(found.logits.softmax(1), probabilities)


def test_torchscript_without_return_features_is_called_without_it(tmp_path):
    url = str(tmp_path / "traced.torchscript")
    torch.jit.trace(nn.AdaptiveAvgPool2d(1), torch.zeros(2, 3, 8, 8)).save(url)
    images = random_images()
    found = features.load(url, CPU, (32, 32))(images)  # (B, D, 1, 1) is (B, D)
    torch.testing.assert_close(found.features, images.float().mean((2, 3)))
    assert "return_features" not in features.load(url, CPU, (32, 32)).preprocessing


# --- torch.export ---


class Classifier(nn.Module):
    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        means = images.mean((2, 3))
        return means, means * 2


def exported(path: Path, module: nn.Module, **shapes) -> str:
    torch.export.save(torch.export.export(module, (torch.zeros(2, 3, 32, 32),), **shapes), str(path))
    return str(path)


def test_a_program_of_torch_export_gives_features_and_perhaps_logits(tmp_path):
    dynamic = {"dynamic_shapes": ({0: torch.export.Dim("batch")},)}
    images, means = random_images(), random_images().float().mean((2, 3))
    both = features.load(exported(tmp_path / "both.pt2", Classifier(), **dynamic), CPU, (32, 32))(images)
    torch.testing.assert_close(both.features, means)
    torch.testing.assert_close(both.logits, 2 * means)
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1))
    alone = features.load(exported(tmp_path / "alone.pt2", pool, **dynamic), CPU, (32, 32))(images)
    torch.testing.assert_close(alone.features, means)
    assert alone.logits is None
    with pytest.raises(ConfigError, match="takes no batch of 5 RGB images of 32x32: Guard failed"):
        features.load(exported(tmp_path / "fixed.pt2", pool), CPU, (32, 32))(images)


# --- the standard file by its name ---


def test_inception_is_fetched_once_and_only_the_standard_file_is_taken(tmp_path, monkeypatch):
    served, cache = tmp_path / "served.pt", tmp_path / "cache/ddpm-pipeline/inception-2015-12-05.pt"
    script(served, Means())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(features, "_INCEPTION_URL", str(tmp_path / "nowhere.pt"))
    with pytest.raises(ConfigError, match=rf"elsewhere and copy it to {cache} \(sha256 f58cb9b6"):
        features.load("inception", CPU, (16, 16))
    monkeypatch.setattr(features, "_INCEPTION_URL", "http://127.0.0.1:9/inception.pt")  # no server is at this port
    with pytest.raises(
        ConfigError, match=r"cannot download http://127.0.0.1:9/inception.pt \(Connect call failed [^:]*\)\. "
    ):
        features.load("inception", CPU, (16, 16))
    monkeypatch.setattr(features, "_INCEPTION_URL", str(served))
    with pytest.raises(DataError, match=r"has the sha256 .*, not f58cb9b6"):
        features.load("inception", CPU, (16, 16))
    assert not cache.exists()
    monkeypatch.setattr(features, "INCEPTION_SHA256", hashlib.sha256(served.read_bytes()).hexdigest())
    first = features.load("inception", CPU, (16, 16))
    served.unlink()
    assert features.load("inception", CPU, (16, 16)).sha256 == first.sha256 == features.INCEPTION_SHA256
    assert cache.exists()


# --- what is refused, each in one line ---


def refused(url, kind=ConfigError) -> str:
    with pytest.raises(kind) as error:
        features.load(str(url), CPU, (16, 16))
    assert "\n" not in str(error.value) and str(url) in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("module", "why"),
    [
        (Plain(), "to have 1 channels, but got 3 channels"),
        (Maps(), "gives (2, 3, 16, 16) for 2 images"),
        (Pair(), "gives tuple for 2 images"),
    ],
)
def test_a_network_with_unsuitable_input_or_output_is_refused_at_load(module, why, tmp_path):
    assert why in refused(script(tmp_path / "net.pt", module))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda w: w | {"conv1.weight": np.zeros((4, 1, 3, 3), np.float32)}, "(4, 1, 3, 3); wanted: (4, 3, 3, 3)"),
        (lambda w: {name: w[name] for name in w if name != "layer2.1.bn1.bias"}, "layer2.1.bn1.bias: missing"),
        (lambda w: w | {"layer2.0.shortcut.0.weight": w["bn1.bias"]}, "shortcut.0.weight: (4,); wanted: not in it"),
        (lambda w: {"images": np.zeros((3, 8, 8, 3), np.uint8)}, "no CIFAR ResNet"),
        (lambda w: {"conv1.weight": np.float32(1)}, "no CIFAR ResNet"),
        (lambda w: w | {"bn1.bias": np.array(["a"] * 4)}, "something other than tensors"),
        (lambda w: w | {"bn1.bias": np.array([print] * 4, object)}, "something other than tensors"),
    ],
)  # fmt: skip
def test_an_npz_of_something_else_is_refused(change, why, tmp_path):
    assert why in refused(npz(tmp_path / "net.npz", change(resnet_weights())))


def test_what_is_no_feature_file_is_refused(tmp_path):
    assert "No such file" in refused(tmp_path / "absent.npz")
    assert "directory" in refused(tmp_path, DataError)
    for name, data in {"empty": b"", "text.pt": b"weights\n", "zip": b"PK\x03\x04 and no more"}.items():
        (tmp_path / name).write_bytes(data)
        assert "or no feature file" in refused(tmp_path / name, DataError)
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("readme.txt", "hello")
    assert "an unknown format" in refused(tmp_path / "other.zip")


@pytest.mark.parametrize("kind", ["npz", "pt"])
def test_a_damaged_feature_file_is_refused(kind, tmp_path):
    url = tmp_path / f"net.{kind}"
    network = nn.Sequential(nn.Conv2d(3, 64, 3), nn.AdaptiveAvgPool2d(1))
    whole = Path(npz(url, resnet_weights()) if kind == "npz" else script(url, network)).read_bytes()
    middle = len(whole) // 3
    for data in (whole[:middle], whole[:-30], whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]):
        url.write_bytes(data)
        assert "is damaged" in refused(url, DataError)


class Exploit:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def test_no_pickle_of_python_objects_is_run(tmp_path):
    target, saved, good = tmp_path / "exploited", tmp_path / "saved.pt", tmp_path / "good.pt"
    torch.save(Exploit(target), saved)
    assert "an unknown format" in refused(saved)
    array = np.array([Exploit(target)], object)
    assert "something other than tensors" in refused(npz(tmp_path / "net.npz", {"conv1.weight": array}))
    script(good, Means())
    changed = io.BytesIO()
    with zipfile.ZipFile(good) as archive, zipfile.ZipFile(changed, "w") as evil:
        for name in archive.namelist():
            exploit = name.endswith("/data.pkl")
            evil.writestr(name, pickle.dumps(Exploit(target), 2) if exploit else archive.read(name))
    good.write_bytes(changed.getvalue())
    assert "is not TorchScript" in refused(good)
    assert not target.exists()
    pickle.loads(pickle.dumps(Exploit(target)))
    assert target.exists()  # it would have been made
