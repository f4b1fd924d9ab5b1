"""The learning rate, which depends on the consumed fraction of the budget."""

import math
from typing import assert_never

from pretrain.sections import DEFAULT_DECAY_FRACTION, TrainConfig


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
        case _:
            assert_never(train.schedule)
    return train.learning_rate * (train.final_rate + (1 - train.final_rate) * height)
