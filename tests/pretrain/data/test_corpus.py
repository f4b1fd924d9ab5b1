"""The corpus: every token as it was written, and damage of any kind named before training."""

import re
import shutil

import numpy as np
import pytest

from data_prep.console import UserError
from data_prep.nlrx_grammar import generate
from data_prep.tokenizer import train
from pretrain.data.corpus import Corpus


@pytest.fixture
def copy(prepared, tmp_path):
    return shutil.copytree(prepared, tmp_path / "copy")


def shard_of(folder):
    return next(folder.glob("train-*.arrow"))


def assert_refused(folder, *names):
    with pytest.raises(UserError) as raised:
        Corpus(folder, "train")
    for name in names:
        assert re.search(re.escape(str(name)), str(raised.value)), raised.value
    assert "\n" not in str(raised.value)


def test_it_holds_the_views_of_every_record(corpus, tokenizer):
    texts = [generate(0, "train", index) for index in range(400)]
    assert len(corpus) == 400 and corpus.views == 2
    every = np.arange(400)
    for view in range(2):
        encoded = tokenizer.encode_batch([record[view] for record in texts])
        assert corpus.lengths(every)[:, view].tolist() == [len(tokens) for tokens in encoded]
        assert corpus.tokens(every, view).tolist() == [token for tokens in encoded for token in tokens]


def test_records_come_in_the_order_asked_for_whatever_their_shards(write_corpus):
    rng = np.random.default_rng(0)
    records = [(rng.integers(5, 512, rng.integers(1, 6)).tolist(), rng.integers(5, 512, rng.integers(1, 6)).tolist()) for _ in range(23)]
    corpus = write_corpus(records, shard_records=5)
    assert len(corpus.manifest["splits"]["train"]["shards"]) == 5
    for asked in (np.arange(23), np.arange(23)[::-1], rng.permutation(23)[:9], np.array([4, 5, 5, 22, 0, 4]), np.array([], np.int64)):
        assert corpus.lengths(asked).tolist() == [[len(view) for view in records[record]] for record in asked]
        for view in range(2):
            assert corpus.tokens(asked, view).tolist() == [token for record in asked for token in records[record][view]]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_a_flipped_bit_is_found(copy, share):
    shard = shard_of(copy)
    content = bytearray(shard.read_bytes())
    content[int(share * (len(content) - 1))] ^= 4
    shard.write_bytes(content)
    assert_refused(copy, shard, "damaged")


def test_a_truncated_shard_is_found(copy):
    shard = shard_of(copy)
    shard.write_bytes(shard.read_bytes()[:-1])
    assert_refused(copy, shard, "damaged")


def test_a_missing_shard_is_found(copy):
    shard = shard_of(copy)
    shard.unlink()
    assert_refused(copy, shard, "missing")


def test_the_tokenizer_of_another_run_is_found(copy):
    shutil.rmtree(copy / "tokenizer")
    train(["another text, and one more of them"] * 20, 300, copy / "tokenizer")
    assert_refused(copy, copy / "tokenizer", "prepare the corpus again")


def test_a_folder_without_a_corpus_and_an_absent_split_are_named(prepared, tmp_path):
    assert_refused(tmp_path, tmp_path, "prepare it first")
    with pytest.raises(UserError, match=r"no test split \(it has train, validation\)"):
        Corpus(prepared, "test")
