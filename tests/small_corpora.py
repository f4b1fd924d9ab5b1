"""Small corpora that are prepared in this process, and a simple reader of their shards."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.ipc

from data_prep.config import DataConfig, JsonSource, TaskTest
from data_prep.utils.config_file import validate

SEQUENCE_LENGTH = 128
VOCAB_SIZE = 340


def data_config(path: Path, *sources: dict, **settings) -> DataConfig:
    return validate(
        DataConfig,
        {
            "path": str(path),
            "sources": list(sources),
            "tokenizer": {"vocab_size": VOCAB_SIZE},
            "sequence_length": SEQUENCE_LENGTH,
            "workers": 1,
        }
        | settings,
        "data",
    )


def json_source(path: Path, **settings) -> dict:
    return {"type": "json", "path": str(path)} | settings


def task_tests(path, task: str = "nl_rx", **source) -> list[TaskTest]:
    """Return the test set of one task: a file of JSON lines. `source` replaces settings of its source."""
    settings = JsonSource(**{"type": "json", "path": str(path)} | source)
    return [TaskTest(task=task, key="evaluation.tasks.0.test", source=settings)]


def shard_rows(folder: Path, entry: dict, views: tuple[str, ...] = ("text", "code")) -> list[tuple]:
    """Return the token lists of a shard's records, with None for each missing view."""
    table = pa.ipc.open_file(folder / entry["file"]).read_all()
    return list(zip(*(table[view].to_pylist() for view in views), strict=True))


def split_rows(folder: Path, split: str = "train", views: tuple[str, ...] = ("text", "code")) -> list[tuple]:
    """Return the token lists of a split's records, over all its shards."""
    manifest = json.loads((folder / "manifest.json").read_text())
    return [
        row
        for entry in manifest["splits"].get(split, {"shards": []})["shards"]
        for row in shard_rows(folder, entry, views)
    ]
