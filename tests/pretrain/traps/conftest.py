"""Fixtures that prepare corpora inside the test process and pack their records into one batch.

The tests patch the preparation with mutants that reintroduce a trap. A patch has no effect in a subprocess.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import tokenizers

from data_prep.config import DataConfig
from data_prep.layout import Layout, Pairing, SpecialTokenIds, make_layout
from data_prep.pipeline import prepare
from pretrain.data import batch as batches
from pretrain.data.batch import Batch
from pretrain.data.corpus import Corpus
from pretrain.data.loader import Rows
from tests.row_plans import plan

ROW = 128


@pytest.fixture
def prepare_in_process(tmp_path_factory) -> Callable[..., Corpus]:
    """Return a function that prepares a corpus of (context, target) texts.

    It trains a tokenizer or loads the one in the folder `tokenizer`. With one worker, this process does all the work.
    """

    def prepare_corpus(
        records: list[tuple[str, str]], sequence_length: int = ROW, tokenizer: Path | None = None
    ) -> Corpus:
        folder = tmp_path_factory.mktemp("prepared-here")
        lines = folder / "pairs.jsonl"
        lines.write_text("".join(json.dumps({"text": text, "code": code}) + "\n" for text, code in records))
        prepare(
            DataConfig(
                path=str(folder / "corpus"),
                sources=[{"type": "json", "path": str(lines)}],
                sequence_length=sequence_length,
                workers=1,
                tokenizer={"path": str(tokenizer)} if tokenizer else {"vocab_size": 320},
            )
        )
        return Corpus(folder / "corpus", "train")

    return prepare_corpus


@pytest.fixture
def shared_special_token_tokenizer(tmp_path) -> Path:
    """Write a Hugging Face tokenizer whose only special token is BOS, EOS and padding, and return its folder.

    Like the tokenizers of many models, it puts BOS in front of every text.
    """
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE({character: number for number, character in enumerate(alphabet)}, [])
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    special = "<|endoftext|>"
    tokenizer.add_special_tokens([special])
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{special} $A", special_tokens=[(special, tokenizer.token_to_id(special))]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(dict.fromkeys(("bos_token", "eos_token", "pad_token"), special))
    )
    return tmp_path


class Packed(NamedTuple):
    rows: Rows
    batch: Batch
    layout: Layout


@pytest.fixture(scope="session")
def pack() -> Callable[..., Packed]:
    """Return a function that packs all records of a corpus, then `empty_rows`, into the micro batch of one rank."""

    def pack(
        corpus: Corpus,
        specials: SpecialTokenIds,
        layout_name: str = "joint",
        pairing: Pairing | None = None,
        *,
        lm_views: str = "all",
        empty_rows: int = 0,
    ) -> Packed:
        layout = make_layout(layout_name, specials, pairing=pairing, lm_views=lm_views)
        rows = plan(corpus, np.arange(len(corpus)), layout, ROW, np.full(len(corpus), pairing is not None))
        rows = Rows.join([rows], rows.count + empty_rows)
        [batch] = batches.micro_batches(
            rows, corpus, layout, specials, ROW, micro_batch_rows=rows.count, rank=0, ranks=1
        )
        return Packed(rows, batch, layout)

    return pack
