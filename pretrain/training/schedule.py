"""The learning rate, which depends on the consumed part of the budget."""

import math
from typing import assert_never

from pretrain.planning.budget import Progress, budget_use
from pretrain.sections import TrainConfig


def learning_rate(consumed: float, budget: float, train: TrainConfig) -> float:
    """Return the learning rate after `consumed` units of a `budget`, both in its unit.

    After a linear warm-up, a cosine, linear or warmup-stable-decay schedule lowers the rate to its final value,
    final_rate * learning_rate.
    """
    fraction = min(1.0, consumed / budget)
    # With a warm-up in steps or tokens, no quotient depends on the budget: runs of different lengths are bitwise equal.
    absolute = train.warmup_steps if train.warmup_tokens is None else train.warmup_tokens
    warmed = (fraction, train.warmup_fraction or 0.0) if absolute is None else (consumed, absolute)
    if warmed[0] < warmed[1]:
        return train.learning_rate * warmed[0] / warmed[1]
    after_warmup = (fraction - train.warmup_share) / (1 - train.warmup_share)
    match train.schedule:
        case "cosine":
            height = (1 + math.cos(math.pi * after_warmup)) / 2
        case "linear":
            height = 1 - after_warmup
        case "warmup_stable_decay":
            height = _height_of_decay(consumed, budget, train)
        case _:
            assert_never(train.schedule)
    return train.learning_rate * (train.final_rate + (1 - train.final_rate) * height)


def is_decaying(consumed: float, budget: float, train: TrainConfig) -> bool:
    """Return whether warmup_stable_decay has lowered the learning rate after `consumed` units of a `budget`."""
    return _height_of_decay(consumed, budget, train) < 1


def is_before_decay(train: TrainConfig, total_epoch_records: int, progress: Progress) -> bool:
    """Return whether warmup_stable_decay has not yet lowered the learning rate; False with other schedules.

    `total_epoch_records` is the number of records in train.epochs epochs.
    """
    use = budget_use(progress.consumed, train, total_epoch_records)
    return train.schedule == "warmup_stable_decay" and not is_decaying(*use, train)


def _height_of_decay(consumed: float, budget: float, train: TrainConfig) -> float:
    absolute = train.decay_steps if train.decay_tokens is None else train.decay_tokens
    if absolute is None:
        return min(1.0, (1 - min(1.0, consumed / budget)) / train.decay_share)
    return min(1.0, max(0.0, budget - consumed) / absolute)
