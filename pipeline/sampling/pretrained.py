"""Read a trained network and its classes from a run, a checkpoint or a diffusers directory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from pipeline import config_file, messages, path_kind
from pipeline.checkpoints.checkpoint import find_checkpoint, first_not_finite
from pipeline.config import Config, DataSection, DiffusionSection, SamplingOptions, TrainSection, differences
from pipeline.data.sources.labels import class_names
from pipeline.diffusion.process import DiffusionProcess
from pipeline.errors import ConfigError, DataError, NoCheckpoint
from pipeline.model import diffusers_directory, interchange
from pipeline.model.scheduler_config import diffusion_from_diffusers
from pipeline.model.unet import UNet
from pipeline.sampling import ema_length as ema_lengths
from pipeline.storage import files
from pipeline.untrusted import printable

_TABLE = "class_embedding.weight"


class Pretrained(NamedTuple):
    """A trained network with its configuration."""

    config: Config
    weights: dict[str, Tensor]
    identity: str
    """sha256 of everything that determines its samples."""
    class_names: Sequence[str] | None = None
    """By class number; None if the names are not known."""
    state: Mapping[str, Any] = MappingProxyType({})
    """The state.json of its checkpoint; empty for a model from elsewhere."""


def read(source: str, *, ema: bool, ema_length: float | None = None) -> Pretrained:
    """Read a run (its newest checkpoint), a checkpoint or a diffusers directory.

    Args:
        source: the model.
        ema: use the averaged weights.
        ema_length: σ_rel of another average to use, made of those that the run has stored.

    Raises:
        ConfigError: the source does not exist, its network is not supported, or it cannot give such an average.
        DataError: files are damaged, or weights are not finite.
        NoCheckpoint: the run holds no valid checkpoint.
    """
    if directory := diffusers_directory.find(source):
        if ema_length is not None:
            raise ConfigError(
                f"--ema-length: {source} is a model of diffusers, which has one average only: leave it out"
            )
        return _read_diffusers(source, directory)
    if files.exists(source) and not files.is_dir(source):
        raise ConfigError(str(path_kind.not_a_model(source)))
    try:
        checkpoint, rejected = find_checkpoint(source)
    except NoCheckpoint as error:
        if other := path_kind.not_a_model(source):
            raise ConfigError(other) from error
        raise
    for line in rejected:
        messages.warning(f"{source}: {line}")
    state = checkpoint.state()
    config = config_file.parse_stored(state["config"], f"{checkpoint.path}/state.json")
    if ema_length is None:
        weights, identity = checkpoint.tensors("ema" if ema else "model"), checkpoint.manifest_sha256
    else:
        weights, identity = ema_lengths.read(checkpoint, int(state["position"]["ema_updates"]), ema_length)
    return Pretrained(
        config, weights, identity, _class_names(source, state.get("classes"), config.model.num_classes), state
    )


def _read_diffusers(source: str, directory: str) -> Pretrained:
    """Read the files that diffusers saves."""
    stored = diffusers_directory.read(source, directory)
    try:
        model, channels, size = interchange.section_from_diffusers(stored.unet)
        diffusion, variance, clip = diffusion_from_diffusers(stored.scheduler, model.learned_variance)
        config = Config(
            data=DataSection(size=size, channels=cast(Any, channels)),
            model=model,
            diffusion=diffusion,
            train=TrainSection(precision="fp32"),
            sample=SamplingOptions(variance=variance, clip=clip),
        )
        _check_betas(source, stored.scheduler, diffusion)
    # Pydantic's are ValueErrors, torch's of listed betas RuntimeErrors.
    except (ValueError, TypeError, AttributeError, IndexError, ArithmeticError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"{source}: not the configuration of a diffusers model ({reason}): save it again") from None
    weights = interchange.null_row_added(interchange.from_diffusers(stored.weights), model)
    if name := first_not_finite(weights):
        raise DataError(f"{stored.weights_file} holds weights that are not finite ({name}): give an earlier checkpoint")
    # Version 0.1 used the last class as the null label: its samples are not those of this model, so the hash differs.
    classes = [model.num_classes] if model.num_classes and not model.label_dropout else []
    settings = json.dumps([stored.unet, stored.scheduler, *classes], sort_keys=True)
    identity = hashlib.sha256(b"".join(stored.data) + settings.encode()).hexdigest()
    return Pretrained(config, weights, identity, _class_names(source, stored.class_names, model.num_classes))


def _check_betas(source: str, scheduler: Mapping[str, Any], diffusion: DiffusionSection) -> None:
    """Refuse listed betas that are not those of the diffusion."""
    listed = scheduler.get("trained_betas")
    if listed is None:
        return
    betas = DiffusionProcess.of(diffusion).schedule.betas
    given = torch.tensor(listed, dtype=torch.float64)
    if given.shape != betas.shape or not torch.allclose(given, betas, rtol=1e-5, atol=0):
        raise ConfigError(f"{source}: trained_betas in scheduler_config.json do not agree with its other keys")


def _class_names(source: str, stored: Any, count: int) -> tuple[str, ...] | None:
    """The names of `count` classes, from what a checkpoint or a diffusers directory stores; None if there are none."""
    if not count or not stored:
        return None
    names = stored
    if isinstance(stored, dict) and len(stored) == count:  # which is a claim of another file, and may be any number
        names = [stored.get(str(number)) for number in range(count)]
    names = class_names.parse(names, count)
    if names is None:
        messages.warning(
            f"{source}: its names of classes are not those of its {count} classes: they are called by number"
        )
        return None
    return names


def with_classes(model: Pretrained, names: Sequence[str], what: str) -> Pretrained:
    """The model with its classes renumbered to match a list of names.

    Args:
        model: a class-conditional model.
        names: a subset of the model's classes, or a superset; new classes start from the null label's embedding.
        what: name of the model in messages.

    Raises:
        ConfigError: neither list contains the other.
    """
    own = model.class_names or class_names.numbers(model.config.model.num_classes)
    rows = class_names.find(own, names)
    both = class_names.compared(own, names)
    if None in rows and class_names.match_by_number(names, own) and len(own) == len(names):
        messages.warning(f"{what}: numbers cannot be compared with names, so its classes are taken in order ({both})")
        rows = list(range(len(own)))
    elif None in rows and class_names.mapping(names, own) is None:
        raise ConfigError(f"{what} has other classes ({both}): give a model with these classes, or no model")
    if new := [name for name, row in zip(names, rows) if row is None]:
        messages.warning(
            f"{what} lacks the classes {class_names.listed(new, own)}: they begin as its null label ({both})"
        )
    if rows == list(range(len(own))):
        return model
    messages.info(f"{what}: classes are matched by name ({both})")
    section = model.config.model.model_copy(update={"num_classes": len(names)})
    table = model.weights[_TABLE]
    picked = table[[len(table) - 1 if row is None else row for row in rows] + [len(table) - 1]]
    return model._replace(
        config=model.config.model_copy(update={"model": section}),
        weights=model.weights | {_TABLE: picked},
        class_names=tuple(names),
    )


def load_for_training(source: str, config: Config, names: Sequence[str] | None = None) -> Pretrained:
    """A run, a checkpoint or a diffusers directory with its EMA weights, for the network that `config` describes.

    Args:
        source: the model.
        config: configuration of the new run.
        names: class names of the new run, by number; the classes of the model are matched with them.

    Raises:
        ConfigError: the source has another network; the message names the settings that differ.
    """
    model = read(source, ema=True)
    if names and config.model.num_classes and model.config.model.num_classes:
        model = with_classes(model, names, f"train.init_from {source}")
    if different := different_networks(model.config, config):
        raise ConfigError(
            f"train.init_from {source} is another network ({listed_differences(different)}): give both the same values"
        )
    check_weights(model, source)
    return model


def norm_groups(source: str) -> int:
    """Groups of each GroupNorm in the network of a run, a checkpoint or a diffusers directory; raises as `read`."""
    return read(source, ema=True).config.model.groups


def different_networks(there: Config, here: Config) -> dict[str, tuple[Any, Any]]:
    """The settings that give equal weights a different meaning: key → (first value, second value)."""
    harmless = [
        f"model.{key}"
        for key in ("dropout", "label_dropout", "attention_sizes", "norm_groups", "head_channels", "num_heads")
    ]
    different = {key: values for key, values in differences(there, here).items()
                 if (key.startswith("model.") and key not in harmless) or key == "data.channels"}  # fmt: skip
    more = {
        "model.norm_groups": (there.model.groups, here.model.groups),
        # Sizes in pixels may differ if the images have another size.
        "the levels with attention, by model.attention_sizes": (_attending_levels(there), _attending_levels(here)),
        "the heads of attention, by model.head_channels or model.num_heads": (_heads(there), _heads(here)),
    }
    return different | {key: values for key, values in more.items() if values[0] != values[1]}


def listed_differences(different: dict[str, tuple[Any, Any]]) -> str:
    """The differing settings as text for a message."""
    return "; ".join(f"{key}: {there} there, {here} here" for key, (there, here) in different.items())


def _attending_levels(config: Config) -> list[int]:
    side, sizes = min(config.data.height_width), config.model.attention_sizes
    return [level for level in range(len(config.model.channel_mults)) if side >> level in sizes]


def _heads(config: Config) -> list[int]:
    """Of each level with attention, then of the middle block."""
    section, mults = config.model, config.model.channel_mults
    attending = [mults[level] for level in _attending_levels(config)] + [mults[-1]]
    return [section.attention_heads(section.base_channels * mult) for mult in attending]


def check_weights(model: Pretrained, source: str) -> None:
    """Check that the weights fit the configured network, before memory is allocated for it.

    Raises:
        ConfigError: they do not fit.
    """
    section, data = model.config.model, model.config.data
    reasons = f"{section.blocks_per_level} blocks a level, and {len(model.weights)} tensors"
    fits = section.blocks_per_level * len(section.channel_mults) < len(model.weights)
    if fits:
        try:
            with torch.device("meta"):
                network = UNet(section, channels=data.channels, size=data.height_width)
            network.load_state_dict(model.weights, assign=True)
        except RuntimeError as error:
            reasons, fits = " ".join(str(error).split()).rpartition("UNet: ")[2][:300], False
    if not fits:
        raise ConfigError(
            f"{source}: its weights are not those of the network that its configuration describes "
            f"({printable(reasons)}): copy both from the same source"
        )
