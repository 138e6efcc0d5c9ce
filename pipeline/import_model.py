"""Job: a model of diffusers, w86763777/pytorch-ddpm, or OpenAI's improved- or guided-diffusion → a run.

The run has a configuration and one checkpoint. It can be sampled, verified, exported and started from, but not resumed:
no project stores what that takes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal, cast

import safetensors.torch
from torch import Tensor

from pipeline import config_file, path_kind
from pipeline.checkpoints.checkpoint import find_checkpoint, first_not_finite, write_checkpoint
from pipeline.checkpoints.run_dir import RunDir
from pipeline.config import (
    Config,
    DataSection,
    DiffusionSection,
    FixedVariance,
    ModelSection,
    SamplingOptions,
    TrainSection,
)
from pipeline.diffusion.process import DiffusionProcess
from pipeline.errors import ConfigError, DataError, NoCheckpoint
from pipeline.model import diffusers_directory, foreign_weights, interchange
from pipeline.model.foreign_weights import Kind, Told
from pipeline.model.torch_file import TorchFile
from pipeline.sampling import pretrained
from pipeline.sampling.pretrained import Pretrained
from pipeline.storage import files
from pipeline.untrusted import printable

_NAMES: dict[Kind, str] = {"w86763777": "w86763777/pytorch-ddpm", "openai": "OpenAI's improved- or guided-diffusion"}
_OPENAI_ONLY = ("num_heads", "head_channels", "attention_order", "rescale_timesteps")


@dataclass(frozen=True)
class ImportSettings:
    """What a file of weights does not tell; None: not given."""

    size: tuple[int, int] | None = None
    """(H, W) of the images in pixels."""
    num_heads: int | None = None
    head_channels: int | None = None
    attention_order: Literal["legacy", "new"] | None = None
    schedule: Literal["linear", "cosine"] | None = None
    timesteps: int | None = None
    rescale_timesteps: bool | None = None
    """Whether the network was given timesteps multiplied by 1000/T."""
    prediction_type: Literal["epsilon", "sample", "v_prediction"] | None = None
    variance: FixedVariance | None = None
    clip: bool | None = None

    def given(self) -> list[str]:
        """The flags that are given."""
        return [name for name, value in vars(self).items() if value is not None]


def import_model(source: str, out: str, settings: ImportSettings) -> dict[str, Any]:
    """Make a run of a model from elsewhere.

    Args:
        source: a diffusers directory, or a file of weights that torch has saved.
        out: the run to write, missing or empty. It appears complete or not at all.
        settings: for a file of weights.

    Returns:
        `out`, `from`, `parameters`, and `taken`: what the file does not tell, as given or by default.

    Raises:
        ConfigError: `out` holds something; a flag is missing, moot or wrong; the network is not supported.
        DataError: files are damaged, or hold something else than weights.
    """
    if files.exists(out) and (not files.is_dir(out) or files.listdir(out)):
        raise ConfigError(f"--out {out} exists and is not empty: give a new directory")
    if not files.exists(source):
        raise ConfigError(f"{source}: no such file or directory")
    made = _from_directory(source, settings) if files.is_dir(source) else _from_file(source, settings)
    model, taken = made.model, made.taken
    DiffusionProcess.of(model.config.diffusion)  # refuses an impossible schedule
    pretrained.check_weights(model, source)
    for part, weights in (("weights", model.weights), ("averaged weights", made.ema)):
        if name := first_not_finite(weights):
            raise DataError(f"{source} holds {part} that are not finite ({name}): give an earlier checkpoint")
    with files.publishing_dir(out) as directory:
        _write_run(directory, out, made)
        files.write_json(RunDir(directory).imported, {"from": made.project, "source": source, "taken": taken})
    parameters = sum(tensor.numel() for tensor in model.weights.values())
    return {"out": out, "from": made.project, "parameters": parameters, "taken": taken}


@dataclass(frozen=True)
class _Made:
    """A model as it is about to be written."""

    project: str
    model: Pretrained
    ema: dict[str, Tensor]
    taken: dict[str, Any]


def _from_directory(source: str, settings: ImportSettings) -> _Made:
    """A diffusers directory, which tells everything."""
    if diffusers_directory.find(source) is None:
        try:
            find_checkpoint(source)
        except NoCheckpoint:
            raise ConfigError(
                f"{source} is {path_kind.of(source)}, not a diffusers model: give a diffusers directory or a file of "
                "weights"
            ) from None
        raise ConfigError(f"{source} is a run or a checkpoint already: there is nothing to import")
    if given := settings.given():
        raise ConfigError(f"{_flag(given[0])} is for files of weights: the files of {source} tell it: leave it out")
    model = pretrained.read(source, ema=True)
    return _Made("diffusers", model, model.weights, {})


def _from_file(source: str, settings: ImportSettings) -> _Made:
    """A file that torch has saved."""
    with TorchFile(source) as file:
        content = file.content
        foreign_weights.refuse_lucidrains(content, source)
        parts = _parts(content)
        kind = foreign_weights.kind_of(parts[0]) if parts else None
        if kind is None:
            held = type(content).__name__
            if isinstance(content, dict):
                held = ", ".join(printable(str(name), 100) for name in list(content)[:5])
            raise ConfigError(
                f"{source} is not of a known project (it holds {held}): give weights of w86763777/pytorch-ddpm or of "
                "OpenAI's improved- or guided-diffusion (model… or ema….pt, not opt….pt), or a diffusers directory"
            )
        weights, *averaged = [file.tensors(part) for part in parts]
        size = settings.size or _size(content)
    if size is None:
        raise ConfigError(
            f"--size: the weights of {source} do not show the size of the images: give it, such as --size 64"
        )
    settings = _settled(kind, settings, foreign_weights.timesteps(weights), source)
    told = Told(settings.num_heads, settings.head_channels, settings.attention_order or "legacy")
    network = foreign_weights.network(kind, weights, told, source)
    config = _config(network, settings, size, source)
    renamed = [_renamed(network, part, config.model, source) for part in (weights, *averaged)]
    names = ("schedule", "timesteps", "prediction_type", "clip", "attention_order", "rescale_timesteps")
    taken = {name: getattr(settings, name) for name in names if kind == "openai" or name not in _OPENAI_ONLY}
    taken |= {} if config.model.learned_variance else {"variance": config.sample.variance}
    return _Made(_NAMES[kind], Pretrained(config, renamed[0], ""), renamed[-1], taken)


def _parts(content: Any) -> list[dict[str, Any]]:
    """The weights in a file, then the averaged ones if they are there too; none if it holds something else."""
    if not isinstance(content, dict):
        return []
    both = [part for part in (content.get("net_model"), content.get("ema_model")) if isinstance(part, dict)]
    return both if len(both) == 2 else [content]


def _settled(kind: Kind, settings: ImportSettings, timesteps: int | None, source: str) -> ImportSettings:
    """The settings with the defaults of the project's own scripts.

    Raises:
        ConfigError: a flag has no default, or contradicts the file.
    """
    if kind == "w86763777":
        if moot := [name for name in settings.given() if name in _OPENAI_ONLY]:
            raise ConfigError(
                f"{_flag(moot[0])} is for networks of OpenAI, and {source} is of {_NAMES[kind]}: leave it out"
            )
        if settings.timesteps not in (None, timesteps):
            raise ConfigError(f"--timesteps {settings.timesteps}: {source} has a table of {timesteps}: leave it out")
    else:
        if (settings.num_heads is None) == (settings.head_channels is None):
            raise ConfigError(
                f"--num-heads, --head-channels: the weights of {source} do not show the number of attention heads: "
                "give one of these options, as in training (the scripts' default is num_heads 4; many published "
                "networks have num_head_channels 64)"
            )
        if settings.timesteps not in (None, 1000) and settings.rescale_timesteps is None:
            raise ConfigError(
                f"--rescale-timesteps: the weights of {source} do not show whether the {settings.timesteps} timesteps "
                "were rescaled to 1000: give it (default of improved-diffusion) or --no-rescale-timesteps (of "
                "guided-diffusion)"
            )
        timesteps = settings.timesteps or 1000
    return ImportSettings(
        settings.size, settings.num_heads, settings.head_channels, settings.attention_order or "legacy",
        settings.schedule or "linear", timesteps, bool(settings.rescale_timesteps),
        settings.prediction_type or "epsilon", settings.variance,
        kind == "openai" if settings.clip is None else settings.clip,
    )  # fmt: skip


def _config(network: foreign_weights.Network, settings: ImportSettings, size: tuple[int, int], source: str) -> Config:
    values: Any = dict(network.section)
    timesteps = settings.timesteps or 1000
    if settings.variance and values.get("learned_variance"):
        raise ConfigError(f"--variance: {source} has learned its variance: leave it out")
    if settings.rescale_timesteps:
        values["timestep_scale"] = 1000 / timesteps
    try:
        return Config(
            data=DataSection(size=size, channels=cast(Any, network.channels)),
            model=ModelSection(
                attention_sizes=tuple(min(size) >> level for level in network.attending), dropout=0.0, **values
            ),
            diffusion=DiffusionSection(
                timesteps=timesteps, schedule=settings.schedule or "linear",
                prediction_type=settings.prediction_type or "epsilon",
            ),
            train=TrainSection(precision="fp32"),
            sample=SamplingOptions(variance=settings.variance or "fixed_large", clip=bool(settings.clip)),
        )  # fmt: skip
    except ValueError as error:  # of pydantic
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"{source}: not a network that this package supports ({reason})") from None


def _renamed(
    network: foreign_weights.Network, weights: dict[str, Tensor], section: ModelSection, source: str
) -> dict[str, Tensor]:
    try:
        return interchange.null_row_added(network.convert(weights), section)
    except (KeyError, IndexError, TypeError, RuntimeError, ValueError) as error:
        raise DataError(
            f"{source}: unknown weights ({error}): the network is not the one that its other weights show"
        ) from None


def _size(content: Any) -> tuple[int, int] | None:
    """(H, W) of the noise that w86763777 stores beside its weights."""
    noise = content.get("x_T") if isinstance(content, dict) else None
    match getattr(noise, "arguments", None):
        case (_, _, (int(), int(), int(height), int(width)), *_) if height > 0 and width > 0:
            return height, width
    return None


def _write_run(directory: str, out: str, made: _Made) -> None:
    """Write configuration and checkpoint of the run `out` into a directory."""
    config = made.model.config
    settled = config.model.model_copy(update={"norm_groups": config.model.groups})
    config = config.model_copy(update={"model": settled, "run": config.run.model_copy(update={"dir": out})})
    text, names = config_file.dump(config), made.model.class_names
    state: dict[str, Any] = {"step": 0, "position": {}, "config": text, "classes": list(names) if names else None}
    state["imported"] = made.project
    parts = {"model": made.model.weights, "ema": made.ema}
    contents = {f"{part}.safetensors": [safetensors.torch.save(_dense(weights))] for part, weights in parts.items()}
    write_checkpoint(directory, 0, contents | {"state.json": [json.dumps(state, indent=1).encode()]})
    files.write_bytes(RunDir(directory).config, text.encode())


def _dense(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.contiguous() for name, tensor in weights.items()}


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
