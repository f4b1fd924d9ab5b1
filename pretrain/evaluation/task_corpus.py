"""Corpora of the rows of a task, and rows of the embedded grammar."""

import hashlib
from pathlib import Path

from data_prep.config import DataConfig, JsonSource
from data_prep.nlrx_grammar import generate
from data_prep.pipeline import prepare
from data_prep.sources.files import find_files
from data_prep.sources.json_lines import SUFFIXES
from data_prep.task_rows import write_views
from data_prep.utils.console import UserError
from data_prep.utils.files import sha256_file
from pretrain.config import RunConfig
from pretrain.run_folder import MODEL_DIR

GRAMMAR_ROWS = 1000
GRAMMAR_SEED = 0


def prepare_task_corpus(config: RunConfig, source: JsonSource, folder: Path) -> DataConfig:
    """Prepare a corpus of all records of a source in the evaluation `folder`, and return its data section.

    The corpus uses the tokenizer of the run. Raises UserError for a source that has no path or cannot be read.
    """
    settings = {
        "views": config.data.views,
        "missing_views": config.data.missing_views,
        "sources": [source],
        "tokenizer": {"path": str(folder.parent / MODEL_DIR)},
        "sequence_length": config.data.sequence_length,
        "train_end_token": config.data.train_end_token,
        "deduplicate": "none",
        "decontaminate": False,
    }
    if source.path is None:
        raise UserError(f"a {source.type} source of the task has no path; set path in train or test of the task")
    try:
        contents = [sha256_file(Path(path)) for path in find_files(source, "task", SUFFIXES)]
    except OSError as error:
        raise UserError(f"cannot read {source.path} ({error.strerror}); check train and test of the task") from None
    name = hashlib.sha256(f"{settings}\0{contents}".encode()).hexdigest()[:16]
    data = DataConfig(path=str(folder / "data" / name), **settings)
    prepare(data)
    return data


def grammar_source(folder: Path, split: str, views: tuple[str, ...], rows: int = GRAMMAR_ROWS) -> JsonSource:
    """Write rows of the embedded NL-RX grammar to a file, unless it exists, and return the file as a source.

    Splits have no targets in common with each other or with pretraining.
    """
    path = folder / f"{split}-{rows}.jsonl"
    if not path.exists():
        write_views(path, views, (generate(GRAMMAR_SEED, split, index) for index in range(rows)))
    return JsonSource(type="json", path=str(path))
