"""A webdataset of others on a web server or an object store is indexed, trained on and verified where it lies."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pipeline.data.loading.batches import read_all
from pipeline.data.shards.shard_set import ShardSet
from pipeline.data.shards.verify import verify
from pipeline.errors import DataError
from pipeline.storage import files as storage
from tests import warm
from tests.conftest import ROOT
from tests.data.shards.test_shard_set import write_set
from tests.jobs import index
from tests.launch import ENVIRONMENT, TINY, ddpm
from tests.remote.faults import Faults
from tests.remote.website import Website
from tests.test_index import files, theirs


@pytest.fixture(scope="module")
def wds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tars larger than a first request, so that a server has to give parts of them."""
    directory = tmp_path_factory.mktemp("web") / "wds"
    theirs(directory, tars=3, samples=50, mode="L")
    return directory


@pytest.fixture(scope="module")
def local(wds: Path) -> Path:
    index([str(wds)], str(wds.parent / "local"), channels=1, quiet=True)
    return wds.parent / "local"


@pytest.fixture
def site(wds: Path) -> Iterator[Website]:
    with Website(wds.parent) as site:
        yield site


def hashes(shards: object) -> dict[str, str]:
    """Of positions, labels and images that the loader gives, in a process of its own with two workers."""
    script = [sys.executable, "-m", "tests.remote.batches_hash", str(shards), "2"]
    done = warm.run(script, env=ENVIRONMENT, cwd=ROOT, timeout_s=300)
    assert done.returncode == 0, done.stderr
    result: dict[str, str] = json.loads(done.stdout)[0]
    return result


def same_metadata(one: Path, other: Path) -> bool:
    """The sidecars, which say where every sample is, and all of the index but where the tars are."""
    first, second = (json.loads((place / "index.json").read_text()) for place in (one, other))
    for value in (first, second):
        value["shards"] = [{**entry, "name": ""} for entry in value["shards"]]
        value["places"] = len(value["places"])
    sidecars = [{name: data for name, data in files(place).items() if name.endswith("npy")} for place in (one, other)]
    return first == second and sidecars[0] == sidecars[1]


@pytest.mark.parametrize("name", ["train-*.tar"])
def test_tars_on_a_web_server_are_trained_on_in_the_order_of_a_local_copy(
    site: Website, local: Path, tmp_path: Path, name: str
) -> None:
    out = tmp_path / "set"
    made = ddpm("index", f"{site.url}/wds/{name}", "--out", out, "--channels", 1, "--quiet")
    assert made.returncode == 0, made.stderr
    assert [record.name for record in ShardSet.open(str(out)).shards][2] == f"{site.url}/wds/train-000002.tar"
    assert same_metadata(out, local)
    assert hashes(out) == hashes(local)
    assert ddpm("verify", out).returncode == 0


def test_a_run_on_a_web_server_ends_in_the_weights_of_one_on_a_local_copy(
    site: Website, local: Path, tmp_path: Path
) -> None:
    index([f"{site.url}/wds/train-{{000000..000002}}.tar"], str(tmp_path / "set"), channels=1, quiet=True)
    for shards, run in ((tmp_path / "set", "far"), (local, "near")):
        settings = (f"data.shards={shards}", f"run.dir={tmp_path / run}", "train.steps=4", "model.num_classes=3")
        trained = ddpm("train", *TINY, *settings)
        assert trained.returncode == 0, trained.stderr
    far, near = (tmp_path / run / "checkpoints/step_00000004/model.safetensors" for run in ("far", "near"))
    assert far.read_bytes() == near.read_bytes()


def test_damage_on_a_web_server_is_found_and_named(wds: Path, tmp_path: Path) -> None:
    copies = tmp_path / "wds"
    copies.mkdir()
    for name, data in files(wds).items():
        (copies / name).write_bytes(data)
    with Website(tmp_path) as site:
        index([f"{site.url}/wds/train-{{000000..000002}}.tar"], str(tmp_path / "set"), channels=1, quiet=True)
        rows = ShardSet.open(str(tmp_path / "set")).sidecar(1)
        one, two = (copies / f"train-{i:06d}.tar" for i in (1, 2))
        sound, other = one.read_bytes(), two.read_bytes()
        damaged = bytearray(sound)
        damaged[int(rows[7]["offset"] + rows[7]["image_offset"])] ^= 1
        one.write_bytes(damaged)
        tar = f"{site.url}/wds/{one.name}"
        assert verify(str(tmp_path / "set")) == [
            f"{tar}: does not have the sha256 of the index",
            f"{tar}: sample n00/n00_57: its bytes do not have the crc32 of the sidecar",
        ]
        one.write_bytes(sound[: int(rows[30]["offset"])])
        (found,) = verify(str(tmp_path / "set"))
        assert found.startswith(f"{tar}: {rows[30]['offset']} bytes, ") and "50 samples, 30 are whole" in found
        one.write_bytes(other)
        assert verify(str(tmp_path / "set"))[0].startswith(f"{tar}: holds the bytes of {site.url}/wds/train-000002")
        one.unlink()
        assert verify(str(tmp_path / "set")) == [f"{tar}: missing"]
        with pytest.raises(DataError, match=r"train-000001.tar is missing"):
            ShardSet.open(str(tmp_path / "set")).open_tar(1, 0)


def test_a_web_server_without_parts_of_files_and_a_wrong_address_are_one_line(wds: Path, tmp_path: Path) -> None:
    with Website(wds.parent, gives_parts=False) as plain:
        refused = ddpm("index", f"{plain.url}/wds/train-000000.tar", "--out", tmp_path / "set", "--quiet")
        assert (refused.returncode, refused.stderr.count("\n")) == (3, 1)
        assert "train-000000.tar: the server gives whole files only, not parts" in refused.stderr
        missing = ddpm("index", f"{plain.url}/wds/nowhere.tar", "--out", tmp_path / "set", "--quiet")
        assert (missing.returncode, missing.stderr.count("\n")) == (2, 1)
        assert "nowhere.tar: no such tar" in missing.stderr


def upload(directory: Path, url: str) -> None:
    for path in directory.iterdir():
        storage.write_bytes(f"{url}/{path.name}", path.read_bytes())


def test_tars_on_an_object_store_that_fails_are_trained_on_in_the_order_of_a_local_copy(
    faulty: Faults, wds: Path, local: Path, tmp_path: Path
) -> None:
    upload(wds, "s3://pool/wds")
    made = ddpm("index", "s3://pool/wds/train-*.tar", "--out", tmp_path / "set", "--channels", 1, "--quiet")
    assert made.returncode == 0, made.stderr
    assert same_metadata(tmp_path / "set", local)
    assert hashes(tmp_path / "set") == hashes(local)


def test_a_set_on_an_object_store_may_lie_beside_its_tars_or_among_them(store: Faults, wds: Path) -> None:
    def indexed(out: str) -> int:
        done = ddpm("index", "s3://pool/among", "--out", out, "--channels", 1, "--json", "--quiet")
        assert done.returncode == 0, done.stderr
        made: int = json.loads(done.stdout)["shards_made"]
        return made

    upload(wds, "s3://pool/among")
    for out in ("s3://pool/among", "s3://pool/beside"):
        assert [indexed(out), indexed(out)] == [3, 0]
        assert verify(out) == []
    assert ShardSet.open("s3://pool/among").shards[0].name == "train-000000.tar"
    storage.write_bytes("s3://pool/among/train-000001.tar", storage.read_bytes("s3://pool/among/train-000002.tar"))
    assert indexed("s3://pool/beside") == 1
    assert verify("s3://pool/among") == ["train-000001.tar: holds the bytes of train-000002.tar (swapped or renamed)"]
    images = read_all(ShardSet.open("s3://pool/beside")).images
    assert np.array_equal(images[50:100], images[100:])


@pytest.mark.parametrize("ending", ["tar", "json"])
def test_damage_on_an_object_store_is_found_and_named(store: Faults, tmp_path: Path, ending: str) -> None:
    write_set(tmp_path / "set")
    url = f"s3://pool/damaged-{ending}"
    upload(tmp_path / "set", url)
    assert verify(url) == []
    one, two = (f"set-{i:06d}.{ending}" for i in (1, 2))
    sound, other = storage.read_bytes(f"{url}/{one}"), storage.read_bytes(f"{url}/{two}")
    for damaged in (sound[:-2], sound[: len(sound) // 2], b"", sound[:99] + b"~" + sound[100:], other):
        storage.write_bytes(f"{url}/{one}", damaged)
        assert {finding.split(":")[0] for finding in verify(url)} == {one}
    storage.remove(f"{url}/{one}")
    assert any(finding.startswith(f"{one}: ") and "missing" in finding for finding in verify(url))
