"""The logger of MLflow, with a server or a local SQLite file.

MLflow cannot remove values. A launch that resumes therefore sends no value that its entry already has. After a rewind,
whose repeated steps have different values, a new entry with all values replaces the old one, which is deleted.
"""

import json
import logging
import math
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from data_prep.utils.console import UserError
from pretrain.config import RunConfig
from pretrain.relevant_env import redact
from pretrain.sections import MlflowConfig
from pretrain.training.hooks import Ending
from pretrain.training.loggers._tracker import Entry, Row, Tracker, evaluation_values, read_entry

logger = logging.getLogger(__name__)

ENTRY_TAG = "jepa.entry"
"""Tag with the id of the entry, because MLflow chooses the ids of its runs."""
MAX_METRICS, MAX_PARAMETERS, MAX_PARAMETER_LENGTH = 1000, 100, 6000
"""Limits of MLflow for one request."""
STATUS: dict[Ending, str] = {"finished": "FINISHED", "resumable": "KILLED", "failed": "FAILED", "crashed": "FAILED"}
"""Status of MLflow at the end of a launch."""


def check(config: RunConfig) -> None:
    """Raise UserError if the tracking server is a folder, which MLflow does not support any more."""
    uri = _tracking_uri(config, config.run_dir)
    if urlsplit(uri).scheme in ("", "file") and os.environ.get("MLFLOW_ALLOW_FILE_STORE", "").lower() != "true":
        raise UserError(
            "monitor.loggers: mlflow does not write to folders any more: set monitor.mlflow.tracking_uri, or the "
            "variable MLFLOW_TRACKING_URI, to the address of a server or to sqlite:///FILE"
        )


class Logger(Tracker):
    """A hook that sends the values to MLflow."""

    name = "mlflow"

    def __init__(self, config: RunConfig, run_dir: Path) -> None:
        super().__init__(config, run_dir)
        self._client: Any = None
        self._run_id = ""
        self._present: dict[str, int] = {}

    def load(self) -> None:
        """Import mlflow, without the usage statistics that it sends by default."""
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        import mlflow
        import mlflow.store.tracking.sqlalchemy_store  # noqa: F401

        logging.getLogger("mlflow").setLevel(logging.WARNING)

    def open(self, entry: Entry) -> int:
        """Open the entry. Its last steps are different for each tag, so `write` compares them."""
        from mlflow.entities import Param

        experiment = self._connect()
        run = self._find(entry.id) or self._client.create_run(
            experiment, tags={ENTRY_TAG: entry.id, "mlflow.source.name": "jepa-pretrain"}, run_name=entry.name
        )
        self._run_id = run.info.run_id
        self._present = {metric.key: metric.step for metric in run.data._metric_objs}  # the last step of each tag
        self._client.update_run(self._run_id, status="RUNNING")
        if revision := entry.parameters["environment"].get("revision"):
            self._client.set_tag(self._run_id, "mlflow.source.git.commit", revision)
        # MLflow refuses to change a parameter, so a setting that changed on resume keeps its first value
        new = [Param(key, value) for key, value in _flatten(entry.parameters) if key not in run.data.params]
        for first in range(0, len(new), MAX_PARAMETERS):
            self._client.log_batch(self._run_id, params=new[first : first + MAX_PARAMETERS])
        logger.info(f"mlflow: run {self._run_id} of {redact(_tracking_uri(self.config, self.run_dir), os.environ)}")
        return -1

    def write(self, rows: list[Row]) -> None:
        """Send the values that the entry lacks."""
        self._send_metrics(
            [
                (tag, value, step)
                for step, values in rows
                for tag, value in values.items()
                if step > self._present.get(tag, -1)
            ]
        )

    def close(self, ending: Ending) -> None:
        """Mark the run as ended."""
        self._client.set_terminated(self._run_id, STATUS[ending])

    def discard(self, entry_id: str, name: str) -> None:
        """Delete the run of an entry. MLflow can restore it."""
        if run := self._find(entry_id):
            self._client.delete_run(run.info.run_id)

    def write_evaluations(self, results: list[dict[str, Any]]) -> None:
        """Send the evaluations that the entry of the training lacks. Any process may add values to a run of MLflow."""
        self._connect()
        run = self._find(read_entry(self.run_dir, self.name).get("id", ""))
        if run is None:  # the training failed to create it; its next launch tries again
            return
        self._run_id = run.info.run_id
        values = [
            (tag, value, result["step"]) for result in results for tag, value in evaluation_values(result).items()
        ]
        present = {
            (tag, metric.value, metric.step)
            for tag in {tag for tag, *_ in values}
            for metric in self._client.get_metric_history(self._run_id, tag)
        }
        self._send_metrics([value for value in values if value not in present])

    def _connect(self) -> str:
        """Create the client, and return the id of the experiment."""
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        self._client = MlflowClient(tracking_uri=_tracking_uri(self.config, self.run_dir))
        name = _options(self.config).experiment
        experiment = self._client.get_experiment_by_name(name)
        if experiment is None:
            try:
                return str(self._client.create_experiment(name))
            except MlflowException:  # another run has created it in the meantime
                experiment = self._client.get_experiment_by_name(name)
                if experiment is None:
                    raise
        return str(experiment.experiment_id)

    def _find(self, entry_id: str) -> Any:
        """Return the run of an entry; None if there is none."""
        experiment = self._client.get_experiment_by_name(_options(self.config).experiment)
        found = self._client.search_runs([experiment.experiment_id], f"tags.`{ENTRY_TAG}` = '{entry_id}'")
        return found[0] if found else None

    def _send_metrics(self, values: list[tuple[str, float, int]]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(tag, value, now, step) for tag, value, step in values if not math.isnan(value)]
        for first in range(0, len(metrics), MAX_METRICS):
            self._client.log_batch(self._run_id, metrics=metrics[first : first + MAX_METRICS])


def _options(config: RunConfig) -> MlflowConfig:
    return config.monitor.mlflow or MlflowConfig()


def _tracking_uri(config: RunConfig, run_dir: Path) -> str:
    default = f"sqlite:///{run_dir.absolute().parent / 'mlflow.db'}"
    return _options(config).tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or default


def _flatten(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield the dotted keys of nested values, and the values as text."""
    for key, value in values.items():
        name = prefix + re.sub(r"[^\w./ :-]", "_", str(key))
        if isinstance(value, dict):
            yield from _flatten(value, f"{name}.")
        else:
            yield name, (value if isinstance(value, str) else json.dumps(value))[:MAX_PARAMETER_LENGTH]
