"""A real study of tiny runs with two arms and two seeds, which are trained and evaluated."""

import itertools
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.commands import ROOT, prepare_corpus, run_command, tiny_config, write_config
from tests.pretrain.report.tiny_study import ARMS, ROWS, SEEDS, copy_run, write_study

EVALUATE = """
import sys
from pretrain.evaluation.job import main
_, rows, *run_dirs = sys.argv
for run_dir in run_dirs:
    sys.argv = ["evaluate", run_dir, "--task", "nl_rx", f"task.rows={rows}"]
    main()
"""
"""Program that evaluates several runs in one process, to save start-up time."""


@pytest.fixture(scope="session")
def study(tmp_path_factory) -> Path:
    """Return the folder of the study, as launcher/study.py writes it."""
    folder = tmp_path_factory.mktemp("report") / "study"
    configs = {
        (arm, seed): write_config(
            folder / "configs",
            tiny_config(
                folder,
                **changes,
                name=f"{arm}-seed{seed}",
                seed=seed,
                train__steps=6,
                monitor__validate_every=3,
                monitor__loggers=[],
            ),
        )
        for arm, changes in ARMS.items()
        for seed in SEEDS
    }
    prepare_corpus(next(iter(configs.values())))
    run_command([sys.executable, str(ROOT / "tests/pretrain/training/several_runs.py"), *map(str, configs.values())])
    run_command(
        [sys.executable, "-c", EVALUATE, str(ROWS), *(str(folder / "runs" / path.stem) for path in configs.values())]
    )
    write_study(folder, {arm: {seed: f"runs/{arm}-seed{seed}" for seed in SEEDS} for arm in ARMS})
    return folder


@pytest.fixture
def study_with_values(study, tmp_path) -> Callable[..., Path]:
    """Return a function that makes a study from copies of the runs, with values of the metric: {arm: {seed: value}}.

    The first arm copies the baseline. All other arms copy the pair arm.
    """
    numbers = itertools.count()

    def make(values: dict[str, dict[int, float]], name: str = "tiny") -> Path:
        folder = tmp_path / f"study{next(numbers)}"
        for number, seeds in enumerate(values.values()):
            for seed, value in seeds.items():
                copy_run(
                    study / "runs" / f"{list(ARMS)[min(number, 1)]}-seed1", folder / f"arm{number}-{seed}", seed, value
                )
        write_study(
            folder,
            {
                arm: {seed: f"arm{number}-{seed}" for seed in seeds}
                for number, (arm, seeds) in enumerate(values.items())
            },
            name,
        )
        return folder

    return make
