"""Counters of a run, and the fraction of its budget that they have consumed."""

from dataclasses import asdict, dataclass

from pretrain.data.loader import Consumed
from pretrain.sections import TrainConfig


@dataclass
class Progress:
    """Counters of a run so far, over all ranks unless stated otherwise; saved with every checkpoint."""

    step: int = 0
    records: int = 0
    tokens: int = 0
    """Corpus tokens, without copies, special or predictor tokens and padding."""
    positions: int = 0
    """Computed positions, without padding."""
    skipped_steps: int = 0
    """Steps without an update."""
    seconds: float = 0.0
    """Time spent training, summed over all launches."""
    processor_seconds: float = 0.0
    """Processor time of this rank's training on CPU, summed over all launches; 0 on a GPU.

    The ranks process equally many rows, so the value of the main rank is used for all of them. Steps that an
    earlier version trained count as 0, because it did not measure them.
    """

    def state(self) -> dict[str, float]:
        """Return the counters by name."""
        return asdict(self)

    @property
    def consumed(self) -> Consumed:
        """Counters of the data so far."""
        return Consumed(self.step, self.records, self.tokens)


def budget_use(consumed: Consumed, train: TrainConfig, total_epoch_records: int) -> tuple[float, float]:
    """Return what has been consumed, and the budget, both in the unit of the budget: steps, tokens or records.

    `total_epoch_records` is the number of records in train.epochs epochs.
    """
    if train.steps is not None:
        return consumed.steps, train.steps
    if train.tokens is not None:
        return consumed.tokens, train.tokens
    return consumed.records, train.records if train.records is not None else total_epoch_records


def consumed_fraction(consumed: Consumed, train: TrainConfig, total_epoch_records: int) -> float:
    """Return the consumed fraction of the budget; the run ends at 1. See `budget_use` for the arguments."""
    used, budget = budget_use(consumed, train, total_epoch_records)
    return used / budget
