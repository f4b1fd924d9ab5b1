"""retrieval: find the target view of each test row among those of all rows, by the cosine of the prediction.

recall_at_1, recall_at_10: share of rows whose target is among the 1 or 10 nearest. mrr: mean of 1 / rank. Candidates are the different targets, so
one that several rows have is a hit for each of them; a tie counts against the model, else embeddings that are all the same would find everything.
Where the objective predicts in more directions than one, those after the first have a prefix.
"""

import torch
import torch.nn.functional as F

from pretrain.evaluation.model_tasks.embedded import PairEmbeddings, embed_test_pairs
from pretrain.evaluation.task_run import CheckpointTask
from pretrain.tasks.scoring import TaskResult, rate

ROWS = 1024
"""Compared at a time."""


def evaluate(run: CheckpointTask) -> TaskResult:
    """Embed the test rows and rank their targets."""
    pairs, rows, left_out = embed_test_pairs(run)
    metrics = {
        f"{prefix}{name}": value
        for prefix, of_direction in pairs.items()
        for name, value in score(of_direction).items()
    }
    candidates = len(pairs[""].key.unique())
    return TaskResult(rows, metrics, {"candidates": candidates} | left_out)


def score(pairs: PairEmbeddings) -> dict[str, float]:
    """Return rates over the rows that fit."""
    rank = ranks(pairs)
    return {
        "recall_at_1": rate((rank <= 1).tolist()),
        "recall_at_10": rate((rank <= 10).tolist()),
        "mrr": (1 / rank.double()).mean().item(),
    }


def ranks(pairs: PairEmbeddings) -> torch.Tensor:
    """1 + the number of other targets that are at least as near as a row's own: (N,) int64."""
    prediction, target = F.normalize(pairs.prediction, dim=-1), F.normalize(pairs.target, dim=-1)
    _, place = pairs.key.unique(return_inverse=True)
    first = torch.full((int(place.max()) + 1,), len(place)).scatter_reduce(0, place, torch.arange(len(place)), "amin")
    found = []
    for start in range(0, len(prediction), ROWS):
        similarity = prediction[start : start + ROWS] @ target[first].T
        own = place[start : start + ROWS, None]
        nearer = similarity >= similarity.gather(1, own)
        found.append(nearer.sum(dim=1))  # its own target is one of them
    return torch.cat(found)
