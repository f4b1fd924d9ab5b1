"""Which direction of each metric is better, so that the report can tell help from harm.

A table for each task, and one for the tags of validation. It imports nothing heavy, because commands read it before they load torch.
"""

from typing import Literal

Direction = Literal["higher", "lower", "neither"]
"""neither: more of it is not better by itself, for instance because collapsed embeddings have it too."""
Directions = dict[str, Direction]

VALIDATION = "validation"
"""As a task: the metric is a tag of metrics.jsonl that begins with `validation/`."""
_LOSSES: Directions = dict.fromkeys(("lm", "jepa", "sigreg", "vicreg", "coding_rate"), "lower")
_MONITORS: Directions = {"paired_cosine": "neither", "shuffled_cosine": "lower", "effective_rank": "higher", "retrieval_at_1": "higher"}
_LABELS: Directions = {"likelihood": "higher", "generation": "higher", "prefix": "higher", "stopped": "higher", "majority": "neither"}

METRICS: dict[str, Directions] = {
    "nl_rx": {"exact": "higher", "equal": "higher", "prefix": "higher", "contains": "higher", "stopped": "higher", "equal_unseen": "higher",
              "exact_unseen": "higher", "equal_proper": "higher", "exact_proper": "higher", "undecided": "lower"},
    "gsm8k": {"final": "higher", "final_any": "higher", "answered": "higher", "stopped": "higher"},
    "spider": {"execution": "higher", "exact": "higher", "execution_unseen": "higher", "exact_unseen": "higher", "runs": "higher",
               "stopped": "higher", "execution_filled": "higher"},
    "rotten_tomatoes": _LABELS,
    "yelp": _LABELS,
    "nq_open": {"exact": "higher", "contains": "higher", "stopped": "higher"},
    "hellaswag": {"normalised": "higher", "likelihood": "higher"},
    "retrieval": {"recall_at_1": "higher", "recall_at_10": "higher", "mrr": "higher"},
    "geometry": {"paired_cosine": "neither", "shuffled_cosine": "lower", "effective_rank_context": "higher", "effective_rank_target": "higher",
                 "linear_residual": "neither", "linear_residual_unseen": "lower", "difference_singular": "neither"},
    "loss": _LOSSES | _MONITORS,
    "lm_eval": {},  # the harness says it of each metric, and the result records it
    VALIDATION: {f"loss/{name}": direction for name, direction in _LOSSES.items()}
                | {f"embedding/{name}": direction for name, direction in _MONITORS.items()},
}
"""Task -> metric -> direction. The metrics of further directions of `retrieval` have the prefix `A_to_B_`."""


def direction(task: str, metric: str) -> Direction | None:
    """Return the direction that a task, or `validation`, declares for a metric; None if it declares none."""
    declared = METRICS.get(task, {})
    if task == "retrieval" and "_to_" in metric:
        return next((found for name, found in declared.items() if metric.endswith(f"_{name}")), None)
    return declared.get(metric)
