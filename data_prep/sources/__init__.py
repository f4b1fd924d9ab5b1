"""Sources of records.

A source is divided into pieces that do not depend on the number of workers. A piece yields records in order. Each
record holds the text of its views, or the reason why it could not be read.
"""

import pkgutil

from data_prep.config import Source
from data_prep.sources.record import Reader

__all__ = ["Reader", "open_source"]


def open_source(source: Source, views: tuple[str, ...], name: str) -> Reader:
    """Open a source; `name` is its dotted key for messages. Raises UserError if it cannot be read."""
    reader: Reader = pkgutil.resolve_name(source.reader)(source, views, name)
    return reader
