"""Exported embeddings match the ones of the objective; retrieval and geometry are correct for known embeddings."""

import json
import math

import numpy as np
import pytest
import torch

from data_prep.layout import FORWARD, Pairing, make_layout
from data_prep.nlrx_grammar import generate
from data_prep.utils.console import UserError
from pretrain.config import load_config, parse_task
from pretrain.data.batch import micro_batches
from pretrain.data.loader import draw_random_bits, plan_rows
from pretrain.evaluation import embed as embed_module
from pretrain.evaluation.embed import embed, embed_file
from pretrain.evaluation.model_tasks import geometry, retrieval
from pretrain.evaluation.model_tasks.embedded import PairEmbeddings
from pretrain.evaluation.task_run import CheckpointTask
from pretrain.models.view_templates import objective_from_export
from pretrain.objectives.base import build_objective
from pretrain.objectives.pool import select_pair_embeddings
from tests.commands import tiny_config, write_config
from tests.exports import OBJECTIVES, VIEWS, write_model_export
from tests.families import FAMILIES

CASES = [("llama", objective) for objective in OBJECTIVES] + [
    (family, OBJECTIVES[2]) for family in FAMILIES if family != "llama"
]


@pytest.mark.parametrize(
    "family, objective",
    CASES,
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_embeddings_match_the_objective_and_the_readme(
    family, objective, prepared, corpus, specials, make_model, tmp_path, monkeypatch
):
    monkeypatch.setattr(embed_module, "TOKENS", 100)  # small enough for several batches
    tokens = objective.get("predictor_tokens", 0)
    model = make_model(tokens, family=family)
    jepa = {"run": "tiny", "step": 7, "objective": objective, "views": list(VIEWS)}
    built = build_objective(objective_from_export(jepa), model.shape)
    export = write_model_export(tmp_path, prepared, model, tokens, jepa, family, built)
    numbers = np.arange(8)
    texts = [
        tuple(corpus.tokenizer.decode(part) for part in corpus.tokens_by_view(number).values()) for number in numbers
    ]
    found = embed(export, texts)
    layout = objective_from_export(jepa).validation_layouts(specials, 2, "all")["embedding"]
    rows = plan_rows(
        corpus, numbers, layout, 256, np.ones(len(numbers), bool), draw_random_bits(numbers, 0, np.zeros_like(numbers))
    )
    compared = 0
    for batch in micro_batches(rows, corpus, layout, specials, 256, micro_batch_rows=rows.count, rank=0, ranks=1):
        with torch.no_grad():
            context, target = select_pair_embeddings(model(batch), batch)
            prediction = built.predict(context)
        for place in batch.pair_valid.nonzero().flatten().tolist():
            record = batch.pair_record[place]
            source, goal = VIEWS if batch.pair_direction[place] == FORWARD else VIEWS[::-1]
            np.testing.assert_allclose(found.predictions[source, goal][record], prediction[place], rtol=2e-4, atol=2e-4)
            np.testing.assert_allclose(found.views[goal][record], target[place], rtol=2e-4, atol=2e-4)
            compared += 1
    assert compared == 8 * len(found.predictions)

    readme = (export / "README.md").read_text()
    assert ("weights of the objective" in readme) == (objective["name"] == "nitp")
    assert ("read in its context" in readme) == (objective.get("target") == "in_context")
    monkeypatch.chdir(export)
    namespace: dict = {}
    exec(readme.split("```python\n")[2].split("```")[0], namespace)
    for number in range(3):
        for name, vector in namespace["embed_record"](*texts[number]).items():
            expected = found.views[name] if name in VIEWS else found.predictions[tuple(name.split("_to_"))]
            np.testing.assert_allclose(vector, expected[number], rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("number", [0, 4, 5, 9])
def test_targets_in_context_match_the_layout_that_trains_them(number, prepared, corpus, specials, make_model, tmp_path):
    objective = OBJECTIVES[number]
    tokens = objective.get("predictor_tokens", 0)
    model = make_model(tokens)
    jepa = {"run": "tiny", "step": 7, "objective": objective, "views": list(VIEWS)}
    built = build_objective(objective_from_export(jepa), model.shape)
    export = write_model_export(tmp_path, prepared, model, tokens, jepa, "llama", built)
    numbers = np.arange(8)
    texts = [
        tuple(corpus.tokenizer.decode(part) for part in corpus.tokens_by_view(record).values()) for record in numbers
    ]
    found = embed(export, texts, in_context=True)
    layout = make_layout("joint", specials, pairing=Pairing(in_context=True))
    rows = plan_rows(
        corpus, numbers, layout, 256, np.ones(len(numbers), bool), draw_random_bits(numbers, 0, np.zeros_like(numbers))
    )
    (batch,) = micro_batches(rows, corpus, layout, specials, 256, micro_batch_rows=rows.count, rank=0, ranks=1)
    with torch.no_grad():
        _, targets = select_pair_embeddings(model(batch), batch)
    for place in batch.pair_valid.nonzero().flatten().tolist():
        expected = targets[place]
        np.testing.assert_allclose(found.views["code"][batch.pair_record[place]], expected, rtol=2e-4, atol=2e-4)
    assert batch.pair_valid.sum() == 8
    alone = embed(export, texts)
    assert np.array_equal(found.views["text"], alone.views["text"])
    assert all(np.array_equal(found.predictions[edge], alone.predictions[edge]) for edge in alone.predictions)
    assert np.abs(found.views["code"] - alone.views["code"]).max() > 0.01


def test_a_file_becomes_one_array_per_view_with_nan_for_rows_that_do_not_fit(prepared, make_model, tmp_path):
    jepa = {"run": "tiny", "step": 7, "objective": {"name": "llm_jepa", "predictor_tokens": 1}, "views": list(VIEWS)}
    export = write_model_export(tmp_path, prepared, make_model(1), 1, jepa, "llama")
    pairs = [*(generate(0, "test", index) for index in range(5)), ("number " * 400, "[0-9]")]
    (tmp_path / "pairs.jsonl").write_text(
        "".join(json.dumps(dict(zip(VIEWS, pair, strict=True))) + "\n" for pair in pairs)
    )
    embed_file(export, str(tmp_path / "pairs.jsonl"))
    arrays = np.load(export / "embeddings" / "pairs.npz")
    assert {name: (array.shape[0], array.dtype) for name, array in arrays.items()} == dict.fromkeys(
        ("text", "code", "text_to_code"), (6, np.float32)
    )
    assert np.isnan(arrays["text"]).any(axis=1).tolist() == [False] * 5 + [True] and not np.isnan(arrays["code"]).any()

    (tmp_path / "mine.jsonl").write_text(
        (tmp_path / "pairs.jsonl").read_text().replace('"text"', '"question"').replace('"code"', '"regex"')
    )
    with pytest.raises(UserError, match="name the columns of the views in --embed, as for a source"):
        embed_file(export, str(tmp_path / "mine.jsonl"))
    embed_file(export, f"{{type: json, path: {tmp_path / 'mine.jsonl'}, views: {{text: question, code: regex}}}}")
    mine = np.load(export / "embeddings" / "mine.npz")
    assert all(np.array_equal(mine[name], arrays[name], equal_nan=True) for name in arrays)
    with pytest.raises(UserError, match=r"--embed\.test"):
        embed_file(export, "{path: pairs.jsonl}")


def write_pairs(path, views, texts):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(dict(zip(views, pair, strict=True))) + "\n" for pair in texts))
    return path


def test_views_may_have_any_name_and_files_with_the_same_name_do_not_overwrite_each_other(
    prepared, make_model, tmp_path
):
    views = ("file", "allow_pickle")
    jepa = {"run": "tiny", "step": 7, "objective": {"name": "llm_jepa", "predictor_tokens": 1}, "views": list(views)}
    export = write_model_export(tmp_path, prepared, make_model(1), 1, jepa, "llama")
    texts = [generate(0, "test", index) for index in range(5)]
    (export / "embeddings").mkdir()
    np.savez(export / "embeddings" / "old.npz", text=np.zeros((1, 2)))  # a file in the format of older versions
    rows = {
        "a/pairs.jsonl": texts[:2],
        "b/pairs.jsonl": texts,
        "old.jsonl": texts[:1],
        "a/pairs.jsonl again": texts[:3],
    }
    for name, file_rows in rows.items():
        embed_file(export, str(write_pairs(tmp_path / name.removesuffix(" again"), views, file_rows)))
    found = {path.stem: np.load(path) for path in (export / "embeddings").iterdir()}
    assert {name: len(next(iter(arrays.values()))) for name, arrays in found.items()} == {
        "pairs": 3,
        "pairs-2": 5,
        "old": 1,
        "old-2": 1,
    }
    assert found["old"].files == ["text"] and set(found["pairs"].files) == {*views, "file_to_allow_pickle"}
    assert np.array_equal(found["pairs"]["file"], found["pairs-2"]["file"][:3])


def test_a_view_with_the_name_of_a_prediction_array_is_refused(prepared, make_model, tmp_path):
    views = ("text", "code", "text_to_code")
    jepa = {"run": "tiny", "step": 7, "objective": {"name": "llm_jepa", "predictor_tokens": 1}, "views": list(views)}
    export = write_model_export(tmp_path, prepared, make_model(1), 1, jepa, "llama")
    with pytest.raises(UserError, match="the view 'text_to_code' has the same name as the array of a prediction"):
        embed_file(export, str(write_pairs(tmp_path / "pairs.jsonl", views, [("a", "b", "c"), ("d", "e", "f")])))
    assert not (export / "embeddings").exists()


def test_non_finite_embeddings_are_counted_apart_from_rows_that_are_too_long(
    prepared, make_model, tokenizer, tmp_path, messages
):
    jepa = {"run": "tiny", "step": 7, "objective": {"name": "llm_jepa", "predictor_tokens": 1}, "views": list(VIEWS)}
    model = make_model(1)
    (broken,) = tokenizer.encode_batch(["~"])
    with torch.no_grad():
        model.causal_lm.get_input_embeddings().weight[broken] = math.nan
    export = write_model_export(tmp_path, prepared, model, 1, jepa, "llama")
    texts = [
        *(generate(0, "test", index) for index in range(5)),
        ("number " * 400, "[0-9]"),
        ("a ~ b", "~"),
        ("b ~", "[0-9]"),
        ("c ~", "x"),
    ]
    (tmp_path / "evaluation").mkdir()
    config = load_config(write_config(tmp_path, tiny_config(tmp_path)))

    def evaluate(file_rows):
        task = parse_task(
            {"name": "retrieval", "test": str(write_pairs(tmp_path / "pairs.jsonl", VIEWS, file_rows))}, "task"
        )
        return retrieval.evaluate(CheckpointTask(config, task, 7, export, tmp_path / "evaluation"))

    assert evaluate(texts).counts == {"candidates": 5, "too_long": 1, "not_finite": 3}
    with pytest.raises(
        UserError,
        match="the embeddings of 3 of 4 rows are not finite because the weights of this checkpoint have diverged",
    ):
        evaluate(texts[-4:])
    with pytest.raises(UserError, match="fewer than two rows fit"):
        evaluate([texts[0], texts[5], texts[5]])
    embed_file(export, str(write_pairs(tmp_path / "pairs.jsonl", VIEWS, texts)))
    assert "note: in 1 rows a text does not fit into the positions of the model; its embedding is NaN" in messages
    assert any(line.startswith("WARNING: the embeddings of 3 rows are not finite") for line in messages)


def test_a_note_explains_embeddings_of_a_model_with_targets_in_context(prepared, make_model, tmp_path, messages):
    note = "note: the views are encoded separately, but the model was trained with targets in their context"
    for target in ("alone", "in_context"):
        objective = {"name": "llm_jepa", "target": target}
        jepa = {"run": "tiny", "step": 7, "objective": objective, "views": list(VIEWS)}
        export = write_model_export(tmp_path / target, prepared, make_model(1), 1, jepa, "llama")
        embed_file(export, str(write_pairs(tmp_path / "pairs.jsonl", VIEWS, [generate(0, "test", 0)])))
        assert (note in messages) == (target == "in_context")


def test_rows_with_the_same_target_have_different_targets_in_context(prepared, make_model, tmp_path):
    jepa = {"run": "tiny", "step": 7, "objective": {"name": "next_token"}, "views": list(VIEWS)}
    export = write_model_export(tmp_path, prepared, make_model(0), 0, jepa, "llama")
    (tmp_path / "evaluation").mkdir()
    config = load_config(write_config(tmp_path, tiny_config(tmp_path)))
    texts = [("a dog", "[0-9]"), ("a ring", "[0-9]"), ("a lake", "[a-z]"), ("a dog", "[0-9]")]
    candidates = {}
    for target in ("alone", "in_context"):
        file = str(write_pairs(tmp_path / "pairs.jsonl", VIEWS, texts))
        task = parse_task({"name": "retrieval", "test": file, "target": target}, "task")
        result = retrieval.evaluate(CheckpointTask(config, task, 7, export, tmp_path / "evaluation"))
        candidates[target] = result.counts["candidates"]
    assert candidates == {"alone": 2, "in_context": 3}


def pairs(prediction, target, key=None):
    return PairEmbeddings(prediction, target, torch.arange(len(target)) if key is None else torch.tensor(key))


def test_retrieval_scores_of_known_embeddings():
    torch.manual_seed(0)
    target = torch.randn(3000, 16)
    assert retrieval.score(pairs(2 * target, target)) == {"recall_at_1": 1, "recall_at_10": 1, "mrr": 1}
    found = retrieval.score(pairs(target.roll(1, 0), target))
    assert found["recall_at_1"] == 0 and found["mrr"] < 0.02
    nine = torch.eye(10)
    assert retrieval.score(pairs(torch.cat([nine[:9], nine[:1]]), nine))["recall_at_1"] == 9 / 10, (
        "the rate should be exact, not rounded to fp32"
    )
    same = torch.ones(3000, 16)
    assert retrieval.score(pairs(same, same))["recall_at_10"] == 0  # collapsed embeddings retrieve nothing
    assert retrieval.ranks(pairs(torch.eye(4)[[0, 1, 2, 0]], torch.eye(4)[[0, 1, 1, 3]], [0, 1, 1, 2])).tolist() == [
        1,
        1,
        3,
        3,
    ]


def test_geometry_distinguishes_a_linear_map_from_noise_and_from_collapse():
    torch.manual_seed(0)
    context = torch.randn(400, 24)
    linear, values = geometry.measure(pairs(context, context @ torch.randn(24, 24)))
    assert linear["linear_residual"] < 1e-4 and linear["linear_residual_unseen"] < 1e-4 and len(values["map"]) == 24
    noise, _ = geometry.measure(pairs(context, torch.randn(400, 24)))
    assert (
        noise["linear_residual"] > 0.9 and noise["linear_residual_unseen"] > 1 and abs(noise["shuffled_cosine"]) < 0.02
    )
    collapsed, _ = geometry.measure(pairs(1 + 1e-3 * torch.randn(400, 24), 1 + 1e-3 * torch.randn(400, 24)))
    assert (
        collapsed["linear_residual"] < 0.01
        and collapsed["linear_residual_unseen"] > 0.95
        and collapsed["shuffled_cosine"] > 0.99
    )
    equal, values = geometry.measure(pairs(context, context))
    assert (
        equal["paired_cosine"] == pytest.approx(1)
        and equal["difference_singular"] == 0
        and math.isclose(values["map"][0], 1, rel_tol=1e-6)
    )
    assert 20 < equal["effective_rank_context"] <= 24
    assert "shuffled_cosine" not in geometry.measure(pairs(context, context, [0] * 400))[0]
