"""The contexts of the tests of evaluation tasks: the texts that training must not see."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_prep.config import BaseSource, DataConfig, HubSource, NlrxSource, PythonSource, TaskTest, TextSource
from data_prep.console import UserError
from data_prep.selection.contamination import OVERLAP_LETTERS, normalized_letters
from data_prep.sources.files import files_below, find_files, find_files_with_note
from data_prep.sources.json_lines import SUFFIXES
from data_prep.sources.views import make_mapping, template_columns
from data_prep.task_rows import RowReader
from data_prep.tasks import public_row_format
from data_prep.tasks.row_format import Columns, RowFormat


def contexts_file(partial: Path) -> Path:
    """Return where an unfinished preparation keeps the contexts, so that they are read once."""
    return partial / "contexts.json"


def list_test_files(test: TaskTest) -> list[str]:
    """Return the files of a test, all those below a local folder of type hub; none for a data set of the hub."""
    if isinstance(test.source, HubSource):
        return files_below(test.source.path)
    return find_files(test.source, test.key, SUFFIXES)


def skipped_files_note(test: TaskTest) -> str:
    """Return a line about files of a folder that are not read; empty if there are none."""
    return "" if isinstance(test.source, HubSource) else find_files_with_note(test.source, test.key, SUFFIXES)[1]


def describe_test(test: TaskTest) -> str:
    """Return what messages call a test."""
    source = test.source
    return (
        f"hub:{source.path}:{source.hub_split} ({test.task})"
        if isinstance(source, HubSource)
        else f"{source.path} ({test.task})"
    )


def read_contexts(data: DataConfig, test: TaskTest) -> list[str]:
    """Return the different contexts of a test, in the order of its rows. Raises UserError for a row that the task could not score.

    A row's contexts are all of its views but the last, as the task scores them. Training data may have the same question in another
    prompt, so these are contexts too: the column of the question alone, the prompt of the public data set, the columns of a template,
    and the context views that the mapping of each source makes of the row.
    """
    row_format = public_row_format(test.task)
    reader = RowReader(test.source, data.views, test.key, row_format, allow_missing_views=data.missing_views == "keep")
    mappings = [
        make_mapping(source, data.views, "data.sources", {view: view for view in data.views}).records
        for source in _other_forms(data, test)
    ]
    bare = [
        column
        for view, given in _mapped(test.source).items()
        if view in context_names(data.views)
        for column in template_columns(given)
    ]
    contexts: dict[str, None] = {}
    others: dict[str, None] = {}
    targets: set[str] = set()
    for row in reader.rows():
        columns = row.columns
        contexts |= dict.fromkeys([*_context_views(row.views), *_texts(columns, bare)])
        targets.update(row.views[-1:] if len(row.views) > 1 else ())
        if row_format is not None:
            columns = _columns_of_prompt(row_format, row.context) | columns
            contexts |= dict.fromkeys(_public_contexts(row_format, columns))
        records = [record.views for mapping in mappings for record in mapping(columns, 0) if record.views is not None]
        others |= dict.fromkeys(view for views in records if any(views) for view in _context_views(views))
    contexts |= {view: None for view in others if view not in targets}  # pairs may be trained in both directions
    if not contexts:
        raise UserError(
            f"{describe_test(test)} ({test.key}) has no rows; correct the path, or set data.decontaminate=false"
        )
    return list(contexts)


def count_short_contexts(contexts: Sequence[str]) -> int:
    """Return how many contexts are too short for a shared stretch, and so are recognised as a whole alone."""
    return sum(len(normalized_letters(context)) < OVERLAP_LETTERS for context in contexts)


def context_names(views: tuple[str, ...]) -> tuple[str, ...]:
    """Return the views that a test asks with: all but the last, or the only one."""
    return views[:-1] or views


def _context_views(views: Sequence[str]) -> list[str]:
    present = [view for view in views if view]
    return present[:-1] if views[-1] and len(views) > 1 else present


def _columns_of_prompt(row_format: RowFormat, context: str) -> Columns:
    """Return the columns that a context in the prompt of the public data set was made of."""
    found = row_format.prompt.fullmatch(context) if row_format.prompt is not None else None
    return found.groupdict() if found else {}


def _public_contexts(row_format: RowFormat, columns: Columns) -> Iterator[str]:
    """Yield the question alone, and the prompt of the public data set, of a row that has their columns."""
    yield from _texts(columns, [row_format.question])
    if row_format.columns <= columns.keys():
        with contextlib.suppress(KeyError, IndexError, TypeError, ValueError):  # a mapped row need not be of that form
            yield row_format.views(columns)[0]


def _texts(columns: Columns, names: list[str]) -> Iterator[str]:
    for name in names:
        text = columns.get(name)
        if isinstance(text, str) and len(text.split()) > 1:  # a single word is a name or a label, not a question
            yield text


def _mapped(source: BaseSource) -> dict[str, str]:
    return source.views if isinstance(source.views, dict) else {}


def _other_forms(data: DataConfig, test: TaskTest) -> list[BaseSource]:
    """Return sources of the mappings, the default one included, that rows of the corpus have and the test has not."""
    different: list[BaseSource] = []
    for source in [
        BaseSource(),
        *(source for source in data.sources if not isinstance(source, NlrxSource | PythonSource | TextSource)),
    ]:
        if source.views != test.source.views and all(source.views != other.views for other in different):
            different.append(source)
    return different
