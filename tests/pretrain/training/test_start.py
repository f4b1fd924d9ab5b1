"""The checks at the startup of a run, and the epochs of a mixture of sources.

At startup, a run reads the lengths of the records only if the manifest does not contain the answer.
"""

import json

import numpy as np
import pytest

from data_prep.utils.console import UserError
from pretrain.config import RunConfig, load_config
from pretrain.data.corpus import Corpus
from pretrain.run_folder import read_status
from pretrain.training import start_checks
from pretrain.training.start_checks import check
from tests.commands import prepare_corpus, run_command, tiny_config, write_config

PLAIN, PREPENDED = {"name": "next_token"}, {"name": "llm_jepa", "distance": "cosine", "predictor_placement": "prepend"}


@pytest.fixture
def config(tmp_path):
    def make(corpus: Corpus, **changes) -> RunConfig:
        values = tiny_config(
            tmp_path,
            data__path=str(corpus.folder),
            data__sources=[],
            data__views=["view0", "view1"],
            data__tokenizer={"vocab_size": 512},
            **changes,
        )
        return load_config(write_config(tmp_path, values))

    return make


@pytest.fixture
def small_corpus(write_corpus):
    """Return a function that writes a corpus: 40 pairs, a document in pieces that fill rows of 48, and one more pair.

    The longest pair needs 2 * 20 - 10 + 4 + 12 positions.
    """

    def make() -> Corpus:
        rng = np.random.default_rng(0)
        pairs = [
            tuple(rng.integers(5, 500, length).tolist() for length in lengths)
            for lengths in rng.integers(1, 11, (39, 2))
        ]
        document = [([7] * 46, []), ([8] * 46, []), ([9], [])]
        corpus = write_corpus(
            [*pairs, ([5] * 10, [6] * 10), *document, ([5], [6])], continues=[False] * 40 + [True, True, False, False]
        )
        manifest = json.loads((corpus.folder / "manifest.json").read_text())
        manifest["settings"]["data"] |= {"sequence_length": 48, "tokenizer": {"vocab_size": 512}}
        (corpus.folder / "manifest.json").write_text(json.dumps(manifest))
        return Corpus(corpus.folder, "train")

    return make


@pytest.mark.parametrize(
    ("length", "objective", "needed"),
    [(48, PLAIN, None), (48, PREPENDED, None), (47, PLAIN, 48), (46, {"name": "llm_jepa", "distance": "cosine"}, 48)],
)
def test_rows_shorter_than_the_longest_record_are_refused(config, small_corpus, messages, length, objective, needed):
    corpus = small_corpus()
    chosen = config(corpus, data__sequence_length=length, objective=objective)
    if needed is None:
        check(chosen, corpus)
        assert messages == [] or objective is not PLAIN
    else:
        with pytest.raises(
            UserError, match=rf"data.sequence_length is {length}, too short .*the longest needs {needed} positions"
        ):
            check(chosen, corpus)


def test_lengths_are_read_only_if_the_manifest_lacks_the_answer_and_the_read_is_reported(
    config, small_corpus, monkeypatch, messages
):
    monkeypatch.setattr(start_checks, "LENGTHS_AT_ONCE", 10)
    corpus = small_corpus()
    check(config(corpus, data__sequence_length=48, objective={"name": "llm_jepa", "distance": "cosine"}), corpus)
    assert messages == []
    check(config(corpus, data__sequence_length=48, objective=PREPENDED), corpus)
    assert messages == [
        "note: reading the lengths of 44 records, "
        "because the manifest does not show whether all fit data.sequence_length=48"
    ]


def test_pairs_are_found_after_any_number_of_documents_and_missing_pairs_are_an_error(
    config, write_corpus, monkeypatch
):
    monkeypatch.setattr(start_checks, "LENGTHS_AT_ONCE", 10)
    objective = {"name": "llm_jepa", "distance": "cosine"}
    for records, pairs in (([([5], [])] * 50 + [([5], [6])], True), ([([5], [])] * 50, False)):
        corpus = write_corpus(records)
        corpus.manifest["settings"]["data"] |= {"tokenizer": {"vocab_size": 512}}
        if pairs:
            check(config(corpus, objective=objective), corpus)
        else:
            with pytest.raises(UserError, match=r"no record of .* has two views"):
                check(config(corpus, objective=objective), corpus)


def test_rows_of_a_task_may_be_a_source(config, write_corpus, tmp_path, messages):
    corpus = write_corpus([([5], [6])] * 4)
    corpus.manifest["settings"]["data"] |= {"tokenizer": {"vocab_size": 512}}
    (tmp_path / "test.jsonl").write_text('{"view0": "a", "view1": "b"}\n')

    def start(test):
        check(config(corpus, objective=PLAIN, evaluation={"tasks": [{"name": "retrieval", "test": test}]}), corpus)

    start({"type": "hub", "path": "owner/name"})
    start({"type": "json", "path": str(tmp_path / "test.jsonl")})
    # the corpus was not decontaminated against either
    assert [line.split(":")[0] for line in messages] == ["WARNING", "WARNING"]
    assert "owner/name" in messages[0] and "test.jsonl" in messages[1]
    with pytest.raises(UserError, match=r"nowhere\.jsonl"):
        start({"type": "json", "path": str(tmp_path / "nowhere.jsonl")})
    with pytest.raises(UserError, match=r"evaluation.tasks.0.test.path is not set"):
        start({"type": "json"})


def test_an_epoch_is_one_pass_over_the_mixture(tmp_path):
    """Check the budget, the metrics and the plan of a dry run."""
    sources = [
        {"type": "nlrx", "records": 80, "weight": 1.5},
        {"type": "nlrx", "records": 41, "seed": 1, "weight": 0.5},
    ]
    values = tiny_config(tmp_path, data__sources=sources, train__steps=None, train__epochs=2, monitor__loggers=[])
    path = str(write_config(tmp_path, values))
    run_command(["python", "-m", "data_prep", path])
    printed = run_command(["python", "launcher/run.py", path, "--dry-run"]).stdout.splitlines()
    rows = {line.split("  ")[0]: line.split()[-1] for line in printed if "  " in line}
    assert rows["train.epochs"] == "2"
    run_command(["python", "launcher/run.py", path])
    run = tmp_path / "runs" / "run"
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert read_status(run)["status"] == "finished" and last["records"] == 2 * 120 + 41
    assert last["epoch"] == pytest.approx(281 / (120 + 20.5))
    assert 0 <= last["throughput/data_wait_fraction"] <= 1
    assert int(rows["steps, about"]) == pytest.approx(last["step"], abs=1)


CONTRADICTIONS = {
    "data.sources.0.records=500": "data.sources.0.records is 500, but {corpus} was prepared with 600",
    "data.sources.0.seed=1": "data.sources.0.seed is 1, but {corpus} was prepared with 0",
    "data.filters.min_characters=3": "data.filters.min_characters is 3, but {corpus} was prepared with 0",
    "data.deduplicate=exact": "data.deduplicate is exact, but {corpus} was prepared with none",
    "data.tokenizer={path: elsewhere}": "data.tokenizer.vocab_size is None, but {corpus} was prepared with 400",
    "data.tokenizer.model_type=unigram": "data.tokenizer.model_type is unigram, but {corpus} was prepared with None",
    "data.sources.0.views={text: text}": (
        "data.sources.0.views is {{'text': 'text'}}, but {corpus} was prepared with None"
    ),
    "data.on_malformed=drop": "data.on_malformed is drop, but {corpus} was prepared with fail",
    "data.sources=[{type: nlrx, records: 600}]": "data.sources has length 1, but the corpus was prepared from 2",
}
ALLOWED = [
    "data.sources=[]",
    "data.sequence_length=160",
    "data.decontaminate=false",
    "data.workers=2",
    "data.lm_views=last",
    "data.tokenizer.model_type=bpe",
]


def test_a_data_section_that_contradicts_the_corpus_is_refused(tmp_path):
    path = write_config(tmp_path, tiny_config(tmp_path))
    prepare_corpus(path)
    for override, expected in CONTRADICTIONS.items():
        done = run_command(["python", "launcher/run.py", path, override, "--dry-run"], check=False)
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert done.returncode == 2 and len(errors) == 1 and expected.format(corpus=tmp_path / "corpus") in errors[0], (
            done.stderr
        )
        assert "prepare a different data.path" in errors[0]
    run_command(["python", "launcher/run.py", path, *ALLOWED, "--dry-run"])


def test_task_files_that_the_preparation_did_not_decontaminate_against_are_named(tmp_path, messages):
    (tmp_path / "seen.jsonl").write_text('{"text": "a question that is seen", "code": "a"}\n')
    (tmp_path / "new.jsonl").write_text('{"text": "a question that is new", "code": "a"}\n')
    tests = {
        "seen": str(tmp_path / "seen.jsonl"),
        "new": str(tmp_path / "new.jsonl"),
        "hub": {"type": "hub", "path": "nobody/nothing"},
    }

    def warnings(*names: str, **changes) -> list[str]:
        tasks = [{"name": "nl_rx", "label": name, "test": tests[name]} for name in names]
        config = load_config(write_config(tmp_path, tiny_config(tmp_path, evaluation={"tasks": tasks}, **changes)))
        if not (tmp_path / "corpus" / "manifest.json").exists():
            prepare_corpus(tmp_path / "run.yaml")
        messages.clear()
        check(config, Corpus(config.data.path, "train"))
        return [
            line.split(" (task")[0].rsplit(" ", 1)[1] for line in messages if "was not decontaminated against" in line
        ]

    assert warnings("seen") == []
    assert warnings("seen", "new", "hub") == [tests["new"], "nobody/nothing"]
    assert warnings("new", data__decontaminate=False) == []
