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
    scales = 10.0 ** np.linspace(-2, 1, 8)
    embeddings = (centres[kind] + 0.8 * random.normal(size=(rows, 8))) * scales + 5 * scales
    return probe.LabelledEmbeddings(embeddings, np.array(["red", "green", "blue"])[kind])


def slow_fit(inputs, labels, penalty):
    """Fit a softmax regression by gradient descent; return the function that predicts labels."""
    names = sorted(set(labels))
    inputs = np.c_[inputs, np.ones(len(labels))]
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
    return lambda rows: np.array(names)[(np.c_[rows, np.ones(len(rows))] @ weights).argmax(axis=1)]


def test_a_plain_softmax_regression_predicts_the_same_labels(monkeypatch):
    monkeypatch.setattr(probe, "PENALTIES", [1000.0, 30.0, 1.0])
    train, test = labelled(60, 1), labelled(2000, 2)
    mean, deviation = train.embeddings.mean(axis=0), train.embeddings.std(axis=0)
    scaled, scaled_test = ((embeddings - mean) / deviation for embeddings in (train.embeddings, test.embeddings))
    fitted, checked = probe.LabelledEmbeddings(scaled, train.labels).split()
    assert (len(fitted.labels), len(checked.labels)) == (48, 12)
    right = [(slow_fit(*fitted, penalty)(checked.embeddings) == checked.labels).sum() for penalty in probe.PENALTIES]
    assert len(set(right)) > 1, "the penalties should differ on the held-out rows"
    expected = slow_fit(scaled, train.labels, probe.PENALTIES[int(np.argmax(right))])(scaled_test)
    found = probe.predict(train, test.embeddings)
    assert (found == expected).mean() > 0.998
    assert (found == test.labels).mean() > 0.7


def test_the_penalty_suits_the_rows():
    """With fewer rows than dimensions and labels that are noise, only a strong penalty predicts the common label."""
    random = np.random.default_rng(0)
    labels = np.where(random.random(400) < 0.8, "common", "rare")
    noise = probe.LabelledEmbeddings(random.normal(size=(100, 200)), labels[:100])
    assert (probe.predict(noise, random.normal(size=(300, 200))) == "common").mean() > 0.95
    embeddings = random.normal(size=(3000, 200))
    clear = np.where(embeddings[:, 0] + 0.02 * embeddings[:, 1:].sum(axis=1) > 0, "yes", "no")
    train = probe.LabelledEmbeddings(embeddings[:1500], clear[:1500])
    # A penalty of 100 predicts 90% of the labels, and a penalty of 1 predicts 93%.
    assert (probe.predict(train, embeddings[1500:]) == clear[1500:]).mean() > 0.915


def test_rounding_errors_of_equal_embeddings_reveal_nothing():
    random = np.random.default_rng(0)
    labels = np.array(["a", "b"])[random.integers(2, size=400)]
    embeddings = np.ones((400, 16)) + 3e-7 * random.normal(size=(400, 16))
    embeddings[labels == "a", 0] += 3e-7
    train = probe.LabelledEmbeddings(embeddings[:200], labels[:200])
    assert len(set(probe.predict(train, embeddings[200:]))) == 1


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


def test_columns_without_labels_are_refused(evaluate, messages):
    rows = rows_of("train", 50)
    with pytest.raises(UserError, match="50 rows can be embedded, with 50 labels in the column 'text'; use a column"):
        evaluate(rows, rows, column="text")
    held_out = probe.LabelledEmbeddings(np.arange(50), np.arange(50)).split()[1].labels[0]
    for labels in ([1] * 50, [1 + int(number == held_out) for number in range(50)]):
        with pytest.raises(UserError, match=r"in the column 'long', all but a few of which are equal"):
            evaluate([row | {"long": label} for row, label in zip(rows, labels, strict=True)], rows)
    for value in (None, "", float("nan"), [1]):
        with pytest.raises(UserError, match=r"task\.test: row 2 has no label in the column 'long'; .*\(text, code\)"):
            evaluate(rows, [rows[0], {"text": "a", "code": "b", "long": value}])

    numbers = [row | {"long": int(row["long"])} for row in rows]
    as_floats = [row | {"long": float(row["long"])} for row in numbers]
    assert evaluate(numbers, as_floats).metrics == evaluate(numbers, numbers).metrics
    assert not any("count as wrong" in line for line in messages)
    evaluate(numbers, [*numbers, numbers[0] | {"long": 7}])
    assert any("1 test rows count as wrong: no train row has their label" in line for line in messages)
