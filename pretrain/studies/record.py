"""study.json: the contents of a study, for the report and for the next launch of the study.

Keys:

    name, matched_by, baseline, primary, metric    as in the study file
    decisions      the baseline, the metric, the primary arm, whether the arms are tuned, and the seeds or the
                   difference worth finding, with the time at which they were fixed and the number of runs that had been
                   scored by then; several if they have changed
    first_seed     seed with which budgets are computed
    arms           ARM: {"overrides": as in the study file, "matched": the dotted keys set by matching,
                   "flops_per_token": FLOPs per corpus token, "runs": {SEED: the run's folder inside the study folder}}
    tuned          whether the study file has `tune`; if so, the arms have the best values of the tuning
    tune           the tuning, if there is one: `plans` (its ranges, seeds, metric and rows, with the time at which they
                   were fixed; several if the study file has changed), `extensions` (values added to the range of a key,
                   by round), `trials` (ARM: the values and the scores by seed of each trial), `best` (ARM: its best
                   values), and `at_edge` (ARM: keys whose best value is at the edge of the range)
    calibration    ARM: its measured speed relative to the baseline, if seconds are matched: {"started_as",
                   "baseline_started_as": hashes of the settings, "baseline": the baseline's name, "steps": the measured
                   steps, "unit": "processor seconds" or "seconds", "seconds_per_token", "baseline_seconds_per_token":
                   one value for each round, "speed_ratio": {"median", "low", "high"} over the rounds}
    wall_seconds   RUN: wall-clock seconds on this machine over all launches, including the evaluation
    jobs           RUN: the Slurm job numbers of the training and the evaluation
    power          only with a pilot: detect, pilot and most as in the study file, and the arms; after the pilot also
                   the number of seeds that follows from it (power.py)
"""

import datetime
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.utils.files import read_json_or_none, write_json
from pretrain.config import RunConfig
from pretrain.report.records import count_scored, find_run, record_path
from pretrain.studies.config import FILE, Study, run_name


@dataclass(frozen=True)
class Run:
    """A run: an arm with a seed."""

    arm: str
    seed: int
    config: RunConfig
    flops: float
    """Estimated FLOPs of the training."""

    @property
    def run_dir(self) -> Path:
        """Run directory."""
        return self.config.run_dir

    @property
    def record(self) -> Path:
        """Path of the run's record, which is written when the run is done."""
        return record_path(self.run_dir.parent, self.name)

    @property
    def folder(self) -> Path:
        """Run directory, or the folder with the extracted record if that is further."""
        return find_run(self.run_dir, self.record) or self.run_dir

    @property
    def name(self) -> str:
        """Name of the run, which is also the name of its folder inside the study folder."""
        return self.config.name


def now() -> str:
    """Return the current time in UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


class StudyRecord:
    """Contents of study.json, read when the study starts and written after each change."""

    def __init__(self, folder: Path):
        self._path = folder / FILE
        previous = read_json_or_none(self._path) or {}
        self.tune: dict[str, Any] = previous.get("tune", {})
        self.calibration: dict[str, Any] = previous.get("calibration", {})
        self.wall_seconds: dict[str, float] = previous.get("wall_seconds", {})
        self.jobs: dict[str, list[int]] = previous.get("jobs", {})
        self.power: dict[str, Any] | None = previous.get("power")
        self.decisions: list[dict[str, Any]] = previous.get("decisions", [])
        self._study: dict[str, Any] = {
            key: value
            for key, value in previous.items()
            if key in ("name", "matched_by", "baseline", "primary", "metric", "tuned", "first_seed", "arms")
        }

    def describe(self, study: Study, matched: dict[str, dict[str, Any]], flops_per_token: dict[str, float]) -> None:
        """Record the current arms and settings of the study.

        `matched` contains the dotted keys that matching has set for each arm.
        """
        config = study.config
        self._record_decision(study)
        settings = {
            "name": config.name,
            "matched_by": config.matched_by,
            "baseline": config.baseline,
            "primary": config.primary,
            "metric": config.metric.model_dump(),
            "tuned": config.tune is not None,
            "first_seed": study.first_seed,
        }
        self._study = settings | {
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

    def _record_decision(self, study: Study) -> None:
        """Record the arms, metric and seeds, and the number of runs with a score, unless they are as before."""
        config = study.config
        better = "higher" if config.metric.higher_is_better else "lower"
        decision = {
            "arms": list(config.arms),
            "baseline": config.baseline,
            "metric": f"{study.metric} ({better} is better)",
            "primary": config.primary,
            "tune": "yes" if config.tune else "no",
            "seeds": None if config.power else config.seeds,
            "detect": config.power.detect if config.power else None,
            "pilot": config.power.pilot if config.power else None,
            "most": config.power.most if config.power else None,
        }
        before = self.decisions[-1] if self.decisions else self._undated_decision(decision)
        if before is None or any(before.get(key, value) != value for key, value in decision.items()):
            self.decisions.append({"time": now(), "scored": count_scored(self._path.parent)} | decision)

    def _undated_decision(self, decision: dict[str, Any]) -> dict[str, Any] | None:
        """Return the decision in the study.json of an earlier version; None if there is none.

        What that version did not record has the value of `decision`.
        """
        if "metric" not in self._study:
            return None
        metric = self._study["metric"]
        better = "higher" if metric["higher_is_better"] else "lower"
        return decision | {
            "baseline": self._study["baseline"],
            "metric": f"{metric['task']}/{metric['name']} ({better} is better)",
            "primary": self._study.get("primary"),
        }

    def save(self) -> None:
        """Write study.json."""
        write_json(
            self._path,
            self._study
            | ({"decisions": self.decisions} if self.decisions else {})
            | {"calibration": self.calibration, "wall_seconds": self.wall_seconds, "jobs": self.jobs}
            | ({"tune": self.tune} if self.tune else {})
            | ({"power": self.power} if self.power else {}),
        )
