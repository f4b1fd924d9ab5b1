"""Budget and learning rate, which both depend on the consumed fraction of the run."""

import math
from dataclasses import asdict, dataclass

from pretrain.sections import DEFAULT_DECAY_FRACTION, TrainConfig


@dataclass
class Progress:
    """Counters of a run so far, over all ranks; saved with every checkpoint."""

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

    def state(self) -> dict[str, float]:
        """Return the counters by name."""
        return asdict(self)


def consumed_fraction(progress: Progress, train: TrainConfig, total_epoch_records: int) -> float:
    """Return the consumed fraction of the budget; the run ends at 1.

    `total_epoch_records` is the number of records in train.epochs epochs.
    """
    if train.steps is not None:
        return progress.step / train.steps
    if train.tokens is not None:
        return progress.tokens / train.tokens
    budget = train.records if train.records is not None else total_epoch_records
    return progress.records / budget


def learning_rate(fraction: float, train: TrainConfig) -> float:
    """Return the learning rate at a consumed fraction of the budget.

    After a linear warm-up, a cosine, linear or warmup-stable-decay schedule lowers the rate to its final value,
    final_rate * learning_rate.
    """
    fraction = min(1.0, fraction)
    if fraction < train.warmup_fraction:
        return train.learning_rate * fraction / train.warmup_fraction
    after_warmup = (fraction - train.warmup_fraction) / (1 - train.warmup_fraction)
    match train.schedule:
        case "cosine":
            height = (1 + math.cos(math.pi * after_warmup)) / 2
        case "linear":
            height = 1 - after_warmup
        case "warmup_stable_decay":
            decay = DEFAULT_DECAY_FRACTION if train.decay_fraction is None else train.decay_fraction
            height = min(1.0, (1 - fraction) / decay)
    return train.learning_rate * (train.final_rate + (1 - train.final_rate) * height)
