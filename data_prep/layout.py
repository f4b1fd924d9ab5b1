r"""The layout of one record in the forward pass.

A layout is a tree of segments in depth-first order. A token sees its own segment up to itself, and all segments above
it in the tree. Several encodings of a record can therefore share one row and one forward pass without seeing each
other. Depth-first order reduces the rule to one number per token, `visible_until`: the position in the row at which the
subtree of its segment ends. Query q sees key p exactly if p <= q < visible_until[p].

    joint        [BOS context SEP] -- [target EOS]          independent   [BOS context EOS] -- [PRED x k]
                                   \- [PRED x k]                          [BOS target EOS]
                 [target EOS], alone

    in context   [BOS context SEP] -- [target EOS]
                                   \- [PRED x k]

The embedding of a view is the hidden state of its last token when the view is encoded separately. A prediction is the
hidden state of the last predictor token, which follows the view (LLM-JEPA, arXiv 2509.14252, section 3). If the
predictor tokens are prepended instead, it is the hidden state of the view's last token; for k = 0 it is the embedding
itself. With more than two views, each view predicts the next one. A target in context is not encoded separately: its
embedding is the hidden state at the end of the view in the text that the language model reads. Only the views that a
record has are numbered: a record that lacks its second view is a plain document.

Only this module knows about views, predictor tokens, directions and read-outs. The preparation needs it too, to compute
how long a record is in a packed row.
"""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

MAX_PREDICTOR_TOKENS = 12
"""Maximum number of predictor tokens per context."""


@dataclass(frozen=True)
class SpecialTokenIds:
    """Ids of the special tokens. Predictor token i has the id `predictor + i`, beyond the vocabulary."""

    pad: int
    bos: int
    eos: int
    sep: int
    predictor: int


@dataclass(frozen=True)
class Segment:
    """A run of tokens: `prefix`, a view (None: the predictor tokens), `suffix`."""

    view: int | None
    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()
    last_suffix: tuple[int, ...] | None = None
    """Replacement for `suffix`, of the same length, if the record has no further view; None: `suffix` is kept."""
    parent: int | None = None
    lm_start: int | None = None
    """Index of its first token that is a next-token target, predicted at the position before it; None: no targets."""
    lm_if_last: bool = False
    """Whether its tokens are targets only if the record has no further view."""
    lm_end: bool = True
    """Whether its last token is a target if it ends a text.

    It ends a text in an independent segment, or if the record has no further view.
    """
    needs: int = 0
    """View that a record must have to contain this segment."""
    pair_only: bool = False
    """Whether only records that are included in the pair loss contain this segment."""


FORWARD, BACKWARD = 0, 1


@dataclass(frozen=True)
class ReadOut:
    """A pair, given by the segments whose last tokens are the prediction and the target."""

    prediction: int
    target: int
    direction: int
    """FORWARD or BACKWARD; pairs of one direction have targets of the same kind."""


@dataclass(frozen=True)
class Pairing:
    """The direction of prediction between views, and the predictor tokens."""

    predictor_tokens: int = 0
    placement: Literal["append", "prepend"] = "append"
    direction: Literal["forward", "backward", "both"] = "forward"
    in_context: bool = False
    """Whether views are read out of the text of all views instead of being encoded separately. Only for the joint
    layout, with appended predictor tokens and the direction forward."""

    @property
    def prepended(self) -> bool:
        """Whether there are predictor tokens in front of the view."""
        return self.placement == "prepend" and self.predictor_tokens > 0

    def edges(self, views: int) -> list[tuple[int, int]]:
        """Return the (predicting, predicted) views."""
        forward = [(view, view + 1) for view in range(views - 1)]
        return forward * (self.direction != "backward") + [(after, before) for before, after in forward] * (
            self.direction != "forward"
        )


SpanSampling = Literal["three_points", "sub_span", "views"]


@dataclass(frozen=True)
class Layout:
    """Segments in depth-first order, the pairs that are read out, and the documents of the language-model stream."""

    segments: tuple[Segment, ...]
    predictor_tokens: int = 0
    read_outs: tuple[ReadOut, ...] = ()
    documents: tuple[tuple[int, ...], ...] = ()
    """Indices of the segments that make up each text; they are adjacent in the row too."""
    spans: SpanSampling | None = None
    """Sampling of spans from the documents (see pretrain/data/spans.py); None: no spans."""
    ends: bool = False
    """Whether the ends of the views in the documents are read out."""

    def segment_lengths(self, lengths: np.ndarray, paired: np.ndarray) -> np.ndarray:
        """Return the tokens of each segment: view lengths (N, views), pair flags (N,) -> (N, segments); 0 if absent."""
        columns = [self._lengths_of(segment, lengths, paired) for segment in self.segments]
        return np.stack(columns, axis=1).astype(np.int64)

    def positions(self, lengths: np.ndarray) -> np.ndarray:
        """Return the number of positions of each record, pair segments included: view lengths (N, views) -> (N,)."""
        paired = np.ones(len(lengths), bool)
        total = np.zeros(len(lengths), np.int64)
        for segment in self.segments:
            total += self._lengths_of(segment, lengths, paired)
        return total

    def _lengths_of(self, segment: Segment, lengths: np.ndarray, paired: np.ndarray) -> np.ndarray:
        """Return the tokens of one segment: view lengths (N, views), pair flags (N,) -> (N,); 0 if absent."""
        inner = self.predictor_tokens if segment.view is None else lengths[:, segment.view]
        present = (lengths[:, segment.needs] > 0) & (paired if segment.pair_only else True)
        segment_lengths: np.ndarray = (inner + len(segment.prefix) + len(segment.suffix)) * present
        return segment_lengths

    def separate_segment(self, view: int) -> Segment:
        """Return the segment that encodes a view separately: it sees no other segment."""
        return next(segment for segment in self.segments if segment.view == view and segment.parent is None)

    def count_segment_targets(self, segment: Segment, lengths: np.ndarray, segment_lengths: np.ndarray) -> np.ndarray:
        """Return the number of next-token targets that each record has in a segment.

        View lengths (N, views), lengths of this segment (N,) -> (N,). The targets are consecutive from `lm_start`.
        """
        if segment.lm_start is None:
            return np.zeros(len(lengths), np.int64)
        last = self.is_last(segment, lengths)
        ends = last | (segment.last_suffix is None)
        counts: np.ndarray = np.maximum(segment_lengths - segment.lm_start - (ends & (not segment.lm_end)), 0)
        if segment.lm_if_last:
            counts *= last
        return counts

    def is_last(self, segment: Segment, lengths: np.ndarray) -> np.ndarray:
        """Return the mask of the records without a view after the segment's view: view lengths (N, views) -> (N,)."""
        assert segment.view is not None
        after = segment.view + 1
        if after >= lengths.shape[1]:
            return np.ones(len(lengths), bool)
        absent: np.ndarray = lengths[:, after] == 0
        return absent

    def count_lm_targets(self, lengths: np.ndarray, segment_lengths: np.ndarray) -> np.ndarray:
        """Return the number of next-token targets of each record: (N, views), (N, segments) -> (N,)."""
        columns = [
            self.count_segment_targets(segment, lengths, segment_lengths[:, index])
            for index, segment in enumerate(self.segments)
        ]
        total: np.ndarray = np.stack(columns).sum(axis=0, dtype=np.int64)
        return total

    def pairs(self, segment_lengths: np.ndarray, paired: np.ndarray) -> np.ndarray:
        """Return the mask of each record's read-outs.

        Segment lengths (N, segments), pair flags (N,) -> (N, read-outs).
        """
        columns = [
            paired & (segment_lengths[:, pair.prediction] > 0) & (segment_lengths[:, pair.target] > 0)
            for pair in self.read_outs
        ]
        return np.stack(columns, axis=1) if columns else np.zeros((len(paired), 0), bool)

    def view_ends(self, segment_lengths: np.ndarray) -> np.ndarray:
        """Return the mask of the segments at whose ends a view of a document is read out: (N, segments) -> the same."""
        in_document = np.zeros(len(self.segments), bool)
        in_document[[index for document in self.documents for index in document]] = self.ends
        mask: np.ndarray = (segment_lengths > 0) & in_document
        return mask

    def document_lengths(self, segment_lengths: np.ndarray) -> np.ndarray:
        """Return the tokens of each document, 0 if absent: (N, segments) -> (N, documents)."""
        return np.stack([segment_lengths[:, list(document)].sum(axis=1) for document in self.documents], axis=1)

    def count_spans(self, segment_lengths: np.ndarray) -> np.ndarray:
        """Return the number of spans drawn from each record: (N, segments) -> (N,)."""
        if self.spans is None:
            return np.zeros(len(segment_lengths), np.int64)
        if self.spans == "views":
            of_second: np.ndarray = segment_lengths[:, self.documents[0][1]]
            return (of_second > 0).astype(np.int64)
        drawn: np.ndarray = (self.document_lengths(segment_lengths) > 2).sum(axis=1)
        return drawn


def make_layout(
    kind: str,
    specials: SpecialTokenIds,
    *,
    views: int = 2,
    pairing: Pairing | None = None,
    spans: SpanSampling | None = None,
    ends: bool = False,
    lm_views: str = "all",
    train_end_token: bool = True,
) -> Layout:
    """Return the `joint` layout (one text of all views) or the `independent` layout (one text per view).

    Without `pairing` the layout has only the language-model stream. With `lm_views="last"` only the last view of a
    record is labelled (the answer and its end token). Without `train_end_token` the end token of a text is not a
    target. Raises ValueError for an unknown layout.
    """
    bos, eos = (specials.bos,), (specials.eos,)
    edges = pairing.edges(views) if pairing else []
    pairing = pairing or Pairing()
    segments: list[Segment] = []
    documents: list[tuple[int, ...]] = []
    alone: dict[int, int] = {}  # view -> the segment that encodes it separately
    predicting: dict[int, int] = {}  # view -> the segment whose last token is the prediction
    if kind == "joint":
        segments += _joint_segments(specials, views, lm_views, train_end_token)
        documents.append(tuple(range(views)))
        alone[0] = 0
    elif kind != "independent":
        raise ValueError(f"unknown layout {kind!r}: choose joint or independent")
    if pairing.in_context:
        stream = Layout(tuple(segments), documents=tuple(documents), spans=spans, ends=ends)
        return _with_targets_in_context(stream, pairing)
    for view in range(views):
        copy = Segment(view, (), eos, needs=view, pair_only=True)
        partners = [target for source, target in edges if source == view]
        if kind == "independent":
            alone[view] = len(segments)
            documents.append((len(segments),))
            segments.append(
                Segment(view, bos, eos, lm_start=1, lm_if_last=lm_views == "last", lm_end=train_end_token, needs=view)
            )
        elif view and (any(target == view for _, target in edges) or (partners and not pairing.prepended)):
            alone[view] = len(segments)
            segments.append(copy)
        if partners:
            needs = min(max(view, partner) for partner in partners)
            like = segments[alone[view]] if view in alone else copy
            segments += _prediction(pairing, like, alone.get(view), needs, len(segments))
            predicting[view] = len(segments) - 1 if pairing.predictor_tokens else alone[view]
    read_outs = [
        ReadOut(predicting[source], alone[target], FORWARD if source < target else BACKWARD) for source, target in edges
    ]
    return Layout(tuple(segments), pairing.predictor_tokens, tuple(read_outs), tuple(documents), spans, ends)


def _joint_segments(specials: SpecialTokenIds, views: int, lm_views: str, train_end_token: bool) -> list[Segment]:
    """Return the segments of one text of all views; segment i is view i."""
    return [
        Segment(
            view,
            () if view else (specials.bos,),
            (specials.sep,),
            (specials.eos,),
            parent=view - 1 if view else None,
            lm_start=0 if view else 1,
            lm_if_last=lm_views == "last",
            lm_end=train_end_token,
            needs=view,
        )
        for view in range(views)
    ]


def _with_targets_in_context(stream: Layout, pairing: Pairing) -> Layout:
    """Add predictor tokens and read-outs to a joint layout without pairs; segment i of it is view i."""
    segments = list(stream.segments)
    read_outs = []
    for source, target in reversed(pairing.edges(len(segments))):  # depth-first: the last view's tokens come first
        segments += _prediction(pairing, segments[source], source, target, len(segments))
        read_outs.append(ReadOut(len(segments) - 1 if pairing.predictor_tokens else source, target, FORWARD))
    return replace(
        stream,
        segments=tuple(segments),
        predictor_tokens=pairing.predictor_tokens,
        read_outs=tuple(reversed(read_outs)),
    )


def _prediction(pairing: Pairing, view: Segment, place: int | None, needs: int, first: int) -> list[Segment]:
    """Return the segments that predict from a view.

    `view` is the segment that encodes the view, `place` its index. `first` is the index of the first returned segment.
    """
    if not pairing.predictor_tokens:
        return []
    if pairing.prepended:  # prepended to a copy: the language model must not see predictor tokens
        return [
            Segment(None, view.prefix, needs=needs, pair_only=True),
            Segment(view.view, (), view.suffix, parent=first, needs=needs, pair_only=True),
        ]
    return [Segment(None, parent=place, needs=needs, pair_only=True)]


def present_first(lengths: np.ndarray) -> np.ndarray:
    """Return the order of each record's columns in which columns with tokens are first: (N, views) -> (N, views)."""
    return np.argsort(lengths == 0, axis=1, stable=True)


def positions_needed(lengths: np.ndarray) -> np.ndarray:
    """Return the positions for which the preparation reserves room in a packed row: view lengths (N, views) -> (N,).

    These are the positions of the joint layout in which each view predicts the next one with the maximum number of
    appended predictor tokens. Any view of a record may be absent.
    """
    specials = SpecialTokenIds(*range(5))  # the positions do not depend on the ids
    layout = make_layout("joint", specials, views=lengths.shape[1], pairing=Pairing(MAX_PREDICTOR_TOKENS))
    return layout.positions(np.take_along_axis(lengths, present_first(lengths), axis=1))
