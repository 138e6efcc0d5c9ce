"""Are the decoded colors right? Every file of a mixed collection, against decoders that share no code with ours.

    python benchmarks/messy.py --source messy.tar

Each file is decoded at its full size by `preprocess_image`, and by libvips, or by FFmpeg if libvips does not know the
format. The table counts accepted files, and the reasons of the others. Every image that differs by more than MEAN or
MOST, and every file that only one side accepts, is listed under its cause, which a check must confirm. Exit code 1 if
a difference has no known cause.
"""

from __future__ import annotations

import argparse
import io
import struct
import sys
import tarfile
import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyvips
from numpy.typing import NDArray
from PIL import Image

from pipeline.data.images.preprocess import MAX_PIXELS, CleanImage, Rejected, preprocess_image

try:
    import av
except ImportError:
    av = None

MEAN, MOST = 1.0, 8  # levels of 255
WHITE = (255, 255, 255)
Pixels = NDArray[np.uint8]


@dataclass
class Case:
    """One file, and what both sides made of it."""

    name: str
    data: bytes
    ours: CleanImage | Rejected
    peer_result: Pixels | str
    """The image, or the error message."""
    peer: str
    seconds: float
    bytes: int
    """Peak memory of our decoder."""

    @property
    def gap(self) -> tuple[float, int]:
        """Mean and largest difference, in levels."""
        if self.array is None or isinstance(self.peer_result, str) or self.array.shape != self.peer_result.shape:
            return np.inf, 255
        return _gap(self.array, self.peer_result)

    @property
    def array(self) -> Pixels | None:
        """Our image, if we accept the file."""
        return self.ours.array if isinstance(self.ours, CleanImage) else None

    @property
    def only(self) -> str:
        """The only side that accepts the file; empty if both or neither do."""
        if self.array is None:
            return "" if isinstance(self.peer_result, str) else self.peer
        return "ours" if isinstance(self.peer_result, str) else ""

    @property
    def format(self) -> str:
        """Pillow's name of the format, or else the file's extension."""
        if isinstance(self.ours, CleanImage):
            return self.ours.meta["format"]
        return self.header.format if self.header else Path(self.name).suffix[1:].upper()

    @cached_property
    def header(self) -> Any:
        """The image as opened by Pillow, not decoded; None if Pillow does not know the format."""
        try:
            return Image.open(io.BytesIO(self.data))
        except Exception:
            return None

    def tag(self, number: int) -> Any:
        """A tag of a TIFF."""
        return getattr(self.header, "tag_v2", {}).get(number)


def _gap(a: NDArray[Any], b: NDArray[Any]) -> tuple[float, int]:
    difference = np.abs(a.astype(int) - b)
    return float(difference.mean()), int(difference.max())


def by_libvips(data: bytes) -> Pixels:
    """Decode with libvips: upright, sRGB, opaque, at full size."""
    image = pyvips.Image.new_from_buffer(data, "", fail_on="truncated")
    if image.width * image.height > MAX_PIXELS:
        raise pyvips.Error(f"left out: {image.width}x{image.height}")
    image = image.autorot()
    try:
        if not image.get_typeof("icc-profile-data"):
            raise pyvips.Error("no profile")
        image = image.icc_transform("srgb", embedded=True, intent="relative", depth=8)
    except pyvips.Error:  # no profile, or a damaged one
        image = image.colourspace("srgb")
    if image.hasalpha():
        image = image.flatten(background=list(WHITE))
    return _to_rgb(image.cast("uchar").numpy())


def by_ffmpeg(data: bytes, suffix: str) -> Pixels:
    """Decode with FFmpeg, which ignores profiles and orientation."""
    if suffix == ".tga":  # has no signature, so the decoder must be named
        frame = av.CodecContext.create("targa", "r").decode(av.Packet(data))[0]
    else:
        with av.open(io.BytesIO(data)) as container:
            frame = next(container.decode(video=0))
    rgba = frame.to_ndarray(format="rgba").astype(float)
    opacity = rgba[..., 3:] / 255
    return np.round(rgba[..., :3] * opacity + np.array(WHITE) * (1 - opacity)).astype(np.uint8)


def _to_rgb(array: NDArray[Any]) -> NDArray[Any]:
    array = np.atleast_3d(array)
    return np.repeat(array, 3, 2) if array.shape[2] < 3 else array[..., :3]


def peer_view(name: str, data: bytes) -> tuple[Pixels | str, str]:
    """The result of libvips, or else of FFmpeg, and which of them it was."""
    try:
        return by_libvips(data), "libvips"
    except pyvips.Error as error:
        message = " ".join(str(error).split())
    no_reader = ("known format", "not configured", "not supported", "bad labq", "Support for this compression")
    if av is None or not any(part in message for part in no_reader):
        return message, "libvips"
    try:
        return by_ffmpeg(data, Path(name).suffix), "FFmpeg"
    except Exception as error:
        return f"{message}; FFmpeg: {type(error).__name__}", "neither"


def at_full_size(data: bytes) -> CleanImage:
    """Decode with `preprocess_image`, at the size of the upright image."""
    h, w = preprocess_image(data, size=(1, 1)).meta["original_size"]
    try:
        return preprocess_image(data, size=(h, w), crop_at=None)
    except Rejected as rejected:
        if rejected.reason != "wrong_aspect":
            raise
        return preprocess_image(data, size=(w, h), crop_at=None)


def cases(source: str) -> Iterator[Case]:
    """One case for each regular file of the tar."""
    with tarfile.open(source) as tar:
        for member in tar:
            if not member.isfile():
                continue
            data = tar.extractfile(member).read()  # type: ignore[union-attr]
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak memory
            before, started = _memory("VmRSS"), time.process_time()
            try:
                ours: CleanImage | Rejected = at_full_size(data)
            except Rejected as rejected:
                ours = rejected
            seconds, used = time.process_time() - started, _memory("VmHWM") - before
            yield Case(member.name, data, ours, *peer_view(member.name, data), seconds, used)


def _memory(which: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(which))


def _ideal_inks(case: Case) -> bool:
    image = pyvips.Image.new_from_buffer(case.data, "")
    if image.interpretation != "cmyk" or image.get_typeof("icc-profile-data") or case.array is None:
        return False
    inks = image.numpy() / (257 if image.format == "ushort" else 1) / 255
    return _gap((1 - inks[..., :3]) * (1 - inks[..., 3:]) * 255, case.array)[1] <= 2


def _turned(case: Case) -> bool:
    if case.array is None or isinstance(case.peer_result, str) or case.peer != "libvips":
        return False
    turns = [np.rot90(side, k) for side in (case.peer_result, case.peer_result[:, ::-1]) for k in range(4)][1:]
    return not pyvips.Image.new_from_buffer(case.data, "").get_typeof("orientation") and any(
        turn.shape == case.array.shape and _gap(turn, case.array)[0] <= MEAN for turn in turns
    )


def _chroma_only(case: Case) -> bool:
    if case.format != "AVIF" or case.gap[0] > MEAN or case.array is None:
        return False
    luma = np.array([0.2126, 0.7152, 0.0722])
    return float(np.quantile(np.abs(case.array @ luma - case.peer_result @ luma), 0.999)) <= MOST


def _premultiplied(case: Case) -> bool:
    image = pyvips.Image.new_from_buffer(case.data, "")
    if case.tag(338) != (1,) or case.array is None or image.bands != 4:
        return False
    stored = image.numpy() / (257 if image.format == "ushort" else 1)
    return _gap(stored[..., :3] + 255 - stored[..., 3:], case.array)[1] <= 2


def _one_color(case: Case) -> bool:
    return not case.only and not np.ptp(np.asarray(case.peer_result), axis=(0, 1)).any()


def _opaque_agrees(case: Case) -> bool:
    """Icons with a mask and 16-bit TGA with an attribute bit: what we show of them is what FFmpeg has."""
    alpha = case.format == "ICO" or (case.format == "TGA" and case.data[16] == 16 and case.data[17] & 15 == 1)
    if not alpha or case.peer != "FFmpeg" or case.array is None or case.array.shape != np.shape(case.peer_result):
        return False
    shown = (case.array != WHITE).any(-1)
    return bool(shown.any()) and _gap(case.array[shown], np.asarray(case.peer_result)[shown])[1] <= MOST


def _reserved_byte(case: Case) -> bool:
    if case.peer != "FFmpeg" or case.only:
        return False
    if case.format == "BMP":
        return struct.unpack_from("<HI", case.data, 28) == (32, 0)  # 32 bits a pixel, no masks
    return case.format == "TGA" and case.data[16] == 32 and case.data[17] & 15 == 0  # 32 bits, 0 of them attributes


def _run_past_the_row(case: Case) -> bool:
    if case.data[:2] != b"BM" or case.data[14] < 40 or struct.unpack_from("<HI", case.data, 28) not in ((8, 1), (4, 2)):
        return False
    (at,), (width,), bits = (*(struct.unpack_from("<I", case.data, place) for place in (10, 18)), case.data[28])
    x = 0
    while at + 2 <= len(case.data) and x <= width:
        count, code = case.data[at], case.data[at + 1]
        at += 2
        if count or code > 2:
            x += count or code
            at += 0 if count else (code * bits // 8 + 1) // 2 * 2
        elif code == 2 and at < len(case.data):
            x, at = x + case.data[at], at + 2
        else:
            x = 0
    return x > width


def _detail(case: Case, text: str) -> bool:
    return isinstance(case.ours, Rejected) and text in case.ours.detail


def _refused_when_strict(case: Case) -> bool:
    if case.peer != "libvips":
        return False
    try:
        pyvips.Image.new_from_buffer(case.data, "", fail_on="warning").avg()
    except pyvips.Error:
        return True
    return False


CAUSES: dict[str, Callable[[Case], bool]] = {
    "CMYK without a profile: ideal inks here, a press of its own in libvips; its inks mixed ideally agree": _ideal_inks,
    "turned by an orientation in XMP or in ImageMagick's text chunk, which libvips does not read": _turned,
    "AVIF: luma agrees, libheif interpolates the chroma of 4:2:0 in another way than libavif": _chroma_only,
    "colors stored multiplied by alpha (TIFF tag 338 = 1): libvips blends them as if they were not": _premultiplied,
    "a variant that the peer cannot decode: it gives one color (LZMA, old JPEG or tiled planes in TIFF)": _one_color,
    "a mask or an attribute bit, which FFmpeg ignores: they agree where it is opaque": _opaque_agrees,
    "32 bits without alpha in BMP or TGA: the fourth byte is reserved, FFmpeg takes it for alpha": _reserved_byte,
    "grey and alpha in a TGA, which FFmpeg takes for 5-bit colors": (
        lambda case: case.format == "TGA" and (case.data[2], case.data[16]) == (3, 16)
    ),
    "an icon of several sizes: we take the largest, FFmpeg the first": (
        lambda case: case.format == "ICO" and not case.only and np.shape(case.array) > np.shape(case.peer_result)
    ),
    "damaged: run-length code past the end of its row, each side goes on differently": _run_past_the_row,
    "damaged PNG header (checksum): refused, libpng goes on": (
        lambda case: case.data[12:16] == b"IHDR" and zlib.crc32(case.data[12:29]) != int.from_bytes(case.data[29:33])
    ),
    "no end chunk in the PNG: refused as truncated, libpng does not look for it": (
        lambda case: case.data.startswith(b"\x89PNG") and b"IEND\xaeB`\x82" not in case.data[-64:]
    ),
    "floating point: refused, as its white is not known": (
        lambda case: case.peer == "libvips" and pyvips.Image.new_from_buffer(case.data, "").format == "float"
    ),
    "damaged: libvips, told to be as strict as we are, refuses it too": _refused_when_strict,
    "TGA run-length packets across rows, which TGA 2.0 forbids: refused": lambda case: (
        case.format == "TGA" and _detail(case, "overrun")
    ),
    "BMP with bit fields, depths or palettes that Pillow has no code for: refused": lambda case: (
        case.format == "BMP" and _detail(case, "Unsupported BMP")
    ),
    "a format that is not among those we read": (
        lambda case: isinstance(case.ours, Rejected) and case.ours.reason == "not_an_image"
    ),
    "no other decoder here reads this file": lambda case: case.only == "ours" and case.peer == "neither",
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True, metavar="TAR")
    options = parser.parse_args()
    table: dict[str, Counter[str]] = defaultdict(Counter)
    peers: Counter[str] = Counter()
    listed: dict[str, list[str]] = defaultdict(list)
    hungriest = slowest = ("", 0.0)
    for case in cases(options.source):
        row = table[case.format]
        row["taken" if isinstance(case.ours, CleanImage) else case.ours.reason] += 1
        if not case.only and case.array is not None:
            peers[case.peer] += 1
        hungriest = max(hungriest, (case.name, case.bytes), key=lambda pair: pair[1])
        slowest = max(slowest, (case.name, case.seconds), key=lambda pair: pair[1])
        mean, most = case.gap
        if case.only or (case.array is not None and (mean > MEAN or most > MOST)):
            cause = next((text for text, holds in CAUSES.items() if _holds(holds, case)), "UNEXPLAINED")
            what = f"only {case.only}" if case.only else f"mean {mean:.2f}, at most {most}"
            why = f" ({case.ours.reason})" if isinstance(case.ours, Rejected) else ""
            why += f" ({case.peer_result})" if isinstance(case.peer_result, str) and cause == "UNEXPLAINED" else ""
            listed[cause].append(f"{case.name}: {what}{why}")
    _print(table, peers, listed)
    print(f"\nmost memory for one file: {hungriest[1] / 1e6:.0f} MB ({hungriest[0]})")
    print(f"most CPU seconds: {slowest[1]:.1f} ({slowest[0]})")
    return 1 if "UNEXPLAINED" in listed else 0


def _holds(check: Callable[[Case], bool], case: Case) -> bool:
    try:
        return check(case)
    except (pyvips.Error, OSError):
        return False


def _print(table: dict[str, Counter[str]], peers: Counter[str], listed: dict[str, list[str]]) -> None:
    print(f"{'format':10} {'files':>6} {'taken':>6}  rejected")
    for name, row in sorted(table.items()):
        rejected = ", ".join(f"{count} {reason}" for reason, count in sorted(row.items()) if reason != "taken")
        print(f"{name:10} {row.total():>6} {row['taken']:>6}  {rejected}")
    total = sum(table.values(), Counter())
    rejected = ", ".join(f"{count} {reason}" for reason, count in total.most_common() if reason != "taken")
    print(f"{'all':10} {total.total():>6} {total['taken']:>6}  {rejected}")
    print("\ncompared: " + ", ".join(f"{count} with {peer}" for peer, count in peers.items()))
    print(f"differences of more than {MEAN} on average or {MOST} anywhere, and files that only one side takes:")
    for cause, lines in listed.items():
        print(f"\n{cause}")
        for line in lines:
            print(f"  {line}")


if __name__ == "__main__":
    sys.exit(main())
