"""The runs of a study, and tables of its plan and its outcome."""

import logging
import statistics

from data_prep.utils.console import UserError, print_table
from pretrain.data.corpus import Corpus
from pretrain.report.runs import read_run
from pretrain.studies.config import Study
from pretrain.studies.matching import Matching
from pretrain.studies.record import Run
from pretrain.studies.runner import is_done
from pretrain.training.describe import check_same_run

logger = logging.getLogger(__name__)

CLOSE = 0.05
"""Largest relative difference in training seconds at which arms count as matched by seconds."""


def make_runs(study: Study, matching: Matching, speeds: dict[str, float]) -> list[Run]:
    """Return all runs. Each seed runs in all arms before the next seed, so an unfinished study is balanced."""
    runs = []
    for seed in study.config.seeds:
        for name, arm in matching.arms.items():
            config = study.run_config(name, seed, matching.overrides(arm, speeds))
            runs.append(Run(name, seed, config, arm.flops_per_token * matching.tokens(arm, speeds)))
    return runs


def check_runs(runs: list[Run]) -> None:
    """Raise UserError if the settings of an existing run have changed since it was started."""
    for run in runs:
        if (run.run_dir / "config.yaml").exists():
            try:
                check_same_run(run.config, Corpus(run.config.data.path, "train").manifest, None)
            except UserError as error:
                raise UserError(
                    f"arms.{run.arm} or the base has changed since the run was started: {error}. "
                    "Arms and seeds may be added, but arms with runs must not change; give the changed arm a new name"
                ) from None


def print_plan(study: Study, matching: Matching, speeds: dict[str, float]) -> None:
    """Print the arms with their budgets, and the changes made by matching.

    A budget that depends on speeds that are not measured yet is shown as "measured at the start".
    """
    config = study.config
    rows = [["arm", "rows per step", "tokens per step", "steps, about", "tokens", "FLOPs", f"of {config.baseline}"]]
    speeds_unknown = config.matched_by == "seconds" and not speeds.keys() >= matching.arms.keys()
    for arm in matching.arms.values():
        cells = ["measured at the start"] + [""] * 3
        if not speeds_unknown:
            tokens, baseline = matching.tokens(arm, speeds), matching.baseline
            flops = tokens * arm.flops_per_token
            baseline_flops = matching.tokens(baseline, speeds) * baseline.flops_per_token
            cells = [
                f"{round(tokens / arm.tokens_per_step):,}",
                f"{tokens:,}",
                f"{flops:.3g}",
                f"{flops / baseline_flops:.3f}",
            ]
        rows.append([arm.name, f"{arm.config.train.global_batch_rows:,}", f"{arm.tokens_per_step:,.0f}", *cells])
    print_table(rows)
    for arm in matching.arms.values():
        for note in arm.notes:
            print(f"{arm.name}: {note}")
    matched_by = "not matched" if config.matched_by == "none" else f"matched by {config.matched_by}"
    arms, seeds = len(matching.arms), len(config.seeds)
    print(
        f"\n{arms} arms x {seeds} seed{'s' * (seeds > 1)} = {arms * seeds} runs, {matched_by}, in {study.folder}",
        flush=True,
    )


def print_outcome(study: Study, runs: list[Run]) -> None:
    """Print for each arm the mean and spread of the metric over seeds, and the mean tokens and seconds of its runs."""
    metric = study.metric
    finished = {run.name: read_run(run.run_dir) for run in runs if is_done(run)}
    settings = metric.common_settings(list(finished.values()))
    rows = [["arm", "runs", str(metric), "spread", "tokens", "training seconds"]]
    seconds = {}
    for arm in study.config.arms:
        done = [finished[run.name] for run in runs if run.arm == arm and run.name in finished]
        if not done:
            rows.append([arm, "0", "", "", "", ""])
            continue
        last_lines = [run.last for run in done]
        values = [value for run in done if (value := metric.final(run, settings)) is not None]
        seconds[arm] = statistics.fmean(line["seconds"] for line in last_lines)
        mean = f"{statistics.fmean(values):.4f}" if values else ""
        rows.append(
            [
                arm,
                str(len(done)),
                mean,
                f"{statistics.stdev(values):.4f}" if len(values) > 1 else "",
                f"{statistics.fmean(line['tokens'] for line in last_lines):,.0f}",
                f"{seconds[arm]:,.1f}",
            ]
        )
    print_table(rows)
    for arm, arm_seconds in seconds.items():
        ratio = arm_seconds / seconds.get(study.config.baseline, arm_seconds)
        if study.config.matched_by == "seconds" and abs(ratio - 1) > CLOSE:
            logger.warning(
                f"{arm} trained {ratio:.2f} times as long as {study.config.baseline}; "
                "the machine's speed has changed since the calibration"
            )
