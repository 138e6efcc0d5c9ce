"""Job: samples + shard set → figures. `ddpm evaluate SAMPLES --against SHARDSET --features FILE`.

Features are computed by shard and kept in files, so any number of processes share the work, a killed job loses at most
the shards it was at, and processes do not communicate. All figures follow from the files. `ddpm evaluate RUN
--likelihood SHARDSET` works in the same way.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from os.path import abspath
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline import path_kind
from pipeline.checkpoints.checkpoint import step_of_manifest
from pipeline.cluster.device import own_device
from pipeline.cluster.interrupt import Interrupt
from pipeline.cluster.launch_environment import in_turn, process_rank
from pipeline.data.images import preprocess
from pipeline.data.images.contact_sheet import grid
from pipeline.data.loading.batches import Batch, read_range
from pipeline.data.shards import sample_set
from pipeline.data.shards.shard_set import ShardSet
from pipeline.errors import ConfigError, DataError, Stopped
from pipeline.evaluation import evaluation_file
from pipeline.evaluation import features as feature_networks
from pipeline.evaluation import likelihood as likelihoods
from pipeline.evaluation.features import INCEPTION_SHA256, Extractor
from pipeline.evaluation.figures import figures, notes
from pipeline.evaluation.intervals import Figure, curves
from pipeline.evaluation.memorisation import memorised_share
from pipeline.evaluation.neighbours import nearest
from pipeline.evaluation.result_file import Arrays
from pipeline.evaluation.shard_results import ShardResults
from pipeline.forecast import Forecast
from pipeline.monitoring.progress import Progress
from pipeline.monitoring.telemetry import record_evaluation
from pipeline.sampling import generator as generators
from pipeline.storage import files
from pipeline.training.datasets import fit_classes

_NEAREST_ROWS, _NEAREST = 20, 4
_PASSES = 6
"""Passes through the network that a forecast of the likelihood takes."""


@dataclass(frozen=True)
class EvaluationRequest:
    """What one `ddpm evaluate` command asks for."""

    samples: str
    """A sample set, or any shard set."""
    against: str
    """The shard set to compare with: the reference."""
    features: str
    """A feature file, or `inception`."""
    cache: str | None = None
    """Where features are kept; None: beside each set."""
    nearest: str | None = None
    """PNG file for a sheet of samples beside their nearest images of the reference."""
    log: str | None = None
    """A run, whose TensorBoard gets the figures."""


def evaluate(request: EvaluationRequest, *, quiet: bool = False) -> dict[str, Any]:
    """Compute the features that are missing, and the figures once all are there.

    Args:
        request: what to compare.
        quiet: show nothing but warnings.

    Returns:
        `complete`; and, if it is true: `n`, `reference_n`, `features_sha256`, `reference_sha256`, `preprocessing`,
        `figures` (name → value, low, high), `notes` and, if it was asked for, the path of the sheet `nearest`. The same
        is written to `evaluation.json` in the sample set,
        or in the cache if one is given.

    Raises:
        ConfigError: the request is unusable, or the two sets are not comparable.
        DataError: an image or a file of features is damaged, or there is no space left.
        Stopped: on request; the features of finished shards stay.
    """
    with Interrupt("" if quiet else "features of finished shards stay") as interrupt:
        _check_outputs(request)
        samples, reference = ShardSet.open(request.samples), ShardSet.open(request.against)
        _check_alike(samples, reference)
        step = _step_of(samples, request.log) if request.log else 0
        extractor = feature_networks.load(request.features, own_device(), samples.size)
        sets = {shards.sha256: feature_networks.of_shards(shards, extractor, request.cache or shards.url)
                for shards in (reference, samples)}  # fmt: skip
        if not _compute_missing(list(sets.values()), "computing features", interrupt, quiet):
            return {"complete": False}
        of_samples, of_reference = sets[samples.sha256].read(), sets[reference.sha256].read()
        result = _compare(of_samples, of_reference, samples, reference, extractor)
        if request.nearest:
            result["nearest"] = request.nearest if files.is_remote(request.nearest) else abspath(request.nearest)
        # Of several processes the one that ends last comes here, whatever its rank; if more do, they write the same.
        files.write_json(files.join(request.cache or samples.url, evaluation_file.NAME), result)
        if request.nearest:
            sheet = _nearest_sheet(samples, reference, of_samples["features"], of_reference["features"])
            files.write_bytes(request.nearest, preprocess.encode(sheet, "png"))
        if request.log:
            record_evaluation(request.log, step, curves(result["figures"]))
        return {"complete": True, **result}


def likelihood(
    source: str, url: str, *, cache: str | None = None, ema: bool = True, quiet: bool = False
) -> dict[str, Any]:
    """Bits per dimension of a shard set by a trained network, by the variational bound.

    Args:
        source: a run, a checkpoint or a diffusers directory.
        url: the shard set.
        cache: where the terms are kept; None: beside the set.
        ema: use the averaged weights.
        quiet: show nothing but warnings.

    Returns:
        `complete`; and, if it is true: `n`, `model_sha256`, `reference_sha256`, `figures` (name → value, low, high) and
        `terms`, the mean of L_t for each timestep.

    Raises:
        ConfigError: the set does not fit the model.
        DataError: an image or a file of results is damaged, or there is no space left.
        NoCheckpoint: the run holds no valid checkpoint.
        Stopped: on request; finished shards stay.
    """
    with Interrupt("" if quiet else "finished shards stay") as interrupt:
        results, _ = _of_likelihood(source, url, cache, ema, lambda: _check_stop(interrupt))
        if not _compute_missing([results], "computing the likelihood", interrupt, quiet):
            return {"complete": False}
        arrays = results.read()
        return {
            "complete": True,
            "n": results.shards.samples,
            "model_sha256": results.network["model_sha256"],
            "reference_sha256": results.shards.sha256,
            "figures": _as_json(likelihoods.figures(arrays)),
            "terms": arrays["terms"].mean(axis=0, dtype=np.float64).round(9).tolist(),
        }


def forecast(request: EvaluationRequest) -> Forecast:
    """What `evaluate` would do for this request; writes nothing. Computes the features of one batch, for their time.

    Raises:
        ConfigError, DataError: as `evaluate` does before it computes.
    """
    _check_outputs(request)
    samples, reference = ShardSet.open(request.samples), ShardSet.open(request.against)
    _check_alike(samples, reference)
    if request.log:
        _step_of(samples, request.log)
    where = request.cache or samples.url
    if feature_networks.is_to_be_fetched(request.features):
        work = f"{samples.samples + reference.samples:,} images, after the network of {request.features} is fetched"
        return Forecast(where, work, samples.samples + reference.samples, "images", None, "its network is not here", 0)
    extractor = feature_networks.load(request.features, own_device(), samples.size)
    sets = {shards.sha256: shards for shards in (reference, samples)}
    results = [feature_networks.of_shards(each, extractor, request.cache or each.url) for each in sets.values()]
    return _forecast(where, results)


def forecast_likelihood(source: str, url: str, *, cache: str | None = None, ema: bool = True) -> Forecast:
    """What `likelihood` would do; writes nothing. Measures a few passes through the network.

    Raises:
        ConfigError, DataError, NoCheckpoint: as `likelihood` does before it computes.
    """
    passes: list[float] = []

    def check_stop() -> None:
        passes.append(time.monotonic())
        if len(passes) > _PASSES:
            raise _MeasuredError

    results, timesteps = _of_likelihood(source, url, cache, ema, check_stop)
    missing = results.missing()
    images = sum(results.shards.shards[i].samples for i in missing)
    per_s = None
    if images:
        count = min(results.batch, results.shards.shards[missing[0]].samples)
        with suppress(_MeasuredError):
            results.compute_batch(read_range(results.shards, range(count)))
        per_s = count / (timesteps * (passes[-1] - passes[1]) / max(len(passes) - 2, 1))
    return Forecast(
        where=cache or url, work=f"the likelihood of {images:,} of {results.shards.samples:,} images to compute",
        units=images, unit="images", per_s=per_s, basis=f"measured on {len(passes) - 2} of {timesteps} passes",
        bytes=images * 4 * (timesteps + 1), free_bytes=files.free_bytes(cache or url),
    )  # fmt: skip


class _MeasuredError(Exception):
    """Enough passes were measured."""


def _forecast(where: str, results: Sequence[ShardResults]) -> Forecast:
    """The features that are missing in both sets, with the time of a batch."""
    images, per_s, row_bytes, basis = 0, None, 0, ""
    for result in results:
        missing = sum(result.shards.shards[i].samples for i in result.missing())
        images += missing
        if missing and per_s is None:
            batch = read_range(result.shards, range(min(result.batch, result.shards.samples)))
            result.compute_batch(batch)  # the first one is slower
            started = time.monotonic()
            arrays = result.compute_batch(batch)
            per_s = len(batch.images) / (time.monotonic() - started)
            row_bytes = sum(array.nbytes // len(array) for array in arrays.values())
            basis = f"measured on a batch of {len(batch.images)} images, one process; the figures come on top"
    total = sum(result.shards.samples for result in results)
    return Forecast(
        where=where, work=f"features of {images:,} of {total:,} images to compute, then the figures", units=images,
        unit="images", per_s=per_s, basis=basis, bytes=images * row_bytes, free_bytes=files.free_bytes(where),
    )  # fmt: skip


def as_table(result: dict[str, Any]) -> str:
    """The figures for people: name, value, 95 % interval."""
    if not result["complete"]:
        return "other processes are still at work: run the same command again for the figures"
    is_inception = result.get("features_sha256") == INCEPTION_SHA256
    lines = [f"{'figure':28}{'value':>12}   95 % interval"]
    for name, figure in result["figures"].items():
        title = name.replace("_", " ") + " (FID)" * (name == "frechet_distance" and is_inception)
        of = ", of the distance at infinity" * (name == "frechet_distance")
        lines.append(f"{title:28}{figure['value']:>12.5g}   {figure['low']:.5g} to {figure['high']:.5g}{of}")
    against = f" against {result['reference_n']:,}" if "reference_n" in result else ""
    lines.append(f"{result['n']:,} images{against}")
    return "\n".join(lines + [f"note: {note}" for note in result.get("notes", ())])


def _of_likelihood(
    source: str, url: str, cache: str | None, ema: bool, check_stop: Callable[[], None]
) -> tuple[ShardResults, int]:
    """The likelihood of a set by shard, which is yet to be computed, and the timesteps of the model."""
    shards = ShardSet.open(url)
    generator = generators.load(source, own_device(), ema=ema)
    data = generator.config.data
    if (shards.size, shards.channels) != (data.height_width, data.channels):
        raise ConfigError(
            f"{url} has images of {_shape(shards.size, shards.channels)}, {source} was trained on "
            f"{_shape(data.height_width, data.channels)}: give a set of this size and number of channels"
        )
    if shards.classes:
        shards = fit_classes(shards, generator.class_names)
    elif generator.class_names and not generator.config.model.label_dropout:
        raise ConfigError(f"{url} has no classes, and {source} needs the class of each image: give a set with classes")

    def bound(batch: Batch) -> Any:
        return generator.bits_per_dimension(batch.images, batch.labels, batch.positions, check_stop)

    network = {
        "model_sha256": generator.sha256,
        "weights": "ema" if ema else "model",
        "precision": generator.config.train.precision,
        "classes": "\n".join(shards.classes or ()),
    }
    results = likelihoods.of_shards(shards, bound, network, cache or url, generator.config.sample.batch)
    return results, generator.config.diffusion.timesteps


def _check_outputs(request: EvaluationRequest) -> None:
    if request.nearest and not request.nearest.lower().endswith(".png"):
        raise ConfigError(f"--nearest {request.nearest}: the image is a PNG: give a name that ends in .png")
    for url in (request.samples, request.against):
        if not files.is_dir(url):
            raise ConfigError(f"{url}: no such directory: give a sample set or a shard set")
        if sample_set.provenance(url).get("format", "tar") != "tar" or path_kind.is_run(url):
            raise ConfigError(path_kind.not_a_set(url))


def _check_alike(samples: ShardSet, reference: ShardSet) -> None:
    """Refuse a reference with images of another size or number of channels, and sets without images."""
    for shards in (samples, reference):
        if shards.samples < 2:
            raise DataError(f"{shards.url} has {shards.samples} images: a comparison needs at least 2 on either side")
    if (samples.size, samples.channels) != (reference.size, reference.channels):
        raise ConfigError(
            f"{samples.url} has images of {_shape(samples.size, samples.channels)}, {reference.url} of "
            f"{_shape(reference.size, reference.channels)}: make the reference set again with `ddpm shard --size`"
        )


def _shape(size: tuple[int, int], channels: int) -> str:
    return f"{size[0]}x{size[1]} px with {channels} channel{'s' * (channels > 1)}"


def _compute_missing(results: Sequence[ShardResults], work: str, interrupt: Interrupt, quiet: bool) -> bool:
    """Compute the shards of this process that have no file yet; returns whether all shards have one then."""
    shards = [(result, i) for result in results for i in range(len(result.shards.shards))]
    # Each process takes its share of all shards: another one may already have finished some of the missing ones.
    share = [shards[k] for k in in_turn(list(range(len(shards))), process_rank())]
    missing = {(id(result), i) for result in results for i in result.missing()}
    share = [(result, i) for result, i in share if (id(result), i) in missing]
    counts = [result.shards.shard_samples[i] for result, i in share]
    with Progress(sum(counts), work, unit="images", quiet=quiet) as progress:

        def each(count: int) -> None:
            progress.advance(count)
            _check_stop(interrupt)

        for (result, i), count in zip(share, counts, strict=True):
            _check_stop(interrupt)
            if result.exists(i):  # another process was faster
                progress.advance(count)
            else:
                result.compute(i, each)
    return not any(result.missing() for result in results)


def _check_stop(interrupt: Interrupt) -> None:
    if interrupt.requested:
        raise Stopped(f"stop requested ({interrupt.requested}): finished shards are kept; the same command continues")


def _compare(
    of_samples: Arrays, of_reference: Arrays, samples: ShardSet, reference: ShardSet, extractor: Extractor
) -> dict[str, Any]:
    features, others = of_samples["features"], of_reference["features"]
    found = figures(features, others, of_samples.get("logits"))
    return {
        "n": len(features),
        "reference_n": len(others),
        "samples_sha256": samples.sha256,
        "reference_sha256": reference.sha256,
        "features_sha256": extractor.sha256,
        "preprocessing": extractor.preprocessing,
        "figures": _as_json(found | {"memorised_share": memorised_share(features, others)}),
        "notes": notes(len(features), len(others), features.shape[1]),
    }


def _as_json(found: dict[str, Figure]) -> dict[str, dict[str, float]]:
    return {name: figure.as_json() for name, figure in found.items()}


def _step_of(samples: ShardSet, run: str) -> int:
    """The step of the run's checkpoint that drew the samples."""
    sha256 = samples.settings.get("checkpoint_sha256")
    step = step_of_manifest(run, sha256) if isinstance(sha256, str) else None
    if step is None:
        raise ConfigError(
            f"--log {run}: no checkpoint of this run has drawn {samples.url}: give the run that has drawn them"
        )
    return step


def _nearest_sheet(
    samples: ShardSet, reference: ShardSet, of_samples: NDArray[np.float32], of_reference: NDArray[np.float32]
) -> NDArray[np.uint8]:
    """Rows of a sample and the reference images that are nearest to it, the most similar pairs first."""
    indices, distances = nearest(of_samples, of_reference, min(_NEAREST, len(of_reference)))
    rows = np.argsort(distances[:, 0], kind="stable")[:_NEAREST_ROWS]
    left = read_range(samples, rows.tolist()).images[:, None]
    right = read_range(reference, indices[rows].ravel().tolist()).images
    images = (
        torch.cat((left, right.reshape(len(rows), -1, *left.shape[2:])), dim=1)
        .flatten(0, 1)
        .permute(0, 2, 3, 1)
        .numpy()
    )
    return grid(images, columns=1 + indices.shape[1])


if __name__ == "__main__":
    from pipeline import cli

    cli.main(["evaluate", *sys.argv[1:]])
