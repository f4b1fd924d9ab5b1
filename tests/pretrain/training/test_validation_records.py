"""The choice of validation records."""

import torch

from data_prep.layout import SpecialTokenIds, make_layout
from pretrain.data.loader import count_targets
from pretrain.training.distributed import World
from pretrain.training.validation import Validation


def test_every_source_has_its_fraction_of_the_validation_records(write_corpus):
    short, long = [([5], [6])] * 300, [([5] * 4, [6] * 4)] * 100
    corpus = write_corpus(short + long, shard_records=100, sources=[(300, 1.0), (100, 1.0)])
    specials = SpecialTokenIds(0, 1, 2, 3, 512)

    def targets(records: int) -> int:
        layout, world = make_layout("joint", specials), World(0, 1, torch.device("cpu"))
        validation = Validation(corpus, {"embedding": layout}, specials, 64, records, 2, world)
        return validation.counts({"lm": count_targets})["lm"]

    assert targets(40) == 30 * (1 + 1 + 1 + 1) + 10 * (4 + 1 + 4 + 1)
    assert targets(400) == targets(1000) == 10 * targets(40)
    assert targets(3) == 2 * 4 + 10
