"""The linear probe reads labels from embeddings: compared with a plain implementation, and run on an export."""

import json

import numpy as np
import pytest

from data_prep.nlrx_grammar import generate
from data_prep.utils.console import UserError
from pretrain.config import load_config, parse_task
from pretrain.evaluation.model_tasks import probe
from pretrain.evaluation.task_run import CheckpointTask
from tests.commands import tiny_config, write_config
from tests.exports import VIEWS, write_model_export


def labelled(rows, seed):
    """Return three overlapping classes in eight dimensions of very different scales."""
    random = np.random.default_rng(seed)
    kind = random.integers(3, size=rows)
    centres = np.random.default_rng(9).normal(size=(3, 8))
    scales = 10.0 ** np.arange(-4, 4)
    embeddings = (centres[kind] + 0.8 * random.normal(size=(rows, 8))) * scales + 5 * scales
    return probe.LabelledEmbeddings(embeddings, np.array(["red", "green", "blue"])[kind])


def slow_fit(embeddings, labels, penalty):
    """Fit a softmax regression by gradient descent; return the function that predicts labels."""
    mean, deviation = embeddings.mean(axis=0), embeddings.std(axis=0)
    names = sorted(set(labels))
    inputs = np.c_[(embeddings - mean) / deviation, np.ones(len(labels))]
    targets = np.array([[label == name for name in names] for label in labels], float)
    weights = np.zeros((inputs.shape[1], len(names)))
    shrunk = np.ones_like(weights)
    shrunk[-1] = 0  # not the intercept
    for _ in range(20_000):
        scores = np.exp(inputs @ weights)
        gradient = inputs.T @ (scores / scores.sum(axis=1, keepdims=True) - targets) + penalty * shrunk * weights
        weights -= gradient / (len(labels) + penalty)
        if np.abs(gradient).max() < 1e-7:
            break
    return lambda rows: np.array(names)[(np.c_[(rows - mean) / deviation, np.ones(len(rows))] @ weights).argmax(axis=1)]


def test_a_plain_softmax_regression_predicts_the_same_labels(monkeypatch):
    monkeypatch.setattr(probe, "PENALTIES", [1.0, 30.0, 1000.0])
    train, test = labelled(60, 1), labelled(2000, 2)
    held_out = np.arange(60) % 5 == 0
    right = [
        (
            slow_fit(train.embeddings[~held_out], train.labels[~held_out], penalty)(train.embeddings[held_out])
            == train.labels[held_out]
        ).sum()
        for penalty in probe.PENALTIES
    ]
    assert len(set(right)) > 1, "the penalties should differ on the held-out rows"
    expected = slow_fit(train.embeddings, train.labels, probe.PENALTIES[int(np.argmax(right))])(test.embeddings)
    found = probe.predict(train, test.embeddings)
    assert (found == expected).mean() > 0.998
    assert (found == test.labels).mean() > 0.7


@pytest.fixture(scope="module")
def evaluate(prepared, make_model, tmp_path_factory):
    """Return a function that runs the task on rows with the column `long`: whether the text is long."""
    folder = tmp_path_factory.mktemp("probe")
    jepa = {"run": "tiny", "step": 7, "objective": {"name": "next_token"}, "views": list(VIEWS)}
    export = write_model_export(folder, prepared, make_model(0), 0, jepa, "llama")
    (folder / "evaluation").mkdir()
    config = load_config(write_config(folder, tiny_config(folder)))

    def evaluate(train, test, **options):
        for name, rows in (("train", train), ("test", test)):
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        files = {name: str(folder / f"{name}.jsonl") for name in ("train", "test")}
        task = parse_task({"name": "probe", "column": "long"} | files | options, "task")
        return probe.evaluate(CheckpointTask(config, task, 7, export, folder / "evaluation"))

    return evaluate


def rows_of(split, count):
    pairs = [generate(0, split, index) for index in range(count)]
    return [{"text": text, "code": code, "long": len(text) > 60} for text, code in pairs]


def test_a_probe_reads_what_an_embedding_knows(evaluate):
    train, test = rows_of("train", 200), rows_of("test", 100)
    result = evaluate(train, test)
    majority = max(sum(row["long"] for row in test), sum(not row["long"] for row in test)) / 100
    assert result.rows == 100 and result.counts == {"train": 200, "labels": 2}
    assert result.metrics["majority"] == majority
    assert result.metrics["accuracy"] > majority + 0.1, "even a random model should know the length of its text"

    shuffled = [row | {"long": other["long"]} for row, other in zip(train, [*train[7:], *train[:7]], strict=True)]
    assert evaluate(shuffled, test).metrics["accuracy"] < result.metrics["accuracy"]

    same_text = [row | {"text": "lines"} for row in train], [row | {"text": "lines"} for row in test]
    assert evaluate(*same_text).metrics["accuracy"] <= majority, "equal embeddings should reveal nothing"
    in_code = [[row | {"text": "lines", "code": row["text"]} for row in rows] for rows in (train, test)]
    assert evaluate(*in_code, view="code").metrics["accuracy"] > majority


def test_rows_without_an_embedding_count_as_wrong(evaluate):
    train, test = rows_of("train", 50), rows_of("test", 20)
    too_long = {"text": "number " * 400, "code": "[0-9]", "long": True}
    whole = evaluate(train, test)
    result = evaluate([*train, too_long], [*test, *[too_long] * 20])
    assert result.counts == {"train": 50, "labels": 2, "unusable_train": 1, "unusable_test": 20}
    assert result.metrics["accuracy"] == whole.metrics["accuracy"] / 2
    with pytest.raises(UserError, match="no row can be embedded: all of them are too long"):
        evaluate(train, [too_long])


def test_columns_without_labels_are_refused(evaluate):
    rows = rows_of("train", 50)
    with pytest.raises(UserError, match="50 rows can be embedded, with 50 labels in the column 'text'; a probe needs"):
        evaluate(rows, rows, column="text")
    with pytest.raises(UserError, match="50 rows can be embedded, with 1 labels"):
        evaluate([row | {"long": 1} for row in rows], rows)
    with pytest.raises(UserError, match=r"task\.test: row 2 has no label in the column 'long'.*the row has text, code"):
        evaluate(rows, [rows[0], {"text": "a", "code": "b"}])
