"""Throughput and MFU of a run, counted without padding."""

from pretrain.data.loader import Rows
from pretrain.planning.flops import Parameters, peak_flops


class Throughput:
    """Rates of the steps since the last report, without validation and checkpoints.

    MFU uses `Parameters.flops` and `Objective.flops`.
    """

    def __init__(self, parameters: Parameters, ranks: int, row_length: int):
        self.parameters = parameters
        self.row_length = row_length
        peak = peak_flops()
        self.peak = None if peak is None else peak * ranks
        self._reset()

    def _reset(self) -> None:
        self.records = self.tokens = self.positions = self.targets = self.slots = 0
        self.seconds = self.waited = self.objective_flops = 0.0

    def add(self, rows: Rows, targets: int, seconds: float, waited: float = 0.0, objective_flops: float = 0.0) -> None:
        """Count a step.

        `rows` is its global batch and `targets` the number of next-token targets in it. `seconds` is its duration, and
        `waited` the part of it that was spent waiting for data. `objective_flops` are the FLOPs of the
        weights of the objective.
        """
        self.records += len(rows.records)
        self.tokens += int(rows.lengths.sum())
        self.positions += int(rows.segment_lengths.sum())
        self.targets += targets
        self.slots += rows.count * self.row_length
        self.objective_flops += objective_flops
        self.seconds += seconds
        self.waited += waited

    def take(self) -> dict[str, float]:
        """Return the rates by metric tag, and reset the counters."""
        values = {
            "throughput/tokens_per_second": self.tokens / self.seconds,
            "throughput/records_per_second": self.records / self.seconds,
            "throughput/padding_fraction": 1 - self.positions / self.slots,
            "throughput/data_wait_fraction": self.waited / self.seconds,
        }
        if self.peak is not None:
            flops = sum(self.parameters.flops(self.positions, self.targets)) + self.objective_flops
            values["throughput/mfu"] = flops / self.seconds / self.peak
        self._reset()
        return values
