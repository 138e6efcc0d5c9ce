"""`import pipeline` gives what the commands give; the Python of docs/python.md and docs/formats.md is run."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest
from torch.utils.data import DataLoader

import pipeline
from pipeline.data.loading.batches import read_all
from pipeline.data.shards.shard_set import ShardSet
from tests.evaluation.test_features import npz, resnet_weights
from tests.launch import ddpm

PAGE = Path(__file__).parents[1] / "docs" / "python.md"
TEXT = PAGE.read_text() + PAGE.with_name("formats.md").read_text()
OTHER = 'features="inception"', 'features="resnet.npz"'  # a file of 91 MB, which tests do not fetch


@pytest.fixture(scope="module")
def house(digits: Path, tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the run, the shard set and the samples that the page names."""
    house = tmp_path_factory.mktemp("house")
    for name, target in {"runs": tiny_run, "shards": digits}.items():
        (house / name).mkdir()
        (house / name / "mine").symlink_to(target)
    npz(house / "resnet.npz", resnet_weights())
    drawn = ddpm("sample", house / "runs" / "mine", "--seeds", "0-39", "--out", house / "samples" / "mine")
    drawn.check_returncode()
    return house


@pytest.fixture(scope="module")
def model(house: Path) -> pipeline.Model:
    return pipeline.load_model(str(house / "runs" / "mine"), device="cpu")


def test_the_pages_run_as_they_stand(
    house: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(house)
    blocks = re.findall(r"^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    for block in blocks:
        exec(block.replace(*OTHER), names)
    assert len(blocks) == 6 and (house / "first.png").exists() and names["weights"]
    assert len(names["sevens"]) == 4 and names["images"].shape == (3, 8, 8, 1) and names["batch"].shape == (64, 1, 8, 8)
    printed = capsys.readouterr().out
    assert "runs/nothing-here" in printed and "40 samples" in printed


def test_a_seed_is_the_image_of_the_command(house: Path, model: pipeline.Model) -> None:
    shards = ShardSet.open(str(house / "samples" / "mine"))
    stored = read_all(shards).images.permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(model.images([31, 0, 7, 0]), stored[[31, 0, 7, 0]])
    assert model.pil_images([7])[0].mode == "L"
    np.testing.assert_array_equal(np.asarray(model.pil_images([7])[0]), stored[7, ..., 0])
    assert not np.array_equal(model.images([31], label="3")[0], stored[31])  # seed 31 is of class 1
    np.testing.assert_array_equal(model.images([31], label="1"), model.images([31]))
    assert model.images([]).shape == (0, 8, 8, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label": "cat"}, "label=cat: this model knows the classes "),
        ({"label": 10}, "label=10: this model knows the classes "),
        ({"lable": 1}, "lable: unknown option; did you mean label?"),
        ({"steps": 0}, "steps=0: must be above 0"),
        ({"steps": "many"}, "steps=many: must be a whole number"),
        ({"size": [1, 0]}, "size=[1, 0]: must be "),
        ({"guidance_interval": (5, 2)}, "guidance_interval changes nothing without guidance: give guidance W, or"),
        ({"sampler": "euler"}, "sampler=euler: must be ddpm, ddim, dpmpp, dpmpp3m or heun"),
    ],
)
def test_a_wrong_option_is_told_as_a_keyword(model: pipeline.Model, options: dict[str, object], message: str) -> None:
    with pytest.raises(pipeline.PipelineError) as error:
        model.images([0], **options)
    assert str(error.value).startswith(message)


def test_a_model_and_the_package_say_what_they_are(house: Path, model: pipeline.Model) -> None:
    assert repr(model) == f"<Model {house}/runs/mine: step 6, 8x8 pixels, 10 classes>"
    checkpoint = f"{house}/runs/mine/checkpoints/step_00000006"
    assert "step 6," in repr(pipeline.load_model(checkpoint, device="cpu"))
    assert pipeline.__version__ == version("ddpm-pipeline") and "__version__" in dir(pipeline)


def test_a_dataset_is_the_shard_set(digits: Path) -> None:
    dataset, stored = pipeline.ShardDataset(str(digits)), read_all(ShardSet.open(str(digits)))
    assert len(dataset) == 1797 and dataset.classes == tuple("0123456789") and dataset.size == (8, 8)
    order = [1796, 3, 700, 3]
    images, labels = next(iter(DataLoader(dataset, batch_size=4, sampler=order)))
    np.testing.assert_array_equal(images, stored.images[order])
    assert labels.tolist() == stored.labels[order].tolist() and dataset[-1][1] == stored.labels[-1]
    with pytest.raises(IndexError, match="1797 images"):
        dataset[1797]
    assert sum(label for _, label in dataset.__getitems__(range(50))) == stored.labels[:50].sum()


def test_importing_pipeline_loads_nothing_and_shows_its_names() -> None:
    ours = "[name for name in sys.modules if name.split('.')[0] in ('torch', 'pipeline')]"
    code = f"import sys, pipeline; print({ours}, dir(pipeline))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.startswith("['pipeline'] ") and all(f"'{name}'" in shown for name in pipeline.__all__)
    with pytest.raises(AttributeError, match="load_model"):
        pipeline.load("runs/mine")  # type: ignore[attr-defined]


def test_every_public_name_is_documented_and_typed() -> None:
    page = PAGE.read_text()
    for name in pipeline.__all__:
        public = getattr(pipeline, name)
        assert public.__doc__ and f"`{name}" in page, name
        if not isinstance(public, type):
            assert "return" in get_type_hints(public), name
