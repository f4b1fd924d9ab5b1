"""How fast it goes, counted on real tokens."""

import torch

from pretrain.data.loader import Rows

PEAK_BF16_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12}
"""Dense bf16 peak of a device, from its maker's data sheet. Other devices get no MFU rather than an invented one."""


class Throughput:
    """Rates of the steps since the last report, validation and checkpoints not counted in.

    MFU counts 6 FLOPs per position and parameter of the layers, and per next-token target and parameter of the output
    head (Kaplan et al., arXiv 2001.08361, section 2.1); attention scores are not counted, padding neither.
    """

    def __init__(self, layer_parameters: int, head_parameters: int, ranks: int, row_length: int):
        self.layer_parameters, self.head_parameters, self.row_length = layer_parameters, head_parameters, row_length
        name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
        self.peak = next((peak * ranks for device, peak in PEAK_BF16_FLOPS.items() if device in name), None)
        self._reset()

    def _reset(self) -> None:
        self.records = self.tokens = self.positions = self.targets = self.slots = 0
        self.seconds = 0.0

    def add(self, rows: Rows, targets: int, seconds: float) -> None:
        """Count a step: its global batch, the next-token targets in it, and the time it took."""
        self.records += len(rows.records)
        self.tokens += int(rows.lengths.sum())
        self.positions += int(rows.segment_lengths.sum())
        self.targets += targets
        self.slots += rows.count * self.row_length
        self.seconds += seconds

    def take(self) -> dict[str, float]:
        """The rates by metric tag, counted anew from here on."""
        values = {
            "throughput/tokens_per_second": self.tokens / self.seconds,
            "throughput/records_per_second": self.records / self.seconds,
            "throughput/padding_fraction": 1 - self.positions / self.slots,
        }
        if self.peak is not None:
            flops = 6 * (self.layer_parameters * self.positions + self.head_parameters * self.targets)
            values["throughput/mfu"] = flops / self.seconds / self.peak
        self._reset()
        return values
