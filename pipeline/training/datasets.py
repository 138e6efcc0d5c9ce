"""Opening the shard sets of a run: checks against the configuration, and the match of their classes with the run's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline import messages
from pipeline.cluster.world import World
from pipeline.config import Config, DataSection
from pipeline.data.shards.shard_set import ShardSet
from pipeline.data.sources.labels import class_names
from pipeline.errors import ConfigError, DataError
from pipeline.storage import files
from pipeline.storage.block_cache import BlockCache
from pipeline.units import bytes_text

Write = Callable[[str], None]


@dataclass(frozen=True)
class RenumberedSet(ShardSet):
    """A shard set with the class numbers of a run in its sidecars; `classes` are the run's."""

    numbers: tuple[int, ...] = ()
    """The number in the run of each class of the set."""

    def sidecar(self, i: int) -> NDArray[np.void]:
        """`ShardSet.sidecar` with the labels of the run.

        Raises:
            DataError: the sidecar is missing or damaged, or has a label that is not a class of the set.
        """
        rows = super().sidecar(i).copy()
        labelled = rows["label"] >= 0
        if rows["label"].max(initial=-1) >= len(self.numbers):
            raise DataError(
                f"{self.sidecar_path(i)} has the label {rows['label'].max()}, but the index names "
                f"{len(self.numbers)} classes: damaged; make the set again"
            )
        rows["label"][labelled] = np.array(self.numbers, np.int32)[rows["label"][labelled]]
        return rows


def open_sets(config: Config, world: World) -> list[ShardSet]:
    """Open the training data and, if the run validates, the validation data.

    Args:
        config: the whole run.
        world: its rank 0 reads the indexes for all ranks.

    Raises:
        ConfigError: no training data, or images of another size or number of channels.
        DataError: a set cannot be read.
    """
    if not config.data.shards:
        raise ConfigError("data.shards is not set: set it to a directory that `ddpm shard --out` wrote")
    urls = [config.data.shards]
    if config.data.val_shards and config.run.val_every:
        urls.append(config.data.val_shards)
    sets = [world.on_rank0(partial(ShardSet.open, url)) for url in urls]
    for shards in sets:
        if shards.shards.file:
            world.copy_to_nodes(shards.shards.file)
        check_fit(shards, config.data)
    return sets


def with_cache(shards: ShardSet, section: DataSection, info: Write) -> ShardSet:
    """The shard set, read through the cache of this node if it is remote and a directory is configured.

    Args:
        shards: the set.
        section: `data` of the configuration.
        info: gets a line about how much of the set the cache can hold.

    Raises:
        DataError: the directory cannot be written.
    """
    if section.cache is None:
        return shards
    if not files.is_remote(shards.url):
        info(f"{shards.url} is local: data.cache is not used")
        return shards
    size = int(shards.shards.bytes.sum())
    kept = bytes_text(min(section.cache_limit, size))
    info(f"{section.cache}: keeps up to {kept} of {bytes_text(size)} of {shards.url}")
    return replace(shards, cache=BlockCache(section.cache, section.cache_limit, shards.sha256[:12]))


def check_fit(shards: ShardSet, section: DataSection) -> None:
    """Refuse images of another size or number of channels than `data` of the configuration has.

    Raises:
        ConfigError: with the key to change.
    """
    size, problems = section.height_width, []
    if size != shards.size:
        found = "x".join(map(str, shards.size))
        value = shards.size[0] if len(set(shards.size)) == 1 else found
        problems.append(
            f"data.size is {size[0]}x{size[1]}, but {shards.url} holds {found}: set data.size={value}, or shard again"
        )
    if section.channels != shards.channels:
        problems.append(
            f"data.channels is {section.channels}, but {shards.url} has {shards.channels}: "
            f"set data.channels={shards.channels}, or shard again"
        )
    if problems:
        raise ConfigError("\n".join(problems))


def agree_on_classes(
    sets: Sequence[ShardSet],
    num_classes: int,
    stored: Any,
    info: Write = messages.discard,
    warn: Write = messages.discard,
) -> tuple[str, ...] | None:
    """The names of a run's classes, by their numbers in the network; checks that all sets fit them.

    Args:
        sets: the training data, then others.
        num_classes: of the network; 0: unconditional, so the images may be of any class.
        stored: `classes` of the checkpoint from which the run resumes; None for a new run.
        info: called with lines about the classes.
        warn: called with warnings.

    Returns:
        The names; None for an unconditional network.

    Raises:
        ConfigError: a new run whose data has another number of classes, or as `fit_classes`.
    """
    names = _classes_of_run(sets[0], num_classes, stored, warn) if num_classes else None
    if not num_classes and sets[0].classes and stored is None:
        count = len(sets[0].classes)
        info(
            f"{sets[0].url} has {count} class{'es' * (count > 1)}, which this run does not learn, as model.num_classes "
            f"is 0 (unconditional): model.num_classes={count} learns them"
        )
    for shards in sets:
        fit_classes(shards, names, info, warn)
    return names


def fit_classes(
    shards: ShardSet, names: Sequence[str] | None, info: Write = messages.discard, warn: Write = messages.discard
) -> ShardSet:
    """The shard set with the class numbers of a run, matched by name. It may lack some of the run's classes.

    Args:
        shards: the set.
        names: of the run's classes, by number; None for an unconditional network: the set is returned unchanged.
        info: called with lines about another numbering and missing classes.
        warn: called when numbers are matched with names.

    Raises:
        ConfigError: the set has no classes, or classes that the run does not have.
    """
    if names is None:
        return shards
    of_set = shards.classes or ()
    numbers = class_names.mapping(names, of_set)
    if numbers is None and class_names.match_by_number(names, of_set):
        numbers = list(range(len(of_set)))
        warn(
            f"{shards.url} calls its classes {_quoted(of_set, ())} and the run {_quoted(names, ())}: numbers "
            "cannot be compared with names, so they are taken to be the same, in this order"
        )
    if not numbers:
        raise ConfigError(
            f"{shards.url} has the classes {_quoted(of_set, names)}, but the run has {_quoted(names, of_set)}: use "
            "a set with classes of these names, or another run.dir"
        )
    if numbers != sorted(numbers):
        info(f"{shards.url} numbers its classes in another order ({_quoted(of_set, names)}) than the run "
            f"({_quoted(names, of_set)}): matched by name")  # fmt: skip
    if missing := [name for i, name in enumerate(names) if i not in numbers]:
        info(
            f"{shards.url} has no images of {len(missing)} of the run's classes ({class_names.listed(missing, of_set)})"
        )
    values = {field.name: getattr(shards, field.name) for field in fields(ShardSet)}
    return RenumberedSet(**values | {"classes": tuple(names)}, numbers=tuple(numbers))


def _quoted(names: Sequence[str], other: Sequence[str]) -> str:
    return f"[{class_names.listed(names, other)}]"


def _classes_of_run(shards: ShardSet, num_classes: int, stored: Any, warn: Write) -> tuple[str, ...]:
    """The names stored with the run; if it has none, or only numbers, those of its data."""
    of_set, of_run = shards.classes or (), class_names.parse(stored, num_classes)
    if of_run is None and len(of_set) != num_classes:
        raise ConfigError(
            f"model.num_classes is {num_classes}, but {shards.url} has {len(of_set) or 'no'} classes: set "
            + f"model.num_classes={len(of_set)}, or " * bool(of_set)
            + "model.num_classes=0 for an unconditional model"
            + ", or make the set with --labels" * (not of_set)
        )
    if of_run and (class_names.are_numbers(of_set) or not class_names.match_by_number(of_set, of_run)):
        return of_run
    if of_run:
        warn(f"the classes of this run had no names: they are now called as in {shards.url}, in its order "
            f"({class_names.listed(of_set, ())})")  # fmt: skip
    return of_set
