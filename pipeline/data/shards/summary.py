"""The result of `ddpm shard` and `ddpm index`, as a table for people and as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from shlex import quote
from typing import Any

from pipeline.units import all_of

_CLASSES_IN_TABLE = 20
_LISTED = 10
_BAR = 40
_TRANSFORMS = {
    "reduced": "made smaller",
    "enlarged": "made larger",
    "decoded_reduced": "JPEG decoded at a smaller scale",
    "composited": "background put under transparent pixels",
    "first_frame": "first of several frames taken",
    "scaled_16_bit": "16 bits to 8",
    "icc_to_srgb": "color profile to sRGB",
}
"""What was done to an image → words for it; other names are words."""
_CONFIGS = {16: "configs/demo.yaml", 48: "configs/cifar10.yaml", 96: "configs/64px.yaml", 192: "configs/128px.yaml"}
"""Longest side in pixels → the configuration to start from."""


@dataclass(frozen=True)
class Summary:
    """The counts of a shard set, and what this job did for it."""

    out: str
    inputs: int
    taken: int
    rejected: dict[str, int]
    """Inputs not taken, by reason."""
    transforms: dict[str, int]
    """Images taken that were rotated, enlarged, composited, …"""
    sizes: dict[str, int]
    """Images taken, by the largest power of two below or at their short side, in pixels, as stored."""
    classes: dict[str, int] | None
    """Images taken, by class."""
    shards: int
    """In the whole set."""
    shards_there: int
    """Shards that exist; fewer while other parts are being made. Then the counts above are of this job's part."""
    shards_made: int
    """Shards that this job made."""
    seconds: float
    images_per_s: float
    """Inputs that this job read, by second."""
    how: str = "made"
    """made, indexed or joined."""
    labels_from: str = ""
    """Where the classes come from, or why there are none."""
    next: str = ""
    """The command that trains on the set, once it is finished."""

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)

    def as_text(self) -> str:
        """A table; its last lines list the classes, and give the command that comes next."""
        rows = [("inputs", self.inputs, ""), ("taken", self.taken, "")]
        rows += [(f"rejected, {reason}", count, "") for reason, count in self.rejected.items()]
        rows += [(_TRANSFORMS.get(name) or name.replace("_", " "), n, "") for name, n in self.transforms.items()]
        rows += _bars({f"short side {least} to {2 * int(least) - 1} px": n for least, n in self.sizes.items()})
        classes = _bars(
            {f"class {i} {name}".rstrip(): count for i, (name, count) in enumerate(self._counted_classes())}
        )
        rows += classes[:_CLASSES_IN_TABLE]
        if more := classes[_CLASSES_IN_TABLE:]:
            rows.append((f"{len(more)} more classes", sum(count for _, count, _ in more), ""))
        width = max(len(name) for name, _, _ in rows)
        lines = (f"  {name:{width}}  {count:>9}  {bar}".rstrip() for name, count, bar in rows)
        return "\n".join([self._head(), *lines, self._class_line(), *[f"next: {self.next}"] * bool(self.next)])

    def _class_line(self) -> str:
        """The line that lists the classes, or says why there are none."""
        if not self.classes:
            return "no classes" + f": {self.labels_from}" * bool(self.labels_from)
        counted = enumerate(self._counted_classes())
        listed = [f"{i} {name}".rstrip() + f" ({n:,})" for i, (name, n) in counted if n or len(self.classes) < 3]
        more = f" and {len(listed) - _LISTED} more" if len(listed) > _LISTED else ""
        line = f"{len(self.classes)} class{'es' * (len(self.classes) > 1)}: {', '.join(listed[:_LISTED])}{more}"
        if without := self.taken - sum(self.classes.values()):
            line += f"; without a class: {without}"
        return line + f"; from {self.labels_from}" * bool(self.labels_from)

    def _counted_classes(self) -> list[tuple[str, int]]:
        """Name and images of each class, by its number; classes called by their numbers have no name."""
        counts = self.classes or {}
        has_names = list(counts) != [str(i) for i in range(len(counts))]
        return [(ascii(name)[1:-1] if has_names else "", count) for name, count in counts.items()]

    def _head(self) -> str:
        if not self.shards_made and self.shards_there == self.shards:
            return f"{self.out}: {all_of(self.shards, 'shard')} there, nothing to do"
        speed = f"{self.seconds:.1f} s, {self.images_per_s:.0f} images/s"
        head = f"{self.out}: {self.shards_made} of {self.shards} shards {self.how} in {speed}"
        if self.shards_there < self.shards:
            head += f"; {self.shards_there} are there, the job that makes the last one finishes the set"
        return head


def train_command(out: str, size: tuple[int, int], channels: int, classes: int) -> str:
    """The command that trains on a finished set.

    Args:
        out: the set.
        size: (height, width) in pixels.
        channels: 1 or 3.
        classes: number of classes; 0: an unconditional model.
    """
    config = next((name for side, name in _CONFIGS.items() if max(size) <= side), "configs/256px.yaml")
    pixels = str(size[0]) if size[0] == size[1] else f"[{size[0]},{size[1]}]"
    name = out.rstrip("/").rpartition("/")[2]
    settings = {"data.shards": out, "data.size": pixels, "data.channels": channels, "model.num_classes": classes,
                "run.dir": f"runs/{name}"}  # fmt: skip
    return f"ddpm train --config {config} " + " ".join(quote(f"{key}={value}") for key, value in settings.items())


def _bars(counts: dict[str, int]) -> list[tuple[str, int, str]]:
    most = max(counts.values(), default=1) or 1
    return [(name, count, "#" * -(-_BAR * count // most)) for name, count in counts.items()]
