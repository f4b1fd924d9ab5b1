"""A real study of tiny runs: two arms, two seeds, trained and evaluated."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.launching import ROOT, call, tiny_config, write_config

SEEDS = (1, 2)
ARMS = {"next_token": {"objective": {"name": "next_token"}}, "llm_jepa": {"objective": {"name": "llm_jepa", "distance": "info_nce", "weight": 0.5}}}
ROWS = 12
EVALUATE = """
import sys
from pretrain.evaluation.job import main
for run_dir in sys.argv[1:]:
    sys.argv = ["evaluate", run_dir, "--task", "nl_rx", "task.rows=%d"]
    main()
""" % ROWS


@pytest.fixture(scope="session")
def study(tmp_path_factory) -> Path:
    """The folder of the study, as launcher/study.py leaves it."""
    folder = tmp_path_factory.mktemp("report") / "study"
    configs = {(arm, seed): write_config(folder / "configs", tiny_config(
        folder, **changes, name=f"{arm}-seed{seed}", seed=seed, train__steps=6, monitor__validate_every=3, monitor__tensorboard=False))
        for arm, changes in ARMS.items() for seed in SEEDS}
    call([sys.executable, "-m", "data_prep", str(next(iter(configs.values())))])
    call([sys.executable, str(ROOT / "tests/pretrain/training/several_runs.py"), *map(str, configs.values())])
    call([sys.executable, "-c", EVALUATE, *(str(folder / "runs" / path.stem) for path in configs.values())])
    write_study(folder, {arm: {seed: f"runs/{arm}-seed{seed}" for seed in SEEDS} for arm in ARMS})
    return folder


def write_study(folder: Path, arms: dict[str, dict[int, str]], name: str = "tiny") -> None:
    """study.json, of runs given relative to its folder."""
    (folder / "study.json").write_text(json.dumps({
        "name": name, "matched_by": "tokens", "baseline": next(iter(arms)), "metric": {"task": "nl_rx", "name": "exact", "higher_is_better": True},
        "arms": {arm: {"overrides": {}, "runs": {str(seed): path for seed, path in runs.items()}} for arm, runs in arms.items()}}))


@pytest.fixture
def altered(study, tmp_path) -> Callable[..., Path]:
    """A study of copies of the runs, with these values of the metric: {arm: {seed: value}}. The arms beyond the baseline are the pair arm."""

    def alter(values: dict[str, dict[int, float]], name: str = "tiny") -> Path:
        for number, (arm, seeds) in enumerate(values.items()):
            for seed, value in seeds.items():
                copy_run(study / "runs" / f"{list(ARMS)[min(number, 1)]}-seed1", tmp_path / f"arm{number}-{seed}", seed, value)
        write_study(tmp_path, {arm: {seed: f"arm{number}-{seed}" for seed in seeds} for number, (arm, seeds) in enumerate(values.items())}, name)
        return tmp_path

    return alter


def copy_run(source: Path, target: Path, seed: int, exact: float) -> None:
    """A run as if it had that seed and result; without its weights."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("checkpoints", "export", "model", "logs", ".lock"))
    config = yaml.safe_load((target / "config.yaml").read_text()) | {"seed": seed, "name": target.name}
    (target / "config.yaml").write_text(yaml.safe_dump(config))
    change_lines(target / "evaluation" / "results.jsonl", lambda line: line["metrics"].update(exact=exact))


def change_lines(path: Path, change: Callable[[dict], None]) -> None:
    """Change each line of a JSON lines file."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        change(line)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
