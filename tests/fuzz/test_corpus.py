"""The files that fuzzing found stay fixed, and each parser accepts a valid file."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz import targets
from tests.fuzz.seeds import seeds

CORPUS = Path(__file__).parent / "corpus"
FOUND = [(file.parent.name, file) for file in sorted(CORPUS.glob("*/*"))]


@pytest.mark.parametrize("name", targets.TARGETS)
def test_a_valid_file_is_accepted(name: str) -> None:
    for data in seeds(name):
        targets.run(name, data)
        targets.run(name, data[: len(data) // 2])


@pytest.mark.parametrize("name, file", FOUND, ids=[f"{name}-{file.name}" for name, file in FOUND])
def test_a_found_file_is_refused_cleanly(name: str, file: Path) -> None:
    targets.run(name, file.read_bytes())


def test_make_fuzz_knows_every_parser() -> None:
    makefile = (CORPUS.parents[2] / "Makefile").read_text().replace("\\\n", " ")
    line = next(line for line in makefile.splitlines() if line.startswith("PARSERS"))
    assert line.split(":=")[1].split() == list(targets.TARGETS)
