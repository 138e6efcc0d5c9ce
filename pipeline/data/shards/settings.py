"""The settings that decide the bytes of a shard set, given its inputs.

Their JSON stands in every record and in `index.json`, and a job continues only a set with equal settings. So the names,
the order and the values of the fields are part of the format.
"""

from __future__ import annotations

from typing import Any, Literal

from PIL import ImageColor
from pydantic import BaseModel, ConfigDict, Field, field_serializer, field_validator, model_validator

from pipeline.data.images.dedupe import Dedupe
from pipeline.data.images.preprocess import PREPROCESSING, ImageFormat
from pipeline.data.sources.keys import parse_extensions
from pipeline.errors import ConfigError

Crop = Literal["center", "none", "random"]
LabelsWanted = Literal["auto", "none"]
KEYS = 2
"""Version of the rules for keys and labels of tars; `ddpm index` reads a tar again that it read by another version."""
_MAX_SIDE_PX = 16_383  # the limit of webp


class _Settings(BaseModel):
    """The checks that both kinds of settings share."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def as_json(self) -> dict[str, Any]:
        """The settings as `index.json` has them."""
        return self.model_dump(mode="json")

    @field_validator("size", check_fields=False)
    @classmethod
    def _check_size(cls, size: tuple[int, int] | None) -> tuple[int, int] | None:
        if size and not 1 <= min(size) <= max(size) <= _MAX_SIDE_PX:
            raise ConfigError(f"--size {size[0]}x{size[1]}: 1 to {_MAX_SIDE_PX} pixels a side")
        return size

    @field_validator("channels", check_fields=False)
    @classmethod
    def _check_channels(cls, channels: int) -> int:
        if channels not in (1, 3):
            raise ConfigError(f"--channels {channels}: 3 for color or 1 for grey")
        return channels


class ShardSettings(_Settings):
    """How `ddpm shard` makes samples of its inputs.

    Raises:
        ConfigError: a setting that cannot be used, or two that contradict each other.
    """

    size: tuple[int, int]
    """(height, width) of the images, in pixels."""
    channels: int = 3
    """3 for color, 1 for grey."""
    crop: Crop = "center"
    """center; random (keyed by the position of the input); none, which rejects images of another aspect ratio."""
    pad: bool = False
    """With `crop` none: keep such images whole, on the background; too large ones are reduced, none is enlarged."""
    format: ImageFormat = "png"
    """How images are stored; png and webp are lossless."""
    labels: str = "folder"
    """`folder`: the class of an image is the name of its directory, or the label that the source has for it (the rules:
    shards/README.md); `none`; or the name of a .csv file with the class of each image."""
    background: str = "#ffffff"
    """Color under transparent pixels and around padded images, as CSS writes it."""
    min_size: int = Field(1, ge=1)
    """Images with a shorter side, in pixels, are rejected."""
    dedupe: Dedupe = "none"
    """Reject images that repeat an earlier one. exact: equal pixels after crop and resize; near: almost equal
    perceptual hash and colors."""
    shard_samples: int = Field(1000, ge=1)
    """Inputs in a shard."""
    preprocessing: int = PREPROCESSING

    @property
    def has_label_file(self) -> bool:
        """Whether the classes come from a .csv file."""
        return self.labels not in ("folder", "none")

    @property
    def background_rgb(self) -> tuple[int, int, int]:
        """The background as red, green, blue; 0 to 255 each."""
        red, green, blue = ImageColor.getrgb(self.background)[:3]
        return red, green, blue

    @field_serializer("labels")
    def _kind_of_labels(self, labels: str) -> str:
        return "csv" if self.has_label_file else labels

    @field_serializer("background")
    def _background_as_list(self, _background: str) -> list[int]:
        return list(self.background_rgb)

    @field_validator("background")
    @classmethod
    def _check_background(cls, background: str) -> str:
        try:
            ImageColor.getrgb(background)
        except ValueError as error:
            raise ConfigError(
                f"--background {background}: write a color as in CSS, such as '#ffffff' or white"
            ) from error
        return background

    @model_validator(mode="after")
    def _check_contradictions(self) -> ShardSettings:
        if self.pad and self.crop != "none":
            raise ConfigError("--pad keeps images whole: give --crop none with it")
        if self.crop == "random" and self.dedupe != "none":
            raise ConfigError(
                f"--dedupe {self.dedupe} compares images as they are cropped: --crop random hides repetitions"
            )
        return self


class IndexSettings(_Settings):
    """How `ddpm index` reads the images of tars made elsewhere.

    Raises:
        ConfigError: a setting that cannot be used.
    """

    size: tuple[int, int] | None = None
    """(height, width) that every image is brought to when it is read; None: all images have one size, which is kept."""
    channels: int = 3
    """3 for color, 1 for grey."""
    labels: LabelsWanted = "auto"
    """auto: the class of an image is the one in its .cls or .json; none."""
    image_ext: str | None = None
    """Extensions of the images to take, separated by commas; None: by the rule of `data.sources.keys`."""
    foreign: Literal[True] = True
    pictures: int = PREPROCESSING
    """Version of the preprocessing. In the format it has this name, as `preprocessing` marks sets of `ddpm shard`."""
    keys: int = KEYS

    @property
    def extensions(self) -> frozenset[str]:
        """Extensions of the images to take; none: by the rule of `data.sources.keys`."""
        return parse_extensions(self.image_ext)

    def as_json(self) -> dict[str, Any]:
        """The settings as `index.json` has them; `image_ext` only if there is one, as in older sets."""
        return self.model_dump(mode="json", exclude=None if self.extensions else {"image_ext"})

    @field_serializer("image_ext")
    def _extensions_as_list(self, _image_ext: str | None) -> list[str]:
        return sorted(self.extensions)
