"""The record of a run in config.yaml and environment.json, and the check that a resumed run matches its record."""

import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from data_prep.utils.config_file import parse_yaml, validate
from data_prep.utils.console import UserError
from data_prep.utils.files import sha256_file, write_json, write_text
from pretrain.config import RunConfig, config_values, dump_config
from pretrain.data.corpus import corpus_identity, source_weights
from pretrain.revision import ROOT, revision
from pretrain.training.extension import MAY_DIFFER, check_extension, larger_budget

LOCK = ROOT / "requirements.lock"
STARTS = "starts.jsonl"
"""File with one line for each launch that reached training; environment.json describes the last of these launches."""
PACKAGES = ("torch", "deepspeed", "transformers", "accelerate", "sentencepiece", "tokenizers", "pyarrow", "numpy")
PARTITIONING = {"stage": 3, "round_robin_gradients": False, "parameter_alignment": False, "sub_group_size": 10**9}
"""Keys of deepspeed.zero_optimization that determine the layout of a checkpoint's shards, with their defaults."""
IMMUTABLE_ON_RESUME = (
    "branch_from",
    "seed",
    "model",
    "objective",
    "train",
    "data.lm_views",
    "data.train_end_token",
    "data.sequence_length",
    "deepspeed.communication_data_type",
    "deepspeed.data_types",
    "deepspeed.zero_optimization.zero_quantized_gradients",
    "deepspeed.zero_optimization.zero_quantized_weights",
    *(f"deepspeed.zero_optimization.{key}" for key in PARTITIONING),
)
"""Keys that may not change on resume. They determine the computation, or how DeepSpeed's files are read. The shards
and the tokenizer may not change either."""
MUTABLE_ON_RESUME = (
    "train.activation_checkpointing",
    "train.compile",
    "train.micro_batch_rows",
    "train.on_spike",
    "train.spike_score",
)
"""Keys below IMMUTABLE_ON_RESUME that may change: they do not change what is computed, or affect later events only."""
LOCATION_KEYS = ("name", "output_dir")
"""Keys of the run's location. A run directory may move, so their changes are not reported."""


def record_start(
    config: RunConfig,
    manifest: dict[str, Any],
    ranks: int,
    step: int,
    changes: list[str],
    lineage: Sequence[dict[str, Any]] = (),
) -> None:
    """Write config.yaml and environment.json, and add a line to starts.jsonl for a launch that trains from `step`.

    `changes` are the changed settings since the previous launch, from `check_same_run`. `lineage` lists the sources of
    a branch.
    """
    run_dir = config.run_dir
    environment = {
        "python": platform.python_version(),
        "packages": {package: importlib.metadata.version(package) for package in PACKAGES},
        "revision": revision(),
        "requirements": sha256_file(LOCK) if LOCK.exists() else None,
        "image": os.environ.get("JEPA_IMAGE") or None,
        "ranks": ranks,
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else platform.processor() or platform.machine(),
        "cuda": torch.version.cuda,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads_per_rank": torch.get_num_threads(),
    }
    write_text(run_dir / "config.yaml", dump_config(config))
    data = {"data": data_record(config, manifest)} | ({"lineage": list(lineage)} if lineage else {})
    write_json(run_dir / "environment.json", environment | data)
    starts = run_dir / STARTS
    earlier_lines = starts.read_text(encoding="utf-8") if starts.exists() else ""
    start = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "step": step, "changes": changes} | environment
    write_text(starts, earlier_lines + json.dumps(start) + "\n")


def data_record(config: RunConfig, manifest: dict[str, Any]) -> dict[str, Any]:
    """Return the identity of the data of a run: its corpus, tokenizer and source weights."""
    return corpus_identity(manifest) | {"weights": source_weights(manifest, config.data.sources)}


def check_same_run(config: RunConfig, manifest: dict[str, Any], ranks: int | None) -> list[str]:
    """Return a line for each allowed change since the last launch of the run; empty for a new run.

    `ranks` is None if the number of ranks is not known yet. Raises UserError if the folder contains a run with a
    different corpus, tokenizer, or setting of IMMUTABLE_ON_RESUME. A larger budget is allowed if the run can
    be extended.
    """
    run_dir = config.run_dir
    data = data_record(config, manifest)
    before = previous_config(run_dir)
    if before is None:
        return []
    now = completed_config(config)
    differing = changed_keys(before, now)
    changed = [
        key
        for key in differing
        if any(f"{key}.".startswith(f"{immutable}.") for immutable in IMMUTABLE_ON_RESUME)
        and key not in MUTABLE_ON_RESUME
    ]
    if budget := larger_budget(before, config.train):
        changed = [key for key in changed if key not in MAY_DIFFER]
        if not changed:
            check_extension(before, config, budget)
    if changed:
        listed = ", ".join(f"{key} ({value_at(before, key)}, now {value_at(now, key)})" for key in changed[:5])
        raise UserError(
            f"{run_dir} contains a run with a different {listed}; this may not change on resume: choose another "
            f"`name` (with branch_from.run={run_dir}, it starts from the last checkpoint), or remove that folder"
        )
    environment: dict[str, Any] = read_environment(run_dir) or {"data": data}
    for part, word in (("tokenizer", "tokenizer files"), ("corpus", "shards")):
        if environment["data"][part] != data[part]:
            raise UserError(
                f"the {word} of {config.data.path} differ from the ones that {run_dir} was started with: "
                "set data.path to the corpus of that run, or choose another `name`"
            )
    if environment["data"]["weights"] != data["weights"]:
        raise UserError(
            f"the weights of data.sources are {data['weights']}, but {run_dir} was started with "
            f"{environment['data']['weights']}: set these weights, or choose another `name`"
        )
    accepted = [
        f"{key} is {value_at(now, key)}, was {value_at(before, key)}"
        for key in differing
        if key.split(".")[0] not in LOCATION_KEYS
    ]
    ranks_before = environment.get("ranks", ranks or 1)
    ranks_now = ranks or ranks_before
    rows, rows_before = ranks_now * config.train.micro_batch_rows, ranks_before * before["train"]["micro_batch_rows"]
    if rows != rows_before:
        accepted.append(
            f"a micro step has {rows} rows on {ranks_now} ranks, was {rows_before} on {ranks_before}: the pool of "
            "terms that compare pairs with each other (info_nce, regularizers) has a different size"
        )
    return accepted


def previous_config(run_dir: Path) -> dict[str, Any] | None:
    """Return the configuration of the last launch of a run; None for a new run. Raises UserError if it is corrupt."""
    path = run_dir / "config.yaml"
    return _with_partitioning(_with_defaults(_read(path, parse_yaml))) if path.exists() else None


def read_environment(run_dir: Path) -> dict[str, Any] | None:
    """Return environment.json of a run; None if there is none. Raises UserError if it is corrupt."""
    path = run_dir / "environment.json"
    if not path.exists():
        return None
    environment = _read(path, json.loads)
    if (
        not isinstance(environment.get("data"), dict)
        or not {"corpus", "tokenizer", "weights"} <= environment["data"].keys()
    ):
        raise UserError(
            f"{path}, which describes the run, is corrupt: restore it from a copy, or choose another `name`"
        )
    return environment


def completed_config(config: RunConfig) -> dict[str, Any]:
    """Return a configuration in the form in which `previous_config` returns the configuration of an earlier launch."""
    return _with_partitioning(config_values(config))


def changed_keys(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return the dotted keys that differ between two configurations."""
    return sorted(
        key
        for section in before.keys() | now.keys()
        for key in _differences(before.get(section), now.get(section), section)
    )


def value_at(values: Any, key: str) -> Any:
    """Return the value of a dotted key; None if it is not set."""
    for part in key.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values


def _read(path: Path, parse: Callable[[str], Any]) -> dict[str, Any]:
    """Return the content of a file of the run folder. Raises UserError if it is corrupt."""
    try:
        values = parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        values = None
    if not isinstance(values, dict):
        raise UserError(
            f"{path}, which describes the run, is corrupt: restore it from a copy, or choose another `name`"
        )
    return values


def _with_defaults(values: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration that also has the keys that did not exist when it was written, with their defaults.

    A configuration that the current version cannot read is returned as it is.
    """
    try:
        return config_values(validate(RunConfig, values))
    except UserError:
        return values


def _with_partitioning(values: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration that includes the defaults of PARTITIONING, so omitting a default is not a change."""
    deepspeed = values.get("deepspeed") or {}
    return values | {
        "deepspeed": deepspeed | {"zero_optimization": PARTITIONING | deepspeed.get("zero_optimization", {})}
    }


def _differences(before: Any, now: Any, key: str) -> list[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        return [
            differing_key
            for part in before.keys() | now.keys()
            for differing_key in _differences(before.get(part), now.get(part), f"{key}.{part}")
        ]
    return [] if before == now else [key]
