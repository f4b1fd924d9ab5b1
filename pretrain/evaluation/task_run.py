"""The run of one task on one checkpoint: rows, finetuning if the task requests it, answers and likelihoods."""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from data_prep.config import HubSource, JsonSource, task_source
from data_prep.shards import MANIFEST, read_manifest
from data_prep.task_rows import Row, read_rows, write_views
from data_prep.tasks import public_row_format
from data_prep.tokenizer import Tokenizer
from data_prep.utils.files import write_text
from pretrain.config import RunConfig
from pretrain.data.corpus import Corpus, count_in_corpus, was_trained_on
from pretrain.evaluation.finetune import finetune
from pretrain.evaluation.generate import generate_answers
from pretrain.evaluation.likelihood import log_likelihoods
from pretrain.evaluation.task_corpus import GRAMMAR_ROWS, grammar_source
from pretrain.run_folder import step_name
from pretrain.tasks.options import TaskConfig
from pretrain.tasks.scoring import Answer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CheckpointTask:
    """One task on one checkpoint; see `pretrain.tasks.scoring.TaskRun`."""

    config: RunConfig
    """Configuration of the pretraining run."""
    task: TaskConfig
    step: int
    export: Path
    """The checkpoint in Hugging Face format."""
    folder: Path
    """The evaluation folder of the run; the task may write to it."""

    @property
    def name(self) -> str:
        """Name of the files that the task writes."""
        return f"{self.task.title}-{step_name(self.step)}"

    def source(self, key: str) -> JsonSource | HubSource | None:
        """Return the source at a key of the task (train or test), or None if the key is not set."""
        source = self.task.sources.get(key)
        return None if source is None else task_source(self.config.data, source)

    def read_test(self, *, every: bool = False) -> list[Row]:
        """Return the rows to score; with `every`, the option `rows` does not limit them.

        Without a test source, the rows come from the embedded grammar. Raises UserError if they cannot be read.
        """
        source = self.source("test") or grammar_source(
            self.folder / "data", "test", self.config.data.views, self.task.rows or GRAMMAR_ROWS
        )
        return read_rows(
            source,
            self.config.data.views,
            "task.test",
            None if every else self.task.rows,
            public_row_format(self.task.name),
        )

    def read_train(self) -> list[Row]:
        """Return the train rows of the task; a task that finetunes without a train source uses the embedded grammar.

        Raises UserError if they cannot be read.
        """
        source = self.source("train")
        if source is None and self.task.finetunes:
            source = grammar_source(self.folder / "data", "finetune", self.config.data.views)
        return (
            []
            if source is None
            else read_rows(source, self.config.data.views, "task.train", row_format=public_row_format(self.task.name))
        )

    @cached_property
    def model(self) -> Path:
        """Export that the task evaluates: the checkpoint's, or one that is finetuned from it on the train rows."""
        if not self.task.finetunes:
            return self.export
        train = write_views(
            self.folder / "data" / f"{self.task.title}-train.jsonl",
            self.config.data.views,
            (row.views for row in self.read_train()),
        )
        return finetune(self.config, self.task, self.export, train, self.folder, self.name)

    def generate_answers(self, rows: Sequence[Row]) -> list[Answer]:
        """Return the answers to all rows, and save them in evaluation/answers.

        An answer has at most twice as many tokens as the longest target, plus one. Raises UserError if no context
        leaves room for an answer.
        """
        longest = max(map(len, Tokenizer.load(self.model).encode_batch([row.target for row in rows])))
        answers = generate_answers(self.model, [row.context for row in rows], max_new_tokens=2 * longest + 1)
        folder = self.folder / "answers"
        folder.mkdir(exist_ok=True)
        lines = [
            json.dumps(
                {"context": row.context, "target": row.target, "answer": answer.text, "stopped": answer.stopped},
                ensure_ascii=False,
            )
            for row, answer in zip(rows, answers, strict=True)
        ]
        write_text(folder / f"{self.name}.jsonl", "\n".join(lines) + "\n")
        return answers

    def log_likelihoods(self, options: Sequence[tuple[str, list[str]]]) -> list[list[float]]:
        """Return the log-likelihood of each option after its context; see `pretrain.evaluation.likelihood`."""
        return log_likelihoods(self.model, list(options))

    def unseen(self, rows: Sequence[Row], normalize: Callable[[str], str] = str) -> list[bool] | None:
        """Return whether the target of each row is unseen, or None if this is unknown.

        An unseen target, normalised by `normalize`, differs from all targets in the task's train rows. Its tokens
        differ from all views of the records in the training split of the corpus. The whole split is read once. If the
        corpus of the run is not at data.path, a note is logged and the result is None.
        """
        if not (Path(self.config.data.path) / MANIFEST).exists():
            logger.info(
                f"note: there is no corpus at {self.config.data.path} (data.path) on this machine; "
                "metrics on unseen targets are skipped"
            )
            return None
        if not was_trained_on(self.folder.parent, read_manifest(Path(self.config.data.path))):
            logger.info(
                f"note: {self.config.data.path} (data.path) is not the corpus that the run was trained on; "
                "metrics on unseen targets are skipped"
            )
            return None
        train_targets = {normalize(row.target) for row in self.read_train()}
        counts = count_in_corpus(Corpus(self.config.data.path, "train"), [row.target for row in rows])
        return [
            normalize(row.target) not in train_targets and not count for row, count in zip(rows, counts, strict=True)
        ]
