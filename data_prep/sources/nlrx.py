"""The embedded corpus: description/regex pairs generated from the NL-RX grammar."""

from collections.abc import Iterator

from data_prep.config import NlrxSource
from data_prep.nlrx_grammar import generate
from data_prep.sources.record import Record

UNIT_RECORDS = 4096


class Nlrx:
    """Records 0 to `records` of a split; index-addressable, so that any worker makes any of them."""

    def __init__(self, source: NlrxSource):
        self.source = source

    def units(self) -> list[tuple[int, int]]:
        total = self.source.records
        return [(start, min(start + UNIT_RECORDS, total)) for start in range(0, total, UNIT_RECORDS)]

    def read(self, start: int, stop: int) -> Iterator[Record]:
        for index in range(start, stop):
            yield Record(generate(self.source.seed, self.source.split, index), index - start)

    def where(self, start: int, position: int) -> str:
        return f"nlrx:{self.source.split}:{start + position}"
