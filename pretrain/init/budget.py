"""The choice of row length, model, budget, batch and learning rate for a corpus and a machine."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from data_prep.inspection.look import FEWEST_RECORDS, Inspection
from data_prep.layout import Layout, Pairing, SpecialTokenIds, make_layout, positions_needed
from data_prep.utils.console import UserError, duration
from pretrain.planning.flops import Parameters
from pretrain.planning.plan import Stream, count_stream
from pretrain.planning.speed import Machine, measure_flops

TOKENS_PER_PARAMETER = 20
"""Tokens per parameter of compute-optimal training (Hoffmann et al., arXiv 2203.15556, table 3)."""
MOST_EPOCHS = 16
"""Epochs beyond which repeated data are worth little (Muennighoff et al., arXiv 2305.16264)."""
LONGEST = {"cpu": 3600.0, "cuda": 86400.0}
"""Longest training of a first configuration, in seconds."""
SIZES = (
    *((144, 4, 6), (192, 4, 6), (256, 6, 8), (384, 8, 6), (512, 8, 8)),
    *((768, 12, 12), (1024, 16, 16), (1536, 20, 24), (2048, 24, 32)),
)
"""Width, layers and heads of the model shapes; the first two are llama_1m and llama_2m of configs/models."""
SHORTEST_ROW, LONGEST_ROW = 256, {"cpu": 2048, "cuda": 8192}
DOCUMENT_ROW = {"cpu": 512, "cuda": 2048}
"""Row length for plain documents, which are cut at the ends of rows."""
FITTING = 0.99
"""Fraction of the records that must fit into a row."""
FEWEST_STEPS = 200
"""Number of steps below which the batch is made smaller."""
FILLED = 0.97
"""Assumed fraction of the positions of a row that packing fills."""
MICRO_POSITIONS = {"cpu": 4096, "cuda": 32_768}
"""Largest number of positions in a forward pass on one rank."""
KNOWN_WIDTH, KNOWN_RATE, RATE_EXPONENT = 144, 2.0e-3, 0.7
"""The learning rate of llama_1m in this project's studies, and the exponent with which it falls with the width. The
exponent leads to 3e-4 for the width of Llama 1B, as in configs/llama_1b_pairs.yaml."""


@dataclass(frozen=True)
class Budget:
    """The part of a configuration that depends on the sizes of the corpus and the machine."""

    row_length: int
    dropped: float
    """Fraction of the records that do not fit into a row."""
    shape: dict[str, Any]
    parameters: int
    epochs: float
    """Number of epochs; below 1 if the time does not suffice for one."""
    records: int
    """Number of different records that fit into a row."""
    tokens: int
    """Corpus tokens of the training, of the records that fit into a row."""
    rows: int
    """Rows of a global batch."""
    micro_rows: int
    steps: int
    learning_rate: float
    seconds: float
    is_limited_by_time: bool
    is_smallest: bool
    """Whether the model is the smallest one although the corpus is too small for it by the rule."""
    positions: float
    """Positions of the training, without padding."""


def model_shape(width: int, layers: int, heads: int) -> dict[str, Any]:
    """Return the shape of a Llama, whose feed-forward network has 8/3 of the width, as in Llama's papers."""
    return {
        "hidden_size": width,
        "intermediate_size": -(-width * 8 // 3 // 64) * 64,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "tie_word_embeddings": True,
    }


def count_shape(shape: dict[str, Any], vocabulary: int) -> Parameters:
    """Return the parameter counts of a Llama with tied embeddings and one predictor token."""
    width, layers = shape["hidden_size"], shape["num_hidden_layers"]
    one_layer = 4 * width * width + 3 * width * shape["intermediate_size"] + 2 * width
    table = -(-vocabulary // 64) * 64 * width
    return Parameters(layers * one_layer + width, table, table, True, width)


def choose_budget(inspection: Inspection, machine: Machine) -> Budget:
    """Return the model and the budget: the largest model that sees enough tokens within the limits.

    The limits are the number of epochs and the time. The smallest model is chosen if there is not enough data for any.
    Raises UserError if hardly any record fits into a row.
    """
    length, dropped = choose_row_length(inspection, machine)
    _check_fitting(inspection, length, dropped, machine)
    typical = SIZES[0] if machine.device == "cpu" else SIZES[5]
    speed = measure_flops(machine, model_shape(*typical), inspection.vocabulary, length)
    epoch, epoch_tokens = epoch_stream(inspection, length), count_tokens(inspection, length)
    most_flops = speed * LONGEST[machine.device]
    fitting = [size for size in SIZES if _fits(size, inspection.vocabulary, epoch, epoch_tokens, most_flops)]
    size = fitting[-1] if fitting else SIZES[0]
    shape = model_shape(*size)
    if size != typical:
        speed = measure_flops(machine, shape, inspection.vocabulary, length)
    possible = speed * LONGEST[machine.device] / epoch_flops(shape, inspection.vocabulary, epoch)
    epochs = min(float(MOST_EPOCHS), possible)
    epochs = float(int(epochs)) if epochs >= 1 else epochs
    flops = epochs * epoch_flops(shape, inspection.vocabulary, epoch)
    positions = epochs * epoch.positions
    rows, micro_rows = choose_batch(flops, positions, length, machine)
    return Budget(
        row_length=length,
        dropped=dropped,
        shape=shape,
        parameters=count_shape(shape, inspection.vocabulary).total,
        epochs=epochs,
        records=round(inspection.total * (1 - dropped)),
        tokens=round(epochs * epoch_tokens),
        rows=rows,
        micro_rows=micro_rows,
        steps=max(1, round(positions / (rows * length * FILLED))),
        learning_rate=float(f"{KNOWN_RATE * (KNOWN_WIDTH / size[0]) ** RATE_EXPONENT:.1e}"),
        seconds=flops / speed,
        is_limited_by_time=possible < MOST_EPOCHS,
        is_smallest=not fitting,
        positions=positions,
    )


def choose_row_length(inspection: Inspection, machine: Machine) -> tuple[int, float]:
    """Return the smallest power of two into which nearly all records fit, and the fraction that does not fit."""
    if inspection.is_text:
        return DOCUMENT_ROW[machine.device], 0.0
    needed = positions_needed(inspection.lengths)
    length = SHORTEST_ROW
    while (needed <= length).mean() < FITTING and length < LONGEST_ROW[machine.device]:
        length *= 2
    return length, float((needed > length).mean())


def _check_fitting(inspection: Inspection, length: int, dropped: float, machine: Machine) -> None:
    """Raise UserError if fewer records fit into a row than a model needs."""
    records = len(inspection.records)
    fitting = round(records * (1 - dropped))
    if fitting >= FEWEST_RECORDS or not dropped:
        return
    shortest = int(positions_needed(inspection.lengths).min())
    count = f"only {fitting:,} of {records:,} records fit" if fitting else f"none of {records:,} records fits"
    gpu = f", or run this command with a GPU (up to {LONGEST_ROW['cuda']:,} tokens)" if machine.device == "cpu" else ""
    raise UserError(
        f"{inspection.where}: {count} into a row of {length:,} tokens, the longest that is chosen here; the shortest "
        f"record needs {shortest:,}: divide the texts into shorter ones{gpu}"
    )


def _fitting_lengths(inspection: Inspection, length: int) -> np.ndarray:
    """Return the measured lengths of the records that training uses, (N, views): all documents, which are cut."""
    lengths = inspection.lengths
    return lengths if inspection.is_text else lengths[positions_needed(lengths) <= length]


def count_tokens(inspection: Inspection, length: int) -> float:
    """Return the number of corpus tokens of an epoch."""
    return float(_fitting_lengths(inspection, length).sum() / len(inspection.lengths) * inspection.total)


def epoch_stream(inspection: Inspection, length: int) -> Stream:
    """Return the counts of an epoch in the layout of the written configuration."""
    views = len(inspection.choice.views)
    layout: Layout = make_layout(
        "joint", SpecialTokenIds(*range(5)), views=views, pairing=Pairing(1) if views > 1 else None
    )
    lengths, scale = _fitting_lengths(inspection, length), 1.0
    if inspection.is_text:  # long documents are cut
        lengths = np.minimum(lengths, length - 2)
        scale = float(inspection.lengths.sum() / lengths.sum())
    segments = layout.segment_lengths(lengths, np.ones(len(lengths), bool))
    records = inspection.total * len(lengths) / len(inspection.lengths)
    per_record = scale * records / max(1, len(lengths))
    return Stream(**{name: count * per_record for name, count in count_stream(layout, lengths, segments).items()})


def epoch_flops(shape: dict[str, Any], vocabulary: int, epoch: Stream) -> float:
    """Return the FLOPs of an epoch, as the plan of a run counts them."""
    attention = 12 * epoch.visible * shape["num_hidden_layers"] * shape["hidden_size"]
    return float(sum(count_shape(shape, vocabulary).flops(epoch.positions, epoch.targets)) + attention)


def _fits(size: tuple[int, int, int], vocabulary: int, epoch: Stream, epoch_tokens: float, flops: float) -> bool:
    """Return whether a model of this size can see enough tokens within the epochs and FLOPs."""
    shape = model_shape(*size)
    epochs = min(float(MOST_EPOCHS), flops / epoch_flops(shape, vocabulary, epoch))
    return epochs * epoch_tokens >= TOKENS_PER_PARAMETER * count_shape(shape, vocabulary).total


def choose_batch(flops: float, positions: float, length: int, machine: Machine) -> tuple[int, int]:
    """Return the rows of a global batch and of a micro batch.

    A batch has 0.292 C^0.3271 positions for C FLOPs (DeepSeek LLM, arXiv 2401.02954, section 3.1), but there are at
    least FEWEST_STEPS steps if a row per rank suffices for it.
    """
    wanted = min(0.292 * flops**0.3271, positions / FEWEST_STEPS)
    per_rank = max(1, round(wanted / length / machine.processes))
    most = max(1, MICRO_POSITIONS[machine.device] // length)
    micro_steps = -(-per_rank // most)
    micro_rows = -(-per_rank // micro_steps)
    return micro_rows * micro_steps * machine.processes, micro_rows


def rounded(steps: float) -> int:
    """Return a number of steps rounded down to 1, 2 or 5 times a power of ten."""
    power: int = 10 ** (len(str(max(1, int(steps)))) - 1)
    return next(factor * power for factor in (5, 2, 1) if factor * power <= max(1, steps))


def time_text(seconds: float) -> str:
    """Return a predicted time in words."""
    return f"about {duration(max(1, seconds))}"
