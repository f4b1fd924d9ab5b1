"""The budget of a first configuration: row length, model, epochs, learning rate and predicted time."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from data_prep.inspection.look import Inspection, inspect
from data_prep.nlrx_grammar import generate
from data_prep.utils.console import UserError
from pretrain.init import budget
from pretrain.init.budget import LONGEST, MOST_EPOCHS, SIZES, choose_budget, choose_row_length, count_shape, model_shape
from pretrain.init.task import choose_task
from pretrain.init.write import Choices, render
from pretrain.planning.speed import Machine

CPU = Machine("cpu", 2)
SHORT, LONG = (40, 40), (20_000, 40)
"""Lengths of the two views of a record."""


@pytest.fixture(scope="module")
def looked_at(tmp_path_factory) -> Inspection:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    pairs = (generate(0, "train", index) for index in range(400))
    rows = [{"text": f"{index} {text}", "code": code} for index, (text, code) in enumerate(pairs)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return inspect(str(path))


def sized(looked_at: Inspection, total: int, lengths: list[tuple[int, int]]) -> Inspection:
    """Return an inspection of a corpus of another size and other lengths, (N, 2)."""
    train = replace(looked_at.samples["train"], complete=False, total=total)
    return replace(looked_at, samples={"train": train}, lengths=np.array(lengths))


@pytest.fixture
def set_speed(monkeypatch):
    """Return a function that sets the FLOP/s of the machine, which otherwise are measured."""
    return lambda flops: monkeypatch.setattr(budget, "measure_flops", lambda *_: flops)


def made(inspection: Inspection) -> dict:
    """Return the values of the configuration."""
    choices = Choices(
        Path("mine.yaml"), inspection, choose_budget(inspection, CPU), choose_task(inspection, None, None), CPU, ()
    )
    return yaml.safe_load(render(choices))


def test_nearly_all_records_fit_into_a_row(looked_at):
    one_in_ten = [(20, 20)] * 90 + [(800, 20)] * 10
    one_in_thousand = [(20, 20)] * 999 + [(800, 20)]
    assert choose_row_length(sized(looked_at, 1000, one_in_ten), CPU) == (1024, 0)
    assert choose_row_length(sized(looked_at, 1000, one_in_thousand), CPU) == (256, 0.001)


def test_the_model_is_the_largest_that_sees_enough_tokens(looked_at, set_speed):
    set_speed(1e18)
    for number, size in enumerate(SIZES[:4]):
        needed = 20 * count_shape(model_shape(*size), looked_at.vocabulary).total
        chosen = choose_budget(sized(looked_at, needed // MOST_EPOCHS // sum(SHORT) + 1, [SHORT]), CPU)
        assert chosen.shape == model_shape(*size) and not chosen.is_smallest, number
        assert chosen.epochs == MOST_EPOCHS and not chosen.is_limited_by_time
    few = choose_budget(sized(looked_at, 1000, [SHORT]), CPU)
    assert few.shape == model_shape(*SIZES[0]) and few.is_smallest


def test_the_learning_rate_falls_with_the_width(looked_at, set_speed):
    set_speed(1e22)
    small, large = (choose_budget(sized(looked_at, total, [SHORT]), CPU) for total in (1000, 10**10))
    assert (small.shape["hidden_size"], small.learning_rate) == (144, 2e-3)
    assert (large.shape["hidden_size"], round(large.learning_rate, 5)) == (2048, 3.1e-4)
    assert made(sized(looked_at, 1000, [SHORT]))["train"]["learning_rate"] == 2e-3


def test_the_budget_fits_into_the_longest_time(looked_at, set_speed):
    """Less than an epoch is a number of tokens; otherwise the epochs are rounded down."""
    set_speed(1e9)
    part = choose_budget(sized(looked_at, 10**7, [SHORT]), CPU)
    assert part.epochs < 1 and part.is_limited_by_time and part.seconds == pytest.approx(LONGEST["cpu"])
    train = made(sized(looked_at, 10**7, [SHORT]))["train"]
    assert "epochs" not in train and train["tokens"] == pytest.approx(part.epochs * 10**7 * sum(SHORT), rel=0.1)
    total = round(10**7 * part.epochs / 3.5)
    several = choose_budget(sized(looked_at, total, [SHORT]), CPU)
    assert several.epochs == 3 and several.seconds == pytest.approx(LONGEST["cpu"] * 3 / 3.5, rel=1e-3)
    assert made(sized(looked_at, total, [SHORT]))["train"]["epochs"] == 3


def test_records_that_are_too_long_for_a_row_do_not_count(looked_at, set_speed):
    set_speed(1e11)
    few_long = sized(looked_at, 100_000, [SHORT] * 995 + [LONG] * 5)
    without = choose_budget(sized(looked_at, 99_500, [SHORT] * 995), CPU)
    assert replace(choose_budget(few_long, CPU), dropped=0.0) == without and without.records == 99_500
    half_long = sized(looked_at, 1200, [SHORT] * 50 + [LONG] * 50)
    assert "check: 600 records are enough to try" in render(
        Choices(
            Path("mine.yaml"), half_long, choose_budget(half_long, CPU), choose_task(half_long, None, None), CPU, ()
        )
    )


@pytest.mark.parametrize(("fitting", "expected"), [(0, "none of 400 records fits"), (4, "only 16 of 400 records fit")])
def test_hardly_any_record_that_fits_into_a_row_is_an_error(looked_at, fitting, expected):
    lengths = [LONG] * (100 - fitting) + [SHORT] * fitting
    with pytest.raises(UserError, match=f"{expected} into a row of 2,048 tokens.*divide the texts") as raised:
        choose_budget(sized(looked_at, 400, lengths), CPU)
    assert "\n" not in str(raised.value) and "rows.jsonl" in str(raised.value)
