"""study.json: what a study is made of, for the report and for the next start.

Its keys:

    name, matched_by, baseline, metric    as in the study file
    arms           ARM: {"overrides": as in the study file, "matched": what matching has set, "flops_per_token": of the corpus,
                   "runs": {SEED: the run's folder in the study's}}
    calibration    ARM: the measured speed, where seconds are matched
    wall_seconds   RUN: how long it took here, all starts, its evaluation included
    jobs           RUN: the numbers of its training and evaluation, under Slurm
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.files import read_json_or_none, write_json
from pretrain.config import RunConfig
from pretrain.studies.config import Study, run_name

FILE = "study.json"


@dataclass(frozen=True)
class Run:
    """One arm with one seed."""

    arm: str
    seed: int
    config: RunConfig
    flops: float
    """Of the training, estimated."""

    @property
    def run_dir(self) -> Path:
        """Its run directory."""
        return self.config.run_dir

    @property
    def name(self) -> str:
        """Of its folder in the study's."""
        return self.config.name


class StudyRecord:
    """The file, read at a start and written whenever something is known."""

    def __init__(self, folder: Path):
        self._path = folder / FILE
        before = read_json_or_none(self._path) or {}
        self.calibration: dict[str, Any] = before.get("calibration", {})
        self.wall_seconds: dict[str, float] = before.get("wall_seconds", {})
        self.jobs: dict[str, list[int]] = before.get("jobs", {})
        self._study: dict[str, Any] = {
            key: value for key, value in before.items() if key in ("name", "matched_by", "baseline", "metric", "arms")
        }

    def describe(self, study: Study, matched: dict[str, dict[str, Any]], flops_per_token: dict[str, float]) -> None:
        """Write down what the study is now; `matched` are the dotted keys that matching has set for each arm."""
        config = study.config
        head = {
            "name": config.name,
            "matched_by": config.matched_by,
            "baseline": config.baseline,
            "metric": config.metric.model_dump(),
        }
        self._study = head | {
            "arms": {
                arm: {
                    "overrides": overrides,
                    "matched": matched[arm],
                    "flops_per_token": flops_per_token[arm],
                    "runs": {str(seed): run_name(arm, seed) for seed in config.seeds},
                }
                for arm, overrides in config.arms.items()
            }
        }
        self.save()

    def save(self) -> None:
        """Write the file."""
        write_json(
            self._path,
            self._study | {"calibration": self.calibration, "wall_seconds": self.wall_seconds, "jobs": self.jobs},
        )
