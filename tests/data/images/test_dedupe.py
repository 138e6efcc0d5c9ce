"""Duplicates: equal pixels, or nearly equal images, and never two images that are only similar."""

from __future__ import annotations

import io
import random
from collections import Counter

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageEnhance
from sklearn.datasets import load_sample_images

from pipeline.data.images.dedupe import MAX_DISTANCE, KnownImages, fingerprint

Array = NDArray[np.uint8]


def photos() -> list[Array]:
    """Pieces of two photographs, less those that show hardly more than sky: of these a hash is mostly noise."""
    found = []
    for photo in load_sample_images().images:
        for top in range(0, 320, 80):
            for left in range(0, 540, 80):
                piece = Image.fromarray(photo[top : top + 100, left : left + 100])
                found.append(np.asarray(piece.resize((64, 64), Image.Resampling.LANCZOS)))
    return [piece for piece in found if piece.std(axis=(0, 1)).mean() >= 20]


def jpeg(array: Array, quality: int) -> Array:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer))


def shifted(array: Array) -> Array:
    """By a pixel of twice the size."""
    image = Image.fromarray(array).resize((128, 128), Image.Resampling.BICUBIC)
    return np.asarray(image.crop((1, 1, 128, 128)).resize((64, 64), Image.Resampling.LANCZOS))


def brighter(array: Array) -> Array:
    return np.asarray(ImageEnhance.Brightness(Image.fromarray(array)).enhance(1.04))


def seen_again(images: list[Array], others: list[Array], dedupe: str) -> list[bool]:
    seen = KnownImages(dedupe)
    for i, image in enumerate(images):
        seen.add(fingerprint(image, dedupe), f"{i:09d}")
    found = [seen.find(fingerprint(other, dedupe)) for other in others]
    assert all(key in (None, f"{i:09d}") for i, key in enumerate(found))
    return [key is not None for key in found]


def test_exact_means_the_very_pixels() -> None:
    images = photos()
    assert all(seen_again(images, [image.copy() for image in images], "exact"))
    changed = [image.copy() for image in images]
    for image in changed:
        image[3, 5, 1] ^= 1
    assert not any(seen_again(images, changed, "exact"))


@pytest.mark.parametrize(
    "change", [lambda x: x, lambda x: jpeg(x, 75), lambda x: jpeg(x, 40), shifted, brighter], ids=range(5)
)
def test_near_sees_through_what_copying_does_to_images(change) -> None:
    images = photos()
    assert all(seen_again(images, [change(image) for image in images], "near"))


def test_near_keeps_images_that_are_only_alike() -> None:
    images, seen = photos(), KnownImages("near")
    others = [x[:, ::-1] for x in images]
    for i, image in enumerate(images + others):
        assert seen.find(fingerprint(image, "near")) is None
        seen.add(fingerprint(image, "near"), f"{i:09d}")


def test_flat_images_of_other_colors_are_not_near() -> None:
    seen = KnownImages("near")
    for i, color in enumerate([(0, 0, 0), (255, 255, 255), (200, 0, 0), (0, 0, 200), (90, 90, 90)]):
        flat = np.full((16, 16, 3), color, np.uint8)
        assert seen.find(fingerprint(flat, "near")) is None
        seen.add(fingerprint(flat, "near"), f"{i:09d}")
    assert seen.find(fingerprint(np.full((16, 16, 3), 92, np.uint8), "near")) == "000000004"


def test_every_distance_up_to_the_limit_is_found_and_none_beyond() -> None:
    rng = random.Random(0)
    for distance in range(MAX_DISTANCE + 4):
        for _ in range(50):
            bits, seen = rng.getrandbits(64), KnownImages("near")
            seen.add(bits.to_bytes(8, "big") + bytes(12), "000000001")
            for bit in rng.sample(range(64), distance):
                bits ^= 1 << bit
            found = seen.find(bits.to_bytes(8, "big") + bytes(12))
            assert (found is not None) == (distance <= MAX_DISTANCE)


def test_the_first_of_several_is_named() -> None:
    seen = KnownImages("near")
    seen.add((0).to_bytes(8, "big") + bytes(12), "000000007")
    seen.add((0b111).to_bytes(8, "big") + bytes(12), "000000009")
    assert seen.find((0b11).to_bytes(8, "big") + bytes(12)) == "000000007"


@pytest.mark.parametrize("channels", [1, 3])
def test_what_is_found_is_what_a_comparison_with_all_images_finds(channels: int) -> None:
    """Hashes in clusters, so that there are images at every distance, of equal and of other colors."""
    rng, seen = random.Random(channels), KnownImages("near")
    centers, known, found = [rng.getrandbits(64) for _ in range(6)], dict[str, bytes](), Counter[str]()
    for i in range(1500):
        bits = rng.choice(centers)
        for bit in rng.sample(range(64), rng.randrange(8)):
            bits ^= 1 << bit
        hashed = bits.to_bytes(8, "big") + bytes(rng.choice((0, 0, 0, 12, 13)) for _ in range(4 * channels))
        expected = min((key for key, other in known.items() if is_near(hashed, other)), default=None)
        expected = next((key for key, other in reversed(known.items()) if other == hashed), expected)
        assert seen.find(hashed) == expected
        found["known" if expected else "new"] += 1
        if expected is None or i % 3 == 0:
            key = f"{(i * 7919) % 100_000:09d}"  # in no order
            seen.add(hashed, key)
            known[key] = hashed
    assert min(found.values()) > 300, found


def is_near(a: bytes, b: bytes) -> bool:
    bits = int.from_bytes(a[:8], "big") ^ int.from_bytes(b[:8], "big")
    return bits.bit_count() <= MAX_DISTANCE and all(abs(x - y) <= 12 for x, y in zip(a[8:], b[8:]))


@pytest.mark.parametrize("shape", [(8, 8, 1), (1, 1, 3), (200, 31, 3), (96, 64, 1)])
def test_any_size_has_a_fingerhashedof_the_same_length_per_kind(shape: tuple[int, int, int]) -> None:
    array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    assert fingerprint(array, "none") == b""
    assert len(fingerprint(array, "exact")) == 16
    assert len(fingerprint(array, "near")) == 8 + 4 * shape[2]


def test_the_perceptual_hash_is_the_same_everywhere() -> None:
    """A golden vector: integer arithmetic gives these bytes on every machine."""
    y, x = np.mgrid[:40, :48]
    array = np.stack([(3 * x + y) % 256, (x * y) % 256, (x - y) % 256], axis=-1).astype(np.uint8)
    assert fingerprint(array, "near").hex() == "005e3e78e2e6cccc2c526774751a4075e9887e46"
