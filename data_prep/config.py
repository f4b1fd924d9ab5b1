"""The `data` section of the configuration, and what the preparation reads of `evaluation`."""

import difflib
import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, field_validator, model_validator

from data_prep.config_file import LocalPath, Section, validate

Split = Literal["train", "validation", "test"]
MOST_VIEWS = 8
COLUMNS_OF_SHARDS = CONTINUES, CHECKSUM = "continues", "checksum"
"""Beside the views."""


class BaseSource(Section):
    """What all sources have in common."""

    split: Split = "train"
    weight: float = Field(default=1.0, gt=0)
    """How often each of its records comes in an epoch; 0.5: every second epoch, 2: twice. Only for split train."""
    views: dict[str, str] | str | None = None
    """View -> column, `messages.ROLE` (the only message of that role), or a template over columns such as `{name}: {summary}`
    (a doubled brace is a brace; a view is absent where one of its columns is). Views of `data.views` that it leaves out are absent
    in all records of this source. Or one column that holds a list of texts, which become the views in order; a longer list becomes
    several records."""

    @field_validator("views", mode="before")
    @classmethod
    def _a_mapping_or_a_column(cls, views: Any) -> Any:
        texts = [*views, *views.values()] if isinstance(views, dict) else [] if views is None else [views]
        if not all(isinstance(text, str) and text for text in texts) or views == {}:
            raise ValueError("give a mapping of views to columns, or the name of a column of lists of texts")
        return views

    @model_validator(mode="after")
    def _weight_acts(self) -> "BaseSource":
        if self.weight != 1 and self.split != "train":
            raise ValueError(f"weight acts on sources of split train only; leave it out beside split: {self.split}")
        return self


class FileSource(BaseSource):
    """A source of files."""

    path: LocalPath | None = None
    """A file, a folder (all such files below it, by name, but for hidden ones), or a glob. May be left open in a shared configuration
    and given on the command line."""


class NlrxSource(BaseSource):
    """Pairs drawn from the embedded NL-RX grammar. Columns: text, code; by default the first view and the last."""

    type: Literal["nlrx"]
    records: int = Field(gt=0)
    """Number of records generated."""
    seed: int = 0
    """Seed of the generator; the same seed and index always give the same record."""


class JsonSource(FileSource):
    """JSON lines (.json, .jsonl, .ndjson; plain, .gz or .zst): one object a line.

    A .json file may be one array of objects instead. By default a view is the column of its name. In a line that has `messages`, the
    user's message is the first view and the assistant's the last.
    """

    type: Literal["json"]


class ParquetSource(FileSource):
    """Parquet files (.parquet). Columns become views as those of JSON lines do."""

    type: Literal["parquet"]


class CsvSource(FileSource):
    """CSV (.csv) and TSV (.tsv) files with a header line (plain, .gz or .zst). Columns become views as those of JSON lines do."""

    type: Literal["csv"]


class ArrowSource(FileSource):
    """Arrow files (.arrow), or a folder of `datasets.Dataset.save_to_disk`. Columns become views as those of JSON lines do."""

    type: Literal["arrow"]


class HubSource(BaseSource):
    """A data set of the Hugging Face hub, streamed, or of a local folder. Columns become views as those of JSON lines do."""

    type: Literal["hub"]
    path: LocalPath
    """Name on the hub, such as `owner/name`, or a local folder in the layout of the hub or of `save_to_disk`."""
    config: str | None = None
    """The data set's configuration, where it has several."""
    hub_split: str = "train"
    """The data set's own split that is read."""
    revision: str | None = None
    """Branch, tag or commit. The preparation resolves it to a commit, which `manifest.json` names."""


class TextSource(FileSource):
    """Plain documents (plain, .gz or .zst). Column: text; by default the last view."""

    type: Literal["text"]
    separator: str | None = Field(default=None, max_length=1000)
    """Lines that equal it stand between the documents of a file; an empty one stands for blank lines. Default: a file is one document."""

    @field_validator("separator")
    @classmethod
    def _one_line(cls, separator: str | None) -> str | None:
        if separator is not None and (set("\r\n") & set(separator) or separator.isspace()):
            raise ValueError("a separator is the text of one line; an empty one stands for blank lines")
        return separator


class PythonSource(FileSource):
    """Functions with docstrings of a tree of Python files (.py).

    Columns: docstring and code (the function without it), by default the first view and the last; name, signature, module.
    A top-level package is held out for validation as a whole.
    """

    type: Literal["python"]


Source = Annotated[
    NlrxSource | JsonSource | ParquetSource | CsvSource | ArrowSource | HubSource | TextSource | PythonSource,
    Field(discriminator="type"),
]


class TokenizerConfig(Section):
    """Either `vocab_size` (train sentencepiece on the corpus) or `path` (take an existing one over)."""

    vocab_size: int | None = Field(default=None, gt=0)
    """Pieces, special tokens and bytes included."""
    model_type: Literal["bpe", "unigram"] | None = None
    """Of the trained tokenizer; default bpe."""
    path: LocalPath | None = None
    """A sentencepiece `.model`, a `tokenizer.json`, or a local Hugging Face folder."""

    @model_validator(mode="after")
    def _one_of_two(self) -> "TokenizerConfig":
        if (self.vocab_size is None) == (self.path is None):
            raise ValueError("give exactly one of vocab_size (train one) and path (take one over)")
        if self.path is not None and self.model_type is not None:
            raise ValueError("model_type is for a trained tokenizer; it cannot act beside path")
        return self


class FiltersConfig(Section):
    """Records left out by their text. A view with a NUL character always drops its record."""

    min_characters: int = Field(default=0, ge=0)
    """A record with a shorter view is dropped; a view that it lacks does not count."""
    max_characters: int | None = Field(default=None, ge=1)
    """A record with a longer view is dropped, before it is tokenized."""
    forbidden: str | None = None
    """A regular expression (of Python's `re`): a record is dropped where it matches anywhere in a view. An expression that does not decide about
    a record in 10 s of computing stops the preparation with the place of that record."""

    @model_validator(mode="after")
    def _can_pass(self) -> "FiltersConfig":
        if self.max_characters is not None and self.max_characters < self.min_characters:
            raise ValueError(
                f"max_characters ({self.max_characters}) is below min_characters ({self.min_characters}): no record would be left"
            )
        return self

    @field_validator("forbidden")
    @classmethod
    def _is_an_expression(cls, forbidden: str | None) -> str | None:
        try:
            re.compile(forbidden or "")
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"{forbidden!r} is no regular expression: {error}") from None
        return forbidden


class DataConfig(Section):
    """The corpus: where it comes from, and the shards it becomes."""

    path: LocalPath
    """Folder of the prepared shards."""
    sources: list[Source] = []
    """Where records come from, see below."""
    views: tuple[str, ...] = Field(default=("text", "code"), min_length=1)
    """The views of a record, at most 8: the context (a question, a description) and the target (its answer); one for plain
    documents; several for groups of paraphrases, where each is the context of the next."""
    missing_views: Literal["drop", "keep"] = "drop"
    """A record that lacks some of its views is dropped and counted, or kept with those that it has: one is a plain document."""
    tokenizer: TokenizerConfig
    """Trained or taken over, see below."""
    filters: FiltersConfig = FiltersConfig()
    """Records left out by their text, see below."""
    sequence_length: int = Field(default=512, ge=8)
    """Positions in a packed row. Records that do not fit one where each view predicts the next are dropped and counted; prepended
    predictor tokens and `direction: both` may need more, which the start of a run tells."""
    lm_views: Literal["all", "last"] = "all"
    """Which views take next-token labels: every one, or only the last (the answer)."""
    train_end_token: bool = True
    """Whether the end token of a text is a next-token target. Without it a model does not learn to stop, which published figures of
    LLM-JEPA suffer from: for comparison with those alone."""
    validation_fraction: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Fraction of the training sources held out for validation, drawn by the target view's text, so that no target is on both sides. Records
    of a frequent target, such as a label, are drawn by their context instead; the preparation reports that."""
    on_malformed: Literal["fail", "drop"] = "fail"
    """A line that is no record (not JSON, not UTF-8, a view that is no text) stops the preparation, or is
    dropped and counted."""
    deduplicate: Literal["exact", "near", "none"] = "exact"
    """Of records whose views are all the same one is kept, wherever they stand (exact), of those that are nearly the same, too (near, which
    takes the extra `near-duplicates`), or all (none). A record of a test or validation source is kept before one for training."""
    near_threshold: float | None = Field(default=None, gt=0, lt=1)
    """Similarity from which on records are nearly the same; default 0.8."""
    decontaminate: bool = True
    """Training records that stand in the test files of `evaluation.tasks` are dropped: by their context, or a long shared stretch of it, never by
    a common target."""
    workers: int | None = Field(default=None, ge=1)
    """Processes of the preparation; default: one per core. Under mpirun or srun the ranks do the work."""

    @field_validator("views")
    @classmethod
    def _views_are_names(cls, views: tuple[str, ...]) -> tuple[str, ...]:
        for view in views:
            if not re.fullmatch(r"[^\W\d]\w*", view) or view in COLUMNS_OF_SHARDS:
                raise ValueError(
                    f"{view!r} cannot be the name of a view: letters, digits and underscores make one, "
                    f"and {' and '.join(COLUMNS_OF_SHARDS)} are columns that every shard has"
                )
        return views

    @model_validator(mode="after")
    def _views_differ(self) -> "DataConfig":
        if len(set(self.views)) < len(self.views):
            raise ValueError(f"views are {list(self.views)}: give each a name of its own")
        if len(self.views) > MOST_VIEWS:
            raise ValueError(f"views are {len(self.views)}, at most {MOST_VIEWS} are possible")
        if self.near_threshold is not None and self.deduplicate != "near":
            raise ValueError("near_threshold acts with deduplicate: near only; leave it out")
        if len(self.views) == 1 and self.missing_views == "keep":
            raise ValueError("missing_views acts on records of several views; leave it out")
        return self

    def shard_settings(self) -> dict[str, Any]:
        """The settings that determine the shards: two equal values mean equal shards."""
        without_effect = dict.fromkeys(("path", "lm_views", "train_end_token", "workers"), True)
        return self.model_dump(mode="json", exclude=without_effect | {"sources": {"__all__": {"weight"}}})


TaskSource = Annotated[JsonSource | HubSource, Field(discriminator="type")]
"""Rows of an evaluation task."""


def task_source(data: DataConfig, given: str | JsonSource | HubSource) -> JsonSource | HubSource:
    """Return the rows of an evaluation task as a source. A path alone is read by the `views` of the first source that maps its columns."""
    if not isinstance(given, str):
        return given
    of_rows = (source for source in data.sources if not isinstance(source, NlrxSource | PythonSource | TextSource))
    views = next((source.views for source in of_rows if source.views is not None), None)
    return JsonSource(type="json", path=given, views=views)


class TaskFiles(BaseModel):
    """A task of the evaluation, as far as the preparation looks at it. Training checks its other keys (pretrain/tasks)."""

    name: str
    test: LocalPath | TaskSource | None = None

    @model_validator(mode="before")
    @classmethod
    def _no_misspelt_test(cls, values: Any) -> Any:
        for key in values if isinstance(values, dict) else ():
            if key not in cls.model_fields and difflib.get_close_matches(str(key), cls.model_fields, 1, 0.7):
                nearest = difflib.get_close_matches(str(key), cls.model_fields, 1)[0]
                raise ValueError(f"unknown key {key!r}; the nearest known one is {nearest!r}")
        return values


class EvaluationFiles(Section):
    """The `evaluation` section, as far as the preparation looks at it."""

    every: Any = 0
    device: Any = "cpu"
    tasks: list[TaskFiles] = []


class TaskTest(Section):
    """Rows of one evaluation task that training must not see."""

    task: str
    """Name of the task."""
    key: str
    """Dotted key of the rows, for messages."""
    source: TaskSource


def evaluation_tests(data: DataConfig, evaluation: Any) -> list[TaskTest]:
    """Return the test rows that the `evaluation` section of a configuration names. Raises UserError for a misspelt key."""
    tasks = validate(EvaluationFiles, evaluation, "evaluation").tasks if evaluation is not None else []
    tests = [
        TaskTest(task=task.name, key=f"evaluation.tasks.{number}.test", source=task_source(data, task.test))
        for number, task in enumerate(tasks)
        if task.test is not None
    ]
    different = {(test.task, test.source.model_dump_json()): test for test in reversed(tests)}
    return list(reversed(different.values()))
