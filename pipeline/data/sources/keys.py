"""Which members of a tar are one sample, and which of them is its image: one rule for all jobs.

webdataset's rule: the key of a member is its path up to the first dot of the base name, the rest is its extension;
members of one key are one sample (`a/b.jpg`, `a/b.cls`). Three rules are added, as file names contain dots, too:

- Parts of an extension that begin with a digit belong to the name: `22.05.png` and `22.06.png` are two images.
- A companion (`.cls`, `.json`, …) describes the image that shares most of its name, and no image with another number:
  `22.05.cls` belongs to `22.05.png`, `000.cls` to both `000.0.png` and `000.1.png`.
- Of several images of one name, the image with the shortest extension is the image of the sample, and the others lie
  beside it: `000.jpg` before `000.seg.png`. `--image-ext` selects others. Images with a `.cls` each are a sample each.
  If none of this decides, the group is unclear.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import NamedTuple

from pipeline.data.sources.inputs import IMAGES

TEXT_COMPANIONS = frozenset(
    "cls class category target json txt text caption captions tags label labels meta metadata xml yaml yml".split()  # noqa: SIM905
)
"""Extensions of text files that describe the image of the same name, in a directory or an archive."""
COMPANIONS = TEXT_COMPANIONS | frozenset(
    "cls2 id idx index jsonl url npy npz pyd pkl pickle pth pt safetensors mp msg msgpack cbor ten tb csv".split()  # noqa: SIM905
)
"""Extensions of all members of an archive that describe an image."""
CLASS = "cls"
_NUMBERS = re.compile(r"(?:\d[^.]*\.)*")


class Sample(NamedTuple):
    """One image among the members of a key, and its companions; a member is given by its number."""

    name: str
    """What its name has after the key: empty, `.05` of `22.05.png`; of several with a class each also `.smith`."""
    image: int
    companions: tuple[tuple[int, ...], ...]
    """Members that describe the image, in levels: those that share most of its name come first."""


class Group(NamedTuple):
    """The members of one key."""

    samples: tuple[Sample, ...]
    beside: tuple[int, ...]
    """Images beside the image of a sample."""
    unclear: tuple[tuple[int, ...], ...]
    """Images of one name that may be one sample or several; `samples` contains them, too."""
    orphans: tuple[int, ...]
    """Companions of no image."""


def split(path: str) -> tuple[str, str]:
    """Key and extension of a member, the extension in lower case; a dot at the beginning of a name does not count."""
    dot = path.find(".", path.rfind("/") + 2)
    return (path, "") if dot < 0 else (path[:dot], path[dot + 1 :].lower())


def kind(extension: str) -> str:
    """The last part of an extension, which names the file format."""
    return extension[extension.rfind(".") + 1 :]


def without_numbers(extension: str) -> str:
    """The extension without the parts that belong to the name."""
    match = _NUMBERS.match(extension)
    return extension[match.end() :] if match else extension


def parse_extensions(text: str | None) -> frozenset[str]:
    """The extensions of `--image-ext`: `jpg`, or `image.png,photo.png`."""
    return frozenset(part.strip().lower().strip(".") for part in (text or "").split(",")) - {""}


@lru_cache(maxsize=4096)  # most samples of a set have the same extensions
def group_members(extensions: tuple[str, ...], image_extensions: frozenset[str] = frozenset()) -> Group:
    """Find the samples among the members of one key.

    Args:
        extensions: of the members.
        image_extensions: of the images to take, without numbers; empty: by the rules above.
    """
    plain = [without_numbers(extension) for extension in extensions]
    images: dict[str, list[int]] = {}
    companions: dict[str, list[int]] = {}
    for number, (extension, rest) in enumerate(zip(extensions, plain)):
        name, ending = extension[: len(extension) - len(rest)], kind(rest)
        if ending in IMAGES:
            images.setdefault(name, []).append(number)
        elif ending in COMPANIONS:
            companions.setdefault(name, []).append(number)
    samples: list[Sample] = []
    beside: list[int] = []
    unclear: list[tuple[int, ...]] = []
    used = set[str]()
    for name, candidates in images.items():
        levels = [outer for outer in _prefixes(name) if outer in companions and (outer == name or outer not in images)]
        used.update(levels)
        nearest = [plain[number] for level in levels[:1] for number in companions[level]]
        chosen = _choose_images(candidates, plain, nearest, image_extensions)
        if chosen is None:
            chosen = candidates
            unclear.append(tuple(candidates))
        beside += [number for number in candidates if number not in chosen]
        stems = {_stem(plain[number]) for number in chosen}
        for number in chosen:
            own = (part for level in levels for part in _by_stem(plain, companions[level], number, stems))
            full_name = name + (_stem(plain[number]) if len(chosen) > 1 else "")
            samples.append(Sample(f".{full_name}".rstrip("."), number, tuple(filter(None, own))))
    orphans = [number for name, numbers in companions.items() if name not in used for number in numbers]
    return Group(tuple(samples), tuple(beside), tuple(unclear), tuple(orphans))


def _prefixes(name: str) -> list[str]:
    """A name and its beginnings, longest first: `1.2.`, `1.` and the empty text of `1.2.`."""
    return [*(name[: match.end()] for match in reversed([*re.finditer(r"\.", name)])), ""]


def _choose_images(
    images: list[int], plain: list[str], companions: list[str], image_extensions: frozenset[str]
) -> list[int] | None:
    """The images of one name that are samples; None if that is unclear."""
    if len(images) == 1 and not image_extensions:
        return images
    if image_extensions:
        return [number for number in images if plain[number] in image_extensions]
    short = [number for number in images if "." not in plain[number]]
    if len(short) == 1:
        return short
    labeled = {_stem(extension) for extension in companions if kind(extension) == CLASS}
    return images if all(_stem(plain[number]) in labeled for number in images) and not short else None


def _by_stem(plain: list[str], companions: list[int], image: int, stems: set[str]) -> list[tuple[int, ...]]:
    """The companions of an image's name: with the stem of the image, without a stem, with a stem of no image."""
    own, shared, other = [], [], []
    for number in companions:
        stem = _stem(plain[number])
        if stem == _stem(plain[image]):
            own.append(number)
        elif not stem:
            shared.append(number)
        elif stem not in stems:
            other.append(number)
    return [tuple(own), tuple(shared), tuple(other)]


def _stem(extension: str) -> str:
    return extension[: max(extension.rfind("."), 0)]
