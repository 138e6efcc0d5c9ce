"""What `ddpm plan` says of a configuration is what a run then does."""

from __future__ import annotations

import io
import json
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode

from pipeline import cli, config_file
from pipeline.config import Config
from pipeline.data.loading.order import check_world
from pipeline.plan import GPUS, SAMPLES, on_a_gpu, plan
from pipeline.training.memory_estimate import POLICIES, Step, trace
from tests.launch import TINY, ddpm

ROOT = Path(__file__).parents[1]


def _plan(*settings: str, samples: int | None = None) -> dict[str, Any]:
    return plan(_config(*settings), samples)


def _config(*settings: str) -> Config:
    return config_file.load(TINY[1], settings, lambda name: Path(name).read_text())


def test_a_checkpoint_is_as_large_as_planned(tiny_run: Path) -> None:
    figures = _plan()
    (newest, *_) = sorted((tiny_run / "checkpoints").iterdir(), reverse=True)
    tensors = sum(file.stat().st_size for file in newest.glob("*.safetensors"))
    everything = sum(file.stat().st_size for file in newest.iterdir())
    assert figures["checkpoint_bytes"] == tensors
    assert figures["checkpoint_bytes"] == pytest.approx(everything, rel=0.01)


def test_the_parameters_are_those_of_the_paper() -> None:
    assert plan(Config())["parameters"] == 35_746_307  # 35.7 M, Ho et al. 2020, appendix B


def test_no_memory_is_taken() -> None:
    """A checkpoint of this network is 1.8 GB."""
    config = config_file.load(str(ROOT / "configs/celebahq256.yaml"), (), lambda name: Path(name).read_text())
    plan(Config())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert plan(config)["checkpoint_bytes"] > 1.7e9
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


def test_world_sizes_are_those_that_training_accepts() -> None:
    figures = _plan("train.global_batch=48", "train.micro_batch=4", "data.lanes=24")
    assert (figures["lanes"], figures["world_sizes"]) == (24, [1, 2, 3, 4, 6, 12])  # of 8 and 24 the shares are not 4·n
    for ranks in figures["world_sizes"]:
        check_world(24, ranks)
        assert 48 // ranks % 4 == 0
    assert _plan("train.global_batch=48")["lanes"] == 48  # the default: the largest divisor up to 64


def test_samples_take_no_more_than_planned(tiny_run: Path, tmp_path: Path) -> None:
    count = 40
    ddpm("sample", tiny_run, "--seeds", f"0-{count - 1}", "--out", tmp_path / "samples").check_returncode()
    tars = [tar.stat().st_size for tar in (tmp_path / "samples").glob("*.tar")]
    end_of_tar = 10240
    assert 0 < sum(tars) <= _plan()["samples_bytes_at_most"] * count / SAMPLES + end_of_tar * len(tars)


def test_noise_takes_no_more_than_planned() -> None:
    """The worst that PNG can meet."""
    for size, channels in ((8, 1), (64, 3), (256, 3)):
        image = np.random.default_rng(0).integers(0, 256, (size, size, channels), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(image.squeeze()).save(buffer, "PNG")
        blocks = 512 * (3 + -(-len(buffer.getvalue()) // 512))
        config = Config.model_validate(
            {"data": {"size": size, "channels": channels}, "model": {"channel_mults": [1, 2]}}
        )
        bound = plan(config)["samples_bytes_at_most"] / SAMPLES
        assert blocks <= bound <= 1.2 * blocks


def test_epochs_are_shown_in_steps() -> None:
    settings = ("train.steps=50ep", "run.keep_every=10ep")
    assert "lengths" not in _plan(*settings)
    lengths = _plan(*settings, samples=1797)["lengths"]
    assert (lengths["train.steps"], lengths["run.keep_every"]) == (7488, 1498)  # 50·1797/12 and 10·1797/12, rounded up
    assert lengths["run.checkpoint_every"] == 2


@pytest.fixture(scope="module", autouse=True)
def _traced_once() -> Iterator[None]:
    """A trace takes seconds, and no GPU, memory, rate, policy or micro-batch changes it."""
    traces: dict[str, Any] = {}

    def trace_once(config: Config) -> Any:
        key = config.model_dump_json(exclude={"train": {"checkpointing", "micro_batch", "lr"}})
        if key not in traces:
            traces[key] = trace(config)
        return traces[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.plan.trace", trace_once)
        yield


def _on_a_gpu(*settings: str, gpu: str | None = None) -> dict[str, Any]:
    return on_a_gpu(_config(*settings), gpu=gpu)


def test_each_policy_and_micro_batch_has_a_row() -> None:
    figures = _on_a_gpu()
    rows = {(row["checkpointing"], row["micro_batch"]): row for row in figures["policies"]}
    assert list(rows) == [(policy, size) for policy in POLICIES for size in (12, 6, 4, 3, 2, 1)]
    for row in rows.values():
        assert 0 < row["saved_bytes"] < row["peak_bytes"]
        assert row["fits"] is None and row["images_per_s"] is None  # of which memory, on which GPU?
    assert figures["auto"] is None
    assert figures["flops_per_step"] == rows["none", 1]["flops_per_step"] > 12 * 2 * figures["forward_flops_per_image"]
    assert _on_a_gpu("train.checkpointing=blocks")["flops_per_step"] == rows["blocks", 1]["flops_per_step"]


def test_what_fits_is_what_auto_takes() -> None:
    """With room for what is not counted; larger micro-batches come before cheaper policies, as in training."""
    free = ("train.checkpointing=auto", "train.micro_batch=auto")
    peaks = {(row["checkpointing"], row["micro_batch"]): row["peak_bytes"] for row in _on_a_gpu(*free)["policies"]}
    needs = {key: int(peak * 1.1) + 1 + 768 * 2**20 for key, peak in peaks.items()}
    for memory_bytes, chosen in (
        (min(needs.values()) - 2, None),
        (needs["blocks", 6], ("blocks", 6)),
        (needs["none", 6], ("none", 6)),
        (needs["none", 12], ("none", 12)),
    ):
        figures = on_a_gpu(_config(*free), memory_bytes=memory_bytes)
        for row in figures["policies"]:
            assert row["fits"] == (needs[row["checkpointing"], row["micro_batch"]] <= memory_bytes)
        assert figures["auto"] == (chosen and {"checkpointing": chosen[0], "micro_batch": chosen[1]})
        (first, *_) = (row for row in figures["policies"] if row["checkpointing"] == (chosen or ("none", 0))[0])
        assert figures["flops_per_step"] == first["flops_per_step"]
    fixed = on_a_gpu(_config("train.micro_batch=4"), memory_bytes=2**30)
    assert fixed["auto"] == {"checkpointing": "none", "micro_batch": 4}


def test_speed_follows_from_the_rate_of_a_gpu() -> None:
    bf16 = "train.precision=bf16"
    named, other = _on_a_gpu(bf16, gpu="H100"), _on_a_gpu(bf16, gpu="4090")
    assert named["flops_per_s"] == 0.4 * GPUS["h100"] == 0.4 * 989e12
    for row in named["policies"]:
        assert row["images_per_s"] * row["flops_per_step"] == pytest.approx(12 * named["flops_per_s"])
    assert named["policies"][0]["images_per_s"] > 5 * other["policies"][0]["images_per_s"]
    measured = on_a_gpu(_config(bf16), gpu="h100", flops=4e12)
    assert measured["flops_per_s"] == 4e12
    unknown = on_a_gpu(_config("train.precision=fp32"), gpu="h100", price=2.0)  # the memory is known all the same
    assert unknown["policies"][0]["peak_bytes"] and unknown["flops_per_s"] is unknown["gpu_hours"] is unknown["cost"]
    (line,) = unknown["missing"]
    assert "--gpu h100" in line and "fp32" in line and "--flops" in line


def test_the_hours_of_a_run_are_its_images_by_the_rate_and_the_cost_is_by_the_hour() -> None:
    steps = ("train.steps=50ep", "train.checkpointing=blocks")
    assert "--samples" in on_a_gpu(_config(*steps), flops=1e12)["missing"][0]
    figures = on_a_gpu(_config(*steps), flops=1e12, samples=1797, price=2.5)
    (rate, *_) = [row["images_per_s"] for row in figures["policies"] if row["checkpointing"] == "blocks"]
    assert figures["gpu_hours"] == pytest.approx(7488 * 12 / rate / 3600)  # 50 epochs are 7488 steps
    assert figures["cost"] == pytest.approx(2.5 * figures["gpu_hours"]) and not figures["missing"]


def test_the_command_gives_tables_or_json(capsys: pytest.CaptureFixture[str]) -> None:
    flags = (*TINY, "train.lr=1e-3", "--samples", 1797, "--memory", "770MiB", "--flops", "1e12", "--price", 2)
    config = _config("train.lr=1e-3")
    figures = plan(config, 1797) | on_a_gpu(config, memory_bytes=770 << 20, flops=1e12, price=2)
    text = ddpm("plan", *flags).stdout
    assert " GPU-hours of training, cost " in text
    assert f"{figures['parameters']:,}" in text and ", ".join(map(str, figures["world_sizes"])) in text
    fitting, chosen = [row for row in figures["policies"] if row["fits"]], figures["auto"]
    assert 0 < len(fitting) < len(figures["policies"]) and text.count(")*") == len(fitting)
    last = text.splitlines()[-1]
    assert last.startswith("checkpointing auto: {checkpointing}, micro-batch {micro_batch}, ".format(**chosen))
    with pytest.raises(SystemExit):
        cli.main(["plan", *map(str, flags), "--json"])
    assert json.loads(capsys.readouterr().out) == figures


@pytest.mark.parametrize("memory", ["24", "0GiB", "much"])
def test_a_wrong_memory_size_is_refused_in_one_line(memory: str) -> None:
    done = ddpm("plan", *TINY, f"--memory={memory}")
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.splitlines()) == 1
    assert memory in done.stderr and "24GiB" in done.stderr


def test_an_unknown_gpu_is_refused_in_one_line() -> None:
    done = ddpm("plan", *TINY, "--gpu", "h1000")
    assert done.returncode == 2 and "h1000" in done.stderr and "l40s" in done.stderr and "--flops" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_wrong_configuration_is_refused_in_one_line() -> None:
    done = ddpm("plan", *TINY, "train.global_batch=12", "data.lanes=5")
    assert done.returncode == 2 and done.stdout == "" and "data.lanes" in done.stderr and "Traceback" not in done.stderr


def test_averages_for_a_later_choice_of_their_length_are_in_the_plan() -> None:
    off, on = _config(), _config("run.ema_snapshot_every=1000")
    before, after = plan(off), plan(on)
    parameters = before["parameters"]
    assert before["ema_snapshot_bytes"] == 0
    assert after["ema_snapshot_bytes"] == pytest.approx(2 * 2 * parameters, rel=0.3)  # and a header
    assert after["checkpoint_bytes"] - before["checkpoint_bytes"] == pytest.approx(2 * 4 * parameters, rel=0.3)
    held = []
    with FakeTensorMode():
        for config in (off, on):
            held.append(sum(tensor.nbytes for tensor in Step(config).persistent()))
    assert held[1] - held[0] == 2 * 4 * parameters
