"""Which files of a directory or archive hold labels, captions and the like, so that they do not count as bad images.

The paths are sorted, so the files that share the beginning of a name are neighbours, and no set of names is needed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from pipeline.data.sources.inputs import is_image_name
from pipeline.data.sources.keys import TEXT_COMPANIONS

STYLEGAN = "dataset.json"
METADATA = frozenset((STYLEGAN, "metadata.csv", "metadata.jsonl", "metadata.parquet"))
TABLES = frozenset((".csv", ".tsv", ".jsonl"))
LABEL_FILE_NAME = re.compile(
    r"(.*[-_. ])?(image)?(labels?|annotations?|targets?|classes|ground_?truth)([-_. ].*)?"
    r"\.(csv|tsv|txt|json|jsonl|xml|ya?ml|parquet|npy|npz|mat|pkl|pickle)",
    re.IGNORECASE,
)


def is_label_file(paths: Sequence[str], number: int, path: str) -> bool:
    """Whether an entry is a file of labels, captions and the like.

    Args:
        paths: of all entries of the source, sorted.
        number: of the entry.
        path: of the entry.
    """
    if is_image_name(path):
        return False
    name, ending = name_and_ending(path)
    if ending in TABLES or name in METADATA:
        return True
    if ending[1:] not in TEXT_COMPANIONS:
        return False
    return is_beside_image(paths, number, path) or LABEL_FILE_NAME.fullmatch(name) is not None


def is_beside_image(paths: Sequence[str], number: int, path: str) -> bool:
    """Whether an image has the name of a file, up to the ending: `000.jpg` of `000.json` and of `000.jpg.json`."""
    wanted = stem(path)
    return any(
        is_image_name(other) and other[: other.rfind(".")] == wanted
        for other in neighbours(paths, number, wanted + ".")
    )


def neighbours(paths: Sequence[str], number: int, beginning: str) -> Iterator[str]:
    """The other paths with a beginning that the path of an entry has: those after it, then those before it.

    Args:
        paths: of all entries of the source, sorted.
        number: of the entry.
        beginning: of its path.
    """
    for step, end in ((1, len(paths)), (-1, -1)):
        for other in range(number + step, end, step):
            path = paths[other]
            if not path.startswith(beginning):
                break
            yield path


def name_and_ending(path: str) -> tuple[str, str]:
    """Base name, and what follows its last dot with the dot; both in lower case."""
    return path.rpartition("/")[2].lower(), path[path.rfind(".") :].lower()


def stem(path: str) -> str:
    """The path without its extension, and without that of an image: `000` of `000.json` and of `000.png.json`."""
    cut = path[: path.rfind(".")]
    return cut[: cut.rfind(".")] if is_image_name(cut) else cut
