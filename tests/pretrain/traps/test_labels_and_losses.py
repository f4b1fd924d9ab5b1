"""Traps of labels, tokens and losses: each check fails on a mutant that reintroduces its trap."""

import random
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data_prep.layout import Pairing, SpecialTokenIds
from data_prep.tokenizer import Tokenizer
from data_prep.utils.console import UserError
from pretrain.config import load_config
from pretrain.data import batch as batches
from pretrain.data.batch import Batch
from pretrain.data.loader import Loader, count_targets, loss_denominators
from pretrain.models import language_model
from pretrain.models.attention import visibility_mask
from pretrain.objectives import auxiliary, llm_jepa
from pretrain.objectives.base import ForwardPass, build_objective, total_loss
from pretrain.objectives.llm_jepa import LlmJepa
from pretrain.objectives.next_token import NextToken
from pretrain.objectives.pool import Gather, Pool
from tests.commands import ROOT
from tests.mutants import assert_detects_mutant
from tests.reference import Ids, Reference

ROW = 128
LAYOUTS = ("joint", "independent")
ONE_RANK = Gather(all_gather=lambda mine: mine, rank=0)
TEXTS = [(f"lines {number} times", f"({letter}){{{number}}}") for number, letter in enumerate("abcdefgh", 2)]


def some_records(count: int = 8) -> list[tuple[list[int], list[int]]]:
    """Return random records, each a context and a target of token ids."""
    rng = random.Random(count)

    def random_tokens(longest: int) -> list[int]:
        return [rng.randrange(5, 400) for _ in range(rng.randint(2, longest))]

    return [(random_tokens(9), random_tokens(6)) for _ in range(count)]


def mutate_batches(change):
    """Return a mutant that changes each assembled batch by `change(batch, rows, corpus, specials) -> batch`."""
    original = batches.assemble

    def assemble(rows, corpus, layout, specials, *rest, **options) -> Batch:
        return change(original(rows, corpus, layout, specials, *rest, **options), rows, corpus, specials)

    return lambda patch: patch.setattr(batches, "assemble", assemble)


def mutate_texts(change):
    """Return a mutant whose tokenizer returns `change(tokenizer, texts, encode)`, the ids and lengths of the texts."""
    original = Tokenizer.encode_ragged
    return lambda patch: patch.setattr(
        Tokenizer, "encode_ragged", lambda self, texts: change(self, texts, lambda others: original(self, others))
    )


def insert_bos(tokenizer, texts, encode):
    ids, lengths = encode(texts)
    return np.insert(ids, np.cumsum(lengths) - lengths, tokenizer.bos_id), lengths + 1


def tokens_visible_at(batch: Batch, position: int) -> list[int]:
    """Return the tokens visible to the query at a position of the flattened batch, up to the query token itself."""
    row, query = divmod(position, batch.token_ids.shape[1])
    visible = visibility_mask(batch.visible_until, "sdpa")[row, 0, query].clone()
    return batch.token_ids[row][visible].tolist()


def test_trap_01_labels_are_not_overwritten_by_a_collator(write_corpus, specials, make_model, pack):
    records, model = some_records(), make_model(0)
    corpus = write_corpus(records)

    def check_only_answers_are_trained():
        packed = pack(corpus, specials, lm_views="last")
        terms = NextToken()(ForwardPass(packed.batch, model(packed.batch), {}, model, ONE_RANK)).terms
        reference = Reference(
            model.causal_lm, None, Ids(specials.bos, specials.eos, specials.sep), "joint", lm_views="last"
        )
        expected = reference.losses(records, paired=[False] * len(records)).lm.item()
        assert terms["lm"].item() / count_targets(packed.rows, packed.layout) == pytest.approx(expected, rel=1e-5), (
            "prompts are trained"
        )

    def collator(batch, rows, corpus, specials):
        ids = batch.token_ids.flatten()
        index = torch.nonzero(ids[1:] != specials.pad).flatten()
        return replace(batch, label_index=index, label_ids=ids[index + 1])

    with torch.no_grad():
        assert_detects_mutant(mutate_batches(collator), check_only_answers_are_trained, "prompts are trained")


def test_trap_02_the_end_token_is_a_target_even_if_a_tokenizer_pads_with_it(
    prepare_in_process, shared_special_token_tokenizer, pack
):
    corpora = [prepare_in_process(TEXTS), prepare_in_process(TEXTS, tokenizer=shared_special_token_tokenizer)]

    def check_every_end_token_is_a_target():
        for corpus, layout_name in product(corpora, LAYOUTS):
            specials = language_model.special_ids(corpus.tokenizer, language_model.padded_vocab_size(corpus.tokenizer))
            batch = pack(corpus, specials, layout_name, Pairing(1), empty_rows=1).batch
            texts = len(corpus) * (2 if layout_name == "independent" else 1)
            assert batch.label_ids.tolist().count(specials.eos) == texts, "the end token is not trained"
            assert batch.token_ids[-1].tolist() == [specials.pad] * ROW and specials.pad not in batch.label_ids

    def pad_is_eos_and_masked_by_id(batch, rows, corpus, specials):
        not_eos = batch.label_ids != specials.eos
        padded = torch.where(batch.token_ids == specials.pad, specials.eos, batch.token_ids)
        return replace(
            batch, token_ids=padded, label_index=batch.label_index[not_eos], label_ids=batch.label_ids[not_eos]
        )

    assert_detects_mutant(
        mutate_batches(pad_is_eos_and_masked_by_id),
        check_every_end_token_is_a_target,
        "the end token is not trained",
    )


def test_trap_03_labels_are_set_by_construction_not_by_search(write_corpus, specials, pack):
    # the answers of the first three records also occur in their prompts
    records = [
        ([7, 8, 9, 7, 8], [7, 8]),
        ([5, 6], [5, 6]),
        ([11, 12, 13], [12]),
        *some_records(),
    ]
    corpus = write_corpus(records)

    def check_the_answers_are_the_labels():
        packed = pack(corpus, specials, lm_views="last", pairing=Pairing(1))
        expected = {}
        for record, row, start in zip(packed.rows.records, packed.rows.row, packed.rows.start, strict=True):
            context, target = records[record]
            first = int(row) * ROW + int(start) + 1 + len(context)
            expected |= {first + number: token for number, token in enumerate([*target, specials.eos])}
        found = dict(zip(packed.batch.label_index.tolist(), packed.batch.label_ids.tolist(), strict=True))
        assert found == expected, "labels at wrong positions"

    def labels_by_search(batch, rows, corpus, specials):
        ids = batch.token_ids.flatten().tolist()
        positions: list[int] = []
        for record, row, start in zip(rows.records, rows.row, rows.start, strict=True):
            target = records[record][1]
            position = int(row) * ROW + int(start)
            while ids[position : position + len(target)] != target:
                position += 1
            positions += range(position - 1, position + len(target))
        index = torch.tensor(positions)
        return replace(batch, label_index=index, label_ids=batch.token_ids.flatten()[index + 1])

    assert_detects_mutant(
        mutate_batches(labels_by_search), check_the_answers_are_the_labels, "labels at wrong positions"
    )


def test_trap_06_a_text_has_one_bos_even_if_its_tokenizer_adds_one(
    prepare_in_process, shared_special_token_tokenizer, pack
):
    def check_one_bos_per_text():
        for tokenizer, layout_name in product((None, shared_special_token_tokenizer), LAYOUTS):
            corpus = prepare_in_process(TEXTS, tokenizer=tokenizer)
            specials = language_model.special_ids(corpus.tokenizer, language_model.padded_vocab_size(corpus.tokenizer))
            texts = len(corpus) * (2 if layout_name == "independent" else 1)
            found = (
                pack(corpus, specials, layout_name, Pairing(1)).batch.token_ids.flatten().tolist().count(specials.bos)
            )
            assert found == texts, "a text has two BOS tokens"

    assert_detects_mutant(mutate_texts(insert_bos), check_one_bos_per_text, "a text has two BOS tokens")


def test_trap_07_no_header_is_added_to_both_views(prepare_in_process, pack):
    def check_the_views_share_no_beginning():
        corpus = prepare_in_process(TEXTS)  # no context begins with the same token as its target
        specials = language_model.special_ids(corpus.tokenizer, language_model.padded_vocab_size(corpus.tokenizer))
        added = {specials.pad, specials.bos, specials.eos, specials.sep, specials.predictor}
        for layout_name in LAYOUTS:
            batch = pack(corpus, specials, layout_name, Pairing(1)).batch
            for pair in zip(batch.prediction_index.tolist(), batch.target_index.tolist(), strict=True):
                views = [[token for token in tokens_visible_at(batch, index) if token not in added] for index in pair]
                assert views[0][0] != views[1][0], "both views begin with a header"

    dated_header = mutate_texts(lambda tokenizer, texts, encode: encode([f"26 Jul\n{text}" for text in texts]))
    assert_detects_mutant(dated_header, check_the_views_share_no_beginning, "both views begin with a header")


def test_trap_08_no_row_of_the_mask_is_all_minus_infinity(write_corpus, specials, make_model, pack):
    corpus, model = write_corpus(some_records()), make_model(1)

    def check_attention_is_defined_everywhere():
        for layout_name in LAYOUTS:
            batch = pack(corpus, specials, layout_name, Pairing(1), empty_rows=1).batch
            mask = visibility_mask(batch.visible_until, "sdpa")
            additive = torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))
            assert additive.softmax(dim=-1).isfinite().all(), "a query sees nothing"
            assert model(batch).isfinite().all()

    def padding_sees_nothing(batch, rows, corpus, specials):
        return replace(batch, visible_until=batch.visible_until.masked_fill(batch.token_ids == specials.pad, 0))

    with torch.no_grad():
        assert_detects_mutant(
            mutate_batches(padding_sees_nothing), check_attention_is_defined_everywhere, "a query sees nothing"
        )


def test_trap_09_predictor_tokens_are_not_rows_of_the_tied_output_layer(tokenizer, write_corpus, make_model, pack):
    records = some_records()
    corpus = write_corpus(records)
    text_tokens = {token for context, target in records for token in (*context, *target)}

    def check_the_jepa_term_trains_rows_of_text_tokens_only():
        model = make_model(2)
        specials = language_model.special_ids(tokenizer, model.vocab_size)
        batch = pack(corpus, specials, pairing=Pairing(2)).batch
        LlmJepa(1.0, "cosine")(ForwardPass(batch, model(batch), {}, model, ONE_RANK)).terms["jepa"].backward()
        output_layer = model.causal_lm.lm_head.weight
        assert output_layer is model.causal_lm.get_input_embeddings().weight, "the test needs tied embeddings"
        trained = set(output_layer.grad.abs().sum(dim=1).nonzero().flatten().tolist())
        assert text_tokens <= trained <= text_tokens | {specials.bos, specials.sep, specials.eos}, (
            "predictor tokens compete in the logits"
        )

    def predictor_inside_the_vocabulary(patch):
        original = language_model.special_ids
        patch.setattr(
            language_model,
            "special_ids",
            lambda tokenizer, vocab_size: replace(original(tokenizer, vocab_size), predictor=vocab_size - 2),
        )

    assert_detects_mutant(
        predictor_inside_the_vocabulary,
        check_the_jepa_term_trains_rows_of_text_tokens_only,
        "predictor tokens compete in the logits",
    )


def contrastive_loss(model, rows, corpus, layout, specials, ranks: int) -> float:
    """Return the InfoNCE loss summed over ranks that exchange their pairs.

    Every rank computes its loss twice: first to record the tensors that it sends, then with the tensors of all ranks.
    """
    objective = LlmJepa(1.0, "info_nce")
    sent_by_rank: list[list] = [[] for _ in range(ranks)]
    losses = []
    for sending in (True, False):
        for rank in range(ranks):
            [batch] = batches.micro_batches(
                rows, corpus, layout, specials, ROW, micro_batch_rows=rows.count // ranks, rank=rank, ranks=ranks
            )
            calls = iter(range(2))

            def all_gather(mine, sending=sending, rank=rank, calls=calls):
                if sending:
                    sent_by_rank[rank].append(mine)
                    return torch.cat([mine] * ranks)
                call = next(calls)
                return torch.cat([sent[call] for sent in sent_by_rank])

            value = (
                objective(ForwardPass(batch, model(batch), {}, model, Gather(all_gather, rank))).terms["jepa"].item()
            )
            losses += [] if sending else [value]
    return sum(losses)


def test_trap_10_negatives_come_from_all_ranks(write_corpus, specials, make_model, pack):
    corpus, model = write_corpus(some_records(40)), make_model(1)
    packed = pack(corpus, specials, pairing=Pairing(1))
    layout, count = packed.layout, packed.rows.count // 4 * 4
    rows = packed.rows.select(0, count)

    def check_four_ranks_have_the_loss_of_one():
        losses = [contrastive_loss(model, rows, corpus, layout, specials, ranks) for ranks in (4, 1)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5), "negatives are missing"

    def local_negatives(patch):
        original = auxiliary.gather_pool
        patch.setattr(
            auxiliary,
            "gather_pool",
            lambda prediction, target, batch, gather: original(prediction, target, batch, ONE_RANK),
        )

    with torch.no_grad():
        assert_detects_mutant(local_negatives, check_four_ranks_have_the_loss_of_one, "negatives are missing")


def test_trap_11_distances_are_computed_in_fp32(write_corpus, specials, pack):
    """Use bf16 embeddings that are close to each other, as pairs are late in training."""
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
            head = SimpleNamespace(cross_entropy=lambda hidden, label_ids: hidden.sum())
            terms = LlmJepa(1.0, distance)(ForwardPass(batch, hidden, {}, head, ONE_RANK)).terms
            assert terms["jepa"].item() == pytest.approx(values.sum().item(), rel=1e-3), (
                f"{distance} is rounded to bf16"
            )

    def embeddings_in_bf16(patch):
        patch.setattr(
            auxiliary,
            "select_pair_embeddings",
            lambda hidden, batch: (hidden[batch.prediction_index], hidden[batch.target_index]),
        )

    assert_detects_mutant(embeddings_in_bf16, check_distances, "cosine is rounded to bf16")


OPTIONS = {
    "temperature": 0.5,
    "stop_gradient": True,
    "dropout": 0.5,
    "predictor_placement": "prepend",
    "predictor_tokens": 3,
    "direction": "both",
    "weight": 3.0,
    "weight_schedule": "[[0, 0.5]]",
    "active": "[0, 0.4]",
    "regularizers": "[{name: vicreg, weight: 1}]",
    "form": "sub_span",
}
COMBINATIONS = [
    f"name: llm_jepa, distance: {distance}, predictor_tokens: {k}, layout: {layout_name}"
    for distance, k, layout_name in product(("cosine", "info_nce"), (0, 1), LAYOUTS)
] + [f"name: semantic_tube, layout: {layout_name}" for layout_name in LAYOUTS]


def test_trap_12_an_option_has_an_effect_or_is_refused_in_every_combination(corpus, specials, make_model):
    def outcome(*overrides: str) -> list[float]:
        """Return the loss of two rows and the gradient norms, halfway through a run with these overrides."""
        config = load_config(ROOT / "configs" / "demo.yaml", list(overrides)).objective
        layout = config.make_layout(specials, 2, "all")
        rows = Loader(corpus, layout, ROW, seed=0, dropout=config.record_dropout(0.5)).next_rows(2)
        [batch] = batches.micro_batches(rows, corpus, layout, specials, ROW, micro_batch_rows=2, rank=0, ranks=1)
        model = make_model(layout.predictor_tokens)
        objective = build_objective(config, model.shape)
        counts = loss_denominators(rows, layout, objective.units)
        terms = objective(ForwardPass(batch, model(batch), {}, model, ONE_RANK)).terms
        weights = {
            term: weight * (1.0 if term == "lm" else config.factor(0.5)) for term, weight in objective.weights.items()
        }
        loss = total_loss(terms, counts, weights, ranks=1)
        loss.backward()
        return [loss.item(), *(parameter.grad.norm().item() for parameter in model.parameters())]

    def check_every_option_has_an_effect_or_is_refused():
        for combination in COMBINATIONS:
            before = outcome(f"objective={{{combination}}}")
            for option, value in OPTIONS.items():
                try:
                    after = outcome(f"objective={{{combination}}}", f"objective.{option}={value}")
                except UserError:
                    continue
                assert after != pytest.approx(before, rel=1e-4), f"{option} is ignored"

    def dropout_in_one_layout_only(patch):
        patch.setattr(
            llm_jepa.Config, "loss_dropout", lambda self, fraction: self.dropout if self.layout == "joint" else 0.0
        )

    def pool_without_detached_targets(patch):
        patch.setattr(Pool, "with_detached_targets", lambda self: self)

    assert_detects_mutant(
        dropout_in_one_layout_only, check_every_option_has_an_effect_or_is_refused, "dropout is ignored"
    )
    assert_detects_mutant(
        pool_without_detached_targets, check_every_option_has_an_effect_or_is_refused, "stop_gradient is ignored"
    )


def test_trap_18_embeddings_are_read_at_the_last_token_for_any_special_tokens(write_corpus, specials, pack):
    records = some_records()
    corpus = write_corpus(records)

    def check_the_tokens_that_embeddings_see():
        for ids, layout_name, k, placement in product(
            (specials, SpecialTokenIds(401, 402, 403, 404, 640)), LAYOUTS, (0, 1, 3), ("append", "prepend")
        ):
            batch = pack(corpus, ids, layout_name, Pairing(k, placement)).batch
            predictor = [ids.predictor + number for number in range(k)]
            closing = ids.sep if layout_name == "joint" else ids.eos
            for prediction, target, record in zip(
                batch.prediction_index.tolist(), batch.target_index.tolist(), batch.pair_record, strict=True
            ):
                context, answer = records[record]
                expected = (
                    [ids.bos, *context, closing, *predictor]
                    if placement == "append"
                    else [ids.bos, *predictor, *context, closing]
                )
                assert tokens_visible_at(batch, prediction) == expected, "read at a wrong token"
                assert tokens_visible_at(batch, target) == [ids.bos] * (layout_name == "independent") + [
                    *answer,
                    ids.eos,
                ], "read at a wrong token"

    def offset_by_one(batch, rows, corpus, specials):
        return replace(batch, target_index=batch.target_index - 1)

    assert_detects_mutant(mutate_batches(offset_by_one), check_the_tokens_that_embeddings_see, "read at a wrong token")
