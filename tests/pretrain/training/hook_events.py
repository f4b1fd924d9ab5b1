"""Train a run whose ranks record the calls of a hook: `hook_events.py EVENTS CONFIG`.

Each rank appends the events, with the number of the last step, to EVENTS.rankR. If EVENTS ends with `crash`, the hook
raises an error after step 3; with `stop`, rank 0 receives a signal in that step. Modules in the folder `loggers` next
to CONFIG count as loggers of the package.
"""

import os
import signal
import sys
from pathlib import Path

from pretrain.training import loggers, loop
from pretrain.training.hooks import Hook
from pretrain.training.main import main

first = next(index for index, argument in enumerate(sys.argv) if index and not argument.startswith("--"))
events = Path(sys.argv.pop(first))


class Recorder(Hook):
    def _record(self, event: str, run: loop.Trainer) -> None:
        with open(f"{events}.rank{run.world.rank}", "a") as file:
            file.write(f"{event} {run.progress.step}\n")

    def start(self, run):
        self._record("start", run)

    def after_step(self, run, report):
        self._record("step" + " repeated" * report.repeated + " with values" * bool(report.values), run)
        if events.name.endswith("crash") and run.progress.step == 3:
            raise RuntimeError("made to fail")
        if events.name.endswith("stop") and run.progress.step == 3 and run.world.is_main:
            signal.raise_signal(signal.SIGTERM)

    def after_validation(self, run, values):
        self._record("validation" if "validation/loss/lm" in values else "no losses", run)

    def before_save(self, run):
        self._record("before save", run)

    def after_save(self, run, step):
        self._record(f"saved {step}", run)

    def end(self, run, ending):
        self._record(ending, run)

    def state(self):
        return {"recorder": os.getpid()}

    def load_state(self, state):
        assert state["recorder"] != os.getpid()


loggers.__path__.append(str(Path(sys.argv[first]).parent / "loggers"))
init = loop.Trainer.__post_init__


def init_with_recorder(self):
    init(self)
    self.hooks.append(Recorder())


loop.Trainer.__post_init__ = init_with_recorder
main()
