"""Job: run → a directory that `diffusers.DDPMPipeline.from_pretrained` loads, with a model card and samples."""

from __future__ import annotations

from typing import Any

from pipeline import messages
from pipeline.checkpoints.run_dir import RunDir
from pipeline.config import Config
from pipeline.diffusion.process import DiffusionProcess
from pipeline.errors import ConfigError
from pipeline.evaluation import evaluation_file
from pipeline.model import diffusers_directory, interchange
from pipeline.model.scheduler_config import scheduler_config
from pipeline.sampling import pretrained
from pipeline.sampling.model_card import model_card
from pipeline.storage import files


def export(source: str, out: str, *, ema: bool = True, samples: str | None = None) -> dict[str, Any]:
    """Write a trained model for `diffusers`.

    Args:
        source: a run, or one of its checkpoints.
        out: the directory to write, missing or empty. It appears complete or not at all.
        ema: export the averaged weights, or those of the last training step.
        samples: a sample set of this model, whose figures the model card shows.

    Returns:
        `out`, `parameters`, `weights`, `samples` and `figures`: whether the card has them.

    Raises:
        ConfigError: `out` holds something, `source` does not exist, or diffusers cannot express its network.
        DataError: files are damaged, or `out` cannot be written.
        NoCheckpoint: the run holds no valid checkpoint.
    """
    if files.exists(out) and (not files.is_dir(out) or files.listdir(out)):
        raise ConfigError(f"--out {out} exists and is not empty: give a new directory")
    model = pretrained.read(source, ema=ema)
    pretrained.check_weights(model, source)
    config, run = model.config, _run_of(source)
    unet = interchange.diffusers_config(config.model, config.data.channels, config.data.height_width)
    if model.class_names:
        unet["id2label"] = {str(number): name for number, name in enumerate(model.class_names)}
    evaluation = evaluation_file.read(samples or run.path, messages.warning, "the model card shows no figures")
    if samples and evaluation is None:
        raise ConfigError(
            f"--samples {samples} has no {evaluation_file.NAME}: make it with `ddpm evaluate {samples}`, or leave it"
        )
    preview = run.newest_preview()
    weights = "the averaged weights (EMA)" if ema else "the last weights, not averaged,"
    if project := model.state.get("imported"):
        weights += f" of a model of {project}"
    elif "step" in model.state:
        weights += f" of step {model.state['step']:,}"
    card = model_card(
        files.local(out).name or out,
        config,
        weights=weights,
        state=model.state,
        class_names=model.class_names,
        evaluation=evaluation,
        has_samples=preview is not None,
    )
    with files.publishing_dir(out) as directory:
        files.write_bytes(files.join(directory, "README.md"), card.encode())
        if preview:
            files.write_bytes(files.join(directory, "samples.png"), files.read_bytes(preview))
        diffusers_directory.write(directory, unet, _scheduler(config), interchange.to_diffusers(model.weights))
    return {
        "out": out,
        "parameters": sum(tensor.numel() for tensor in model.weights.values()),
        "weights": "ema" if ema else "model",
        "samples": preview is not None,
        "figures": evaluation is not None,
    }


def _run_of(source: str) -> RunDir:
    """The run that `source` is, or that the checkpoint `source` lies in."""
    is_checkpoint = files.exists(files.join(source, "manifest.json"))
    return RunDir(source.rstrip("/").rpartition("/checkpoints/")[0] or source if is_checkpoint else source)


def _scheduler(config: Config) -> dict[str, Any]:
    betas = DiffusionProcess.of(config.diffusion).schedule.betas.tolist()
    variance = config.model.reverse_variance(config.sample.variance)
    return scheduler_config(config.diffusion, betas, variance, clip=config.sample.clip)
