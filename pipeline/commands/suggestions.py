"""What a mistyped command line was probably meant to be."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any

from pydantic import ValidationError

from pipeline import config_file

_TAKE_SETTINGS = ("train", "plan")
_DRAW_OR_MEASURE = ("sample", "evaluate")


def explain(error: Any, words: Sequence[str], group: Any) -> str:
    """The line for an error of the parser: what is wrong, what was probably meant, and where to look.

    Args:
        error: as the parser raised it.
        words: the command line after `ddpm`.
        group: typer's commands.
    """
    text, command = _in_words(error), words[0] if words else ""
    if command not in group.commands:
        return f"{text} `ddpm --help` lists the commands."  # typer says what was meant
    wrong = error.option_name if "No such option" in text else None
    if wrong:
        text = f"{_oneline(error.message)}."
        if command in _TAKE_SETTINGS and (setting := _as_setting(wrong, words)):
            return f"{text} Settings are key=value, without dashes: {setting}"
        if wrong == "--device" and command in _DRAW_OR_MEASURE:
            return f"{text} ddpm {command} takes CUDA if there is one, else the CPU."
        options = [option for each in group.commands[command].params for option in (*each.opts, *each.secondary_opts)]
        text += _did_you_mean(wrong, options)
    elif "'--config'" in text and (file := next((word for word in words if word.endswith((".yaml", ".yml"))), None)):
        text += f" Did you mean --config {file}?"
    return f"{text} `ddpm {command} --help` lists the options."


def _in_words(error: Any) -> str:
    """The message of the parser; of a value that pydantic refused, as for a key of the configuration."""
    found = error.__cause__.errors() if isinstance(error.__cause__, ValidationError) else []
    if not found or found[0]["type"] == "value_error":
        return _oneline(error.format_message())
    return f"{error.param.opts[0]} {found[0]['input']}: {config_file.in_words(found)}."


def _oneline(text: str) -> str:
    return " ".join(text.replace("Value error, ", "").split())


def _did_you_mean(wrong: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(wrong.lstrip("-"), [option.lstrip("-") for option in known], n=1, cutoff=0.7)
    return f" Did you mean --{near[0]}?" if near else ""


def _as_setting(wrong: str, words: Sequence[str]) -> str | None:
    """The setting that an option such as `--lr 1e-4` or `--train.lr=1e-4` was probably meant to be."""
    key = config_file.nearest_key(wrong.lstrip("-").replace("-", "_"))
    for word, following in zip(words, [*words[1:], ""]):
        name, _, value = word.partition("=")
        if key and name == wrong:
            return f"{key}={value or ('VALUE' if following.startswith('-') else following or 'VALUE')}"
    return None
