"""The settings of the network, `model.*`; `config.py` has those of all sections. Pure."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationInfo,
    field_validator,
)

Share = Annotated[float, Field(ge=0, lt=1)]
FixedVariance = Literal["fixed_large", "fixed_small"]


class Section(BaseModel):
    """A group of settings. Unknown keys are errors."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _switches_are_no_numbers(cls, value: object, info: ValidationInfo) -> object:
        """Refuse `true` for a number: train.lr=true is not the rate 1."""
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError("true, false, yes, no, on and off are switches, unless they are quoted")
        return value


class ModelSection(Section):
    """The network: the U-Net of Ho et al. 2020, appendix B, with options."""

    base_channels: PositiveInt = 128
    """Channels at full resolution."""
    channel_mults: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (1, 2, 2, 2)
    """Channels of each resolution level as multiples of base_channels; each level halves the image."""
    blocks_per_level: PositiveInt = 2
    """Residual blocks of a level on the way down; one more on the way up."""
    attention_sizes: tuple[PositiveInt, ...] = (16,)
    """Feature maps with self-attention, by the shorter side in pixels; the middle block always has it."""
    head_channels: PositiveInt | None = None
    """Channels of an attention head. Default: a single head, as in the paper."""
    num_heads: PositiveInt | None = None
    """Number of attention heads at every level. Give this or head_channels."""
    norm_groups: PositiveInt | Literal["auto"] = "auto"
    """Groups of each GroupNorm; must divide base_channels. auto: at most 32 groups with at least 4 channels each: in a
    group of one channel the norm removes what the embedding of time and class adds. A run stores the number."""
    dropout: Share | Annotated[tuple[Share, ...], Field(min_length=1)] = 0.1
    """Dropout before the second convolution of each residual block: a number, or one for each level (the middle takes
    the last), such as 0 at high resolutions (Hoogeboom et al. 2023, arXiv:2301.11093)."""
    num_classes: NonNegativeInt = 0
    """Classes of a class-conditional model; 0 for an unconditional one."""
    label_dropout: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Share of training images whose label is hidden, so that guidance works. No effect without classes."""
    scale_shift: bool = False
    """The embedding of time and class scales and shifts the normalised features; false: it is added to them (Nichol &
    Dhariwal 2021)."""
    learned_variance: bool = False
    """The network also outputs the variance of each step (Nichol & Dhariwal 2021, eq. 15)."""
    norm_eps: PositiveFloat = 1e-6
    """ε of each GroupNorm; it is 1e-5 in PyTorch, diffusers and networks of OpenAI."""
    resample_blocks: bool = False
    """Halve and double images within residual blocks, by averages and repetition, instead of by convolutions. It is
    resblock_updown in guided-diffusion, and downsample_type and upsample_type resnet in diffusers."""
    downsample_padding: Literal[0, 1] = 0
    """Padding of the convolutions that halve an image: 0: one pixel on the right and at the bottom, as in the paper's
    code; 1: one pixel on all sides, as in PyTorch, diffusers and networks of OpenAI."""
    freq_shift: Literal[1, 0] = 1
    """Frequencies of the time embedding: 1: the last of n is 1e-4, as in the paper's code; 0: it is 1e-4^((n-1)/n), as
    in diffusers and networks of OpenAI."""
    flip_sin_to_cos: bool = False
    """Order of the time embedding: false: sines, then cosines; true: the reverse, as in diffusers and networks of
    OpenAI."""
    timestep_scale: PositiveFloat = 1.0
    """Timesteps are multiplied by this before their embedding: 1000/T in networks of OpenAI with T timesteps that were
    trained with rescale_timesteps."""

    @property
    def groups(self) -> int:
        """Number of groups of each GroupNorm."""
        if self.norm_groups != "auto":
            return self.norm_groups
        return max(g for g in range(1, min(32, max(self.base_channels // 4, 1)) + 1) if self.base_channels % g == 0)

    @property
    def blindness(self) -> str | None:
        """A warning if some levels cannot see timestep and class, with the remedy; None if all can."""
        if self.scale_shift or self.groups not in (self.base_channels * mult for mult in self.channel_mults):
            return None
        return (
            f"model.norm_groups={self.groups} leaves one channel a group where channel_mults is "
            f"{self.groups // self.base_channels}: there the network ignores timestep and class; train a new run with "
            "model.norm_groups=auto"
        )

    @property
    def dropout_by_level(self) -> tuple[float, ...]:
        """Dropout of each level, finest first."""
        return self.dropout if isinstance(self.dropout, tuple) else (self.dropout,) * len(self.channel_mults)

    def attention_heads(self, width: int) -> int:
        """Heads of attention over features of so many channels."""
        return self.num_heads or width // (self.head_channels or width)

    def reverse_variance(self, fixed: FixedVariance) -> FixedVariance | Literal["learned"]:
        """Variance of a reverse step: the network's own if it has learned one, else `fixed`."""
        return "learned" if self.learned_variance else fixed

    @property
    def stride(self) -> int:
        """Image pixels for each pixel of the coarsest level, along one side; sizes are multiples of it."""
        return 1 << (len(self.channel_mults) - 1)
