"""The sampling job: what it decides before it draws, how it shares the work, and how soon it stops."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partialmethod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

from pipeline import keyed_random
from pipeline import sample as job
from pipeline.cli import app
from pipeline.cluster.launch_environment import ProcessRank, in_turn
from pipeline.config import Config, DataSection, DiffusionSection, ModelSection, SamplingOptions, TrainSection
from pipeline.data.shards.seeds import parse_seeds
from pipeline.data.shards.shard_set import ShardSet
from pipeline.diffusion.process import DiffusionProcess
from pipeline.diffusion.samplers import to_uint8
from pipeline.diffusion.schedule import Schedule
from pipeline.errors import ConfigError, Stopped
from pipeline.model.unet import UNet
from pipeline.monitoring.progress import Progress
from pipeline.sampling.generator import Generator, slerp
from pipeline.sampling.options import SamplingRequest, default_shard_samples
from pipeline.verify import verify

CLASSES = ("cat", "dog")
PROCESS = DiffusionProcess(Schedule.linear(50))


class Network(UNet):
    """A real one that counts its passes, and lets a test interfere with one."""

    passes = 0
    at_pass: Callable[[int], None] = staticmethod(lambda n: None)

    def forward(self, x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        Network.passes += 1
        Network.at_pass(Network.passes)
        return super().forward(x, t, labels)


def generator(class_names: tuple[str, ...] = (), learned_variance: bool = False, **settings: Any) -> Generator:
    model = ModelSection(
        base_channels=4, channel_mults=(1, 2), attention_sizes=(), blocks_per_level=1, num_classes=len(class_names),
        learned_variance=learned_variance,
    )  # fmt: skip
    config = Config(
        data=DataSection(size=8, channels=1), model=model, diffusion=DiffusionSection(timesteps=50),
        sample=SamplingOptions(**{"sampler": "ddim", "steps": 4, "batch": 4, **settings}),
        train=TrainSection(precision="fp32"),
    )  # fmt: skip
    torch.manual_seed(0)
    network = Network(model, channels=1, size=(8, 8))
    return Generator(config, network, PROCESS, torch.device("cpu"), class_names=class_names or None)


@pytest.fixture
def draw(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """The job as the command line calls it, on an untrained network."""

    def run(
        seeds: str = "0-9", source: Generator | None = None, identity: str = "ab" * 32,
        at_pass: Callable[[int], None] = lambda n: None, **flags: Any,
    ) -> dict[str, Any]:  # fmt: skip
        loaded = source or generator()
        loaded.sha256 = identity
        monkeypatch.setattr(job.generators, "load", lambda *_, **__: loaded)
        monkeypatch.setattr(Network, "passes", 0)
        monkeypatch.setattr(Network, "at_pass", staticmethod(at_pass))
        settings = {key: flags.pop(key) for key in list(flags) if key in SamplingOptions.model_fields}
        quiet = flags.pop("quiet", False)
        outputs = {key: str(value) if isinstance(value, Path) else value for key, value in flags.items()}
        return job.sample(SamplingRequest("a run", parse_seeds(seeds), settings, **outputs), quiet=quiet)

    return run


def test_the_names_of_the_classes_are_in_the_index(draw: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    draw(source=generator(CLASSES), out=tmp_path / "named")
    assert ShardSet.open(str(tmp_path / "named")).classes == CLASSES
    unconditional = generator()
    draw(source=Generator(unconditional.config, Network(unconditional.config.model, channels=1, size=(8, 8)),
                          PROCESS, torch.device("cpu"), class_names=CLASSES),
         out=tmp_path / "unconditional")  # fmt: skip
    assert ShardSet.open(str(tmp_path / "unconditional")).classes is None


def test_a_class_is_given_by_name_or_number_and_what_is_there_is_not_drawn_again(
    draw: Callable[..., dict[str, Any]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out, asked = tmp_path / "dogs", {"seeds": "0-3", "source": generator(CLASSES), "grid": tmp_path / "g.png"}
    assert draw(**asked, out=out, label="dog")["drawn"] == 4
    assert f"{out}: 4 images drawn\n" in capfd.readouterr().err
    drawn = {path.name: path.read_bytes() for path in out.iterdir()}
    assert '"label": 1' in (out / "shard_000000.json").read_text()  # as a number was always recorded
    assert draw(**asked, out=out, label="1")["drawn"] == 0
    told = capfd.readouterr().err
    assert f"{out}: all 4 images are there already\n" in told and "images/s" not in told
    assert {path.name: path.read_bytes() for path in out.iterdir()} == drawn
    draw(**(asked | {"seeds": "2-5"}), out=out, label="dog")
    assert f"{out}: 2 images drawn here, all 4 are there\n" in capfd.readouterr().err
    for label in ("mouse", "2"):
        with pytest.raises(ConfigError, match=rf"--label {label}: this model knows the classes 0 \(cat\), 1 \(dog\)"):
            draw(**asked, out=out, label=label)


def test_configured_guidance_is_ignored_for_models_without_it(
    draw: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    draw(source=generator(guidance=3.0), out=tmp_path / "a")
    assert ShardSet.open(str(tmp_path / "a")).settings["guidance"] == 1.0
    draw(source=generator(CLASSES, guidance=3.0), out=tmp_path / "b")
    assert ShardSet.open(str(tmp_path / "b")).settings["guidance"] == 3.0
    with pytest.raises(ConfigError, match=r"--guidance .* this one is unconditional: leave it out"):
        draw(source=generator(guidance=3.0), out=tmp_path / "c", guidance=2.0)


@pytest.mark.parametrize("sampler", ["ddim", "heun", "ddpm"])
@pytest.mark.parametrize("output", ["out", "grid", "video"])
def test_a_stop_request_takes_effect_before_the_next_network_pass(
    draw: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sampler: str, output: str
) -> None:
    (tmp_path / "o").mkdir()
    place = tmp_path / "o" / {"out": "set", "grid": "g.png", "video": "v.mp4"}[output]
    entered = []
    monkeypatch.setattr(job.Interrupt, "__init__", _noting(entered, job.Interrupt.__init__))

    last = 3 if output == "video" else 6

    def at_pass(n: int) -> None:
        if n == last:
            entered[0].requested = "SIGUSR1"

    with pytest.raises(Stopped, match=r"stop requested \(SIGUSR1\): finished shards are kept"):
        draw(sampler=sampler, at_pass=at_pass, **{output: place})
    assert Network.passes == last
    assert not [
        path.name
        for path in tmp_path.rglob("*")
        if path.suffix in (".tmp", ".png", ".mp4") or path.name == "index.json"
    ]


def _noting(entered: list[Any], init: Callable[..., None]) -> Callable[..., None]:
    def noting(self: Any, *arguments: Any) -> None:
        init(self, *arguments)
        entered.append(self)

    return noting


def test_a_grid_of_a_finished_set_is_read_instead_of_drawn(draw: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    draw(grid=tmp_path / "drawn.png")
    for format in ("tar", "png", "npz"):
        draw(out=tmp_path / format, format=format)
        draw(out=tmp_path / format, format=format, grid=tmp_path / f"{format}.png")
        assert Network.passes == 0
        assert (tmp_path / f"{format}.png").read_bytes() == (tmp_path / "drawn.png").read_bytes()


def test_a_sheet_that_replaces_a_file_is_told(
    draw: Callable[..., dict[str, Any]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "g.png"
    for line in (f"grid of 4 images: {path}\n", f"grid of 4 images: replaced {path}\n"):
        draw("0-3", grid=path)
        assert line in capfd.readouterr().err


def test_progress_counts_each_requested_image_once(
    draw: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Watched(Progress):
        def __exit__(self, *error: Any) -> None:
            shown.append((self._job, self._first, self._done, self._total))
            super().__exit__(*error)

    shown: list[tuple[str, int, int, int]] = []
    monkeypatch.setattr(job, "Progress", Watched)
    for seeds in ("0-9", "2-13", "0-13", "0-13"):  # extends a shard at both ends
        draw(seeds, out=tmp_path / "set", shard_samples=8)
    assert shown == [("sampling", there, total, total) for there, total in ((0, 10), (8, 12), (14, 14), (14, 14))]
    assert verify(str(tmp_path / "set"), quiet=True) == []
    draw("0-8", grid=tmp_path / "g.png", video=tmp_path / "v.mp4")
    assert shown[4:] == [("drawing the grid", 0, 9, 9), ("drawing the video", 0, 5, 5)]


@pytest.mark.parametrize(("sampler", "passes"), [("ddim", 4), ("heun", 7)])
def test_progress_names_pass_and_batch(
    draw: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sampler: str, passes: int
) -> None:
    told: list[str] = []
    monkeypatch.setattr(Progress, "show_alive", lambda _, text: told.append(text))
    draw("2-9", grid=tmp_path / "g.png", sampler=sampler, steps=4)
    assert told == [f"network pass {n} of {passes}, batch {b} of 3" for b in (1, 2, 3) for n in range(1, passes + 1)]
    told.clear()
    draw("0-11", out=tmp_path / "set", shard_samples=8, sampler=sampler, steps=4)
    assert len(told) == Network.passes == 3 * passes
    assert f"network pass 1 of {passes}, batch 2 of 2 of shard 0" in told
    assert f"network pass {passes} of {passes}, batch 1 of 1 of shard 1" in told


@pytest.mark.parametrize(("seeds", "wanted"), [("0", "1 image is"), ("0-2", "3 images are"), ("0-3", "")])
def test_a_smaller_batch_is_advised_for_few_images(
    draw: Callable[..., dict[str, Any]], tmp_path: Path, capfd: pytest.CaptureFixture[str], seeds: str, wanted: str
) -> None:
    images = draw(seeds, out=tmp_path / "set", batch=8)["images"]
    line = (
        f"{wanted} wanted, but each batch draws 8: --batch {images} is faster; the last bits of the images may differ\n"
    )
    assert (line in capfd.readouterr().err) == bool(wanted)


@pytest.mark.parametrize(
    ("seeds", "batch", "expected"),
    [("0-9", 4, 4), ("0-49999", 64, 256), ("0-9999", 64, 128), ("0-999999", 512, 1024), ("0-9999999", 4096, 4096)],
)
def test_the_default_shard_size_leaves_shards_for_many_processes(
    monkeypatch: pytest.MonkeyPatch, seeds: str, batch: int, expected: int
) -> None:
    for world_size in ("1", "64"):
        monkeypatch.setenv("WORLD_SIZE", world_size)
        assert default_shard_samples(SamplingRequest("run", parse_seeds(seeds)).images, batch, None) == expected


def test_a_set_keeps_the_size_of_its_shards(draw: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    draw("0-9", out=tmp_path / "set", shard_samples=8)
    assert draw("0-19", out=tmp_path / "set")["complete"]
    assert [shard.samples for shard in ShardSet.open(str(tmp_path / "set")).shards] == [8, 8, 4]


def test_a_shard_that_is_no_multiple_of_the_batch_lowers_it_and_says_so(
    draw: Callable[..., dict[str, Any]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    draw(out=tmp_path / "set", shard_samples=6, quiet=True)
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("warning: batches of 3 instead of 4, to fit --shard-samples 6")
    draw(out=tmp_path / "other", shard_samples=8, quiet=True)
    assert not capfd.readouterr().err


def test_array_tasks_start_at_different_shards_and_each_completes_the_set(
    draw: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = list(range(10))
    monkeypatch.setenv("SLURM_ARRAY_TASK_MIN", "3")
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "4")
    starts = []
    for task in (3, 4, 5, 6, 900):  # the last is an array's that has a stride
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(task))
        order = in_turn(shards, ProcessRank())
        assert sorted(order) == shards and order == [*range(order[0], 10), *range(order[0])]
        starts.append(order[0])
    assert starts[:4] == [0, 2, 5, 7]
    assert in_turn([], ProcessRank()) == []
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "1")  # a task resubmitted alone
    assert draw(out=tmp_path / "set")["complete"]


def test_ranks_of_a_launcher_share_out_all_shards() -> None:
    shards = list(range(10))
    parts = [in_turn(shards, ProcessRank(rank, 3)) for rank in range(3)]
    assert sorted(shard for part in parts for shard in part) == shards


def test_samples_of_another_checkpoint_are_not_added_to_a_set(
    draw: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    draw("0-3", out=tmp_path / "set")
    before = {path.name: path.read_bytes() for path in (tmp_path / "set").iterdir()}
    with pytest.raises(ConfigError, match=r"drawn differently .checkpoint_sha256: abab.* there, cdcd.* now"):
        draw("0-9", out=tmp_path / "set", identity="cd" * 32)
    assert {path.name: path.read_bytes() for path in (tmp_path / "set").iterdir()} == before
    assert json.loads(before["index.json"])["source"] == f"checkpoint {'ab' * 32}"


@pytest.mark.parametrize("compiled", [False, True])
def test_a_set_is_drawn_wholly_compiled_or_wholly_not(
    draw: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled: bool
) -> None:
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="aot_eager"))
    draw("0-3", out=tmp_path / "set", compile=compiled)
    difference = "compile: True there, None now" if compiled else "compile: None there, True now"
    with pytest.raises(ConfigError, match=f"holds samples drawn differently .{difference}"):
        draw("0-9", out=tmp_path / "set", compile=not compiled)
    assert draw("0-9", out=tmp_path / "set", compile=compiled)["complete"]
    assert ("compile" in ShardSet.open(str(tmp_path / "set")).settings) == compiled  # nothing changes for older sets
    assert verify(str(tmp_path / "set"), quiet=True) == []


def test_each_key_of_the_section_is_a_flag_of_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    options = SamplingOptions(
        sampler="heun", steps=3, eta=0.5, spacing="trailing", variance="fixed_small", guidance=2, batch=7, compile=True,
        guidance_interval=(10, 30), dynamic_threshold=0.9, precision="fp32", label=1, size=(8, 16),
    )  # fmt: skip
    keys = options.model_dump(exclude={"timesteps", "max_step_ratio", "clip"})
    written = keys | {"guidance_interval": "10-30", "size": "8x16"}
    flags = [f"--{key.replace('_', '-')}" + ("" if value is True else f"={value}") for key, value in written.items()]
    asked: dict[str, Any] = {}
    monkeypatch.setattr(job, "sample", lambda request, **_: asked.update(request.options))
    result = CliRunner().invoke(app, ["sample", "RUN", "--seeds", "0", *flags])
    assert result.exit_code == 0, result.output
    assert asked == keys | {"label": "1"}  # number or name: the model knows which


def test_a_variance_that_was_learned_cannot_be_chosen(draw: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    assert draw(out=tmp_path / "a", sampler="ddpm", variance="fixed_small")["complete"]
    assert ShardSet.open(str(tmp_path / "a")).settings["variance"] == "fixed_small"
    with pytest.raises(ConfigError, match="--variance: this model has learned its variance: leave it out"):
        draw(out=tmp_path / "b", source=generator(learned_variance=True), variance="fixed_small")


def sheet(path: Path, columns: int) -> Any:
    """The images of a sheet of 8-px images, (rows, columns, 8, 8)."""
    array = np.asarray(Image.open(path))
    rows = (len(array) - 2) // 10
    return np.stack([[array[2 + 10 * r :, 2 + 10 * c :][:8, :8] for c in range(columns)] for r in range(rows)])


def test_images_from_an_image_keep_it_as_far_as_the_strength_says(
    draw: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    pixels = np.kron(np.array([[0, 255], [255, 0]], np.uint8), np.ones((4, 4), np.uint8))
    Image.fromarray(pixels).save(tmp_path / "i.png")
    draw("0-3", grid=tmp_path / "plain.png")
    errors = []
    for strength in (0.02, 0.4, 1.0):
        draw("0-3", grid=tmp_path / "g.png", from_image=tmp_path / "i.png", strength=strength)
        images = sheet(tmp_path / "g.png", 2).astype(float).reshape(4, 8, 8)
        errors.append(np.abs(images - pixels).mean())
        assert not (images[0] == images[1]).all()
    assert errors[0] < 10 < errors[1] < errors[2]
    assert Network.passes == 4  # of a shorter denoising fewer: see below
    draw("0-3", grid=tmp_path / "g.png", from_image=tmp_path / "i.png", strength=0.02)
    assert Network.passes == 1


def test_a_set_from_an_image_is_not_continued_with_another_image_or_strength(
    draw: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    for name, value in (("a", 10), ("b", 90)):
        Image.fromarray(np.full((8, 8), value, np.uint8)).save(tmp_path / f"{name}.png")
    edit = {"out": tmp_path / "set", "from_image": tmp_path / "a.png"}
    draw("0-3", **edit)
    assert ShardSet.open(str(tmp_path / "set")).settings["strength"] == 0.5  # the default
    for other, message in (
        ({"strength": 0.6}, "strength: 0.5 there, 0.6 now"),
        ({"from_image": tmp_path / "b.png"}, "from_sha256: [0-9a-f]+ there, [0-9a-f]+ now"),
        ({"from_image": None}, "from_sha256: [0-9a-f]+ there, None now; strength: 0.5 there, None now"),
    ):
        with pytest.raises(ConfigError, match=f"drawn differently .{message}"):
            draw("0-7", **(edit | other))
    assert draw("0-7", **edit)["complete"]


def test_images_between_two_seeds_start_and_end_at_theirs(draw: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    draw("3,9", grid=tmp_path / "ends.png", source=generator(CLASSES), label=1)
    first, last = sheet(tmp_path / "ends.png", 2)[0]
    draw("3,9", interpolate=6, grid=tmp_path / "row.png", video=tmp_path / "v.mp4", source=generator(CLASSES))
    (row,) = sheet(tmp_path / "row.png", 6).astype(int)
    assert (row[0] == first).all() and (row[-1] == last).all()  # all have the class of the first seed
    assert (np.abs(np.diff(row, axis=0)).max((1, 2)) > 0).all()
    assert (tmp_path / "v.mp4").stat().st_size > 0
    a, b = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for share in (0.0, 0.3, 1.0):
        assert slerp(a, b, share).norm() == pytest.approx((a.norm() + (b.norm() - a.norm()) * share).item(), rel=0.01)
    assert torch.equal(slerp(a, b, 0), a) and torch.equal(slerp(a, b, 1), b)
    for sampler, eta in (("ddpm", 0.0), ("ddim", 0.5)):
        with pytest.raises(ConfigError, match=f"the sampler {sampler} adds noise in each step"):
            draw("3,9", interpolate=6, grid=tmp_path / "r.png", sampler=sampler, **({"eta": eta} if eta else {}))


@pytest.mark.parametrize(("steps", "columns"), [(4, 5), (20, 11)])
def test_trajectories_lead_from_noise_to_the_images(
    draw: Callable[..., dict[str, Any]], tmp_path: Path, steps: int, columns: int
) -> None:
    draw("4-6", steps=steps, sampler="ddim", grid=tmp_path / "g.png", trajectory=tmp_path / "t.png")
    rows = sheet(tmp_path / "t.png", columns)
    assert rows.shape[:2] == (3, columns)
    assert (rows[:, -1] == sheet(tmp_path / "g.png", 2).reshape(-1, 8, 8)[:3]).all()
    noise = keyed_random.normals(0, torch.arange(4, 7), keyed_random.Use.SAMPLE_START, (1, 8, 8))
    assert (rows[:, 0] == to_uint8(noise)[:, 0].numpy()).all()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"strength": 1.5, "from_image": "i.png", "grid": "g.png"}, "--strength 1.5: give a number above 0"),
        ({"strength": 0.5, "grid": "g.png"}, "--strength changes nothing without an image"),
        ({"trajectory": "t.jpg"}, "--trajectory t.jpg: the image is a PNG"),
        ({"trajectory": "o/t.png", "out": "o"}, "o/t.png lies in the sample set o"),
        ({"trajectory": "g.png", "grid": "g.png"}, "both g.png: give two files"),
        ({"interpolate": 4, "out": "o"}, "belong to no seed"),
        ({"interpolate": 4, "trajectory": "t.png"}, "remove one of them"),
        ({"interpolate": 4, "grid": "g.png"}, "--interpolate takes two seeds, not 10: write --seeds A,B"),
        ({"from_image": "nowhere.png", "out": "o"}, "--from nowhere.png: no such file"),
    ],
)
def test_a_start_that_cannot_be_is_refused_in_one_line(
    draw: Callable[..., dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    flags: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message) as caught:
        draw(**flags)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())
