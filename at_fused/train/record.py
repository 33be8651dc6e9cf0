"""Records of a run as it goes: metrics.jsonl and TensorBoard's files."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from at_fused.train import checkpoints

# Job name, method, seed, points.
Told = tuple[str, str, int, list[dict[str, float]]]


def _line(name: str, method: str, seed: int, point: dict[str, float]) -> str:
    return json.dumps({"run": name, "method": method, "seed": seed, **point}) + "\n"


class Record:
    """The files of a run.

    Args:
        out: the run's folder.
        before: what an interrupted run had come to. Lines of what was lost since its last
            checkpoint go, so that no step is there twice.
    """

    def __init__(self, out: Path, before: Iterable[Told]) -> None:
        self.out = out
        lines = [
            _line(name, method, seed, point)
            for name, method, seed, points in before
            for point in points
        ]
        checkpoints.write(out / "metrics.jsonl", "".join(lines).encode())
        self._writer: tuple[str, Any] = ("", None)

    def point(self, name: str, method: str, seed: int, point: dict[str, float]) -> None:
        """Adds a point of a curve."""
        try:
            with open(self.out / "metrics.jsonl", "a", encoding="utf-8") as f:
                f.write(_line(name, method, seed, point))
            writer = self._tensorboard(name, int(point["step"]))
            for quantity, value in point.items():
                if quantity != "step":
                    writer.add_scalar(quantity, value, int(point["step"]))
        except OSError as error:
            raise checkpoints.CheckpointError(f"cannot write in {self.out}: {error}") from error

    def _tensorboard(self, name: str, step: int) -> Any:
        if self._writer[0] != name:
            from torch.utils.tensorboard import SummaryWriter

            self.close()
            folder = str(self.out / "tensorboard" / name)
            self._writer = (name, SummaryWriter(folder, purge_step=step))
        return self._writer[1]

    def close(self) -> None:
        """Closes what is open."""
        if self._writer[1] is not None:
            self._writer[1].close()
            self._writer = ("", None)
