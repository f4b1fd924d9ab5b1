"""geometry: how the embeddings of the two views relate; measured by pretrain/evaluation/model_tasks/geometry.py."""

from typing import Literal

from pretrain.tasks.options import PairTask


class Config(PairTask):
    """Measure how the embeddings of the views relate."""

    name: Literal["geometry"]
