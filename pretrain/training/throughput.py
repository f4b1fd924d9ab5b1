"""FLOPs and throughput of a model, counted without padding."""

from dataclasses import dataclass

import torch

from pretrain.data.loader import Rows
from pretrain.models.language_model import LanguageModel
from pretrain.training.engine import parameter_count

PEAK_BF16_FLOPS = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA GH200 480GB": 989e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA L4": 121e12,
}
"""Dense bf16 peak in FLOP/s by the full name of a device, from its manufacturer's data sheet. Other devices have no
MFU, because a guessed peak would be misleading."""


@dataclass(frozen=True)
class Parameters:
    """Parameter counts by part of the model."""

    layers: int
    """Transformer layers and final norm."""
    embedding: int
    head: int
    """Output head; the same parameters as the embedding if they are tied."""
    tied: bool
    predictor: int
    """Embedding of the predictor tokens."""

    @property
    def total(self) -> int:
        """Number of all parameters; tied ones count once."""
        return self.layers + self.embedding + (0 if self.tied else self.head) + self.predictor

    def flops(self, positions: float, targets: float) -> tuple[float, float]:
        """Return the FLOPs of the layers and of the output head, forward and backward.

        The layers need 6 FLOPs per position and parameter, and the head 6 per next-token target and parameter
        (Kaplan et al., arXiv 2001.08361, section 2.1). Attention scores and padding are not counted.
        """
        return 6 * self.layers * positions, 6 * self.head * targets


def count_parameters(model: LanguageModel) -> Parameters:
    """Return the parameter counts of a model, which may be partitioned or on the meta device."""
    embedding = model.vocab_size * model.hidden_size
    tied = bool(model.causal_lm.config.tie_word_embeddings)
    predictor = 0 if model.predictor is None else parameter_count(model.predictor)
    layers = parameter_count(model) - predictor - embedding * (1 if tied else 2)
    return Parameters(layers, embedding, embedding, tied, predictor)


def peak_flops() -> float | None:
    """Return the dense bf16 peak of this device in FLOP/s; None if it is not known."""
    return PEAK_BF16_FLOPS.get(torch.cuda.get_device_name()) if torch.cuda.is_available() else None


class Throughput:
    """Rates of the steps since the last report, without validation and checkpoints. MFU uses `Parameters.flops`."""

    def __init__(self, parameters: Parameters, ranks: int, row_length: int):
        self.parameters = parameters
        self.row_length = row_length
        peak = peak_flops()
        self.peak = None if peak is None else peak * ranks
        self._reset()

    def _reset(self) -> None:
        self.records = self.tokens = self.positions = self.targets = self.slots = 0
        self.seconds = self.waited = 0.0

    def add(self, rows: Rows, targets: int, seconds: float, waited: float = 0.0) -> None:
        """Count a step.

        `rows` is its global batch and `targets` the number of next-token targets in it. `seconds` is its duration, and
        `waited` the part of it that was spent waiting for data.
        """
        self.records += len(rows.records)
        self.tokens += int(rows.lengths.sum())
        self.positions += int(rows.segment_lengths.sum())
        self.targets += targets
        self.slots += rows.count * self.row_length
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
            values["throughput/mfu"] = (
                sum(self.parameters.flops(self.positions, self.targets)) / self.seconds / self.peak
            )
        self._reset()
        return values
