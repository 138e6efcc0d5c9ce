"""Images become upright, opaque, antialiased, with their aspect ratio; other files get a reason."""

from __future__ import annotations

import io
import random
import struct
import time
import zlib

import numpy as np
import pytest
import pyvips
from PIL import Image, ImageDraw

from benchmarks.messy import at_full_size, by_libvips
from pipeline.data.images import png as png_files
from pipeline.data.images import preprocess
from pipeline.data.images.preprocess import REASONS, Rejected, decode, encode, preprocess_image


def file(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def noise(h: int, w: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    shape = (h, w, channels) if channels > 1 else (h, w)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def photo(h: int, w: int) -> Image.Image:
    """Something with the spectrum of a photograph: soft shapes, hard edges, a little grain."""
    rng = np.random.default_rng(1)
    coarse = Image.fromarray(rng.integers(0, 256, (h // 60, w // 60, 3), dtype=np.uint8))
    image = coarse.resize((w, h), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for x, y, r in rng.integers(0, min(h, w), (12, 3)):
        draw.ellipse((x, y, x + r // 4, y + r // 4), fill=tuple(int(v) for v in rng.integers(0, 256, 3)))
    grain = rng.normal(0, 3, (h, w, 3))
    return Image.fromarray(np.clip(np.asarray(image) + grain, 0, 255).astype(np.uint8))


def reason(data: bytes, **options) -> str:
    with pytest.raises(Rejected) as caught:
        preprocess_image(data, size=(8, 8), **options)
    assert caught.value.reason in REASONS
    return caught.value.reason


@pytest.mark.parametrize("size", [(16, 16), (12, 20), (20, 12)])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_image_has_the_size_and_channels_asked_for(size, channels):
    for h, w in [(16, 16), (1, 1), (7, 300), (300, 7), (61, 59)]:
        image = preprocess_image(file(Image.fromarray(noise(h, w))), size=size, channels=channels)
        assert image.array.shape == (*size, channels)
        assert image.array.dtype == np.uint8
        assert image.meta["original_size"] == [h, w]


@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_of_the_right_size_is_not_touched(channels):
    stored = noise(16, 24, channels)
    image = preprocess_image(file(Image.fromarray(stored)), size=(16, 24), channels=channels)
    np.testing.assert_array_equal(image.array, stored.reshape(16, 24, channels))
    assert image.meta["transforms"] == []


@pytest.mark.parametrize("size", [(50, 50), (40, 80), (80, 40)])
def test_circles_stay_round(size):
    image = Image.new("L", (400, 240))
    ImageDraw.Draw(image).ellipse((150, 70, 250, 170), fill=255)
    array = preprocess_image(file(image), size=size, channels=1).array[..., 0].astype(float) / 255
    # Second moments of a disc are equal along both axes.
    y, x = np.mgrid[: size[0], : size[1]]
    spread = [np.sqrt(np.sum(array * (a - np.sum(array * a) / array.sum()) ** 2) / array.sum()) for a in (y, x)]
    assert spread[0] == pytest.approx(spread[1], rel=0.02)


def test_the_center_is_kept():
    columns = np.broadcast_to(np.arange(300, dtype=np.float64) / 300 * 255, (100, 300)).astype(np.uint8)
    wide = preprocess_image(file(Image.fromarray(columns)), size=(10, 10), channels=1)
    tall = preprocess_image(file(Image.fromarray(columns.T.copy())), size=(10, 10), channels=1)
    assert wide.meta["box"] == [100, 0, 200, 100]
    np.testing.assert_allclose(wide.array[..., 0], tall.array[..., 0].T, atol=1)
    assert wide.array.mean() == pytest.approx(127, abs=1.5)


def test_crop_places_reach_both_ends_and_nothing_beyond():
    data = file(Image.fromarray(noise(10, 33)))
    lefts = [
        preprocess_image(data, size=(10, 10), crop_at=(u, 0.0)).meta["box"][0] for u in np.linspace(0, 1 - 1e-12, 240)
    ]
    assert sorted(set(lefts)) == list(range(24))
    assert max(lefts.count(left) for left in range(24)) <= 11  # each whole offset equally likely


def test_without_crop_another_aspect_ratio_is_refused():
    assert reason(file(Image.new("RGB", (30, 20))), crop_at=None) == "wrong_aspect"
    whole = preprocess_image(file(Image.new("RGB", (333, 500))), size=(96, 64), crop_at=None)  # 2:3 to the pixel
    assert whole.meta["box"] == [0, 0, 333, 500]


@pytest.mark.parametrize("h, w", [(300, 100), (100, 300), (16, 24), (7, 5), (1, 4000), (20, 20)])
@pytest.mark.parametrize("channels", [1, 3])
def test_padding_keeps_the_whole_image_and_enlarges_nothing(h, w, channels):
    stored = Image.new("RGB", (w, h), (255, 255, 255))
    data = file(stored)
    image = preprocess_image(data, size=(16, 24), channels=channels, crop_at=None, background=(0, 0, 0), pad=True)
    inner_h, inner_w = (max(1, round(side * min(1, 16 / h, 24 / w))) for side in (h, w))
    top, left = (16 - inner_h) // 2, (24 - inner_w) // 2
    expected = np.zeros((16, 24, channels), np.uint8)
    expected[top : top + inner_h, left : left + inner_w] = 255
    np.testing.assert_array_equal(image.array, expected)
    assert image.meta["box"] == [0, 0, w, h]
    assert ("padded" in image.meta["transforms"]) == ((inner_h, inner_w) != (16, 24))
    assert "enlarged" not in image.meta["transforms"]


def test_a_padded_small_image_is_not_touched():
    stored = noise(5, 7)
    image = preprocess_image(file(Image.fromarray(stored)), size=(9, 8), crop_at=None, background=(1, 2, 3), pad=True)
    np.testing.assert_array_equal(image.array[2:7, :7], stored)
    assert image.array[:2].reshape(-1, 3).tolist() == [[1, 2, 3]] * 16
    assert image.meta["transforms"] == ["padded"]


def test_fine_patterns_become_grey():
    board = (np.indices((256, 256)).sum(0) % 2 * 255).astype(np.uint8)
    array = preprocess_image(file(Image.fromarray(board)), size=(32, 32), channels=1).array
    assert np.abs(array.astype(int) - 127).max() <= 3


UPRIGHT = noise(6, 9)
# EXIF 2.32, tag 274: which side of the image the stored row 0 and column 0 are.
STORED = {
    1: UPRIGHT,
    2: UPRIGHT[:, ::-1],
    3: UPRIGHT[::-1, ::-1],
    4: UPRIGHT[::-1],
    5: UPRIGHT.transpose(1, 0, 2),
    6: UPRIGHT[:, ::-1].transpose(1, 0, 2),
    7: UPRIGHT[::-1, ::-1].transpose(1, 0, 2),
    8: UPRIGHT[::-1].transpose(1, 0, 2),
}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF"])
def test_exif_rotation_comes_first(orientation, format):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True, "exact": True} if format == "WEBP" else {}
    data = file(Image.fromarray(np.ascontiguousarray(STORED[orientation])), format, exif=exif, **options)
    np.testing.assert_array_equal(preprocess_image(data, size=(6, 9)).array, UPRIGHT)


def test_damaged_exif_does_not_cost_the_image():
    data = file(Image.fromarray(UPRIGHT), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f" + b"\xff" * 40)
    assert preprocess_image(data, size=(6, 9)).array.shape == (6, 9, 3)


def transparent(mode: str) -> bytes:
    """Left half opaque red (or grey 76, red's luma), right half fully transparent over a hidden green."""
    if mode == "P":
        image = Image.new("P", (8, 4), 0)
        image.putpalette([255, 0, 0, 0, 255, 0])
        image.paste(1, (4, 0, 8, 4))
        return file(image, transparency=1)
    if mode == "RGB":
        image = Image.new("RGB", (8, 4), (255, 0, 0))
        image.paste((0, 255, 0), (4, 0, 8, 4))
        return file(image, transparency=(0, 255, 0))
    if mode == "I;16":
        values = np.full((4, 8), 76 * 257, np.uint16)
        values[:, 4:] = 40000
        return png(
            values.astype(">u2").tobytes(), 8, 4, depth=16, color=0, chunks=[(b"tRNS", struct.pack(">H", 40000))]
        )
    if mode == "RGB;16":
        values = np.zeros((4, 8, 3), np.uint16)
        values[:, :4, 0], values[:, 4:, 1] = 65535, 40000
        key = struct.pack(">HHH", 0, 40000, 0)
        return png(values.astype(">u2").tobytes(), 8, 4, depth=16, color=2, chunks=[(b"tRNS", key)])
    image = Image.new(mode, (8, 4), (255, 0, 0, 255) if mode == "RGBA" else (76, 255))
    image.paste((0, 255, 0, 0) if mode == "RGBA" else (200, 0), (4, 0, 8, 4))
    return file(image)


def png(rows: bytes, w: int, h: int, *, depth: int, color: int, chunks=()) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    stride = len(rows) // h
    filtered = b"".join(b"\0" + rows[y * stride : (y + 1) * stride] for y in range(h))
    header = struct.pack(">IIBBBBB", w, h, depth, color, 0, 0, 0)
    body = [chunk(b"IHDR", header), *(chunk(*c) for c in chunks), chunk(b"IDAT", zlib.compress(filtered))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(body) + chunk(b"IEND", b"")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB", "I;16", "RGB;16"])
def test_transparency_shows_the_background_and_never_the_hidden_color(mode):
    array = preprocess_image(transparent(mode), size=(4, 8), background=(0, 0, 255)).array
    np.testing.assert_array_equal(array[:, 4:], np.broadcast_to([0, 0, 255], (4, 4, 3)))
    np.testing.assert_array_equal(
        array[:, :4], np.broadcast_to([255, 0, 0] if mode in ("RGBA", "P", "RGB", "RGB;16") else [76] * 3, (4, 4, 3))
    )


def test_hidden_colors_do_not_bleed_when_reduced():
    array = np.zeros((64, 64, 4), np.uint8)
    array[:, ::2] = 255  # white stripes between stripes of hidden black
    assert preprocess_image(file(Image.fromarray(array)), size=(8, 8)).array.min() == 255


def test_16_bits_are_scaled_not_clipped():
    values = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    for data in (file(Image.fromarray(values)), file(Image.fromarray(values), "TIFF")):
        image = preprocess_image(data, size=(64, 64), channels=1)
        np.testing.assert_array_equal(image.array[..., 0], np.round(values / 257).astype(np.uint8))
    color = np.stack([values, values[::-1], values.T], -1)
    data = png(color.astype(">u2").tobytes(), 64, 64, depth=16, color=2)
    assert np.abs(preprocess_image(data, size=(64, 64)).array - color / 257).max() <= 1


def test_depths_without_a_known_white_are_refused():
    assert reason(file(Image.fromarray(np.ones((9, 9), np.float32)), "TIFF")) == "unsupported_depth"
    assert reason(file(Image.fromarray(np.full((9, 9), 1 << 20, np.int32)), "TIFF")) == "unsupported_depth"


def test_cmyk_is_ink_on_white():
    for data in (file(Image.new("CMYK", (8, 8), (0, 0, 0, 0)), "TIFF"), file(Image.new("CMYK", (8, 8)), "JPEG")):
        assert preprocess_image(data, size=(8, 8)).array.min() >= 254
    cyan = preprocess_image(file(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "TIFF"), size=(8, 8)).array
    assert cyan[..., 0].max() == 0 and cyan[..., 1:].min() == 255


def test_grey_and_color_convert_into_each_other():
    grey = noise(8, 8, 1)
    colored = preprocess_image(file(Image.fromarray(grey)), size=(8, 8)).array
    np.testing.assert_array_equal(colored, np.repeat(grey[..., None], 3, -1))
    color = noise(8, 8)
    luma = color @ [0.299, 0.587, 0.114]  # ITU-R BT.601
    assert (
        np.abs(preprocess_image(file(Image.fromarray(color)), size=(8, 8), channels=1).array[..., 0] - luma).max() <= 1
    )


def without_adobe_marker(jpeg: bytes) -> bytes:
    at = jpeg.index(b"\xff\xee\x00\x0eAdobe")
    return jpeg[:at] + jpeg[at + 16 :]


def ycck(jpeg: bytes) -> bytes:
    """The same file, whose first three channels are now to be read as Y, Cb and Cr."""
    at = jpeg.index(b"\xff\xee\x00\x0eAdobe") + 15
    return jpeg[:at] + b"\x02" + jpeg[at + 1 :]


def test_cmyk_jpegs_are_inverted_only_where_adobe_made_them():
    adobe = file(Image.new("CMYK", (16, 16), (200, 20, 0, 0)), "JPEG", quality=98)
    color = preprocess_image(adobe, size=(16, 16)).array[0, 0].astype(int)
    assert np.abs(color - [55, 235, 255]).max() <= 3
    plain = preprocess_image(without_adobe_marker(adobe), size=(16, 16)).array
    assert plain.max() <= 3  # stored as 55, 235, 255, 255: with so much black it is black


def tiff(rows: bytes, w: int, h: int, *, bits: int, photometric: int = 1, tile: tuple[int, int] | None = None) -> bytes:
    tags = {256: w, 257: h, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: h, 279: len(rows)}
    if tile:
        tags = {**tags, 322: tile[0], 323: tile[1], 324: 8, 325: len(rows)}
    entries = b"".join(struct.pack("<HHII", number, 4, 1, value) for number, value in sorted(tags.items()))
    return b"II*\0" + struct.pack("<I", 8 + len(rows)) + rows + struct.pack("<H", len(tags)) + entries + bytes(4)


def test_12_bits_and_white_at_zero_are_scaled_too():
    assert preprocess_image(tiff(b"\xff\xf8\x00" * 32, 8, 8, bits=12), size=(8, 8)).array[0, :2, 0].tolist() == [
        255,
        128,
    ]
    values = np.linspace(0, 65535, 64).astype("<u2")
    inverse = preprocess_image(tiff(values.tobytes(), 8, 8, bits=16, photometric=0), size=(8, 8)).array
    np.testing.assert_array_equal(inverse[..., 0].reshape(-1), 255 - np.round(values / 257).astype(np.uint8))


def vips_profile(name: str) -> bytes:
    bands, meaning = (4, "cmyk") if name == "cmyk" else (3, "srgb")
    image = pyvips.Image.black(1, 1, bands=bands).copy(interpretation=meaning)
    return image.icc_import(input_profile=name).icc_export(output_profile=name).get("icc-profile-data")


def corpus() -> dict[str, bytes]:
    """Each mode, depth and way to store color that is at hand, as a file of its own."""
    image = photo(90, 120)
    alpha = Image.fromarray(np.tile(np.linspace(0, 255, 120).astype(np.uint8), (90, 1)))
    see_through = image.copy()
    see_through.putalpha(alpha)
    palette = image.quantize(64)
    deep = (np.asarray(see_through).astype(np.uint32) * 257 % 65536).astype(">u2")
    grey = image.convert("L")
    exif = Image.Exif()
    exif[0x0112] = 6
    cmyk = file(image.convert("CMYK"), "JPEG", quality=95, icc_profile=vips_profile("cmyk"))
    return {
        "1": file(image.convert("1")),
        "L": file(grey),
        "LA": file(see_through.convert("LA")),
        "P": file(palette),
        "P key": file(palette, transparency=3),
        "P table": file(palette, transparency=bytes(range(0, 256, 4))),
        "L key": file(grey, transparency=200),
        "RGBA": file(see_through),
        "grey 4 bits, key": png(bytes(range(64)) * 8, 32, 32, depth=4, color=0, chunks=[(b"tRNS", b"\0\x05")]),
        "grey 2 bits, key": png(bytes(range(128)) * 2, 32, 32, depth=2, color=0, chunks=[(b"tRNS", b"\0\2")]),
        "grey 1 bit, key": png(bytes(range(128)), 32, 32, depth=1, color=0, chunks=[(b"tRNS", b"\0\0")]),
        "grey 16 bits": png(deep[..., 0].tobytes(), 120, 90, depth=16, color=0),
        "grey, alpha 16 bits": png(deep[..., 2:].tobytes(), 120, 90, depth=16, color=4),
        "RGB 16 bits": png(deep[..., :3].tobytes(), 120, 90, depth=16, color=2),
        "RGBA 16 bits": png(deep.tobytes(), 120, 90, depth=16, color=6),
        "rotated JPEG": file(image, "JPEG", quality=95, exif=exif),
        "progressive JPEG": file(image, "JPEG", quality=80, progressive=True),
        "grey JPEG": file(grey, "JPEG"),
        "CMYK JPEG": cmyk,
        "YCCK JPEG": ycck(cmyk),
        "CMYK TIFF": file(image.convert("CMYK"), "TIFF", icc_profile=vips_profile("cmyk")),
        "Display P3": file(image, icc_profile=vips_profile("p3")),
        "Display P3, palette and alpha": file(palette, transparency=3, icc_profile=vips_profile("p3")),
        "Display P3 JPEG": file(image, "JPEG", quality=95, icc_profile=vips_profile("p3")),
        "sRGB": file(image, icc_profile=vips_profile("srgb")),
        "a profile for other colors": file(grey, icc_profile=vips_profile("p3")),
        "a damaged profile": file(image, icc_profile=vips_profile("p3")[:300]),
        "GIF": file(image, "GIF"),
        "WebP": file(see_through, "WEBP", lossless=True),
        "TIFF, LZW": file(image, "TIFF", compression="tiff_lzw"),
    }


def test_colors_are_those_that_an_independent_decoder_sees():
    for name, data in corpus().items():
        ours, theirs = at_full_size(data).array, by_libvips(data)
        assert ours.shape == theirs.shape, name
        difference = np.abs(ours.astype(int) - theirs)
        assert difference.max() <= 3 and difference.mean() <= 1, (name, difference.max(), difference.mean())


def test_an_srgb_profile_changes_no_pixel_and_a_damaged_one_is_ignored():
    stored = noise(9, 9)
    for profile in (vips_profile("srgb"), vips_profile("p3")[:200], b"no profile"):
        image = preprocess_image(file(Image.fromarray(stored), icc_profile=profile), size=(9, 9))
        np.testing.assert_array_equal(image.array, stored)
        assert image.meta["transforms"] == []
    wide = preprocess_image(file(Image.fromarray(stored), icc_profile=vips_profile("p3")), size=(9, 9))
    assert wide.meta["transforms"] == ["icc_to_srgb"]
    assert np.abs(wide.array.astype(int) - stored).max() > 20


def test_palettes_are_mixed_as_colors_not_as_indices():
    image = Image.new("P", (64, 64))
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])  # red, green, blue
    image.putdata([0, 2] * (32 * 64))
    array = preprocess_image(file(image), size=(8, 8)).array
    assert array[..., 1].max() <= 3  # the mean of indices 0 and 2 would be green
    assert np.abs(array[..., [0, 2]].astype(int) - 127).max() <= 4


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_animations_give_their_first_frame(format):
    options = {"lossless": True} if format == "WEBP" else {}
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    data = file(frames[0], format, save_all=True, append_images=frames[1:], **options)
    image = preprocess_image(data, size=(8, 8))
    assert image.array[0, 0].tolist() == [255, 0, 0]
    assert "first_frame" in image.meta["transforms"]


def test_what_the_first_frame_of_a_gif_leaves_open_is_transparent():
    data = bytearray(file(Image.new("RGB", (4, 4), (255, 0, 0)), "GIF"))
    data[6:10] = struct.pack("<HH", 8, 4)  # the canvas; the frame stays 4x4
    array = preprocess_image(bytes(data), size=(4, 8), background=(0, 0, 255)).array
    assert array[0, 0].tolist() == [255, 0, 0]
    np.testing.assert_array_equal(array[:, 4:], np.broadcast_to([0, 0, 255], (4, 4, 3)))


def test_a_damaged_second_frame_does_not_cost_the_first():
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    data = file(frames[0], "GIF", save_all=True, append_images=frames[1:])
    second = data.index(b",", data.index(b",") + 1)
    assert preprocess_image(data[: second + 5], size=(8, 8)).array[0, 0].tolist() == [255, 0, 0]


def test_a_lossless_jpeg_is_decoded_at_full_scale():
    head = b"\xff\xd8\xff\xc3\0\x0b\x08" + struct.pack(">HH", 64, 64) + b"\1\1\x11\0"
    table = b"\xff\xc4\0\x14\0\1" + bytes(15) + b"\0"  # one code, of one bit: no difference
    scan = b"\xff\xda\0\x08\1\1\0\1\0\0"  # predicted by the pixel to the left; the first one by 128
    image = preprocess_image(head + table + scan + bytes(64 * 64 // 8) + b"\xff\xd9", size=(8, 8))
    assert (image.array == 128).all()
    assert "decoded_reduced" not in image.meta["transforms"]


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "BMP"])
def test_files_that_end_early_are_truncated(format):
    data = file(Image.fromarray(noise(64, 64)), format)
    assert reason(data[: len(data) // 2]) == "truncated"


def test_what_is_not_an_image_has_a_reason(monkeypatch):
    assert reason(b"") == "empty"
    assert reason(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n") == "not_an_image"
    assert reason(b"not an image" * 100) == "not_an_image"
    assert reason(b"\x89PNG\r\n\x1a\n" + b"not an image" * 100) == "damaged"
    assert reason(file(Image.new("RGB", (8, 20))), min_size=9) == "too_small"
    monkeypatch.setattr(preprocess, "MAX_BYTES", 100)
    assert reason(bytes(101)) == "too_many_bytes"


def test_bombs_are_refused_by_their_header():
    started = time.monotonic()
    for side in (8001, 40_000):  # Pillow itself refuses the second, and only warns of the first
        assert reason(bomb(side)) == "too_many_pixels"
    assert time.monotonic() - started < 0.5


def test_large_tiles_and_many_scans_are_refused_by_their_header(monkeypatch):
    assert reason(tiff(bytes(64), 8, 8, bits=8, tile=(30_000, 30_000))) == "too_many_pixels"
    progressive = file(photo(120, 120), "JPEG", progressive=True)
    monkeypatch.setattr(preprocess, "_MAX_SCANNED", 5 * 120 * 120)  # ten scans are usual
    assert reason(progressive) == "too_many_pixels"
    preprocess_image(file(photo(120, 120), "JPEG"), size=(8, 8))


def bomb(side: int) -> bytes:
    head = png(b"\0\0\0", 1, 1, depth=8, color=2)
    header = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return head[:12] + header + struct.pack(">I", zlib.crc32(header)) + head[33:]


@pytest.mark.parametrize("h, w", [(901, 1203), (1203, 901)])
@pytest.mark.parametrize("size", [(64, 64), (48, 96)])
def test_a_reduced_jpeg_decode_is_not_visible(h, w, size):
    data = file(photo(h, w), "JPEG", quality=92)
    fast = preprocess_image(data, size=size)
    assert "decoded_reduced" in fast.meta["transforms"]
    assert fast.meta["original_size"] == [h, w]
    full = Image.open(io.BytesIO(data))
    full = full.resize(size[::-1], Image.Resampling.LANCZOS, box=fast.meta["box"])
    error = np.mean((fast.array.astype(float) - np.asarray(full)) ** 2)
    assert 10 * np.log10(255**2 / error) >= 45
    slow = preprocess_image(file(Image.open(io.BytesIO(data))), size=size)
    assert slow.meta["box"] == fast.meta["box"]


@pytest.mark.parametrize(
    "format", ["JPEG", "PNG", "WEBP", "BMP", "JPEG2000", *(["AVIF"] if "AVIF" in Image.SAVE else [])]
)  # Pillow 11.0 to 11.2 have no AVIF
def test_no_cut_goes_unnoticed(format):
    data = file(photo(90, 120), format)
    for end in range(0, len(data) - 64, max(1, len(data) // 100)):
        assert reason(data[:end]) in ("empty", "not_an_image", "truncated", "damaged")


def test_any_bytes_end_as_an_image_or_a_reason():
    rng = random.Random(0)
    image = Image.fromarray(noise(24, 24))
    formats = ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "TGA", "PCX", "PPM", "ICO", "DDS", "SGI", "JPEG2000", "QOI"]
    formats += ["AVIF"]
    sound = [file(image, format) for format in formats if format in Image.SAVE]
    for trial in range(600):
        data = bytearray(sound[trial % len(sound)])
        for _ in range(rng.choice([1, 3, 20])):
            data[rng.randrange(min(len(data), rng.choice([40, 4000])))] = rng.randrange(256)
        try:
            got = preprocess_image(bytes(data[: rng.choice([len(data), rng.randrange(len(data))])]), size=(8, 8))
        except Rejected as rejected:
            assert rejected.reason in REASONS
        else:
            assert got.array.shape == (8, 8, 3)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("format", ["png", "webp", "jpeg"])
def test_encoded_images_come_back(format, channels):
    smooth = np.asarray(photo(60, 120).resize((24, 12)))[..., :channels]
    data = encode(smooth, format)
    assert data == encode(smooth.copy(), format)
    back = decode(data, channels)
    assert back.shape == smooth.shape and back.dtype == np.uint8
    if format == "jpeg":
        assert np.abs(back.astype(int) - smooth).mean() < 4
    else:
        np.testing.assert_array_equal(back, smooth)


@pytest.mark.parametrize("h, w", [(1, 1), (1, 300), (300, 1), (129, 64), (64, 33)])
@pytest.mark.parametrize("channels", [1, 3])
def test_png_files_are_read_by_everyone(h, w, channels):
    for array in (noise(h, w, channels).reshape(h, w, channels), np.full((h, w, channels), 255, np.uint8)):
        data = encode(array, "png")
        with Image.open(io.BytesIO(data)) as image:
            image.verify()  # the checksums, too
        theirs = pyvips.Image.new_from_buffer(data, "", fail_on="warning").numpy()
        np.testing.assert_array_equal(theirs.reshape(array.shape), array)
        np.testing.assert_array_equal(decode(data, channels), array)


def test_png_files_are_not_larger_than_others_make_them():
    array = np.asarray(photo(600, 900).resize((96, 64), Image.Resampling.LANCZOS))
    assert len(encode(array, "png")) <= 1.02 * len(file(Image.fromarray(array), optimize=True))


def test_damaged_shard_images_are_rejected_not_raised():
    with pytest.raises(Rejected):
        decode(encode(noise(8, 8), "png")[:60], 3)


@pytest.mark.parametrize("shape", [(1, 1, 3), (17, 5, 1), (64, 96, 3), (130, 33, 3)])
def test_our_own_files_are_read_past_the_parser_and_give_the_same_pixels(shape):
    array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    data = png_files.encode(array)
    np.testing.assert_array_equal(png_files.decode(data), array)
    np.testing.assert_array_equal(decode(data, shape[2]), array)
    other = 4 - shape[2]
    assert decode(data, other).shape == (*shape[:2], other)


def test_files_laid_out_otherwise_are_left_to_pillow():
    rgb = Image.fromarray(noise(20, 30))
    others = [file(rgb.convert(mode)) for mode in ("P", "RGBA", "LA", "1", "I;16")]
    others += [file(rgb, dpi=(72, 72)), file(rgb, "JPEG"), file(rgb, "WEBP"), b"", b"\x89PNG\r\n\x1a\n", b"text"]
    assert [png_files.decode(data) for data in others] == [None] * len(others)
    np.testing.assert_array_equal(decode(others[5], 3), noise(20, 30))


def test_our_own_files_cut_or_damaged_are_refused():
    data = png_files.encode(noise(40, 40))
    for length in range(len(data) - 21):  # two checksums and the end mark hold no pixels
        with pytest.raises(Rejected):
            decode(data[:length], 3)
    middle = len(data) // 2
    with pytest.raises(Rejected):
        decode(data[:middle] + bytes(20) + data[middle + 20 :], 3)
