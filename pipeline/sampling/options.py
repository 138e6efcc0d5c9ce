"""What a sampling job is asked for, and the options that follow from it, from the begun sample set and from the run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from pipeline import config_file, messages
from pipeline.config import Config, SamplingOptions
from pipeline.data.images import video
from pipeline.data.shards.sample_set import Format
from pipeline.data.sources.labels import class_names
from pipeline.diffusion.spacing import SAMPLER_KEYS, best_sampler
from pipeline.errors import ConfigError
from pipeline.model.posthoc_ema import check_length
from pipeline.sampling.generator import Generator
from pipeline.sampling.image_start import check_strength
from pipeline.solvers import SAMPLERS
from pipeline.storage import files

DEFAULT_STRENGTH = 0.5
SHARDS, SHARD_BATCHES, SHARD_SAMPLES = 64, 4, 1024
"""By default a set has about this number of shards, each with at most this number of batches and of seeds."""


@dataclass(frozen=True)
class SamplingRequest:
    """What one `ddpm sample` command asks for."""

    source: str
    """A run, a checkpoint or a diffusers directory."""
    seeds: tuple[range, ...]
    options: dict[str, Any] = field(default_factory=dict)
    """Keys of `SamplingOptions` that are given; all others come from the begun sample set or from the run."""
    out: str | None = None
    """Directory or URL of the sample set."""
    format: Format = "tar"
    shard_samples: int | None = None
    """Seeds in a shard, a multiple of the batch; None: as in the begun set, else chosen by the number of seeds."""
    grid: str | None = None
    """PNG file for a sheet of the first images."""
    video: str | None = None
    """MP4, GIF or WebP file for a video of the denoising."""
    trajectory: str | None = None
    """PNG file for a sheet of the first seeds from noise to image."""
    from_image: str | None = None
    """Image file to start from instead of noise alone."""
    strength: float | None = None
    """Share of the noise added to this image; default: `DEFAULT_STRENGTH`."""
    interpolate: int | None = None
    """Draw this number of images between the two seeds instead of the seeds themselves."""
    ema: bool = True
    """Use the averaged weights."""
    ema_length: float | None = None
    """Length σ_rel of an average to use instead of the run's own."""
    guide: str | None = None
    """A worse model, for autoguidance."""

    @property
    def images(self) -> int:
        """Number of images."""
        return sum(map(len, self.seeds))

    def check_outputs(self) -> None:
        """Check that there is an output, and that each but the sample set is a file outside of it.

        Raises:
            ConfigError: an output is missing or unsuitable.
        """
        if not (self.out or self.grid or self.video or self.trajectory):
            raise ConfigError("nothing to write: give --out SAMPLES, --grid FILE.png or --video FILE.mp4")
        for path in (self.grid, self.video, self.trajectory):
            if path and self.out and path.startswith(self.out.rstrip("/") + "/"):
                raise ConfigError(f"{path} lies in the sample set {self.out}: give a path outside of it")
            if path and files.is_dir(path):
                raise ConfigError(f"{path} is a directory: give a file")
        for name, sheet in (("grid", self.grid), ("trajectory", self.trajectory)):
            if sheet and not sheet.lower().endswith(".png"):
                raise ConfigError(f"--{name} {sheet}: the image is a PNG: give a name that ends in .png")
        if self.trajectory and self.trajectory == self.grid:
            raise ConfigError(f"--grid and --trajectory are both {self.grid}: give two files")
        if self.video:
            video.check(self.video)

    def check_start(self) -> None:
        """Check the weights, and what the images start from.

        Raises:
            ConfigError: a length or strength is out of range or changes nothing, or an interpolation is not possible.
        """
        if self.ema_length is not None:
            check_length(self.ema_length, "--ema-length")
            if not self.ema:
                raise ConfigError("--no-ema and --ema-length cannot both be set: remove one")
        if self.strength is not None:
            check_strength(self.strength)
            if not self.from_image:
                raise ConfigError("--strength changes nothing without an image: add --from IMAGE, or leave it out")
        if self.interpolate is None:
            return
        if self.out:
            raise ConfigError(
                "--interpolate: the images between two seeds belong to no seed, and a sample set holds one image for "
                "each: leave out --out, and give --grid FILE.png or --video FILE.mp4"
            )
        if self.trajectory:
            raise ConfigError(
                "--trajectory shows seeds, and --interpolate draws images between them: remove one of them"
            )
        if self.images != 2:
            raise ConfigError(f"--interpolate takes two seeds, not {self.images}: write --seeds A,B")


def choose(
    request: SamplingRequest, generator: Generator, begun: dict[str, Any], *, quiet: bool
) -> tuple[SamplingOptions, int]:
    """The options of a request, with a value for each one, and the seeds in a shard.

    Args:
        request: what is asked for.
        generator: the trained network.
        begun: provenance of the sample set that an earlier command began; empty if there is none.
        quiet: print warnings only.

    Raises:
        ConfigError: an option has no effect, or the model cannot do what is asked.
    """
    given, model = with_label_number(request.options, generator), generator.config.model
    options = merge(generator.config, given, begun, quiet=quiet)
    if "guidance" not in given and not generator.guide_sha256 and not (model.num_classes and model.label_dropout):
        options = options.model_copy(update={"guidance": 1.0})
    _check_effects(generator, given, options)
    if request.shard_samples and "batch" not in given and request.shard_samples % options.batch:
        batch = max(size for size in range(1, options.batch + 1) if request.shard_samples % size == 0)
        messages.warning(
            f"batches of {batch} instead of {options.batch}, to fit --shard-samples {request.shard_samples}: the last "
            "bits of the images may differ"
        )
        options = options.model_copy(update={"batch": batch})
    shard_samples = request.shard_samples or default_shard_samples(
        request.images, options.batch, begun.get("shard_samples")
    )
    _check_size(generator.config, options)
    _check_no_noise(request, options)
    _check_guidance(generator, options)
    _check_steps(generator.config.diffusion.timesteps, options)
    if shard_samples % options.batch:
        raise ConfigError(
            f"--shard-samples {shard_samples} is no multiple of --batch {options.batch}: change one of them"
        )
    return generator.resolved(options), shard_samples


def with_label_number(given: dict[str, Any], generator: Generator) -> dict[str, Any]:
    """The given options with the number of the class that `label` names; a text of digits is a number.

    Raises:
        ConfigError: the model is unconditional or has no such class; the message lists its classes.
    """
    if (label := given.get("label")) is None:
        return given
    count, text = generator.config.model.num_classes, str(label)
    if not count:
        raise ConfigError("--label needs a class-conditional model, this one is unconditional: leave it out")
    names = generator.class_names or class_names.numbers(count)
    number = int(text) if text.isascii() and text.isdecimal() else class_names.find(names, [text])[0]
    if number is None or number >= count:
        raise ConfigError(f"--label {text}: this model knows the classes {class_names.numbered(names, text)}")
    return given | {"label": number}


def merge(config: Config, given: dict[str, Any], begun: dict[str, Any], *, quiet: bool) -> SamplingOptions:
    """The options of the run, replaced by those of the begun set, replaced by the given ones.

    A begun set is continued with its own options, whatever the defaults are now. A sampler given by name starts from
    its own steps and spacing. Steps given alone select the best sampler for this number of steps.
    """
    given = _validated(given).model_dump(include=set(given))
    values, steps = config.sample.model_dump(), given.get("steps")
    if "sampler" in begun:
        recorded = {key: begun.get(key) for key in ("sampler", *SAMPLER_KEYS)}
        if any(given.get(key, recorded[key]) != recorded[key] for key in ("sampler", "steps", "spacing")):
            recorded["timesteps"] = None
        return _validated(values | recorded | given)
    defaults = {key: getattr(SamplingOptions(), key) for key in SAMPLER_KEYS}
    if "sampler" in given:
        values |= defaults
    elif steps and steps < config.diffusion.timesteps and not {"eta", "variance"} & given.keys():
        values |= defaults | {"sampler": best_sampler(steps)}
        if not quiet:
            messages.info(f"--steps {steps}: using {values['sampler']}, the best sampler for this number of steps")
    elif {"steps", "spacing"} & given.keys():
        values["timesteps"] = None
    return _validated(values | given)


def _validated(values: dict[str, Any]) -> SamplingOptions:
    try:
        return SamplingOptions.model_validate(values)
    except ValidationError as error:
        lines = [
            f"--{key.replace('_', '-')} {values[key]}: {config_file.in_words(problems)}"
            if key in SamplingOptions.model_fields
            else f"--{key}: unknown option; {config_file.did_you_mean(key, SamplingOptions.model_fields)}"
            for (key,), problems in config_file.problems_of(error, 1).items()
        ]
        raise ConfigError("\n".join(lines)) from None


def default_shard_samples(images: int, batch: int, begun: int | None) -> int:
    """Seeds in a shard: as in the begun set, else so that many processes can share the work, however many there are."""
    if begun and begun % batch == 0:
        return begun
    return batch * max(1, min(images // batch // SHARDS, SHARD_BATCHES, SHARD_SAMPLES // batch))


def _check_effects(generator: Generator, given: dict[str, Any], options: SamplingOptions) -> None:
    """Refuse given options that would change nothing."""
    if "variance" in given and generator.config.model.learned_variance:
        raise ConfigError("--variance: this model has learned its variance: leave it out")
    for name in sorted(SAMPLERS):
        for key in given.keys() & set(SAMPLERS[name].options) - set(SAMPLERS[options.sampler].options):
            raise ConfigError(f"--{key} is for {name}, and the sampler is {options.sampler}: add --sampler {name}")
    if generator.guide_sha256 and given.get("guidance", 1) == 1:
        raise ConfigError("--guide changes nothing without a strength: give --guidance W, such as 1.7")
    if "guidance_interval" in given and options.guidance == 1:
        raise ConfigError("--guidance-interval changes nothing without guidance: give --guidance W, or leave it out")


def _check_no_noise(request: SamplingRequest, options: SamplingOptions) -> None:
    """Refuse to interpolate with a sampler that adds noise in its steps."""
    noisy = options.sampler == "ddpm" or ("eta" in SAMPLERS[options.sampler].options and options.eta > 0)
    if request.interpolate and noisy:
        raise ConfigError(
            f"--interpolate: the sampler {options.sampler} adds noise in each step, which belongs to one seed: add "
            "--sampler dpmpp, heun, or ddim with --eta 0"
        )


def _check_size(config: Config, options: SamplingOptions) -> None:
    model, data = config.model, config.data
    height, width = options.height_width or data.height_width
    if height % model.stride or width % model.stride:
        raise ConfigError(f"--size {height}x{width}: this network draws multiples of {model.stride} pixels: change it")
    if (height, width) != data.height_width:
        messages.warning(
            f"trained at {data.height_width[0]}x{data.height_width[1]}, drawing at {height}x{width}: expect "
            "repeated or broken shapes"
        )


def _check_guidance(generator: Generator, options: SamplingOptions) -> None:
    """Refuse a label or guidance that this model cannot have."""
    model = generator.config.model
    if options.label is not None and options.label >= model.num_classes:  # of the run's configuration, or a begun set
        known = f"the classes 0 to {model.num_classes - 1}" if model.num_classes else "no classes"
        raise ConfigError(f"sample.label is {options.label}, and this model knows {known}: give --label one of these")
    if options.guidance == 1.0 or generator.guide_sha256:
        return
    if not model.num_classes:
        raise ConfigError(
            "--guidance needs a class-conditional model, this one is unconditional: leave it out, or give a "
            "worse model, such as an earlier checkpoint, with --guide"
        )
    if not model.label_dropout:
        raise ConfigError(
            "--guidance: no label of this model was trained to mean no class (model.label_dropout=0; the "
            "config.json of a diffusers model gives _label_dropout where its last class was), so it cannot be "
            "guided by its label: leave it out, or give a worse model, such as an earlier checkpoint, with --guide"
        )


def _check_steps(timesteps: int, options: SamplingOptions) -> None:
    """Refuse timesteps that this model does not have."""
    interval = options.guidance_interval
    if interval and not interval[0] <= interval[1] < timesteps:
        raise ConfigError(
            f"--guidance-interval {interval[0]}-{interval[1]}: this model has the timesteps 0 to {timesteps - 1}: "
            "give FIRST-LAST within them"
        )
    if options.timesteps and options.timesteps[0] >= timesteps:
        raise ConfigError(f"sample.timesteps: {options.timesteps[0]} is not one of this model's {timesteps} timesteps")
    if (options.steps or 0) > timesteps:
        raise ConfigError(
            f"--steps {options.steps}: this model has {timesteps} timesteps: give at most that many steps"
        )


def provenance(generator: Generator, options: SamplingOptions, format: Format, shard_samples: int) -> dict[str, Any]:
    """Everything that decides how the image of a seed looks and where it is stored; written into the sample set."""
    known = {
        "checkpoint_sha256": generator.sha256,
        "weights": "ema" if generator.ema else "model",
        "sampler": options.sampler,
        "steps": options.steps,
        "eta": options.eta,
        "spacing": options.spacing,
        "variance": generator.variance(options),
        "guidance": options.guidance,
        "label": options.label,
        "batch": options.batch,
        "precision": options.precision,
        "size": list(options.height_width or ()),
        "format": format,
        "shard_samples": shard_samples,
    }
    # Sets of version 0.1 lack these keys and may be continued. Its spacings need no list of timesteps.
    by_formula = options.spacing in ("uniform", "quadratic", "trailing", "leading")
    later = {
        "compile": options.compile or None,
        "timesteps": None if by_formula else list(options.timesteps or ()),
        "max_step_ratio": options.max_step_ratio if "max_step_ratio" in SAMPLERS[options.sampler].options else None,
        "guidance_interval": list(options.guidance_interval or ()) or None if options.guidance != 1 else None,
        "dynamic_threshold": options.dynamic_threshold,
        "guide_sha256": generator.guide_sha256,
        "ema_length": generator.ema_length,
        "from_sha256": generator.start.sha256 if generator.start else None,
        "strength": generator.start.strength if generator.start else None,
    }
    return known | {key: value for key, value in later.items() if value is not None}
