"""Task probe: read a label from the embedding of a view with a linear classifier.

The model does not change. A logistic regression is fitted to the embeddings of the train rows, whose dimensions are
scaled to a variance of 1. The weight of its penalty is one of PENALTIES: the one with which a fit to four fifths of the
train rows, drawn at random, predicts most labels of the held-out fifth. The final fit uses all train rows. (Radford et
al., arXiv 2103.00020, appendix A.3, choose the penalty of their linear probes in this way.) Differences that are as
small as rounding errors of the embeddings are ignored.

    accuracy   fraction of the test rows whose label is predicted
    majority   fraction of the test rows that have the most common label
"""

import logging
from collections import Counter
from typing import NamedTuple

import numpy as np

from data_prep.utils.console import UserError
from data_prep.utils.progress import Progress
from pretrain.evaluation.embed import Embedder
from pretrain.evaluation.task_run import CheckpointTask
from pretrain.tasks.probe import Config
from pretrain.tasks.scoring import TaskResult

logger = logging.getLogger(__name__)

PENALTIES = [10.0**power for power in range(3, -3, -1)]
"""Weights of half of the squared coefficients, added to the summed loss of all rows, in nats. The first of several
weights that are equally good is used."""
HELD_OUT = 5
"""One of this many train rows is held out to choose the weight of the penalty."""
SMALLEST_DEVIATION = 1e-5
"""Smallest standard deviation of a dimension that is not ignored, relative to the RMS of all embeddings."""


class LabelledEmbeddings(NamedTuple):
    """Embeddings and labels of N rows."""

    embeddings: np.ndarray
    """(N, D) fp64."""
    labels: np.ndarray
    """(N,) text."""

    def split(self) -> "tuple[LabelledEmbeddings, LabelledEmbeddings]":
        """Return the rows to fit a probe to, and the ones held out to choose its penalty."""
        held_out = np.random.default_rng(0).permutation(len(self.labels)) % HELD_OUT == 0
        fitted, checked = (
            LabelledEmbeddings(self.embeddings[rows], self.labels[rows]) for rows in (~held_out, held_out)
        )
        return fitted, checked


def evaluate(run: CheckpointTask) -> TaskResult:
    """Fit the probe to the train rows and score it on the test rows.

    Test rows whose embedding is not finite, because they are too long or because the weights have diverged, count as
    wrong. Raises UserError if no test row can be embedded, or if a probe cannot be fitted to the train rows.
    """
    task = run.task
    assert isinstance(task, Config)  # the name of the task selects its class
    embedder, view = Embedder(run.export), task.view_number(run.config.data.views)
    rows = {"train": run.read_train(), "test": run.read_test()}
    labels = {key: np.array(task.labels(rows[key], f"task.{key}")) for key in rows}
    embeddings = {
        key: embedder.embed_view(view, [row.views[view] for row in rows[key]])[0].astype(np.float64) for key in rows
    }
    usable = {key: np.isfinite(embeddings[key]).all(axis=1) for key in rows}
    counts = {f"unusable_{key}": int((~usable[key]).sum()) for key in rows}
    if not usable["test"].any():
        raise UserError(
            f"{run.name} (task.test): no row can be embedded: all of them are too long for the model, or the weights "
            "of this checkpoint have diverged; use shorter rows or an earlier checkpoint"
        )
    train = LabelledEmbeddings(embeddings["train"][usable["train"]], labels["train"][usable["train"]])
    _check(train, f"{run.name} (task.train)", task.column)
    if unknown := set(labels["test"]) - set(train.labels):
        logger.warning(
            f"{int(np.isin(labels['test'], list(unknown)).sum()):,} test rows count as wrong: no train row has their "
            f"label in the column {task.column!r}, such as {str(min(unknown))!r}"
        )
    predicted = predict(train, embeddings["test"][usable["test"]])
    total = len(rows["test"])
    metrics = {
        "accuracy": int((predicted == labels["test"][usable["test"]]).sum()) / total,
        "majority": max(Counter(labels["test"].tolist()).values()) / total,
    }
    counts = {"train": len(train.labels), "labels": len(set(train.labels))} | counts
    return TaskResult(total, metrics, {name: count for name, count in counts.items() if count})


def _check(train: LabelledEmbeddings, where: str, column: str) -> None:
    """Raise UserError if a probe cannot be fitted to the train rows."""
    rows, labels = len(train.labels), len(set(train.labels))
    found = f"{where}: {rows:,} rows can be embedded, with {labels:,} labels in the column {column!r}"
    if 2 * labels > rows:
        raise UserError(f"{found}; use a column with at least two rows for each label on average, or more rows")
    if len(set(train.split()[0].labels)) < 2:
        raise UserError(f"{found}, all but a few of which are equal; use a column with at least two frequent labels")


def predict(train: LabelledEmbeddings, embeddings: np.ndarray) -> np.ndarray:
    """Return the labels, (M,), that a probe fitted to the train rows predicts for embeddings (M, D)."""
    from sklearn.linear_model import LogisticRegression  # imported late because it belongs to an extra

    mean, deviation = train.embeddings.mean(axis=0), train.embeddings.std(axis=0)
    deviation[deviation < SMALLEST_DEVIATION * np.sqrt(np.mean(train.embeddings**2))] = np.inf
    train = LabelledEmbeddings((train.embeddings - mean) / deviation, train.labels)
    fitted, checked = train.split()
    probes = [LogisticRegression(C=1 / penalty, max_iter=1000) for penalty in PENALTIES]
    scores = []
    with Progress("fitting the probe", len(probes) + 1, "fits") as progress:
        for probe in probes:
            scores.append(probe.fit(*fitted).score(*checked))
            progress.update(1)
        best = probes[int(np.argmax(scores))].fit(*train)
        progress.update(1)
    predicted: np.ndarray = best.predict((embeddings - mean) / deviation)
    return predicted
