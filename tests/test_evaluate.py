"""The job `evaluate`: figures follow from files of features, which any number of processes make, killed at will."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipeline import evaluate as job
from pipeline.data.loading.batches import read_all
from pipeline.data.shards.shard_set import ShardSet
from pipeline.errors import ConfigError, DataError, Stopped
from pipeline.evaluation import features, result_file
from pipeline.evaluation.figures import figures
from pipeline.sampling import generator as generators
from pipeline.verify import verify
from tests.evaluation.test_features import npz, resnet_weights
from tests.jobs import shard
from tests.launch import ddpm

NAMES = ["frechet_distance", "frechet_distance_infinity", "kernel_distance", "precision", "recall", "density",
         "coverage", "inception_score", "memorised_share"]  # fmt: skip


def write_images(directory: Path, seed: int, count: int, level: int = 256) -> None:
    directory.mkdir()
    pixels = np.random.default_rng(seed).integers(level, size=(count, 8, 8, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(directory / f"{i:03d}.png")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reference of 60 images in 4 shards, 40 samples in 4, and a network with 16 features and 5 classes."""
    root = tmp_path_factory.mktemp("evaluate")
    for name, seed, count, level in (("reference", 0, 60, 256), ("samples", 1, 40, 200)):
        write_images(root / f"{name}-images", seed, count, level)
        settings = {"size": 8, "shard_samples": count // 4, "quiet": True}
        shard([str(root / f"{name}-images")], str(root / name), **settings)
    npz(root / "resnet.npz", resnet_weights())
    return root


@pytest.fixture
def evaluate(root: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    def evaluate(**options: Any) -> dict[str, Any]:
        return run(root, **{"cache": tmp_path / "cache"} | options)

    return evaluate


def run(root: Path, **options: Any) -> dict[str, Any]:
    asked = {"samples": root / "samples", "against": root / "reference", "features": root / "resnet.npz"} | options
    return job.evaluate(job.EvaluationRequest(**{name: str(value) for name, value in asked.items()}), quiet=True)


def files(cache: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(cache.glob("features-*/*"))}


def test_the_figures_are_those_of_the_features_of_both_sets(
    evaluate: Callable[..., Any], root: Path, tmp_path: Path
) -> None:
    result = evaluate()
    extractor = features.load(str(root / "resnet.npz"), torch.device("cpu"), (8, 8))
    samples, reference = (ShardSet.open(str(root / name)) for name in ("samples", "reference"))
    of_samples, of_reference = (extractor(read_all(shards).images) for shards in (samples, reference))
    expected = figures(of_samples.features.numpy(), of_reference.features.numpy(), of_samples.logits.numpy())
    assert list(result["figures"]) == NAMES and result["complete"]
    for name, figure in expected.items():
        found = result["figures"][name]
        np.testing.assert_allclose(list(found.values()), [figure.value, figure.low, figure.high], rtol=1e-4, atol=1e-6)
        assert found["low"] <= found["value"] <= found["high"] or name.startswith("frechet")
    assert (result["n"], result["reference_n"]) == (40, 60)
    assert (result["samples_sha256"], result["reference_sha256"]) == (samples.sha256, reference.sha256)
    assert result["features_sha256"] == extractor.sha256
    assert json.loads((tmp_path / "cache/evaluation.json").read_text()) == {
        k: v for k, v in result.items() if k != "complete"
    }


def test_any_number_of_processes_and_stops_give_the_same_files(
    evaluate: Callable[..., Any], root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = evaluate()
    before = files(tmp_path / "cache")
    assert len(before) == 8
    stamps = [path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("features-*/*")]
    assert evaluate() == alone
    assert [path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("features-*/*")] == stamps

    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in (0, 2, 1):  # the last one to end writes the figures, whatever its rank
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        last = evaluate(cache=tmp_path / "ranks")
        assert last["complete"] == (rank == 1) == (tmp_path / "ranks/evaluation.json").exists()
    assert last == alone and files(tmp_path / "ranks") == before
    for rank in (2, 0):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        assert evaluate(cache=tmp_path / "shared") == {"complete": False}
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name)
    done = files(tmp_path / "shared")
    assert len(done) == 5

    counted = []

    def stop(interrupt: object) -> None:
        counted.append(interrupt)
        if len(counted) == 4:
            raise Stopped("as a signal would")

    with monkeypatch.context() as patch:
        patch.setattr(job, "_check_stop", stop)
        with pytest.raises(Stopped):
            evaluate(cache=tmp_path / "shared")
    assert done.keys() < files(tmp_path / "shared").keys() < before.keys()
    assert evaluate(cache=tmp_path / "shared") == alone
    assert files(tmp_path / "shared") == before


def test_features_beside_a_set_are_verified_and_go_with_it(
    evaluate: Callable[..., Any], root: Path, tmp_path: Path
) -> None:
    place = tmp_path / "samples"
    shutil.copytree(root / "samples", place)
    run(root, samples=place, against=place)
    assert verify(str(place)) == [] and (place / "evaluation.json").exists()
    damaged = sorted(place.glob("features-*/*"))[1]
    whole = bytearray(damaged.read_bytes())
    whole[-1] ^= 1
    damaged.write_bytes(whole)
    (finding,) = verify(str(place))
    assert str(damaged) in finding and "it is damaged: remove it" in finding
    with pytest.raises(DataError, match="it is damaged: remove it"):
        run(root, samples=place, against=place)
    damaged.unlink()
    assert not list(tmp_path.glob("cache"))
    run(root, samples=place, against=place)
    assert verify(str(place)) == []
    shard([str(root / "samples-images")], str(place), size=8, overwrite=True, quiet=True)
    assert not [path for path in place.iterdir() if "features" in path.name or path.name == "evaluation.json"]


def test_no_damaged_byte_is_read_as_a_result(tmp_path: Path) -> None:
    url = str(tmp_path / "a.safetensors")
    arrays = {"features": np.arange(6, dtype=np.float32).reshape(2, 3)}
    result_file.write(url, {"tar_sha256": "ab"}, arrays)
    identity, found = result_file.parse(url)
    assert identity == {"tar_sha256": "ab"} and np.array_equal(found["features"], arrays["features"])
    whole = Path(url).read_bytes()
    damaged = [whole[:i] + bytes([whole[i] ^ 1 << i % 8]) + whole[i + 1 :] for i in range(len(whole))]
    for data in (*damaged, *(whole[:i] for i in range(0, len(whole), 7))):
        Path(url).write_bytes(data)
        with pytest.raises(DataError, match="remove it") as error:
            result_file.parse(url)
        assert "\n" not in str(error.value)


def test_copies_are_exposed_and_shown_beside_what_they_copy(
    evaluate: Callable[..., Any], root: Path, tmp_path: Path
) -> None:
    (tmp_path / "copied").mkdir()
    for i in range(10):
        shutil.copy(root / f"reference-images/{7 * i % 60:03d}.png", tmp_path / f"copied/{i}.png")
    shard([str(tmp_path / "copied")], str(tmp_path / "copies"), size=8, quiet=True)
    result = evaluate(samples=tmp_path / "copies", nearest=tmp_path / "near.png")
    assert result["figures"]["memorised_share"]["value"] == 1
    assert result["figures"]["memorised_share"]["low"] > 0.5
    sheet = np.asarray(Image.open(tmp_path / "near.png"))
    assert sheet.shape == (10 * 10 + 2, 5 * 10 + 2, 3)
    for row in range(10):
        sample, nearest, second = (sheet[2 + 10 * row : 10 + 10 * row, 2 + 10 * i : 10 + 10 * i] for i in range(3))
        assert np.array_equal(sample, nearest) and not np.array_equal(sample, second)
    assert any("too large" in note for note in result["notes"])  # 10 samples, 16 features


def test_sets_that_are_not_alike_are_refused_in_one_line(
    evaluate: Callable[..., Any], root: Path, digits: Path, tiny_run: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        ConfigError, match=r"with 3 channels, .* of 8x8 px with 1 channel: make the reference set again"
    ):
        evaluate(against=digits)
    with pytest.raises(ConfigError, match="no such directory"):
        evaluate(samples=tmp_path / "absent")
    with pytest.raises(ConfigError, match=r"give a name that ends in .png"):
        evaluate(nearest=tmp_path / "near.jpg")
    with pytest.raises(ConfigError, match="no checkpoint of this run has drawn"):
        evaluate(log=tmp_path)
    with pytest.raises(ConfigError, match=r"is a run, not a shard set: draw samples with `ddpm sample "):
        evaluate(samples=tiny_run)
    drawn = ddpm("sample", tiny_run, "--seeds", "0-3", "--out", tmp_path / "pngs", "--format", "png", "--quiet")
    assert drawn.returncode == 0, drawn.stderr
    with pytest.raises(ConfigError, match="holds samples as single files, not in tars: draw them with --format tar"):
        evaluate(samples=tmp_path / "pngs")
    for arguments, message in (
        ((), "give --against SHARDSET and --features FILE|inception, or --likelihood SHARDSET"),
        (("--likelihood", digits, "--against", digits), "--likelihood goes with --cache only"),
    ):
        refused = ddpm("evaluate", root / "samples", *arguments)
        assert (refused.returncode == 2 and refused.stderr == f"ddpm: {message}\n") or message in refused.stderr


def test_curves_of_a_run_get_the_figures_at_the_step_of_its_checkpoint(
    tiny_run: Path, digits: Path, root: Path, tmp_path: Path
) -> None:
    place = tmp_path / "run"
    shutil.copytree(tiny_run, place)
    assert ddpm("sample", place, "--seeds", "0-15", "--out", tmp_path / "set", "--quiet").returncode == 0
    result = run(root, samples=tmp_path / "set", against=digits, cache=tmp_path / "cache", log=place)
    events = EventAccumulator(str(place / "tensorboard/evaluation")).Reload()
    (event,) = events.Scalars("quality/frechet_distance")
    assert event.step == 6 and event.value == pytest.approx(result["figures"]["frechet_distance"]["value"])
    assert events.Scalars("quality/recall/high")[0].value == pytest.approx(result["figures"]["recall"]["high"])


def test_bits_per_dimension_are_those_of_each_image_and_kept_by_shard(
    tiny_run: Path, digits: Path, tmp_path: Path
) -> None:
    few = tmp_path / "few"
    with_classes = {"size": 8, "channels": 1, "shard_samples": 1780, "quiet": True}
    shard([str(Path(job.__file__).parents[1] / "shards/digits.zip")], str(few), **with_classes)
    index = json.loads((few / "index.json").read_text())
    index["shards"] = index["shards"][1:]  # 17 images
    index["samples"] = sum(record["samples"] for record in index["shards"])
    (few / "index.json").write_text(json.dumps(index))
    asked = ("evaluate", tiny_run, "--likelihood", few, "--cache", tmp_path / "cache", "--json", "--quiet")
    done = ddpm(*asked)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    generator = generators.load(str(tiny_run), torch.device("cpu"))
    batch = read_all(ShardSet.open(str(few)))
    bound = generator.bits_per_dimension(batch.images[:8], batch.labels[:8], batch.positions[:8])
    (path,) = (tmp_path / "cache").glob("likelihood-*/*")
    arrays = result_file.parse(str(path))[1]
    np.testing.assert_allclose(arrays["terms"][:8], bound.terms.numpy(), rtol=1e-3, atol=1e-5)
    total = arrays["prior"].astype(np.float64) + arrays["terms"].astype(np.float64).sum(axis=1)
    figure = result["figures"]["bits_per_dim"]
    assert figure["value"] == pytest.approx(total.mean()) and result["n"] == len(total) == 17
    assert figure["high"] - figure["value"] == pytest.approx(1.959964 * total.std(ddof=1) / 17**0.5)
    parts = [result["figures"][name]["value"] for name in ("prior", "diffusion", "decoder")]
    assert sum(parts) == pytest.approx(figure["value"]) and result["terms"][0] == pytest.approx(parts[2], abs=1e-6)
    stamp = path.stat().st_mtime_ns
    assert json.loads(ddpm(*asked).stdout) == result and path.stat().st_mtime_ns == stamp
