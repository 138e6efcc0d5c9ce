"""What a command would do, without doing it: the result of `--dry-run`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from pipeline.units import bytes_text, duration_text


@dataclass(frozen=True)
class Forecast:
    """The work that is left, how long it takes and how much it writes."""

    where: str
    """What the command would write: a path or URL."""
    work: str
    """What is left to do, in words."""
    units: int
    """Images or steps that are left."""
    unit: str
    """What is counted: images or steps."""
    per_s: float | None
    """Units in a second, of all processes of this command; None: unknown."""
    basis: str
    """What `per_s` was measured on, or why it is unknown."""
    bytes: float
    """That are written, as an estimate."""
    bytes_are: str = "about"
    """about, or at most."""
    free_bytes: int | None = None
    """That may still be written there; None: unknown."""

    @property
    def seconds(self) -> float | None:
        """How long it takes; None: unknown."""
        if not self.units:
            return 0.0
        return self.units / self.per_s if self.per_s else None

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self) | {"seconds": self.seconds}

    def as_text(self) -> str:
        """Lines for people."""
        lines = [f"{self.where}: {self.work}"]
        if self.units:
            seconds = self.seconds
            speed = f"about {duration_text(seconds)}, {self.per_s:.3g} {self.unit}/s" if seconds else "unknown"
            lines.append(f"  time  {speed} ({self.basis})")
            lines.append(f"  disk  {self.bytes_are} {bytes_text(self.bytes)}{self._free()}")
        return "\n".join([*lines, "dry run: all checks passed, nothing was written"])

    def _free(self) -> str:
        if self.free_bytes is None:
            return ""
        short = self.bytes > self.free_bytes and self.bytes_are == "about"
        return f"; {bytes_text(self.free_bytes)} are free" + ": TOO LITTLE, make room first" * short
