"""Corpora and small models for the tests of pretrain."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from data_prep.config import DataConfig
from data_prep.layout import SpecialTokenIds
from data_prep.pipeline import prepare
from data_prep.shards import FORMAT, MANIFEST, write_shard
from data_prep.tokenizer import Tokenizer
from data_prep.utils.files import write_json
from pretrain.data.corpus import Corpus
from pretrain.models.attention import resolve_attention
from pretrain.models.language_model import LanguageModel, build_model_config, random_causal_lm, special_ids
from tests.commands import ROOT

SHAPES = ROOT / "configs" / "models"


@pytest.fixture(scope="session")
def prepared(tmp_path_factory) -> Path:
    """Return the folder of a prepared corpus: 400 training and 40 validation records of the NL-RX grammar."""
    folder = tmp_path_factory.mktemp("prepared")
    prepare(
        DataConfig(
            path=str(folder),
            tokenizer={"vocab_size": 512},
            sequence_length=128,
            workers=1,
            deduplicate="none",
            sources=[
                {"type": "nlrx", "split": "train", "records": 400},
                {"type": "nlrx", "split": "validation", "records": 40},
            ],
        )
    )
    return folder


@pytest.fixture(scope="session")
def corpus(prepared) -> Corpus:
    return Corpus(prepared, "train")


@pytest.fixture(scope="session")
def tokenizer(prepared) -> Tokenizer:
    return Tokenizer.load(prepared / "tokenizer")


@pytest.fixture(scope="session")
def specials(tokenizer) -> SpecialTokenIds:
    return special_ids(tokenizer, 512)


def view_arrays(records: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Return the records of a view in the format of write_shard: all tokens in one array, and the record lengths."""
    tokens = [token for record in records for token in record]
    return np.array(tokens, np.int64), np.array([len(record) for record in records], np.int64)


def split_entry(shards: list[dict]) -> dict:
    """Return the manifest entry of a split that consists of these shards."""
    totals = {key: sum(shard[key] for shard in shards) for key in ("records", "incomplete", "continued")}
    views = shards[0]["longest"]
    return totals | {
        "longest": {view: max(shard["longest"][view] for shard in shards) for view in views},
        "tokens": {view: sum(shard["tokens"][view] for shard in shards) for view in views},
        "positions_needed": max(shard["positions_needed"] for shard in shards),
        "shards": shards,
    }


@pytest.fixture(scope="session")
def write_corpus(prepared, tokenizer, tmp_path_factory) -> Callable[..., Corpus]:
    """Return a function that writes records as a corpus in shards of `shard_records` records, and opens the corpus.

    A record is a tuple of token lists, one for each view. The list of a missing view is empty. `continues` marks the
    records whose document continues in the next record. `sources` lists (number of records, weight) for each source.
    """

    def write(
        records: list[tuple[list[int], ...]],
        shard_records: int = 10**9,
        continues: Sequence[bool] = (),
        sources: Sequence[tuple[int, float]] = (),
    ) -> Corpus:
        folder = tmp_path_factory.mktemp("corpus")
        shutil.copytree(prepared / "tokenizer", folder / "tokenizer")
        sources = sources or [(len(records), 1.0)]
        views = [f"view{number}" for number in range(len(records[0]))]
        shards, begin = [], 0
        for number, (count, _) in enumerate(sources):
            for first in range(begin, begin + count, shard_records):
                part = slice(first, min(first + shard_records, begin + count))
                columns = {
                    view: view_arrays([record[index] for record in records[part]]) for index, view in enumerate(views)
                }
                continued = np.array(continues or [False] * len(records))[part]
                shards.append(
                    write_shard(
                        folder / f"train-{len(shards):05d}.arrow", number, columns, continued, tokenizer.vocab_size
                    )
                )
            begin += count
        write_json(
            folder / MANIFEST,
            {
                "format": FORMAT,
                "views": views,
                "tokenizer": {"sha256": tokenizer.fingerprint},
                "sources": [{"weight": weight} for _, weight in sources],
                "settings": {"data": {}},
                "splits": {"train": split_entry(shards)},
            },
        )
        return Corpus(folder, "train")

    return write


@pytest.fixture(scope="session")
def make_model(tokenizer) -> Callable[..., LanguageModel]:
    """Return a function that builds a small model of a given family, with a given number of predictor tokens.

    The random weights are scaled up: with the usual tiny weights, attention would have no measurable effect.
    """

    def make(
        predictor_tokens: int,
        std: float = 0.2,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        family: str = "llama",
    ) -> LanguageModel:
        torch.manual_seed(seed)
        config = build_model_config(
            family, yaml.safe_load((SHAPES / f"{family}_tiny.yaml").read_text()), tokenizer, 256
        )
        attention = resolve_attention("auto", torch.device("cpu"), config)
        model = LanguageModel(random_causal_lm(config, attention, torch.float32), predictor_tokens, attention)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() > 1:
                    parameter.mul_(std / model.causal_lm.config.initializer_range)
                elif "q_norm" in name or "k_norm" in name:
                    parameter.fill_(2.0)  # larger projections do not change normalized queries and keys
        return model.to(dtype)

    return make
