from dataclasses import replace

import numpy as np
import pytest

from pipeline.errors import DataError
from pipeline.evaluation import reference
from pipeline.evaluation.moments import Moments
from pipeline.evaluation.reference import Identity
from pipeline.storage import files

IDENTITY = Identity("ab" * 32, "rgb, 0 to 255", "cd" * 32, "ef" * 32, channels=3, size=(48, 64))
MOMENTS = Moments.of(np.random.default_rng(0).normal(size=(9, 4)))


def test_statistics_come_back_bit_for_bit(tmp_path):
    reference.write(str(tmp_path), IDENTITY, MOMENTS)
    found = reference.read(str(tmp_path), IDENTITY)
    assert found.count == 9
    assert np.array_equal(found.mean, MOMENTS.mean) and np.array_equal(found.covariance, MOMENTS.covariance)
    assert found.covariance.dtype == np.float64
    assert reference.parse(reference.path(str(tmp_path), IDENTITY.features_sha256))[0] == IDENTITY


def test_equal_statistics_are_equal_bytes(tmp_path):
    contents = []
    for name in "abcdefgh":
        reference.write(str(tmp_path / name), IDENTITY, Moments.of(np.random.default_rng(0).normal(size=(9, 4))))
        (file,) = (tmp_path / name).iterdir()
        contents.append(file.read_bytes())
    assert set(contents) == {contents[0]}


def test_statistics_of_several_feature_files_lie_side_by_side(tmp_path):
    other = replace(IDENTITY, features_sha256="12" * 32)
    reference.write(str(tmp_path), IDENTITY, MOMENTS)
    with pytest.raises(FileNotFoundError):
        reference.read(str(tmp_path), other)
    reference.write(str(tmp_path), other, MOMENTS + MOMENTS)
    assert [reference.read(str(tmp_path), identity).count for identity in (IDENTITY, other)] == [9, 18]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "reference-121212121212.safetensors",
        "reference-abababababab.safetensors",
    ]


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"features_sha256": "ab" * 31 + "00"}, "another feature file"),
        ({"preprocessing": "rgb, 0 to 1"}, "brought to the network in another way"),
        ({"data_sha256": "00" * 32}, "other data"),
        ({"settings_sha256": "00" * 32}, "prepared with other settings"),
        ({"channels": 1}, "another number of channels (channels 3 there, 1 here)"),
        ({"size": (64, 48)}, "another size (size (48, 64) there, (64, 48) here)"),
    ],
)
def test_statistics_of_another_identity_are_refused_in_one_line(change, what, tmp_path):
    reference.write(str(tmp_path), IDENTITY, MOMENTS)
    with pytest.raises(DataError) as error:
        reference.read(str(tmp_path), replace(IDENTITY, **change))
    assert what in str(error.value) and "\n" not in str(error.value)


def test_no_damaged_byte_is_read_as_statistics(tmp_path):
    reference.write(str(tmp_path), IDENTITY, MOMENTS)
    url = reference.path(str(tmp_path), IDENTITY.features_sha256)
    whole = files.read_bytes(url)
    damaged = [whole[:i] + bytes([whole[i] ^ 1 << i % 8]) + whole[i + 1 :] for i in range(len(whole))]
    damaged += [whole[:i] for i in range(0, len(whole), 7)]
    for data in damaged:
        files.write_bytes(url, data, durable=False)
        with pytest.raises(DataError, match="run the `ddpm shard` command") as error:
            reference.read(str(tmp_path), IDENTITY)
        assert "\n" not in str(error.value)
