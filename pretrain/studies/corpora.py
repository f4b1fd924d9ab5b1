"""Corpora of a study: arms with the same records share one prepared corpus."""

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

from data_prep.config import HubSource, TaskTest, evaluation_tests
from data_prep.inputs import changed_settings
from data_prep.pipeline import prepare
from data_prep.shards import MANIFEST, read_manifest
from data_prep.sources import open_source
from data_prep.units import Job
from data_prep.utils.console import UserError
from pretrain.config import RunConfig
from pretrain.studies.config import Study

logger = logging.getLogger(__name__)


def assign_corpora(study: Study, base: RunConfig) -> tuple[dict[str, dict[str, Any]], list[RunConfig]]:
    """Return the dotted keys that point each arm to its corpus, and one configuration for each corpus.

    An arm with the same records as the base reads the base's corpus. An arm with different records reads the folder in
    its data.path if it sets one. Otherwise its corpus is in a folder next to the base's corpus, whose name contains a
    hash of the settings that determine the records. Raises UserError if the data.path of an arm belongs to different
    records.
    """
    overrides: dict[str, dict[str, Any]] = {}
    corpora = {os.path.abspath(base.data.path): ("the base", base)}
    for arm, changes in study.config.arms.items():
        config = study.run_config(arm, study.config.seeds[0])
        overrides[arm] = {}
        if _records(config) != _records(base) and "data.path" not in changes and "data" not in changes:
            overrides[arm] = {
                "data.path": f"{base.data.path}-{hashlib.sha256(_records(config).encode()).hexdigest()[:8]}"
            }
            config = study.run_config(arm, study.config.seeds[0], overrides[arm])
        owner, owner_config = corpora.setdefault(os.path.abspath(config.data.path), (f"arms.{arm}", config))
        if _records(owner_config) != _records(config):
            raise UserError(
                f"arms.{arm}: its data settings produce different records than {owner}, but both have the "
                f"data.path {config.data.path}; give the arm a different data.path, or remove it to have one chosen"
            )
    return overrides, [config for _, config in corpora.values()]


def is_prepared(config: RunConfig) -> bool:
    """Return whether the corpus of a configuration is prepared."""
    return (Path(config.data.path) / MANIFEST).exists()


def prepare_corpus(config: RunConfig) -> None:
    """Prepare the corpus of a configuration, unless it is already prepared.

    A prepared corpus does not need its sources: they may be unset or deleted. Raises UserError if the corpus was
    prepared with different settings or files.
    """
    if not is_prepared(config):
        prepare(config.data, _tests(config))
    elif reason := _missing_inputs(config):
        job = Job(data=config.data, tests=tuple(_tests(config)) if config.data.decontaminate else ())
        if config.data.sources and (
            changed := changed_settings(read_manifest(Path(config.data.path))["settings"], job)
        ):
            raise UserError(
                f"{config.data.path} was prepared with a different {' and '.join(changed[:3])}, "
                f"and cannot be prepared again: {reason}"
            )
        logger.info(f"note: {config.data.path} is used as it is: {reason}")
    elif config.data.sources:
        prepare(config.data, _tests(config))  # raises UserError if the corpus or its files have changed


def _missing_inputs(config: RunConfig) -> str | None:
    """Return a text that names the missing input of a prepared corpus; None if all inputs can be read."""
    files = read_manifest(Path(config.data.path))["settings"].get("files", {})
    tests = {test.source.path for test in _tests(config)}  # the evaluation checks the test files
    missing = [path for path in files if path not in tests and not Path(path).exists()]
    if missing:
        others = len(missing) - 1
        if others:
            return f"its input {missing[0]} and {others:,} other input{'s' * (others > 1)} are missing"
        return f"its input {missing[0]} is missing"
    try:
        for number, source in enumerate(config.data.sources):
            if isinstance(source, HubSource):
                open_source(source, config.data.views, f"data.sources.{number}")
    except UserError as error:
        return str(error)
    return None


def _tests(config: RunConfig) -> list[TaskTest]:
    return evaluation_tests(config.data, config.evaluation.model_dump(mode="json", exclude_none=True))


def _records(config: RunConfig) -> str:
    """Return the settings that determine the shards as JSON text."""
    tests = (
        [test.model_dump(mode="json", exclude={"key"}) for test in _tests(config)] if config.data.decontaminate else []
    )
    return json.dumps([config.data.shard_settings(), tests], sort_keys=True)
