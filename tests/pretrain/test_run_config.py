"""Overrides of the configuration of a run: keys that exclude each other, and null."""

import pytest

from data_prep.utils.console import UserError
from pretrain.config import load_config
from tests.commands import run_command, tiny_config, write_config


@pytest.fixture
def with_epochs(tmp_path):
    """Return a configuration whose budget is in epochs."""
    return write_config(tmp_path, tiny_config(tmp_path, train__steps=None, train__epochs=3))


def test_a_budget_on_the_command_line_replaces_the_one_of_the_file(with_epochs, messages):
    train = load_config(with_epochs, ["train.steps=50"]).train
    assert (train.steps, train.epochs) == (50, None)
    assert messages == ["note: train.steps=50 replaces train.epochs=3 of the configuration"]
    assert load_config(with_epochs, ["train.epochs=null", "train.steps=50"]).train.steps == 50
    assert load_config(with_epochs, ["train.epochs=7"]).train.epochs == 7 and len(messages) == 1


@pytest.mark.parametrize(
    "in_file, override, expected",
    [
        ({"warmup_fraction": 0.1}, "train.warmup_steps=2", {"warmup_fraction": None, "warmup_steps": 2}),
        ({"warmup_steps": 2}, "train.warmup_fraction=0.5", {"warmup_fraction": 0.5, "warmup_steps": None}),
        ({"decay_steps": 2}, "train.decay_fraction=0.5", {"decay_fraction": 0.5, "decay_steps": None}),
    ],
)
def test_a_warmup_or_decay_on_the_command_line_replaces_the_one_of_the_file(
    tmp_path, messages, in_file, override, expected
):
    config = tiny_config(tmp_path)
    config["train"] |= {"steps": 10, "schedule": "warmup_stable_decay"} | in_file
    train = load_config(write_config(tmp_path, config), [override]).train
    assert {key: getattr(train, key) for key in expected} == expected and len(messages) == 1


def test_two_budgets_on_the_command_line_or_in_the_file_are_an_error(with_epochs, tmp_path):
    for path, overrides in (
        (with_epochs, ["train.steps=50", "train.tokens=900"]),
        (write_config(tmp_path / "both", tiny_config(tmp_path, train__epochs=3)), []),
    ):
        with pytest.raises(
            UserError, match=r"exactly one of steps, tokens, records and epochs, not steps and (tokens|epochs);"
        ):
            load_config(path, overrides)
    with pytest.raises(UserError, match="there is no budget: set one of steps, tokens, records and epochs"):
        load_config(with_epochs, ["train.epochs=null"])


@pytest.mark.parametrize(
    "override, expected",
    [
        ("evaluation=null", "evaluation: must not be null; for the defaults, remove the section or set evaluation={}"),
        ("evaluation.every=null", "evaluation.every: must not be null; set evaluation.every=0 (the default)"),
        ("evaluation.tasks=null", "evaluation.tasks: must not be null; set evaluation.tasks=[] (the default)"),
        (
            "train.weight_decay=",
            "train.weight_decay: must not be null; set train.weight_decay=0.1 (the default) or train.weight_decay=0",
        ),
        ("checkpoint.background=null", "checkpoint.background: must not be null; set checkpoint.background=true (the"),
        ("evaluation.device=null", "evaluation.device: must not be null; set evaluation.device=cpu (the default)"),
        ("train.learning_rate=null", "train.learning_rate: must not be null; set a value"),
        ("data.path=null", "data.path: must not be null; set a value"),
        ("objective.weight=null", "objective.weight: must not be null; set objective.weight=1.0 (the default)"),
    ],
)
def test_null_is_answered_with_the_value_to_set(with_epochs, override, expected):
    with pytest.raises(UserError) as raised:
        load_config(with_epochs, [override])
    assert str(raised.value).startswith(expected)


def test_the_command_notes_the_replaced_budget(with_epochs):
    done = run_command(["python", "launcher/run.py", with_epochs, "train.steps=5", "--dry-run"], check=False)
    assert "note: train.steps=5 replaces train.epochs=3 of the configuration" in done.stdout
