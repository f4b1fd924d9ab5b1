"""Studies whose runs are not trained: each run is written at once, with a metric that depends on its arm and seed."""

import json
import math
import signal
from pathlib import Path
from typing import Any

import pytest

from data_prep.utils.files import try_lock
from pretrain.config import load_config
from pretrain.data.corpus import Corpus
from pretrain.evaluation.results import append_result, result_key
from pretrain.run_folder import step_name, write_status
from pretrain.studies.config import load_study
from pretrain.studies.main import _run
from pretrain.training.describe import record_start

LAST_STEP = 4


class FakeStudies:
    """Starts studies in this process. `trained` lists the names of the runs that were trained."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.trained: list[str] = []
        self.gpus: dict[str, set[str | None]] = {}
        """GPUs of the training and the evaluation of each run."""
        self.failing: set[str] = set()
        self.noise = 0.01
        self.rate_effect = 0.0
        self.step_seconds = 0.5
        self.best_rate = 1.0
        monkeypatch.setattr("pretrain.studies.processes.ProcessRunner", lambda lock: self)
        self.stopped: signal.Signals | None = None

    def start(self, path: Path, *overrides: str) -> tuple[int, Path]:
        """Start a study; return its exit code and its folder."""
        self.trained, self.stopped = [], None
        study = load_study(path, list(overrides))
        study.folder.mkdir(parents=True, exist_ok=True)
        with try_lock(study.folder / ".lock") as lock:
            return _run(study, Path("launcher"), lock), study.folder

    def stop(self, number: signal.Signals) -> None:
        """Start no further run."""
        self.stopped = number

    def train(self, launcher_dir: Path, launch: str, config_path: Path, log: Path, environment: Any = None) -> int:
        """Write a finished run directory."""
        config = load_config(config_path)
        self.trained.append(config.name)
        self.gpus[config.name] = {(environment or {}).get("CUDA_VISIBLE_DEVICES")}
        if config.name in self.failing:
            return 1
        run_dir = config.run_dir
        (run_dir / "checkpoints" / step_name(LAST_STEP)).mkdir(parents=True)
        record_start(config, Corpus(config.data.path, "train").manifest, 1, 0, [])
        last_step = config.train.steps or LAST_STEP  # only the steps of a calibration run are known
        lines = [
            {"step": step, "tokens": 250 * step, "loss/lm": 1.5}
            | dict.fromkeys(("seconds", "processor_seconds"), self.step_seconds * step)
            for step in range(1, last_step + 1)
        ]
        (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        write_status(run_dir, "finished", last_step)
        return 0

    def evaluate(self, launcher_dir: Path, run_dir: Path, log: Path, environment: Any = None) -> int:
        """Write a result of each task."""
        config = load_config(run_dir / "config.yaml")
        self.gpus[config.name].add((environment or {}).get("CUDA_VISIBLE_DEVICES"))
        value = (
            1
            + len(config.objective.name) / 10
            + self.rate_effect * math.log2(config.train.learning_rate / self.best_rate) ** 2
            + self.noise * (config.seed * 7919 % 13 - 6) * (config.objective.name != "next_token")
        )
        (run_dir / "evaluation").mkdir(exist_ok=True)
        for task in config.evaluation.tasks:
            metric, direction = ("exact", "higher") if task.name == "nl_rx" else ("lm", "lower")
            metrics = {"metrics": {metric: value}, "directions": {metric: direction}, "rows": 20}
            append_result(run_dir, result_key(task, LAST_STEP) | metrics, tensorboard=False)
        return 0
