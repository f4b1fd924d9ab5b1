"""The ways to compute the language-model loss and the term on pairs that objective_cost.py times against each other.

A way is one or several forward passes over the same records. The packed ones are the project's own; the padded ones put one record in a
row, as the public implementations of LLM-JEPA do (arXiv 2509.14252), and are given the fastest attention that is right for them.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch

from pretrain.data.batch import Batch
from pretrain.data.corpus import Corpus
from pretrain.data.layout import FORWARD, Layout, Pairing, ReadOut, SpecialTokenIds, make_layout
from pretrain.data.loader import Rows, plan_rows
from pretrain.models.attention import visibility_mask
from pretrain.models.language_model import LanguageModel
from pretrain.objectives.base import CrossEntropy, ObjectiveOutput
from pretrain.objectives.llm_jepa import LlmJepa, cosine_distance
from pretrain.objectives.next_token import NextToken
from pretrain.objectives.pool import Gather

ARMS = (
    "next_token_packed",
    "joint_packed",
    "joint_dropout_0.75",
    "next_token_independent_packed",
    "independent_packed",
    "two_passes_additive_mask",
    "three_passes_longest",
    "three_passes_512",
)
BASELINE = ARMS[0]
PREDICTOR_TOKENS = 1
REFERENCE_LENGTH = 512
"""What the public implementations pad every row to."""
IGNORED = -100


class AllPositions:
    """The language-model loss with logits of every position, those without a label ignored in the cross-entropy."""

    def __call__(
        self,
        hidden: torch.Tensor,
        batch: Batch,
        cross_entropy: CrossEntropy,
        gather: Gather,
        *,
        with_pool: bool = False,
    ) -> ObjectiveOutput:
        """Return the sum of the cross-entropies."""
        labels = torch.full((len(hidden),), IGNORED, device=hidden.device)
        labels[batch.label_index] = batch.label_ids
        return ObjectiveOutput({"lm": cross_entropy(hidden, labels)}, None)


class Embeddings:
    """The embeddings that a pass is made for, (P, D) each, as terms that `combine` makes one of."""

    def __init__(self, *names: Literal["prediction", "target"]):
        self.names = names

    def __call__(
        self,
        hidden: torch.Tensor,
        batch: Batch,
        cross_entropy: CrossEntropy,
        gather: Gather,
        *,
        with_pool: bool = False,
    ) -> ObjectiveOutput:
        """Return the embeddings of the named views."""
        index = {"prediction": batch.prediction_index, "target": batch.target_index}
        return ObjectiveOutput({name: hidden[index[name][batch.pair_valid]].float() for name in self.names}, None)


def combine(terms: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The sums of both terms, whichever passes they come from."""
    if "prediction" not in terms:
        return terms
    return {"lm": terms["lm"], "jepa": cosine_distance(terms["prediction"], terms["target"]).sum()}


@dataclass(frozen=True)
class Pass:
    """One forward pass over the records of a step."""

    layout: Layout
    read: Callable[..., ObjectiveOutput]
    """What is taken from the hidden states."""
    mask: Literal["visibility", "causal", "additive"] = "visibility"
    """visibility: the project's. causal: none but the kernel's own, enough for one encoding a row. additive: dense, in the model's type."""
    padded_to: int | Literal["longest"] | None = None
    """Positions of a row of one record; None: packed rows."""

    def plan(
        self, corpus: Corpus, records: np.ndarray, row_length: int, paired: np.ndarray, random_bits: np.ndarray
    ) -> tuple[Rows, int]:
        """The rows of the records (N,), and their length."""
        if self.padded_to is None:
            return plan_rows(corpus, records, self.layout, row_length, paired, random_bits), row_length
        lengths = corpus.lengths(records)
        segment_lengths = self.layout.segment_lengths(lengths, paired)
        longest = int(segment_lengths.sum(axis=1).max())
        count = len(records)
        rows = Rows(
            count, records, np.arange(count), np.zeros(count, np.int64), paired, random_bits, lengths, segment_lengths
        )
        return rows, longest if self.padded_to == "longest" else self.padded_to

    def prepare(self, batch: Batch, model: LanguageModel, kernel: str) -> Batch:
        """Set the model's attention for this pass; `kernel` is the project's choice for packed rows."""
        attention = kernel if self.padded_to is None else "sdpa"
        if model.attention != attention:
            model.attention = attention
            model.causal_lm.set_attn_implementation(attention)
        model.mask = MASKS[self.mask].__get__(model)  # type: ignore[method-assign]  # a way of its own for each pass
        if (
            self.mask == "causal"
        ):  # transformers takes positions that start again, as those of padding, for packed documents
            return replace(
                batch,
                positions=torch.arange(batch.token_ids.shape[1], device=batch.token_ids.device).expand_as(
                    batch.token_ids
                ),
            )
        return batch


def _no_mask(model: LanguageModel, batch: Batch) -> None:
    return None


def _additive_mask(model: LanguageModel, batch: Batch) -> torch.Tensor:
    dtype = model.causal_lm.dtype
    visible = visibility_mask(batch.visible_until, "sdpa")
    assert isinstance(visible, torch.Tensor)
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, torch.finfo(dtype).min)


MASKS: dict[str, Any] = {"visibility": LanguageModel.mask, "causal": _no_mask, "additive": _additive_mask}


@dataclass(frozen=True)
class Arm:
    """One way."""

    passes: tuple[Pass, ...]
    dropout: float = 0.0
    """Share of the records that sit the term on pairs out."""

    @property
    def predictor_tokens(self) -> int:
        """Predictor tokens that the model needs."""
        return max(one.layout.predictor_tokens for one in self.passes)


def make_arms(specials: SpecialTokenIds) -> dict[str, Arm]:
    """All ways, by name."""
    pairing = Pairing(PREDICTOR_TOKENS)
    text = make_layout("joint", specials)
    joint = make_layout("joint", specials, pairing=pairing)
    context, _, predictor, target = range(4)  # the segments of `joint`
    term = LlmJepa(1.0, "cosine")
    separate = _part(joint, context, predictor), _part(joint, target)
    arms = (
        Arm((Pass(text, NextToken()),)),
        Arm((Pass(joint, term),)),
        Arm((Pass(joint, term),), dropout=0.75),
        Arm((Pass(make_layout("independent", specials), NextToken()),)),
        Arm((Pass(make_layout("independent", specials, pairing=pairing), term),)),
        Arm(
            (
                Pass(text, NextToken(), "causal", "longest"),
                Pass(
                    _part(joint, context, predictor, target), Embeddings("prediction", "target"), "additive", "longest"
                ),
            )
        ),
        Arm(_three_passes(text, NextToken(), separate, "longest")),
        Arm(_three_passes(text, AllPositions(), separate, REFERENCE_LENGTH)),
    )
    return dict(zip(ARMS, arms, strict=True))


def _three_passes(
    text: Layout,
    read_text: Callable[..., ObjectiveOutput],
    separate: tuple[Layout, Layout],
    padded_to: int | Literal["longest"],
) -> tuple[Pass, ...]:
    prediction, target = separate
    return (
        Pass(text, read_text, "causal", padded_to),
        Pass(prediction, Embeddings("prediction"), "causal", padded_to),
        Pass(target, Embeddings("target"), "causal", padded_to),
    )


def _part(layout: Layout, *kept: int) -> Layout:
    """Some segments of a layout without labels; a pair of the last predictor token, or else the last token, and the last token."""
    renumbered = {segment: number for number, segment in enumerate(kept)} | {None: None}
    segments = tuple(
        replace(layout.segments[segment], parent=renumbered[layout.segments[segment].parent], lm_start=None)
        for segment in kept
    )
    predictors = [number for number, segment in enumerate(segments) if segment.view is None]
    last = len(segments) - 1
    return Layout(
        segments,
        layout.predictor_tokens if predictors else 0,
        (ReadOut(predictors[-1] if predictors else last, last, FORWARD),),
    )
