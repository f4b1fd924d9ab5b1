"""The corpus: tokens are read as they were written, and any damage is reported before training."""

import json
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pytest

from data_prep.make_tokenizer import train
from data_prep.nlrx_grammar import generate
from data_prep.shards import read_manifest
from data_prep.utils.console import UserError
from pretrain.data.corpus import Corpus, corpus_identity, source_weights, was_trained_on


@pytest.fixture
def corpus_copy(prepared, tmp_path):
    return shutil.copytree(prepared, tmp_path / "copy")


def first_train_shard(folder):
    return next(folder.glob("train-*.arrow"))


def assert_refused(folder, *fragments):
    with pytest.raises(UserError) as raised:
        read_all(folder)
    for fragment in fragments:
        assert re.search(re.escape(str(fragment)), str(raised.value)), raised.value
    assert "\n" not in str(raised.value)


def read_all(folder) -> list[list]:
    corpus = Corpus(folder, "train")
    all_records = np.arange(len(corpus))
    contents = corpus.read(all_records)
    return [
        corpus.lengths(all_records).tolist(),
        *(contents.view(view).tolist() for view in range(corpus.views)),
        contents.continuation_tokens.tolist(),
    ]


def test_the_corpus_holds_all_views_of_every_record(corpus, tokenizer):
    texts = [generate(0, "train", index) for index in range(400)]
    assert len(corpus) == 400 and corpus.views == 2
    all_records = np.arange(400)
    for view in range(2):
        encoded = tokenizer.encode_batch([record[view] for record in texts])
        assert corpus.lengths(all_records)[:, view].tolist() == [len(tokens) for tokens in encoded]
        assert corpus.tokens(all_records, view).tolist() == [token for tokens in encoded for token in tokens]


def test_records_are_read_in_the_requested_order_across_shards(write_corpus):
    rng = np.random.default_rng(0)
    records = [
        (rng.integers(5, 512, rng.integers(1, 6)).tolist(), rng.integers(5, 512, rng.integers(1, 6)).tolist())
        for _ in range(23)
    ]
    corpus = write_corpus(records, shard_records=5)
    assert len(corpus.manifest["splits"]["train"]["shards"]) == 5
    for requested in (
        np.arange(23),
        np.arange(23)[::-1],
        rng.permutation(23)[:9],
        np.array([4, 5, 5, 22, 0, 4]),
        np.array([], np.int64),
    ):
        assert corpus.lengths(requested).tolist() == [[len(view) for view in records[record]] for record in requested]
        for view in range(2):
            assert corpus.tokens(requested, view).tolist() == [
                token for record in requested for token in records[record][view]
            ]


MIXED = [
    ([11, 12, 13], [21, 22]),
    ([31, 32], []),
    ([33], []),
    ([], [41, 42]),
    ([51], [61, 62, 63]),
    *(([n, n + 1], [n + 2]) for n in range(5, 60)),
]
CONTINUES = [False, True, False, False, False, *[False] * 55]


def test_a_flipped_bit_never_changes_what_is_read(write_corpus):
    """Flip one bit in each byte of a shard: reads must be unaffected or fail in a line that names the shard."""
    corpus = write_corpus(MIXED, continues=CONTINUES)
    [shard] = corpus.folder.glob("train-*.arrow")
    undamaged, content = read_all(corpus.folder), shard.read_bytes()
    batch = pa.ipc.open_file(shard).get_batch(0)
    buffers = [buffer.to_pybytes() for column in batch.columns for buffer in column.buffers() if buffer is not None]
    refused = Counter()
    for offset in range(len(content)):
        shard.write_bytes(content[:offset] + bytes([content[offset] ^ 1 << offset % 8]) + content[offset + 1 :])
        try:
            assert read_all(corpus.folder) == undamaged, offset
        except UserError as error:
            assert str(shard) in str(error) and "\n" not in str(error)
            refused["counted from 0" in str(error)] += 1
    record_bytes = sum(len(buffer) for buffer in buffers) - 2 * 7 - 8  # without the unused bits after the last record
    assert refused[True] >= record_bytes and refused[False] > 50


@pytest.mark.parametrize("mutant", ["token", "length", "flag", "continuation", "order", "swapped views"])
def test_the_checksum_covers_every_part_of_a_record(write_corpus, mutant):
    """Change one part of a record without updating its checksum."""
    corpus = write_corpus(MIXED, continues=CONTINUES)
    [shard] = corpus.folder.glob("train-*.arrow")
    rows = pa.ipc.open_file(shard).read_all().to_pylist()
    match mutant:
        case "token":
            rows[0]["view1"] = [21, 23]
        case "length":
            rows[0]["view0"], rows[1]["view0"] = [11, 12], [13, 31, 32]
        case "flag":
            rows[4]["continues"] = True
        case "continuation":
            rows[2]["view0"], rows[2]["checksum"] = rows[5]["view0"][:1], 0
        case "order":
            rows[0]["view0"] = [12, 11, 13]
        case "swapped views":
            rows[3]["view0"], rows[3]["view1"] = rows[3]["view1"], None
    schema = pa.ipc.open_file(shard).schema
    with pa.ipc.new_file(str(shard), schema) as writer:
        writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=schema))
    manifest = json.loads((corpus.folder / "manifest.json").read_text())
    entry = manifest["splits"]["train"]["shards"][0]
    entry["bytes"] = shard.stat().st_size
    for view in ("view0", "view1"):
        entry["tokens"][view] = sum(len(row[view] or ()) for row in rows)
    (corpus.folder / "manifest.json").write_text(json.dumps(manifest))
    row = {"token": 0, "length": 0, "flag": 4, "continuation": 1, "order": 0, "swapped views": 3}[mutant]
    assert_refused(corpus.folder, shard, f"row {row}, counted from 0")


def test_a_continued_piece_ends_with_the_first_token_of_the_next_piece(write_corpus):
    pieces = [([], [7, 8]), ([], [9]), ([], [10, 11]), ([5], [6]), ([12], []), ([13], [])]
    corpus = write_corpus(pieces, continues=[True, True, False, False, True, False])
    assert corpus.read(np.arange(6)).continuation_tokens.tolist() == [9, 10, -1, -1, 13, -1]
    assert corpus.read(np.array([4, 1, 5, 0])).continuation_tokens.tolist() == [13, 10, -1, 9]
    assert [shard["continued"] for shard in corpus.entry["shards"]] == [3] and corpus.entry[
        "positions_needed"
    ] == 1 + 2 * 1 + 4 + 12


def test_the_last_record_of_a_shard_cannot_be_continued(write_corpus):
    with pytest.raises(ValueError, match="cannot continue"):
        write_corpus([([7], []), ([8], [])], shard_records=1, continues=[True, False])


def test_the_number_of_mapped_shards_is_limited(write_corpus, monkeypatch):
    monkeypatch.setattr("pretrain.data.corpus.OPEN_SHARDS", 3)
    corpus = write_corpus([([number], [number + 1]) for number in range(5, 45)], shard_records=1)

    def mapped_shards() -> int:
        return len(
            {
                line.split()[-1]
                for line in Path("/proc/self/maps").read_text().splitlines()
                if str(corpus.folder) in line
            }
        )

    assert mapped_shards() == 0, "opening a corpus must not map a shard"
    for first in range(0, 40, 5):
        assert corpus.tokens(np.arange(first, first + 5), 0).tolist() == list(range(first + 5, first + 10))
        assert mapped_shards() <= 3
    assert mapped_shards() == 3


def test_sources_are_contiguous_ranges_of_records(write_corpus):
    corpus = write_corpus([([5], [6])] * 20, shard_records=3, sources=[(7, 1.0), (1, 0.5), (12, 2.0)])
    assert corpus.sources == [(0, 0, 7), (1, 7, 1), (2, 8, 12)] and source_weights(corpus.manifest) == [1.0, 0.5, 2.0]


def test_a_truncated_shard_is_reported(corpus_copy):
    shard = first_train_shard(corpus_copy)
    shard.write_bytes(shard.read_bytes()[:-1])
    assert_refused(corpus_copy, shard, "corrupt")


def test_a_missing_shard_is_reported(corpus_copy):
    shard = first_train_shard(corpus_copy)
    shard.unlink()
    assert_refused(corpus_copy, shard, "missing")


def test_the_tokenizer_of_a_different_corpus_is_reported(corpus_copy):
    shutil.rmtree(corpus_copy / "tokenizer")
    train(["another text, and one more of them"] * 20, 300, corpus_copy / "tokenizer")
    assert_refused(corpus_copy, corpus_copy / "tokenizer", "prepare the corpus again")


def test_a_missing_corpus_and_a_missing_split_are_reported(prepared, tmp_path):
    assert_refused(tmp_path, tmp_path, "prepare it first")
    with pytest.raises(UserError, match=r"no test split \(its splits: train, validation\)"):
        Corpus(prepared, "test")


def test_examples_of_unknown_tokens_do_not_change_the_corpus_identity(prepared):
    manifest = read_manifest(prepared)
    changed = json.loads(json.dumps(manifest))
    for entry in changed["splits"].values():
        entry["unknown"] = {"tokens": 3, "records": 1, "first": ["elsewhere.jsonl:1: x"]}
    assert corpus_identity(changed) == corpus_identity(manifest)
    for entry in changed["splits"].values():
        del entry["unknown"]  # as in manifests of earlier versions
    assert corpus_identity(changed) == corpus_identity(manifest)
    changed["splits"]["train"]["shards"][0]["sha256"] = "0" * 64
    assert corpus_identity(changed) != corpus_identity(manifest)


def test_a_corpus_with_a_different_tokenizer_is_not_the_corpus_of_the_run(prepared, tmp_path):
    manifest = read_manifest(prepared)
    assert was_trained_on(tmp_path, manifest), "the run recorded no corpus"
    for part, other in (("tokenizer", {"sha256": "0"}), ("corpus", {})):
        for recorded, same in ((corpus_identity(manifest), True), (corpus_identity(manifest) | {part: other}, False)):
            (tmp_path / "environment.json").write_text(json.dumps({"data": recorded}))
            assert was_trained_on(tmp_path, manifest) == same
