"""What README and docs show exists: commands and their flags, keys, files, functions, tests, links, variables."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from typer.main import get_command

from pipeline.cli import app
from pipeline.config import Config
from pipeline.data.images.preprocess import REASONS
from tests.repo import configuration_page

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), ROOT / "shards" / "README.md"]
TEXTS = {str(page.relative_to(ROOT)): page.read_text() for page in PAGES}
JOBS = get_command(app).commands  # type: ignore[attr-defined]


def _code(text: str) -> Iterator[str]:
    """Lines of code blocks, joined where they continue, and inline code."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    for block in blocks:
        yield from block.replace("\\\n", " ").replace("--entrypoint accelerate ddpm", "accelerate").splitlines()
    yield from re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))


def _commands(text: str) -> Iterator[tuple[str, list[str]]]:
    """(job, its arguments) of each call of the pipeline, however it is started."""
    for code in _code(text):
        line = re.split(r"\s#\s|; ", code)[0].replace("…", "")
        for match in re.finditer(r"(?:(?<![\w/.-])ddpm |-m pipeline\.)([a-z]+)\b(?!\.)(.*)", line):
            if match[1] in JOBS or " --" in match[2]:  # the rest is talk of the package
                yield match[1], match[2].split()


CALLS = [(page, job, arguments) for page, text in TEXTS.items() for job, arguments in _commands(text)]
LAUNCHES = [line for text in TEXTS.values() for line in _code(text) if "accelerate launch -" in line]


def test_there_is_something_to_check() -> None:
    assert {job for _, job, _ in CALLS} >= {"shard", "train", "sample", "doctor", "plan"}
    assert len(LAUNCHES) >= 6


@pytest.mark.parametrize(("page", "job", "arguments"), CALLS)
def test_a_command_has_the_options_it_is_shown_with(page: str, job: str, arguments: list[str]) -> None:
    assert job in JOBS, f"{page}: ddpm {job}"
    known = {flag for parameter in JOBS[job].params for flag in (*parameter.opts, *parameter.secondary_opts)}
    flags = {argument.split("=")[0] for argument in arguments if argument.startswith("--")} - {"--help"}
    assert flags <= known, f"{page}: ddpm {job} has no {flags - known}"


@pytest.mark.parametrize("line", LAUNCHES)
def test_accelerate_takes_the_options_it_is_shown_with(line: str) -> None:
    before = re.split(r"-m pipeline", line.partition("launch ")[2])[0]
    parser: argparse.ArgumentParser = launch_command_parser()
    assert set(re.findall(r"--\w+", before)) <= {
        string for action in parser._actions for string in action.option_strings
    }


@pytest.mark.parametrize("page", TEXTS)
def test_keys_are_keys(page: str) -> None:
    sections = {name: field.annotation.model_fields for name, field in Config.model_fields.items()}  # type: ignore[union-attr]
    for code in _code(TEXTS[page]):
        for section, key in re.findall(
            r"(?<![\w./-])(data|model|diffusion|train|sample|run)\.(\w+)(?=[=\s,`]|$)", code
        ):
            if f"{section}.{key}" not in ("train.sbatch", "sample.sbatch", "model.safetensors", "model.classes"):
                assert key in sections[section], f"{page}: {section}.{key}"


@pytest.mark.parametrize("page", TEXTS)
def test_links_lead_somewhere(page: str) -> None:
    text = TEXTS[page]
    headings = {
        re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-")
        for title in re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    }
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("#"):
            assert target[1:] in headings, f"{page}: {target}"
        elif "://" not in target:
            assert ((ROOT / page).parent / target.partition("#")[0]).exists(), f"{page}: {target}"


@pytest.mark.parametrize("page", TEXTS)
def test_files_that_are_named_are_there(page: str) -> None:
    written = set(re.findall(r"cat > (\S+)", TEXTS[page]))  # by the reader
    for code in _code(TEXTS[page]):
        for path in re.findall(r"(?<![\w/.~$-])(?:launch|configs|docs|benchmarks|tests)/[\w./-]+\w", code):
            assert path in written or (ROOT / path).exists(), f"{page}: {path}"


@pytest.mark.parametrize("page", TEXTS)
def test_functions_and_tests_that_are_named_are_there(page: str) -> None:
    for path, name in re.findall(r"`((?:pipeline|tests|benchmarks)/[\w/]+\.py)::(\w+)`", TEXTS[page]):
        assert re.search(rf"^\s*(?:def|class) {name}\b", (ROOT / path).read_text(), re.MULTILINE), f"{page}: {name}"


@pytest.mark.parametrize("page", ["docs/ddpm.md", "docs/reproducibility.md"])
def test_a_page_of_promises_names_the_tests_that_hold_them(page: str) -> None:
    assert len(re.findall(r"`tests/[\w/]+\.py::test_\w+`", TEXTS[page])) >= 15


@pytest.mark.parametrize("page", TEXTS)
def test_variables_are_read_by_something(page: str) -> None:
    sources = [*ROOT.glob("pipeline/**/*.py"), *(path for path in (ROOT / "launch").rglob("*") if path.is_file())]
    code = "\n".join(source.read_text() for source in sources)
    for variable in set(re.findall(r"\b(?:DDPM|PET)_[A-Z_]+\b", TEXTS[page])):
        assert re.search(rf"\b{variable}\b", code), f"{page}: {variable}"


def test_the_configuration_page_is_current() -> None:
    assert TEXTS["docs/configuration.md"] == configuration_page.page(), "run `make schema`"


def test_the_index_names_every_page_and_pages_are_short() -> None:
    for path in (ROOT / "docs").glob("*.md"):
        assert path.name == "README.md" or f"]({path.name})" in TEXTS["docs/README.md"], f"docs/README.md: {path.name}"
        long = {"cluster.md", "performance.md"}  # older than the rule
        assert path.name in long or len(path.read_text().splitlines()) <= 150, path


def test_every_reason_is_explained() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| (.+) \|$", TEXTS["shards/README.md"], re.MULTILINE))
    assert {name: rows.get(name) for name in REASONS} == REASONS


@pytest.mark.parametrize("target", ["demo", "test"])
def test_the_front_door_is_in_the_makefile(target: str) -> None:
    assert re.search(rf"^make {target}\b", TEXTS["README.md"], re.MULTILINE)
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
