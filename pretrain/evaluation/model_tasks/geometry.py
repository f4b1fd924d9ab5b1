"""Task geometry: the relation between the embeddings of the two views.

The rows of X are the predictions and the rows of Y are their targets. The metrics are:

    paired_cosine                   mean cosine of a prediction and its target
    shuffled_cosine                 mean cosine of a prediction and the targets whose text differs from its own target
    effective_rank_context          effective rank of the predictions; see pretrain/objectives/monitors.py
    effective_rank_target           effective rank of the targets
    linear_residual                 min over A of |XA - Y| / |Y| in Frobenius norms: the residual of a linear map
    linear_residual_unseen          residual of an affine map on rows that it was not fitted on
    difference_singular             mean of the 100 largest singular values of X - Y, divided by sqrt(number of rows)

LLM-JEPA (arXiv 2509.14252) takes a small linear_residual and small singular values of X - Y as signs that the views are
nearly linear images of each other. But a linear map fits any data if the embedding dimension is at least the number of
rows, and it also fits embeddings that are all equal. For linear_residual_unseen the map is therefore fitted on every
second row and measured on the remaining rows, relative to the distance of their targets from the mean target of the
fitted rows. A value of 1 is no better than predicting that mean. The files in evaluation/geometry list the 100 largest
singular values of A and of X - Y.
"""

import math

import torch
import torch.nn.functional as F

from data_prep.utils.files import write_json
from pretrain.evaluation.model_tasks.embedded import PairEmbeddings, embed_test_pairs
from pretrain.evaluation.task_run import CheckpointTask
from pretrain.objectives.monitors import effective_rank
from pretrain.tasks.scoring import TaskResult

BLOCK_ROWS = 1024
"""Number of predictions whose cosines with all targets are computed at a time."""
SINGULAR_VALUES = 100
"""Number of singular values to report, largest first."""
RELATIVE_TOLERANCE = 1e-6
"""Fraction of the largest singular value below which singular values are treated as zero.

They are dominated by fp32 rounding errors.
"""


def evaluate(run: CheckpointTask) -> TaskResult:
    """Embed the test rows and compute the metrics of the first direction of prediction."""
    pairs, rows, skipped = embed_test_pairs(run)
    metrics, values = measure(pairs[""])
    folder = run.folder / "geometry"
    folder.mkdir(exist_ok=True)
    write_json(folder / f"{run.name}.json", values)
    return TaskResult(rows, metrics, skipped)


def measure(pairs: PairEmbeddings) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Return the metrics, and the largest singular values of the linear map and of the differences, largest first."""
    prediction, target = pairs.prediction.double(), pairs.target.double()
    linear = torch.linalg.pinv(prediction, rtol=RELATIVE_TOLERANCE) @ target
    differences = torch.linalg.svdvals(prediction - target)[:SINGULAR_VALUES]
    metrics = {
        "paired_cosine": F.cosine_similarity(prediction, target).mean().item(),
        "shuffled_cosine": shuffled_cosine(pairs),
        "effective_rank_context": effective_rank(prediction).item(),
        "effective_rank_target": effective_rank(target).item(),
        "linear_residual": ((prediction @ linear - target).norm() / target.norm()).item(),
        "linear_residual_unseen": unseen_residual(prediction, target),
        "difference_singular": differences.mean().item() / len(target) ** 0.5,
    }
    metrics = {name: value for name, value in metrics.items() if not math.isnan(value)}
    return metrics, {"map": torch.linalg.svdvals(linear)[:SINGULAR_VALUES].tolist(), "difference": differences.tolist()}


def unseen_residual(prediction: torch.Tensor, target: torch.Tensor) -> float:
    """Fit an affine map on the even rows and return its residual on the odd rows.

    The residual is divided by the distance of the odd targets from the mean of the even targets.
    """
    prediction_mean, target_mean = prediction[::2].mean(dim=0), target[::2].mean(dim=0)
    linear = torch.linalg.pinv(prediction[::2] - prediction_mean, rtol=RELATIVE_TOLERANCE) @ (target[::2] - target_mean)
    centred_target = target[1::2] - target_mean
    return float(((prediction[1::2] - prediction_mean) @ linear - centred_target).norm() / centred_target.norm())


def shuffled_cosine(pairs: PairEmbeddings) -> float:
    """Return the mean cosine of each prediction and the targets that differ from its own.

    The result is NaN if all targets are equal.
    """
    prediction, target = F.normalize(pairs.prediction, dim=-1), F.normalize(pairs.target, dim=-1)
    total, count = 0.0, 0
    for start in range(0, len(prediction), BLOCK_ROWS):
        negatives_mask = pairs.key[start : start + BLOCK_ROWS, None] != pairs.key
        similarity = prediction[start : start + BLOCK_ROWS] @ target.T
        total += similarity[negatives_mask].sum().item()
        count += int(negatives_mask.sum())
    return total / count if count else float("nan")
