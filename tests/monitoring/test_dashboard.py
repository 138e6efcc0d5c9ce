"""What TensorBoard itself reads of a run: the names of curves, the layout of Custom Scalars, the table of HParams."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams import api_pb2
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from pipeline.config import Config
from pipeline.evaluation.intervals import Figure, curves
from pipeline.monitoring import dashboard
from pipeline.monitoring.telemetry import Telemetry, record_evaluation
from tests.monitoring.test_telemetry import next_second, no_line_expected

STEP = {  # all names that training logs
    "train/loss": 0.5, "train/loss_t0000-0249": 1.0, "train/grad_norm": 1.0, "train/lr": 1e-4, "train/bad_steps": 0.0,
    "speed/images_per_s": 10.0, "speed/data_wait_share": 0.1, "speed/tflop_per_s": 1.0, "memory/peak_gib": 1.0,
    "io/retries": 0.0, "checkpoint/failed": 0.0, "checkpoint/save_s": 1.0, "checkpoint/stall_s": 1.0, "val/loss": 0.4,
}  # fmt: skip
FIGURES = {
    name: Figure(value, value - 1, value + 1, 10, 10).as_json()
    for name, value in (("frechet_distance", 9.0), ("frechet_distance_infinity", 7.0), ("kernel_distance", 3.0))
}


def start(run: Path, first: int, *, fails: bool = False, lr: float = 1e-4) -> None:
    config = Config.model_validate({"train": {"lr": lr}, "model": {"channel_mults": [1, 2]}})
    try:
        with Telemetry(str(run), first, no_line_expected, config.model_dump(mode="json")) as telemetry:
            for step in range(first + 1, first + 4):
                telemetry.scalars(step, STEP)
                telemetry.scalars(step, curves(FIGURES))
            telemetry.preview(first + 3, np.zeros((4, 4, 3), np.uint8))
            assert not fails
    except AssertionError:
        assert fails


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> EventAccumulator:
    """A run that was killed at step 3 and went on from step 2."""
    run = tmp_path_factory.mktemp("dashboard") / "run"
    start(run, 0, fails=True)
    next_second()
    start(run, 2)
    assert [path for path in (run / "tensorboard").iterdir() if path.is_dir()] == []  # one run in TensorBoard, not two
    return EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "images": 0, "tensors": 0}).Reload()


def test_the_first_two_groups_are_loss_and_preview(read: EventAccumulator) -> None:
    """TensorBoard sorts groups and opens two."""
    tags = [*read.Tags()["scalars"], *read.Tags()["images"]]
    groups = sorted({tag.split("/")[0] for tag in tags})
    assert groups == ["loss", "preview", "quality", "speed", "system", "train"]
    assert sorted(tag for tag in tags if tag.startswith("loss/")) == ["loss/train", "loss/validation"]
    assert len(tags) == len(STEP) + len(curves(FIGURES)) + 1  # no two names have one tag


def test_no_step_is_there_twice_after_a_resume(read: EventAccumulator) -> None:
    for tag in read.Tags()["scalars"]:
        assert [event.step for event in read.Scalars(tag)] == [1, 2, 3, 4, 5], tag


def layout(read: EventAccumulator) -> Layout:
    (event,) = read.Tensors("custom_scalars__config__")[-1:]
    assert read.SummaryMetadata("custom_scalars__config__").plugin_data.plugin_name == "custom_scalars"
    return Layout.FromString(event.tensor_proto.string_val[0])


def test_every_chart_finds_its_curves_and_every_curve_a_chart(read: EventAccumulator) -> None:
    tags, shown = set(read.Tags()["scalars"]), set()
    categories = {category.title: category.chart for category in layout(read).category}
    assert list(categories) == ["Loss", "Quality", "Speed", "Health"]
    for chart in (chart for charts in categories.values() for chart in charts):
        wanted = [f"^{tag}$" for series in chart.margin.series for tag in (series.value, series.lower, series.upper)]
        for pattern in [*chart.multiline.tag, *wanted]:
            found = {tag for tag in tags if re.match(pattern, tag)}
            assert found or chart.title.startswith("precision"), (
                chart.title,
                pattern,
            )  # training measures no precision
            shown |= found
    assert tags - shown <= {"quality/frechet_distance/low", "quality/frechet_distance/high"}  # those at infinity
    intervals = [chart.margin.series[0] for chart in categories["Quality"] if chart.margin.series]
    ends = [intervals[0].value, intervals[0].lower, intervals[0].upper]
    assert ends == [f"quality/frechet_distance_infinity{end}" for end in ("", "/low", "/high")]


def hparams(read: EventAccumulator, tag: str) -> HParamsPluginData:
    data = read.SummaryMetadata(f"_hparams_/{tag}").plugin_data
    assert data.plugin_name == "hparams"
    return HParamsPluginData.FromString(data.content)


def test_settings_and_figures_are_columns_of_one_table(read: EventAccumulator) -> None:
    settings = hparams(read, "session_start_info").session_start_info.hparams
    assert settings["train.lr"].number_value == 1e-4 and settings["model.channel_mults"].string_value == "[1, 2]"
    assert settings["data.flip"].WhichOneof("kind") == "bool_value"
    experiment = hparams(read, "experiment").experiment
    assert {info.name for info in experiment.hparam_infos} == set(settings)
    own = {info.name.tag for info in experiment.metric_infos if not info.name.group}
    assert own <= set(read.Tags()["scalars"]) and "quality/frechet_distance" in own
    assert hparams(read, "session_end_info").session_end_info.status == api_pb2.STATUS_SUCCESS


def test_a_run_that_fails_is_not_shown_as_a_success(tmp_path: Path) -> None:
    start(tmp_path, 0, fails=True)
    read = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert "_hparams_/session_end_info" not in read.Tags()["tensors"]


def test_every_setting_in_the_table_is_a_key_of_the_configuration() -> None:
    config = Config().model_dump(mode="json")
    for section, keys in dashboard._SETTINGS.items():
        assert set(keys) <= set(config[section])


def test_figures_of_an_evaluation_have_the_names_of_those_of_training(tmp_path: Path, read: EventAccumulator) -> None:
    record_evaluation(str(tmp_path), 3, curves(FIGURES))
    tags = EventAccumulator(str(tmp_path / "tensorboard/evaluation")).Reload().Tags()["scalars"]
    assert set(tags) == {tag for tag in read.Tags()["scalars"] if tag.startswith("quality/")}
