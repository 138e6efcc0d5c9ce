"""Kinds of images that Pillow decodes wrongly, or differently in its versions."""

from __future__ import annotations

import io
import json
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from pipeline.data.images.preprocess import Rejected, preprocess_image
from tests.data.images.test_preprocess import png
from tests.jobs import shard

RED, BACKGROUND = (255, 0, 0), (0, 0, 255)
SHORT, LONG = "H", "I"
_KINDS = {SHORT: 3, LONG: 4}


Tags = dict[int, tuple[str, list[int]]]


def tiff(*images: tuple[Tags, list[bytes]], order: str = "<", inside: bool = False) -> bytes:
    """A TIFF file of images, each of its tags and its strips or planes; `inside`: the first holds the others."""
    body = bytearray((b"II*\0" if order == "<" else b"MM\0*") + bytes(4))
    pointer, children = 4, []
    for number, (given, planes) in enumerate(reversed(images) if inside else images):
        offsets = []
        for plane in planes:
            offsets.append(len(body))
            body += plane
        entries = {**given, 273: (LONG, offsets), 279: (LONG, [len(plane) for plane in planes])}
        is_child = inside and number < len(images) - 1
        if children and not is_child:
            entries[330] = (LONG, children)
        stored = b""
        for tag, (kind, values) in sorted(entries.items()):
            text = struct.pack(order + kind * len(values), *values)
            if len(text) > 4:
                place = len(body)
                body += text
                text = struct.pack(order + "I", place)
            stored += struct.pack(order + "HHI", tag, _KINDS[kind], len(values)) + text.ljust(4, b"\0")
        at = len(body)
        body += struct.pack(order + "H", len(entries)) + stored + bytes(4)
        if is_child:
            children.append(at)
        else:
            struct.pack_into(order + "I", body, pointer, at)
            pointer = len(body) - 4
    return bytes(body)


def tags(w: int = 8, h: int = 8, bits: tuple[int, ...] = (8,), photometric: int = 1, **more: list[int]) -> dict:
    numbers = {"extra": 338, "format": 339, "planar": 284, "subsampling": 530, "inks": 332, "colours": 320, "kind": 254,
               "old_kind": 255, "turn": 274}  # fmt: skip
    return {
        **{
            256: (LONG, [w]),
            257: (LONG, [h]),
            258: (SHORT, list(bits)),
            259: (SHORT, [1]),
            262: (SHORT, [photometric]),
        },
        **{277: (SHORT, [len(bits)]), 278: (LONG, [h])},
        **{numbers[name]: (LONG if name == "kind" else SHORT, values) for name, values in more.items()},
    }


def one(pixel: bytes, count: int = 64, **more) -> bytes:
    return tiff((tags(**more), [pixel * count]))


def pixels(data: bytes, **options) -> np.ndarray:
    return preprocess_image(data, size=None, background=BACKGROUND, **options).array.astype(int)


def assert_all(data: bytes, color: tuple[int, ...], within: int = 1) -> None:
    array = pixels(data)
    assert np.abs(array - color).max() <= within, array[0, 0]


def reason(data: bytes) -> tuple[str, str]:
    with pytest.raises(Rejected) as caught:
        pixels(data)
    return caught.value.reason, caught.value.detail


@pytest.mark.parametrize(
    ("depth", "row", "key", "shown"),
    [
        (1, b"\x0f", 1, 0),  # black, then white
        (1, b"\x0f", 0, None),
        (2, b"\x55\xaa", 2, 85),
        (4, b"\x33\x33\xcc\xcc", 0xC, 51),
        (8, b"\x64" * 4 + b"\xc8" * 4, 200, 100),
        (16, b"\x64\x64" * 4 + b"\x64\x63" * 4, 0x6463, 100),  # equal but for the last bit
    ],
)
def test_transparent_grey_of_a_png(depth, row, key, shown):
    array = pixels(png(row * 8, 8, 8, depth=depth, color=0, chunks=[(b"tRNS", struct.pack(">H", key))]))
    if shown is None:
        assert (array[:, :4] == BACKGROUND).all() and (array[:, 4:] == 255).all()
    else:
        assert np.abs(array[:, :4] - shown).max() == 0 and (array[:, 4:] == BACKGROUND).all()


def test_a_transparent_color_of_16_bits_is_compared_in_all_of_them():
    shown, hidden = (0x1234, 0x5678, 0x9ABC), (0x1234, 0x5678, 0x9ABD)
    row = struct.pack(">3H", *shown) * 4 + struct.pack(">3H", *hidden) * 4
    data = png(row * 8, 8, 8, depth=16, color=2, chunks=[(b"tRNS", struct.pack(">3H", *hidden))])
    array = pixels(data)
    assert np.abs(array[:, :4] - (0x12, 0x56, 0x9A)).max() <= 1
    assert (array[:, 4:] == BACKGROUND).all()


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_transparent_entries_of_a_palette(depth):
    palette = b"".join(bytes(color) for color in ((255, 0, 0), (0, 255, 0)))
    row = np.packbits([[int(bit) for bit in f"{int(x >= 4):0{depth}b}"] for x in range(8)]).tobytes()
    for opacities, expected in ((b"\xff\0", BACKGROUND), (b"\xff\x80", (0, 128, 127))):
        chunks = [(b"PLTE", palette), (b"tRNS", opacities)]
        array = pixels(png(row * 8, 8, 8, depth=depth, color=3, chunks=chunks))
        assert (array[:, :4] == RED).all() and np.abs(array[:, 4:] - expected).max() <= 1


LONG_TEXT = zlib.compress(b"x" * (2 << 20))


@pytest.mark.parametrize(
    "chunk",
    [
        (b"zTXt", b"Comment\0\0" + LONG_TEXT),
        (b"iTXt", b"workflow\0\1\0\0\0" + LONG_TEXT),
        (b"tEXt", b"prompt\0" + b"x" * (2 << 20)),
        (b"iCCP", b"profile\0\0" + LONG_TEXT),
        (b"zTXt", b"Comment\0\0" + zlib.compress(bytes(20 << 20))),
        (b"zTXt", b"Comment\0\7" + b"no method"),
        (b"tEXt", b"transparency\0yes"),  # Pillow keeps texts among the properties of the image
        (b"tEXt", b"bbox\0yes"),
        (b"tEXt", b"icc_profile\0yes"),
    ],
    ids=lambda chunk: chunk[0].decode() + chunk[1][:12].partition(b"\0")[0].decode(),
)
@pytest.mark.parametrize("is_behind", [False, True])
def test_texts_of_a_png_do_not_matter(chunk, is_behind):
    data = png(bytes(RED) * 64, 8, 8, depth=8, color=2, chunks=[] if is_behind or chunk[0] == b"iCCP" else [chunk])
    if chunk[0] == b"iCCP" or is_behind:
        at = data.index(b"IDAT") - 4 if chunk[0] == b"iCCP" else len(data) - 12
        checked = chunk[0] + chunk[1]
        data = (
            data[:at] + struct.pack(">I", len(chunk[1])) + checked + struct.pack(">I", zlib.crc32(checked)) + data[at:]
        )
    assert_all(data, RED, 0)


@pytest.mark.parametrize("compressed", [False, True])
def test_texts_that_say_which_side_is_up_are_read(compressed):
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    text = b"XML:com.adobe.xmp\0" + (b"\1\0\0\0" + zlib.compress(xmp) if compressed else b"\0\0\0\0" + xmp)
    data = png(bytes(16 * 8 * 3), 16, 8, depth=8, color=2, chunks=[(b"tEXt", b"a\0b"), (b"iTXt", text)])
    assert pixels(data).shape == (16, 8, 3)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["TIFF", "JPEG", "PNG", "WEBP"])
def test_an_image_without_a_size_asked_for_keeps_its_own_once_it_is_upright(format, orientation):
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x112] = orientation
    Image.new("RGB", (32, 16)).save(file, format, exif=exif)
    assert pixels(file.getvalue()).shape == ((32, 16, 3) if orientation >= 5 else (16, 32, 3))


def tga(kind, depth, bits, pixel, *, attributes=None, colors=b"", first=0, color_bits=0, count=64):
    entries = len(colors) * 8 // ((color_bits + 1) // 8 * 8) if colors else 0
    head = struct.pack("<BBBHHBHHHHBB", 0, bool(colors), kind, first, entries, color_bits, 0, 0, 8, 8, depth, 32 | bits)
    data = head + colors + pixel * count
    if attributes is not None:
        footer = struct.pack("<II", len(data), 0) + b"TRUEVISION-XFILE.\0"
        data += struct.pack("<H", 495) + bytes(492) + bytes([attributes]) + footer
    return data


BGR, COLOR = bytes((60, 30, 200)), (200, 30, 60)
HALF = (100, 15, 157)  # COLOUR of opacity 128 over the background
FIVE_BITS = 31 << 10 | 1  # red, and blue of 1 in 31


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (tga(2, 32, 0, BGR + b"\0"), COLOR),
        (tga(2, 32, 8, BGR + b"\xff"), COLOR),
        (tga(2, 32, 8, BGR + b"\x80"), HALF),
        (tga(2, 32, 8, BGR + b"\0", attributes=0), COLOR),
        (tga(2, 32, 8, BGR + b"\0", attributes=2), COLOR),
        (tga(2, 32, 0, BGR + b"\x80", attributes=3), HALF),
        (tga(2, 32, 8, bytes((30, 15, 100, 128)), attributes=4), HALF),
        (tga(10, 32, 0, b"\x87" + BGR + b"\0", count=8), COLOR),  # 8 times by run length
        (tga(2, 24, 0, BGR), COLOR),
        (tga(2, 16, 0, struct.pack("<H", FIVE_BITS)), (255, 0, 8)),
        (tga(2, 16, 0, struct.pack("<H", FIVE_BITS | 1 << 15)), (255, 0, 8)),
        (tga(2, 16, 1, struct.pack("<H", FIVE_BITS | 1 << 15)), (255, 0, 8)),
        (tga(3, 16, 0, b"\x64\0"), (100, 100, 100)),
        (tga(3, 16, 8, b"\x64\x80"), (50, 50, 177)),
        (tga(1, 8, 0, b"\5", colors=bytes(3) + BGR, color_bits=24, first=4), COLOR),
        (tga(1, 8, 0, b"\1", colors=bytes(4) + BGR + b"\0", color_bits=32), COLOR),
        (tga(1, 8, 8, b"\1", colors=bytes(4) + BGR + b"\x80", color_bits=32), HALF),
        (tga(1, 8, 0, b"\1", colors=struct.pack("<HH", 0, FIVE_BITS), color_bits=16), (255, 0, 8)),
    ],
)  # fmt: skip
def test_opacity_of_a_tga_is_where_it_says_so(data, expected):
    assert_all(data, expected)


def test_a_single_bit_of_opacity_in_a_tga():
    pixel = struct.pack("<HH", FIVE_BITS | 1 << 15, FIVE_BITS)
    array = pixels(tga(2, 16, 1, pixel, count=32))
    assert (array[:, 1::2] == BACKGROUND).all() and np.abs(array[:, ::2] - (255, 0, 8)).max() <= 1


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(
    ("pixel", "more", "expected"),
    [
        (bytes((50, 128)), {"bits": (8, 8), "extra": [1]}, (50, 50, 177)),
        (bytes((100, 128)), {"bits": (8, 8), "extra": [2]}, (50, 50, 177)),
        (bytes((100, 15, 30, 128)), {"bits": (8,) * 4, "photometric": 2, "extra": [1]}, HALF),
        (bytes((200, 30, 60, 128)), {"bits": (8,) * 4, "photometric": 2, "extra": [2]}, HALF),
        (bytes((200, 30, 60, 0)), {"bits": (8,) * 4, "photometric": 2, "extra": [0]}, COLOR),
        (b"\1", {"photometric": 3, "colours": [0, 200, *[0] * 255, 30, *[0] * 255, 60, *[0] * 254]}, COLOR),
        (b"\1", {"photometric": 3, "colours": [0, 51400, *[0] * 255, 7710, *[0] * 255, 15420, *[0] * 254]}, COLOR),
    ],
)
def test_opacity_and_palettes_of_a_tiff(order, pixel, more, expected):
    data = tiff((tags(**more), [pixel * 64]), order=order)
    assert_all(data, expected)


def test_associated_opacity_in_planes_and_in_16_bits():
    rgb = {"bits": (8,) * 4, "photometric": 2, "extra": [1], "planar": [2]}
    assert_all(tiff((tags(**rgb), [bytes([value]) * 64 for value in (100, 15, 30, 128)])), HALF)
    deep = struct.pack("<4H", 100 * 257, 15 * 257, 30 * 257, 128 * 257)
    assert_all(one(deep, bits=(16,) * 4, photometric=2, extra=[1]), HALF)
    planes = [struct.pack("<H", value * 257) * 64 for value in COLOR]
    assert_all(tiff((tags(bits=(16,) * 3, photometric=2, planar=[2]), planes)), COLOR)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (one(b"\xc8", format=[2]), ("unsupported_depth", "signed integers")),
        (one(struct.pack("<h", 20000), bits=(16,), format=[2]), ("unsupported_depth", "signed integers")),
        (one(b"\xc8" * 3, bits=(8,) * 3, photometric=2, format=[2] * 3), ("unsupported_depth", "signed integers")),
        (one(struct.pack("<e", 0.5), bits=(16,), format=[3]), ("unsupported_depth", "floating point")),
        (one(struct.pack("<d", 0.5), bits=(64,), format=[3]), ("unsupported_depth", "floating point")),
        (one(struct.pack("<ff", 0.5, 1), bits=(64,), format=[6]), ("unsupported_depth", "complex numbers")),
        (
            one(bytes(4), bits=(8,) * 4, photometric=5, inks=[2]),
            ("damaged", "inks other than cyan, magenta, yellow and black"),
        ),
        (
            tiff((tags(bits=(8, 8), extra=[2], planar=[2]), [bytes(64), bytes(64)])),
            ("damaged", "grey or a palette with more samples in separate planes"),
        ),
        (
            one(bytes((81,) * 4 + (90, 240)), 8, bits=(8,) * 3, photometric=6),
            ("truncated", "48 bytes of pixels instead of 96"),
        ),
    ],
)
def test_kinds_of_tiff_that_have_no_right_pixels_have_a_reason(data, expected):
    assert reason(data) == expected


@pytest.mark.parametrize(("across", "down"), [(1, 1), (2, 1), (2, 2), (4, 1), (None, None)])
def test_subsampled_color_of_an_uncompressed_tiff(across, down):
    # BT.601 in full range, as TIFF 6.0 has it by default: Y 81, Cb 90, Cr 240.
    expected = (81 + 1.402 * 112, 81 - 0.344 * (90 - 128) - 0.714 * 112, 81 + 1.772 * (90 - 128))
    block = (across or 2) * (down or 2)
    more = {} if across is None else {"subsampling": [across, down]}
    data = one(bytes([81] * block + [90, 240]), 64 // block, bits=(8,) * 3, photometric=6, **more)
    assert_all(data, expected, 2)


SMALL = (tags(4, 4, bits=(8,) * 3, photometric=2), [bytes(48)])
FULL = (tags(bits=(8,) * 3, photometric=2), [bytes(COLOR) * 64])


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("mark", [{"kind": [1]}, {"old_kind": [2]}, {"kind": [4]}, {"kind": [5]}])
def test_thumbnails_and_masks_that_come_first_are_passed_over(mark, inside):
    first = ({**SMALL[0], **{254 if "kind" in mark else 255: (LONG, next(iter(mark.values())))}}, SMALL[1])
    data = tiff(first, FULL, inside=inside)
    assert pixels(data).shape == (8, 8, 3)
    assert_all(data, COLOR, 0)


def test_the_first_image_is_taken_where_none_or_the_first_is_the_full_one():
    marked = ({**FULL[0], 254: (LONG, [1])}, FULL[1])
    assert_all(tiff(marked), COLOR, 0)
    assert_all(tiff(FULL, SMALL), COLOR, 0)
    page = ({**FULL[0], 254: (LONG, [2])}, FULL[1])
    assert_all(tiff(page, SMALL), COLOR, 0)


def test_directories_in_a_circle_end():
    marked = tiff(({**FULL[0], 254: (LONG, [1])}, FULL[1]))
    at = struct.unpack_from("<I", marked, 4)[0]
    assert_all(marked[:-4] + struct.pack("<I", at), COLOR, 0)


def test_what_shows_nothing_is_told_apart():
    def reading(image: Image.Image, **options: object) -> np.ndarray:
        file = io.BytesIO()
        image.save(file, "PNG")
        return preprocess_image(file.getvalue(), size=(8, 8), background=BACKGROUND, **options).array

    hidden = Image.new("RGBA", (8, 8), (*RED, 0))
    with pytest.raises(Rejected, match="nothing_visible"):
        reading(hidden)
    assert (reading(hidden, blank=True) == BACKGROUND).all()
    wide = Image.new("RGBA", (24, 8), (*RED, 0))
    wide.paste((*RED, 255), (0, 0, 8, 8))
    with pytest.raises(Rejected, match="nothing_visible"):
        reading(wide)  # its centre
    assert (reading(wide, crop_at=(0, 0)) == RED).all()
    wide.putpixel((12, 4), (*RED, 1))
    assert reading(wide).shape == (8, 8, 3)


def test_damaged_tiff_and_tga_end_with_a_reason():
    rng = np.random.default_rng(0)
    sound = [
        tiff(({**SMALL[0], 254: (LONG, [1])}, SMALL[1]), FULL, inside=True),
        one(bytes((81,) * 4 + (90, 240)), 16, bits=(8,) * 3, photometric=6),
        one(bytes((50, 128)), bits=(8, 8), extra=[1]),
        tga(1, 8, 8, b"\1", colors=bytes(4) + BGR + b"\x80", color_bits=32),
        tga(2, 32, 8, BGR + b"\x80", attributes=4),
        png(bytes(8 * 48), 8, 8, depth=16, color=2, chunks=[(b"tRNS", bytes(6)), (b"tEXt", b"a\0b")]),
    ]
    for trial in range(600):
        data = np.frombuffer(sound[trial % len(sound)], np.uint8).copy()
        places = rng.integers(0, len(data), rng.integers(1, 6))
        data[places] = rng.integers(0, 256, len(places))
        try:
            preprocess_image(data.tobytes()[: rng.integers(1, len(data) + 1)], size=(8, 8))
        except Rejected as rejected:
            assert rejected.reason


def test_a_set_lists_what_shows_nothing(tmp_path):
    for number, opacity in enumerate((0, 255)):
        (tmp_path / "in").mkdir(exist_ok=True)
        Image.new("RGBA", (8, 8), (*RED, opacity)).save(tmp_path / "in" / f"{number}.png")
    shard([str(tmp_path / "in")], str(tmp_path / "set"), size=(8, 8), workers=1, max_bad_fraction=1)
    line = json.loads((tmp_path / "set" / "rejected.jsonl").read_text())
    assert (line["key"], line["source"], line["reason"]) == ("000000000", "0.png", "nothing_visible")
