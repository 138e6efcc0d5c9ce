"""Job: run → one HTML page for people who have no access to it. `ddpm report RUN --out FILE.html`.

The page holds everything it shows: at most `previews` previews, curves of at most 500 points a line, images of at most
1000 px as PNGs of 64 kB or else as WebP. So it is some megabytes at most, for a run of any length.
"""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline import messages, path_kind
from pipeline.checkpoints.checkpoint import step_of_manifest
from pipeline.checkpoints.run_dir import RunDir
from pipeline.data.images.contact_sheet import grid
from pipeline.data.loading.batches import read_range
from pipeline.data.shards import sample_set
from pipeline.data.shards.shard_set import ShardSet
from pipeline.errors import ConfigError, DataError
from pipeline.evaluation import evaluation_file
from pipeline.monitoring.machine import own_version
from pipeline.reporting import data_facts, run_facts
from pipeline.reporting.images import data_url, evenly
from pipeline.reporting.page import Content, SampleFacts, Sheet, page
from pipeline.reporting.run_facts import RunFacts
from pipeline.storage import files

_SMALL_PX = 400
_ROWS, _COLUMNS = 10, 10
_NEAREST = (
    "each row: a sample, then the training images nearest to it in the features of the evaluation; the most similar "
    "pairs come first"
)
_READ = 2000
"""Samples among which those of each class are looked for."""


@dataclass(frozen=True)
class ReportRequest:
    """What one `ddpm report` command asks for."""

    run: str
    out: str | None = None
    """HTML file to write; None: report.html in the run."""
    samples: str | None = None
    """A sample set of the run in tars."""
    nearest: str | None = None
    """A sheet of `ddpm evaluate --nearest`; None: the one that evaluation.json names, if it is there."""
    previews: int = 24
    """Most previews that the page holds."""


def report(request: ReportRequest) -> dict[str, Any]:
    """Write the page.

    Returns:
        `out`, the `bytes` of the page, and whether it `replaced` a file.

    Raises:
        ConfigError: the run or the samples are none, or `out` is no .html file.
        DataError: a sample is damaged, or the page cannot be written.
    """
    out = request.out or files.join(request.run, "report.html")
    if not out.lower().endswith((".html", ".htm")):
        raise ConfigError(f"--out {out}: the report is an HTML page: give a name that ends in .html")
    run = run_facts.read(request.run)
    sets = (run.config.data.shards, run.config.data.val_shards) if run.imported is None else ()
    content = Content(
        name=request.run.rstrip("/").rpartition("/")[2] or request.run,
        run=run,
        previews=list(_previews(run, request.previews)),
        data=[data_facts.read(url) for url in sets if url],
        samples=_samples(request, run) if request.samples else None,
        now=time.time(),
        version=own_version(),
    )
    text = page(content).encode()
    replaced = files.exists(out)
    files.write_bytes(out, text)
    return {"out": out, "bytes": len(text), "replaced": replaced}


def _previews(run: RunFacts, most: int) -> Iterator[tuple[int, Sheet]]:
    """Previews of evenly spread steps; a damaged one is left out with a warning."""
    weights = "drawn with the averaged weights, always from the same seeds"
    for step in evenly(run.previews, most):
        if (image := _read_png(RunDir(run.path).preview(step))) is not None:
            yield step, _sheet(image, weights)


def _samples(request: ReportRequest, run: RunFacts) -> SampleFacts:
    url = str(request.samples)
    if sample_set.provenance(url).get("format", "tar") != "tar":
        raise ConfigError(f"--samples: {path_kind.not_a_set(url)}")
    shards = ShardSet.open(url)
    sha256 = shards.settings.get("checkpoint_sha256")
    step = step_of_manifest(run.path, sha256) if isinstance(sha256, str) else None
    drawn_by = f"drawn by the checkpoint of step {step:,}" if step else "not drawn by a checkpoint that this run has"
    settings = ", ".join(
        f"{name} {shards.settings[name]}" for name in ("sampler", "steps", "guidance") if name in shards.settings
    )
    evaluation = evaluation_file.read(url, messages.warning, "the report shows no figures of it")
    named = request.nearest or (evaluation or {}).get("nearest")
    image = _read_png(named) if isinstance(named, str) and (request.nearest or files.exists(named)) else None
    return SampleFacts(
        description=f"{shards.samples:,} samples in {url}, {drawn_by}{'; ' if settings else ''}{settings}.",
        sheets=list(_sheets(shards)),
        nearest=None if image is None else _sheet(image, _NEAREST),
        evaluation=evaluation,
    )  # fmt: skip


def _sheets(shards: ShardSet) -> Iterator[Sheet]:
    """A row of samples for each of the first classes; one sheet of the first samples if they have no classes."""
    batch = read_range(shards, range(min(shards.samples, _READ if shards.classes else _ROWS * _COLUMNS)))
    images, labels = batch.images.permute(0, 2, 3, 1).numpy(), batch.labels.numpy()
    present = sorted({int(label) for label in labels if label >= 0})
    if not shards.classes or not present:
        yield _sheet(
            grid(images[: _ROWS * _COLUMNS], columns=_COLUMNS),
            f"the first {min(len(images), _ROWS * _COLUMNS)} samples",
        )
        return
    for label in present[:_ROWS]:
        of_class = images[labels == label][:_COLUMNS]
        missing = np.full((_COLUMNS - len(of_class), *of_class.shape[1:]), 255, np.uint8)
        yield _sheet(grid(np.concatenate((of_class, missing)), columns=_COLUMNS), f"class {shards.classes[label]}")
    if len(present) > _ROWS:
        messages.info(f"{shards.url}: samples of {_ROWS} of {len(present)} classes are shown")


def _sheet(image: NDArray[np.uint8], caption: str) -> Sheet:
    return Sheet(data_url(image), caption, is_small=image.shape[1] < _SMALL_PX)


def _read_png(url: str) -> NDArray[np.uint8] | None:
    """An image file as uint8 (H, W, C), C 1 or 3; None, with a warning, if it cannot be read."""
    try:
        with Image.open(io.BytesIO(files.read_bytes(url)), formats=("PNG",)) as image:
            array = np.asarray(image if image.mode == "L" else image.convert("RGB"))
    except (OSError, ValueError, Image.DecompressionBombError, DataError) as error:
        messages.warning(f"{url} is left out of the report: {error}")
        return None
    return array.reshape(*array.shape[:2], -1)


if __name__ == "__main__":
    from pipeline import cli

    cli.main(["report", *sys.argv[1:]])
