"""The summary of a run: tables of its losses and of its evaluations."""

import os
import sys
from pathlib import Path

from data_prep.utils.console import print_table
from pretrain.evaluation.results import SCORING_VERSION, read_results, scoring_version
from pretrain.run_folder import loss_terms, read_metrics, read_status

TABLE_COLUMNS = 6
"""Maximum number of metrics per task in the summary table; a task lists its most informative metrics first."""


def print_summary(run_dir: Path) -> None:
    """Print the results of training and evaluation, and how to see the curves."""
    print(f"\n{run_dir}: {read_status(run_dir).get('status', 'unknown')}")
    metrics = read_metrics(run_dir)
    terms = loss_terms(metrics)
    tags = [
        *(f"loss/{term}" for term in terms),
        *(f"validation/loss/{term}" for term in terms),
        *(
            f"validation/{group}/{monitor}"
            for group in ("embedding", "embedding_in_context")
            for monitor in ("paired_cosine", "shuffled_cosine", "retrieval_at_1", "effective_rank")
        ),
    ]
    rows = [["training", "first", "last"]]
    for tag in tags:
        values = [line[tag] for line in metrics if line.get(tag) is not None]
        if values:
            rows.append([tag, f"{values[0]:.4f}", f"{values[-1]:.4f}"])
    print_table(rows)
    all_results = read_results(run_dir)
    for task, version in dict.fromkeys((result["task"], scoring_version(result)) for result in all_results):
        results = [result for result in all_results if (result["task"], scoring_version(result)) == (task, version)]
        results.sort(key=lambda result: result["step"])
        all_names = list(dict.fromkeys(name for result in results for name in result["metrics"]))
        names = all_names[:TABLE_COLUMNS]
        rows = [[task if version == SCORING_VERSION else f"{task}, scoring {version}", "rows", "finetuned", *names]]
        rows += [
            [
                f"step {result['step']}",
                str(result["rows"]),
                "yes" if result["finetune"] is not None else "no",
                *(f"{result['metrics'][name]:.4f}" if name in result["metrics"] else "" for name in names),
            ]
            for result in results
        ]
        print_table(rows)
        if len(all_names) > len(names):
            print(f"(also in results.jsonl: {', '.join(all_names[TABLE_COLUMNS:])})", flush=True)
    if not (run_dir / "tensorboard").exists():
        return
    tensorboard = os.path.relpath(Path(sys.executable).parent / "tensorboard")
    print(
        f"\ncurves: {tensorboard} --logdir {run_dir / 'tensorboard'} --host 127.0.0.1\n"
        "        then open the page that it prints; Custom Scalars shows both loss terms in one chart",
        flush=True,
    )
