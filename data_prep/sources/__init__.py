"""Sources of records.

A source is divided into pieces that do not depend on the number of workers. A piece yields records in order. Each
record holds the text of its views, or the reason why it could not be read.
"""

from collections.abc import Callable
from typing import Any

from data_prep.config import (
    ArrowSource,
    CsvSource,
    HubSource,
    JsonSource,
    NlrxSource,
    ParquetSource,
    PythonSource,
    Source,
    TextSource,
)
from data_prep.sources.arrow import Arrow
from data_prep.sources.csv_rows import Csv
from data_prep.sources.hub import open_hub
from data_prep.sources.json_lines import JsonLines
from data_prep.sources.nlrx import Nlrx
from data_prep.sources.parquet import Parquet
from data_prep.sources.python_code import PythonCode
from data_prep.sources.record import Reader
from data_prep.sources.text import Text

__all__ = ["Reader", "open_source"]

READERS: dict[type, Callable[[Any, tuple[str, ...], str], Reader]] = {
    ArrowSource: Arrow,
    CsvSource: Csv,
    HubSource: open_hub,
    JsonSource: JsonLines,
    NlrxSource: Nlrx,
    ParquetSource: Parquet,
    PythonSource: PythonCode,
    TextSource: Text,
}


def open_source(source: Source, views: tuple[str, ...], name: str) -> Reader:
    """Open a source; `name` is its dotted key for messages. Raises UserError if it cannot be read."""
    return READERS[type(source)](source, views, name)
