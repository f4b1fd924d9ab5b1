"""What the tasks on embeddings look at: pairs of predictions and targets of the test rows."""

from typing import NamedTuple

import numpy as np
import torch

from data_prep.console import UserError
from pretrain.evaluation.embed import embed
from pretrain.evaluation.task_run import CheckpointTask


class Pairs(NamedTuple):
    """Of N rows, the embeddings of one view that predicts another."""

    prediction: torch.Tensor
    """(N, D) fp32, as the objective reads it out: with predictor tokens, where it has any."""
    target: torch.Tensor
    """(N, D) fp32."""
    key: torch.Tensor
    """(N,) equal where the target texts are."""


def embedded_pairs(run: CheckpointTask) -> tuple[dict[str, Pairs], int, int]:
    """Return the pairs of the test rows, how many rows there are, and how many were too long.

    The pairs are keyed by a prefix for their metrics, which is empty for the first direction. Raises UserError.
    """
    rows = run.read_test()
    found = embed(run.export, [row.views for row in rows])
    names = run.config.data.views
    pairs, fit = {}, np.ones(len(rows), bool)
    for array in (*found.views.values(), *found.predictions.values()):
        fit &= ~np.isnan(array).any(axis=1)
    if fit.sum() < 2:
        raise UserError(f"{run.name} (task.test): fewer than two rows fit into the positions of the model")
    for number, ((source, target), prediction) in enumerate(found.predictions.items()):
        _, key = np.unique([row.views[names.index(target)] for row in rows], return_inverse=True)
        pairs[f"{source}_to_{target}_" if number else ""] = Pairs(
            torch.from_numpy(prediction[fit]), torch.from_numpy(found.views[target][fit]), torch.from_numpy(key[fit]))
    return pairs, len(rows), int((~fit).sum())
