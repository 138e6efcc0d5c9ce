"""Text of the command line → values: paths that no shell has expanded, configurations that come from a pipe."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipeline import arguments
from pipeline.errors import ConfigError


def test_a_missing_configuration_is_compared_with_those_beside_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "cats.yaml").touch()
    monkeypatch.chdir(tmp_path)
    for missing, hint in {
        "cats.yml": ": did you mean cats.yaml?",
        f"{tmp_path}/cat.yaml": f"mean {tmp_path}/cats.yaml?",
        "64px.yaml": "no such configuration file",
        "gone/cats.yml": "configuration file",
    }.items():
        with pytest.raises(ConfigError) as error:
            arguments.configuration(missing, [])
        assert str(error.value).startswith(f"{missing}: no such") and str(error.value).endswith(hint)


def test_a_leading_tilde_is_expanded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    (tmp_path / "c.yaml").write_text("base: ~/b.yaml\nrun: {dir: ~/r}\ntrain: {init_from: ~/i}")
    monkeypatch.setattr(
        arguments,
        "_read_text",
        lambda name, processes: {
            str(tmp_path / "c.yaml"): (tmp_path / "c.yaml").read_text(),
            "/home/me/b.yaml": "data: {val_shards: ~/v}",
        }[name],
    )
    config = arguments.configuration(str(tmp_path / "c.yaml"), ["data.shards=~/s"])
    assert (config.run.dir, config.train.init_from) == ("/home/me/r", "/home/me/i")
    assert (config.data.shards, config.data.val_shards) == ("/home/me/s", "/home/me/v")
    assert arguments.expand_homes(["~/a", "b/~", "s3://b/~/c", "./~d"]) == ["/home/me/a", "b/~", "s3://b/~/c", "./~d"]
    assert arguments.expand_home("file://~/a") == "file:///home/me/a"
    assert arguments.expand_homes("~") == "/home/me" and arguments.expand_homes(None) is None
    assert arguments.expand_home("~nobody-of-this-name/x") == "~nobody-of-this-name/x"  # as a shell leaves it


def test_an_unknown_home_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])
    with pytest.raises(ConfigError, match="HOME is not set"):
        arguments.expand_home("~/x")


def piped(text: bytes) -> tuple[int, str]:
    """A pipe that holds the text, and the name that `<(…)` would give it."""
    ours, theirs = os.pipe()
    os.write(theirs, text)
    os.close(theirs)
    return ours, f"/dev/fd/{ours}"


def test_a_configuration_is_read_from_a_pipe_once() -> None:
    reader, name = piped(b"train: {steps: 7}")
    assert arguments.configuration(name, ()).train.steps == 7
    os.close(reader)
    reader, name = piped(b"train: {steps: 7}")
    with pytest.raises(ConfigError, match=f"{name} can be read once, and each of 2 processes needs it"):
        arguments.configuration(name, (), processes=2)
    os.close(reader)


@pytest.mark.parametrize(
    ("name", "told"),
    [("/dev/zero", "more than 1,048,576 bytes"), ("/dev/fd/999", "no such configuration file"),
     ("/dev", "not a YAML file"), ("/dev/null/x", "cannot be read")],
)  # fmt: skip
def test_a_file_that_is_no_configuration_is_refused(name: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        arguments.configuration(name, ())
