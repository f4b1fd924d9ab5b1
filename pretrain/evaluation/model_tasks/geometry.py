"""Task geometry: the relation between the embeddings of the two views.

X are the predictions and Y the targets. The metrics are:

    paired_cosine                   mean cosine of a prediction and its target
    shuffled_cosine                 mean cosine of a prediction and the targets of rows with another text
    effective_rank_context/_target  see pretrain/objectives/monitors.py
    linear_residual                 min over A of |XA - Y| / |Y| in Frobenius norms: the residual of a linear map
    linear_residual_unseen          residual of an affine map on rows that it was not fitted on
    difference_singular             mean of the 100 largest singular values of X - Y, over the square root of the rows

LLM-JEPA (arXiv 2509.14252) takes a small linear_residual and small singular values of X - Y as signs that the views are
nearly linear images of each other. But a linear map fits any data if D is at least the number of rows, and it also fits
embeddings that are all equal. For linear_residual_unseen the map is therefore fitted on every second row and measured
on the remaining rows, relative to the spread of Y there; a value of 1 is no better than predicting the mean. The files
in evaluation/geometry have the singular values of A and of X - Y.
"""

import torch
import torch.nn.functional as F

from data_prep.files import write_json
from pretrain.evaluation.model_tasks.embedded import PairEmbeddings, embed_test_pairs
from pretrain.evaluation.task_run import CheckpointTask
from pretrain.objectives.monitors import effective_rank
from pretrain.tasks.scoring import TaskResult

ROWS = 1024
"""Number of rows that are compared at a time."""
LEADING = 100
NOISE = 1e-6
"""Fraction of the largest singular value below which singular values are rounding errors of fp32."""


def evaluate(run: CheckpointTask) -> TaskResult:
    """Embed the test rows and compute the metrics of the first direction of prediction."""
    pairs, rows, skipped = embed_test_pairs(run)
    metrics, values = measure(pairs[""])
    folder = run.folder / "geometry"
    folder.mkdir(exist_ok=True)
    write_json(folder / f"{run.name}.json", values)
    return TaskResult(rows, metrics, skipped)


def measure(pairs: PairEmbeddings) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Return the metrics, and the leading singular values of the linear map and of the differences, largest first."""
    prediction, target = pairs.prediction.double(), pairs.target.double()
    linear = torch.linalg.pinv(prediction, rtol=NOISE) @ target
    differences = torch.linalg.svdvals(prediction - target)[:LEADING]
    metrics = {
        "paired_cosine": F.cosine_similarity(prediction, target).mean().item(),
        "shuffled_cosine": shuffled_cosine(pairs),
        "effective_rank_context": effective_rank(prediction).item(),
        "effective_rank_target": effective_rank(target).item(),
        "linear_residual": ((prediction @ linear - target).norm() / target.norm()).item(),
        "linear_residual_unseen": unseen_residual(prediction, target),
        "difference_singular": differences.mean().item() / len(target) ** 0.5,
    }
    values = {"map": torch.linalg.svdvals(linear)[:LEADING].tolist(), "difference": differences.tolist()}
    return {name: value for name, value in metrics.items() if value == value}, values  # without NaNs


def unseen_residual(prediction: torch.Tensor, target: torch.Tensor) -> float:
    """Return the residual on the odd rows of an affine map that is fitted on the even rows.

    It is relative to the distance of the odd targets from the mean of the even ones.
    """
    means = prediction[::2].mean(dim=0), target[::2].mean(dim=0)
    fitted = torch.linalg.pinv(prediction[::2] - means[0], rtol=NOISE) @ (target[::2] - means[1])
    spread = target[1::2] - means[1]
    return float(((prediction[1::2] - means[0]) @ fitted - spread).norm() / spread.norm())


def shuffled_cosine(pairs: PairEmbeddings) -> float:
    """Return the mean cosine of each prediction and the targets with another text; NaN if all targets are the same."""
    prediction, target = F.normalize(pairs.prediction, dim=-1), F.normalize(pairs.target, dim=-1)
    total, count = 0.0, 0
    for start in range(0, len(prediction), ROWS):
        negatives_mask = pairs.key[start : start + ROWS, None] != pairs.key
        similarity = prediction[start : start + ROWS] @ target.T
        total += similarity[negatives_mask].sum().item()
        count += int(negatives_mask.sum())
    return total / count if count else float("nan")
