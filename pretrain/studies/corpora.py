"""One prepared corpus for all arms that have the same records."""

import hashlib
import json
from pathlib import Path
from typing import Any

from data_prep.config import TaskTest, evaluation_tests
from data_prep.pipeline import prepare
from data_prep.shards import MANIFEST
from pretrain.config import RunConfig
from pretrain.studies.config import Study


def assign_corpora(study: Study, base: RunConfig) -> tuple[dict[str, dict[str, Any]], list[RunConfig]]:
    """For each arm the dotted keys that point it to its corpus, and a configuration for each corpus there is.

    An arm with the records of the base reads the base's corpus. Others get a folder beside it, named by what decides their records, unless
    they name one.
    """
    overrides: dict[str, dict[str, Any]] = {}
    corpora = {base.data.path: base}
    for arm, changes in study.config.arms.items():
        config = study.run_config(arm, study.config.seeds[0])
        overrides[arm] = {}
        if _records(config) != _records(base) and "data.path" not in changes and "data" not in changes:
            overrides[arm] = {"data.path": f"{base.data.path}-{hashlib.sha256(_records(config).encode()).hexdigest()[:8]}"}
            config = study.run_config(arm, study.config.seeds[0], overrides[arm])
        corpora.setdefault(config.data.path, config)
    return overrides, list(corpora.values())


def is_prepared(config: RunConfig) -> bool:
    """Whether the corpus of a configuration stands."""
    return (Path(config.data.path) / MANIFEST).exists()


def prepare_corpus(config: RunConfig) -> None:
    """Prepare the corpus of a configuration, unless it stands; one that stands may have no sources named. Raises UserError."""
    if config.data.sources or not is_prepared(config):
        prepare(config.data, _tests(config))


def _tests(config: RunConfig) -> list[TaskTest]:
    return evaluation_tests(config.data, config.evaluation.model_dump(mode="json", exclude_none=True))


def _records(config: RunConfig) -> str:
    """Return the settings that decide the shards, as text."""
    tests = [test.model_dump(mode="json", exclude={"key"}) for test in _tests(config)] if config.data.decontaminate else []
    return json.dumps([config.data.preparation(), tests], sort_keys=True)
