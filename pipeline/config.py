"""Every setting of a run, typed and validated, in one frozen `Config`. Pure.

The docstring under a field is its only documentation; `configs/config.schema.json` carries it to editors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from pipeline.errors import ConfigError
from pipeline.model_section import FixedVariance as FixedVariance  # noqa: PLC0414  for the users of this module
from pipeline.model_section import ModelSection as ModelSection  # noqa: PLC0414
from pipeline.model_section import Section
from pipeline.solvers import SamplerName, Spacing
from pipeline.units import Bytes, Duration, EpochCounter, Length, PositiveLength, Size

MAX_EMA_LENGTH = 0.28
"""Largest σ_rel of a power-function average; that of a constant profile is 0.289."""
EmaLength = Annotated[float, Field(ge=0.005, le=MAX_EMA_LENGTH)]


class DataSection(Section):
    """Which data is read, and in which order."""

    shards: str = ""
    """Shard set to train on: a directory or an fsspec URL that `ddpm shard` has written."""
    val_shards: str | None = None
    """Shard set for the validation loss. Default: no validation."""
    size: Size = 32
    """Height and width of the images in pixels; one number for squares. Must equal the size in the shard set."""
    channels: Literal[3, 1] = 3
    """3 for color, 1 for grey. Must equal the channels in the shard set."""
    flip: bool = False
    """Mirror a random half of the images, a different half in each epoch."""
    lanes: PositiveInt | None = None
    """Number of parallel streams of data. It must divide the global batch, and every world size must divide it.
    Default: the largest divisor of the global batch up to 64."""
    window: PositiveInt = 256
    """Size of the shuffle buffer of a lane, in samples: shuffling moves a sample at most this far."""
    workers: NonNegativeInt = 2
    """Loader processes of each rank; 0: the training process reads. The order of the data does not depend on it."""
    cache: str | None = None
    """Directory on a disk of the node in which its processes keep what they have read of a remote shard set, for later
    epochs and starts. Default: none."""
    cache_limit: Bytes = 64 * 2**30
    """Size of this directory at most, in bytes, or as 500GiB. A set that is larger is read from the store in part."""

    @property
    def height_width(self) -> tuple[int, int]:
        """The images' (height, width) in pixels."""
        return self.size if isinstance(self.size, tuple) else (self.size, self.size)


class DiffusionSection(Section):
    """The forward process, and what the network predicts."""

    timesteps: Annotated[int, Field(ge=2, lt=2**24)] = 1000
    """Number of noise levels, T."""
    schedule: Literal["linear", "cosine"] = "linear"
    """Noise schedule: linear of Ho et al. 2020, or cosine of Nichol & Dhariwal 2021."""
    log_snr_shift: Annotated[float, Field(ge=-12, le=12)] = 0.0
    """Added to the log-SNR of every timestep: 2 ln(64/size) keeps the noise of 64 px at other sizes, -1.39 at 128 px
    (Hoogeboom et al. 2023, arXiv:2301.11093)."""
    log_snr_min: Annotated[float, Field(le=-6)] | None = None
    """Lowest log-SNR, that of the last timestep; a schedule that goes lower is stretched. Cosine ends at -20, where
    min_snr leaves the network almost untrained; -9 is the largest noise of Karras et al. 2022 (σ about 80)."""
    prediction_type: Literal["epsilon", "sample", "v_prediction"] = "epsilon"
    """What the network predicts: the noise ε (epsilon), the clean image x₀ (sample), or the velocity v."""
    loss_weighting: Literal["simple", "min_snr", "soft_min_snr", "sigmoid", "hybrid", "vlb"] = "simple"
    """Weight of a timestep in the loss. simple: 1 (Ho et al. 2020, eq. 14); min_snr: min-SNR-γ (Hang et al. 2023);
    soft_min_snr: γ SNR/(SNR + γ) for x₀ (Crowson et al. 2024); sigmoid: sigmoid(b - log SNR) for ε, uniform in log SNR
    (VDM++, Kingma & Gao 2023; SiD2, Hoogeboom et al. 2024); hybrid, vlb: L_simple + 0.001 L_vlb, or L_vlb alone, with
    learned variance (Nichol & Dhariwal 2021)."""
    min_snr_gamma: PositiveFloat = 5.0
    """γ of min_snr and soft_min_snr."""
    sigmoid_bias: float = -1.0
    """b of sigmoid. A lower value gives noisy timesteps more weight; SiD2 uses -1 to -3, lower for larger images."""


class TrainSection(Section):
    """How a run spends its compute. A step is one update by one global batch."""

    steps: PositiveLength = 800_000
    """Length of the whole run including restarts, in steps or epochs (50ep). It may grow later, also after DONE."""
    global_batch: PositiveInt = 128
    """Images in a step, summed over all ranks: the same on 1 GPU and on 64."""
    micro_batch: PositiveInt | Literal["auto"] = "auto"
    """Images in one pass of a rank through the network. auto: the largest number that fits, found once and stored."""
    lr: PositiveFloat = 2e-4
    """Learning rate of Adam."""
    lr_schedule: Literal["constant", "cosine"] = "constant"
    """After the warm-up: constant, or a half cosine to 0 at train.steps."""
    lr_stages: tuple[tuple[PositiveLength, PositiveFloat], ...] = ()
    """[[length, rate], …]: each rate for this number of steps or epochs, the last one until the end. Replaces lr."""
    warmup_steps: Length = 5000
    """Linear warm-up from 0, in steps or epochs."""
    clip_norm: PositiveFloat = 1.0
    """Largest total norm of the gradients; larger ones are scaled down to it."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Autocast of the network. Schedule, loss, statistics, weights, optimizer and EMA are always float32."""
    checkpointing: Literal["none", "attention", "blocks", "full", "auto"] = "none"
    """Activations to recompute in the backward pass instead of storing them. attention: attention and the cheap layers
    before each convolution; blocks: also convolutions of a block; full: also resampling; auto: the least that fits."""
    compile: bool = False
    """Compile the network's blocks with torch.compile."""
    fused_norm: bool = False
    """Train with GroupNorm, scale, shift and SiLU as one operation, in Triton kernels. CUDA only. Not measured on a GPU
    yet."""
    gradient_compression: Literal["none", "bf16"] = "none"
    """bf16: ranks exchange and sum gradients in bf16: half the bits, for slow connections between ranks."""
    deterministic: bool = False
    """Use deterministic kernels only: slower, but needed for bit-identical runs on CUDA."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.9999
    """Decay of the averaged weights (EMA) after their warm-up."""
    ema_device: Literal["same", "cpu"] = "same"
    """Device of the averaged weights: same as the model, or cpu (8 bytes a weight) to save GPU memory. The CPU updates
    them while the GPU computes the next gradient; their last bits may differ."""
    ema_lengths: Annotated[tuple[EmaLength, ...], Field(min_length=1)] = (0.05, 0.1)
    """Lengths σ_rel of the power-function averages that run.ema_snapshot_every stores, relative to the run (Karras et
    al. 2024, arXiv:2312.02696)."""
    init_from: str | None = None
    """Start a new run from the EMA weights of a run, a checkpoint or a diffusers directory."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA if it is available, else the CPU."""
    seed: Annotated[int, Field(ge=0, lt=2**64)] = 0
    """Seed of the initial weights, data order, timesteps, noise and dropout."""
    max_bad_steps: PositiveInt = 10
    """The run fails after this number of consecutive steps with a non-finite loss or gradient; such a step changes no
    weights. The run also fails before it saves weights that give no finite loss."""


class SamplingOptions(Section):
    """How images are drawn; all keys but timesteps, max_step_ratio and clip are also options of `ddpm sample`."""

    sampler: SamplerName = "ddpm"
    """Sampling method: ancestral DDPM, DDIM, DPM-Solver++ of order 2 (dpmpp) or 3 (dpmpp3m), or Heun. `ddpm sample
    --steps N` alone takes the best one for N steps."""
    steps: PositiveInt | None = None
    """Steps of the sampler. Default: every timestep for ddpm, 50 for ddim, 25 for the others."""
    eta: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Noise of ddim, η: 0 is deterministic, 1 adds as much noise as ddpm."""
    spacing: Spacing = "auto"
    """Which timesteps the sampler visits. auto: the best spacing for the sampler."""
    timesteps: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)] | None = None
    """The timesteps to visit, descending, instead of steps and spacing."""
    max_step_ratio: PositiveFloat | None = 2.0
    """dpmpp and dpmpp3m take a step with order 1 if it is longer than the previous one by this factor; null: never."""
    variance: FixedVariance = "fixed_large"
    """Variance of a ddpm step: β (fixed_large), or the variance of the posterior (fixed_small). A model with learned
    variance uses its own."""
    guidance: NonNegativeFloat = 1.0
    """Strength of guidance, by the label or by another model. 1: no guidance; larger: closer to the label."""
    guidance_interval: tuple[NonNegativeInt, NonNegativeInt] | None = None
    """First and last timestep with guidance (Kynkäänniemi et al. 2024, arXiv:2404.07724). Default: all timesteps."""
    clip: bool = True
    """Clip estimates of the clean image to [-1, 1] at each step, as in the paper's code."""
    dynamic_threshold: Annotated[float, Field(gt=0, le=1)] | None = None
    """Before clipping, divide x₀ by this quantile of its absolute values, such as 0.995, if that is above 1; for strong
    guidance (Saharia et al. 2022, arXiv:2205.11487). Default: only clip."""
    batch: PositiveInt = 64
    """Images in one batch. The last bits of an image depend on the batch size."""
    precision: Literal["bf16", "fp32"] | None = None
    """Number format of the network. Default: as trained."""
    label: NonNegativeInt | None = None
    """Class of all images, by number from 0; `ddpm sample --label` takes its name, too. Default: seed modulo the number
    of classes."""
    size: Size | None = None
    """Height and width of the images in pixels. Default: as trained."""
    compile: bool = False
    """Compile the network's blocks with torch.compile, except for previews. This changes the last bits of images: draw
    all images of a sample set with it or all without it. On a GPU the bits may also differ between processes."""

    @property
    def height_width(self) -> tuple[int, int] | None:
        """(height, width) in pixels, if given."""
        return (self.size, self.size) if isinstance(self.size, int) else self.size


class RunSection(Section):
    """Where a run is stored and how often it saves, previews, validates and logs."""

    dir: str = ""
    """Directory of the run. The same command with the same directory resumes from the newest checkpoint."""
    checkpoint_every: PositiveLength = 5000
    """Steps between checkpoints."""
    keep_last: Annotated[int, Field(ge=2)] = 3
    """Number of newest checkpoints to keep."""
    keep_every: Length = 0
    """Checkpoints at multiples of this step are kept forever; 0: only the newest checkpoints are kept."""
    ema_snapshot_every: Length = 0
    """Steps between snapshots of the averages of train.ema_lengths; `ddpm sample --ema-length` computes an average of
    another length from them. Use at least 16 snapshots in a run. 0: none; a run cannot turn them on later."""
    preview_every: Length = 5000
    """Steps between preview grids, drawn with EMA weights from fixed seeds; 0: no previews."""
    preview_samples: PositiveInt = 64
    """Images in a preview grid."""
    preview_steps: PositiveInt = 50
    """DDIM steps of a preview."""
    val_every: Length = 5000
    """Steps between validation losses; 0: no validation."""
    val_samples: PositiveInt = 5000
    """Images of data.val_shards that a validation loss uses."""
    evaluate_every: Length = 0
    """Steps between evaluations with EMA weights, against data.val_shards if it is set, else data.shards; 0: none."""
    evaluate_samples: Annotated[int, Field(ge=2)] = 2048
    """Images drawn for an evaluation, with the options of section sample."""
    evaluate_features: str = ""
    """Network that computes the features of an evaluation: --features of `ddpm evaluate`."""
    log_every: PositiveLength = 50
    """Steps between lines in TensorBoard and log.jsonl."""
    timeout: Duration = 600.0
    """How long ranks wait for each other before the run fails: seconds, or 10m."""
    time_limit: Duration | None = None
    """Save and stop before the command has run this long; the same command continues: seconds, or 12h."""


class Config(Section):
    """A whole run."""

    model_config = ConfigDict(
        json_schema_extra=lambda schema: schema["properties"].update(
            base={
                "type": "string",
                "description": "A parent configuration file: its values apply where this file gives none.",
            }
        )
    )

    data: DataSection = DataSection()
    model: ModelSection = ModelSection()
    diffusion: DiffusionSection = DiffusionSection()
    train: TrainSection = TrainSection()
    sample: SamplingOptions = SamplingOptions()
    run: RunSection = RunSection()

    @model_validator(mode="after")
    def _check_combinations(self) -> Config:
        """Refuse settings that contradict each other, all of them at once."""
        problems = [*self._model_problems(), *self._training_problems(), *self._sampling_problems()]
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _model_problems(self) -> Iterator[str]:
        (height, width), levels, stride = self.data.height_width, len(self.model.channel_mults), self.model.stride
        groups, base, dropout = self.model.norm_groups, self.model.base_channels, self.model.dropout
        if self.model.num_heads and self.model.head_channels:
            yield "model.num_heads and model.head_channels cannot both be set: remove one"
        if groups != "auto" and base % groups:
            yield f"model.norm_groups {groups} does not divide model.base_channels {base}: change one of them"
        if isinstance(dropout, tuple) and len(dropout) != levels:
            yield f"model.dropout has {len(dropout)} numbers for {levels} levels: give one for each"
        if self.diffusion.loss_weighting in ("hybrid", "vlb") and not self.model.learned_variance:
            weighting = self.diffusion.loss_weighting
            yield f"diffusion.loss_weighting={weighting} needs model.learned_variance=true: set it"
        if height % stride or width % stride:
            yield (
                f"data.size {height}x{width} cannot be halved {levels - 1} times: use a multiple of {stride}, "
                "or fewer model.channel_mults"
            )

    def _sampling_problems(self) -> Iterator[str]:
        total, options = self.diffusion.timesteps, self.sample
        interval, visited = options.guidance_interval, options.timesteps
        if interval and not interval[0] <= interval[1] < total:
            yield f"sample.guidance_interval {interval} is not within the timesteps [0, {total}): give [first, last]"
        if visited and options.spacing != "auto":
            yield f"sample.timesteps and sample.spacing={options.spacing} cannot both be set: remove one"
        if visited and list(visited) != sorted({t for t in visited if t < total}, reverse=True):
            yield f"sample.timesteps must descend within [0, {total}): sort them and remove repeated ones"
        if (options.steps or 0) > total:
            yield f"sample.steps {options.steps} exceeds diffusion.timesteps {total}: lower it"

    def _training_problems(self) -> Iterator[str]:
        batch, lanes, micro = self.train.global_batch, self.data.lanes, self.train.micro_batch
        if lanes and batch % lanes:
            yield f"train.global_batch {batch} is not a multiple of data.lanes {lanes}: change one of them"
        if micro != "auto" and batch % micro:
            yield f"train.global_batch {batch} is not a multiple of train.micro_batch {micro}: change one of them"
        if self.run.evaluate_every and not self.run.evaluate_features:
            yield "run.evaluate_every needs run.evaluate_features: set it to a feature file, or to inception"
        if len(set(self.train.ema_lengths)) < len(self.train.ema_lengths):
            yield f"train.ema_lengths {list(self.train.ema_lengths)} has a length twice: remove one"
        if self.train.lr_stages and self.train.lr_schedule != "constant":
            yield f"train.lr_stages and train.lr_schedule={self.train.lr_schedule} cannot both be set: remove one"

    def in_steps(self, samples: int, past: Sequence[tuple[int, int]] = ()) -> Config:
        """The same configuration with every length in steps.

        Args:
            samples: images in an epoch.
            past: as in `EpochCounter`.

        Raises:
            ConfigError: a length that must be positive comes to 0 steps.
        """
        counter, values = EpochCounter(samples, self.train.global_batch, past), self.model_dump()
        for section, key in _LENGTHS:
            values[section][key] = counter.in_steps(values[section][key])
        begun, stages = 0, []
        for length, rate in self.train.lr_stages:
            stages.append((counter.in_steps(length, begun), rate))
            begun += stages[-1][0]
        values["train"]["lr_stages"] = stages
        try:
            return Config.model_validate(values)
        except ValidationError as error:  # 0ep is a length, but not of a run
            keys = ", ".join(dict.fromkeys(".".join(map(str, problem["loc"][:2])) for problem in error.errors()))
            raise ConfigError(f"{keys}: 0 steps with {samples} images in an epoch: give a longer length") from error


PATHS = {("data", "shards"), ("data", "cache"), ("data", "val_shards"), ("train", "init_from"), ("run", "dir"),
         ("run", "evaluate_features")}  # fmt: skip
"""Settings that are paths or URLs: text, however much it looks like a number."""
_LENGTHS = [("train", "steps"), ("train", "warmup_steps")]
_LENGTHS += [("run", key) for key in RunSection.model_fields if key.endswith("_every")]


def differences(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """The keys that differ: `section.key` → (old value, new value)."""
    before, after = old.model_dump(mode="json"), new.model_dump(mode="json")
    pairs = {f"{s}.{key}": (value, after[s][key]) for s, values in before.items() for key, value in values.items()}
    return {key: (value, other) for key, (value, other) in pairs.items() if value != other}
