"""The start of background pushes of a training run to the Hugging Face hub (export.hub).

`pretrain/evaluation/hub_job.py` is the process that pushes.
"""

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.utils.console import UserError
from data_prep.utils.files import read_json_or_none, try_lock
from pretrain.run_folder import HUB, list_steps, step_name
from pretrain.sections import HubConfig
from pretrain.training.evaluation_requests import evaluation_environment, start_detached
from pretrain.training.hooks import Ending, Hook, StepReport

if TYPE_CHECKING:
    from pretrain.training.loop import Trainer

logger = logging.getLogger(__name__)

LOCK = ".lock"
"""File that the process that pushes holds locked."""
PROBLEM = "problem.json"
"""File with the error of the last push; absent if it succeeded."""


def check_hub(hub: HubConfig | None) -> None:
    """Raise UserError if there is a repository to push to, but no token. The network is not used."""
    if hub is None or os.environ.get("HF_TOKEN", "").strip():
        return
    from huggingface_hub import constants

    path = Path(constants.HF_TOKEN_PATH)
    if not (path.is_file() and path.read_text().strip()):
        raise UserError(
            f"export.hub.repo is {hub.repo}, but there is no token of the Hugging Face hub: set the environment "
            "variable HF_TOKEN to a token with write access, run hf auth login, or remove export.hub"
        )


def unpushed_step(run_dir: Path, repo: str) -> int | None:
    """Return the newest step with a checkpoint or an export if it is newer than all pushed ones; else None."""
    folder = run_dir / HUB
    records = {step: read_json_or_none(folder / step_name(step)) for step in list_steps(folder)}
    pushed = [step for step, record in records.items() if record and record["repo"] == repo]
    newest = max([*list_steps(run_dir / "checkpoints"), *list_steps(run_dir / "export")], default=0)
    return newest if newest > max(pushed, default=0) else None


def start_push(run_dir: Path, hub: HubConfig) -> None:
    """Start a process that exports and pushes the newest checkpoint, unless one is active or nothing is to be pushed.

    An active process looks for newer checkpoints after it has released its lock, so none is missed. A failure to start
    is a warning.
    """
    folder = run_dir / HUB
    step = unpushed_step(run_dir, hub.repo)
    if step is None:
        return
    try:
        folder.mkdir(exist_ok=True)
        lock = try_lock(folder / LOCK)
        if lock is None:
            return
        lock.close()
        settings = [f"export.hub.repo={hub.repo}", f"export.hub.private={str(hub.private).lower()}"]
        start_detached(
            ["-m", "pretrain.evaluation.hub_job", str(run_dir), *settings],
            folder,
            evaluation_environment("cpu") | {"HF_HUB_DISABLE_PROGRESS_BARS": "1"},
        )
    except OSError as error:
        logger.warning(f"step {step} is not pushed to {hub.repo}: {error.strerror or error}; {push_command(run_dir)}")
        return
    logger.info(f"pushing step {step} to {hub.repo} in the background, log: {folder / 'log.txt'}")


def push_command(run_dir: Path) -> str:
    """Return the remedy for exports that have not been pushed."""
    return f"to push it later, run: python launcher/evaluate.py {run_dir} --push"


class BackgroundPushes(Hook):
    """A hook that pushes an export of each checkpoint in the background (export.hub), on the main rank only.

    Training never waits for a push. A newer checkpoint replaces one that is still waiting. Problems become warnings.
    """

    def __init__(self, hub: HubConfig):
        self._hub = hub
        self._shown: object = None

    def start(self, run: "Trainer") -> None:
        """Remember the problem of an earlier launch, which has been reported."""
        self._shown = read_json_or_none(run.config.run_dir / HUB / PROBLEM)

    def after_step(self, run: "Trainer", report: StepReport) -> None:
        """Warn about a push that has failed since the last progress line."""
        if report.progress_line:
            self._report_problem(run.config.run_dir)

    def after_save(self, run: "Trainer", step: int) -> None:
        """Start the push of a complete checkpoint."""
        start_push(run.config.run_dir, self._hub)

    def end(self, run: "Trainer", ending: Ending) -> None:
        """Report a push that has failed, or one that continues after the run."""
        run_dir = run.config.run_dir
        self._report_problem(run_dir)
        step = unpushed_step(run_dir, self._hub.repo)
        if step is not None:
            logger.info(
                f"step {step} has not been pushed to {self._hub.repo} yet; a push in the background continues after "
                f"the run. If it cannot finish, {push_command(run_dir)}"
            )

    def _report_problem(self, run_dir: Path) -> None:
        problem = read_json_or_none(run_dir / HUB / PROBLEM)
        if problem and problem != self._shown:
            logger.warning(f"{problem['error']}; {push_command(run_dir)}")
        self._shown = problem
