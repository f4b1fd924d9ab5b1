"""Tasks with generated answers or likelihoods: gold, empty and shuffled answers, on real data and small files."""

from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM

from data_prep.config import JsonSource
from data_prep.make_tokenizer import train
from data_prep.nlrx_grammar import generate
from data_prep.shards import read_manifest
from data_prep.task_rows import Row, read_rows
from data_prep.tasks import public_row_format
from data_prep.utils.console import UserError
from data_prep.utils.files import write_json
from pretrain.config import load_config, parse_task
from pretrain.data.corpus import corpus_identity
from pretrain.evaluation.task_run import CheckpointTask
from pretrain.models.language_model import build_model_config
from pretrain.tasks import gsm8k, hellaswag, labels, nq_open, rotten_tomatoes, yelp
from pretrain.tasks.scoring import Answer, count_too_long_options
from tests.commands import TINY_SHAPE, tiny_config, write_config
from tests.pretrain.tasks.shared_data import VIEWS, empty_answers, gold_answers, real_rows, rotated, write_rows


def rows_of(tmp_path, rows, task):
    return read_rows(
        JsonSource(type="json", path=str(write_rows(tmp_path / "test.jsonl", rows))),
        VIEWS,
        "task.test",
        row_format=public_row_format(task),
    )


@pytest.mark.parametrize(
    "text, number",
    [
        ("so\n#### 18", "18"),
        ("#### 1,450,000", "1450000"),
        ("#### $18.00 a day", "18"),
        ("####-3", "-3"),
        ("#### -$3", "-3"),
        ("#### .5", "0.5"),
        ("#### 1\nno\n#### 2", "2"),
        ("#### +7 apples.", "7"),
        ("#### −7", "-7"),
        ("#### **18**", "18"),
        ("#### 1/2", None),
        ("#### 1e3", None),
        ("#### 1 000", None),
        ("#### 18.5.3", None),
        ("#### 1,2,3", None),
        ("#### 18-20", None),
        ("#### 3*4", None),
        ("#### 1_000", None),
        ("#### 0x12", None),
        ("#### 18 / 2", None),
        ("#### 18\n2 apples are left", "18"),
        ("#### 18 \r\n3. Next", "18"),
        ("#### 18\n- 2 pears", "18"),
        ("#### 18\n\n7", "18"),
        ("18", None),
        ("####", None),
        ("#### eighteen", None),
        ("", None),
    ],
)
def test_the_final_number_follows_the_last_mark(text, number):
    found = gsm8k.final_number(text)
    assert found is None if number is None else found == gsm8k.Decimal(number)


def check_gsm8k(targets):
    metrics, counts = gsm8k.score(targets, gold_answers(targets))
    assert set(metrics.values()) == {1.0} and counts == {"failed_gold": 0}
    assert gsm8k.score(targets, empty_answers(targets))[0] == {"final": 0, "final_any": 0, "answered": 0, "stopped": 1}
    finals = [target.split("####")[-1].strip().replace(",", "") for target in targets]
    equal = sum(map(str.__eq__, finals, rotated(finals))) / len(finals)
    metrics, _ = gsm8k.score(targets, gold_answers(rotated(targets)))
    assert metrics["final"] == metrics["final_any"] == pytest.approx(equal) and equal < 0.5


def test_gsm8k_on_rows_in_the_format_of_the_hub(tmp_path):
    rows = [
        {"question": f"{number} + 1?", "answer": f"That is {number + 1}.\n#### {number % 4 + 1:,}"}
        for number in range(9)
    ]
    found = rows_of(tmp_path, rows, "gsm8k")
    assert found[3].views == ("3 + 1?", "That is 4.\n#### 4")
    check_gsm8k([row.target for row in found])
    assert gsm8k.score(["#### 18"], [Answer("#### 18 and on and on", False)])[0] == {
        "final": 0,
        "final_any": 1,
        "answered": 1,
        "stopped": 0,
    }


def test_gsm8k_on_the_real_test_rows():
    check_gsm8k([row.target for row in real_rows("gsm8k/test.jsonl")])


def test_labels_in_columns_named_like_the_views_are_converted_as_in_public_rows(tmp_path):
    for task, expected in (("yelp", ["1", "5"]), ("rotten_tomatoes", ["Bad", "Good"])):
        rows = [{"text": "fine", "label": 0}, {"text": "poor", "label": 4 if task == "yelp" else 1}]
        source = JsonSource(type="json", path=str(write_rows(tmp_path / "test.jsonl", rows)))
        assert [
            row.target for row in read_rows(source, ("text", "label"), "task.test", row_format=public_row_format(task))
        ] == expected


@pytest.mark.parametrize("question", [" ", "half \ud83d pair"])
def test_text_of_public_rows_is_checked_as_in_other_rows(tmp_path, question):
    with pytest.raises(
        UserError, match=r"test.jsonl:1: .*in the format of the public data set, with the columns answer, question"
    ):
        rows_of(tmp_path, [{"question": question, "answer": "#### 1"}], "gsm8k")


def check_labels(targets):
    names = sorted(set(targets))
    certain = [[0.0 if name == target else -9.0 for name in names] for target in targets]
    undecided = [[-1.0] * len(names)] * len(targets)
    metrics = labels.score(targets, names, certain, gold_answers(targets))
    assert metrics.pop("majority") <= 1 and set(metrics.values()) == {1}
    metrics = labels.score(targets, names, undecided, empty_answers(targets))
    assert metrics["likelihood"] == metrics["generation"] == metrics["prefix"] == 0
    metrics = labels.score(targets, names, certain, [Answer(target, False) for target in targets])
    assert (metrics["generation"], metrics["prefix"], metrics["stopped"]) == (0, 1, 0)
    equal = sum(map(str.__eq__, targets, rotated(targets))) / len(targets)
    metrics = labels.score(targets, names, rotated(certain), gold_answers(rotated(targets)))
    assert metrics["likelihood"] == metrics["generation"] == metrics["prefix"] == pytest.approx(equal)
    return metrics["majority"]


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    """Return the export of an untrained model."""
    folder = tmp_path_factory.mktemp("export")
    tokenizer = train([" ".join(pair) for pair in map(partial(generate, 0, "test"), range(60))], 330, folder)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(build_model_config("llama", TINY_SHAPE, tokenizer, 96)).save_pretrained(folder)
    return folder


def evaluate_task(task, export, folder, **settings):
    """Return the result of a task on files of `test` and `train` rows, limited to `rows` test rows."""
    paths = {name: str(write_rows(folder / f"{name}.jsonl", rows)) for name, rows in settings.items() if name != "rows"}
    config = load_config(write_config(folder, tiny_config(folder)))
    options = parse_task({"name": task.__name__.rpartition(".")[2], "rows": settings.get("rows")} | paths, "task")
    return task.evaluate(CheckpointTask(config, options, 1, export, folder))


REVIEWS = [{"text": f"lines {number}", "label": label} for number, label in enumerate([1] * 20 + [0])]


def test_candidate_labels_do_not_depend_on_the_limit_of_rows(export, tmp_path, messages):
    for test, warnings in ((REVIEWS[:20], 0), (REVIEWS, 1)):
        few = evaluate_task(rotten_tomatoes, export, tmp_path, test=test, rows=20)
        assert sum("lack 1 of the labels of the file" in message for message in messages) == warnings
        assert (few.rows, few.counts["labels"], few.metrics["majority"]) == (20, 2, 1)
    assert evaluate_task(rotten_tomatoes, export, tmp_path, test=REVIEWS).metrics["likelihood"] < 1, (
        "an untrained model does not know the labels"
    )
    third = [*REVIEWS[:2], {"text": "lines", "code": "Neutral"}]
    assert evaluate_task(rotten_tomatoes, export, tmp_path, test=third, rows=2).counts["labels"] == 3
    assert evaluate_task(yelp, export, tmp_path, test=REVIEWS[:3], rows=2).counts["labels"] == 5


def test_custom_labels_come_from_all_rows_of_the_test_and_train_files(export, tmp_path):
    words = [
        {"text": f"lines {number}", "code": word} for number, word in enumerate(["good", "good", "bad", "neither"])
    ]
    assert evaluate_task(rotten_tomatoes, export, tmp_path, test=words, rows=2).counts["labels"] == 3
    with_train = evaluate_task(rotten_tomatoes, export, tmp_path, test=words[:2], train=words[3:])
    assert with_train.counts["labels"] == 2


def test_a_single_option_cannot_be_scored(export, tmp_path):
    words = [{"text": f"lines {number}", "code": "good"} for number in range(3)]
    with pytest.raises(UserError, match=r"task\.test: every row has the same target 'good'"):
        evaluate_task(rotten_tomatoes, export, tmp_path, test=words)
    with pytest.raises(UserError, match=r"task\.test: row 1 has fewer than two endings"):
        evaluate_task(hellaswag, export, tmp_path, test=[{"ctx": "A man", "endings": ["runs."], "label": 0}])


def test_unseen_refers_only_to_the_corpus_of_the_run(prepared, tmp_path, messages):
    seen, new = generate(0, "train", 3), generate(0, "test", 0)
    rows = write_rows(tmp_path / "rows.jsonl", [dict(zip(VIEWS, pair, strict=True)) for pair in (seen, new)])
    config = load_config(write_config(tmp_path, tiny_config(tmp_path, data__path=str(prepared))))
    run = CheckpointTask(
        config, parse_task({"name": "nl_rx", "test": str(rows)}, "task"), 1, tmp_path, tmp_path / "run" / "evaluation"
    )
    (tmp_path / "run").mkdir()
    environment = {"data": corpus_identity(read_manifest(prepared))}
    for recorded in ({}, environment):  # a run of a version that recorded no corpus, and a run on this corpus
        write_json(tmp_path / "run" / "environment.json", recorded)
        assert run.unseen(run.read_test()) == [False, True]
    environment["data"]["corpus"]["train"]["sha256"] = "0" * 64
    write_json(tmp_path / "run" / "environment.json", environment)
    messages.clear()
    assert run.unseen(run.read_test()) is None
    (message,) = messages
    assert f"{prepared} (data.path) is not the corpus that the run was trained on" in message


def test_labels_in_the_format_of_the_hub(tmp_path):
    rows = [{"text": "fine", "label": 1}, {"text": "poor", "label": 0}, {"text": "great", "label": 1}]
    found = rows_of(tmp_path, rows, "rotten_tomatoes")
    assert [row.target for row in found] == ["Good", "Bad", "Good"] and check_labels(
        [row.target for row in found]
    ) == 2 / 3
    found = rows_of(tmp_path, [{"label": stars, "text": "..."} for stars in (0, 4, 4, 2)], "yelp")
    assert [row.target for row in found] == ["1", "5", "5", "3"] and check_labels(
        [row.target for row in found]
    ) == 1 / 2
    for task, label in (("rotten_tomatoes", -1), ("rotten_tomatoes", 2), ("yelp", 5), ("yelp", 2.7), ("yelp", True)):
        with pytest.raises(UserError, match=rf"test.jsonl:1: .*the label {label} is not a number from 0 to"):
            rows_of(tmp_path, [{"text": "?", "label": label}], task)


@pytest.mark.parametrize(
    "task, row",
    [
        ("gsm8k", {"question": "q", "answer": ["5"]}),
        ("gsm8k", {"question": "q", "answer": ""}),
        ("nq_open", {"question": "q", "answer": ["5", 5]}),
        ("spider", {"db_id": "a", "question": "q", "query": None}),
        ("hellaswag", {"ctx": "c", "endings": ["a", "b"], "label": -1}),
        ("hellaswag", {"ctx": "c", "endings": ["a", 2], "label": 0}),
        ("hellaswag", {"ctx": "c", "endings": "ab", "label": 0}),
    ],
)
def test_columns_without_text_are_reported_with_their_line(tmp_path, task, row):
    with pytest.raises(UserError, match=r"test.jsonl:1: .*in the format of the public data set"):
        rows_of(tmp_path, [row], task)


def test_options_that_do_not_fit_are_wrong_and_counted():
    infinite = float("-inf")
    assert hellaswag.score([0], [["a", "b"]], [[-5.0, infinite]]) == {"normalised": 0, "likelihood": 0}
    assert labels.score(["Good"], ["Bad", "Good"], [[infinite, -5.0]], gold_answers(["Good"]))["likelihood"] == 0
    assert (
        count_too_long_options([[-5.0, infinite], [-1.0, -2.0]]) == {"too_long": 1}
        and count_too_long_options([[-1.0]]) == {}
    )


def test_rotten_tomatoes_on_the_real_test_rows():
    assert check_labels([row.target for row in real_rows("rotten_tomatoes/test.jsonl")]) == pytest.approx(0.5)


def test_nq_open_accepts_any_right_answer_but_no_empty_answer(tmp_path):
    rows = [
        {"question": "who wrote it", "answer": ["The Beatles", "Lennon"]},
        {"question": "which letter", "answer": ["A", "the letter a"]},
        {"question": "when", "answer": ["June 5, 1998"]},
        {"question": "when then", "answer": ["June 5, 1998"]},
    ]
    found = rows_of(tmp_path, rows, "nq_open")
    assert found[0].views == ("who wrote it", "The Beatles")
    right = [nq_open.correct_answers(row) for row in found]
    assert nq_open.score(right, gold_answers([answers[0] for answers in right])) == {
        "exact": 1,
        "contains": 1,
        "stopped": 1,
    }
    assert nq_open.score(right, gold_answers([answers[-1].upper() + "." for answers in right]))["exact"] == 1
    assert nq_open.correct_answers(Row(("which", "one"), {"messages": [], "answer": [1, 2]})) == ["one"]
    for nothing in ("", " ", "the", "."):
        assert nq_open.score(right, gold_answers([nothing] * 4)) == {"exact": 0, "contains": 0, "stopped": 1}
    assert nq_open.score(right, gold_answers(rotated([answers[0] for answers in right])))["exact"] == 1 / 4
    assert nq_open.score([["Lennon"]] * 2, [Answer("It was Lennon!", True), Answer("Lennon", False)]) == {
        "exact": 0,
        "contains": 1,
        "stopped": 1 / 2,
    }


def test_hellaswag_normalizes_by_length_and_scores_a_tie_as_wrong(tmp_path):
    rows = [
        {"ctx": "A man", "endings": ["runs.", "is a very long way of saying it.", "c", "d"], "label": label}
        for label in ("0", "1", 2, "3", "3")
    ]
    found = rows_of(tmp_path, rows, "hellaswag")
    assert [row.target for row in found] == ["runs.", "is a very long way of saying it.", "c", "d", "d"]
    numbers, endings = [int(row.columns["label"]) for row in found], [row.columns["endings"] for row in found]
    certain = [[-1.0 if place == number else -1000.0 for place in range(4)] for number in numbers]
    assert hellaswag.score(numbers, endings, certain) == {"normalised": 1, "likelihood": 1}
    assert hellaswag.score(numbers, [["same"] * 4] * 5, [[-3.0] * 4] * 5) == {"normalised": 0, "likelihood": 0}
    assert hellaswag.score(numbers, endings, rotated(certain)) == {"normalised": 1 / 5, "likelihood": 1 / 5}
    assert hellaswag.score([1], endings[:1], [[-6.0, -20.0, -9.0, -9.0]]) == {"normalised": 1, "likelihood": 0}
    with pytest.raises(UserError, match=r"test.jsonl:1: .*in the format of the public data set"):
        rows_of(tmp_path, [{"ctx": "A man", "endings": ["a", "b"], "label": ""}], "hellaswag")


def test_spider_in_the_format_of_the_hub(tmp_path):
    found = rows_of(
        tmp_path, [{"db_id": "shop", "question": "how many", "query": "SELECT 1", "query_toks": []}], "spider"
    )
    assert found[0].views == ("For db_id:[shop]\n\nhow many", "SELECT 1")
