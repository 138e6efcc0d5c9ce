"""YAML text and `key=value` arguments → `Config`, or every problem at once, each with its file, line and key.

Pure: text comes in through a `read` function, nothing here touches a disk, a device or the environment.
"""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Callable, Collection, Iterable
from math import gcd
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from pipeline.config import PATHS, Config
from pipeline.errors import ConfigError


def load(name: str, overrides: Iterable[str], read: Callable[[str], str], expand: Callable[[str], str] = str) -> Config:
    """The configuration of a YAML file: `key=value` arguments replace its values, which replace those of its `base:`.

    Args:
        name: the file, as `read` knows it; `base:` is relative to it.
        overrides: such as `train.lr=1e-4`; the value is YAML, but a path is not parsed.
        read: returns the text of a file.
        expand: replaces a leading `~` of a path by the home directory.

    Raises:
        ConfigError: one line for each problem, with file, line and key.
    """
    (values, locations), problems = _read_file(name, read, ()), list[str]()
    for override in overrides:
        key, equals, text = override.partition("=")
        section, dot, field = key.partition(".")
        if not (section and dot and field and equals):
            meant = nearest_key(key) if equals else None
            hint = f"did you mean {meant}={text}?" if meant else "write section.key=value, such as train.lr=1e-4"
            problems.append(f"{override!r} is not a setting: {hint}")
            continue
        try:
            value = _parse_value((section, field), text)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            problems.append(f"{override!r}: the value is not YAML: {_oneline(error)}")
            continue
        values.setdefault(section, {})
        values[section] = {**values[section], field: value} if isinstance(values[section], dict) else {field: value}
        locations[section, field] = "command line"
        locations.setdefault((section,), "command line")
    try:
        config = _validated(_expand_paths(values, expand), locations, name)
    except ConfigError as error:
        problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(problems))
    return config


def nearest_key(name: str) -> str | None:
    """`section.key` of the known setting that a name most likely means; None if none is near.

    Args:
        name: a mistyped or foreign name, with or without a section: `train.learning_rate`, `num_class`.
    """
    section, _, key = name.rpartition(".")
    key = _OTHER_NAMES.get(key, key)
    known = [(own, of_own) for own in _known_keys(()) for of_own in _known_keys((own,))]
    near = [section, *difflib.get_close_matches(section, _known_keys(()), n=1)]
    for wanted in (key, *difflib.get_close_matches(key, [of_own for _, of_own in known], n=3, cutoff=0.6)):
        if found := sorted((own for own, of_own in known if of_own == wanted), key=lambda own: own not in near):
            return f"{found[0]}.{wanted}"
    return None


def check_keys(keys: Collection[str]) -> None:
    """Check that each key is `section.key` of a known setting.

    Raises:
        ConfigError: a key is unknown; the message names the nearest known one.
    """
    known = [f"{section}.{key}" for section in _known_keys(()) for key in _known_keys((section,))]
    problems = []
    for key in keys:
        if key not in known:
            meant = nearest_key(key.partition("=")[0])
            near = [meant] if meant else difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else "write section.key, such as train.lr"
            problems.append(f"--override {key}: unknown key; {hint}")
    if problems:
        raise ConfigError("\n".join(problems))


def parse_stored(text: str, name: str = "configuration") -> Config:
    """The configuration that `dump` of this version or an earlier one wrote; missing keys get their old default.

    Raises:
        ConfigError: the text is not a configuration.
    """
    values, locations = _read_file(name, lambda _: text, ())
    return _validated(_with_old_values(values, _validated(values, locations, name)), locations, name)


def dump(config: Config) -> str:
    """Every key with its value as YAML; `parse_stored` reads it back to an equal Config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, default_flow_style=None, width=120)


def is_stored(text: str) -> bool:
    """Whether `dump` of this version or an earlier one wrote the text: it has every key that this version knew."""
    try:
        parse_stored(text)
    except ConfigError:
        return False
    given, _ = _read_file("", lambda _: text, ())
    return all(
        key in given.get(section, {}) or key in _LATER_KEYS.get(section, ())
        for section, values in Config().model_dump().items()
        for key in values
    )


_LATER_KEYS = {
    "data": ("cache", "cache_limit"),
    "model": (
        "norm_groups", "num_heads", "norm_eps", "resample_blocks", "downsample_padding", "freq_shift",
        "flip_sin_to_cos", "timestep_scale",
    ),
    "diffusion": ("log_snr_shift", "log_snr_min", "sigmoid_bias"),
    "train": ("ema_lengths", "fused_norm"),
    "sample": (
        "timesteps", "max_step_ratio", "guidance_interval", "clip", "dynamic_threshold", "precision", "label", "size",
    ),
    "run": ("ema_snapshot_every", "evaluate_every", "evaluate_samples", "evaluate_features"),
}  # fmt: skip
"""Keys that configurations stored by version 0.1 lack."""


def _with_old_values(values: dict[str, Any], today: Config) -> dict[str, Any]:
    """A stored configuration; missing keys whose default has changed since get their old default."""
    model, sample = values.get("model", {}), values.get("sample", {})
    if "norm_groups" in model:
        return values
    if today.sample.steps is None and today.sample.sampler != "ddpm":
        sample = sample | {"steps": min(50, today.diffusion.timesteps)}
    groups = gcd(32, today.model.base_channels)
    return values | {"model": model | {"norm_groups": groups}, "sample": sample | {"max_step_ratio": None}}


# Why this resolver, compared on the cases of tests/test_config_file.py. Plain PyYAML 6.0 reads YAML 1.1: 2e-4 is text,
# and 024 is 20 and 1:30 is 90 without an error. ruamel.yaml 0.19 reads these numbers as people mean them, refuses
# repeated keys and knows the line of each key; but it reads the unquoted paths 1e3 and 2024-11-29 as a number and a
# date, and refuses 2024-13-01. It would save these 14 lines and some of the 12 of `_record_locations`, for one more
# dependency. The line of each problem, and all problems at once, come from PyYAML's nodes and pydantic in either case.
class _Loader(yaml.SafeLoader):
    """YAML 1.2 numbers: `2e-4` is a number and `024` is 24."""

    yaml_implicit_resolvers = {  # noqa: RUF012  PyYAML's own attribute
        first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] not in ("float", "int")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_FLOAT = r"[-+]?(?:\d[\d_]*\.[\d_]*|\.\d[\d_]*|\d[\d_]*(?=[eE]))(?:[eE][-+]?\d+)?$|[-+]?\.(?i:inf)$|\.(?i:nan)$"
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(_FLOAT), list("-+0123456789."))
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?\d[\d_]*$"), list("-+0123456789"))
_Loader.add_constructor("tag:yaml.org,2002:int", lambda _, node: int(node.value.replace("_", "")))

_SHORTENED = reprlib.Repr()
_SHORTENED.maxstring = _SHORTENED.maxother = 200

_Locations = dict[tuple[str, ...], str]
_MAX_PARENTS = 8
_OTHER_NAMES = {
    "learning_rate": "lr", "batch_size": "global_batch", "train_batch_size": "global_batch", "epochs": "steps",
    "num_epochs": "steps", "max_steps": "steps", "max_train_steps": "steps", "resolution": "size",
    "image_size": "size", "num_workers": "workers", "output_dir": "dir", "mixed_precision": "precision",
    "gradient_checkpointing": "checkpointing", "ema": "ema_decay", "num_timesteps": "timesteps",
    "num_train_timesteps": "timesteps", "beta_schedule": "schedule", "dataset": "shards", "data_dir": "shards",
}  # fmt: skip
"""Names of settings in other programs."""
_NULLS = ("", "~", "null", "Null", "NULL")
_REQUIRED = {("run", "dir"), ("data", "shards")}


def _read_file(name: str, read: Callable[[str], str], children: tuple[str, ...]) -> tuple[dict[str, Any], _Locations]:
    """Values of a YAML file over those of its parent, and the location (`file:line`) of each key."""
    if len(children) > _MAX_PARENTS:
        raise ConfigError(f"{name}: base: the files name each other as parents")
    locations: _Locations = {}
    try:
        loader = _Loader(read(name))
        node = loader.get_single_node()
        _record_locations(node, (), name, locations)
        _read_paths_as_text(node)
        values = loader.construct_document(node) if node else {}
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # such as the date 2024-13-01
        raise ConfigError(f"{name}: not YAML: {_oneline(error)}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{name}: a configuration is a mapping of sections, such as `train: {{steps: 1000}}`")
    base = values.pop("base", None)
    values = {section: {} if own is None else own for section, own in values.items()}
    if base is not None:
        directory = "" if "://" in str(base) or str(base).startswith(("/", "~")) else name[: name.rfind("/") + 1]
        parent, parent_locations = _read_file(f"{directory}{base}", read, (*children, name))
        values = parent | {
            section: parent[section] | own if isinstance(own, dict) and isinstance(parent.get(section), dict) else own
            for section, own in values.items()
        }
        locations = parent_locations | locations
    return values, locations


def _parse_value(key: tuple[str, str], text: str) -> Any:
    """The value of a `key=value` argument. A path is the text itself, unless it is quoted or null."""
    if key in PATHS and text[:1] not in ("'", '"'):
        return None if text in _NULLS and key not in _REQUIRED else text
    return yaml.load(text, _Loader)  # noqa: S506  a SafeLoader


def _read_paths_as_text(document: yaml.Node | None) -> None:
    """Let a directory be called 123, 2024-11-29, on or 1e3 without quotes."""
    for section, values in _entries(document):
        for key, value in _entries(values):
            plain = isinstance(value, yaml.ScalarNode) and value.style is None
            nothing = plain and value.value in ("" if (section, key) in _REQUIRED else _NULLS)
            if (section, key) in PATHS and plain and not nothing:
                value.tag = "tag:yaml.org,2002:str"


def _entries(node: yaml.Node | None) -> list[tuple[str, yaml.Node]]:
    return [(str(key.value), value) for key, value in node.value] if isinstance(node, yaml.MappingNode) else []


def _expand_paths(values: dict[str, Any], expand: Callable[[str], str]) -> dict[str, Any]:
    """Expand `~` in the settings that are paths."""
    return {
        section: {key: expand(value) if (section, key) in PATHS and isinstance(value, str) else value
                  for key, value in own.items()} if isinstance(own, dict) else own
        for section, own in values.items()
    }  # fmt: skip


def _record_locations(node: yaml.Node | None, path: tuple[str, ...], name: str, locations: _Locations) -> None:
    """Add `file:line` of every key below a node; refuse repeated keys."""
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        child, location = (*path, str(key.value)), f"{name}:{key.start_mark.line + 1}"
        if child in locations:
            raise ConfigError(f"{location}: {'.'.join(child)}: given twice, first at {locations[child]}")
        locations[child] = location
        _record_locations(value, child, name, locations)


def _validated(values: dict[str, Any], locations: _Locations, name: str) -> Config:
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        lines = [line for key, found in problems_of(error, 2).items() for line in _explain(key, found, locations, name)]
        raise ConfigError("\n".join(lines)) from error


def _explain(key: tuple[str, ...], found: list[Any], locations: _Locations, name: str) -> list[str]:
    """The lines for one key: location, key, what is wrong, what to do."""
    location = locations.get(key) or locations.get(key[:1]) or name
    if found[0]["type"] == "extra_forbidden":
        meant = nearest_key(".".join(key)) if len(key) == 2 else None
        hint = f"did you mean {meant}?" if meant else did_you_mean(key[-1], _known_keys(key[:-1]), key[:-1])
        return [f"{location}: {'.'.join(key)}: unknown key; {hint}"]
    if not key:  # of the configuration as a whole: one line for each contradiction
        return [f"{location}: {line}" for problem in found for line in in_words([problem]).splitlines()]
    return [f"{location}: {'.'.join(key)}: {in_words(found)} (got {_SHORTENED.repr(found[0]['input'])})"]


def problems_of(error: ValidationError, depth: int) -> dict[tuple[str, ...], list[Any]]:
    """The problems of each key of this depth: a key that may have several types has a problem with each of them."""
    by_key: dict[tuple[str, ...], list[Any]] = {}
    for problem in error.errors():
        by_key.setdefault(tuple(str(part) for part in problem["loc"][:depth]), []).append(problem)
    return by_key


def in_words(found: list[Any]) -> str:
    """What is wrong with the value of a key: `must be above 0, or auto`."""
    first, *others = dict.fromkeys(_in_words(problem) for problem in found)
    return ", or ".join([first, *(other.removeprefix("must be ") for other in others)])


_TYPES = {
    "int": "a whole number", "float": "a number", "finite": "a finite number", "bool": "true or false",
    "string": "text", "tuple": "a list", "model": "a mapping of keys to values",
}  # fmt: skip
_LIMITS = {
    "greater_than": "above", "greater_than_equal": "at least", "less_than": "below", "less_than_equal": "at most"
}  # fmt: skip


def _in_words(problem: Any) -> str:
    """A problem of pydantic in plain words."""
    kind, message = problem["type"], problem["msg"].removeprefix("Value error, ")
    if kind in _LIMITS:
        return f"must be {_LIMITS[kind]} {message.rpartition(' ')[2]}"
    if kind == "literal_error":
        return f"must be {problem['ctx']['expected'].replace(chr(39), '')}"
    if kind == "string_type" and problem["loc"][-1:] == ("constrained-str",):  # of a length
        return "must be epochs as in 50ep"
    if kind in ("missing", "too_short"):
        return "has too few values"
    if kind == "too_long":
        return f"has more than {problem['ctx']['max_length']} values"
    named = _TYPES.get(kind.partition("_")[0])
    return f"must be {named}" if named else message


def did_you_mean(name: str, known: Collection[str], section: tuple[str, ...] = ()) -> str:
    """The known name that was probably meant, or all of them; those of a section are written with it."""
    if near := difflib.get_close_matches(name, known, n=1, cutoff=0.5):
        return f"did you mean {'.'.join((*section, near[0]))}?"
    return f"known here: {', '.join(known)}"


def _known_keys(section: tuple[str, ...]) -> list[str]:
    if not section:
        return list(Config.model_fields)
    kind = Config.model_fields[section[0]].annotation if section[0] in Config.model_fields else None
    return list(kind.model_fields) if isinstance(kind, type) and issubclass(kind, BaseModel) else []


def _oneline(error: Exception) -> str:
    return " ".join(str(error).split())
