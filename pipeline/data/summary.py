"""What a sharding job has done, as a table for people."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

_CLASSES_SHOWN = 20
_BAR = 40


@dataclass(frozen=True)
class Summary:
    """What a sharding job has done."""

    out: str
    inputs: int
    taken: int
    rejected: dict[str, int]
    """Inputs not taken, by reason."""
    transforms: dict[str, int]
    """Pictures taken that were rotated, enlarged, composited, …"""
    sizes: dict[str, int]
    """Pictures taken, by the power of two that their short side, in pixels, as stored, reaches."""
    classes: dict[str, int] | None
    """Pictures taken, by class."""
    shards: int
    """In the whole set."""
    shards_there: int
    """Fewer while other parts are at work; the figures above are about these."""
    shards_made: int
    """By this start."""
    seconds: float
    images_per_s: float
    """Inputs looked at by this start."""
    how: str = "made"
    """What was done to the shards: made, indexed or joined."""

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)

    def as_text(self) -> str:
        """A table."""
        rows = [("inputs", self.inputs, ""), ("taken", self.taken, "")]
        rows += [(f"rejected, {reason}", count, "") for reason, count in self.rejected.items()]
        rows += [(name, count, "") for name, count in self.transforms.items()]
        rows += _bars({f"short side {least} to {2 * int(least) - 1} px": n for least, n in self.sizes.items()})
        classes = _bars({f"class {ascii(name)[1:-1]}": count for name, count in (self.classes or {}).items()})
        rows += classes[:_CLASSES_SHOWN]
        if more := classes[_CLASSES_SHOWN:]:
            rows.append((f"{len(more)} more classes", sum(count for _, count, _ in more), ""))
        width = max(len(name) for name, _, _ in rows)
        lines = (f"  {name:{width}}  {count:>9}  {bar}".rstrip() for name, count, bar in rows)
        return "\n".join([self._head(), *lines])

    def _head(self) -> str:
        if not self.shards_made and self.shards_there == self.shards:
            return f"{self.out}: all {self.shards} shards are there, nothing to do"
        speed = f"{self.seconds:.1f} s, {self.images_per_s:.0f} images/s"
        head = f"{self.out}: {self.shards_made} of {self.shards} shards {self.how} in {speed}"
        if self.shards_there < self.shards:
            head += f"; {self.shards_there} are there, the job that makes the last one finishes the set"
        return head


def _bars(counts: dict[str, int]) -> list[tuple[str, int, str]]:
    most = max(counts.values(), default=1) or 1
    return [(name, count, "#" * -(-_BAR * count // most)) for name, count in counts.items()]
