"""lm_eval: tasks of the Language Model Evaluation Harness (EleutherAI) on the export; takes the extra lm-eval.

The harness makes its own prompts and fetches its own data. A prompt stands behind the begin token as plain text, without the separator that parts a
context from its target in training, so a model that was trained on pairs alone meets text of another form. Metrics are named TASK_METRIC;
`rows` limits each task.
"""

from typing import Any

from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from data_prep.console import UserError
from pretrain.evaluation.inference import load_causal_lm
from pretrain.evaluation.task_run import CheckpointTask
from pretrain.tasks.directions import MetricDirection, MetricDirections
from pretrain.tasks.lm_eval import Config
from pretrain.tasks.scoring import TaskResult

BATCH = 32


def evaluate(run: CheckpointTask) -> TaskResult:
    """Run the harness. Raises UserError where it is not installed or does not know a task."""
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
    except ImportError:
        raise UserError(
            "the task lm_eval takes the extra lm-eval: pip install '.[lm-eval]' in the project's folder"
        ) from None
    assert isinstance(run.task, Config)  # chosen by its name
    model, _ = load_causal_lm(run.export)
    tokenizer = AutoTokenizer.from_pretrained(run.export)
    begin = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, tokenizer.bos_token_id)]
    )
    try:
        found = simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH, add_bos_token=True),
            tasks=run.task.harness,
            limit=run.task.rows,
            log_samples=False,
            bootstrap_iters=0,
        )
    except (KeyError, ValueError, OSError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UserError(f"the harness cannot run {', '.join(run.task.harness)}: {reason}") from None
    rows = sum(count["effective"] for count in found["n-samples"].values())
    return TaskResult(
        rows, flat(found["results"]), directions=metric_directions(found["higher_is_better"], found["results"])
    )


def metric_directions(
    higher_is_better: dict[str, dict[str, bool | None]], results: dict[str, dict[str, Any]]
) -> MetricDirections:
    """Return the direction of each metric in `flat(results)` for which the harness gives one."""
    words: dict[bool | None, MetricDirection] = {True: "higher", False: "lower"}
    return {
        f"{task}_{_flat(name)}": words[better]
        for task, values in results.items()
        for name in values
        if (better := higher_is_better.get(task, {}).get(name.split(",")[0])) in words
        and f"{task}_{_flat(name)}" in flat(results)
    }


def flat(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Return the numbers of the harness by TASK_METRIC, and TASK_METRIC_FILTER for filtered answers, without standard errors."""
    return {
        f"{task}_{_flat(name)}": float(value)
        for task, values in results.items()
        for name, value in values.items()
        if isinstance(value, int | float) and "," in name and "stderr" not in name
    }


def _flat(name: str) -> str:
    return name.removesuffix(",none").replace(",", "_")
