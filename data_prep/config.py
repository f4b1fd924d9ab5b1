"""The `data` section of the configuration, and the part of `evaluation` that `data_prep` reads."""

import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, Field, field_validator, model_validator

from data_prep.utils.config_file import LocalPath, Section, similar_key, unknown_key, validate

Split = Literal["train", "validation", "test"]
MAX_VIEWS = 8
"""Maximum number of views of a record."""
COLUMNS_OF_SHARDS = CONTINUES, CHECKSUM = "continues", "checksum"
"""Columns of a shard in addition to its views."""


class BaseSource(Section):
    """Settings that all sources have in common."""

    reader: ClassVar[str]
    """Reader of this type of source, as MODULE:NAME: a function or class that takes the source, the names of the views,
    and the dotted key of the source for messages, and returns a `Reader` (data_prep/sources/record.py)."""
    split: Split = "train"
    """Split to which the records of this source belong."""
    weight: float = Field(default=1.0, gt=0)
    """Number of times that each record is used per epoch; only for split train. With 0.5, each record is used in every
    second epoch."""
    views: dict[str, str] | str | None = None
    """Mapping from each view to a column, to `messages.ROLE` (the only message of that role), or to a template over
    columns such as `{name}: {summary}`. A doubled brace stands for a literal brace. A view is absent if one of its
    columns is absent. Views of `data.views` without an entry are absent in all records of this source. Alternatively,
    the name of one column that holds a list of texts. Its texts become the views in order; a list with more texts than
    views becomes several records."""

    @field_validator("views", mode="before")
    @classmethod
    def _check_views(cls, views: Any) -> Any:
        texts = [*views, *views.values()] if isinstance(views, dict) else [] if views is None else [views]
        if not all(isinstance(text, str) and text for text in texts) or views == {}:
            raise ValueError("give a mapping of views to columns, or the name of a column of lists of texts")
        return views

    @model_validator(mode="after")
    def _check_weight(self) -> "BaseSource":
        if self.weight != 1 and self.split != "train":
            raise ValueError(f"weight has no effect with split: {self.split}, only with split train; remove it")
        return self


class FileSource(BaseSource):
    """A source of files."""

    path: LocalPath | None = None
    """A file, a folder, or a glob. A folder stands for all matching files below it, sorted by name, except hidden ones.
    The path may be omitted in the file and set on the command line."""


class NlrxSource(BaseSource):
    """Pairs drawn from the built-in NL-RX grammar. Columns: text and code, by default the first view and the last."""

    reader = "data_prep.sources.nlrx:Nlrx"
    type: Literal["nlrx"]
    records: int = Field(gt=0)
    """Number of generated records."""
    seed: int = 0
    """Seed of the generator; the same seed always produces the same records in each split."""


class JsonSource(FileSource):
    """JSON lines (.json, .jsonl, .ndjson; plain, .gz or .zst): one object per line.

    A .json file may be one array of objects instead. By default a view is the column of the same name. In a line with
    `messages`, the user's message is the first view and the assistant's message is the last.
    """

    reader = "data_prep.sources.json_lines:JsonLines"
    type: Literal["json"]


class ParquetSource(FileSource):
    """Parquet files (.parquet). Columns become views in the same way as for JSON lines."""

    reader = "data_prep.sources.parquet:Parquet"
    type: Literal["parquet"]


class CsvSource(FileSource):
    """CSV (.csv) and TSV (.tsv) files with a header line (plain, .gz or .zst).

    Columns become views in the same way as for JSON lines.
    """

    reader = "data_prep.sources.csv_rows:Csv"
    type: Literal["csv"]


class ArrowSource(FileSource):
    """Arrow files (.arrow), or a folder written by `datasets.Dataset.save_to_disk`.

    Columns become views in the same way as for JSON lines.
    """

    reader = "data_prep.sources.arrow:Arrow"
    type: Literal["arrow"]


class HubSource(BaseSource):
    """A data set that is streamed from the Hugging Face hub or read from a local folder.

    Columns become views in the same way as for JSON lines.
    """

    reader = "data_prep.sources.hub:open_hub"
    type: Literal["hub"]
    path: LocalPath
    """Name on the hub, such as `owner/name`, or a local folder in the layout of the hub or of `save_to_disk`."""
    config: str | None = None
    """Configuration of the data set, if it has several."""
    hub_split: str = "train"
    """Split of the data set to read."""
    revision: str | None = None
    """Branch, tag or commit. `data_prep` resolves it to a commit and records this commit in `manifest.json`."""


class TextSource(FileSource):
    """Plain-text documents (plain, .gz or .zst). Column: text, by default the last view."""

    reader = "data_prep.sources.text:Text"
    type: Literal["text"]
    separator: str | None = Field(default=None, max_length=1000)
    """Line that separates documents; an empty string means blank lines. By default each file is one document."""

    @field_validator("separator")
    @classmethod
    def _one_line(cls, separator: str | None) -> str | None:
        if separator is not None and (set("\r\n") & set(separator) or separator.isspace()):
            raise ValueError("a separator is the text of one line; use an empty string for blank lines")
        return separator


class PythonSource(FileSource):
    """Functions with docstrings from a tree of Python files (.py).

    Columns: docstring and code (the function without its docstring), by default the first view and the last; also name,
    signature and module. Each top-level package is entirely in either the training or the validation split.
    """

    reader = "data_prep.sources.python_code:PythonCode"
    type: Literal["python"]


Source = Annotated[
    NlrxSource | JsonSource | ParquetSource | CsvSource | ArrowSource | HubSource | TextSource | PythonSource,
    Field(discriminator="type"),
]


class TokenizerConfig(Section):
    """Tokenizer: either `vocab_size` (train sentencepiece on the corpus) or `path` (import an existing one)."""

    vocab_size: int | None = Field(default=None, gt=0)
    """Number of pieces, including special tokens and bytes."""
    model_type: Literal["bpe", "unigram"] | None = None
    """Model type of the trained tokenizer; default bpe."""
    path: LocalPath | None = None
    """A sentencepiece `.model`, a `tokenizer.json`, or a local Hugging Face folder."""

    @model_validator(mode="after")
    def _check_exclusive(self) -> "TokenizerConfig":
        if (self.vocab_size is None) == (self.path is None):
            raise ValueError("give exactly one of vocab_size (train a tokenizer) and path (import one)")
        if self.path is not None and self.model_type is not None:
            raise ValueError("model_type applies to a trained tokenizer and has no effect with path; remove it")
        return self


class FiltersConfig(Section):
    """Filters that drop records because of their text. A record with a NUL character in any view is always dropped."""

    min_characters: int = Field(default=0, ge=0)
    """Minimum length of a view, in characters; a record with a shorter view is dropped."""
    max_characters: int | None = Field(default=None, ge=1)
    """Maximum length of a view, in characters; a record with a longer view is dropped before tokenization."""
    forbidden: str | None = None
    """Regular expression (Python's `re`). A record is dropped if any part of a view matches. If one record takes more
    than 10 s of CPU time, `data_prep` stops and reports its location."""

    @model_validator(mode="after")
    def _check_lengths(self) -> "FiltersConfig":
        if self.max_characters is not None and self.max_characters < self.min_characters:
            raise ValueError(
                f"max_characters ({self.max_characters}) is below min_characters ({self.min_characters}): "
                "every record would be dropped; raise max_characters"
            )
        return self

    @field_validator("forbidden")
    @classmethod
    def _check_expression(cls, forbidden: str | None) -> str | None:
        try:
            re.compile(forbidden or "")
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"{forbidden!r} is not a valid regular expression: {error}") from None
        return forbidden


class DataConfig(Section):
    """The corpus: its sources, and the settings of its shards."""

    path: LocalPath
    """Folder of the prepared shards."""
    sources: list[Source] = []
    """Sources of the records; see below."""
    views: tuple[str, ...] = Field(default=("text", "code"), min_length=1)
    """Names of a record's views, at most 8. Two for pairs: the context (a question, a description) and the target (its
    answer). One for plain documents. Several for groups of paraphrases; each is the context of the next."""
    missing_views: Literal["drop", "keep"] = "drop"
    """Treatment of a record that lacks some of its views: it is dropped and counted (drop), or kept with the views that
    it has (keep). A kept record with one view is a plain document."""
    tokenizer: TokenizerConfig
    """Tokenizer, trained or imported; see below."""
    filters: FiltersConfig = FiltersConfig()
    """Filters that drop records because of their text; see below."""
    sequence_length: int = Field(default=512, ge=8)
    """Positions in a packed row. A record of several views that is too long for a row is dropped and counted. Its
    length is computed for the joint layout, `direction: forward` and 12 appended predictor tokens per context.
    Prepended predictor tokens and `direction: both` may need more positions; a run reports this at startup."""
    lm_views: Literal["all", "last"] = "all"
    """Views with next-token labels: all of them, or only the last (the answer)."""
    train_end_token: bool = True
    """Whether the end token of a text is a next-token target. Without it a model does not learn to stop. Published
    results of LLM-JEPA have this flaw; set this key to false only to compare with them."""
    validation_fraction: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Fraction of the training sources that is held out for validation. A hash of the target decides the split, so
    records with equal targets are in the same split. For a frequent target, such as a label, a hash of the context
    decides instead; `data_prep` reports this."""
    on_malformed: Literal["fail", "drop"] = "fail"
    """Treatment of a line that is not a valid record (not JSON, not UTF-8, a view that is not text), and of the rest of
    a corrupt file: they stop `data_prep` (fail), or are dropped and counted (drop)."""
    deduplicate: Literal["exact", "near", "none"] = "exact"
    """Removal of duplicates across all sources. exact: of records with identical views, only one is kept. near: of
    nearly identical records, only one is kept too (requires the extra `near-duplicates`). none: all records are kept. A
    record of a test or validation source takes precedence over a training record."""
    near_threshold: float | None = Field(default=None, gt=0, lt=1)
    """Minimum similarity of near-duplicates; default 0.8."""
    decontaminate: bool = True
    """Whether to drop training records that also occur in the test files of `evaluation.tasks`. A record is dropped
    if a context view equals a test context or if any view shares a long passage with one; test targets are ignored."""
    workers: int | None = Field(default=None, ge=1)
    """Number of preparation processes; default: one per core. Under mpirun or srun, each rank is one process."""

    @field_validator("views")
    @classmethod
    def check_view_names(cls, views: tuple[str, ...]) -> tuple[str, ...]:
        """Return the names of views. Raises ValueError if one of them is not valid."""
        for view in views:
            if not re.fullmatch(r"[^\W\d]\w*", view) or view in COLUMNS_OF_SHARDS:
                raise ValueError(
                    f"{view!r} cannot be the name of a view: use letters, digits and underscores, not starting with a "
                    f"digit; {' and '.join(COLUMNS_OF_SHARDS)} are reserved for columns of the shards"
                )
        return views

    @model_validator(mode="after")
    def _check_consistency(self) -> "DataConfig":
        if len(set(self.views)) < len(self.views):
            raise ValueError(f"views {list(self.views)} are not distinct; give each view a different name")
        if len(self.views) > MAX_VIEWS:
            raise ValueError(f"there are {len(self.views)} views; at most {MAX_VIEWS} are possible")
        if self.near_threshold is not None and self.deduplicate != "near":
            raise ValueError("near_threshold has no effect without deduplicate: near; remove it")
        if len(self.views) == 1 and self.missing_views == "keep":
            raise ValueError("missing_views has no effect on records of one view; remove it")
        return self

    def shard_settings(self) -> dict[str, Any]:
        """Return the settings that determine the shards: equal settings produce equal shards."""
        without_effect = dict.fromkeys(("path", "lm_views", "train_end_token", "workers"), True)
        return self.model_dump(mode="json", exclude=without_effect | {"sources": {"__all__": {"weight"}}})


TaskSource = Annotated[JsonSource | HubSource, Field(discriminator="type")]
"""Rows of an evaluation task."""


def task_source(data: DataConfig, rows: str | JsonSource | HubSource) -> JsonSource | HubSource:
    """Return the rows of an evaluation task as a source.

    A plain path is read with the `views` of the first source of `data.sources` that maps columns to views.
    """
    if not isinstance(rows, str):
        return rows
    row_sources = (source for source in data.sources if not isinstance(source, NlrxSource | PythonSource | TextSource))
    views = next((source.views for source in row_sources if source.views is not None), None)
    return JsonSource(type="json", path=rows, views=views)


class TaskFiles(BaseModel):
    """The keys of an evaluation task that `data_prep` reads. Training checks the other keys (pretrain/tasks)."""

    name: str
    test: LocalPath | TaskSource | None = None
    validation: LocalPath | TaskSource | None = None

    @model_validator(mode="before")
    @classmethod
    def _reject_misspelt_keys(cls, values: Any) -> Any:
        for key in values if isinstance(values, dict) else ():
            if key not in cls.model_fields and similar_key(str(key), cls.model_fields):
                raise ValueError(unknown_key(str(key), cls.model_fields))
        return values


class EvaluationFiles(Section):
    """The keys of the `evaluation` section that `data_prep` reads."""

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
    """Return the test and validation rows that the `evaluation` section of a configuration names.

    Raises UserError if a key is misspelt.
    """
    tasks = validate(EvaluationFiles, evaluation, "evaluation").tasks if evaluation is not None else []
    tests = [
        TaskTest(task=task.name, key=f"evaluation.tasks.{number}.{key}", source=task_source(data, source))
        for number, task in enumerate(tasks)
        for key, source in (("test", task.test), ("validation", task.validation))
        if source is not None
    ]
    distinct = {(test.task, test.source.model_dump_json()): test for test in reversed(tests)}
    return list(reversed(distinct.values()))
