"""Fuzz one parser with atheris: `python tests/fuzz/fuzz.py PARSER [SECONDS]`; it writes to tests/fuzz/corpus."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))

with atheris.instrument_imports(include=["pipeline", "zipfile", "tarfile", "pickle", "numpy.lib.format"]):
    from tests.fuzz import targets

    targets.run(sys.argv[1], b"")  # a target imports what it needs when it is called

from tests.fuzz.seeds import seeds  # noqa: E402


def main() -> None:
    name, seconds = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "60"
    corpus = tempfile.mkdtemp(prefix=f"ddpm-corpus-{name}-")
    for i, data in enumerate(seeds(name)):
        Path(corpus, f"seed{i}").write_bytes(data)
    found = HERE / "corpus" / name
    found.mkdir(exist_ok=True, parents=True)
    arguments = [
        sys.argv[0], corpus, str(found), f"-max_total_time={seconds}", f"-artifact_prefix={found}/",
        "-rss_limit_mb=1536", "-malloc_limit_mb=1024", "-timeout=10", "-max_len=20000", "-print_final_stats=1",
    ]  # fmt: skip
    atheris.Setup(arguments, lambda data: targets.run(name, data))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
