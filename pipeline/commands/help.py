"""The help of a command: `-h` fits a screen and has what most people need; `--help` explains every option."""

from __future__ import annotations

import re
from typing import Any

from typer.core import TyperCommand

from pipeline import messages

EXAMPLES = {
    "shard": (
        "ddpm shard photos --out shards/mine --size 64",
        "ddpm shard photos.zip --out shards/grey --size 96x64 --channels 1",
    ),
    "verify": ("ddpm verify shards/mine", "ddpm verify runs/mine --json"),
    "index": (
        "ddpm index webdataset --out shards/mine",
        "ddpm index 'tars/a-{000..099}.tar' --out shards/mine --size 64 --labels none",
    ),
    "train": (
        "ddpm train --config mine.yaml data.shards=shards/mine run.dir=runs/mine",
        "ddpm train --config runs/mine/config.yaml train.steps=100000 --dry-run",
    ),
    "sample": (
        "ddpm sample runs/mine --seeds 0-999 --out samples/mine --grid mine.png",
        "ddpm sample runs/mine --seeds 0-7 --grid cats.png --label 3 --guidance 2",
    ),
    "evaluate": (
        "ddpm evaluate samples/mine --against shards/mine --features inception",
        "ddpm evaluate runs/mine --likelihood shards/held-out",
    ),
    "report": ("ddpm report runs/mine", "ddpm report runs/mine --samples samples/mine --out mine.html"),
    "export": ("ddpm export runs/mine --out diffusers/mine", "ddpm export runs/mine --out last --no-ema"),
    "import": (
        "ddpm import diffusers/mine --out runs/imported",
        "ddpm import model.pt --out runs/imported --size 64 --head-channels 64",
    ),
    "plan": (
        "ddpm plan --config configs/64px.yaml --samples 50000 --gpu h100",
        "ddpm plan --config configs/128px.yaml --memory 24GiB train.global_batch=64",
    ),
    "doctor": ("ddpm doctor", "ddpm doctor --run runs/mine"),
    "show": ("ddpm show runs/mine", "ddpm show shards/mine --preview first.png"),
    "runs": ("ddpm runs", "ddpm runs s3://bucket/runs --json"),
    "init": ("ddpm init", "ddpm init experiments"),
}
"""Two commands for each job."""

RARE = {
    "shard": {"image_ext", "max_bad_fraction", "min_size", "background", "features", "pad", "overwrite", "preview",
              "dedupe"},
    "index": {"image_ext", "max_bad_fraction", "channels"},
    "sample": {
        "eta", "spacing", "variance", "compile", "guidance_interval", "dynamic_threshold", "guide", "shard_samples",
        "batch", "trajectory", "from_image", "strength", "interpolate", "best", "ema", "ema_length", "size", "precision", "video",
    },
    "evaluate": {"cache", "log", "ema"},
    "import": {"attention_order", "rescale_timesteps", "variance", "clip"},
}  # fmt: skip
"""Options that `-h` only names."""

_TYPES = {r" <(?:list\[)?(?:str|text)\]?>": "", " <int(?: range)?>": " N", " <float(?: range)?>": " X", "<(.+)>": r"\1"}
_RANGE = re.compile(r"(?:; )?-?[\d.]*(?:<=?)?x[<>]=?[\d.]+")
_SENTENCE = re.compile(r"(?<=[^.]\.) (?=[A-Z`])")
_BRACKETS = re.compile(r"  \[[^\[\]]*\]$")
_COLUMN = 25


class Command(TyperCommand):
    """A command with a short help, `-h`, and a full one, `--help`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the words of a command line; `-h` alone among the options shows the short help."""
        if "-h" in args and not ctx.resilient_parsing:
            messages.summary(self.short_help_of(ctx))
            ctx.exit()
        return super().parse_args(ctx, args)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Usage, what the command does, two examples, and all options in full."""
        self._write(ctx, formatter, rare=True)

    def short_help_of(self, ctx: Any) -> str:
        """The same with the common options only, each with its first sentence."""
        formatter = ctx.make_formatter()
        self._write(ctx, formatter, rare=False)
        return str(formatter.getvalue()).rstrip("\n")

    def _write(self, ctx: Any, formatter: Any, *, rare: bool) -> None:
        shown = [(p, record) for p in self.get_params(ctx) if (record := p.get_help_record(ctx))]
        required = [_names(record[0]) for p, record in shown if p.required]
        formatter.write_usage(ctx.command_path, " ".join([*required, "[OPTIONS]"]))
        self.format_help_text(ctx, formatter)
        with formatter.section("Examples"):
            for example in EXAMPLES[str(self.name)]:
                formatter.write(f"  {example}\n")
        hidden = set() if rare else RARE.get(str(self.name), set())
        rows, names = [], []
        for parameter, record in shown:
            if parameter.name in hidden:
                names.append(parameter.opts[0])
            else:
                text = record[1] if rare else _first_sentence(record[1])
                rows.append((_names(record[0]), text.replace("  [required]", "")))
        with formatter.section("Options"):
            formatter.write_dl(rows, col_max=_COLUMN, col_spacing=2)
        if names:
            formatter.write_paragraph()
            formatter.write_text(f"More options, which --help explains: {', '.join(names)}.")


def _names(text: str) -> str:
    """The names of an option with what it takes, in short: `--steps N`."""
    for pattern, short in _TYPES.items():
        text = re.sub(pattern, short, text)
    return text


def _first_sentence(text: str) -> str:
    """The first sentence of a help text, and the default that is appended in brackets, without the allowed range."""
    brackets = _BRACKETS.search(text)
    body = text[: brackets.start()] if brackets else text
    default = _RANGE.sub("", brackets[0]) if brackets else ""
    return _SENTENCE.split(body)[0] + default.replace("  []", "")
