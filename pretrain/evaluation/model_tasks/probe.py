"""Task probe: read a label from the embedding of a view with a linear classifier.

The model does not change. A logistic regression is fitted to the embeddings of the train rows, whose dimensions are
scaled to a variance of 1. The weight of its penalty is one of PENALTIES: the one with which a fit to four fifths of the
train rows predicts most labels of the held-out fifth. The final fit uses all train rows. (Radford et al., arXiv
2103.00020, appendix A.3, choose the penalty of their linear probes in this way.)

    accuracy   fraction of the test rows whose label is predicted
    majority   fraction of the test rows that have the most common label
"""

from collections import Counter
from typing import NamedTuple

import numpy as np

from data_prep.utils.console import UserError
from data_prep.utils.progress import Progress
from pretrain.evaluation.embed import Embedder
from pretrain.evaluation.task_run import CheckpointTask
from pretrain.tasks.probe import Config
from pretrain.tasks.scoring import TaskResult

PENALTIES = [10.0**power for power in range(-2, 4)]
"""Weights of half of the squared coefficients, added to the summed loss of all rows, in nats."""
HELD_OUT = 5
"""One of this many train rows is held out to choose the weight of the penalty."""


class LabelledEmbeddings(NamedTuple):
    """Embeddings and labels of N rows."""

    embeddings: np.ndarray
    """(N, D) fp64."""
    labels: np.ndarray
    """(N,) text."""

    def split(self) -> "tuple[LabelledEmbeddings, LabelledEmbeddings]":
        """Return the rows to fit a probe to, and the ones held out to choose its penalty."""
        held_out = np.arange(len(self.labels)) % HELD_OUT == 0
        fitted, checked = (
            LabelledEmbeddings(self.embeddings[rows], self.labels[rows]) for rows in (~held_out, held_out)
        )
        return fitted, checked


def evaluate(run: CheckpointTask) -> TaskResult:
    """Fit the probe to the train rows and score it on the test rows.

    Test rows whose embedding is not finite, because they are too long or because the weights have diverged, count as
    wrong. Raises UserError if no test row or too few train rows can be embedded, or if the column has no labels.
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
            "of this checkpoint have diverged"
        )
    train = LabelledEmbeddings(embeddings["train"][usable["train"]], labels["train"][usable["train"]])
    distinct = len(set(train.labels))
    if len(set(train.split()[0].labels)) < 2 or 2 * distinct > len(train.labels):
        raise UserError(
            f"{run.name} (task.train): {len(train.labels):,} rows can be embedded, with {distinct:,} labels in the "
            f"column {task.column!r}; a probe needs at least two labels, and two rows for each label on average"
        )
    predicted = predict(train, embeddings["test"][usable["test"]])
    total = len(rows["test"])
    metrics = {
        "accuracy": int((predicted == labels["test"][usable["test"]]).sum()) / total,
        "majority": max(Counter(labels["test"].tolist()).values()) / total,
    }
    counts = {"train": len(train.labels), "labels": distinct} | counts
    return TaskResult(total, metrics, {name: count for name, count in counts.items() if count})


def predict(train: LabelledEmbeddings, embeddings: np.ndarray) -> np.ndarray:
    """Return the labels, (M,), that a probe fitted to the train rows predicts for embeddings (M, D)."""
    from sklearn.linear_model import LogisticRegression  # imported late because it belongs to an extra
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    fitted, checked = train.split()
    probes = [
        make_pipeline(StandardScaler(), LogisticRegression(C=1 / penalty, max_iter=1000)) for penalty in PENALTIES
    ]
    scores = []
    with Progress("fitting the probe", len(probes) + 1, "fits") as progress:
        for probe in probes:
            scores.append(probe.fit(*fitted).score(*checked))
            progress.update(1)
        best = probes[int(np.argmax(scores))].fit(*train)
        progress.update(1)
    predicted: np.ndarray = best.predict(embeddings)
    return predicted
