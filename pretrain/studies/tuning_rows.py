"""The rows that decide a tuning: rows that are neither trained on nor tested, in a file of the study."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_prep.config import DataConfig, HubSource, JsonSource, task_source
from data_prep.task_rows import Row, read_rows
from data_prep.tasks import public_row_format
from data_prep.utils.console import UserError
from data_prep.utils.files import sha256_file, write_text
from pretrain.config import RunConfig
from pretrain.data.corpus import Corpus
from pretrain.tasks.options import AnswerTask, RowTask, TaskConfig

ROWS_FILE = "validation.jsonl"
"""File in the folder of the trials with the rows."""


class TuningRows(NamedTuple):
    """The rows of the trials."""

    source: JsonSource
    """Source for the option `test` of the task."""
    description: dict[str, Any]
    """Description for study.json: origin, number, checksum, and the numbers of rows that were dropped."""


def write_rows(base: RunConfig, task: TaskConfig, corpora: Iterable[str], folder: Path) -> TuningRows:
    """Write the rows of the trials to `folder`, without the rows that are tested or trained on.

    The rows are the option `validation` of the task or, without it, the validation split of the corpus of `base`.
    `corpora` are the folders of the corpora of all arms. Raises UserError if there are no rows.
    """
    if not isinstance(task, RowTask):
        raise UserError(f"tune cannot use the task {task.title}, because it has no rows; choose another metric")
    views: Any = None
    if task.validation is not None:
        source = task_source(base.data, task.validation)
        origin, views = f"validation of {task.title}", source.views
        rows = _read(base.data, source, task, "validation")
    else:
        origin, rows = "the validation split of the corpus", _read_split(base)
    tested = (
        {row.views for row in _read(base.data, task_source(base.data, task.test), task, "test")} if task.test else ()
    )
    train = _finetuning_rows(task)
    finetuning = _read(base.data, task_source(base.data, train), task, "train") if train else []
    finetuned = {row.views for row in finetuning}
    trained = [row.views in finetuned for row in rows]
    for corpus in corpora:
        found = _are_trained(Corpus(corpus, "train"), rows)
        trained = [before or now for before, now in zip(trained, found, strict=True)]
    dropped = {"tested": sum(row.views in tested for row in rows), "trained": sum(trained)}
    overlapping = {
        id(row.columns) for row, is_trained in zip(rows, trained, strict=True) if is_trained or row.views in tested
    }
    # An object of the source may have several rows.
    objects = {id(row.columns): row.columns for row in rows if id(row.columns) not in overlapping}
    if not objects:
        raise UserError(
            f"tune needs rows that are neither trained on nor tested, but of the {len(rows):,} rows of {origin}, "
            f"{dropped['tested']:,} are test rows and {dropped['trained']:,} are training records; change "
            "evaluation.tasks.N.validation, or data.validation_fraction"
        )
    path = folder / ROWS_FILE
    _write(path, objects.values(), origin)
    kept = sum(id(row.columns) in objects for row in rows)
    kept = min(kept, task.rows or kept)
    return TuningRows(
        JsonSource(type="json", path=str(path), views=views),
        {"origin": origin, "rows": kept, "sha256": sha256_file(path), "dropped": dropped},
    )


def _read(data: DataConfig, source: JsonSource | HubSource, task: TaskConfig, key: str) -> list[Row]:
    """Return all rows of a source of the task, as the task reads them."""
    return read_rows(
        source,
        data.views,
        f"evaluation.tasks.N.{key}",
        row_format=public_row_format(task.name),
        allow_missing_views=data.missing_views == "keep",
    )


def _finetuning_rows(task: TaskConfig) -> Any:
    """Return the source of the rows on which the task finetunes; None if it does not finetune."""
    return task.train if isinstance(task, AnswerTask) and task.finetunes else None


def _read_split(base: RunConfig) -> list[Row]:
    """Return the complete records of the validation split of the corpus. Raises UserError if there is no such split."""
    try:
        corpus = Corpus(base.data.path, "validation")
    except (KeyError, UserError):
        raise UserError(
            "tune needs rows that are neither trained on nor tested, but the task of the metric has no `validation`, "
            f"and {base.data.path} no validation split: set evaluation.tasks.N.validation, or data.validation_fraction"
        ) from None
    texts = (
        tuple(corpus.tokenizer.decode(ids) for ids in corpus.tokens_by_view(record).values())
        for record in range(len(corpus))
    )
    return [Row(row, dict(zip(base.data.views, row, strict=True))) for row in texts if all(row)]


def _are_trained(corpus: Corpus, rows: list[Row]) -> list[bool]:
    """Return for each row whether a record of a split has the same tokens in all views. The split is read once."""
    by_view = [corpus.text_hashes([row.views[view] for row in rows]) for view in range(corpus.views)]
    keys = [hashes.tobytes() for hashes in np.stack(by_view, axis=1)]
    wanted, found = set(keys), set[bytes]()
    for block in corpus.all_hashes():
        found |= wanted & {hashes.tobytes() for hashes in block}
    return [key in found for key in keys]


def _write(path: Path, objects: Iterable[dict[str, Any]], origin: str) -> None:
    try:
        lines = [json.dumps(columns, ensure_ascii=False) + "\n" for columns in objects]
    except TypeError as error:
        raise UserError(
            f"tune cannot write the rows of {origin} as JSON ({error}); give a file of JSON lines"
        ) from None
    write_text(path, "".join(lines))
