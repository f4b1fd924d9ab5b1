"""Traps of labels, tokens and losses: each check fails on a mutant that brings its trap back."""

import random
from dataclasses import replace
from itertools import product

import pytest
import torch
import torch.nn.functional as F

from data_prep.console import UserError
from data_prep.tokenizer import Tokenizer
from pretrain.config import load_config
from pretrain.data import batch as batches
from pretrain.data.batch import Batch
from pretrain.data.layout import Pairing, SpecialTokenIds
from pretrain.data.loader import Loader, loss_denominators
from pretrain.models import language_model
from pretrain.models.attention import visibility_mask
from pretrain.objectives import auxiliary, llm_jepa
from pretrain.objectives.base import build_objective, total_loss
from pretrain.objectives.llm_jepa import LlmJepa
from pretrain.objectives.next_token import NextToken
from pretrain.objectives.pool import Gather, Pool
from tests.commands import ROOT
from tests.mutants import assert_detects_mutant
from tests.reference import Ids, Reference

ROW = 128
KINDS = ("joint", "independent")
ALONE = Gather(all_gather=lambda mine: mine, rank=0)
TEXTS = [(f"lines {number} times", f"({letter}){{{number}}}") for number, letter in enumerate("abcdefgh", 2)]


def some_records(count: int = 8) -> list[tuple[list[int], list[int]]]:
    rng = random.Random(count)
    return [
        (
            [rng.randrange(5, 400) for _ in range(rng.randint(2, 9))],
            [rng.randrange(5, 400) for _ in range(rng.randint(2, 6))],
        )
        for _ in range(count)
    ]


def other_batches(change):
    """A mutant: what is assembled is changed, `change(batch, rows, corpus, specials) -> batch`."""
    whole = batches.assemble

    def assemble(rows, corpus, layout, specials, *rest) -> Batch:
        return change(whole(rows, corpus, layout, specials, *rest), rows, corpus, specials)

    return lambda patch: patch.setattr(batches, "assemble", assemble)


def other_texts(change):
    """A mutant: the tokenizer encodes `change(tokenizer, texts, encode)`."""
    whole = Tokenizer.encode_batch
    return lambda patch: patch.setattr(
        Tokenizer, "encode_batch", lambda self, texts: change(self, texts, lambda others: whole(self, others))
    )


def seen_from(batch: Batch, place: int) -> list[int]:
    """The tokens that the query at a place of the flattened batch sees: itself last."""
    row, query = divmod(place, batch.token_ids.shape[1])
    visible = visibility_mask(batch.visible_until, "sdpa")[row, 0, query].clone()
    return batch.token_ids[row][visible].tolist()


def test_trap_01_no_collator_overwrites_the_labels(write_corpus, specials, make_model, pack):
    records, model = some_records(), make_model(0)
    corpus = write_corpus(records)

    def check_the_loss_is_that_of_the_answers():
        packed = pack(corpus, specials, lm_views="last")
        terms = NextToken()(model(packed.batch), packed.batch, model.cross_entropy, ALONE).terms
        reference = Reference(
            model.causal_lm, None, Ids(specials.bos, specials.eos, specials.sep), "joint", lm_views="last"
        )
        expected = reference.losses(records, paired=[False] * len(records)).lm.item()
        assert terms["lm"].item() / loss_denominators(packed.rows, packed.layout)["targets"] == pytest.approx(
            expected, rel=1e-5
        ), "prompts are learnt"

    def collator(batch, rows, corpus, specials):
        ids = batch.token_ids.flatten()
        places = torch.nonzero(ids[1:] != specials.pad).flatten()
        return replace(batch, label_index=places, label_ids=ids[places + 1])

    with torch.no_grad():
        assert_detects_mutant(other_batches(collator), check_the_loss_is_that_of_the_answers, "prompts are learnt")


def test_trap_02_the_end_token_is_a_target_though_a_tokenizer_pads_with_it(
    prepare_in_process, shared_special_token_tokenizer, pack
):
    corpora = [prepare_in_process(TEXTS), prepare_in_process(TEXTS, tokenizer=shared_special_token_tokenizer)]

    def check_every_text_ends_with_a_learnt_end_token():
        for corpus, kind in product(corpora, KINDS):
            specials = language_model.special_ids(corpus.tokenizer, language_model.padded_vocab_size(corpus.tokenizer))
            batch = pack(corpus, specials, kind, Pairing(1), empty_rows=1).batch
            texts = len(corpus) * (2 if kind == "independent" else 1)
            assert batch.label_ids.tolist().count(specials.eos) == texts, "the end token is not learnt"
            assert batch.token_ids[-1].tolist() == [specials.pad] * ROW and specials.pad not in batch.label_ids

    def pad_is_eos_and_masked_by_id(batch, rows, corpus, specials):
        kept = batch.label_ids != specials.eos
        padded = torch.where(batch.token_ids == specials.pad, specials.eos, batch.token_ids)
        return replace(batch, token_ids=padded, label_index=batch.label_index[kept], label_ids=batch.label_ids[kept])

    assert_detects_mutant(
        other_batches(pad_is_eos_and_masked_by_id),
        check_every_text_ends_with_a_learnt_end_token,
        "the end token is not learnt",
    )


def test_trap_03_labels_are_known_by_construction_not_searched_for(write_corpus, specials, pack):
    records = [
        ([7, 8, 9, 7, 8], [7, 8]),
        ([5, 6], [5, 6]),
        ([11, 12, 13], [12]),
        *some_records(),
    ]  # answers that stand in their prompts
    corpus = write_corpus(records)

    def check_the_answers_behind_their_prompts_are_the_labels():
        packed = pack(corpus, specials, lm_views="last", pairing=Pairing(1))
        expected = {}
        for record, row, start in zip(packed.rows.records, packed.rows.row, packed.rows.start, strict=True):
            context, target = records[record]
            before = int(row) * ROW + int(start) + 1 + len(context)
            expected |= {before + number: token for number, token in enumerate([*target, specials.eos])}
        found = dict(zip(packed.batch.label_index.tolist(), packed.batch.label_ids.tolist(), strict=True))
        assert found == expected, "labels elsewhere"

    def searched_for(batch, rows, corpus, specials):
        ids, places = batch.token_ids.flatten().tolist(), []
        for record, row, start in zip(rows.records, rows.row, rows.start, strict=True):
            target, place = records[record][1], int(row) * ROW + int(start)
            while ids[place : place + len(target)] != target:
                place += 1
            places += range(place - 1, place + len(target))
        index = torch.tensor(places)
        return replace(batch, label_index=index, label_ids=batch.token_ids.flatten()[index + 1])

    assert_detects_mutant(
        other_batches(searched_for), check_the_answers_behind_their_prompts_are_the_labels, "labels elsewhere"
    )


def test_trap_06_a_text_has_one_bos_whatever_its_tokenizer_adds(
    prepare_in_process, shared_special_token_tokenizer, pack
):
    def check_one_bos_a_text():
        for tokenizer, kind in product((None, shared_special_token_tokenizer), KINDS):
            corpus = prepare_in_process(TEXTS, tokenizer=tokenizer)
            specials = language_model.special_ids(corpus.tokenizer, language_model.padded_vocab_size(corpus.tokenizer))
            texts = len(corpus) * (2 if kind == "independent" else 1)
            found = pack(corpus, specials, kind, Pairing(1)).batch.token_ids.flatten().tolist().count(specials.bos)
            assert found == texts, "BOS stands twice"

    adds_its_own = other_texts(lambda tokenizer, texts, encode: [[tokenizer.bos_id, *ids] for ids in encode(texts)])
    assert_detects_mutant(adds_its_own, check_one_bos_a_text, "BOS stands twice")


def test_trap_07_no_header_stands_in_both_views(prepare_in_process, pack):
    def check_the_views_share_no_beginning():
        corpus = prepare_in_process(TEXTS)  # no context begins like its target
        specials = language_model.special_ids(corpus.tokenizer, language_model.padded_vocab_size(corpus.tokenizer))
        added = {specials.pad, specials.bos, specials.eos, specials.sep, specials.predictor}
        for kind in KINDS:
            batch = pack(corpus, specials, kind, Pairing(1)).batch
            for pair in zip(batch.prediction_index.tolist(), batch.target_index.tolist(), strict=True):
                views = [[token for token in seen_from(batch, place) if token not in added] for place in pair]
                assert views[0][0] != views[1][0], "both views begin with a header"

    dated_header = other_texts(lambda tokenizer, texts, encode: encode([f"26 Jul\n{text}" for text in texts]))
    assert_detects_mutant(dated_header, check_the_views_share_no_beginning, "both views begin with a header")


def test_trap_08_no_row_of_the_mask_is_all_minus_infinity(write_corpus, specials, make_model, pack):
    corpus, model = write_corpus(some_records()), make_model(1)

    def check_attention_is_defined_everywhere():
        for kind in KINDS:
            batch = pack(corpus, specials, kind, Pairing(1), empty_rows=1).batch
            mask = visibility_mask(batch.visible_until, "sdpa")
            additive = torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))
            assert additive.softmax(dim=-1).isfinite().all(), "a query sees nothing"
            assert model(batch).isfinite().all()

    def padding_sees_nothing(batch, rows, corpus, specials):
        return replace(batch, visible_until=batch.visible_until.masked_fill(batch.token_ids == specials.pad, 0))

    with torch.no_grad():
        assert_detects_mutant(
            other_batches(padding_sees_nothing), check_attention_is_defined_everywhere, "a query sees nothing"
        )


def test_trap_09_predictor_tokens_are_no_rows_of_the_tied_output_layer(tokenizer, write_corpus, make_model, pack):
    records = some_records()
    corpus = write_corpus(records)
    of_text = {token for record in records for view in record for token in view}

    def check_the_pair_term_trains_rows_of_text_alone():
        model = make_model(2)
        specials = language_model.special_ids(tokenizer, model.vocab_size)
        batch = pack(corpus, specials, pairing=Pairing(2)).batch
        LlmJepa(1.0, "cosine")(model(batch), batch, model.cross_entropy, ALONE).terms["jepa"].backward()
        output_layer = model.causal_lm.lm_head.weight
        assert output_layer is model.causal_lm.get_input_embeddings().weight, "the test needs tied embeddings"
        trained = set(output_layer.grad.abs().sum(dim=1).nonzero().flatten().tolist())
        assert of_text <= trained <= of_text | {specials.bos, specials.sep, specials.eos}, (
            "predictor tokens compete in the logits"
        )

    def inside_the_vocabulary(patch):
        whole = language_model.special_ids
        patch.setattr(
            language_model,
            "special_ids",
            lambda tokenizer, vocab_size: replace(whole(tokenizer, vocab_size), predictor=vocab_size - 2),
        )

    assert_detects_mutant(
        inside_the_vocabulary, check_the_pair_term_trains_rows_of_text_alone, "predictor tokens compete in the logits"
    )


def contrastive_loss(model, rows, corpus, layout, specials, ranks: int) -> float:
    """The sum of InfoNCE over ranks that hand each other their pairs; each computes twice, first to learn what the others hand over."""
    objective, handed_over, losses = LlmJepa(1.0, "info_nce"), [[] for _ in range(ranks)], []
    for sending in (True, False):
        for rank in range(ranks):
            [batch] = batches.micro_batches(
                rows, corpus, layout, specials, ROW, micro_batch_rows=rows.count // ranks, rank=rank, ranks=ranks
            )
            calls = iter(range(2))

            def all_gather(mine, sending=sending, rank=rank, calls=calls):
                if sending:
                    handed_over[rank].append(mine)
                    return torch.cat([mine] * ranks)
                call = next(calls)
                return torch.cat([of_rank[call] for of_rank in handed_over])

            value = objective(model(batch), batch, model.cross_entropy, Gather(all_gather, rank)).terms["jepa"].item()
            losses += [] if sending else [value]
    return sum(losses)


def test_trap_10_the_negatives_are_those_of_all_ranks(write_corpus, specials, make_model, pack):
    corpus, model = write_corpus(some_records(40)), make_model(1)
    packed = pack(corpus, specials, pairing=Pairing(1))
    layout, count = packed.layout, packed.rows.count // 4 * 4
    rows = packed.rows.select(0, count)

    def check_four_ranks_have_the_loss_of_one():
        losses = [contrastive_loss(model, rows, corpus, layout, specials, ranks) for ranks in (4, 1)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5), "negatives are missing"

    def local_negatives(patch):
        whole = auxiliary.gather_pool
        patch.setattr(
            auxiliary, "gather_pool", lambda prediction, target, batch, gather: whole(prediction, target, batch, ALONE)
        )

    with torch.no_grad():
        assert_detects_mutant(local_negatives, check_four_ranks_have_the_loss_of_one, "negatives are missing")


def test_trap_11_distances_are_computed_in_fp32(write_corpus, specials, pack):
    """Of bf16 embeddings that are close, as pairs are late in training."""
    batch = pack(write_corpus(some_records()), specials, pairing=Pairing(1)).batch
    hidden = torch.randn(batch.token_ids.numel(), 64, generator=torch.Generator().manual_seed(0))
    hidden[batch.target_index] = hidden[batch.prediction_index] + 0.03 * hidden[batch.target_index]
    hidden = hidden.bfloat16()
    prediction, target = hidden[batch.prediction_index].double(), hidden[batch.target_index].double()
    expected = {
        "cosine": 1 - F.cosine_similarity(prediction, target),
        "l2": (prediction - target).norm(dim=1),
        "mse": (prediction - target).square().mean(dim=1),
    }

    def check_distances():
        for distance, values in expected.items():
            terms = LlmJepa(1.0, distance)(hidden, batch, lambda hidden, label_ids: hidden.sum(), ALONE).terms
            assert terms["jepa"].item() == pytest.approx(values.sum().item(), rel=1e-3), (
                f"{distance} is rounded to bf16"
            )

    def left_in_bf16(patch):
        patch.setattr(
            auxiliary,
            "select_pair_embeddings",
            lambda hidden, batch: (hidden[batch.prediction_index], hidden[batch.target_index]),
        )

    assert_detects_mutant(left_in_bf16, check_distances, "cosine is rounded to bf16")


OPTIONS = {
    "temperature": 0.5,
    "stop_gradient": True,
    "dropout": 0.5,
    "predictor_placement": "prepend",
    "predictor_tokens": 3,
    "direction": "both",
    "weight": 3.0,
    "weight_schedule": "[[0, 0.5]]",
    "regularizers": "[{name: vicreg, weight: 1}]",
    "form": "sub_span",
}
COMBINATIONS = [
    f"name: llm_jepa, distance: {distance}, predictor_tokens: {k}, layout: {kind}"
    for distance, k, kind in product(("cosine", "info_nce"), (0, 1), KINDS)
] + [f"name: semantic_tube, layout: {kind}" for kind in KINDS]


def test_trap_12_an_option_acts_in_every_combination_or_is_refused(corpus, specials, make_model):
    def outcome(*overrides: str) -> list[float]:
        """The loss of two rows and its gradient's norms, halfway through a run of that configuration."""
        config = load_config(ROOT / "configs" / "demo.yaml", list(overrides)).objective
        layout, objective = config.make_layout(specials, 2, "all"), build_objective(config)
        rows = Loader(corpus, layout, ROW, seed=0, dropout=config.record_dropout).next_rows(2)
        [batch] = batches.micro_batches(rows, corpus, layout, specials, ROW, micro_batch_rows=2, rank=0, ranks=1)
        model, units = make_model(layout.predictor_tokens), loss_denominators(rows, layout)
        terms = objective(model(batch), batch, model.cross_entropy, ALONE).terms
        weights = {
            term: weight * (1.0 if term == "lm" else config.factor(0.5)) for term, weight in objective.weights.items()
        }
        loss = total_loss(terms, {term: units[unit] for term, unit in objective.units.items()}, weights, ranks=1)
        loss.backward()
        return [loss.item(), *(parameter.grad.norm().item() for parameter in model.parameters())]

    def check_every_option_acts_or_is_refused():
        for combination in COMBINATIONS:
            before = outcome(f"objective={{{combination}}}")
            for option, value in OPTIONS.items():
                try:
                    after = outcome(f"objective={{{combination}}}", f"objective.{option}={value}")
                except UserError:
                    continue
                assert after != pytest.approx(before, rel=1e-4), f"{option} is ignored"

    def dropout_for_one_layout(patch):
        patch.setattr(
            llm_jepa.Config, "record_dropout", property(lambda self: self.dropout if self.layout == "joint" else 0.0)
        )

    def a_pool_that_holds_no_target_fixed(patch):
        patch.setattr(Pool, "with_detached_targets", lambda self: self)

    assert_detects_mutant(dropout_for_one_layout, check_every_option_acts_or_is_refused, "dropout is ignored")
    assert_detects_mutant(
        a_pool_that_holds_no_target_fixed, check_every_option_acts_or_is_refused, "stop_gradient is ignored"
    )


def test_trap_18_embeddings_are_read_at_the_last_token_whatever_the_special_tokens(write_corpus, specials, pack):
    records = some_records()
    corpus = write_corpus(records)

    def check_what_the_read_outs_see():
        for ids, kind, k, placement in product(
            (specials, SpecialTokenIds(401, 402, 403, 404, 640)), KINDS, (0, 1, 3), ("append", "prepend")
        ):
            batch = pack(corpus, ids, kind, Pairing(k, placement)).batch
            predictor = [ids.predictor + number for number in range(k)]
            closing = ids.sep if kind == "joint" else ids.eos
            for prediction, target, record in zip(
                batch.prediction_index.tolist(), batch.target_index.tolist(), batch.pair_record, strict=True
            ):
                context, answer = records[record]
                expected = (
                    [ids.bos, *context, closing, *predictor]
                    if placement == "append"
                    else [ids.bos, *predictor, *context, closing]
                )
                assert seen_from(batch, prediction) == expected, "read at another token"
                assert seen_from(batch, target) == [ids.bos] * (kind == "independent") + [*answer, ids.eos], (
                    "read at another token"
                )

    def an_offset_by_hand(batch, rows, corpus, specials):
        return replace(batch, target_index=batch.target_index - 1)

    assert_detects_mutant(other_batches(an_offset_by_hand), check_what_the_read_outs_see, "read at another token")
