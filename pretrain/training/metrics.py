"""metrics.jsonl and TensorBoard, whole after any number of restarts."""

import json
import math
from pathlib import Path
from typing import Any

from data_prep.files import write_text


class Metrics:
    """metrics.jsonl and TensorBoard, written by rank 0 of the training run only.

    A run that goes on from `step` takes back what was written after it, so that no step is doubled or lost.
    """

    def __init__(self, run_dir: Path, step: int, tensorboard: bool):
        path = run_dir / "metrics.jsonl"
        if path.exists():
            lines = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
            write_text(path, "".join(line + "\n" for line in lines))
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (open as long as the run)
        self._writer = None
        if tensorboard:
            self._writer = open_tensorboard(run_dir / "tensorboard" / "train", purge_step=step + 1)
            self._writer.add_custom_scalars({"loss": {
                "loss/lm and loss/jepa": ["Multiline", ["^loss/lm$", "^loss/jepa$"]],
                "the same in validation": ["Multiline", ["^validation/loss/lm$", "^validation/loss/jepa$"]],
            }})

    def write(self, progress: dict[str, float], values: dict[str, float]) -> None:
        """Record the values of a step, with the progress counters beside them; in JSON, what is not finite is null."""
        finite = {tag: value if math.isfinite(value) else None for tag, value in values.items()}
        self._file.write(json.dumps(progress | finite) + "\n")
        self._file.flush()
        if self._writer is not None:
            for tag, value in values.items():
                self._writer.add_scalar(tag, value, int(progress["step"]))

    def flush(self) -> None:
        """Bring everything to disk; called before a checkpoint is declared good."""
        self._file.flush()
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        """Flush and close."""
        self._file.close()
        if self._writer is not None:
            self._writer.close()


def open_tensorboard(folder: Path, **options: Any):
    """A TensorBoard writer; imported late, because that takes seconds."""
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), **options)


def _step_of(line: str) -> float:
    """The step of a metrics line; infinite for one cut off by a kill, so that it is taken back."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")
