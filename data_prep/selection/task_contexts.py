"""The contexts of the evaluation tasks' tests: the texts that training must not see."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_prep.config import BaseSource, DataConfig, HubSource, NlrxSource, PythonSource, TaskTest, TextSource
from data_prep.selection.contamination import OVERLAP_LETTERS, normalized_letters
from data_prep.sources.files import files_below, find_files, find_files_with_note
from data_prep.sources.json_lines import SUFFIXES
from data_prep.sources.views import make_mapping, template_columns
from data_prep.task_rows import RowReader
from data_prep.tasks import public_row_format
from data_prep.tasks.row_format import Columns, RowFormat
from data_prep.utils.console import UserError


def contexts_file(partial: Path) -> Path:
    """Return the file in which an unfinished preparation keeps the contexts, to read them only once."""
    return partial / "contexts.json"


def list_test_files(test: TaskTest) -> list[str]:
    """Return the files of a test: all files below a local folder of type hub, none for a hub data set."""
    if isinstance(test.source, HubSource):
        return files_below(test.source.path)
    return find_files(test.source, test.key, SUFFIXES)


def skipped_files_note(test: TaskTest) -> str:
    """Return a line that names the skipped files of a folder; empty if there are none."""
    return "" if isinstance(test.source, HubSource) else find_files_with_note(test.source, test.key, SUFFIXES)[1]


def describe_test(test: TaskTest) -> str:
    """Return the name of a test for messages."""
    source = test.source
    return (
        f"hub:{source.path}:{source.hub_split} ({test.task})"
        if isinstance(source, HubSource)
        else f"{source.path} ({test.task})"
    )


def read_contexts(data: DataConfig, test: TaskTest) -> list[str]:
    """Return the distinct contexts of a test, in the order of its rows.

    The contexts of a row are all of its views but the last, as the task scores them. Training data may contain the
    same question with a different prompt. Therefore these texts are contexts too:

    - the question column alone
    - the prompt of the public data set
    - the columns of a template
    - the context views that the mapping of each source makes of the row

    Raises UserError for a row that the task could not score.
    """
    row_format = public_row_format(test.task)
    reader = RowReader(test.source, data.views, test.key, row_format, allow_missing_views=data.missing_views == "keep")
    mappings = [
        make_mapping(source, data.views, "data.sources", {view: view for view in data.views}).records
        for source in _other_mappings(data, test)
    ]
    templates = [text for view, text in _view_columns(test.source).items() if view in context_names(data.views)]
    plain_columns = [column for template in templates for column in template_columns(template)]
    contexts: dict[str, None] = {}
    mapped_contexts: dict[str, None] = {}
    targets: set[str] = set()
    for row in reader.rows():
        columns = row.columns
        contexts |= dict.fromkeys([*_context_views(row.views), *_texts(columns, plain_columns)])
        targets.update(row.views[-1:] if len(row.views) > 1 else ())
        if row_format is not None:
            columns = _columns_of_prompt(row_format, row.context) | columns
            contexts |= dict.fromkeys(_public_contexts(row_format, columns))
        records = [record.views for mapping in mappings for record in mapping(columns, 0) if record.views is not None]
        mapped_contexts |= dict.fromkeys(view for views in records if any(views) for view in _context_views(views))
    # A pair may be trained in both directions, so a target can be a context view.
    contexts |= {view: None for view in mapped_contexts if view not in targets}
    if not contexts:
        raise UserError(
            f"{describe_test(test)} ({test.key}) has no rows: correct the path, or set data.decontaminate=false"
        )
    return list(contexts)


def count_short_contexts(contexts: Sequence[str]) -> int:
    """Return the number of contexts that are shorter than a stretch, and are therefore only compared as a whole."""
    return sum(len(normalized_letters(context)) < OVERLAP_LETTERS for context in contexts)


def context_names(views: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names of a test's context views: all but the last, or the only one."""
    return views[:-1] or views


def _context_views(views: Sequence[str]) -> list[str]:
    present = [view for view in views if view]
    return present[:-1] if views[-1] and len(views) > 1 else present


def _columns_of_prompt(row_format: RowFormat, context: str) -> Columns:
    """Return the columns from which a context in the prompt of the public data set was made."""
    match = row_format.prompt.fullmatch(context) if row_format.prompt is not None else None
    return match.groupdict() if match else {}


def _public_contexts(row_format: RowFormat, columns: Columns) -> Iterator[str]:
    """Yield the question alone and the prompt of the public data set, if the row has the columns for them."""
    yield from _texts(columns, [row_format.question])
    if row_format.columns <= columns.keys():
        # A row that is read with a mapping may not be in the public format.
        with contextlib.suppress(KeyError, IndexError, TypeError, ValueError):
            yield row_format.views(columns)[0]


def _texts(columns: Columns, names: list[str]) -> Iterator[str]:
    for name in names:
        text = columns.get(name)
        if isinstance(text, str) and len(text.split()) > 1:  # a single word is a name or a label, not a question
            yield text


def _view_columns(source: BaseSource) -> dict[str, str]:
    return source.views if isinstance(source.views, dict) else {}


def _other_mappings(data: DataConfig, test: TaskTest) -> list[BaseSource]:
    """Return one source for each mapping of the corpus, including the default, that the test does not use."""
    different: list[BaseSource] = []
    for source in [
        BaseSource(),
        *(source for source in data.sources if not isinstance(source, NlrxSource | PythonSource | TextSource)),
    ]:
        if source.views != test.source.views and all(source.views != other.views for other in different):
            different.append(source)
    return different
