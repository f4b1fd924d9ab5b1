"""Embeddings of the test rows, as pairs of predictions and targets, for the tasks that compare embeddings."""

from typing import NamedTuple

import numpy as np
import torch

from data_prep.console import UserError
from pretrain.evaluation.embed import embed, finite_rows
from pretrain.evaluation.task_run import CheckpointTask


class PairEmbeddings(NamedTuple):
    """Embeddings of one view of N rows and of the view that it predicts."""

    prediction: torch.Tensor
    """(N, D) fp32, as the objective reads it out: with predictor tokens, where it has any."""
    target: torch.Tensor
    """(N, D) fp32."""
    key: torch.Tensor
    """(N,) equal where the target texts are."""


def embed_test_pairs(run: CheckpointTask) -> tuple[dict[str, PairEmbeddings], int, dict[str, int]]:
    """Return the pairs of the test rows, how many rows there are, and counts of those that were skipped, if any.

    too_long counts rows that do not fit into the model's positions, not_finite those for which its weights give no numbers. The pairs
    are keyed by a prefix for their metrics, which is empty for the first direction. Raises UserError.
    """
    rows = run.read_test()
    found = embed(run.export, [row.views for row in rows])
    names = run.config.data.views
    fit = finite_rows((*found.views.values(), *found.predictions.values()))
    left_out = {"too_long": int((~found.fits).sum()), "not_finite": int((found.fits & ~fit).sum())}
    if found.fits.sum() < 2:
        raise UserError(f"{run.name} (task.test): fewer than two rows fit into the positions of the model")
    if fit.sum() < 2:
        raise UserError(
            f"{run.export}: the embeddings of {left_out['not_finite']:,} of {len(rows):,} rows are not finite numbers: the weights of "
            "this checkpoint have diverged; evaluate an earlier one"
        )
    pairs = {}
    for number, ((source, target), prediction) in enumerate(found.predictions.items()):
        _, key = np.unique([row.views[names.index(target)] for row in rows], return_inverse=True)
        pairs[f"{source}_to_{target}_" if number else ""] = PairEmbeddings(
            torch.from_numpy(prediction[fit]), torch.from_numpy(found.views[target][fit]), torch.from_numpy(key[fit])
        )
    return pairs, len(rows), {name: count for name, count in left_out.items() if count}
