"""Traps that waste time and memory: each check fails on a mutant that reintroduces its trap."""

import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask
from torch.utils._python_dispatch import TorchDispatchMode

from data_prep.layout import Pairing, make_layout
from pretrain.data import loader as loading
from pretrain.data.batch import micro_batches
from pretrain.data.loader import Loader, Rows, count_targets, loss_denominators
from pretrain.models import language_model
from pretrain.models.attention import visibility_mask
from pretrain.objectives import auxiliary
from pretrain.objectives.base import ForwardPass, total_loss
from pretrain.objectives.llm_jepa import LlmJepa
from pretrain.objectives.pool import Gather
from pretrain.planning.flops import Parameters
from pretrain.training.throughput import Throughput
from tests.mutants import assert_detects_mutant

ONE_RANK = Gather(all_gather=lambda mine: mine, rank=0)
SYNCS = {
    torch.ops.aten._local_scalar_dense,
    torch.ops.aten.nonzero,
    torch.ops.aten.equal,
    torch.ops.aten.masked_select,
    torch.ops.aten.is_nonzero,
    torch.ops.aten.unique_dim,
    torch.ops.aten._unique2,
    torch.ops.aten.repeat_interleave,
}
"""Operators that make the host wait for their result."""


class OperatorCounter(TorchDispatchMode):
    """Counter of operators that make the host wait. `rows` is the maximum number of rows of a `width`-column output."""

    def __init__(self, width: int = 0):
        super().__init__()
        self.width, self.syncs, self.rows = width, 0, 0

    def __torch_dispatch__(self, operator, types, arguments=(), options=None):
        masks = (
            [index for index in arguments[1] if index is not None and index.dtype == torch.bool]
            if _is_indexing(operator)
            else []
        )
        self.syncs += operator.overloadpacket in SYNCS or bool(masks)
        output = operator(*arguments, **(options or {}))
        if isinstance(output, torch.Tensor) and output.dim() > 1 and output.shape[-1] == self.width:
            self.rows = max(self.rows, output.numel() // self.width)
        return output


def _is_indexing(operator) -> bool:
    return operator.overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_)


def load_rows(corpus, specials, row_length: int, rows: int, lm_views: str = "all"):
    """Return rows of the loader, their micro batch and their layout."""
    layout = make_layout("joint", specials, pairing=Pairing(1), lm_views=lm_views)
    chosen = Loader(corpus, layout, row_length, seed=0).next_rows(rows)
    [batch] = micro_batches(chosen, corpus, layout, specials, row_length, micro_batch_rows=rows, rank=0, ranks=1)
    return chosen, batch, layout


def test_trap_19_rows_are_full(corpus, specials):
    def check_padding():
        _, batch, _ = load_rows(corpus, specials, 512, 8)
        assert (batch.token_ids == specials.pad).float().mean() < 0.05, "rows are padded"

    def one_record_per_row(patch):
        patch.setattr(loading, "pack", lambda positions, row_length: np.arange(len(positions)))

    assert_detects_mutant(one_record_per_row, check_padding, "rows are padded")


class MaskSeen(Exception):
    """An exception that ends a forward pass when the first layer gets its mask."""


def mask_of_the_first_layer(model, batch) -> torch.Tensor | BlockMask:
    """Return the mask that the forward pass of the model hands to the attention of the first layer."""

    def stop(module, arguments, options):
        raise MaskSeen(options["attention_mask"])

    hook = model.causal_lm.model.layers[0].self_attn.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        model(batch)
    except MaskSeen as seen:
        return seen.args[0]
    finally:
        hook.remove()


def held_bytes(mask: torch.Tensor | BlockMask) -> int:
    tensors = (
        [mask]
        if isinstance(mask, torch.Tensor)
        else [part for part in mask.as_tuple() if isinstance(part, torch.Tensor)]
    )
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def test_trap_20_masks_are_not_dense_in_fp32(corpus, specials, make_model):
    length = 2048
    model = make_model(1)
    _, batch, _ = load_rows(corpus, specials, length, 2)

    def check_the_masks():
        for attention, bytes_per_entry in (("sdpa", 1), ("flex_attention", 0.01)):
            model.attention = model.causal_lm.config._attn_implementation = attention
            held = held_bytes(mask_of_the_first_layer(model, batch))
            assert held <= bytes_per_entry * 2 * length**2, f"the mask for {attention} takes {held:,} bytes"

    def additive_mask(patch):
        patch.setattr(
            language_model,
            "attention_mask",
            lambda visible_until, *others: torch.where(visibility_mask(visible_until, "sdpa"), 0.0, float("-inf")),
        )

    def dense_mask(patch):
        patch.setattr(
            language_model, "attention_mask", lambda visible_until, *others: visibility_mask(visible_until, "sdpa")
        )

    with torch.no_grad():
        assert_detects_mutant(additive_mask, check_the_masks, "the mask for sdpa takes")
        assert_detects_mutant(dense_mask, check_the_masks, "the mask for flex_attention takes")


def test_trap_21_logits_are_computed_for_labels_only(corpus, specials, make_model):
    model = make_model(1)
    _, batch, _ = load_rows(corpus, specials, 128, 3, lm_views="last")

    def check_rows_of_logits():
        with OperatorCounter(width=model.vocab_size) as counter:
            terms = LlmJepa(1.0, "cosine")(ForwardPass(batch, model(batch), {}, model, ONE_RANK)).terms
            torch.autograd.grad(terms["lm"], model.causal_lm.get_input_embeddings().weight)
        assert counter.rows == len(batch.label_index) < batch.token_ids.numel() / 2, f"{counter.rows} rows of logits"

    def labels_of_minus_100(patch):
        def loss_over_all_positions(hidden, batch, cross_entropy):
            labels = torch.full((len(hidden),), -100).index_put((batch.label_index,), batch.label_ids)
            return F.cross_entropy(model.logits(hidden), labels, ignore_index=-100, reduction="sum")

        patch.setattr(auxiliary, "next_token_sum", loss_over_all_positions)

    assert_detects_mutant(labels_of_minus_100, check_rows_of_logits, f"{batch.token_ids.numel()} rows of logits")


def test_trap_22_only_hidden_states_of_the_last_layer_are_kept(corpus, specials, make_model):
    model = make_model(1)
    _, batch, _ = load_rows(corpus, specials, 128, 2)
    decoder = model.causal_lm.model

    def check_hidden_states_after_the_last_layer():
        """Check the hidden states that are alive after the last layer, without a graph that would keep them."""
        states, alive = [], []
        hooks = [
            layer.register_forward_hook(
                lambda module, arguments, output: states.append(
                    weakref.ref(output if isinstance(output, torch.Tensor) else output[0])
                )
            )
            for layer in decoder.layers
        ]
        hooks.append(
            decoder.norm.register_forward_pre_hook(
                lambda module, arguments: alive.extend(state() is not None for state in states)
            )
        )
        with torch.no_grad():
            model(batch)
        for hook in hooks:
            hook.remove()
        assert alive == [False] * (len(decoder.layers) - 1) + [True], "hidden states of earlier layers are kept"

    def all_hidden_states(patch):
        original = decoder.forward
        patch.setattr(decoder, "forward", lambda **inputs: original(**inputs, output_hidden_states=True))

    assert_detects_mutant(
        all_hidden_states, check_hidden_states_after_the_last_layer, "hidden states of earlier layers are kept"
    )


@pytest.mark.parametrize("distance", ["cosine", "info_nce"])
def test_trap_23_the_host_does_not_wait_for_the_device_once_per_record(distance, corpus, specials, make_model):
    model, objective = make_model(1), LlmJepa(1.0, distance)
    steps = [load_rows(corpus, specials, 256, rows) for rows in (1, 4)]
    assert len(steps[1][0].records) > len(steps[0][0].records) + 10

    def check_syncs_of_a_micro_step():
        for rows, batch, layout in steps:
            counts = loss_denominators(rows, layout, objective.units)
            with OperatorCounter() as counter:
                terms = objective(ForwardPass(batch, model(batch), {}, model, ONE_RANK)).terms
                total_loss(terms, counts, objective.weights, ranks=1).backward()
            assert counter.syncs == 0, f"{counter.syncs} syncs for {len(rows.records)} records"

    def loop_over_records(patch):
        def select_one_by_one(hidden, batch):
            return tuple(
                torch.stack([hidden[position.item()].float() for position in index])
                for index in (batch.prediction_index, batch.target_index)
            )

        patch.setattr(auxiliary, "select_pair_embeddings", select_one_by_one)

    records = len(steps[0][0].records)
    assert_detects_mutant(loop_over_records, check_syncs_of_a_micro_step, f"{2 * records} syncs for {records} records")


def test_trap_25_flops_are_counted_for_real_tokens(corpus, specials):
    rows, batch, layout = load_rows(corpus, specials, 512, 3)
    tokens = int((batch.token_ids != specials.pad).sum())

    def check_flops_of_tokens_and_labels():
        for padded in (rows, Rows.join([rows], 30)):
            throughput = Throughput(
                Parameters(layers=1000, embedding=50, head=50, tied=True, predictor=7), ranks=1, row_length=512
            )
            throughput.peak = 1.0  # then the MFU of one second equals the number of FLOPs
            throughput.add(padded, count_targets(padded, layout), seconds=1.0)
            assert throughput.take()["throughput/mfu"] == 6 * (1000 * tokens + 50 * len(batch.label_index)), (
                "padding is counted"
            )

    def count_all_positions(patch):
        original = Throughput.add

        def add(self, rows, targets, seconds):
            original(self, rows, targets, seconds)
            self.positions = self.slots

        patch.setattr(Throughput, "add", add)

    assert_detects_mutant(count_all_positions, check_flops_of_tokens_and_labels, "padding is counted")
