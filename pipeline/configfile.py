"""YAML text and `key=value` arguments → `Config`, or every problem at once, each with its file, line and key.

Pure: text comes in through a `read` function, nothing here touches a disk, a device or the environment.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from pipeline.config import Config
from pipeline.errors import ConfigError


def load(name: str, overrides: Iterable[str], read: Callable[[str], str]) -> Config:
    """The configuration in a YAML file, its parent (`base:`) and `key=value` arguments, later ones winning.

    Args:
        name: the file, as `read` knows it; `base:` is taken relative to it.
        overrides: such as `train.lr=1e-4`; the value is YAML.
        read: gives the text of a file.

    Raises:
        ConfigError: with one line for each problem, naming file, line and key.
    """
    values, places = _read_file(name, read, ())
    for override in overrides:
        key, equals, text = override.partition("=")
        section, dot, field = key.partition(".")
        if not (equals and dot and field):
            raise ConfigError(f"{override!r} is not a setting: write section.key=value, such as train.lr=1e-4")
        try:
            value = yaml.load(text, _Loader)  # noqa: S506  a SafeLoader
        except yaml.YAMLError as error:
            raise ConfigError(f"{override!r}: the value is not YAML: {_oneline(error)}") from error
        values.setdefault(section, {})
        values[section] = {**values[section], field: value} if isinstance(values[section], dict) else {field: value}
        places[section, field] = "command line"
        places.setdefault((section,), "command line")
    return _validated(values, places, name)


def parse(text: str, name: str = "configuration") -> Config:
    """The configuration in a YAML text that has no parent."""
    return load(name, (), lambda _: text)


def dump(config: Config) -> str:
    """Every key with its value, as YAML that `parse` reads back to an equal Config."""
    values = config.model_dump(mode="json")
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=120)


class _Loader(yaml.SafeLoader):
    """YAML 1.2 numbers: `2e-4` is one, `024` is 24; PyYAML's 1.1 reads text and an octal number."""

    yaml_implicit_resolvers = {  # noqa: RUF012  PyYAML's own attribute
        first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] not in ("float", "int")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


class _Dumper(yaml.SafeDumper):
    """Quotes the text that `_Loader` would take for a number."""

    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


_FLOAT = r"[-+]?(?:\d[\d_]*\.[\d_]*|\.\d[\d_]*|\d[\d_]*(?=[eE]))(?:[eE][-+]?\d+)?$|[-+]?\.(?i:inf)$|\.(?i:nan)$"
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(_FLOAT), list("-+0123456789."))
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?\d[\d_]*$"), list("-+0123456789"))
_Loader.add_constructor("tag:yaml.org,2002:int", lambda _, node: int(node.value.replace("_", "")))

_Places = dict[tuple[str, ...], str]
_MOST_PARENTS = 8


def _read_file(name: str, read: Callable[[str], str], children: tuple[str, ...]) -> tuple[dict[str, Any], _Places]:
    """Values of a YAML file laid over its parent's, and for each key where it was written."""
    if len(children) > _MOST_PARENTS:
        raise ConfigError(f"{name}: base: leads back to itself")
    places: _Places = {}
    try:
        loader = _Loader(read(name))
        node = loader.get_single_node()
        _record_places(node, (), name, places)
        values = loader.construct_document(node) if node else {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}: not YAML: {_oneline(error)}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{name}: a configuration is a mapping of sections, such as `train: {{steps: 1000}}`")
    base = values.pop("base", None)
    values = {section: {} if own is None else own for section, own in values.items()}
    if base is not None:
        folder = "" if "://" in str(base) or str(base).startswith("/") else name[: name.rfind("/") + 1]
        parent, parent_places = _read_file(f"{folder}{base}", read, (*children, name))
        values = parent | {
            section: parent[section] | own if isinstance(own, dict) and isinstance(parent.get(section), dict) else own
            for section, own in values.items()
        }
        places = parent_places | places
    return values, places


def _record_places(node: yaml.Node | None, path: tuple[str, ...], name: str, places: _Places) -> None:
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        here = (*path, str(key.value))
        if here in places:
            raise ConfigError(
                f"{name}:{key.start_mark.line + 1}: {'.'.join(here)}: given twice, first at {places[here]}"
            )
        places[here] = f"{name}:{key.start_mark.line + 1}"
        _record_places(value, here, name, places)


def _validated(values: dict[str, Any], places: _Places, name: str) -> Config:
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        complaints: dict[tuple[str, ...], list[Any]] = {}
        for problem in error.errors():  # a key of several types has a problem with each
            complaints.setdefault(tuple(str(part) for part in problem["loc"][:2]), []).append(problem)
        lines = [line for key, problems in complaints.items() for line in _explain(key, problems, places, name)]
        raise ConfigError("\n".join(lines)) from error


def _explain(key: tuple[str, ...], problems: list[Any], places: _Places, name: str) -> list[str]:
    place = places.get(key) or places.get(key[:1]) or name
    if problems[0]["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key[-1], _known_keys(key[:-1]), n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(_known_keys(key[:-1]))}"
        return [f"{place}: {'.'.join(key)}: unknown key; {hint}"]
    messages = list(dict.fromkeys(problem["msg"].removeprefix("Value error, ") for problem in problems))
    if not key:  # of the configuration as a whole: one line for each contradiction
        return [f"{place}: {line}" for message in messages for line in message.splitlines()]
    return [f"{place}: {'.'.join(key)}: {'; or '.join(messages)} (got {problems[0]['input']!r})"]


def _known_keys(section: tuple[str, ...]) -> list[str]:
    if not section:
        return list(Config.model_fields)
    kind = Config.model_fields[section[0]].annotation if section[0] in Config.model_fields else None
    return list(kind.model_fields) if isinstance(kind, type) and issubclass(kind, BaseModel) else []


def _oneline(error: Exception) -> str:
    return " ".join(str(error).split())
