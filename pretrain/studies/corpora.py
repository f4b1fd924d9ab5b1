"""One prepared corpus for all arms that have the same records."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from data_prep.config import HubSource, TaskTest, evaluation_tests
from data_prep.console import UserError, print_now
from data_prep.inputs import changed_settings
from data_prep.pipeline import prepare
from data_prep.shards import MANIFEST, read_manifest
from data_prep.sources import open_source
from data_prep.units import Job
from pretrain.config import RunConfig
from pretrain.studies.config import Study


def assign_corpora(study: Study, base: RunConfig) -> tuple[dict[str, dict[str, Any]], list[RunConfig]]:
    """For each arm the dotted keys that point it to its corpus, and a configuration for each corpus there is.

    An arm with the records of the base reads the base's corpus. Others get a folder beside it, named by what decides their records, unless
    they name one. Raises UserError for an arm that names the folder of other records.
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
        owner, other = corpora.setdefault(os.path.abspath(config.data.path), (f"arms.{arm}", config))
        if _records(other) != _records(config):
            raise UserError(
                f"arms.{arm}: its data settings make other records than those of {owner}, which has the same data.path, "
                f"{config.data.path}: give the arm a data.path of its own, or leave data.path out of it to have one made"
            )
    return overrides, [config for _, config in corpora.values()]


def is_prepared(config: RunConfig) -> bool:
    """Whether the corpus of a configuration stands."""
    return (Path(config.data.path) / MANIFEST).exists()


def prepare_corpus(config: RunConfig) -> None:
    """Prepare the corpus of a configuration, unless it stands. One that stands needs no sources: none named, or ones that are gone.

    Raises UserError.
    """
    if not is_prepared(config):
        prepare(config.data, _tests(config))
    elif reason := _why_gone(config):
        job = Job(data=config.data, tests=tuple(_tests(config)) if config.data.decontaminate else ())
        if config.data.sources and (
            changed := changed_settings(read_manifest(Path(config.data.path))["settings"], job)
        ):
            raise UserError(
                f"{config.data.path} was prepared with another {' and '.join(changed[:3])}, and cannot be prepared again: {reason}"
            )
        print_now(f"note: {config.data.path} is used as it stands: {reason}")
    elif config.data.sources:
        prepare(config.data, _tests(config))  # which refuses it where its files have changed


def _why_gone(config: RunConfig) -> str | None:
    """Return what is missing of the files and data sets that a prepared corpus was made from; None where all can be read."""
    files = read_manifest(Path(config.data.path))["settings"].get("files", {})
    tests = {test.source.path for test in _tests(config)}  # which an evaluation needs anyway
    gone = [path for path in files if path not in tests and not Path(path).exists()]
    if gone:
        return f"{gone[0]}, which it was prepared from, is gone" + (
            f", as are {len(gone) - 1:,} other files" if len(gone) > 1 else ""
        )
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
    """Return the settings that decide the shards, as text."""
    tests = (
        [test.model_dump(mode="json", exclude={"key"}) for test in _tests(config)] if config.data.decontaminate else []
    )
    return json.dumps([config.data.shard_settings(), tests], sort_keys=True)
