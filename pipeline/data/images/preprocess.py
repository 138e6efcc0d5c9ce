"""Bytes of an image file → one clean image, or `Rejected(reason)`. Pure.

H, W: height and width of the result; h, w: of the stored image. Arrays are uint8, (H, W, C), row 0 on top.
The steps, in this order: header checks, decode (first frame), EXIF rotation, transparent pixels over the background,
crop to the target's aspect ratio, one antialiased resize, colors to sRGB or grey (`color.py`). The aspect ratio never
changes.
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

from pipeline.data.images import codec, color, png
from pipeline.untrusted import printable

ImageFormat = Literal["png", "jpeg", "webp"]

PREPROCESSING = 2
"""Version of the resulting pixels, part of a shard set's settings.

Increase it when an image that was correct gets other pixels; not when a kind of image that was wrong is corrected, so
that sets without that kind can be continued.
"""

REASONS = {
    "unreadable": "its bytes cannot be read (permissions, I/O error; encrypted, damaged, sparse or linked member)",
    "source_changed": "size or time of the file changed since it was listed",
    "empty": "no bytes",
    "too_many_bytes": "the file is larger than the limit",
    "not_an_image": "no image in one of the formats read",
    "too_many_pixels": "its header states more pixels than the limit",
    "too_small": "its short side is below --min-size",
    "wrong_aspect": "with --crop none: its aspect ratio is not the target's",
    "truncated": "the file ends before the image does",
    "damaged": "the decoder failed: damaged, or an unknown variant",
    "unsupported_depth": "floating point, signed integers, or integers beyond 16 bits: the value of white is unknown",
    "nothing_visible": "the part that would be used is entirely transparent",
    "no_label": "the CSV of labels has no row for it",
    "no_picture": "ddpm index: a sample without an image",
    "several_pictures": "ddpm index: several images of one name; `--image-ext` selects one",
    "scattered": "the members of the sample do not follow each other, or one of them is repeated",
    "duplicate": "--dedupe: a duplicate of the image whose key the detail names",
    "decoder_crashed": "the process that decoded it, and no other file, died",
    "decoder_hung": "decoding took more CPU seconds than the limit",
    "label_file": "a file of labels, captions or metadata; not bad",
    "beside_image": "an image beside the image of a sample, such as a mask; not bad",
    "system_file": "a file of an operating system, file manager or version control (`.DS_Store`, `._*`, …); not bad",
}
"""All reasons in `rejected.jsonl`, with their meanings."""

EXTENSIONS: dict[ImageFormat, str] = {"png": "png", "jpeg": "jpg", "webp": "webp"}
"""Extensions of the formats in shards."""

MAX_PIXELS = 64_000_000
MAX_BYTES = 1 << 28
_MAX_DETAIL = 300  # characters
_MAX_SCANNED = 20 * MAX_PIXELS  # a progressive JPEG decodes all its pixels once per scan, and 10 bytes make a scan

Image.init()
# Formats whose decoders start other programs (EPS, WMF) are left out, and those in which nobody keeps images. The most
# frequent come first; TGA, which has no signature, comes last.
_FORMATS = [
    name
    for name in (
        "JPEG MPO PNG WEBP GIF TIFF AVIF BMP DDS DIB ICO JPEG2000 PCX PPM PSD QOI SGI TGA".split()  # noqa: SIM905
    )
    if name in Image.OPEN
]
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


class Rejected(Exception):  # noqa: N818  describes the input, not a failure of the program
    """An input cannot become an image; `reason` is one of `REASONS`."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = printable(detail, _MAX_DETAIL)


@dataclass(frozen=True)
class CleanImage:
    """An image, and how it was made."""

    array: NDArray[np.uint8]
    """(H, W, C)."""
    meta: dict[str, Any]
    """`format`, `mode` and `original_size` ([h, w]) as stored; `box`: left, top, right, bottom of the crop, in stored
    pixels after rotation; `transforms`: the applied steps in order."""


def preprocess_image(
    data: bytes,
    *,
    size: tuple[int, int] | None,
    channels: int = 3,
    crop_at: tuple[float, float] | None = (0.5, 0.5),
    background: tuple[int, int, int] = (255, 255, 255),
    min_size: int = 1,
    pad: bool = False,
    blank: bool = False,
) -> CleanImage:
    """Decode one image file, rotate it upright, make it opaque, crop and resize it.

    Args:
        data: the stored file; of an animation the first frame is used.
        size: (H, W); None: the size of the upright image.
        channels: 3 for sRGB, 1 for grey.
        crop_at: position of the crop window, (x, y) in [0, 1) from left or top to right or bottom; (0.5, 0.5) is the
            center. The window is the largest of the target's aspect ratio. None: no crop, the aspect ratio must match.
        background: RGB under transparent pixels, and around a padded image.
        min_size: refuse images whose short side is below this many pixels.
        pad: with `crop_at=None`, use the entire image: reduced if it is larger than the target, never enlarged,
            centered on the background.
        blank: return the background for an image that is entirely transparent, instead of refusing it.

    Returns:
        uint8, (H, W, channels); 16-bit images are scaled, never clipped.

    Raises:
        Rejected: with a reason of `REASONS`; no error of a decoder gets past this function.
    """
    if not data:
        raise Rejected("empty")
    if len(data) > MAX_BYTES:
        raise Rejected("too_many_bytes", f"{len(data)} bytes, the limit is {MAX_BYTES}")
    transforms: list[str] = []
    with _rejecting(data):
        opened = codec.open_image(data, _FORMATS)
        stored = opened.image
        w, h = stored.size
        meta = {"format": stored.format, "mode": stored.mode, "original_size": [h, w]}
        _refuse_costly(stored, data)
        if min(w, h) < min_size:
            raise Rejected("too_small", f"{w}x{h}, --min-size is {min_size}")
        image, scale = codec.decode_first_frame(opened, size or (max(w, h),) * 2, transforms)
        del opened, stored  # frees up to 64 million pixels
        full = image.size if scale == 1 else (w, h)
        turn = _UPRIGHT.get(_orientation(image))
        if turn is not None:
            transforms.append("rotated")
            image = image.transpose(turn)
            full = full[::-1] if turn in _SIDEWAYS else full
        size = size or full[::-1]
        box = (0.0, 0.0, *full) if pad else _crop_box(full, size, crop_at)
        image, is_blank = color.flatten(image, channels, background, box, transforms)
        if is_blank and not blank:
            raise Rejected("nothing_visible")
        if box != (0, 0, *full):
            transforms.append("cropped")
        image = _resize(image, _fitted(full, size) if pad else size, box, scale, transforms)
        image = color.to_srgb(image, channels, transforms)
        array = np.asarray(image).reshape(image.height, image.width, channels)
        if array.shape[:2] != size:
            array = _padded(array, size, background, transforms)
    return CleanImage(array, {**meta, "box": [round(edge, 3) for edge in box], "transforms": transforms})


@contextmanager
def _rejecting(data: bytes) -> Iterator[None]:
    """Turn every error of Pillow into `Rejected`, and hide its warnings (damaged EXIF and the like)."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Rejected:
        raise
    except UnidentifiedImageError as error:
        head = data[:16].ljust(16, b"\0")  # the checks expect 16 bytes
        if any(accept and accept(head) is True for _, accept in map(Image.OPEN.__getitem__, _FORMATS)):
            raise Rejected("damaged", "no valid header, or a variant that is not read") from error
        raise Rejected("not_an_image") from error
    except color.UnknownWhiteError as error:
        raise Rejected("unsupported_depth", str(error)) from error
    except Image.DecompressionBombError as error:
        raise Rejected("too_many_pixels", f"the limit is {MAX_PIXELS} pixels") from error
    except Exception as error:
        text = str(error).lower()
        short = "truncated" in text or "not enough image data" in text or isinstance(error, EOFError)
        raise Rejected("truncated" if short else "damaged", str(error)) from error


def _refuse_costly(image: ImageFile.ImageFile, data: bytes) -> None:
    """Refuse, by the header, images that need gigabytes or minutes however small their file is."""
    w, h = image.size
    tags = getattr(image, "tag_v2", {})
    tile_w, tile_h = tags.get(_TILE_WIDTH, 0), tags.get(_TILE_LENGTH, 0)
    for width, height in ((w, h), (tile_w, tile_h)):
        if width * height > MAX_PIXELS:
            raise Rejected("too_many_pixels", f"{width}x{height}, the limit is {MAX_PIXELS} pixels")
    if image.info.get("progressive") and (scans := data.count(b"\xff\xda")) * w * h > _MAX_SCANNED:
        raise Rejected("too_many_pixels", f"{scans} scans of {w}x{h}, the limit is {_MAX_SCANNED} pixels")


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged EXIF in an undamaged image
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
    # The last decoded pixel of a reduced JPEG may cover stored pixels beyond the edge.
    decoded = (left / scale, top / scale, min(right / scale, image.width), min(bottom / scale, image.height))
    return image.resize((width, height), Image.Resampling.LANCZOS, box=decoded, reducing_gap=3.0)


def _crop_box(
    stored: tuple[int, int], size: tuple[int, int], crop_at: tuple[float, float] | None
) -> tuple[float, float, float, float]:
    """The largest window of the target's aspect ratio: (left, top, right, bottom), with integer left and top.

    Args:
        stored: (w, h).
        size: (H, W).
        crop_at: as for `preprocess_image`.
    """
    (w, h), (target_h, target_w) = stored, size
    box_w, box_h = (h * target_w / target_h, h) if w * target_h >= h * target_w else (w, w * target_h / target_w)
    if crop_at is None:
        # A stored side is rounded to pixels, so the ratio matches if a change of less than one pixel makes it match.
        if w - box_w >= 1 or h - box_h >= 1:
            raise Rejected("wrong_aspect", f"{w}x{h} does not scale to {target_w}x{target_h}")
        return (0, 0, w, h)
    left, top = int(crop_at[0] * (int(w - box_w) + 1)), int(crop_at[1] * (int(h - box_h) + 1))
    return (left, top, left + box_w, top + box_h)


def _fitted(stored: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """(h, w) of the entire image, reduced to fit into (H, W) if it is larger."""
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
    """Encode an image as a file; equal arrays give equal bytes.

    Args:
        array: uint8, (H, W, 3) or (H, W, 1).
        format: png and webp are lossless, jpeg has quality 95 without chroma subsampling.
    """
    if format == "png":
        return png.encode(array)
    options: dict[str, Any] = (
        {"quality": 95, "subsampling": 0} if format == "jpeg" else {"lossless": True, "exact": True}
    )
    file = io.BytesIO()
    Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array).save(file, format.upper(), **options)
    return file.getvalue()


def decode(data: bytes, channels: int, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """Decode an image file of a shard.

    Args:
        data: a file made by `encode`.
        channels: 1 or 3.
        max_pixels: a larger image is not decoded.

    Returns:
        uint8, (H, W, channels).

    Raises:
        Rejected: the image cannot be decoded.
    """
    try:
        if png.pixel_count(data) > max_pixels:
            raise Rejected("too_many_pixels", f"the limit is {max_pixels} pixels")
        array = png.decode(data)
        if array is not None and array.shape[2] == channels:
            return array
        with Image.open(io.BytesIO(data), formats=["PNG", "JPEG", "WEBP"]) as image:
            if image.width * image.height > max_pixels:
                raise Rejected("too_many_pixels", f"the limit is {max_pixels} pixels")
            _refuse_costly(image, data)
            mode = "L" if channels == 1 else "RGB"
            array = np.asarray(image if image.mode == mode else image.convert(mode))
    except Rejected:
        raise
    except Exception as error:
        raise Rejected("damaged") from error
    return array.reshape(*array.shape[:2], channels)
