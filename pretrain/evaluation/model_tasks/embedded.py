"""Embeddings of the test rows, as pairs of predictions and targets, for tasks that compare embeddings."""

from typing import NamedTuple

import numpy as np
import torch

from data_prep.utils.console import UserError
from pretrain.evaluation.embed import embed, finite_rows
from pretrain.evaluation.task_run import CheckpointTask


class PairEmbeddings(NamedTuple):
    """Predictions from one view of N rows, and embeddings of the predicted view."""

    prediction: torch.Tensor
    """(N, D) fp32 predictions, read out as in the objective: with its predictor tokens, if any."""
    target: torch.Tensor
    """(N, D) fp32 target embeddings."""
    key: torch.Tensor
    """(N,) identifiers of the target encodings: equal keys mean equal texts, and in context equal contexts too."""


def embed_test_pairs(
    run: CheckpointTask, *, in_context: bool = False
) -> tuple[dict[str, PairEmbeddings], int, dict[str, int]]:
    """Return the pairs of the test rows, the number of rows, and the nonzero counts of skipped rows by reason.

    too_long counts the rows that do not fit into the model's positions, and not_finite the rows with embeddings that
    are not finite. The pairs map the metric prefix of each direction of prediction, such as `text_to_code_`, to its
    embeddings; the prefix of the first direction is empty. With `in_context`, the second of two views is encoded after
    the first one. Raises UserError if fewer than two rows remain.
    """
    rows = run.read_test()
    embeddings = embed(run.export, [row.views for row in rows], in_context=in_context)
    names = run.config.data.views
    usable = finite_rows((*embeddings.views.values(), *embeddings.predictions.values()))
    skipped = {"too_long": int((~embeddings.fits).sum()), "not_finite": int((embeddings.fits & ~usable).sum())}
    if embeddings.fits.sum() < 2:
        raise UserError(
            f"{run.name} (task.test): fewer than two rows fit into the positions of the model; use shorter rows"
        )
    if usable.sum() < 2:
        raise UserError(
            f"{run.export}: the embeddings of {skipped['not_finite']:,} of {len(rows):,} rows are not finite because "
            "the weights of this checkpoint have diverged; evaluate an earlier checkpoint"
        )
    pairs = {}
    for number, ((source, target), prediction) in enumerate(embeddings.predictions.items()):
        encoded = [row.views if in_context else row.views[names.index(target)] for row in rows]
        number_of = {texts: number for number, texts in enumerate(dict.fromkeys(encoded))}
        key = np.array([number_of[texts] for texts in encoded])
        pairs[f"{source}_to_{target}_" if number else ""] = PairEmbeddings(
            torch.from_numpy(prediction[usable]),
            torch.from_numpy(embeddings.views[target][usable]),
            torch.from_numpy(key[usable]),
        )
    return pairs, len(rows), {name: count for name, count in skipped.items() if count}
