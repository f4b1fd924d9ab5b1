"""A packed row drawn as text: segments, labels, visibility and read-outs, all read from the assembled batch."""

import bisect
import itertools
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_prep.layout import Layout, Pairing, SpecialTokenIds, make_layout
from data_prep.tools.show import display_width, padded, printable, shortened
from pretrain.data.batch import Batch, assemble
from pretrain.data.corpus import Corpus
from pretrain.data.loader import Rows, plan_rows

WINDOW = 4096
"""Records that are packed together for the picture."""
DRAWN_POSITIONS, DRAWN_SEGMENTS = 128, 16
"""Largest number of positions and of segments that are drawn. Of a longer row, only the first records are drawn."""
OWN, ALL, NOTHING, PARTLY = "◣", "■", "·", "?"
MARGIN = 10
"""Width of the left margin of a strip or a matrix, in columns."""


@dataclass(frozen=True)
class _Segment:
    """The positions [start, stop) of a row that hold one segment of a record."""

    number: int
    """Index of the segment in the row, from 0."""
    record: int
    name: str
    """Name of the view, or `pred`."""
    start: int
    stop: int


def draw_row(corpus: Corpus, record: int, kind: str, predictor_tokens: int, row_length: int, width: int) -> str:
    """Return a drawing of the row that contains `record`, packed together with the records after it.

    Only the first records of a long row are drawn; the checks that no token sees another record cover the whole row.
    Lines have at most `width` columns (at least 80). `kind` is joint or independent. Raises ValueError if the record
    does not fit a row of `row_length`.
    """
    tokenizer = corpus.tokenizer
    specials = SpecialTokenIds(
        tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.sep_id, tokenizer.vocab_size
    )
    pairing = Pairing(predictor_tokens) if corpus.views > 1 else None
    layout = make_layout(kind, specials, views=corpus.views, pairing=pairing)
    rows = _row_of(corpus, record, layout, row_length)
    batch = assemble(
        rows, corpus, layout, specials, row_length, int(layout.pairs(rows.segment_lengths, rows.paired).sum())
    )
    segments = _segments(corpus, layout, rows)
    used = segments[-1].stop
    head = (
        f"A row of {row_length:,} positions, {kind} layout"
        + (f", k = {predictor_tokens}" if pairing else "")
        + f": {len(rows.records)} records, {len(segments)} segments, {used:,} tokens, "
        f"{row_length - used:,} padding ({1 - used / row_length:.1%})"
    )
    drawn = _first_records(segments)
    if len(drawn) < len(segments) or used > DRAWN_POSITIONS:
        head += (
            f". Drawn below: the segments 0 to {len(drawn) - 1} and at most {DRAWN_POSITIONS} positions; "
            "a smaller --row-length draws a complete row"
        )
    return "\n\n".join(
        [
            textwrap.fill(head, width),
            *_strips(batch, segments, used, min(drawn[-1].stop, DRAWN_POSITIONS), width),
            "\n".join(_table(corpus, batch, drawn, width)),
            "\n".join(_matrix(batch, segments, len(drawn), width)),
            "\n".join(_read_outs(corpus, batch, drawn)),
        ]
    )


def _row_of(corpus: Corpus, record: int, layout: Layout, row_length: int) -> Rows:
    """Return the row of `record`, packed by best fit with the WINDOW - 1 records after it.

    Raises ValueError if the record does not fit.
    """
    records = np.arange(record, min(record + WINDOW, len(corpus)))
    needed = layout.positions(corpus.lengths(records))
    if needed[0] > row_length:
        raise ValueError(
            f"record {record} needs {needed[0]:,} positions in this layout, but the row has {row_length:,}"
        )
    records = records[needed <= row_length]
    paired = np.full(len(records), bool(layout.read_outs))
    rows = plan_rows(corpus, records, layout, row_length, paired, np.zeros(len(records), np.uint64))
    row = int(rows.row[rows.records == record][0])
    return rows.select(row, row + 1)


def _segments(corpus: Corpus, layout: Layout, rows: Rows) -> list[_Segment]:
    segments: list[_Segment] = []
    for record, first, lengths in zip(
        rows.records.tolist(), rows.start.tolist(), rows.segment_lengths.tolist(), strict=True
    ):
        views = [view for view, ids in corpus.tokens_by_view(record).items() if len(ids)]
        stops = first + np.cumsum(lengths)
        for segment, length, stop in zip(layout.segments, lengths, stops.tolist(), strict=True):
            if length:
                name = "pred" if segment.view is None else views[segment.view]
                segments.append(_Segment(len(segments), record, name, stop - length, stop))
    return segments


def _first_records(segments: list[_Segment]) -> list[_Segment]:
    """Return the segments of the first records that fit the largest drawing, and at least one record."""
    too_far = [segment for segment in segments if segment.stop > DRAWN_POSITIONS or segment.number >= DRAWN_SEGMENTS]
    skipped = {segment.record for segment in too_far} - {segments[0].record}
    return [segment for segment in segments if segment.record not in skipped]


def _strips(batch: Batch, segments: list[_Segment], used: int, stop: int, width: int) -> list[str]:
    """Return the row up to position `stop` from left to right, one column per position.

    It is cut into strips of a multiple of ten columns. If `stop` is the end of the records, padding follows.
    """
    length = batch.token_ids.shape[1]
    shown = length if length <= used + 10 else used + 10  # more padding would look the same
    valid = batch.pair_valid
    lines = {
        "place": _numbers(np.arange(shown)),
        "segment": [" "] * shown,
        "position": _numbers(batch.positions[0, :shown].numpy(), segments),
        "label": [" "] * shown,
        "read-out": [" "] * shown,
    }
    for segment in segments:
        lines["segment"][segment.start : segment.stop] = _box(
            f"{segment.number} {segment.name}", segment.stop - segment.start
        )
    lines["segment"][used:] = "░" * (shown - used)
    lines["position"][used:] = " " * (shown - used)
    for index, label in zip(batch.label_index.tolist(), batch.label_ids.tolist(), strict=True):
        lines["label"][index + 1] = "•" if label == batch.token_ids[0, index + 1] else PARTLY
    for index in batch.prediction_index[valid].tolist():
        lines["read-out"][index] = "P"
    for index in batch.target_index[valid].tolist():
        lines["read-out"][index] = "T" if lines["read-out"][index] == " " else "B"
    step = (width - MARGIN) // 10 * 10
    end = shown if stop == used else stop
    strips = [
        "\n".join(
            f"{name:<{MARGIN}}{''.join(line[first : min(first + step, end)])}".rstrip() for name, line in lines.items()
        )
        for first in range(0, end, step)
    ]
    return [
        *strips,
        textwrap.fill(
            "place: index in the row; position: the position id that the model gets; • next-token target; "
            "read out as P prediction, T target, B both; ░ padding",
            width,
        ),
    ]


def _box(label: str, length: int) -> list[str]:
    """Return the label in a bracket of `length` columns; a label that does not fit is shortened or dropped."""
    if length == 1:
        return ["◆"]
    room = length - 2
    text = next((short for short in (label, label.split()[0]) if len(short) <= room), "")
    return list("├" + text.ljust(room, "─") + "┤")


def _numbers(values: np.ndarray, segments: Sequence[_Segment] = ()) -> list[str]:
    """Return one character per value: a dot, or part of a number.

    Multiples of ten and the first value of each segment are written in full if there is room.
    """
    out = ["·"] * len(values)
    starts = {segment.start: segment.stop for segment in segments}
    free, stop = 0, len(values)
    for index, value in enumerate(values.tolist()):
        stop = starts.get(index, stop)
        if (value % 10 == 0 and index >= free) or index in starts:
            text = str(value)
            if index + len(text) <= stop:
                out[index : index + len(text)] = text
                free = index + len(text) + 1
            elif index in starts:
                out[index] = "…"
    return out


def _table(corpus: Corpus, batch: Batch, segments: list[_Segment], width: int) -> list[str]:
    """Return a table with one line per segment."""
    names = max(4, *(display_width(segment.name) for segment in segments))
    places = max(8, 2 * len(str(batch.token_ids.shape[1])) + 1)
    head = (
        f"{'#':>4} {'record':>8}  {padded('view', names)} {'place':>{places}} {'position':>{places}} "
        f"{'tokens':>6} {'labels':>6}  "
    )
    lines = [head + "content"]
    record_before = None
    for segment in segments:
        part = slice(segment.start, segment.stop)
        positions = batch.positions[0, part].tolist()
        consecutive = positions == list(range(positions[0], positions[0] + len(positions)))
        labels = int(((batch.label_index + 1 >= segment.start) & (batch.label_index + 1 < segment.stop)).sum())
        record = segment.record if segment.record != record_before else ""
        position_range = f"{positions[0]}–{positions[-1]}" if consecutive else PARTLY
        line = (
            f"{segment.number:>4} {record:>8}  {padded(segment.name, names)} "
            f"{f'{segment.start}–{segment.stop - 1}':>{places}} {position_range:>{places}} "
            f"{len(positions):>6} {labels or '–':>6}  "
        )
        lines.append(line + shortened(_content(corpus, batch.token_ids[0, part].tolist()), width - len(head)))
        record_before = segment.record
    return lines


def _content(corpus: Corpus, ids: list[int]) -> str:
    """Return the text of a segment, with special and predictor tokens shown by name."""
    tokenizer, parts = corpus.tokenizer, []
    for special, run in itertools.groupby(
        ids, lambda token: token if token in tokenizer.special_ids or token >= tokenizer.vocab_size else -1
    ):
        if special == -1:
            parts.append(printable(tokenizer.decode(run)))
        else:
            parts += [
                tokenizer.piece(token) if token < tokenizer.vocab_size else f"<pred {token - tokenizer.vocab_size}>"
                for token in run
            ]
    return " ".join(parts)


def _matrix(batch: Batch, segments: list[_Segment], drawn: int, width: int) -> list[str]:
    """Return a matrix that shows which of the first `drawn` segments sees which.

    Records are shown side by side as far as the width allows. A last line summarises the visibility between records.
    """
    starts, stops = np.array([(segment.start, segment.stop) for segment in segments]).T
    counts = _visible_pairs(batch.visible_until[0].numpy(), starts, stops)
    record = np.array([segment.record for segment in segments])
    across_records = int(counts[record[:, None] != record].sum())
    causal_pairs = (stops - starts) * (stops - starts + 1) // 2
    cell = len(str(len(segments) - 1)) + 1
    room = max(1, (width - MARGIN) // cell)
    lines = [
        textwrap.fill(
            f"visibility (rows are queries, columns are keys): {ALL} all of it; {OWN} itself, up to the query token; "
            f"{NOTHING} nothing; {PARTLY} part of it",
            width,
        )
    ]
    for group in _groups(record[:drawn], room):
        lines.append(" " * MARGIN + "".join(f"{number:>{cell}}" for number in group))
        for query in group:
            signs = [
                _sign(
                    counts[query, key],
                    causal_pairs[query] if query == key else (stops - starts)[[query, key]].prod(),
                    query == key,
                )
                for key in group
            ]
            lines.append(f"{query:>{MARGIN - 1}} " + "".join(f"{sign:>{cell}}" for sign in signs))
    lines.append(
        "between records: "
        + (
            f"{across_records} TOKEN PAIRS ARE VISIBLE ACROSS RECORDS"
            if across_records
            else "no token sees a token of another record"
        )
    )
    return lines


def _visible_pairs(visible_until: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
    """Count the (query, key) tokens with p <= q < visible_until[p] for each two segments.

    (L,), (S,), (S,) -> (S, S), indexed by query segment and key segment.
    """
    keys = np.arange(len(visible_until))
    # for each query segment (S, 1) and key (1, L): the segment's tokens from the key up to the end of its visibility
    seen = np.minimum(stops[:, None], visible_until) - np.maximum(starts[:, None], keys)
    return np.stack(
        [np.maximum(0, seen[:, start:stop]).sum(axis=1) for start, stop in zip(starts, stops, strict=True)], axis=1
    )


def _sign(count: int, possible: int, is_own: bool) -> str:
    if not count:
        return NOTHING
    if count != possible:
        return PARTLY
    return OWN if is_own else ALL


def _groups(record: np.ndarray, room: int) -> list[range]:
    """Return groups of the segments of consecutive records, with at most `room` segments each.

    A record with more segments is its own group.
    """
    bounds = [*np.flatnonzero(np.diff(record, prepend=-1)).tolist(), len(record)]
    groups, first = [], 0
    for stop, after in zip(bounds[1:], [*bounds[2:], None], strict=True):
        if after is None or after - first > room:
            groups.append(range(first, stop))
            first = stop
    return groups


def _read_outs(corpus: Corpus, batch: Batch, segments: list[_Segment]) -> list[str]:
    """Return one line per pair, with the positions from which it is read."""
    valid = batch.pair_valid
    pairs = zip(
        batch.prediction_index[valid].tolist(),
        batch.target_index[valid].tolist(),
        batch.pair_record[valid].tolist(),
        strict=True,
    )
    records = {segment.record for segment in segments}
    starts = [segment.start for segment in segments]

    def describe(index: int) -> str:
        segment = segments[bisect.bisect_right(starts, index) - 1]
        token = _content(corpus, [int(batch.token_ids[0, index])])
        return (
            f"{token} at {index} (end of {segment.number} {segment.name})"
            if index == segment.stop - 1
            else f"{token} at {index} ({PARTLY})"
        )

    lines = [
        f"  record {record}: {describe(prediction)}  ──▶  {describe(target)}"
        for prediction, target, record in pairs
        if record in records
    ]
    return (
        ["read-outs: prediction ──▶ target", *lines]
        if lines
        else ["read-outs: none, because the records are single documents"]
    )
