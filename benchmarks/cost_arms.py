"""Arms that objective_cost.py times: methods to compute the language-model loss and the JEPA term.

An arm makes one or more forward passes over the same records. The packed arms are the project's methods. The padded
arms put one record in a row, as the public implementations of LLM-JEPA do (arXiv 2509.14252). They use the fastest
attention that is correct for them.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F

from data_prep.layout import FORWARD, Layout, Pairing, ReadOut, SpecialTokenIds, make_layout
from pretrain.data.batch import Batch
from pretrain.data.corpus import Corpus
from pretrain.data.loader import Rows, plan_rows
from pretrain.models.attention import visibility_mask
from pretrain.models.language_model import LanguageModel
from pretrain.objectives.base import ForwardPass, Objective, ObjectiveOutput
from pretrain.objectives.configs.regularizers import CodingRateConfig
from pretrain.objectives.llm_jepa import LlmJepa, cosine_distance
from pretrain.objectives.next_token import NextToken
from pretrain.objectives.regularized import Regularized
from pretrain.objectives.regularizers import build_regularizers

ARMS = (
    "next_token_packed",
    "joint_packed",
    "joint_dropout_0.75",
    "joint_active_0.25",
    "in_context_packed",
    "in_context_k0_packed",
    "regularized_packed",
    "nitp_packed",
    "nextlat_packed",
    "nextlat_kl_packed",
    "next_token_independent_packed",
    "independent_packed",
    "two_passes_additive_mask",
    "three_passes_longest",
    "three_passes_512",
)
BASELINE = ARMS[0]
PREDICTOR_TOKENS = 1
SEVERAL_PASSES = "several_passes"
OBJECTIVES = {
    "next_token": "{name: next_token}",
    "llm_jepa": f"{{name: llm_jepa, predictor_tokens: {PREDICTOR_TOKENS}, distance: cosine}}",
    SEVERAL_PASSES: f"{{name: llm_jepa, predictor_tokens: {PREDICTOR_TOKENS}, distance: cosine}}",
    "nitp": "{name: nitp}",
    "nextlat": "{name: nextlat}",
    "nextlat_kl": "{name: nextlat, kl_weight: 1.0}",
}
"""Objectives for which engines are built. The model of next_token has no predictor tokens.

The engine of SEVERAL_PASSES gathers each module separately, because DeepSpeed cannot reduce the gradients of a leaf
module that is called twice before a backward pass.
"""
CODING_RATE = CodingRateConfig(name="coding_rate", weight=0.5)
REFERENCE_LENGTH = 512
"""Length to which the public implementations pad every row, in positions."""
IGNORED = -100


class AllPositions(Objective):
    """Language-model loss that computes logits at every position and ignores positions without a label."""

    def __init__(self) -> None:
        super().__init__({})

    def forward(self, forward_pass: ForwardPass, *, with_pool: bool = False) -> ObjectiveOutput:
        """Return the sum of the cross-entropies."""
        batch, hidden = forward_pass.batch, forward_pass.hidden
        labels = torch.full((len(hidden),), IGNORED, device=hidden.device)
        labels[batch.label_index] = batch.label_ids
        assert isinstance(forward_pass.head, LanguageModel)
        logits = forward_pass.head.logits(hidden).float()
        return ObjectiveOutput({"lm": F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")}, None)


class Embeddings(Objective):
    """Embeddings that a pass computes, (P, D) each. `combine` turns them into the JEPA term."""

    def __init__(self, *names: Literal["prediction", "target"]):
        super().__init__({})
        self.names = names

    def forward(self, forward_pass: ForwardPass, *, with_pool: bool = False) -> ObjectiveOutput:
        """Return the embeddings of the named views."""
        batch, hidden = forward_pass.batch, forward_pass.hidden
        index = {"prediction": batch.prediction_index, "target": batch.target_index}
        return ObjectiveOutput({name: hidden[index[name][batch.pair_valid]].float() for name in self.names}, None)


def combine(terms: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the sums of the language-model loss and the JEPA term, whichever passes they come from."""
    if "prediction" not in terms:
        return terms
    return {"lm": terms["lm"], "jepa": cosine_distance(terms["prediction"], terms["target"]).sum()}


@dataclass(frozen=True)
class Pass:
    """One forward pass over the records of a step."""

    layout: Layout
    read: Objective | None
    """Objective that reads the losses or embeddings from the hidden states; None: the objective of the engine."""
    mask: Literal["visibility", "causal", "additive"] = "visibility"
    """Attention mask: the project's mask (`visibility`), the causal mask of the attention implementation (`causal`,
    enough for one encoding per row), or a dense mask in the model's type (`additive`)."""
    padded_to: int | Literal["longest"] | None = None
    """Length of a row that holds one record, in positions; None for packed rows."""

    def plan(
        self, corpus: Corpus, records: np.ndarray, row_length: int, paired: np.ndarray, random_bits: np.ndarray
    ) -> tuple[Rows, int]:
        """Return the rows of the records (N,), and the length of a row."""
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

    def prepare(self, batch: Batch, model: LanguageModel, packed_attention: str) -> Batch:
        """Set the model's attention for this pass; `packed_attention` is the implementation for packed rows."""
        attention = packed_attention if self.padded_to is None else "sdpa"
        if model.attention != attention:
            model.attention = attention
            model.causal_lm.set_attn_implementation(attention)
        model.mask = MASKS[self.mask].__get__(model)  # type: ignore[method-assign]  # each pass has its own mask
        if self.mask != "causal":
            return batch
        # transformers interprets positions that start again, such as the positions of padding, as packed documents.
        positions = torch.arange(batch.token_ids.shape[1], device=batch.token_ids.device)
        return replace(batch, positions=positions.expand_as(batch.token_ids))


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
    """One method to compute the language-model loss and the JEPA term."""

    passes: tuple[Pass, ...]
    dropout: float = 0.0
    """Fraction of the records that are trained without the JEPA term."""
    active: float = 1.0
    """Fraction of the records, the first ones, after which the JEPA term is switched off."""
    objective: str = ""
    """Name in OBJECTIVES of an objective with weights; empty for all others."""

    @property
    def engine(self) -> str:
        """Name in OBJECTIVES of the objective for which the arm's engine is built."""
        if len(self.passes) > 1:
            return SEVERAL_PASSES
        uses_predictor = any(forward_pass.layout.predictor_tokens for forward_pass in self.passes)
        return self.objective or ("llm_jepa" if uses_predictor else "next_token")


def make_arms(specials: SpecialTokenIds) -> dict[str, Arm]:
    """Return all arms by name."""
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
        Arm((Pass(joint, term),), active=0.25),
        Arm((Pass(make_layout("joint", specials, pairing=Pairing(PREDICTOR_TOKENS, in_context=True)), term),)),
        Arm((Pass(make_layout("joint", specials, pairing=Pairing(0, in_context=True)), term),)),
        Arm((Pass(make_layout("joint", specials, ends=True), Regularized(build_regularizers([CODING_RATE]))),)),
        *(Arm((Pass(text, None),), objective=name) for name in ("nitp", "nextlat", "nextlat_kl")),
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
    read_text: Objective,
    separate: tuple[Layout, Layout],
    padded_to: int | Literal["longest"],
) -> tuple[Pass, ...]:
    prediction, target = separate
    return (
        Pass(text, read_text, "causal", padded_to),
        Pass(prediction, Embeddings("prediction"), "causal", padded_to),
        Pass(target, Embeddings("target"), "causal", padded_to),
    )


def _part(layout: Layout, *selected: int) -> Layout:
    """Return a layout with the selected segments of a layout, without labels and with one pair.

    The prediction is read at the last predictor token, or at the last token if there are no predictor tokens. The
    target is read at the last token.
    """
    renumbered = {segment: number for number, segment in enumerate(selected)} | {None: None}
    segments = tuple(
        replace(layout.segments[segment], parent=renumbered[layout.segments[segment].parent], lm_start=None)
        for segment in selected
    )
    predictors = [number for number, segment in enumerate(segments) if segment.view is None]
    last = len(segments) - 1
    return Layout(
        segments,
        layout.predictor_tokens if predictors else 0,
        (ReadOut(predictors[-1] if predictors else last, last, FORWARD),),
    )
