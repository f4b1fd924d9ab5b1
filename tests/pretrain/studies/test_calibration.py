"""Measured speeds: their rounds, their ratios, and records of earlier versions. The short runs are simulated."""

import json
import math
from pathlib import Path

import pytest
import yaml

from pretrain.config import load_config
from pretrain.planning.budget import Progress
from pretrain.studies.calibration import ROUNDS, STEPS, UNTIMED_STEPS, calibrate, constant_dropout, seconds_per_flop
from pretrain.studies.corpora import assign_corpora
from pretrain.studies.matching import Matching, load_base_config
from pretrain.studies.plan import make_runs, print_outcome, print_plan
from pretrain.studies.record import StudyRecord
from pretrain.studies.speeds import EQUAL, PairedRatio, mean_over_levels, paired_ratio, read_ratios

TOKENS_PER_STEP = 10
START_SECONDS = 1000.0
"""Time of the untimed steps, which must not count."""


class SimulatedProcesses:
    """Runner that writes the metrics of a calibration run instead of training it.

    `times` maps the name of a run without its round to the seconds per token in each round.
    """

    def __init__(self, times, on_gpu=False):
        self.times, self.on_gpu, self.trained, self.stopped = times, on_gpu, [], None

    def train(self, launcher_dir, launch, path, log, environment):
        config = load_config(path)
        self.trained.append(config.name)
        arm, _, rest = config.name.partition("-round")
        number, dash, level = rest.partition("-")
        seconds = self.times[arm + dash + level]
        seconds = seconds[(int(number) - 1) % len(seconds)] * TOKENS_PER_STEP
        lines = []
        for step in (1, *range(UNTIMED_STEPS, STEPS + 1, UNTIMED_STEPS)):
            time = START_SECONDS + (step - UNTIMED_STEPS) * seconds if step >= UNTIMED_STEPS else START_SECONDS
            processor = 0.0 if self.on_gpu else time
            wall = time if self.on_gpu else 7 * time
            line = {"step": step, "tokens": step * TOKENS_PER_STEP, "seconds": wall, "processor_seconds": processor}
            lines.append(json.dumps(line) + "\n")
        config.run_dir.mkdir(parents=True)
        (config.run_dir / "metrics.jsonl").write_text("".join(lines))
        return 0


@pytest.fixture
def start(make_study, tmp_path):
    """Return a function that makes a study that is matched by seconds, with its matching."""

    def make(**changes):
        study = make_study(**({"matched_by": "seconds", "output_dir": str(tmp_path)} | changes))
        study.folder.mkdir(exist_ok=True)
        return study, Matching(study, assign_corpora(study, load_base_config(study))[0])

    return make


def measure(study, matching, processes):
    return calibrate(study, matching, StudyRecord(study.folder), Path("launcher"), processes)


@pytest.mark.parametrize(
    ("arm", "expected", "used"),
    [
        ([1.0, 1.0, 1.0], (1, 1, 1), 1),
        ([2.0, 2.0, 2.0], (0.5, 0.5, 0.5), 0.5),
        ([1.25, 2.0, 1.6], (0.625, 0.5, 0.8), 0.625),
        ([2.0, 0.8, 1.6], (0.625, 0.5, 1.25), 1),
        ([1.0, 2.0, 4.0], (0.5, 0.25, 1), 1),
        ([0.8, 0.5, 0.4], (2.0, 1.25, 2.5), 2.0),
    ],
)
def test_the_interval_of_the_ratios_decides_whether_speeds_differ(arm, expected, used):
    ratio = paired_ratio([1.0, 1.0, 1.0], arm)
    assert ratio == pytest.approx(expected) and ratio.used == pytest.approx(used) and ratio.differs == (used != 1)


def test_a_round_that_is_slow_for_all_arms_does_not_change_the_ratio():
    assert paired_ratio([1.0, 5.0, 2.0], [2.0, 10.0, 4.0]) == (0.5, 0.5, 0.5)


def test_a_ratio_states_its_range():
    assert str(PairedRatio(0.5, 0.4, 0.625)) == "0.500 (0.400 to 0.625)"
    assert str(PairedRatio(1.01, 0.9, 1.1)) == "1.010 (0.900 to 1.100, equal)"
    assert str(EQUAL) == "1.000"


def test_the_levels_of_a_run_are_weighted_by_their_fractions():
    assert mean_over_levels({0.0: 0.25, 1.0: 0.75}, 8.0, 4.0) == 5.0
    assert mean_over_levels({0.25: 0.5, 0.5: 0.25, 0.75: 0.25}, 8.0, 4.0) == 8 - 4 * (0.25 * 0.5 + 0.25)


@pytest.mark.parametrize("on_gpu", [False, True])
def test_arms_are_measured_in_turns(start, on_gpu, capsys):
    arms = {"plain": {"objective.name": "next_token"}, "jepa": {}, "same": {"objective.weight": 2}}
    study, matching = start(arms=arms)
    times = {"plain": [1, 1, 2], "jepa": [2, 2.5, 5], "same": [1.1, 0.9, 2]}
    processes = SimulatedProcesses(times, on_gpu)
    ratios = measure(study, matching, processes)
    rounds = [processes.trained[start : start + 3] for start in range(0, 9, 3)]
    assert [[name.removesuffix(f"-round{number}") for name in names] for number, names in enumerate(rounds, 1)] == [
        ["plain", "jepa", "same"],
        ["jepa", "same", "plain"],
        ["same", "plain", "jepa"],
    ]
    assert ratios["plain"] == EQUAL and ratios["jepa"] == pytest.approx((0.4, 0.4, 0.5)) and not ratios["same"].differs
    entry = StudyRecord(study.folder).calibration["jepa"]
    assert entry["seconds_per_token"] == pytest.approx(times["jepa"])
    assert entry["baseline_seconds_per_token"] == pytest.approx(times["plain"])
    assert entry["unit"] == ("seconds" if on_gpu else "processor seconds") and entry["steps"] == "11 to 40"

    print_plan(study, matching, ratios)
    printed = capsys.readouterr().out
    assert "speed, of plain" in printed and "0.400 (0.400 to 0.500)" in printed and ", equal)" in printed
    print_outcome(study, make_runs(study, matching, ratios), ratios)
    assert "speed, of plain" in capsys.readouterr().out


def test_a_measurement_is_kept_until_the_settings_change(start):
    study, matching = start()
    times = {"plain": [1], "jepa": [2]}
    assert len(trained(study, matching, times)) == 2 * ROUNDS and not trained(study, matching, times)
    changed = {"plain": {"objective.name": "next_token"}, "jepa": {"objective.weight": 2}}
    assert len(trained(*start(arms=changed), times)) == 2 * ROUNDS
    run = study.folder / "jepa-seed1" / "config.yaml"
    run.parent.mkdir()
    run.write_text("")
    assert not trained(study, matching, times)
    # The baseline is measured with every new arm; the arm with runs keeps its value.
    assert len(trained(*start(arms=changed | {"new": {"objective.dropout": 0.5}}), times | {"new": [4]})) == 2 * ROUNDS
    assert read_ratios(StudyRecord(study.folder).calibration, "plain")["new"].median == 0.25


def trained(study, matching, times):
    processes = SimulatedProcesses(times)
    measure(study, matching, processes)
    return processes.trained


def test_speeds_of_earlier_versions_are_used_if_the_arm_has_runs(start):
    study, matching = start()
    record = StudyRecord(study.folder)
    for arm, speed in (("plain", 4000.0), ("jepa", 3000.0)):
        record.calibration[arm] = {"started_as": "earlier", "steps": "11 to 40", "tokens_per_second": speed}
        (study.folder / f"{arm}-seed1").mkdir()
        (study.folder / f"{arm}-seed1" / "config.yaml").write_text("")
    record.save()
    processes = SimulatedProcesses({"plain": [1], "jepa": [2], "new": [4]})
    ratios = measure(study, matching, processes)
    assert not processes.trained and ratios["jepa"] == (0.75, 0.75, 0.75)
    runs = {run.arm: run.config.train.tokens for run in make_runs(study, matching, ratios)}
    assert runs == {"plain": matching.base_tokens, "jepa": round(matching.base_tokens * 3000 / 4000)}
    study, matching = start(arms=study.config.arms | {"new": {"objective.weight": 2}})
    assert {name: ratio.median for name, ratio in measure(study, matching, processes).items()} == {
        "plain": 1,
        "jepa": 0.75,
        "new": 0.25,
    }


def test_an_arm_whose_steps_change_is_measured_at_its_lowest_and_highest_dropout(start):
    schedule = {"objective.dropout": [[0, 0.25], [1, 0.75]]}
    arms = {"plain": {"objective.name": "next_token"}, "early": {"objective.active": [0, 0.25]}, "rising": schedule}
    study, matching = start(arms=arms)
    times = {"plain": [1], "early-dropout0": [2], "early-dropout1": [1], "rising-dropout0.25": [3]}
    ratios = measure(study, matching, SimulatedProcesses(times | {"rising-dropout0.75": [2]}))
    assert ratios["early"].median == pytest.approx(1 / 1.25, rel=1e-3)
    assert ratios["rising"].median == pytest.approx(1 / 2.5, rel=0.02)
    for name, level in (
        ("early-round1-dropout0", 0),
        ("early-round1-dropout1", 1),
        ("rising-round1-dropout0.75", 0.75),
    ):
        objective = load_config(study.folder / "calibration" / "configs" / f"{name}.yaml").objective
        assert {objective.record_dropout(step / STEPS) for step in range(STEPS)} == {level}


def test_a_schedule_of_weights_is_switched_off_for_a_constant_dropout(start):
    late = {"objective.weight_schedule": [[0, 0], [0.5, 0], [1, 1]]}
    study, _ = start(arms={"plain": {"objective.name": "next_token"}, "late": late})
    config = study.run_config("late", 1)
    assert len({config.objective.record_dropout(step / STEPS) for step in range(STEPS)}) == 2
    changes = {level: constant_dropout(config, level) for level in (0, 1)}
    for level, keys in changes.items():
        objective = study.run_config("late", 1, keys).objective
        assert {objective.record_dropout(step / STEPS) for step in range(STEPS)} == {level}


def test_seconds_per_flop_come_from_earlier_runs_or_from_a_short_run(start, monkeypatch):
    study, matching = start()
    record, processes = StudyRecord(study.folder), SimulatedProcesses({"plain": [2]})
    runs = make_runs(study, matching, {"plain": EQUAL, "jepa": EQUAL})
    arguments = (study, matching, runs, record, Path("launcher"), processes)
    expected = 7 * 2 / matching.baseline.flops_per_token  # wall-clock time is 7 times the processor time
    assert seconds_per_flop(*arguments) == pytest.approx(expected) and processes.trained == ["plain-round0"]
    monkeypatch.setattr("pretrain.studies.runner.is_done", lambda run: True)
    record.wall_seconds["jepa-seed1"] = 60.0
    assert seconds_per_flop(*arguments) == pytest.approx(60 / runs[1].flops) and len(processes.trained) == 1
    record.wall_seconds.clear()
    processes.stopped = "SIGINT"
    assert math.isnan(seconds_per_flop(*arguments))


def test_progress_of_earlier_versions_has_no_processor_seconds():
    state = Progress(step=3, seconds=2.0, processor_seconds=5.0).state()
    state.pop("processor_seconds")
    assert Progress(**state) == Progress(step=3, seconds=2.0)


def test_configurations_of_calibration_runs_log_few_steps(start):
    """Embedding monitors are computed at logged steps, and only in arms with pairs."""
    study, matching = start()
    measure(study, matching, SimulatedProcesses({"plain": [1], "jepa": [1]}))
    config = yaml.safe_load((study.folder / "calibration" / "configs" / "jepa-round1.yaml").read_text())
    assert config["monitor"]["log_every"] == UNTIMED_STEPS and config["train"]["steps"] == STEPS
