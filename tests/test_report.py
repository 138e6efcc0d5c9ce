"""The page about a run: complete, safe, small, and right in a real browser."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline import config_file
from pipeline.checkpoints.run_dir import RunDir
from pipeline.cli import main
from pipeline.cluster import starts
from pipeline.config import Config
from pipeline.data.shards import index_file, shard_set
from pipeline.errors import ConfigError
from pipeline.report import ReportRequest, report
from tests.browser import CHROMIUM, Browser

HOSTILE = ("</script><img src=x onerror=hacked=1>", "<!--<script>", "\u202e\"' &amp; \u2028${title} $body")
WHOLE = {
    "train/loss": 0.5, "train/loss_t0000-0249": 0.9, "train/lr": 1e-4, "train/grad_norm": 1.0, "train/bad_steps": 0,
    "speed/images_per_s": 100.0, "speed/data_wait_share": 0.01, "memory/peak_gib": 1.5, "val/loss": 0.4,
    "evaluation/frechet_distance": 9.0, "evaluation/frechet_distance/low": 5.0, "evaluation/frechet_distance/high": 7.0,
    "evaluation/frechet_distance_infinity": 6.0, "evaluation/frechet_distance_infinity/low": 5.0,
    "evaluation/frechet_distance_infinity/high": 7.0, "evaluation/samples": 300.0,
}  # fmt: skip


def png(shade: int, size: int = 8) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((size, size), shade, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def shards(url: Path, classes: tuple[str, ...] | None, **settings: Any) -> Path:
    """A set of twelve images, without a job."""
    samples = (
        shard_set.pack(shard_set.Sample(shard_set.key(i), png(20 * i), "png", i % 3 if classes else None, {}))
        for i in range(12)
    )
    record = shard_set.write_shard(str(url), "shard_000000", samples, dict)
    counts = {
        "rejected": {"truncated": 2, HOSTILE[0]: 1}, "sizes": {"512": 12}, "transforms": {"reduced": 12},
        "classes": dict.fromkeys(classes or (), 4),
    }  # fmt: skip
    index_file.write_index(
        str(url), [record], size=(8, 8), channels=1, classes=classes, source={"urls": [HOSTILE[1]]}, settings=settings,
        counts=counts,
    )  # fmt: skip
    lines = [{"key": "0", "source": f"{HOSTILE[0]}{i}.jpg", "reason": "truncated", "detail": ""} for i in range(9)]
    (url / "rejected.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return url


def make_run(path: Path, log: list[dict[str, Any]], previews: int, **data: str) -> Path:
    """The files of a run that has not been trained."""
    path.mkdir(parents=True)
    sections = {"data": {"size": 8, "channels": 1, **data}, "model": {"channel_mults": [1, 2]}, "train": {"steps": 900}}
    (path / "config.yaml").write_text(config_file.dump(Config.model_validate(sections)))
    (path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    (path / "previews").mkdir()
    for i in range(previews):
        Path(RunDir(str(path)).preview(100 * (i + 1))).write_bytes(png(i % 256))
    return path


def text_of(run: Path, **options: Any) -> str:
    """The visible text of a report."""
    result = report(ReportRequest(str(run), **options))
    page = Path(result["out"]).read_text()
    assert len(page.encode()) == result["bytes"]
    body = page.partition("<main>")[2].partition("</main>")[0]
    return " ".join(re.sub(r"<[^>]*>", " ", body).split())


def data_of(run: Path, **options: Any) -> dict[str, Any]:
    """The data of a report, as a browser parses it."""
    page = Path(report(ReportRequest(str(run), **options))["out"]).read_text()
    text = page.partition('<script type="application/json" id="data">')[2].partition("</script")[0]
    value: dict[str, Any] = json.loads(text)
    return value


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has everything, with the most hostile names."""
    root = tmp_path_factory.mktemp("report")
    shards(root / "data", HOSTILE)
    samples = shards(root / "samples", HOSTILE, checkpoint_sha256="0", sampler=HOSTILE[0])
    (root / "near.png").write_bytes(png(7, 20))
    evaluation = {
        "n": 12, "reference_n": 12, "features_sha256": HOSTILE[0], "nearest": str(root / "near.png"),
        "figures": {"frechet_distance": {"value": 8.25, "low": 5.5, "high": 6.5}, HOSTILE[0]: {"value": "<b>"}},
        "notes": [HOSTILE[0]],
    }  # fmt: skip
    (samples / "evaluation.json").write_text(json.dumps(evaluation))
    hostile = {f"train/loss_t{HOSTILE[0]}": 0.7}
    log = [
        {"step": step, "time": 1000.0 + step, **WHOLE, **hostile, "train/loss": 100 / step}
        for step in range(100, 1000, 100)
    ]
    run = make_run(root / "run <b>", log, 9, shards=str(root / "data"))
    (run / "control").mkdir()
    (run / "FAILED.json").write_text(json.dumps({"error": HOSTILE[0], "rank": 1, "host": "n2", "step": 400}))
    starts.record(str(run), 0, 2, "cpu")
    (run / "FAILED.json").unlink()
    (run / "control/stopped.json").write_text(json.dumps({"reason": "SIGTERM", "step": 500}))
    starts.record(str(run), 400, 1, "cuda")
    (run / "control/stopped.json").unlink()
    starts.record(str(run), 500, 1, "cuda")
    (run / "DONE").write_text("{}")
    report(ReportRequest(str(run), samples=str(samples)))
    return run


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed: apt-get install chromium")
    with Browser() as browser:
        yield browser


def test_in_a_browser_the_page_shows_everything_and_asks_for_nothing(browser: Browser, whole: Path) -> None:
    page = whole / "report.html"
    browser.open(page.as_uri(), width=1000)
    text = browser.run("document.body.innerText")
    for wanted in (
        "Finished: all 900 steps.", HOSTILE[0], HOSTILE[1], "${title} $body", "SIGTERM", "without a word", "8.25",
        "5.5 to 6.5", "512 to 1023 px: 12", "reduced 12", "the file ends before the image does", "train.steps",
        "100 images/s",
    ):  # fmt: skip
        assert wanted in text, wanted
    assert browser.run("document.scripts.length") == 2 and browser.run("typeof hacked") == "undefined"
    assert browser.run("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    assert browser.run("document.querySelectorAll('main svg').length") == 7
    asked = {url for url in browser.requests() if not url.startswith("data:")} - {"about:blank"}
    assert asked == {page.as_uri()} and browser.problems() == []


def test_the_slider_shows_the_preview_of_each_step(browser: Browser, whole: Path) -> None:
    browser.open((whole / "report.html").as_uri())
    previews = browser.run("data.previews")
    assert [preview["step"] for preview in previews] == list(range(100, 1000, 100))
    for i in (0, 4):
        browser.run(f"slider.value = {i}; slider.dispatchEvent(new Event('input'))")
        assert browser.run("document.getElementById('preview').src") == previews[i]["image"]
        assert browser.run("document.getElementById('step').textContent") == f"step {100 * (i + 1)}"


def test_the_pointer_reads_a_curve(browser: Browser, whole: Path) -> None:
    browser.open((whole / "report.html").as_uri())
    place = (50 + 0.5 * (400 - 50 - 14)) / 400  # the middle of the axis: step 500
    browser.run(
        "(svg => { const box = svg.getBoundingClientRect(); svg.dispatchEvent(new PointerEvent('pointermove', "
        f"{{clientX: box.left + {place} * box.width, clientY: box.top + 50}})) }})(document.querySelector('svg'))"
    )
    assert browser.run("document.querySelector('output').textContent") == "step 500: training 0.2, validation 0.4"


def test_it_reads_well_on_a_phone_in_the_dark_and_on_paper(browser: Browser, whole: Path, tmp_path: Path) -> None:
    background = "getComputedStyle(document.body).backgroundColor"
    colours = []
    for dark in (False, True):
        browser.open((whole / "report.html").as_uri(), width=360, dark=dark)
        assert browser.run("document.documentElement.scrollWidth") == 360
        colours.append(browser.run(background))
    assert colours == ["rgb(255, 255, 255)", "rgb(18, 22, 27)"]
    browser("Emulation.setEmulatedMedia", media="print", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    assert browser.run(background) == "rgb(255, 255, 255)"
    assert browser.run("getComputedStyle(slider).display") == "none"
    browser.pdf(tmp_path / "page.pdf")
    assert (tmp_path / "page.pdf").read_bytes()[:5] == b"%PDF-"


def test_no_text_of_a_run_becomes_an_element(whole: Path) -> None:
    page, elements = (whole / "report.html").read_text(), list[tuple[str, dict[str, str | None]]]()
    assert page.count("<script") == 2 == page.count("</script>") and "<!--" not in page
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: elements.append((tag, dict(attributes)))
    parser.feed(page)
    assert not [tag for tag, attributes in elements if {"onerror", "href"} & attributes.keys()]
    sources = {str(attributes["src"])[:11] for _, attributes in elements if "src" in attributes}
    assert sources == {"data:image/"} and "b" not in {tag for tag, attributes in elements if not attributes}


def test_what_is_missing_is_said_in_words(tmp_path: Path) -> None:
    run = make_run(tmp_path / "bare", [], 0, shards=str(tmp_path / "gone"))
    text = text_of(run)
    for words in (
        "Not finished; its newest checkpoint is of step 0 of 900.", "this run has not logged a step",
        "No preview was drawn", "No sample set was given", "have not been evaluated", "no such directory",
        "The run has not been started",
    ):  # fmt: skip
        assert words in text, words
    (run / "log.jsonl").write_text(
        '{"step": 5, "train/loss": 1.0}\n{"step": 6, "train/loss": NaN}\n[\nnull\n{"step": "x"}'
    )
    text = text_of(run)
    assert "There is no validation loss (data.val_shards" in text and "not evaluated during training (run.ev" in text


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("imported.json", {"source": "x"}, ("Imported: the weights come from", "what its network was trained")),
        ("FAILED.json", {"rank": 3, "host": "n2", "error": "shard 7 is gone"}, ("rank 3 on n2", "shard 7 is gone")),
        ("control/stopped.json", {"reason": "SIGTERM", "step": 7}, ("Not finished, stopped on request: SIGTERM;",)),
        ("control/lease-000002.json", {"host": "n9", "pid": 5}, ("held by process 5 on n9", "trained this run: 2;")),
        ("FAILED.json", ["damaged"], ("Not finished;",)),
        ("control/stopped.json", ["damaged"], ("Not finished;",)),
        ("control/starts.jsonl", {"time": "damaged"}, ("The run has not been started",)),
    ],
)  # fmt: skip
def test_the_state_of_a_run_is_a_sentence(tmp_path: Path, file: str, content: Any, words: tuple[str, ...]) -> None:
    run = make_run(tmp_path / "run", [], 0, shards=str(tmp_path / "gone"))
    (run / file).parent.mkdir(exist_ok=True)
    (run / file).write_text(json.dumps(content))
    text = text_of(run)
    assert all(word in text for word in words), text[:600]


def test_the_page_of_a_long_run_is_small(tmp_path: Path) -> None:
    log = [{"step": step, "time": 1.0, "train/loss": 1 / step, "train/lr": 1e-4} for step in range(1, 20_001)]
    run = make_run(tmp_path / "run", log, 60, shards="")
    data = data_of(run, previews=7)
    steps = [preview["step"] for preview in data["previews"]]
    assert len(steps) == 7 and (steps[0], steps[-1]) == (100, 6000)
    assert {len(line) for chart in data["charts"] for line in chart["lines"].values()} == {500}
    assert "7 of 60 previews" in text_of(run, previews=7)
    assert (run / "report.html").stat().st_size < 300_000


def test_a_large_preview_is_reduced_and_a_damaged_one_left_out(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run", [], 2, shards="")
    noise = np.random.default_rng(0).integers(0, 256, (1500, 1200, 3), np.uint8)
    Image.fromarray(noise).save(RunDir(str(run)).preview(100))
    Path(RunDir(str(run)).preview(200)).write_bytes(png(5)[:40])
    (preview,) = data_of(run)["previews"]
    assert preview["step"] == 100 and preview["image"].startswith("data:image/webp;base64,")
    assert "step_00000200.png is left out of the report" in capfd.readouterr().err


def test_samples_without_classes_are_one_sheet_and_lack_of_figures_is_said(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [], 0, shards="")
    text = text_of(run, samples=str(shards(tmp_path / "samples", None)))
    assert "the first 12 samples" in text and "not drawn by a checkpoint that this run has" in text
    assert "Nearest training images are not shown" in text and "have not been evaluated" in text


def test_classes_are_counted_as_left_out_only_where_they_are(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, samples = make_run(tmp_path / "run", [], 0, shards=""), shards(tmp_path / "samples", ("a", "b", "c", "d"))
    text_of(run, samples=str(samples))
    assert "classes are shown" not in capfd.readouterr().err
    monkeypatch.setattr("pipeline.report._ROWS", 2)
    text_of(run, samples=str(samples))
    assert f"{samples}: samples of 2 of 3 classes are shown\n" in capfd.readouterr().err


def test_a_page_that_replaces_a_file_is_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", [], 0, shards="")
    for start in (f"{run}/report.html: ", f"replaced {run}/report.html: "):
        with pytest.raises(SystemExit):
            main(["report", str(run)])
        assert capfd.readouterr().out.startswith(start)


def test_what_is_no_run_or_no_page_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [], 0, shards="")
    for request, message in (
        (ReportRequest(str(tmp_path / "gone")), "no such run: train it first"),
        (ReportRequest(str(run / "previews")), "is not a run"),
        (ReportRequest(str(run), out=str(tmp_path / "page.pdf")), r"give a name that ends in \.html"),
    ):
        with pytest.raises(ConfigError, match=message):
            report(request)
    (run / "config.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="is not the configuration of a run"):
        report(ReportRequest(str(run)))
