"""Every setting of a run, typed and validated, in one frozen `Config`. Pure.

The docstring under a field is its only documentation; `configs/config.schema.json` carries it to editors.
"""

from __future__ import annotations

import re
from fractions import Fraction
from math import ceil
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    WithJsonSchema,
    model_validator,
)

from pipeline.errors import ConfigError

_EPOCHS = re.compile(r"(\d+(?:\.\d+)?)ep")
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(s|m|h|d)")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def _length(value: object) -> object:
    if isinstance(value, str) and not _EPOCHS.fullmatch(value):
        raise ValueError("a length is a number of steps, or of epochs as in 50ep")
    return value


def _duration(value: object) -> object:
    if isinstance(value, str):
        match = _DURATION.fullmatch(value)
        if not match:
            raise ValueError("a duration is a number of seconds, or as in 90s, 10m, 12h, 2d")
        return float(match[1]) * _SECONDS[match[2]]
    return value


if TYPE_CHECKING:
    Length = int  # what `Config.in_steps` makes of it; only a configuration that has not met its data holds text
    PositiveLength = int
    Duration = float
else:
    _EPOCHS_TEXT = Annotated[str, Field(pattern=r"^\d+(\.\d+)?ep$")]
    Length = Annotated[NonNegativeInt | _EPOCHS_TEXT, BeforeValidator(_length)]
    PositiveLength = Annotated[PositiveInt | _EPOCHS_TEXT, BeforeValidator(_length)]
    Duration = Annotated[
        PositiveFloat,
        BeforeValidator(_duration),
        WithJsonSchema({"anyOf": [{"type": "number"}, {"type": "string", "pattern": _DURATION.pattern}]}),
    ]


class Section(BaseModel):
    """A group of settings; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True)


class DataSection(Section):
    """What is read, and in which order."""

    shards: str = ""
    """Shard set to train on: a directory or an fsspec URL that `ddpm shard` has filled."""
    val_shards: str | None = None
    """Shard set for the validation loss; none if not given."""
    size: PositiveInt | tuple[PositiveInt, PositiveInt] = 32
    """Height and width of the pictures in pixels, one number if they are square. Must be that of the shard set."""
    channels: Literal[3, 1] = 3
    """3 for colour, 1 for grey. Must be that of the shard set."""
    flip: bool = False
    """Mirror half of the pictures, another half each epoch."""
    lanes: PositiveInt | None = None
    """Parallel streams the data is cut into; divides the global batch and is divided by every world size ever used.
    Default: the largest divisor of the global batch up to 64."""
    window: PositiveInt = 256
    """How far a sample may move within its lane when shuffled, in samples; a lane holds at most so many."""
    workers: NonNegativeInt = 2
    """Loader processes of each rank; 0 reads in the training process. The data does not depend on it."""

    @property
    def height_width(self) -> tuple[int, int]:
        """The pictures' (height, width) in pixels."""
        return self.size if isinstance(self.size, tuple) else (self.size, self.size)


class ModelSection(Section):
    """The network: the U-Net of Ho et al. 2020, appendix B, with options."""

    base_channels: PositiveInt = 128
    """Channels at full resolution."""
    channel_mults: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (1, 2, 2, 2)
    """Channels of each resolution level as multiples of base_channels; each level halves the picture."""
    blocks_per_level: PositiveInt = 2
    """Residual blocks of a level on the way down; one more on the way up."""
    attention_sizes: tuple[PositiveInt, ...] = (16,)
    """Feature-map sizes, short side in pixels, that get self-attention; the middle always has it."""
    head_channels: PositiveInt | None = None
    """Channels of an attention head; a single head if not given, as in the paper."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Dropout before the second convolution of each residual block."""
    num_classes: NonNegativeInt = 0
    """Classes of a class-conditional model; 0 for an unconditional one."""
    label_dropout: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Share of training pictures whose label is hidden, so that guidance works. Moot without classes."""
    scale_shift: bool = False
    """Time and class scale and shift the normalised features instead of being added (Nichol & Dhariwal 2021)."""
    learned_variance: bool = False
    """The network also outputs the variance of each step (Nichol & Dhariwal 2021, eq. 15)."""

    @property
    def stride(self) -> int:
        """Pixels of the picture to one of the coarsest level: heights and widths are multiples of it."""
        return 1 << (len(self.channel_mults) - 1)


class DiffusionSection(Section):
    """The forward process and what the network is asked to predict."""

    timesteps: Annotated[int, Field(ge=2, lt=2**24)] = 1000
    """Noise levels T."""
    schedule: Literal["linear", "cosine"] = "linear"
    """Noise schedule: linear of Ho et al. 2020, or cosine of Nichol & Dhariwal 2021."""
    prediction_type: Literal["epsilon", "sample", "v_prediction"] = "epsilon"
    """What the network predicts: the noise ε, the clean picture x₀, or the velocity v."""
    loss_weighting: Literal["simple", "min_snr"] = "simple"
    """Weight of a timestep in the loss: 1 (eq. 14), or min-SNR-γ (Hang et al. 2023)."""
    min_snr_gamma: PositiveFloat = 5.0
    """γ of min_snr."""


class TrainSection(Section):
    """How a run spends its compute. A step is one update by one global batch."""

    steps: PositiveLength = 800_000
    """Length of the whole run over all restarts, in steps or epochs (50ep). It may grow later, also after DONE."""
    global_batch: PositiveInt = 128
    """Pictures in a step, over all ranks: the same on 1 GPU and on 64."""
    micro_batch: PositiveInt | Literal["auto"] = "auto"
    """Pictures a rank puts through the network at a time. auto: the most that fits, found once, stored with the run."""
    lr: PositiveFloat = 2e-4
    """Learning rate of Adam."""
    lr_schedule: Literal["constant", "cosine"] = "constant"
    """After the warm-up: constant, or a half cosine to 0 at train.steps."""
    lr_stages: tuple[tuple[PositiveLength, PositiveFloat], ...] = ()
    """[[length, rate], …]: each rate for so many steps or epochs, the last one to the end. Replaces lr when given."""
    warmup_steps: Length = 5000
    """Linear warm-up from 0, in steps or epochs."""
    clip_norm: PositiveFloat = 1.0
    """Gradients of a larger total norm are scaled down to it."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Autocast of the network; schedule, loss, statistics, weights, optimizer and EMA are float32 in either case."""
    checkpointing: Literal["none", "attention", "blocks", "full", "auto"] = "none"
    """Activations recomputed in the backward pass instead of kept. attention: attention and all that is cheap before a
    convolution; blocks: convolutions of a block too; full: resampling too; auto: the least that fits the device."""
    compile: bool = False
    """Compile the network's blocks with torch.compile."""
    gradient_compression: Literal["none", "bf16"] = "none"
    """bf16: processes send each other gradients in half as many bits, and sum them so, for networks that are slow."""
    deterministic: bool = False
    """Only deterministic kernels: on CUDA the price of bit-identical runs."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.9999
    """Decay of the averaged weights after their warm-up."""
    ema_device: Literal["same", "cpu"] = "same"
    """Where the averaged weights live: with those they follow, or in the host's memory (8 bytes a weight), to save that
    of a GPU. There the host moves them while the GPU computes the next gradient; their last bits may differ."""
    init_from: str | None = None
    """Start a new run from the EMA weights of a run, a checkpoint or a diffusers directory."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA where there is one."""
    seed: Annotated[int, Field(ge=0, lt=2**64)] = 0
    """Fixes weights, order, timesteps, noise and dropout."""
    max_bad_steps: PositiveInt = 10
    """Consecutive steps with a non-finite loss or gradient after which the run fails; each one is left out."""


class SampleSection(Section):
    """How pictures are drawn; each key is also a flag of `ddpm sample`."""

    sampler: Literal["ddpm", "ddim", "dpmpp", "heun"] = "ddpm"
    """Ancestral DDPM, DDIM, DPM-Solver++(2M), or Heun."""
    steps: PositiveInt | None = None
    """Steps of the sampler. Default: every timestep for ddpm, 50 for the others."""
    eta: Annotated[float, Field(ge=0, le=1)] = 0.0
    """DDIM's η: 0 deterministic, 1 as noisy as DDPM."""
    spacing: Literal["uniform", "quadratic", "trailing", "leading"] = "uniform"
    """Which timesteps a shorter sampler visits."""
    variance: Literal["fixed_large", "fixed_small"] = "fixed_large"
    """Variance of a DDPM step: β, or the posterior's. A model with learned variance brings its own."""
    guidance: NonNegativeFloat = 1.0
    """Classifier-free guidance: 1 is the plain conditional model, more follows the label harder."""
    batch: PositiveInt = 64
    """Pictures drawn together. Bits are equal only between runs with equal batch."""
    compile: bool = False
    """Compile the network's blocks with torch.compile; previews do without. It changes the last bits, so that a set is
    drawn wholly with it or without; on a GPU they may also differ between processes, which choose kernels by speed."""


class RunSection(Section):
    """Where a run lives and how often it does what, in steps."""

    dir: str = ""
    """The run's directory. The same command on the same directory goes on from its newest checkpoint."""
    checkpoint_every: PositiveLength = 5000
    """Steps between checkpoints."""
    keep_last: Annotated[int, Field(ge=2)] = 3
    """Newest checkpoints to keep."""
    keep_every: Length = 0
    """Checkpoints at multiples of this are kept for good; 0 keeps none but the newest."""
    preview_every: Length = 5000
    """Steps between picture grids made with EMA weights from fixed seeds; 0 for none."""
    preview_samples: PositiveInt = 64
    """Pictures in a grid."""
    preview_steps: PositiveInt = 50
    """DDIM steps of a preview."""
    val_every: Length = 5000
    """Steps between validation losses; 0 for none."""
    val_samples: PositiveInt = 5000
    """Pictures of data.val_shards in a validation loss."""
    log_every: PositiveLength = 50
    """Steps between lines in TensorBoard and log.jsonl."""
    timeout: Duration = 600.0
    """How long ranks wait for each other before the run fails: seconds, or 10m."""
    time_limit: Duration | None = None
    """Save and stop, to be started again, before so much time is over: seconds, or 12h."""


class Config(Section):
    """A whole run."""

    model_config = ConfigDict(
        json_schema_extra=lambda schema: schema["properties"].update(
            base={
                "type": "string",
                "description": "A configuration file whose values hold where this one says nothing.",
            }
        )
    )

    data: DataSection = DataSection()
    model: ModelSection = ModelSection()
    diffusion: DiffusionSection = DiffusionSection()
    train: TrainSection = TrainSection()
    sample: SampleSection = SampleSection()
    run: RunSection = RunSection()

    @model_validator(mode="after")
    def _agree(self) -> Config:
        (height, width), levels = self.data.height_width, len(self.model.channel_mults)
        stride = self.model.stride
        batch, lanes, micro = self.train.global_batch, self.data.lanes, self.train.micro_batch
        contradictions = {
            f"data.size {height}x{width} cannot be halved {levels - 1} times: take a multiple of {stride}, "
            "or fewer model.channel_mults": bool(height % stride or width % stride),
            f"train.global_batch {batch} is not a multiple of data.lanes {lanes}: change one of them": (
                lanes is not None and batch % lanes != 0
            ),
            f"train.global_batch {batch} is not a multiple of train.micro_batch {micro}: change one of them": (
                micro != "auto" and batch % micro != 0
            ),
            f"train.lr_stages and train.lr_schedule={self.train.lr_schedule} exclude each other: drop one": (
                bool(self.train.lr_stages) and self.train.lr_schedule != "constant"
            ),
            f"sample.steps {self.sample.steps} exceeds diffusion.timesteps {self.diffusion.timesteps}: lower it": (
                (self.sample.steps or 0) > self.diffusion.timesteps
            ),
        }
        if found := [text for text, holds in contradictions.items() if holds]:
            raise ValueError("\n".join(found))
        return self

    def in_steps(self, samples: int) -> Config:
        """The same configuration with every length in steps.

        Args:
            samples: pictures in an epoch.
        """

        def steps(value: Any) -> Any:
            if isinstance(value, tuple | list):
                return [steps(item) for item in value]
            if isinstance(value, str) and (match := _EPOCHS.fullmatch(value)):
                return ceil(Fraction(match[1]) * samples / self.train.global_batch)
            return value

        values = self.model_dump()
        for section, key in _LENGTHS:
            values[section][key] = steps(values[section][key])
        try:
            return Config.model_validate(values)
        except ValidationError as error:  # 0ep is a length, but not of a run
            keys = ", ".join(".".join(map(str, problem["loc"][:2])) for problem in error.errors())
            raise ConfigError(f"{keys}: no steps at {samples} pictures an epoch: give a longer one") from error


_LENGTHS = [("train", "steps"), ("train", "lr_stages"), ("train", "warmup_steps")]
_LENGTHS += [("run", key) for key in RunSection.model_fields if key.endswith("_every")]


def differences(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """`section.key` → (old value, new value), for all keys that differ."""
    before, after = old.model_dump(mode="json"), new.model_dump(mode="json")
    pairs = {f"{s}.{key}": (value, after[s][key]) for s, values in before.items() for key, value in values.items()}
    return {key: (value, other) for key, (value, other) in pairs.items() if value != other}
