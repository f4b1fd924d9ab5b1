"""What tasks of pairs have in common: finetune where asked, read the rows, write answers, tell which targets are new."""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from data_prep.config import JsonSource
from data_prep.console import print_now
from data_prep.files import write_text
from data_prep.shards import MANIFEST, read_manifest, view_hashes
from data_prep.tokenizer import Tokenizer
from pretrain.data.corpus import Corpus, is_corpus_of
from pretrain.evaluation.finetune import finetune
from pretrain.evaluation.generate import Answer, answer
from pretrain.evaluation.pairs import GRAMMAR_ROWS, grammar_source
from pretrain.evaluation.rows import OwnColumns, Row, read_rows, write_views
from pretrain.evaluation.tasks.task_run import TaskRun

READ_AT_A_TIME = 65_536
"""Records of the corpus."""


def read_test(run: TaskRun, own: OwnColumns | None = None) -> list[Row]:
    """The rows to score. Raises UserError."""
    views = run.config.data.views
    source = run.test or grammar_source(run.folder / "data", "test", views, run.task.rows or GRAMMAR_ROWS)
    return read_rows(source, views, "task.test", run.task.rows, own)


def read_train(run: TaskRun, own: OwnColumns | None = None) -> list[Row]:
    """The rows to finetune on; none where the task gives none. Raises UserError."""
    return [] if run.train is None else read_rows(run.train, run.config.data.views, "task.train", own=own)


@contextmanager
def model_of(run: TaskRun, own: OwnColumns | None = None) -> Iterator[Path]:
    """The export that the task looks at: that of the checkpoint, or one finetuned from it on the train rows, where the task says so."""
    if run.task.finetune is None:
        yield run.export
        return
    views, data = run.config.data.views, run.folder / "data"
    if run.train is None:
        train = grammar_source(data, "finetune", views)
    elif isinstance(run.train, JsonSource) and own is None:
        train = run.train
    else:
        train = write_views(data / f"{run.task.title}-train.jsonl", views, (row.views for row in read_train(run, own)))
    yield finetune(run.config, run.task, run.export, train, run.folder, run.name)


def write_answers(run: TaskRun, model: Path, rows: list[Row]) -> list[Answer]:
    """The answers to all rows, at most twice as long as the longest target; kept in evaluation/answers. Raises UserError."""
    longest = max(map(len, Tokenizer.load(model).encode_batch([row.target for row in rows])))
    answers = answer(model, [row.context for row in rows], max_new_tokens=2 * longest + 1)
    folder = run.folder / "answers"
    folder.mkdir(exist_ok=True)
    lines = [json.dumps({"context": row.context, "target": row.target, "answer": answer.text, "stopped": answer.stopped}, ensure_ascii=False)
             for row, answer in zip(rows, answers, strict=True)]
    write_text(folder / f"{run.name}.jsonl", "\n".join(lines) + "\n")
    return answers


def without_room(answers: list[Answer]) -> dict[str, int]:
    """How many contexts were too long for the model, as a count of the result; nothing where all had room."""
    count = sum(not answer.fits for answer in answers)
    return {"too_long": count} if count else {}


def beyond_positions(likelihoods: list[list[float]]) -> dict[str, int]:
    """How many rows have an option that does not fit into the model's positions, which makes them wrong; as `without_room`."""
    count = sum(-math.inf in values for values in likelihoods)
    return {"too_long": count} if count else {}


def unseen(run: TaskRun, rows: list[Row], own: OwnColumns | None = None, normal: Callable[[str], str] = str) -> list[bool] | None:
    """Return whether the target of each row is new.

    A new target, in its `normal` form, is not a target of the task's train rows, and, token for token, not a view of a
    record in the training split of the corpus. The whole split is read once. Without the corpus of the run at data.path the
    result is None, and one line says so.
    """
    if not (Path(run.config.data.path) / MANIFEST).exists():
        print_now(f"note: no corpus at {run.config.data.path} (data.path), seen from here: no metric on unseen targets")
        return None
    if not is_corpus_of(run.folder.parent, read_manifest(Path(run.config.data.path))):
        print_now(f"note: {run.config.data.path} (data.path) holds another corpus than the run was trained on: no metric on unseen targets")
        return None
    known = {normal(row.target) for row in read_train(run, own)}
    if run.train is None and run.task.finetune is not None:
        known = {normal(row.target) for row in read_rows(grammar_source(run.folder / "data", "finetune", run.config.data.views),
                                                         run.config.data.views, "task.train")}
    pretrained = in_corpus(run.config.data.path, [row.target for row in rows])
    return [normal(row.target) not in known and not seen for row, seen in zip(rows, pretrained, strict=True)]


def in_corpus(path: str, texts: list[str]) -> list[bool]:
    """Whether each text is a view of a record in the training split of a corpus, token for token."""
    corpus = Corpus(path, "train")
    encoded = corpus.tokenizer.encode_batch(texts)
    wanted = view_hashes(np.array([token for ids in encoded for token in ids], np.uint32), np.array([len(ids) for ids in encoded], np.int64))
    found = np.zeros(len(texts), bool)
    for first in range(0, len(corpus), READ_AT_A_TIME):
        hashes = corpus.read(np.arange(first, min(first + READ_AT_A_TIME, len(corpus)))).hashes
        found |= np.isin(wanted, hashes)
    return found.tolist()
