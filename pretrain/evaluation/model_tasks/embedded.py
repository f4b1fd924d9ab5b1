"""Embeddings of the test rows, as pairs of predictions and targets, for tasks that compare embeddings."""

from typing import NamedTuple

import numpy as np
import torch

from data_prep.console import UserError
from pretrain.evaluation.embed import embed, finite_rows
from pretrain.evaluation.task_run import CheckpointTask


class PairEmbeddings(NamedTuple):
    """Predictions from one view of N rows, and embeddings of the predicted view."""

    prediction: torch.Tensor
    """(N, D) fp32 predictions, as the objective reads them out: with predictor tokens if it has any."""
    target: torch.Tensor
    """(N, D) fp32 target embeddings."""
    key: torch.Tensor
    """(N,) identifiers of the target texts: equal keys mean equal texts."""


def embed_test_pairs(run: CheckpointTask) -> tuple[dict[str, PairEmbeddings], int, dict[str, int]]:
    """Return the pairs of the test rows, the number of rows, and the counts of skipped rows that are not 0.

    too_long counts the rows that do not fit into the model's positions, and not_finite the rows with embeddings that
    are not finite. The pairs are keyed by the prefix of their metrics, which is empty for the first direction. Raises
    UserError if fewer than two rows remain.
    """
    rows = run.read_test()
    found = embed(run.export, [row.views for row in rows])
    names = run.config.data.views
    fit = finite_rows((*found.views.values(), *found.predictions.values()))
    skipped = {"too_long": int((~found.fits).sum()), "not_finite": int((found.fits & ~fit).sum())}
    if found.fits.sum() < 2:
        raise UserError(
            f"{run.name} (task.test): fewer than two rows fit into the positions of the model; use shorter rows"
        )
    if fit.sum() < 2:
        raise UserError(
            f"{run.export}: the embeddings of {skipped['not_finite']:,} of {len(rows):,} rows are not finite because "
            "the weights of this checkpoint have diverged; evaluate an earlier one"
        )
    pairs = {}
    for number, ((source, target), prediction) in enumerate(found.predictions.items()):
        _, key = np.unique([row.views[names.index(target)] for row in rows], return_inverse=True)
        pairs[f"{source}_to_{target}_" if number else ""] = PairEmbeddings(
            torch.from_numpy(prediction[fit]), torch.from_numpy(found.views[target][fit]), torch.from_numpy(key[fit])
        )
    return pairs, len(rows), {name: count for name, count in skipped.items() if count}
