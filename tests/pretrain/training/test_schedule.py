"""The budget and the learning rate depend on the consumed fraction of the run."""

import pytest

from pretrain.data.loader import Consumed
from pretrain.planning.budget import consumed_fraction
from pretrain.sections import TrainConfig
from pretrain.training.schedule import learning_rate


def train(**changes) -> TrainConfig:
    return TrainConfig(
        **{
            "global_batch_rows": 8,
            "micro_batch_rows": 4,
            "learning_rate": 2.0,
            "final_rate": 0.1,
            "warmup_fraction": 0.1,
        }
        | changes
    )


@pytest.mark.parametrize(
    ("schedule", "middle"),
    [("cosine", 2.0 * (0.1 + 0.9 * 0.5)), ("linear", 2.0 * (0.1 + 0.9 * 0.5)), ("warmup_stable_decay", 2.0)],
)
def test_the_rate_rises_linearly_then_falls_to_the_final_rate(schedule, middle):
    config = train(steps=10, schedule=schedule)
    assert [learning_rate(10 * fraction, 10, config) for fraction in (0.0, 0.05, 0.1, 0.55, 1.0, 1.3)] == pytest.approx(
        [0, 1, 2, middle, 0.2, 0.2]
    )


def test_the_stable_phase_ends_where_the_decay_begins():
    config = train(steps=10, schedule="warmup_stable_decay", decay_fraction=0.4)
    assert [learning_rate(10 * fraction, 10, config) for fraction in (0.2, 0.6, 0.8, 1.0)] == pytest.approx(
        [2, 2, 2 * (0.1 + 0.9 * 0.5), 0.2]
    )


@pytest.mark.parametrize("unit", ["steps", "tokens"])
def test_lengths_in_the_unit_of_the_budget_give_the_same_rates_as_fractions(unit):
    shares = train(schedule="warmup_stable_decay", decay_fraction=0.4, **{unit: 50})
    lengths = train(
        schedule="warmup_stable_decay",
        warmup_fraction=None,
        **{unit: 50, f"warmup_{unit}": 5, f"decay_{unit}": 20},
    )
    assert (lengths.warmup_share, lengths.decay_share) == (0.1, 0.4)
    for consumed in range(55):
        assert learning_rate(consumed, 50, lengths) == pytest.approx(learning_rate(consumed, 50, shares))
    copy = TrainConfig(**lengths.model_dump() | lengths.without_budget() | {"records": 7})
    assert (copy.warmup_fraction, copy.decay_fraction) == (0.1, 0.4)
    assert TrainConfig(**lengths.model_dump(exclude_none=True)) == lengths


def test_before_the_decay_the_rates_do_not_depend_on_the_budget():
    short, long = (
        train(schedule="warmup_stable_decay", steps=steps, warmup_fraction=None, warmup_steps=7, decay_steps=11)
        for steps in (37, 101)
    )
    assert [learning_rate(step, 37, short) for step in range(27)] == [
        learning_rate(step, 101, long) for step in range(27)
    ]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"steps": 9, "warmup_steps": 2}, "set only one of warmup_fraction and warmup_steps"),
        ({"tokens": 9, "warmup_fraction": None, "warmup_steps": 2}, "warmup_steps needs a budget in steps"),
        (
            {"epochs": 9, "warmup_fraction": None, "warmup_tokens": 2},
            "needs a budget in tokens, but train.epochs is set",
        ),
        ({"steps": 9, "decay_steps": 2}, "decay_steps has an effect with schedule=warmup_stable_decay only"),
        ({"steps": 9, "warmup_fraction": None, "warmup_steps": 9}, "warmup_steps must be below the budget"),
        (
            {"steps": 9, "schedule": "warmup_stable_decay", "decay_steps": 9},
            "lower one of warmup_fraction and decay_steps",
        ),
    ],
)
def test_a_length_that_does_not_fit_is_refused(changes, expected):
    with pytest.raises(ValueError, match=expected):
        train(**changes)


@pytest.mark.parametrize(
    ("budget", "fraction"),
    [({"steps": 40}, 0.25), ({"tokens": 1000}, 0.5), ({"records": 400}, 0.75), ({"epochs": 2}, 1.5)],
)
def test_each_budget_counts_its_own_unit(budget, fraction):
    assert (
        consumed_fraction(Consumed(steps=10, tokens=500, records=300), train(**budget), total_epoch_records=200)
        == fraction
    )
