"""The page of `ddpm report`: facts of a run → one HTML file that needs no network. Pure but for its template.

All text of the run is escaped: names of classes, paths and messages come from files of others. The page forbids itself
to fetch anything, by a Content-Security-Policy.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from string import Template
from typing import Any

from pipeline.reporting import curves, data_section, training_section
from pipeline.reporting.curves import Chart, number
from pipeline.reporting.data_facts import DataFacts
from pipeline.reporting.markup import paragraph, section, table, text
from pipeline.reporting.run_facts import RunFacts, as_time

_MEANINGS = {
    "frechet_distance": "distance of the features' normal distributions at this number of samples; lower is better",
    "frechet_distance_infinity": "the same, extrapolated to infinitely many samples; lower is better",
    "kernel_distance": "squared maximum mean discrepancy of the features; lower is better, 0 is no difference",
    "precision": "share of samples that lie among the training images; higher is better",
    "recall": "share of training images that lie among the samples; higher is better",
    "density": "how densely training images surround the samples; about 1 is good",
    "coverage": "share of training images with a sample in their neighbourhood; higher is better",
    "inception_score": "how certain and how varied the predicted classes are; higher is better",
    "memorised_share": "share of samples as near to a training image as its neighbour is; compare with held-out images",
}


@dataclass(frozen=True)
class Sheet:
    """An image with the text under it."""

    url: str
    """A data URL."""
    caption: str
    is_small: bool = False
    """Of few pixels: shown enlarged, pixel by pixel."""


@dataclass(frozen=True)
class SampleFacts:
    """The samples shown, and what they are worth."""

    description: str
    sheets: Sequence[Sheet]
    nearest: Sheet | None
    evaluation: Mapping[str, Any] | None
    """What `ddpm evaluate` has written beside them."""


@dataclass(frozen=True)
class Content:
    """All that the page shows."""

    name: str
    run: RunFacts
    previews: Sequence[tuple[int, Sheet]]
    """(step, sheet), ascending."""
    data: Sequence[DataFacts]
    """The training data, then the validation data if there is any."""
    samples: SampleFacts | None
    now: float
    """Seconds since 1970."""
    version: str


def page(content: Content) -> str:
    """The HTML file."""
    run, charts = content.run, _charts(content.run)
    sections = [
        f"<header><h1>{text(content.name)}</h1><p>{text(run.state)}</p>{_tiles(content)}</header>",
        section("Curves", _curves(run, charts)),
        section("Samples during training", _previews(content)),
        section("Samples", _samples(content.samples)),
        section("Figures", _figures(content)),
        section("Data", data_section.of_sets(content.data, run)),
        section("Starts and speed", training_section.starts(run)),
        section("Configuration", training_section.configuration(run)),
        f"<footer>{text(_origin(content))}</footer>",
    ]
    values = {
        "charts": [curves.data(chart) for chart in charts],
        "previews": [{"step": step, "image": sheet.url} for step, sheet in content.previews],
    }
    # Within <script> only `<` can end the element, and JSON may write it as \u003c.
    data = json.dumps(values, separators=(",", ":")).replace("<", "\\u003c")
    template = resources.files("pipeline.reporting").joinpath("page.html").read_text("utf-8")
    return Template(template).substitute(title=text(content.name), body="\n".join(sections), data=data)


# --- at the top ---


def _tiles(content: Content) -> str:
    tiles = "".join(
        f"<div><dt>{text(name)}</dt><dd>{text(value)}{f'<small>{text(more)}</small>' if more else ''}</dd></div>"
        for name, value, more in _key_facts(content)
    )
    return f'<dl class="tiles">{tiles}</dl>'


def _key_facts(content: Content) -> Iterator[tuple[str, str, str]]:
    """(name, value, remark) of what a reader wants first."""
    run = content.run
    if run.imported is None:
        step = max([run.step, *(int(line["step"]) for line in run.log[-1:])])
        yield "steps", f"{step:,}", f"of {run.config.train.steps:,}, {run.config.train.global_batch} images each"
    for name, curve in (("training loss", "train/loss"), ("validation loss", "val/loss")):
        if (value := run.last(curve)) is not None:
            yield name, number(value), f"at step {run.curve(curve)[-1][0]:,}"
    if distance := _all_figures(content).get("frechet_distance"):
        yield "Fréchet distance", _number(distance.get("value")), f"95 % interval at infinity {_interval(distance)}"
    if speeds := sorted(value for _, value in run.curve("speed/images_per_s")):
        yield "images a second", number(speeds[len(speeds) // 2]), "median over the run"
    if seconds := run.training_s():
        starts = f"in {len(run.starts)} start{'s' * (len(run.starts) > 1)}"
        yield "training time", training_section.duration(seconds), starts


# --- curves and images ---


def _charts(run: RunFacts) -> list[Chart]:
    """Charts that have a point."""
    infinity = "evaluation/frechet_distance_infinity"
    wanted = {
        "Loss": {"training": "train/loss", "validation": "val/loss"},
        "Loss by timestep": {name.removeprefix("train/loss_"): name for name in run.names("train/loss_t")},
        "Fréchet distance": {"of these samples": "evaluation/frechet_distance", "at infinity": infinity},
        "Images a second": {"images a second": "speed/images_per_s"},
        "Learning rate": {"learning rate": "train/lr"},
        "Norm of the gradient": {"norm": "train/grad_norm"},
        "Share of the time waiting for data": {"share": "speed/data_wait_share"},
    }
    charts = []
    for title, names in wanted.items():
        lines = {name: points for name, curve in names.items() if (points := run.curve(curve))}
        ends = (run.curve(f"{infinity}/low"), run.curve(f"{infinity}/high"))
        bands = {"at infinity": ends} if "at infinity" in lines and all(ends) else {}
        if lines:
            charts.append(Chart(title, lines, bands, may_be_log=title.startswith(("Loss", "Norm"))))
    return charts


def _curves(run: RunFacts, charts: Sequence[Chart]) -> str:
    if not charts:
        return paragraph("There are no curves: this run has not logged a step.")
    missing = []
    if not run.curve("val/loss"):
        wanted = run.config.data.val_shards and run.config.run.val_every
        missing.append("There is no validation loss " + ("yet." if wanted else "(data.val_shards, run.val_every)."))
    if not run.curve("evaluation/frechet_distance"):
        wanted = run.config.run.evaluate_every
        missing.append("Samples were not evaluated during training " + ("yet." if wanted else "(run.evaluate_every)."))
    figures = "".join(_figure(i, chart) for i, chart in enumerate(charts))
    return f'<div class="charts">{figures}</div>{paragraph(" ".join(missing)) if missing else ""}'


def _figure(i: int, chart: Chart) -> str:
    legend = "".join(
        f'<span><i class="l{k}"></i>{text(name)}{", 95 % interval shaded" if name in chart.bands else ""}</span>'
        for k, name in enumerate(chart.lines)
    )
    legend = f'<p class="legend">{legend}</p>' if len(chart.lines) > 1 else ""
    return f'<figure data-chart="{i}"><h3>{text(chart.title)}</h3>{legend}{curves.svg(chart)}<output></output></figure>'


def _image(sheet: Sheet, attributes: str = "") -> str:
    kind = "sheet small" if sheet.is_small else "sheet"
    return f'<img class="{kind}" src="{escape(sheet.url)}" alt="{text(sheet.caption)}"{attributes}>'


def _captioned(sheet: Sheet) -> str:
    return f"<figure>{_image(sheet)}<figcaption>{text(sheet.caption)}</figcaption></figure>"


def _previews(content: Content) -> str:
    if not content.previews:
        return paragraph("No preview was drawn during training (run.preview_every).")
    step, last = content.previews[-1]
    count, drawn = len(content.previews), len(content.run.previews)
    caption = f"{last.caption}; {count} of {drawn} previews" if count < drawn else last.caption
    slider = (
        f'<input type="range" id="slider" max="{count - 1}" value="{count - 1}" aria-label="step of the preview">'
        if count > 1
        else ""
    )
    attributes = ' id="preview"'
    return (
        f'<figure>{_image(last, attributes)}{slider}<figcaption><b id="step">step {step:,}</b>: {text(caption)}'
        "</figcaption></figure>"
    )


def _samples(samples: SampleFacts | None) -> str:
    if not samples:
        return paragraph("No sample set was given to the report (--samples).")
    sheets = "".join(map(_captioned, samples.sheets))
    if samples.nearest:
        near = f"<h3>Nearest training images</h3><div class=narrow>{_captioned(samples.nearest)}</div>"
    else:
        near = paragraph(
            "Nearest training images are not shown: `ddpm evaluate` was run without --nearest, or its sheet is gone."
        )
    return f"{paragraph(samples.description)}{sheets}{near}"


# --- figures and data ---


def _all_figures(content: Content) -> dict[str, Mapping[str, Any]]:
    """Name → value, low, high: of the sample set if it was evaluated, else the last ones of the training."""
    evaluation = content.samples.evaluation if content.samples else None
    found = evaluation.get("figures") if evaluation else None
    if isinstance(found, dict):
        return {str(name): figure for name, figure in found.items() if isinstance(figure, dict)}
    prefix = "evaluation/"
    names = {name.split("/")[1] for name in content.run.names(prefix)} - {"samples"}
    ends = {"value": "", "low": "/low", "high": "/high"}
    return {
        name: {end: content.run.last(f"{prefix}{name}{ending}") for end, ending in ends.items()}
        for name in sorted(names)
    }


def _figures(content: Content) -> str:
    figures = _all_figures(content)
    if not figures:
        return paragraph(
            "The samples have not been evaluated: `ddpm evaluate SAMPLES --against SHARDSET --features FILE`."
        )
    evaluation = (content.samples and content.samples.evaluation) or {}
    rows = [
        (
            (name.replace("_", " ").replace("frechet", "Fréchet"), _MEANINGS.get(name, "")),
            _number(figure.get("value")),
            _interval(figure),
        )
        for name, figure in figures.items()
    ]
    remarks = []
    if evaluation:
        remarks.append(f"{evaluation.get('n')} samples against {evaluation.get('reference_n')} images.")
        remarks.append(f"Features: sha256 {str(evaluation.get('features_sha256'))[:12]}….")
        notes = evaluation.get("notes")
        remarks += [f"Note: {note}." for note in notes] if isinstance(notes, list) else []
    elif curve := content.run.curve("evaluation/samples"):
        remarks.append(f"By run.evaluate_every, at step {curve[-1][0]:,}, of {curve[-1][1]:.0f} samples.")
    remarks.append("The interval of the Fréchet distance is that of the distance at infinity.")
    remarks.append("Figures of other feature networks or of other numbers of samples are not comparable.")
    rows_of_figures = table(("figure", "value", "95 % interval"), rows, numbers=(1, 2))
    return f'{rows_of_figures}<p class="quiet">{text(" ".join(remarks))}</p>'


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else "not known"


def _interval(figure: Mapping[str, Any]) -> str:
    ends = (figure.get("low"), figure.get("high"))
    return f"{_number(ends[0])} to {_number(ends[1])}" if None not in ends else "not known"


def _origin(content: Content) -> str:
    software = content.run.saved.get("environment")
    made = f"Made by ddpm-pipeline {content.version} at {as_time(content.now)} from {content.run.path}."
    if not isinstance(software, dict):
        return made
    return f"{made} Trained with {', '.join(f'{name} {version}' for name, version in software.items())}."
