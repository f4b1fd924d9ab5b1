"""Profiles of training steps by PyTorch's profiler."""

import contextlib
import logging
from typing import TYPE_CHECKING

import torch
from torch.profiler import ProfilerActivity, profile

from pretrain.sections import ProfileConfig
from pretrain.training.hooks import Ending, Hook, StepReport

if TYPE_CHECKING:
    from pretrain.training.loop import Trainer

logger = logging.getLogger(__name__)

FOLDER = "profile"
"""Folder of the traces in the run directory."""
OPERATORS = 15
"""Number of operators in the table."""


class Profile(Hook):
    """A hook that writes a trace of some steps for each rank, and logs a table of their slowest operators.

    The traces open in Perfetto and in TensorBoard. A run that resumes within these steps profiles the remaining ones.
    """

    def __init__(self, config: ProfileConfig):
        self._first, self._last = config.steps
        self._profiler: profile | None = None
        self._began = 0

    def start(self, run: "Trainer") -> None:
        """Begin if the next step is profiled."""
        self._begin_before(run.progress.step + 1)

    def after_step(self, run: "Trainer", report: StepReport) -> None:
        """End after the last profiled step, or begin if the next one is profiled."""
        if self._profiler is not None and run.progress.step >= self._last:
            self._write(run)
        else:
            self._begin_before(run.progress.step + 1)

    def end(self, run: "Trainer", ending: Ending) -> None:
        """Write the trace if the run ends within the profiled steps."""
        if self._profiler is not None:
            self._write(run)

    def _begin_before(self, step: int) -> None:
        if self._profiler is None and self._first <= step <= self._last:
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
            self._profiler = profile(activities=activities, record_shapes=True)
            self._profiler.start()
            self._began = step

    def _write(self, run: "Trainer") -> None:
        assert self._profiler is not None  # checked by the callers
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        steps = f"steps-{self._began}-{run.progress.step}"
        path = run.config.run_dir / FOLDER / f"rank-{run.world.rank:05d}.{steps}.pt.trace.json.gz"
        temporary = path.with_name(f".{path.name}")  # not atomic_path: the trace is compressed if its name ends in gz
        try:
            path.parent.mkdir(exist_ok=True)
            profiler.export_chrome_trace(str(temporary))
            temporary.replace(path)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            logger.warning(f"cannot write the profile {path} ({error.strerror}); the run continues without it")
            return
        kind = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = profiler.key_averages().table(sort_by=kind, row_limit=OPERATORS, max_name_column_width=50)
        logger.info(f"profile of {steps.replace('-', ' ', 1).replace('-', ' to ')}, in {path}:\n{table}")
