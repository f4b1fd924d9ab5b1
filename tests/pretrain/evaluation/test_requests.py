"""Pending and finished evaluations: the key of a result, and the pins of checkpoints."""

import os
from pathlib import Path

import pytest

from data_prep.utils.console import UserError
from pretrain.config import RunConfig, load_config, parse_task
from pretrain.evaluation.checkpoints import unpin_checkpoint
from pretrain.evaluation.results import append_result, read_results, result_key
from pretrain.evaluation.watch import CheckpointWatcher
from pretrain.run_folder import PINS, step_name
from pretrain.tasks.options import TaskConfig
from pretrain.training.evaluation_requests import request_evaluation, requested_evaluations, start_detached
from tests.commands import tiny_config, write_config
from tests.processes import wait_for


@pytest.fixture
def config(tmp_path) -> RunConfig:
    """Return the configuration of a run that has checkpoints of steps 10, 20 and 25 and evaluates every 20 steps."""
    config = load_config(
        write_config(
            tmp_path,
            tiny_config(
                tmp_path,
                checkpoint={"every": 5},
                evaluation={
                    "every": 20,
                    "tasks": [{"name": "nl_rx"}, {"name": "gsm8k", "test": str(tmp_path / "test.jsonl")}],
                },
            ),
        )
    )
    (tmp_path / "test.jsonl").write_text("{}\n")
    for step in (10, 20, 25):
        (config.run_dir / "checkpoints" / step_name(step)).mkdir(parents=True)
    return config


def finish(config: RunConfig, task: TaskConfig, step: int, overrides: tuple[str, ...] = ()) -> None:
    (config.run_dir / "evaluation").mkdir(exist_ok=True)
    append_result(config.run_dir, result_key(task, step, overrides) | {"metrics": {"exact": 0.5}})


@pytest.mark.parametrize("path", ["test.jsonl", "*.jsonl", "."])
def test_changed_task_files_need_a_new_result(tmp_path, path):
    task = parse_task({"name": "gsm8k", "test": str(tmp_path / path)}, "task")
    (tmp_path / "test.jsonl").write_text("1\n")
    before = result_key(task, 3)
    assert result_key(task, 3, ["b=2", "a=1"]) == result_key(task, 3, ["a=1", "b=2"]) != before == result_key(task, 3)
    (tmp_path / "test.jsonl").write_text("2\n")
    assert result_key(task, 3) != before


def test_a_corrupt_line_is_reported(config):
    finish(config, config.evaluation.tasks[0], 20)
    path = config.run_dir / "evaluation" / "results.jsonl"
    path.write_text(path.read_text() + '{"a": {"b": 1}\n')
    with pytest.raises(UserError, match=r"results\.jsonl is corrupt"):
        read_results(config.run_dir)


def test_a_request_of_the_run_stays_pending_until_all_its_tasks_are_done(config):
    run_dir, tasks = config.run_dir, config.evaluation.tasks
    for step in (20, 25):
        request_evaluation(run_dir, step)
    finish(config, tasks[0], 20)
    for step in (20, 25):
        unpin_checkpoint(run_dir, config, tasks[:1], step, [])
    assert requested_evaluations(run_dir) == [20]  # gsm8k is not done. The run itself does not evaluate step 25.
    finish(config, tasks[1], 20, ["evaluation.every=20"])
    unpin_checkpoint(run_dir, config, tasks, 20, ["evaluation.every=20"])
    assert requested_evaluations(run_dir) == [20]  # the result with overrides is a different one
    finish(config, tasks[1], 20)
    unpin_checkpoint(run_dir, config, tasks[1:], 20, [])
    assert requested_evaluations(run_dir) == []
    request_evaluation(run_dir, 20)
    unpin_checkpoint(run_dir, config, tasks, 20, [])  # all tasks of the run, without overrides
    assert not list((run_dir / "checkpoints" / PINS).iterdir())


def test_a_watcher_pins_the_steps_that_the_run_evaluates_and_the_last_step_of_a_finished_run(config):
    watcher = CheckpointWatcher(config.run_dir, lambda: (config, config.evaluation.tasks), [])
    watcher.pin_new_checkpoints()
    assert watcher.pinned() == [20]
    watcher.finished = True
    watcher.pin_new_checkpoints()
    assert watcher.pinned() == [20, 25]
    watcher.settled.add(20)
    assert watcher.pinned() == [25]


def test_a_background_job_has_the_lowest_priority_in_its_session_and_among_sessions(tmp_path):
    has_autogroups = Path("/proc/self/autogroup").exists()
    group = 'open("/proc/self/autogroup").read()' if has_autogroups else '"no autogroups"'
    start_detached(["-c", f"import os; print(os.nice(0), {group})"], tmp_path, dict(os.environ))
    log = tmp_path / "log.txt"
    wait_for(lambda: log.read_text().endswith("\n"))
    priority, *words = log.read_text().split()
    assert priority == "19" and words[-2:] == (["nice", "19"] if has_autogroups else ["no", "autogroups"])
