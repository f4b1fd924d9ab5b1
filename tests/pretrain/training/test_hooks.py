"""Hooks: the events of a run in their order, on every rank, and a logger that is one new module."""

import json
from pathlib import Path

import pytest

from pretrain.config import load_config
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


def test_an_error_ends_the_hooks_and_the_next_launch_restores_their_state(folder):
    path = config(folder, "crash", 4)
    command = ["python", str(HOOK_EVENTS), str(folder / "crash"), str(path)]
    assert run_command(command, check=False).returncode == 1
    assert events(folder, "crash", 0) == [*STEPS, "crashed 3"]
    run_command(["python", str(HOOK_EVENTS), str(folder / "again"), str(path)])
    assert events(folder, "again", 0)[:2] == ["start 2", "step with values 3"]
    assert events(folder, "again", 0)[-1] == "finished 4"


def test_an_unknown_logger_is_refused_with_the_known_ones(folder):
    path = config(folder, "unknown", 4)
    command = ["python", "launcher/run.py", str(path), "monitor.loggers=[tensorboardd]"]
    done = run_command(command, check=False)
    assert done.returncode == 2
    assert done.stderr == "error: monitor.loggers: 'tensorboardd' is not one of tensorboard\n"


def test_the_key_of_earlier_versions_is_still_read(folder):
    for value, expected in ((True, ("tensorboard",)), (False, ())):
        path = write_config(folder, tiny_config(folder, name="old", monitor__tensorboard=value))
        assert load_config(path, []).monitor.loggers == expected
