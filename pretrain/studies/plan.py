"""The runs of a study, and tables of its plan and its outcome."""

import logging
import statistics
from pathlib import Path

from data_prep.utils.console import UserError, print_table
from pretrain.data.corpus import Corpus
from pretrain.report.records import RECORDS, read_record
from pretrain.report.runs import Run as FinishedRun
from pretrain.report.runs import read_run
from pretrain.studies.config import FILE, Study
from pretrain.studies.matching import Matching
from pretrain.studies.record import Run
from pretrain.studies.runner import is_done, is_trained, missing_results
from pretrain.studies.speeds import PairedRatio, paired_ratio
from pretrain.training.describe import check_same_run

logger = logging.getLogger(__name__)

CLOSE = 0.05
"""Largest relative difference in training time at which arms count as matched by seconds."""


def make_runs(study: Study, matching: Matching, speeds: dict[str, PairedRatio]) -> list[Run]:
    """Return all runs. Each seed runs in all arms before the next seed, so an unfinished study is balanced."""
    runs = []
    for seed in study.config.seeds:
        for name, arm in matching.arms.items():
            config = study.run_config(name, seed, matching.overrides(arm, speeds))
            runs.append(Run(name, seed, config, arm.flops_per_token * matching.tokens(arm, speeds)))
    return runs


def check_runs(runs: list[Run]) -> None:
    """Raise UserError if the settings of a run or of its record have changed since it was started.

    A record without the results of a task is an error too, unless the run can be evaluated here: a record has no
    weights.
    """
    for run in runs:
        if (run.run_dir / "config.yaml").exists():
            _check_same_run(run, run.run_dir, str(run.run_dir))
        if run.record.is_file():
            _check_same_run(run, read_record(run.record), str(run.record))
            if not is_trained(run) and (missing := missing_results(run)):
                raise UserError(
                    f"{run.record} has no result of {', '.join(missing)} with the current settings and files; "
                    "evaluate the run where its checkpoints are and copy the new record, "
                    "or delete the record to have the run repeated"
                )


def _check_same_run(run: Run, folder: Path, shown_as: str) -> None:
    config = run.config.model_copy(update={"output_dir": str(folder.parent)})
    try:
        check_same_run(config, Corpus(config.data.path, "train").manifest, None)
    except UserError as error:
        reason = str(error).replace(str(folder), shown_as)
        raise UserError(
            f"arms.{run.arm} or the base has changed since the run was started: {reason}. "
            "Arms and seeds may be added, but arms with runs must not change; give the changed arm a new name"
        ) from None


def print_plan(study: Study, matching: Matching, speeds: dict[str, PairedRatio]) -> None:
    """Print the arms with their budgets, and the changes made by matching.

    A budget that depends on speeds that are not measured yet is shown as "measured at the start".
    """
    config = study.config
    rows = [["arm", "rows per step", "tokens per step", "steps, about", "tokens", "FLOPs", f"of {config.baseline}"]]
    if config.matched_by == "seconds":
        rows[0].append(_speed_heading(study))
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
        if config.matched_by == "seconds":
            cells.append("" if speeds_unknown else str(speeds[arm.name]))
        rows.append([arm.name, f"{arm.config.train.global_batch_rows:,}", f"{arm.tokens_per_step:,.0f}", *cells])
    print_table(rows)
    for arm in matching.arms.values():
        for note in arm.notes:
            print(f"{arm.name}: {note}")
    if config.power and config.seeds == config.power.pilot:
        print("These are the runs of the pilot. The number of further seeds follows from their spread.")
    matched_by = "not matched" if config.matched_by == "none" else f"matched by {config.matched_by}"
    arms, seeds = len(matching.arms), len(config.seeds)
    print(
        f"\n{arms} arms x {seeds} seed{'s' * (seeds > 1)} = {arms * seeds} runs, {matched_by}, in {study.folder}",
        flush=True,
    )


def print_outcome(study: Study, runs: list[Run], speeds: dict[str, PairedRatio]) -> None:
    """Print for each arm the mean and spread of the metric over seeds, and the mean tokens and seconds of its runs.

    If seconds are matched, the table has the measured speeds, and a warning names the arms whose training time differs
    from the baseline's.
    """
    metric, matched_by = study.metric, study.config.matched_by
    finished = {run.name: read_run(run.folder) for run in runs if is_done(run)}
    settings = metric.common_settings(list(finished.values()))
    heads = ["arm", "runs", str(metric), "spread", "tokens", "training seconds"]
    if with_processor := bool(finished) and all(run.processor_seconds for run in finished.values()):
        heads.append("processor seconds")
    if matched_by == "seconds":
        heads.append(_speed_heading(study))
    rows = [heads]
    for arm in study.config.arms:
        done = [finished[run.name] for run in runs if run.arm == arm and run.name in finished]
        if not done:
            rows.append([arm, "0", *[""] * (len(heads) - 2)])
            continue
        last_lines = [run.last for run in done]
        values = [value for run in done if (value := metric.final(run, settings)) is not None]
        mean = f"{statistics.fmean(values):.4f}" if values else ""
        cells = [
            arm,
            str(len(done)),
            mean,
            f"{statistics.stdev(values):.4f}" if len(values) > 1 else "",
            f"{statistics.fmean(line['tokens'] for line in last_lines):,.0f}",
            f"{statistics.fmean(line['seconds'] for line in last_lines):,.1f}",
        ]
        if with_processor:
            cells.append(f"{statistics.fmean(line['processor_seconds'] for line in last_lines):,.1f}")
        if matched_by == "seconds":
            cells.append(str(speeds[arm]))
        rows.append(cells)
    print_table(rows)
    if matched_by == "seconds":
        _warn_of_unmatched_times(study, runs, finished, "processor_seconds" if with_processor else "seconds")
    if finished:
        folder, tuning = study.folder, ""
        if study.config.tune:
            tuning = f"; for the tuning, also {FILE} and {RECORDS} in {folder / 'tuning'}"
        print(f"To continue on another machine, copy or commit {folder / FILE} and {folder / RECORDS}{tuning}.")


def _speed_heading(study: Study) -> str:
    return f"speed, of {study.config.baseline}"


def _warn_of_unmatched_times(study: Study, runs: list[Run], finished: dict[str, FinishedRun], unit: str) -> None:
    """Warn of each arm whose training took longer or less long than the baseline's with the same seed."""
    times = {(run.arm, run.seed): finished[run.name].last[unit] for run in runs if run.name in finished}
    baseline = study.config.baseline
    for arm in study.config.arms:
        seeds = [seed for seed in study.config.seeds if {(arm, seed), (baseline, seed)} <= times.keys()]
        if not seeds:
            continue
        ratio = paired_ratio([times[arm, seed] for seed in seeds], [times[baseline, seed] for seed in seeds])
        if ratio.differs and abs(ratio.median - 1) > CLOSE:
            logger.warning(
                f"{arm} trained {ratio} times as long as {baseline}, in {unit.replace('_', ' ')}; "
                "the machine's speed has changed since the calibration"
            )
