"""sentence-transformers computes the embeddings and predictions of --embed from the folders of an export."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from data_prep.nlrx_grammar import generate
from data_prep.tokenizer import Tokenizer
from data_prep.utils.console import UserError
from pretrain.config import load_config, parse_task
from pretrain.evaluation.embed import Embedder, embed
from pretrain.evaluation.model_tasks import retrieval
from pretrain.evaluation.model_tasks.embedded import PairEmbeddings
from pretrain.evaluation.sentence_folders import write_sentence_folders
from pretrain.evaluation.task_run import CheckpointTask
from pretrain.models.view_templates import objective_from_export
from pretrain.objectives.base import build_objective
from tests.commands import run_command, tiny_config, write_config
from tests.exports import OBJECTIVES, VIEWS, write_model_export
from tests.families import FAMILIES

WITHOUT_LIBRARY = "sentence-transformers is not installed"
PREDICTIONS = {"name": "llm_jepa", "predictor_tokens": 2, "direction": "both", "predictor_mlp": 12}
CASES = [
    *(("llama", objective, VIEWS) for objective in OBJECTIVES),
    ("llama", PREDICTIONS, ("first", "second", "third")),
    *((family, OBJECTIVES[2], VIEWS) for family in FAMILIES if family not in ("llama", "openelm")),
]
SPECIAL_TEXTS = ["", " ", "  two  blanks \n", "<s> and <sep></s>", "größe 日本", "a", "number " * 25]
"""Texts that a library might change before it encodes them. All fit into the positions of the model."""


@pytest.fixture(scope="module")
def load():
    """Return a function that loads a folder with sentence-transformers, without downloads."""
    library = pytest.importorskip("sentence_transformers", reason=WITHOUT_LIBRARY)
    return lambda folder: library.SentenceTransformer(str(folder), device="cpu", local_files_only=True)


@pytest.fixture
def write(prepared, make_model, tmp_path):
    """Return a function that writes the export of a random model."""

    def write(objective, views=VIEWS, family="llama", name="tiny"):
        tokens = objective.get("predictor_tokens", 0)
        model = make_model(tokens, family=family)
        jepa = {"run": "tiny", "step": 7, "objective": objective, "views": list(views)}
        built = build_objective(objective_from_export(jepa), model.shape)
        return write_model_export(tmp_path / name, prepared, model, tokens, jepa, family, built)

    return write


def some_texts(views):
    """Return rows of texts of different lengths, special ones included."""
    rows = [(*generate(0, "test", index), *generate(1, "test", index))[: len(views)] for index in range(8)]
    return [*rows, *((text,) * len(views) for text in SPECIAL_TEXTS)]


@pytest.mark.parametrize(
    ("family", "objective", "views"),
    CASES,
    ids=lambda value: "-".join(map(str, value.values() if isinstance(value, dict) else [value])),
)
def test_folders_have_the_embeddings_of_the_export(family, objective, views, load, write, tmp_path, monkeypatch):
    export = write(objective, views, family)
    folder = export / "sentence-transformers"
    write_sentence_folders(export, folder)
    rows = some_texts(views)
    found = embed(export, rows)
    assert found.fits.all()
    predictions = {
        f"{source}_to_{target}": (views.index(source), array)
        for (source, target), array in found.predictions.items()
        if array is not found.views[source]
    }
    assert bool(predictions) == bool(objective.get("predictor_tokens") or objective.get("predictor_mlp"))
    expected = {view: (number, found.views[view]) for number, view in enumerate(views)} | predictions
    assert {path.name for path in folder.iterdir()} == expected.keys()
    for name, (view, array) in expected.items():
        vectors = load(folder / name).encode([row[view] for row in rows], batch_size=4, show_progress_bar=False)
        assert np.abs(vectors - array).max() <= 1e-5, name
        weights = [folder / other / "model.safetensors" for other in (name, views[0])]
        assert weights[0].samefile(weights[1]) and not weights[0].is_symlink()

    monkeypatch.chdir(export)
    namespace: dict = {}
    exec((export / "README.md").read_text().split("```python\n")[3].split("```")[0], namespace)
    source, target = next(iter(found.predictions))
    vectors = embed(export, [("...",) * len(views)])
    query, text = vectors.predictions[source, target][0], vectors.views[target][0]
    cosine = query @ text / np.linalg.norm(query) / np.linalg.norm(text)
    np.testing.assert_allclose(namespace["cosines"], [[cosine, cosine]], atol=1e-5)


@pytest.mark.parametrize("placement", ["append", "prepend"])
def test_a_text_that_is_too_long_is_cut_off_between_its_special_tokens(placement, load, write, tmp_path):
    export = write({"name": "llm_jepa", "predictor_tokens": 2, "predictor_placement": placement})
    write_sentence_folders(export, tmp_path / "folders")
    embedder = Embedder(export)
    text = "number " * 400
    (tokens,) = Tokenizer.load(export).encode_batch([text])
    limit = 256
    for name, view in (("text", 0), ("code", 1), ("text_to_code", 0)):
        before, after = embedder.ids_around(view, predict=name == "text_to_code")
        cut = [*before, *tokens[: limit - len(before) - len(after)], *after]
        model = load(tmp_path / "folders" / name)
        found = model.preprocess([text, "a"])
        assert model.max_seq_length == limit and found["input_ids"][0].tolist() == cut
        assert found["attention_mask"][1].tolist() == sorted(found["attention_mask"][1].tolist(), reverse=True)
        assert np.isfinite(model.encode([text])).all() and not embedder.embed_view(view, [text])[1].any()
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "folders" / name)
        assert tokenizer(text, truncation=True)["input_ids"] == cut


def test_retrieval_is_the_same_as_in_the_evaluation(load, write, tmp_path):
    export = write({"name": "llm_jepa", "predictor_tokens": 1})
    write_sentence_folders(export, tmp_path / "folders")
    rows = [generate(0, "test", index) for index in range(60)]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(dict(zip(VIEWS, row, strict=True))) + "\n" for row in rows))
    (tmp_path / "evaluation").mkdir()
    config = load_config(write_config(tmp_path, tiny_config(tmp_path)))
    task = parse_task({"name": "retrieval", "test": str(file)}, "task")
    metrics = retrieval.evaluate(CheckpointTask(config, task, 7, export, tmp_path / "evaluation")).metrics
    queries, targets = load(tmp_path / "folders" / "text_to_code"), load(tmp_path / "folders" / "code")
    cosines = queries.similarity(queries.encode([row[0] for row in rows]), targets.encode([row[1] for row in rows]))
    best = cosines.argmax(dim=1)
    same = [rows[number][1] == row[1] for number, row in zip(best.tolist(), rows, strict=True)]
    assert np.mean(same) == pytest.approx(metrics["recall_at_1"])
    key = torch.tensor([[row[1] for row in rows].index(row[1]) for row in rows])
    vectors = [torch.from_numpy(model.encode([row[i] for row in rows])) for i, model in enumerate((queries, targets))]
    assert retrieval.score(PairEmbeddings(*vectors, key)) == pytest.approx(metrics)


def test_the_command_writes_the_folders(write, tmp_path):
    export = write({"name": "llm_jepa", "predictor_tokens": 1, "target": "in_context"})
    command = ["python", "launcher/evaluate.py", export, "--sentence-transformers", tmp_path / "new" / "folders"]
    lines = run_command(command).stdout.splitlines()
    names = ["text", "code", "text_to_code"]
    assert lines[:3] == [f"written to {tmp_path / 'new' / 'folders' / name}" for name in names]
    assert lines[3].startswith("note: the views are encoded separately") and len(lines) == 4
    assert sorted(path.name for path in (tmp_path / "new" / "folders").iterdir()) == sorted(names)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["folders"]
    cases = [
        ([], f"error: --sentence-transformers: {command[-1]} is not an empty folder; choose a new folder"),
        (["--push"], "error: --sentence-transformers allows only an export and a new folder; remove all other options"),
        (["train.steps=3"], "error: --sentence-transformers allows only an export and a new folder"),
    ]
    for words, message in cases:
        done = run_command([*command, *words], check=False)
        assert done.returncode == 2 and done.stderr.startswith(message) and len(done.stderr.splitlines()) == 1
    done = run_command(["python", "launcher/evaluate.py", tmp_path, *command[3:]], check=False)
    assert done.returncode == 2 and "is not an export: it has no jepa.json" in done.stderr


def test_what_cannot_be_loaded_is_refused(write, tmp_path):
    openelm = write(OBJECTIVES[2], family="openelm", name="openelm")
    with pytest.raises(UserError, match="transformers does not include openelm"):
        write_sentence_folders(openelm, tmp_path / "folders")
    readme = (openelm / "README.md").read_text()
    assert "cannot load this model without code of the project" in readme and "SentenceTransformer(" not in readme
    ambiguous = write({"name": "llm_jepa", "predictor_tokens": 1}, ("text", "code", "text_to_code"), name="ambiguous")
    with pytest.raises(UserError, match="the view 'text_to_code' has the same name"):
        write_sentence_folders(ambiguous, tmp_path / "folders")
    assert not (tmp_path / "folders").exists()
