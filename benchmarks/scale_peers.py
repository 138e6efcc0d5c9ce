"""Called by `scale.py` with the Python of the peers: what MosaicML streaming and webdataset need for a set of S shards.

    PYTHON benchmarks/scale_peers.py streaming|webdataset SHARDS DIR

Prints one line of JSON. It imports nothing of this project. streaming imports torchvision for classes that are not used
here; where there is none, a stand-in takes its place.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import time
import types
from collections.abc import Callable, Iterable
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

BATCH, SAMPLES = 512, 1000


def memory_kib(name: str) -> int:
    """A line of /proc/self/status: VmRSS, the memory of this process, or VmHWM, the most it has had."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def measured(action: Callable[[], Any]) -> dict[str, float]:
    """Seconds of an action, and MiB that the process then needs at most above what it had."""
    before, started = memory_kib("VmRSS"), time.perf_counter()
    kept = action()
    seconds = time.perf_counter() - started
    result = {"seconds": seconds, "mib": (memory_kib("VmHWM") - before) / 1024}
    del kept
    return result


def torchvision_stand_in() -> None:
    """The names that streaming imports of torchvision."""
    if importlib.util.find_spec("torchvision"):
        return
    names = {"": "", "datasets": "VisionDataset", "transforms": "", "transforms.functional": "to_tensor"}
    for name, member in names.items():
        module = types.ModuleType(f"torchvision.{name}".rstrip("."))
        module.__spec__ = ModuleSpec(module.__name__, None)
        if member:
            setattr(module, member, type(member, (), {}))
        sys.modules[module.__name__] = module


def streaming_index(shards: int) -> Iterable[str]:
    """The text of an `index.json` of equal shards, as `MDSWriter` writes it."""
    entry = {
        "column_encodings": ["png", "int"], "column_names": ["image", "label"], "column_sizes": [None, 8],
        "compression": None, "format": "mds", "hashes": [], "samples": SAMPLES, "size_limit": 1 << 26, "version": 2,
        "zip_data": None,
    }  # fmt: skip
    yield '{"version": 2, "shards": ['
    for i in range(shards):
        raw = {"basename": f"shard.{i:05d}.mds", "bytes": 1000 * SAMPLES, "hashes": {}}
        yield ("," if i else "") + json.dumps(entry | {"raw_data": raw})
    yield "]}"


def streaming(shards: int, place: Path) -> dict[str, Any]:
    """Constructor of a dataset, and its order of the first epoch. A sample could be read after both."""
    torchvision_stand_in()
    from streaming import StreamingDataset, __version__  # noqa: PLC0415

    place.mkdir(parents=True, exist_ok=True)
    with (place / "index.json").open("w") as file:
        file.writelines(streaming_index(shards))
    made: list[Any] = []
    opened = measured(lambda: made.append(StreamingDataset(local=str(place), shuffle=True, batch_size=BATCH)))
    for kind in ("unique", "parallel"):  # as its __iter__ begins
        setattr(made[0], f"_{kind}_worker_world", getattr(made[0], f"_{kind}_rank_world").detect_workers())
    order = measured(lambda: made[0]._get_work(*made[0]._resume_incr_epoch()))
    return {"version": __version__, "open": opened, "order": order, "bytes": (place / "index.json").stat().st_size}


def webdataset(shards: int, place: Path) -> dict[str, Any]:
    """A loader and its iterator, and the first name of the shuffled list. No tar is opened.

    It knows no counts: it has neither epochs by sample nor a resume by sample, and its ranks get whole shards.
    """
    import webdataset as wds  # noqa: PLC0415

    pattern = f"{place}/set-{{000000..{shards - 1:06d}}}.tar"

    def made() -> Any:
        data = wds.WebDataset(pattern, shardshuffle=shards, nodesplitter=wds.split_by_node, empty_check=False)
        loader = wds.WebLoader(data.shuffle(1000).decode("pil"), batch_size=None, num_workers=0)
        return loader, iter(loader)

    def order() -> Any:
        return next(iter(wds.DataPipeline(wds.SimpleShardList(pattern), wds.detshuffle(shards))))

    return {"version": wds.__version__, "open": measured(made), "order": measured(order)}


if __name__ == "__main__":
    peer = {"streaming": streaming, "webdataset": webdataset}[sys.argv[1]]
    print(json.dumps(peer(int(sys.argv[2]), Path(sys.argv[3]))))
