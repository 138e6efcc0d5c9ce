"""How TensorBoard shows a run: the names of its curves, the layout of Custom Scalars, and the table of HParams.

TensorBoard sorts groups of curves by name and opens the first two, so the names put `loss` and `preview` there. The
names in `log.jsonl` are those of the code; `tag` translates. Pure.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from google.protobuf.struct_pb2 import Value
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.types_pb2 import DT_FLOAT, DT_STRING
from tensorboard.plugins.custom_scalar.layout_pb2 import Category, Chart, Layout, MarginChartContent
from tensorboard.plugins.custom_scalar.layout_pb2 import MultilineChartContent as Lines
from tensorboard.plugins.hparams import api_pb2
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo, SessionStartInfo

PREVIEW = "preview"
_TAGS = {"train/loss": "loss/train", "val/loss": "loss/validation"}
_GROUPS = {
    "evaluation/": "quality/",
    "checkpoint/": "system/checkpoint_",
    "io/": "system/io_",
    "memory/": "system/memory_",
}
"""Beginnings of names in the log → beginnings of tags; names that are in neither are tags as they are."""
_LINES: dict[str, dict[str, tuple[str, ...]]] = {
    "Loss": {
        "training and validation": ("loss/train", "loss/validation"),
        "by timestep": ("train/loss_t.*",),
    },
    "Quality": {
        "Fréchet distance at this number of samples": ("quality/frechet_distance",),
        "precision, recall, density, coverage (ddpm evaluate --log)": (
            "quality/(precision|recall|density|coverage|memorised_share)",
        ),
    },
    "Speed": {
        "images per second": ("speed/images_per_s",),
        "share of the time waiting for data": ("speed/data_wait_share",),
        "TFLOP per second on a device": ("speed/tflop_per_s",),
    },
    "Health": {
        "gradient norm": ("train/grad_norm",),
        "learning rate": ("train/lr",),
        "bad steps, failed saves, repeated reads": ("train/bad_steps", "system/checkpoint_failed", "system/io_retries"),
        "seconds to save, and that training waits": ("system/checkpoint_(save|stall)_s",),
        "peak memory, GiB": ("system/memory_peak_gib",),
    },
}
"""Category → chart → tags, which are regular expressions."""
_INTERVALS = {
    "Fréchet distance at infinity, with its 95 % interval": "quality/frechet_distance_infinity",
    "kernel distance, with its 95 % interval": "quality/kernel_distance",
}
_OUTCOMES = (
    ("", "loss/train"), ("", "loss/validation"), ("", "quality/frechet_distance"), ("", "speed/images_per_s"),
    *(("evaluation", f"quality/{name}") for name in ("frechet_distance", "kernel_distance", "precision", "recall")),
)  # fmt: skip
"""Columns of figures in HParams: sub-directory of the event files, and tag."""
_SETTINGS = {
    "data": ("shards", "size", "flip"),
    "model": ("base_channels", "channel_mults", "blocks_per_level", "attention_sizes", "dropout", "num_classes"),
    "diffusion": ("schedule", "prediction_type", "loss_weighting", "timesteps"),
    "train": ("steps", "global_batch", "lr", "lr_schedule", "warmup_steps", "ema_decay", "precision", "seed"),
}
"""Columns of settings in HParams, which opens with the first few and hides the others behind boxes to tick."""


def tag(name: str) -> str:
    """The tag in TensorBoard of a curve's name in the log: `train/loss` → `loss/train`."""
    moved = (new + name.removeprefix(old) for old, new in _GROUPS.items() if name.startswith(old))
    return _TAGS.get(name) or next(moved, name)


def layout() -> Summary.Value:
    """The charts of the tab Custom Scalars: loss, quality, speed, health."""
    categories = [
        Category(title=title, chart=[*(_intervals() if title == "Quality" else ()), *_charts(charts)])
        for title, charts in _LINES.items()
    ]
    text = Layout(category=categories).SerializeToString()
    return Summary.Value(
        tag="custom_scalars__config__",
        tensor=TensorProto(dtype=DT_STRING, string_val=[text], tensor_shape=TensorShapeProto()),
        metadata=_metadata("custom_scalars", b""),
    )


def hyperparameters(config: Mapping[str, Any]) -> dict[str, bool | float | str]:
    """The settings that HParams shows: `train.lr` → value; lists are text.

    Args:
        config: section → key → JSON value.
    """
    return {
        f"{section}.{key}": value if isinstance(value, bool | int | float | str) else str(value)
        for section, keys in _SETTINGS.items()
        for key in keys
        if (value := config.get(section, {}).get(key)) is not None
    }


def session_start(settings: Mapping[str, bool | float | str], started: float) -> list[Summary.Value]:
    """What the tab HParams shows of a run: the columns of the table, and the settings of this run.

    Args:
        settings: from `hyperparameters`.
        started: seconds since 1970.
    """
    values = {name: _value(value) for name, value in settings.items()}
    kinds = {"bool_value": "DATA_TYPE_BOOL", "number_value": "DATA_TYPE_FLOAT64", "string_value": "DATA_TYPE_STRING"}
    experiment = api_pb2.Experiment(
        hparam_infos=[
            api_pb2.HParamInfo(name=name, type=kinds[str(value.WhichOneof("kind"))]) for name, value in values.items()
        ],
        metric_infos=[
            api_pb2.MetricInfo(name=api_pb2.MetricName(group=group, tag=tag), display_name=f"{group} {tag}".strip())
            for group, tag in _OUTCOMES
        ],
    )
    start = SessionStartInfo(hparams=values, start_time_secs=started)
    return [
        _hparams("_hparams_/experiment", HParamsPluginData(experiment=experiment)),
        _hparams("_hparams_/session_start_info", HParamsPluginData(session_start_info=start)),
    ]


def session_end(ended: float) -> list[Summary.Value]:
    """Tells HParams that the run has all of its steps."""
    end = SessionEndInfo(status=api_pb2.STATUS_SUCCESS, end_time_secs=ended)
    return [_hparams("_hparams_/session_end_info", HParamsPluginData(session_end_info=end))]


def _charts(charts: Mapping[str, tuple[str, ...]]) -> Iterator[Chart]:
    for title, tags in charts.items():
        yield Chart(title=title, multiline=Lines(tag=[f"^{tag}$" for tag in tags]))


def _intervals() -> Iterator[Chart]:
    for title, tag in _INTERVALS.items():
        series = MarginChartContent.Series(value=tag, lower=f"{tag}/low", upper=f"{tag}/high")
        yield Chart(title=title, margin=MarginChartContent(series=[series]))


def _value(value: bool | float | str) -> Value:
    if isinstance(value, bool):
        return Value(bool_value=value)
    return Value(string_value=value) if isinstance(value, str) else Value(number_value=value)


def _hparams(tag: str, data: HParamsPluginData) -> Summary.Value:
    empty = TensorProto(dtype=DT_FLOAT, tensor_shape=TensorShapeProto(dim=[TensorShapeProto.Dim(size=0)]))
    return Summary.Value(tag=tag, tensor=empty, metadata=_metadata("hparams", data.SerializeToString()))


def _metadata(plugin: str, content: bytes) -> SummaryMetadata:
    return SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name=plugin, content=content))
