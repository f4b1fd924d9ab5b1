"""Task lm_eval: tasks of the Language Model Evaluation Harness (EleutherAI) on the export; needs the extra lm-eval.

The harness builds its own prompts and downloads its own data. A prompt is plain text after the begin token. It lacks
the separator between context and target, so its format is new to a model that was trained only on pairs. Metrics are
named TASK_METRIC, and `rows` limits the rows of each task.
"""

from typing import Any

from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from data_prep.utils.console import UserError
from pretrain.evaluation.inference import load_causal_lm
from pretrain.evaluation.task_run import CheckpointTask
from pretrain.tasks.directions import MetricDirection, MetricDirections
from pretrain.tasks.lm_eval import Config
from pretrain.tasks.scoring import TaskResult

BATCH = 32


def evaluate(run: CheckpointTask) -> TaskResult:
    """Run the harness. Raises UserError if it is not installed or cannot run a task."""
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
    except ImportError:
        raise UserError(
            "the task lm_eval needs the extra lm-eval; run pip install '.[lm-eval]' in the project's folder"
        ) from None
    assert isinstance(run.task, Config)  # the name of the task selects its class
    model, _ = load_causal_lm(run.export)
    tokenizer = AutoTokenizer.from_pretrained(run.export)
    bos = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    try:
        output = simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH, add_bos_token=True),
            tasks=run.task.harness,
            limit=run.task.rows,
            log_samples=False,
            bootstrap_iters=0,
        )
    except (KeyError, ValueError, OSError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UserError(f"the harness cannot run {', '.join(run.task.harness)}: {reason}") from None
    rows = sum(count["effective"] for count in output["n-samples"].values())
    return TaskResult(
        rows, flat(output["results"]), directions=metric_directions(output["higher_is_better"], output["results"])
    )


def metric_directions(
    higher_is_better: dict[str, dict[str, bool | None]], results: dict[str, dict[str, Any]]
) -> MetricDirections:
    """Return the direction of each metric in `flat(results)` for which the harness declares one."""
    directions: dict[bool | None, MetricDirection] = {True: "higher", False: "lower"}
    metrics = flat(results)
    by_metric: MetricDirections = {}
    for task, values in results.items():
        for name in values:
            metric = f"{task}_{_flat(name)}"
            is_higher_better = higher_is_better.get(task, {}).get(name.split(",")[0])
            if metric in metrics and is_higher_better in directions:
                by_metric[metric] = directions[is_higher_better]
    return by_metric


def flat(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Return the harness's metrics without standard errors, named TASK_METRIC, or TASK_METRIC_FILTER if filtered."""
    return {
        f"{task}_{_flat(name)}": float(value)
        for task, values in results.items()
        for name, value in values.items()
        if isinstance(value, int | float) and "," in name and "stderr" not in name
    }


def _flat(name: str) -> str:
    return name.removesuffix(",none").replace(",", "_")
