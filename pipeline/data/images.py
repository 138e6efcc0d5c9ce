"""Image file bytes → one clean picture, or `Rejected(reason)`; pure.

H, W: height and width of the result; h, w: those of the stored picture. Arrays are uint8, (H, W, C), row 0 on top.
The order of the steps is part of the promise: header checks, decode (first frame), EXIF rotation, transparency over the
background, crop to the target's aspect ratio, one antialiased resize, the file's colours to sRGB or grey (`colour.py`).
Nothing is ever squashed.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, UnidentifiedImageError

from pipeline.data import colour, png

ImageFormat = Literal["png", "jpeg", "webp"]

PREPROCESSING = 2
"""Raised whenever the same settings may give other pixels than before; part of a shard set's settings."""

REASONS = {
    "unreadable": "the source does not give its bytes (permissions, I/O error, encrypted or damaged archive member)",
    "source_changed": "it is not the file that was listed: size or time changed since",
    "empty": "no bytes",
    "too_many_bytes": "a larger file than is looked at",
    "not_an_image": "no picture in one of the formats read",
    "too_many_pixels": "its header announces more pixels than are decoded",
    "too_small": "its short side is below --min-size",
    "wrong_aspect": "with --crop none: its aspect ratio is not the target's",
    "truncated": "the file ends before the picture does",
    "damaged": "the decoder gave up: damaged, or a variant that it does not know",
    "unsupported_depth": "floating point, or integers beyond 16 bits: their white is not known",
    "no_label": "the CSV of labels has no row for it, or what its webdataset says is no class number",
    "no_picture": "a sample of another's webdataset without a picture",
    "several_pictures": "a sample of another's webdataset with more than one picture",
    "scattered": "a sample of another's webdataset whose members do not follow each other, or with one of them twice",
    "duplicate": "--dedupe: the same picture as the one whose key the detail names, which was kept",
    "decoder_crashed": "the process that decoded it, and nothing else, died",
    "decoder_hung": "decoding it used more CPU seconds than allowed",
}
"""Every reason that can stand in `rejected.jsonl`."""

EXTENSIONS: dict[ImageFormat, str] = {"png": "png", "jpeg": "jpg", "webp": "webp"}
"""Formats of shards and the extension each has in a tar."""

MAX_PIXELS = 64_000_000
MAX_BYTES = 1 << 28
_MAX_SCANNED = 20 * MAX_PIXELS  # a progressive JPEG goes over its pixels once a scan, and 10 bytes are a scan

Image.init()
# Left out: formats whose decoders start other programs (EPS, WMF), and those that no collection of pictures is kept in.
# The likely ones come first; TGA, which has no magic number, last.
_READ = [
    name
    for name in (
        "JPEG MPO PNG WEBP GIF TIFF AVIF BMP DDS DIB ICO JPEG2000 PCX PPM PSD QOI SGI TGA".split()  # noqa: SIM905
    )
    if name in Image.OPEN
]
_GREY_LEVEL = {"1": 255, "L;2": 85, "L;4": 17}
"""Of one step in a PNG of so few bits."""
_TILE_WIDTH, _TILE_LENGTH = 322, 323
_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = {_UPRIGHT[orientation] for orientation in (5, 6, 7, 8)}


class Rejected(Exception):  # noqa: N818  a verdict on the input, not a failure of the program
    """An input that does not become a picture; `reason` is one of `REASONS`."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class Picture:
    """A picture and how it came about."""

    array: NDArray[np.uint8]
    """(H, W, C)."""
    meta: dict[str, Any]
    """`format`, `mode` and `original_size` ([h, w]) as stored; `box`: left, top, right, bottom of the crop, in stored
    pixels after rotation; `transforms` in the order they were applied."""


def to_picture(
    data: bytes,
    *,
    size: tuple[int, int],
    channels: int = 3,
    crop_at: tuple[float, float] | None = (0.5, 0.5),
    background: tuple[int, int, int] = (255, 255, 255),
    min_size: int = 1,
    pad: bool = False,
) -> Picture:
    """Decode one image file, make it upright and opaque, crop and resize it.

    Args:
        data: the file as stored; animations give their first frame.
        size: (H, W).
        channels: 3 for sRGB, 1 for grey.
        crop_at: where the largest window of the target's aspect ratio lies, (x, y) in [0, 1) from left or top to
            right or bottom; (0.5, 0.5) is the centre. None: no crop, so the aspect ratio has to fit.
        background: RGB laid under transparency, and around a padded picture.
        min_size: refuse pictures whose short side is below this many pixels.
        pad: with `crop_at=None`, keep the whole picture: reduced to fit if it is larger, never enlarged, centred on
            the background.

    Returns:
        uint8, (H, W, channels); 16-bit pictures are scaled, never clipped.

    Raises:
        Rejected: with a reason of `REASONS`; whatever a decoder raises ends here.
    """
    if not data:
        raise Rejected("empty")
    if len(data) > MAX_BYTES:
        raise Rejected("too_many_bytes", f"{len(data)} bytes, the limit is {MAX_BYTES}")
    transforms: list[str] = []
    with _verdicts(data):
        stored = Image.open(io.BytesIO(data), formats=_READ)
        w, h = stored.size
        meta = {"format": stored.format, "mode": stored.mode, "original_size": [h, w]}
        _refuse_costly(stored, data)
        if min(w, h) < min_size:
            raise Rejected("too_small", f"{w}x{h}, --min-size is {min_size}")
        image, scale = _first_frame(stored, data, size, transforms)
        del stored  # 64 million pixels each time
        full = image.size if scale == 1 else (w, h)
        turn = _UPRIGHT.get(_orientation(image))
        if turn is not None:
            transforms.append("rotated")
            image = image.transpose(turn)
            full = full[::-1] if turn in _SIDEWAYS else full
        image = colour.flattened(image, channels, background, transforms)
        box = (0.0, 0.0, *full) if pad else _crop_box(full, size, crop_at)
        if box != (0, 0, *full):
            transforms.append("cropped")
        image = _resize(image, _fitted(full, size) if pad else size, box, scale, transforms)
        image = colour.to_srgb(image, channels, transforms)
        array = np.asarray(image).reshape(image.height, image.width, channels)
        if array.shape[:2] != size:
            array = _padded(array, size, background, transforms)
    return Picture(array, {**meta, "box": [round(edge, 3) for edge in box], "transforms": transforms})


def upright_size(data: bytes) -> tuple[int, int]:
    """(H, W) of the picture in a file once it is upright, as its header has it.

    Raises:
        Rejected: as `to_picture`.
    """
    with _verdicts(data):
        image = Image.open(io.BytesIO(data), formats=_READ)
        w, h = image.size
        return (w, h) if _UPRIGHT.get(_orientation(image)) in _SIDEWAYS else (h, w)


@contextmanager
def _verdicts(data: bytes) -> Iterator[None]:
    """Whatever Pillow raises becomes a reason; what it warns of (damaged EXIF and the like) is not said."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Rejected:
        raise
    except UnidentifiedImageError as error:
        head = data[:16].ljust(16, b"\0")  # the checks count on so much
        if any(accept and accept(head) is True for _, accept in map(Image.OPEN.__getitem__, _READ)):
            raise Rejected("damaged", "no sound header, or a variant that is not read") from error
        raise Rejected("not_an_image") from error
    except colour.UnknownWhiteError as error:
        raise Rejected("unsupported_depth", str(error)) from error
    except Image.DecompressionBombError as error:
        raise Rejected("too_many_pixels", f"the limit is {MAX_PIXELS} pixels") from error
    except Exception as error:
        text = str(error).lower()
        short = "truncated" in text or "not enough image data" in text or isinstance(error, EOFError)
        raise Rejected("truncated" if short else "damaged", str(error)) from error


def _refuse_costly(image: ImageFile.ImageFile, data: bytes) -> None:
    """By the header: what small files can use gigabytes or minutes for."""
    w, h = image.size
    tags = getattr(image, "tag_v2", {})
    tile_w, tile_h = tags.get(_TILE_WIDTH, 0), tags.get(_TILE_LENGTH, 0)
    for width, height in ((w, h), (tile_w, tile_h)):
        if width * height > MAX_PIXELS:
            raise Rejected("too_many_pixels", f"{width}x{height}, the limit is {MAX_PIXELS} pixels")
    if image.info.get("progressive") and (scans := data.count(b"\xff\xda")) * w * h > _MAX_SCANNED:
        raise Rejected("too_many_pixels", f"{scans} scans of {w}x{h}, the limit is {_MAX_SCANNED} pixels")


def _first_frame(
    image: ImageFile.ImageFile, data: bytes, size: tuple[int, int], transforms: list[str]
) -> tuple[Image.Image, float]:
    """The decoded image, and how many stored pixels one of its pixels stands for, along each side."""
    w, h = image.size
    # A JPEG decodes several times faster at half, quarter or eighth scale; twice the target is left for the filter.
    reduction = min(w, h) / max(size) / 2
    drafted = image.draft(None, (int(w / reduction), int(h / reduction)))
    scale = 1.0
    if drafted:
        scale = w / drafted[1][2]
        image.decodermaxblock = len(data)
    if _animated(image):
        transforms.append("first_frame")
    drawn = image.tile[0][1] if image.format == "GIF" and image.tile else None
    key, raw = image.info.get("transparency"), image.tile[0][3] if image.tile else None
    if image.format == "PNG" and isinstance(key, int) and raw in _GREY_LEVEL:
        image.info["transparency"] = key * _GREY_LEVEL[raw]  # as the pixels are scaled
    try:
        image.load()
    except OSError:
        if scale == 1:
            raise
        image, scale = Image.open(io.BytesIO(data), formats=_READ), 1.0  # a lossless JPEG has no other scales
        image.load()
    if scale > 1:
        transforms.append("decoded_reduced")
    if drawn in (None, (0, 0, w, h)):
        return image, scale
    # What the first frame of a GIF leaves open is transparent, whatever background colour it names; so do browsers.
    canvas = Image.new("RGBA", (w, h))
    canvas.paste(image.convert("RGBA").crop(drawn), drawn[:2])
    return canvas, scale


def _animated(image: ImageFile.ImageFile) -> bool:
    try:
        return image.format != "PSD" and getattr(image, "is_animated", False)  # Photoshop's layers are no frames
    except Exception:  # a damaged second frame behind a sound first one
        image.seek(0)
        return True


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged EXIF beside a sound picture
        return 1


def _resize(
    image: Image.Image,
    size: tuple[int, int],
    box: tuple[float, float, float, float],
    scale: float,
    transforms: list[str],
) -> Image.Image:
    height, width = size
    left, top, right, bottom = box
    if (right - left, bottom - top) != (width, height):
        transforms.append("enlarged" if right - left < width else "reduced")
    # The last decoded pixel of a reduced JPEG may stand for stored pixels beyond the edge.
    decoded = (left / scale, top / scale, min(right / scale, image.width), min(bottom / scale, image.height))
    return image.resize((width, height), Image.Resampling.LANCZOS, box=decoded, reducing_gap=3.0)


def _crop_box(
    stored: tuple[int, int], size: tuple[int, int], crop_at: tuple[float, float] | None
) -> tuple[float, float, float, float]:
    """The largest window of the target's aspect ratio: (left, top, right, bottom), its corner on whole pixels.

    Args:
        stored: (w, h).
        size: (H, W).
        crop_at: as for `to_picture`.
    """
    (w, h), (target_h, target_w) = stored, size
    box_w, box_h = (h * target_w / target_h, h) if w * target_h >= h * target_w else (w, w * target_h / target_w)
    if crop_at is None:
        # A stored side is a rounded number of pixels, so the ratio fits if a change below one pixel makes it fit.
        if w - box_w >= 1 or h - box_h >= 1:
            raise Rejected("wrong_aspect", f"{w}x{h} does not scale to {target_w}x{target_h}")
        return (0, 0, w, h)
    left, top = int(crop_at[0] * (int(w - box_w) + 1)), int(crop_at[1] * (int(h - box_h) + 1))
    return (left, top, left + box_w, top + box_h)


def _fitted(stored: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """(h, w) of the whole picture, reduced to lie within (H, W) if it is larger."""
    (w, h), (target_h, target_w) = stored, size
    reduction = max(w / target_w, h / target_h, 1.0)
    return max(1, round(h / reduction)), max(1, round(w / reduction))


def _padded(
    array: NDArray[np.uint8], size: tuple[int, int], background: tuple[int, int, int], transforms: list[str]
) -> NDArray[np.uint8]:
    transforms.append("padded")
    canvas = Image.new("RGB", size[::-1], background).convert("L" if array.shape[-1] == 1 else "RGB")
    padded = np.array(canvas).reshape(*size, -1)
    (h, w), top, left = array.shape[:2], (size[0] - array.shape[0]) // 2, (size[1] - array.shape[1]) // 2
    padded[top : top + h, left : left + w] = array
    return padded


def encode(array: NDArray[np.uint8], format: ImageFormat) -> bytes:
    """A picture as a file; equal arrays give equal bytes.

    Args:
        array: uint8, (H, W, 3) or (H, W, 1).
        format: png and webp are lossless, jpeg is quality 95 without chroma subsampling.
    """
    if format == "png":
        return png.encoded(array)
    options: dict[str, Any] = (
        {"quality": 95, "subsampling": 0} if format == "jpeg" else {"lossless": True, "exact": True}
    )
    file = io.BytesIO()
    Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array).save(file, format.upper(), **options)
    return file.getvalue()


def decode(data: bytes, channels: int) -> NDArray[np.uint8]:
    """The picture in a shard's image file.

    Args:
        data: what `encode` gave, or an image of another's webdataset.
        channels: 1 or 3.

    Returns:
        uint8, (H, W, channels).

    Raises:
        Rejected: it cannot be decoded.
    """
    try:
        array = png.decoded(data)
        if array is not None and array.shape[2] == channels:
            return array
        with Image.open(io.BytesIO(data), formats=["PNG", "JPEG", "WEBP"]) as image:
            mode = "L" if channels == 1 else "RGB"
            array = np.asarray(image if image.mode == mode else image.convert(mode))
    except Exception as error:
        raise Rejected("damaged") from error
    return array.reshape(*array.shape[:2], channels)
