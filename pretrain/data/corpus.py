"""A split of a prepared corpus, memory-mapped and addressed by record number."""

from pathlib import Path

import numpy as np

from data_prep.console import UserError
from data_prep.shards import open_shard, read_manifest
from data_prep.tokenizer import Tokenizer
from pretrain.data.ragged import ranges


class Corpus:
    """The records 0 to `len(corpus)` of one split, in the order of the shards.

    The views of a record are counted among those that it has: view 1 is its second, whichever of `data.views` that is.

    Opening verifies every shard's size and checksum and that the tokenizer is the one they were made with;
    a UserError names what does not fit.
    """

    def __init__(self, folder: str | Path, split: str):
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        if split not in self.manifest["splits"]:
            raise UserError(f"the corpus {folder} has no {split} split (it has {', '.join(self.manifest['splits'])}); "
                            f"add a source with split: {split}" + (" or set data.validation_fraction" if split == "validation" else ""))
        entry = self.manifest["splits"][split]
        self.tokenizer = Tokenizer.load(self.folder / "tokenizer")
        if self.tokenizer.fingerprint != self.manifest["tokenizer"]["sha256"]:
            raise UserError(f"{self.folder / 'tokenizer'} is not the tokenizer that the shards were made with; "
                            f"remove the folder {folder} and prepare the corpus again")
        self.longest = np.array([[entry["longest"][view] for view in self.manifest["views"]]])
        """Bounds on the tokens of each view, (1, views)."""
        self._complete = entry["incomplete"] == 0
        self._shards = [open_shard(self.folder, shard, self.manifest["views"]) for shard in entry["shards"]]
        self._first = np.cumsum([0] + [shard["records"] for shard in entry["shards"]])

    def __len__(self) -> int:
        return int(self._first[-1])

    @property
    def views(self) -> int:
        """Number of views of a record."""
        return len(self.manifest["views"])

    def lengths(self, records: np.ndarray) -> np.ndarray:
        """Tokens of each view: record numbers (N,) -> (N, views); 0 behind the last that a record has."""
        lengths = self._column_lengths(records)
        return lengths if self._complete else np.take_along_axis(lengths, _present_first(lengths), axis=1)

    def tokens(self, records: np.ndarray, view: int) -> np.ndarray:
        """The tokens of one view of the records (N,), which all have it, concatenated in their order."""
        lengths = self._column_lengths(records)
        columns = np.full(len(records), view) if self._complete else _present_first(lengths)[:, view]
        lengths = lengths[np.arange(len(records)), columns]
        out = np.empty(lengths.sum(), np.int64)
        starts = np.cumsum(lengths) - lengths
        for members, local, shard in self._by_shard(records):
            for column in np.unique(columns[members]):
                of_column = columns[members] == column
                mine, begin = members[of_column], shard[column].offsets[local[of_column]]
                out[ranges(starts[mine], lengths[mine])] = shard[column].values[ranges(begin, lengths[mine])]
        return out

    def _column_lengths(self, records: np.ndarray) -> np.ndarray:
        out = np.empty((len(records), self.views), np.int64)
        for members, local, shard in self._by_shard(records):
            for view, column in enumerate(shard):
                out[members, view] = column.offsets[local + 1] - column.offsets[local]
        return out

    def _by_shard(self, records: np.ndarray):
        """Yield, per shard that holds any of them: indices into `records`, their rows in the shard, the shard."""
        shard_of = np.searchsorted(self._first, records, side="right") - 1
        for shard in np.unique(shard_of):
            members = np.flatnonzero(shard_of == shard)
            yield members, records[members] - self._first[shard], self._shards[shard]


def _present_first(lengths: np.ndarray) -> np.ndarray:
    """The columns of each record, those that hold tokens first: (N, views) -> (N, views)."""
    return np.argsort(lengths == 0, axis=1, kind="stable")
