"""Task retrieval: find the target view of each test row among the targets of all rows, by cosine with the prediction.

recall_at_1 and recall_at_10 are the fractions of rows whose target is among the 1 or 10 nearest, and mrr is the mean of
1 / rank. Candidates are the distinct targets, so a target shared by several rows is a hit for each of them. A tie
counts against the model; otherwise embeddings that are all equal would retrieve everything. If the objective predicts
in several directions, the metrics of all directions after the first have a prefix.
"""

import torch
import torch.nn.functional as F

from pretrain.evaluation.model_tasks.embedded import PairEmbeddings, embed_test_pairs
from pretrain.evaluation.task_run import CheckpointTask
from pretrain.tasks.retrieval import Config
from pretrain.tasks.scoring import TaskResult, rate

BLOCK_ROWS = 1024
"""Number of predictions whose cosines with all candidates are computed at a time."""


def evaluate(run: CheckpointTask) -> TaskResult:
    """Embed the test rows and rank their targets."""
    assert isinstance(run.task, Config)  # the name of the task selects its class
    pairs, rows, skipped = embed_test_pairs(run, in_context=run.task.target == "in_context")
    metrics = {
        f"{prefix}{name}": value for prefix, embeddings in pairs.items() for name, value in score(embeddings).items()
    }
    candidates = len(pairs[""].key.unique())
    return TaskResult(rows, metrics, {"candidates": candidates} | skipped)


def score(pairs: PairEmbeddings) -> dict[str, float]:
    """Return the metrics of one direction of prediction."""
    rank = ranks(pairs)
    return {
        "recall_at_1": rate((rank <= 1).tolist()),
        "recall_at_10": rate((rank <= 10).tolist()),
        "mrr": (1 / rank.double()).mean().item(),
    }


def ranks(pairs: PairEmbeddings) -> torch.Tensor:
    """Return, for each row, 1 + the number of other targets that are at least as near as its own: (N,) int64."""
    prediction, target = F.normalize(pairs.prediction, dim=-1), F.normalize(pairs.target, dim=-1)
    _, candidate = pairs.key.unique(return_inverse=True)  # the number of each row's target among the distinct targets
    candidate_count = int(candidate.max()) + 1
    rows = torch.arange(len(candidate))
    # the first row of each distinct target
    first_row = torch.full((candidate_count,), len(candidate)).scatter_reduce(0, candidate, rows, "amin")
    blocks = []
    for start in range(0, len(prediction), BLOCK_ROWS):
        similarity = prediction[start : start + BLOCK_ROWS] @ target[first_row].T
        own_target = candidate[start : start + BLOCK_ROWS, None]
        at_least_as_near = similarity >= similarity.gather(1, own_target)
        blocks.append(at_least_as_near.sum(dim=1))  # the sum includes the row's own target
    return torch.cat(blocks)
