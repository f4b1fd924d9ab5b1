"""The logger of Weights & Biases, online or offline.

W&B accepts only increasing steps. A launch that resumes therefore rewinds its entry, and W&B removes the later steps.
Offline, the rewind is recorded in the folder of the launch, and `wandb sync` executes it.
"""

import logging
import os
from pathlib import Path
from typing import Any

from data_prep.utils.console import UserError
from pretrain.config import RunConfig
from pretrain.sections import WandbConfig
from pretrain.training.hooks import Ending
from pretrain.training.loggers._tracker import Entry, Row, Tracker, describe_error, evaluation_values

logger = logging.getLogger(__name__)

FINISH_SECONDS = 12.0
"""Time in which W&B uploads the last values. What remains is in RUN/wandb, and `wandb sync` uploads it."""
STEP = "step"
"""Tag with the step of an evaluation, because evaluations may end in any order."""


def check(config: RunConfig) -> None:
    """Raise UserError if nobody is logged in, unless the mode is offline. This does not use the network."""
    mode = _options(config).mode or os.environ.get("WANDB_MODE")
    if mode in ("offline", "disabled") or os.environ.get("WANDB_API_KEY"):
        return
    import wandb
    from wandb.sdk.lib.wbauth import read_netrc_auth

    settings = wandb.setup().settings  # also reads the settings files of W&B
    if mode is None and settings.mode in ("offline", "disabled"):
        return
    if not (settings.api_key or settings.identity_token_file or read_netrc_auth(host=settings.base_url)):
        raise UserError(
            "monitor.loggers: wandb is not logged in: run `wandb login`, set the environment variable WANDB_API_KEY, "
            "or set monitor.wandb.mode=offline"
        )


class Logger(Tracker):
    """A hook that sends the values to W&B."""

    name = "wandb"
    can_rewind = True

    def __init__(self, config: RunConfig, run_dir: Path) -> None:
        super().__init__(config, run_dir)
        self._run: Any = None

    def load(self) -> None:
        """Import wandb. A background evaluation must not use the service process of the training that started it."""
        os.environ.pop("WANDB_SERVICE", None)
        import wandb  # noqa: F401

    def open(self, entry: Entry) -> int:
        """Open the entry, rewound to the last step to keep.

        If the server cannot rewind, the entry is continued after its last step; W&B ignores the repeated steps.
        """
        import wandb

        options = _options(self.config)
        arguments: dict[str, Any] = {
            "project": options.project,
            "entity": options.entity,
            "mode": options.mode,
            "name": entry.name,
            "group": entry.group,
            "job_type": "training" if entry.name == entry.group else "evaluation",
            "config": entry.parameters,
            "dir": str(self.run_dir),
            "settings": wandb.Settings(
                silent=True,
                console="off",
                disable_git=True,  # the remote of a repository may contain a token
                disable_code=True,
                finish_timeout=FINISH_SECONDS,
            ),
        }
        self._run = None
        if not entry.is_new:
            try:
                self._run = wandb.init(resume_from=f"{entry.id}?_step={entry.keep}", **arguments)
            except wandb.Error as error:
                logger.warning(
                    f"wandb cannot rewind the entry to step {entry.keep} ({describe_error(error)}); continuing after "
                    "its last step, so repeated steps keep their earlier values"
                )
        if self._run is None:
            self._run = wandb.init(id=entry.id, resume="allow", **arguments)
        if entry.name != entry.group:
            self._run.define_metric("evaluation/*", step_metric=STEP)
        where = f"offline, in {self.run_dir / 'wandb'}" if self._run.offline else self._run.url
        logger.info(f"wandb: {where}")
        return self._run.starting_step - 1

    def write(self, rows: list[Row]) -> None:
        """Log the rows."""
        for step, values in rows:
            self._run.log(values, step=step, commit=True)  # otherwise W&B waits for the next step

    def close(self, ending: Ending) -> None:
        """Finish the entry. A stopped run is marked as preempted, and a run with an error as failed."""
        if ending == "resumable":
            self._run.mark_preempting()
        self._run.finish(exit_code=0 if ending == "finished" else 1)

    def evaluation_row(self, position: int, result: dict[str, Any]) -> Row:
        """Return the row of an evaluation. Its step is its position, and the trained step is a value."""
        return Row(position, {STEP: result["step"]} | evaluation_values(result))


def _options(config: RunConfig) -> WandbConfig:
    return config.monitor.wandb or WandbConfig()
