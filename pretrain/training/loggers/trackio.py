"""The logger of Trackio, with a local database or a Space of the Hugging Face Hub.

Trackio adds a row to an entry even if the entry has the step. A launch that resumes therefore sends only the later
steps. After a rewind, whose repeated steps have different values, a new entry with all values replaces the old one.
"""

import logging
from pathlib import Path
from typing import Any

from data_prep.utils.console import UserError
from pretrain.config import RunConfig
from pretrain.sections import TrackioConfig
from pretrain.training.hooks import Ending
from pretrain.training.loggers._tracker import Entry, Row, Tracker

logger = logging.getLogger(__name__)


def check(config: RunConfig) -> None:
    """Raise UserError if the values go to a Space and nobody is logged in. This does not use the network."""
    if _options(config).space is None:
        return
    from huggingface_hub import get_token

    if get_token() is None:
        raise UserError(
            "monitor.trackio.space needs a login to the Hugging Face Hub: run `hf auth login`, set the environment "
            "variable HF_TOKEN, or remove the key to write to a local database"
        )


class Logger(Tracker):
    """A hook that sends the values to Trackio."""

    name = "trackio"

    def __init__(self, config: RunConfig, run_dir: Path) -> None:
        super().__init__(config, run_dir)
        self._run: Any = None

    def load(self) -> None:
        """Import trackio."""
        import trackio  # noqa: F401

    def open(self, entry: Entry) -> int:
        """Open the entry, which Trackio finds by its name. A new Space is private."""
        import trackio

        options = _options(self.config)
        self._run = trackio.init(
            project=options.project,
            name=_unique_name(entry.name, entry.id),
            group=entry.group,
            space_id=options.space,
            private=True if options.space else None,
            config=entry.parameters,
            resume="allow",
            embed=False,
        )
        return int(self._run._next_step) - 1  # there is no public counterpart that also works for a Space

    def write(self, rows: list[Row]) -> None:
        """Log the rows."""
        for step, values in rows:
            self._run.log(values, step=step)

    def close(self, ending: Ending) -> None:
        """Send what is left. Trackio has no status for a run."""
        self._run.finish()

    def discard(self, entry_id: str, name: str) -> None:
        """Delete the local entry. Trackio cannot delete an entry of a Space, so a note names it."""
        import trackio

        options, unique_name = _options(self.config), _unique_name(name, entry_id)
        if options.space is not None:
            logger.info(f"note: trackio: {unique_name} is from before the rewind; delete it in {options.space}")
            return
        for run in trackio.Api().runs(options.project):
            if run.name == unique_name:
                run.delete()


def _options(config: RunConfig) -> TrackioConfig:
    return config.monitor.trackio or TrackioConfig()


def _unique_name(name: str, entry_id: str) -> str:
    return f"{name}-{entry_id[:8]}"
