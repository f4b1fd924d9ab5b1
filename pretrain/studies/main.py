"""The study command: check everything, match the arms, then run or submit the runs."""

import argparse
import sys
from pathlib import Path
from typing import Any

from data_prep.utils.console import UserError, exit_on_user_error, ignore_output_errors
from data_prep.utils.files import try_lock
from pretrain.imports import libraries
from pretrain.studies.config import Study, load_study


def main(launcher_dir: Path) -> None:
    """Parse the command line and start the study; `launcher_dir` is the folder of the launcher scripts."""
    parser = argparse.ArgumentParser(
        description="Train and evaluate every arm of a study with every seed, or resume doing so."
    )
    parser.add_argument("study", type=Path, help="YAML file of the study, such as those in configs/studies")
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="key=value",
        help="override keys of that file, such as base=CONFIG name=NAME seeds=[1,2,3]",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the runs, budgets and FLOPs without starting anything"
    )
    arguments = parser.parse_intermixed_args()
    exit_on_user_error(lambda: _main(launcher_dir, arguments))


def _main(launcher_dir: Path, arguments: argparse.Namespace) -> None:
    study = load_study(arguments.study, arguments.overrides)
    if arguments.dry_run:
        _show(study)
        return
    try:
        study.folder.mkdir(parents=True, exist_ok=True)
        lock = try_lock(study.folder / ".lock")
    except OSError as error:
        raise UserError(f"cannot write to {study.folder}: {error.strerror}; change output_dir or name") from None
    if lock is None:
        raise UserError(
            f"this study is already running in {study.folder}, or a process of it is still saving; "
            "wait for it to end, or choose a different name"
        )
    with lock, ignore_output_errors():
        sys.exit(_run(study, launcher_dir, lock))


def _show(study: Study) -> None:
    with libraries():
        from pretrain.studies.corpora import assign_corpora, is_prepared
        from pretrain.studies.matching import Matching, load_base_config
        from pretrain.studies.plan import print_plan
        from pretrain.studies.power import use_decision
        from pretrain.studies.record import StudyRecord
        from pretrain.studies.speeds import read_ratios
        from pretrain.studies.tuning import describe

    overrides, corpora = assign_corpora(study, load_base_config(study))
    missing = [corpus.data.path for corpus in corpora if not is_prepared(corpus)]
    if study.config.tune:
        print(describe(study, study.config.tune))
    if missing:
        print(
            f"{len(study.config.arms)} arms x {len(study.config.seeds)} seeds: {', '.join(study.config.arms)}\n"
            f"budgets and FLOPs depend on the corpus, and {', '.join(missing)} is not prepared yet; "
            "start the study to prepare it"
            + ("" if study.config.base_changes else f", or run python -m data_prep {study.base}")
        )
        return
    matching = Matching(study, overrides)
    record = StudyRecord(study.folder)
    use_decision(study, record)
    print_plan(study, matching, read_ratios(record.calibration, study.config.baseline))


def _run(study: Study, launcher_dir: Path, lock: Any) -> int:
    with libraries():
        from pretrain.studies.calibration import calibrate
        from pretrain.studies.corpora import assign_corpora, prepare_corpus
        from pretrain.studies.matching import Matching, load_base_config
        from pretrain.studies.plan import check_runs, make_runs, print_outcome, print_plan
        from pretrain.studies.power import decide, use_decision
        from pretrain.studies.processes import ProcessRunner
        from pretrain.studies.record import Run, StudyRecord
        from pretrain.studies.runner import EXIT_CODE_STOPPED, check_metric, is_done, run_locally, save_records
        from pretrain.studies.slurm import submit_runs
        from pretrain.studies.tuning import Tuning, with_best_values

    overrides, corpora = assign_corpora(study, load_base_config(study))
    for corpus in corpora:
        prepare_corpus(corpus)
    record = StudyRecord(study.folder)
    processes = ProcessRunner(lock)
    if study.config.tune:
        code = Tuning(study, overrides, record).run(launcher_dir, processes)
        if code is not None:
            return code
        study = with_best_values(study, record)
    matching = Matching(study, overrides)
    speeds = {}
    if study.config.matched_by == "seconds":
        speeds = calibrate(study, matching, record, launcher_dir, processes)
    if processes.stopped:
        return EXIT_CODE_STOPPED

    def plan() -> list[Run]:
        """Check the runs of the current seeds, record and print them, and return them."""
        runs = make_runs(study, matching, speeds)
        check_runs(runs)
        save_records(runs)
        for run in filter(is_done, runs):
            check_metric(study, run)
        record.describe(
            study,
            {name: matching.overrides(arm, speeds) for name, arm in matching.arms.items()},
            {name: arm.flops_per_token for name, arm in matching.arms.items()},
        )
        print_plan(study, matching, speeds)
        return runs

    decided = use_decision(study, record)
    runs = plan()
    if not decided and decide(study, runs, record):
        decided, runs = True, plan()
    if study.config.slurm:
        return submit_runs(study.folder, launcher_dir, study.config.slurm, runs, record)
    code = run_locally(study, launcher_dir, runs, record, processes)
    if code == 0 and not decided and decide(study, runs, record):
        runs = plan()
        code = run_locally(study, launcher_dir, runs, record, processes)
    if code != EXIT_CODE_STOPPED:
        print_outcome(study, runs, speeds)
    return code
