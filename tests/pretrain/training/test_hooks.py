"""Hooks: the events of a run in their order, on every rank, and a logger that is one new module."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from pretrain.config import load_config
from pretrain.objectives.configs import llm_jepa
from pretrain.run_folder import list_steps, read_status
from pretrain.training.collapse import CollapseWarning
from tests.commands import ROOT, prepare_corpus, ranks_command, run_command, tiny_config, write_config

HOOK_EVENTS = ROOT / "tests" / "pretrain" / "training" / "hook_events.py"
LOGGER = '''
from pathlib import Path

from pretrain.training.hooks import Hook


class Logger(Hook):
    """A logger that a user adds as one file."""

    def start(self, run):
        self.file = open(run.config.run_dir / "lines.txt", "a")

    def after_step(self, run, report):
        if report.values:
            self.file.write(f"{run.progress.step} {report.values['loss/lm']}\\n")

    def end(self, run, ending):
        self.file.close()
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Prepare a corpus and return its folder."""
    folder = tmp_path_factory.mktemp("hooks")
    prepare_corpus(write_config(folder, tiny_config(folder)))
    (folder / "loggers").mkdir()
    (folder / "loggers" / "lines.py").write_text(LOGGER)
    return folder


def config(folder: Path, name: str, steps: int) -> Path:
    changes = {"train__steps": steps, "monitor__validate_every": 2, "monitor__loggers": ["lines"]}
    checkpoint = {"checkpoint": {"every": 2, "background": False}}
    return write_config(folder, tiny_config(folder, name=name, **changes) | checkpoint)


def events(folder: Path, name: str, rank: int) -> list[str]:
    return (folder / f"{name}.rank{rank}").read_text().splitlines()


STEPS = [
    "start 0",
    "step with values 1",
    "validation 2",
    "step with values 2",
    "before save 2",
    "saved 2 2",
    "step with values 3",
]


def test_every_rank_calls_the_hooks_in_the_order_of_the_events_and_a_logger_is_one_module(folder):
    run_command(ranks_command(2, HOOK_EVENTS, folder / "whole", config(folder, "whole", 4)))
    for rank in (0, 1):
        assert events(folder, "whole", rank) == [
            *STEPS,
            "validation 4",
            "step with values 4",
            "before save 4",
            "saved 4 4",
            "finished 4",
        ]
    run_dir = folder / "runs" / "whole"
    metrics = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert (run_dir / "lines.txt").read_text() == "".join(f"{line['step']} {line['loss/lm']}\n" for line in metrics)


def test_every_way_to_end_a_launch_is_reported_to_the_hooks(folder):
    path = config(folder, "stop", 6)
    done = run_command(ranks_command(2, HOOK_EVENTS, folder / "stop", path), check=False)
    assert done.returncode == 75
    for rank in (0, 1):
        last_step = list_steps(folder / "runs" / "stop" / "checkpoints")[-1]
        assert events(folder, "stop", rank)[-1] == f"resumable {last_step}"
    values = yaml.safe_load(config(folder, "damaged", 4).read_text())
    values["data"]["path"] = str(folder / "damaged")
    shutil.copytree(folder / "corpus", folder / "damaged")
    shard = next((folder / "damaged").glob("train-*.arrow"))
    content = bytearray(shard.read_bytes())
    for position in range(len(content) // 4, len(content) // 2, 20):
        content[position] ^= 1
    shard.write_bytes(content)
    done = run_command(
        ranks_command(2, HOOK_EVENTS, folder / "damaged-events", write_config(folder, values)), check=False
    )
    assert done.returncode == 2 and "is corrupt" in done.stderr
    for rank in (0, 1):
        assert events(folder, "damaged-events", rank)[-1].startswith("failed ")


def test_an_error_of_a_logger_ends_the_run_with_its_text_and_ends_only_started_hooks(folder):
    (folder / "loggers" / "offline.py").write_text(
        "from data_prep.utils.console import UserError\n"
        "from pretrain.training.hooks import Hook\n"
        "class Logger(Hook):\n"
        "    def start(self, run):\n"
        "        raise UserError('the server does not answer')\n"
    )
    for ranks, code in ((1, 2), (2, 1)):
        name = f"offline-{ranks}"
        values = yaml.safe_load(config(folder, name, 4).read_text())
        values["monitor"]["loggers"] = ["offline", "lines"]
        command = ranks_command(ranks, HOOK_EVENTS, folder / name, write_config(folder, values))
        done = run_command(command if ranks > 1 else ["python", *command[3:]], check=False)
        assert done.returncode == code and "the server does not answer" in done.stderr, done.stderr
        assert "has no attribute 'file'" not in done.stderr, "the logger `lines` was not started"
        assert "the server does not answer" in read_status(folder / "runs" / name)["reason"]


def test_the_collapse_warning_is_not_repeated_after_a_resume_and_absent_while_the_terms_are_off(messages):
    objective = llm_jepa.Config(name="llm_jepa", active=(0, 0.5))
    run = SimpleNamespace(config=SimpleNamespace(objective=objective), fraction=0.5)
    collapsed = {"paired_cosine": 1.0, "shuffled_cosine": 1.0, "retrieval_at_1": 0.0, "effective_rank": 1.0}
    values = {f"validation/embedding/{name}": value for name, value in collapsed.items()}
    first, resumed, later = CollapseWarning(), CollapseWarning(), CollapseWarning()
    later.after_validation(SimpleNamespace(config=run.config, fraction=0.6), values)
    assert messages == []
    first.after_validation(run, values)
    resumed.load_state(first.state())
    resumed.after_validation(run, values)
    assert len(messages) == 1 and messages[0].startswith("WARNING: the embeddings have collapsed")
    CollapseWarning().after_validation(SimpleNamespace(config=run.config, fraction=0.05), values)
    assert "After 5% of the budget, this may pass" in messages[1] and "may pass" not in messages[0]


def test_an_error_ends_the_hooks_and_the_next_launch_restores_their_state(folder):
    path = config(folder, "crash", 4)
    command = ["python", str(HOOK_EVENTS), str(folder / "crash"), str(path)]
    assert run_command(command, check=False).returncode == 1
    assert events(folder, "crash", 0) == [*STEPS, "crashed 3"]
    run_command(["python", str(HOOK_EVENTS), str(folder / "again"), str(path)])
    assert events(folder, "again", 0)[:2] == ["start 2", "step with values 3"]
    assert events(folder, "again", 0)[-1] == "finished 4"


@pytest.mark.parametrize(
    ("loggers", "problem"),
    [
        (
            "[neptune]",
            "there is no logger 'neptune' in pretrain/training/loggers; choose from mlflow, tensorboard, trackio, "
            "wandb",
        ),
        ("[metrics_file]", "metrics_file is always in use; remove it"),
        ("[tensorboard,tensorboard]", "tensorboard is listed twice; remove one"),
    ],
)
def test_wrong_loggers_are_refused_before_the_start(folder, loggers, problem):
    path = config(folder, "unknown", 4)
    for dry_run in ([], ["--dry-run"]):
        command = ["python", "launcher/run.py", str(path), f"monitor.loggers={loggers}", *dry_run]
        done = run_command(command, check=False)
        assert (done.returncode, done.stderr) == (2, f"error: monitor.loggers: {problem}\n")


def test_the_key_of_earlier_versions_is_still_read(folder):
    for value, expected in ((True, ["tensorboard"]), (False, [])):
        path = write_config(folder, tiny_config(folder, name="old", monitor__tensorboard=value))
        assert load_config(path, []).monitor.loggers == expected
        assert load_config(path, ["monitor.loggers=[other]"]).monitor.loggers == ["other"]
