"""Whatever a user gets wrong is one line with the fix and the right exit code; nothing is half-written."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from typer.main import get_command

from pipeline.cli import app, main
from pipeline.cluster.interrupt import SIGNALS, Interrupt
from pipeline.errors import ConfigError, DataError, PipelineError, Stopped
from tests import disk
from tests.launch import ENVIRONMENT, TINY, ddpm

ROOT = Path(__file__).parents[1]


class Refused(Protocol):
    def __call__(self, code: int, *expected: str, job: str, arguments: tuple[object, ...]) -> None: ...


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str]) -> Refused:
    """Runs a job that must end with this exit code and one line that holds all of the expected texts."""

    def run(code: int, *expected: str, job: str, arguments: tuple[object, ...]) -> None:
        with pytest.raises(SystemExit) as left:
            main([job, *map(str, arguments)])
        lines = capfd.readouterr().err.splitlines()
        complaints = [line for line in lines if line.startswith("ddpm: ")]
        assert left.value.code == code, lines
        assert len(complaints) == 1, lines
        for text in expected:
            assert text in complaints[0]

    return run


@pytest.mark.parametrize("job", ["shard", "verify", "index", "train", "sample"])
def test_help_explains_every_option(job: str) -> None:
    options = [parameter for parameter in get_command(app).commands[job].params if parameter.name != "help"]  # type: ignore[attr-defined]
    assert options
    assert all(parameter.help for parameter in options), [p.name for p in options if not p.help]


def test_a_stop_request_outside_of_the_work_ends_with_75_and_two_within_it_with_130(
    refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    def impatient(*_: object, **__: object) -> None:
        with Interrupt() as interrupt:
            signal.raise_signal(signal.SIGINT)
            assert interrupt.requested
            signal.raise_signal(signal.SIGINT)

    for number in SIGNALS:
        monkeypatch.setattr("pipeline.verify.verify", lambda *_, number=number, **__: signal.raise_signal(number))
        refused(
            75, f"stopped by {number.name}: finished parts are kept; the same command", job="verify", arguments=("x",)
        )
    monkeypatch.setattr("pipeline.verify.verify", impatient)
    before = signal.getsignal(signal.SIGTERM)
    refused(130, "interrupted", job="verify", arguments=("x",))
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_file_that_ends_too_early_is_reported_in_one_line(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    def torn(*_: object, **__: object) -> None:
        raise EOFError("Compressed file ended before the end-of-stream marker was reached")

    monkeypatch.setattr("pipeline.verify.verify", torn)
    refused(3, "a file ends too early (Compressed file ended", job="verify", arguments=("x",))


def test_a_process_that_is_stopped_while_it_imports_torch_ends_with_75(tiny_run: Path, tmp_path: Path) -> None:
    arguments = [tiny_run, "--seeds", "0-99", "--out", tmp_path / "o"]
    command = [sys.executable, "-X", "importtime", "-c", "from pipeline.cli import main; main()", "sample"]
    process = subprocess.Popen([*command, *map(str, arguments)], stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    assert process.stderr
    for line in process.stderr:
        if line.rstrip().endswith(" numpy"):
            break
    process.terminate()
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 75
    assert "ddpm: stopped by SIGTERM" in errors and "Traceback" not in errors
    assert not (tmp_path / "o").exists()


def test_each_command_exists_and_exits_with_the_code_of_its_error() -> None:
    assert ddpm("--help").returncode == 0
    wrong = ddpm("train", "--config", "/nowhere.yaml")
    assert wrong.returncode == 2
    assert wrong.stderr == "ddpm: /nowhere.yaml: no such configuration file\n"


@pytest.mark.parametrize(
    ("job", "arguments", "expected"),
    [
        ("shard", ("x", "--out", "y"), "--size"),
        ("shard", ("x", "--out", "y", "--size", "big"), "--size big"),
        ("shard", ("x", "--out", "y", "--size", "8", "--sise", "9"), "No such option: --sise. Did you mean --size? "),
        ("sample", ("x", "--seed", "9"), "Did you mean --seeds?"),
        ("sample", ("x", "--seeds", "9", "--steps", "0"), "--steps 0: must be at least 1. `ddpm sample --help`"),
        ("sample", ("x", "--seeds", "9", "--eta", "much"), "--eta much: must be a number. "),
        ("sample", ("x", "--seeds", "9", "--device", "cuda"), "--device. ddpm sample takes CUDA if there is one, else"),
        ("train", ("--config", "x", "--lr", "1e-4"), "Settings are key=value, without dashes: train.lr=1e-4"),
        ("train", ("--config", "x", "--train.lr=1e-4"), "without dashes: train.lr=1e-4"),
        ("plan", ("--data.shards", "y", "--config", "x"), "without dashes: data.shards=y"),
        ("train", ("--batch-size", "--config", "x"), "without dashes: train.global_batch=VALUE"),
        ("train", ("cats.yaml",), "Did you mean --config cats.yaml?"),
        ("shard", ("x", "--out", "", "--size", "8"), "--out is empty"),
        ("shard", ("/nowhere", "--out", "y", "--size", "8"), "/nowhere"),
        ("shard", ("x", "--out", "y", "--size", "8", "--format", "bmp"), "bmp"),
        ("verify", ("/nowhere",), "/nowhere"),
        ("train", (), "--config"),
        ("train", ("--config", "/nowhere.yaml"), "/nowhere.yaml: no such configuration file"),
        ("train", ("--config", "."), "not a YAML file"),
        ("sample", ("/dev/null", "--seeds", "1", "--grid", "g.png"), "/dev/null is a file"),
        ("sample", ("/nowhere", "--seeds", "1", "--grid", "g.png"), "/nowhere"),
        ("trian", (), "'trian'. Did you mean 'train'?"),
    ],
)
def test_usage_mistakes_end_with_2(
    monkeypatch: pytest.MonkeyPatch,
    refused: Refused,
    job: str,
    arguments: tuple[str, ...],
    expected: str,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(2, expected, job=job, arguments=arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("train.globl_batch=3", "command line: train.globl_batch: unknown key; did you mean train.global_batch?"),
        ("train.steps=many", "train.steps"),
        ("train.lr=-1", "train.lr"),
        ("train.steps=0ep", "train.steps: 0 steps with"),
        ("train.global_batch=9", "global_batch 9 is not a multiple of train.micro_batch 2"),
        ("train.micro_batch=5", "global_batch 12 is not a multiple of train.micro_batch 5"),
        ("data.lanes=5", "data.lanes 5"),
        ("data.size=16", "holds 8x8: set data.size=8, or shard again"),
        ("data.channels=3", "set data.channels=1, or shard again"),
        ("model.num_classes=7", "10 classes: set model.num_classes=10, or model.num_classes=0"),
        ("train.device=cuda", "no CUDA device"),
        ("run.dir=", "run.dir"),
        ("nonsense", "section.key=value"),
        ("model.channel_mults=[1,2,2,2,2]", "data.size 8x8 cannot be halved 4 times"),
    ],
)
def test_bad_settings_end_with_2(refused: Refused, digits: Path, tmp_path: Path, setting: str, expected: str) -> None:
    arguments = (*TINY, f"data.shards={digits}", f"run.dir={tmp_path / 'run'}", setting)
    refused(2, expected, job="train", arguments=arguments)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("error", "place", "silent"),
    [
        (ConfigError("wrong"), "LOCAL_RANK", True),  # each process of a node reads the same configuration
        (Stopped("asked"), "LOCAL_RANK", True),
        (DataError("a file of this rank"), "LOCAL_RANK", False),
        (ConfigError("wrong"), "RANK", False),  # the first process of another node
    ],
)
def test_what_every_process_would_say_is_said_by_the_first_of_a_node(
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    error: PipelineError,
    place: str,
    silent: bool,
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("pipeline.verify.verify", refuse)
    monkeypatch.setattr("pipeline.cli._HEAD_START_S", 0.01)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a job of the launcher")
    monkeypatch.setenv(place, "1")
    with pytest.raises(SystemExit) as left:
        main(["verify", "x"])
    assert left.value.code == error.exit_code and bool(capfd.readouterr().err) != silent
    with pytest.raises(SystemExit):
        main(["verify", "--wrong"])
    assert bool(capfd.readouterr().err) == (place == "RANK")
    failure = ProcessFailure(0, 1, error.exit_code, str(tmp_path / "error.json"))  # as the launcher reads the file
    last = "No such option: --wrong" if place == "RANK" else str(error)
    assert (last in ChildFailedError("train", {0: failure}).format_msg()) != silent


def test_a_run_with_other_settings_is_refused_with_the_difference(
    refused: Refused, digits: Path, tiny_run: Path
) -> None:
    arguments = (
        *TINY,
        f"data.shards={digits}",
        f"run.dir={tiny_run}",
        "train.steps=9",
        "train.seed=5",
        "data.flip=false",
    )
    refused(2, "train.seed: 0 -> 5", "data.flip: True -> False", "--override train.seed", "fixed once a run starts",
                   job="train", arguments=arguments)  # fmt: skip
    assert not (tiny_run / "checkpoints/step_00000009").exists()


def test_an_overridden_key_may_change(digits: Path, tiny_run: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_run, tmp_path / "run")
    arguments = (*TINY, f"data.shards={digits}", f"run.dir={tmp_path / 'run'}", "train.steps=7", "train.clip_norm=0.5")
    result = ddpm("train", *arguments, "--override", "train.clip_norm")
    assert result.returncode == 0, result.stderr


def test_a_directory_that_is_no_run_is_left_alone(refused: Refused, digits: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    refused(2, "is not a run", job="train", arguments=(*TINY, f"data.shards={digits}", f"run.dir={tmp_path}"))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_directory_that_is_no_sample_set_is_left_alone(refused: Refused, tiny_run: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    refused(
        2, "holds something else (thesis.tex)", job="sample", arguments=(tiny_run, "--seeds", "1", "--out", tmp_path)
    )
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("flags", "code", "expected"),
    [
        (("--seeds", "9-1"), 2, "--seeds 9-1"),
        (("--seeds", "a"), 2, "--seeds a"),
        (("--seeds", "1"), 2, "nothing to write"),
        (("--seeds", "1", "--out", "o", "--grid", "o/g.png"), 2, "o/g.png lies in the sample set o"),
        (("--seeds", "1", "--grid", "g.png", "--label", "10"), 2, "classes 0 to 9"),
        (("--seeds", "1", "--grid", "g.png", "--size", "9"), 2, "multiples of 2"),
        (("--seeds", "1", "--grid", "g.png", "--steps", "1000"), 2, "100"),
        (("--seeds", "1", "--out", "o", "--batch", "3", "--shard-samples", "4"), 2, "--shard-samples 4"),
        (("--seeds", "1", "--video", "v.avi"), 2, ".mp4"),
        (("--seeds", "1", "--grid", "g.png", "--guidance", "inf"), 2, "--guidance inf"),
        (("--seeds", "1", "--grid", "g.png", "--dynamic-threshold", "0"), 2, "--dynamic-threshold 0.0"),
        (("--seeds", "1", "--grid", "g.png", "--guidance-interval", "5"), 2, "--guidance-interval 5: write FIRST-LAST"),
        (("--seeds", "0-9", "--out", "o", "--video", "v.gif"), 2, "--video v.gif"),
        (("--seeds", "0-9", "--out", "o", "--grid", "g.jpg"), 2, "--grid g.jpg: the image is a PNG"),
        (("--seeds", "0-9", "--out", "o", "--grid", "."), 2, ". is a directory"),
        (("--seeds", "1", "--grid", "g.png", "--variance", "large"), 2, "fixed_large"),
    ],
)
def test_impossible_samples_are_refused(
    monkeypatch: pytest.MonkeyPatch,
    refused: Refused,
    tiny_run: Path,
    tmp_path: Path,
    flags: tuple[str, ...],
    code: int,
    expected: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(code, expected, job="sample", arguments=(tiny_run, *flags))
    assert not list(tmp_path.iterdir())


def test_a_run_without_a_checkpoint_ends_with_4(refused: Refused, digits: Path, tiny_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    for path in run.glob("checkpoints/*/model.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
    arguments: tuple[object, ...] = (*TINY, f"data.shards={digits}", f"run.dir={run}", "train.steps=9")
    refused(4, "no valid checkpoint", "model.safetensors has", job="train", arguments=arguments)
    refused(4, "no valid checkpoint", job="sample", arguments=(run, "--seeds", "1", "--grid", tmp_path / "g.png"))
    assert ddpm("verify", run).returncode == 3


@pytest.mark.parametrize(
    ("damage", "expected"), [("no index", "index.json"), ("cut", "bytes"), ("no directory", "nothing")]
)
def test_damaged_shards_end_with_3(refused: Refused, digits: Path, tmp_path: Path, damage: str, expected: str) -> None:
    shards = tmp_path / "nothing"
    if damage != "no directory":
        shutil.copytree(digits, shards)
    if damage == "no index":
        (shards / "index.json").unlink()
    if damage == "cut":
        tar = sorted(shards.glob("*.tar"))[1]
        tar.write_bytes(tar.read_bytes()[:-1024])
    refused(3, expected, job="train", arguments=(*TINY, f"data.shards={shards}", f"run.dir={tmp_path / 'run'}"))
    # A tar is checked when it is first read; nothing was saved by then.
    assert not ((tmp_path / "run" / "checkpoints") if damage == "cut" else tmp_path / "run").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    with disk.small_disk(tmp_path / "disk", "4m") as mounted:
        yield mounted.path


def test_a_full_disk_is_one_line_and_nothing_half_written(
    refused: Refused, digits: Path, tiny_run: Path, small_disk: Path
) -> None:
    refused(3, "no space left", job="shard",
            arguments=(ROOT / "shards/digits.zip", "--out", small_disk / "s", "--size", "64", "--quiet"))  # fmt: skip
    assert not list(small_disk.rglob("*.tmp"))
    shutil.rmtree(small_disk / "s")
    refused(3, "no space left", job="sample",
            arguments=(tiny_run, "--seeds", "0-1999", "--out", small_disk / "o", "--size", "8", "--quiet"))  # fmt: skip
    assert not list(small_disk.rglob("*.tmp"))


def test_a_full_disk_costs_the_save_and_not_the_run(digits: Path, small_disk: Path) -> None:
    (small_disk / "ballast").write_bytes(bytes(3_600_000))
    arguments = (*TINY, f"data.shards={digits}", f"run.dir={small_disk / 'run'}", "train.steps=4")
    result = ddpm("train", *arguments)
    assert result.returncode == 3
    assert "step 2 is not saved, training continues" in result.stderr
    assert "make room" in result.stderr.splitlines()[-1]
    assert not list(small_disk.rglob("*.tmp"))
    (small_disk / "ballast").unlink()
    assert ddpm("train", *arguments).returncode == 0


@pytest.mark.parametrize("job", ["shard", "train", "sample"])
def test_an_unwritable_path_is_reported_in_one_line(
    refused: Refused, digits: Path, tiny_run: Path, tmp_path: Path, job: str
) -> None:
    arguments: dict[str, tuple[object, ...]] = {
        "shard": (ROOT / "shards/digits.zip", "--out", "/proc/x", "--size", "8", "--quiet"),
        "train": (*TINY, f"data.shards={digits}", "run.dir=/proc/x"),
        "sample": (tiny_run, "--seeds", "0-3", "--out", "/proc/x"),
    }
    refused(3, "cannot write /proc/x/", "choose another place", job=job, arguments=arguments[job])
    (tmp_path / "file").touch()
    within = tuple(str(argument).replace("/proc/", f"{tmp_path}/file/") for argument in arguments[job])
    refused(3, "a part of this path is a file: choose another place", job=job, arguments=within)
