"""The README.md of an exported model: a model card as the Hugging Face Hub reads it. Pure text.

Its head is YAML, for the Hub's search. The licence is left to the user: it depends on the images.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from pipeline.config import Config
from pipeline.errors import printable

_SECTIONS = ("data", "model", "diffusion", "train", "sample")
_OF_THE_MODEL = ("model", "diffusion", "sample")
"""The sections that a model from elsewhere tells."""
_PLACES = {("data", "shards"), ("data", "val_shards"), ("train", "init_from")}  # on the machine that trained
_MARKDOWN = re.compile(r"([\\`*_\[\]<>|#])")
_MANY = 20


def model_card(
    name: str,
    config: Config,
    *,
    weights: str,
    state: Mapping[str, Any],
    class_names: Sequence[str] | None,
    evaluation: Mapping[str, Any] | None,
    has_samples: bool,
) -> str:
    """The card.

    Args:
        name: of the model.
        config: its configuration.
        weights: which ones are exported, in words.
        state: the state.json of its checkpoint; {} for a model from elsewhere.
        class_names: by number; None for an unconditional model, or one whose classes are not named.
        evaluation: what `ddpm evaluate --json` prints; None if there is none.
        has_samples: whether samples.png lies beside the card.
    """
    height, width = config.data.height_width
    task = "unconditional-image-generation"
    values = {"library_name": "diffusers", "pipeline_tag": task, "tags": [task, "ddpm", "diffusion"]}
    head = yaml.safe_dump(values, sort_keys=False)
    kind = f"class-conditional ({config.model.num_classes} classes)" if config.model.num_classes else "unconditional"
    parts = [
        f"---\n{head}# license: name it here; it depends on the images\n---\n",
        f"# {_escaped(name)}\n",
        f"A DDPM ([Ho et al. 2020](https://arxiv.org/abs/2006.11239)) that draws images of {height}x{width} pixels, "
        f"{kind}; exported by ddpm-pipeline from {weights}.\n",
        "![Samples](samples.png)\n" if has_samples else "",
        _usage(config),
        _data(config, state, class_names),
        _figures(evaluation),
        _configuration(config, _SECTIONS if state and "imported" not in state else _OF_THE_MODEL),
    ]
    return "\n".join(part for part in parts if part)


def _usage(config: Config) -> str:
    steps, channels = config.diffusion.timesteps, config.data.channels
    load = 'from diffusers import DDPMPipeline\n\npipeline = DDPMPipeline.from_pretrained("DIR")\n'
    if not config.model.num_classes:
        return f"## How to use\n```python\n{load}image = pipeline(num_inference_steps={steps}).images[0]\n```\n"
    height, width = config.data.height_width
    return (
        "## How to use\nThe pipeline of diffusers gives no classes to the network, so call its parts; the last row "
        f"of the class embedding, {config.model.num_classes}, stands for no class:\n"
        f"```python\nimport torch\n{load}"
        f"labels, x = torch.tensor([0]), torch.randn(1, {channels}, {height}, {width})\n"
        f"pipeline.scheduler.set_timesteps({steps})\n"
        "with torch.no_grad():\n"
        "    for t in pipeline.scheduler.timesteps:\n"
        "        x = pipeline.scheduler.step(pipeline.unet(x, t, class_labels=labels).sample, t, x).prev_sample\n```\n"
    )


def _data(config: Config, state: Mapping[str, Any], class_names: Sequence[str] | None) -> str:
    rows: dict[str, Any] = {"size": "{}x{}".format(*config.data.height_width), "channels": config.data.channels}
    if config.data.shards:
        rows["shard set"] = config.data.shards.rstrip("/").rpartition("/")[2]
    if "data_samples" in state:
        rows |= {"images": f"{state['data_samples']:,}", "sha256 of the index": state.get("data_sha256")}
    if class_names:
        more = f", … ({len(class_names)} in all)" if len(class_names) > _MANY else ""
        rows["classes"] = ", ".join(class_names[:_MANY]) + more
    if "step" in state and "imported" not in state:
        rows["steps of training"] = f"{state['step']:,} of {config.train.global_batch} images"
    return "## Data and training\n" + _table(("what", "value"), rows.items())


def _figures(evaluation: Mapping[str, Any] | None) -> str:
    figures = (evaluation or {}).get("figures")
    if evaluation is None or not isinstance(figures, dict):
        return ""
    rows = []
    for figure, value in figures.items():
        if isinstance(value, dict) and isinstance(value.get("value"), int | float):
            low, high = value.get("low"), value.get("high")
            interval = (
                f"{low:.4g} to {high:.4g}" if isinstance(low, int | float) and isinstance(high, int | float) else ""
            )
            rows.append((str(figure).replace("_", " "), f"{value['value']:.4g}", interval))
    if not rows:
        return ""
    hashes = [f"{key.replace('_', ' ')} {evaluation[key]}" for key in ("features_sha256", "reference_sha256")
              if evaluation.get(key)]  # fmt: skip
    count = f"{evaluation['n']:,} samples; " if isinstance(evaluation.get("n"), int) else ""
    return (
        "## Figures\n"
        + _table(("figure", "value", "95 % interval"), rows)
        + f"\nBy `ddpm evaluate`, of {count}{_escaped('; '.join(hashes))}.\n"
    )


def _configuration(config: Config, sections: Sequence[str]) -> str:
    values = config.model_dump(mode="json")
    rows = [
        (f"{section}.{key}", value)
        for section in sections
        for key, value in values[section].items()
        if (section, key) not in _PLACES
    ]
    return "## Configuration\n" + _table(("key", "value"), rows)


def _table(head: Sequence[str], rows: Any) -> str:
    lines = [head, ["---"] * len(head), *([_escaped(str(cell)) for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _escaped(text: str) -> str:
    """Text that Markdown shows as it is: names of classes and figures come from files."""
    return _MARKDOWN.sub(r"\\\1", printable(text, 600))
