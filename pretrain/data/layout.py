"""What one record looks like inside the forward pass.

A layout is a tree of segments in depth-first order. A token sees its own segment up to itself, and all of the
segments above it: so several encodings of a record share one row and one forward pass without seeing each other.
Depth-first order makes this one number per token, `visible_until`: the position in the row where the subtree of its
segment ends. Query q sees key p exactly if p <= q < visible_until[p].

    joint        [BOS context SEP] -- [target EOS]          independent   [BOS context EOS] -- [PRED x k]
                                   \\- [PRED x k]                          [BOS target EOS]
                 [target EOS], alone

The embedding of the context is read at the last predictor token (k = 0: at the end of the context segment), the
embedding of the target at the end token of the target encoded on its own (LLM-JEPA, arXiv 2509.14252, section 3).
All knowledge of views, predictor tokens and read-outs lives here.
"""

from dataclasses import dataclass

import numpy as np

CONTEXT, TARGET = 0, 1


@dataclass(frozen=True)
class Specials:
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
    parent: int | None = None
    lm_from: int | None = None
    """The first of its tokens that is a next-token target, predicted at the position before it; None: no token is."""
    pair_only: bool = False
    """Present only in records that take part in the pair loss."""


@dataclass(frozen=True)
class Layout:
    """Segments in depth-first order, and the two whose last tokens are read out (None: no pair loss)."""

    segments: tuple[Segment, ...]
    predictor_tokens: int = 0
    read_outs: tuple[int, int] | None = None

    def segment_lengths(self, lengths: np.ndarray, paired: np.ndarray) -> np.ndarray:
        """Tokens of every segment: view lengths (N, views), pair flags (N,) -> (N, segments); 0 where absent."""
        columns = []
        for segment in self.segments:
            inner = self.predictor_tokens if segment.view is None else lengths[:, segment.view]
            column = np.broadcast_to(inner + len(segment.prefix) + len(segment.suffix), len(lengths))
            columns.append(column * paired if segment.pair_only else column)
        return np.stack(columns, axis=1).astype(np.int64)

    def lm_targets(self, segment_lengths: np.ndarray) -> np.ndarray:
        """Next-token targets of each record: (N, segments) -> (N,)."""
        return sum((segment_lengths[:, index] - segment.lm_from for index, segment in enumerate(self.segments)
                    if segment.lm_from is not None), np.zeros(len(segment_lengths), np.int64))


def make_layout(kind: str, specials: Specials, *, pairs: bool, predictor_tokens: int = 0, lm_views: str = "all") -> Layout:
    """The `joint` or `independent` layout.

    `pairs=False` leaves out everything but the language-model stream. `lm_views="last"` labels the target view only
    (the answer and its end token).
    """
    bos, eos, sep = (specials.bos,), (specials.eos,), (specials.sep,)
    context_from = 1 if lm_views == "all" else None
    predictor = [Segment(None, parent=0, pair_only=True)] if pairs and predictor_tokens else []
    if kind == "joint":
        segments = [Segment(CONTEXT, bos, sep, lm_from=context_from), Segment(TARGET, (), eos, parent=0, lm_from=0), *predictor]
        if pairs:
            segments.append(Segment(TARGET, (), eos, pair_only=True))
    elif kind == "independent":
        segments = [Segment(CONTEXT, bos, eos, lm_from=context_from), *predictor, Segment(TARGET, bos, eos, lm_from=1)]
    else:
        raise ValueError(f"unknown layout {kind!r}: joint or independent")
    prediction = segments.index(predictor[0]) if predictor else 0
    return Layout(tuple(segments), predictor_tokens if pairs else 0, (prediction, len(segments) - 1) if pairs else None)
