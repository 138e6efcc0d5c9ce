"""How do time, memory and requests grow with the number of shards, beside MosaicML streaming and webdataset?

    python benchmarks/scale.py [--quick] [--json FILE] [--plot FILE.svg] [--peers-python PYTHON]

Reading: sets of 10 to 1,000,000 shards of 1,000 images. They consist of the index; of the tars only those are there
that the first steps read. Global batch 512, 64 lanes, window 256, 8 ranks. Each figure is of a process of its own,
without the start of Python and the imports: seconds, and MiB above what the process had before. Writing: shards of one
8-px image on a local disk, each file flushed. Requests are counted at an S3 server on this machine, at two sizes; the
larger sizes of that table are the line through both. Ranks: 8 processes with 4 workers each after their first batch;
memory as PSS, in which a page that k processes share counts 1/k in each.

The peers need an environment of their own; without --peers-python their rows are missing:

    pip install torch 'numpy<2.2' 'transformers<5' pillow matplotlib catalogue brotli python-snappy zstd xxhash
    pip install webdataset==1.0.2 && pip install --no-deps mosaicml-streaming==0.13.0

They are given what they can do alike. streaming: its constructor, and its order of the first epoch. webdataset: a
loader with its iterator, and the first name of its shuffled list; it has no counts, and no resume by sample.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from math import log10
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import psutil
import scale_probe
import svg
from counting_store import CountingStore, store

Figures = dict[str, Any]
HERE = Path(__file__).parent
READ, QUICK_READ = (10, 1_000, 10_000, 100_000, 1_000_000), (10, 1_000, 10_000)
WRITTEN, QUICK_WRITTEN = (10, 100, 1_000, 10_000), (10,)
COUNTED, MODELLED = (10, 60), 1_000_000
STREAMING_MOST = 100_000
"""At a million shards of 1,000 samples its order alone would take 50 GB."""
READING = {
    "open": "ShardSet.open", "order": "first batch of Order", "batch 0": "first batch, 0 workers",
    "batch 4": "first batch, 4 workers", "show": "ddpm show",
}  # fmt: skip
WRITING = {
    "shard": "ddpm shard", "again": "again, nothing to do", "verify": "ddpm verify", "index": "ddpm index",
    "index again": "again, nothing to do", "sample_set": "sample set, without drawing",
}  # fmt: skip


def alone(action: str, *arguments: str) -> Figures:
    """The figures of an action of `scale_probe`, in a fork of this process, which has done nothing but imports."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(there, action, arguments))
    process.start()
    there.close()
    try:
        figures: Figures = here.recv()
    except EOFError:
        raise SystemExit(f"{action} {' '.join(arguments)} has failed, see above") from None
    process.join()
    return figures


def _answer(connection: Connection, action: str, arguments: tuple[str, ...]) -> None:
    connection.send(scale_probe.ACTIONS[action](*arguments))


def started(*words: str, python: str = sys.executable, script: str = "scale_probe.py") -> Figures:
    """The same in a new process."""
    ended = subprocess.run([python, str(HERE / script), *words], stdout=subprocess.PIPE, check=False)
    if ended.returncode:
        raise SystemExit(f"{script} {' '.join(words)} has failed, see above")
    figures: Figures = json.loads(ended.stdout.splitlines()[-1])
    return figures


def reading(directory: Path, sizes: tuple[int, ...]) -> Iterator[Figures]:
    """Make a set of each size; its figures."""
    for shards in sizes:
        place = str(directory / str(shards))
        alone("make", place, str(shards))
        yield {
            "shards": shards, "index_bytes": sum(file.stat().st_size for file in Path(place).glob("index*")),
            "open": alone("open", place), "order": alone("order", place), "batch 0": alone("batch", place, "0"),
            "batch 4": alone("batch", place, "4"), "pickled": alone("pickled", place)["bytes"],
            "show": alone("command", "show", place),
        }  # fmt: skip


def writing(directory: Path, sizes: tuple[int, ...]) -> Iterator[Figures]:
    """Write sets of each size; the figures of each command."""
    for shards in sizes:
        source, out = images(directory, shards), str(directory / f"written-{shards}")
        shard = ("shard", source, "--out", out, *shard_options())
        figures = {"shards": shards, "shard": alone("command", *shard), "again": alone("command", *shard)}
        figures["verify"] = alone("command", "verify", out, "--quiet")
        tars = directory / f"tars-{shards}"
        tars.mkdir()
        for tar in Path(out).glob("*.tar"):
            os.link(tar, tars / f"foreign{tar.name}")
        index = ("index", str(tars), "--out", f"{out}-index", "--channels", "1", "--workers", "1", "--quiet")
        figures |= {"index": alone("command", *index), "index again": alone("command", *index)}
        yield figures | {"sample_set": alone("sample_set", f"{out}-samples", str(shards))}


def images(directory: Path, count: int) -> str:
    """A file of so many images."""
    path = directory / f"{count}.npy"
    np.save(path, np.random.default_rng(0).integers(256, size=(count, 8, 8, 1), dtype=np.uint8))
    return str(path)


def shard_options() -> tuple[str, ...]:
    side = str(scale_probe.SIDE)
    return ("--size", side, "--channels", "1", "--shard-samples", "1", "--workers", "1", "--quiet")


def requests(directory: Path, counting: CountingStore) -> dict[str, dict[str, dict[str, float]]]:
    """Action → method → `fixed` requests, and those a shard (`each`)."""
    few, many = (_counted(directory, counting, shards) for shards in COUNTED)
    model: dict[str, dict[str, dict[str, float]]] = {}
    for action in few:
        for method in sorted({*few[action], *many[action]}):
            at = [counts[action].get(method, 0) for counts in (few, many)]
            each = (at[1] - at[0]) / (COUNTED[1] - COUNTED[0])
            model.setdefault(action, {})[method] = {"fixed": at[0] - each * COUNTED[0], "each": each}
    return model


def _counted(directory: Path, counting: CountingStore, shards: int) -> dict[str, dict[str, int]]:
    out = f"s3://pool/set-{shards}"
    shard = ("command", "shard", images(directory, shards), "--out", out, *shard_options())
    index = (
        "command",
        "index",
        f"s3://pool/tars-{shards}/*.tar",
        "--out",
        f"{out}-index",
        "--channels",
        "1",
        "--quiet",
    )
    tar, fs = next(Path(directory, f"tars-{COUNTED[0]}").iterdir()), fsspec.filesystem("s3")
    for i in range(shards):
        fs.put_file(str(tar), f"pool/tars-{shards}/foreign-{i:06d}.tar")
    counting.take()
    counts = {}
    for name, words in {
        "shard": shard, "again": shard, "open": ("open", out), "show": ("command", "show", out),
        "verify": ("command", "verify", out, "--quiet"), "index": index, "index again": index,
        "sample_set": ("sample_set", f"{out}-samples", str(shards)),
    }.items():  # fmt: skip
        started(*words)
        counts[name] = counting.methods()
    return counts


def ranks(place: Path) -> Figures:
    """Memory of 8 ranks with 4 workers each, started one after another; seconds until the slowest first batch."""
    with contextlib.ExitStack() as stack:
        processes, seconds = [], []
        for rank in range(scale_probe.RANKS):
            command = [sys.executable, str(HERE / "scale_probe.py"), "rank", str(place), str(rank), "4"]
            process = stack.enter_context(
                psutil.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
            )
            stack.callback(process.stdin.close)  # its sign to end
            processes.append(process)
            line = process.stdout.readline()
            if not line:
                raise SystemExit(f"rank {rank} of {place} has failed, see above")
            seconds.append(json.loads(line)["seconds"])
        families = [[process, *process.children(recursive=True)] for process in processes]
        mib = sum(proportional_kib(member.pid) for family in families for member in family) / 1024
        return {"mib": mib, "processes": sum(map(len, families)), "seconds": max(seconds)}


def proportional_kib(pid: int) -> int:
    """PSS of a process."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))


def peers(python: str | None, directory: Path, sizes: tuple[int, ...]) -> dict[str, list[Figures]]:
    """Peer → figures at each size."""
    if python is None:
        print("without --peers-python: MosaicML streaming and webdataset are left out")
        return {}
    found: dict[str, list[Figures]] = {}
    for peer, most in (("streaming", STREAMING_MOST), ("webdataset", sizes[-1])):
        for shards in (size for size in sizes if size <= most):
            place = str(directory / f"{peer}-{shards}")
            measured = started(peer, str(shards), place, python=python, script="scale_peers.py")
            found.setdefault(peer, []).append({"shards": shards} | measured)
    return found


def _cells(row: Figures, names: dict[str, str]) -> str:
    return " | ".join(f"{row[name]['seconds']:.3g} s, {row[name]['mib']:.0f}" for name in names)


def _table(rows: list[Figures], names: dict[str, str], more: dict[str, str]) -> list[str]:
    head = ["shards", *(f"{title}: s, MiB" for title in names.values()), *more.values()]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in rows:
        last = "".join(f" {row[name] / 1024:,.0f} |" for name in more)
        lines.append(f"| {row['shards']:,} | {_cells(row, names)} |{last}")
    return [*lines, ""]


def tables(result: Figures) -> Iterator[str]:
    """The tables of all figures, as Markdown."""
    yield f"{result['machine']}, {result['date']}"
    more = {"pickled": "pickled to a worker, KiB", "index_bytes": "index, KiB"}
    yield from ["", "Reading", *_table(result["reading"], READING, more)]
    for peer, rows in result["peers"].items():
        titles = {"open": "constructor", "order": "first order"}
        yield from [f"{peer} {rows[0]['version']}", *_table(rows, titles, {})]
    if result["ranks"]:
        yield from ["Ranks: 8, with 4 workers each", "| shards | PSS, MiB | processes | slowest first batch, s |"]
        yield "|---|---|---|---|"
        for row in result["ranks"]:
            yield f"| {row['shards']:,} | {row['mib']:,.0f} | {row['processes']} | {row['seconds']:.1f} |"
    yield from ["", "Writing, one image a shard", *_table(result["writing"], WRITING, {})]
    if result["requests"]:
        at = f"at {MODELLED:,} shards of these (modelled)"
        yield from ["Requests", f"| | method | fixed | a shard | {at} |", "|---|---|---|---|---|"]
    for action, methods in result["requests"].items():
        for method, line in methods.items():
            at_most = line["fixed"] + MODELLED * line["each"]
            yield f"| {action} | {method} | {line['fixed']:.0f} | {line['each']:.2f} | {at_most:,.0f} |"


def plot(result: Figures, before: Figures | None) -> str:
    """Seconds and MiB over the number of shards, both axes logarithmic."""
    curves: dict[str, tuple[list[Figures], tuple[str, ...]]] = {
        "ours, open": (result["reading"], ("open",)), "ours, first batch": (result["reading"], ("batch 0",)),
    }  # fmt: skip
    if before:
        curves["before, first batch"] = before["reading"], ("batch 0",)
    curves |= {f"{peer}, open and order": (rows, ("open", "order")) for peer, rows in result["peers"].items()}
    parts = []
    for panel, (unit, title) in enumerate((("seconds", "seconds"), ("mib", "MiB"))):
        lines = {
            name: [(row["shards"], max(sum(row[n][unit] for n in names), 1e-3)) for row in rows]
            for name, (rows, names) in curves.items()
        }
        parts += list(_panel(svg.LEFT + panel * (svg.WIDTH + 90), title, lines))
    for i, (name, color) in enumerate(zip(curves, svg.COLORS)):
        left = svg.LEFT + i * 205
        parts += [svg.line([(left, 20), (left + 22, 20)], color, 2), svg.text(left + 28, 24, name, "start")]
    return svg.document(svg.LEFT + 2 * svg.WIDTH + 130, svg.TOP + svg.HEIGHT + 50, parts)


def _panel(left: float, title: str, curves: dict[str, list[svg.Point]]) -> Iterator[str]:
    across = [x for points in curves.values() for x, _ in points]
    values = [y for points in curves.values() for _, y in points]
    ends = np.log10([min(across), max(across)]), [np.floor(log10(min(values))), np.ceil(log10(max(values)))]

    def at(x: float, y: float) -> svg.Point:
        shares = [(log10(value) - low) / max(high - low, 1) for value, (low, high) in zip((x, y), ends)]
        return left + shares[0] * svg.WIDTH, svg.TOP + (1 - shares[1]) * svg.HEIGHT

    for power in range(int(ends[1][0]), int(ends[1][1]) + 1):
        y = at(min(across), 10.0**power)[1]
        yield svg.line([(left, y), (left + svg.WIDTH, y)], "#e4e4e4", 1)
        yield svg.text(left - 7, y + 4, f"{10.0**power:g}", "end")
    for x in sorted(set(across)):
        yield svg.text(at(x, 10.0 ** ends[1][0])[0], svg.TOP + svg.HEIGHT + 17, f"{x:,}")
    yield svg.text(left + svg.WIDTH / 2, svg.TOP + svg.HEIGHT + 37, f"{title}, over the number of shards")
    for points, color in zip(curves.values(), svg.COLORS):
        yield svg.line([at(x, y) for x, y in points], color, 2)
    yield f'<rect x="{left}" y="{svg.TOP}" width="{svg.WIDTH}" height="{svg.HEIGHT}" fill="none" stroke="#555"/>'


def measure(options: argparse.Namespace, directory: Path) -> Figures:
    """All figures that are asked for."""
    read = tuple(size for size in (QUICK_READ if options.quick else READ) if size <= options.most)
    written = tuple(size for size in (QUICK_WRITTEN if options.quick else WRITTEN) if size <= options.most)
    result: Figures = {
        "machine": f"{os.cpu_count()} cores, Python {platform.python_version()}",
        "date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}",
        "reading": list(reading(directory, read)), "writing": list(writing(directory, written)),
        "peers": peers(options.peers_python, directory, read), "requests": {}, "ranks": [],
    }  # fmt: skip
    if not options.quick:
        sizes = {read[0], min(read[-1], options.most_ranks)}
        result["ranks"] = [{"shards": size} | ranks(directory / str(size)) for size in sorted(sizes)]
        with store() as counting:
            result["requests"] = requests(directory, counting)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="to 10,000 shards; neither requests nor ranks")
    parser.add_argument("--most", type=int, default=READ[-1], metavar="SHARDS", help="leave out larger sets")
    parser.add_argument("--most-ranks", type=int, default=READ[-1], metavar="SHARDS", help="the same for the ranks")
    parser.add_argument("--peers-python", metavar="PYTHON", help="of an environment with the peers")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg")
    parser.add_argument("--before", type=Path, metavar="FILE", help="of --json: draw its first batch beside this one")
    parser.add_argument("--work", type=Path, metavar="DIR", help="for the sets; default: a temporary directory")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="scale-", dir=options.work) as directory:
        result = measure(options, Path(directory))
    for line in tables(result):
        print(line)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    if options.plot:
        before = json.loads(options.before.read_text()) if options.before else None
        options.plot.write_text(plot(result, before))


if __name__ == "__main__":
    main()
