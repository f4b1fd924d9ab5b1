"""Invalid tasks are refused before anything is computed."""

import json
import re
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from data_prep.config import JsonSource
from data_prep.utils.console import UserError
from pretrain.config import EvaluationConfig, RunConfig, load_config, parse_task
from pretrain.evaluation.job import choose_tasks
from pretrain.evaluation.task_corpus import prepare_task_corpus
from pretrain.training import main
from tests.commands import prepare_corpus, tiny_config, write_config


@pytest.mark.parametrize(
    "values, message",
    [
        ({"name": "gsm8k"}, "task: the task gsm8k needs test rows; set test"),
        ({"name": "spider", "test": "x"}, "task.databases: Field required"),
        ({"name": "loss", "test": "x", "databases": "y"}, "unknown key 'task.databases'"),
        ({"name": "geometry", "test": "x", "finetune": {"epochs": 1}}, "unknown key 'task.finetune'"),
        ({"name": "yelp", "test": "x", "finetune": {"epochs": 1}}, "set train too"),
        ({"name": "gsm8k", "test": "x", "train": "y"}, "train has no effect on gsm8k without finetune"),
        (
            {"name": "gsm8k", "test": {"type": "hub", "path": "x", "weight": 2}},
            "task.test: weight and split apply to data.sources only",
        ),
        ({"name": "gsm8k", "test": {"type": "text", "path": "x"}}, "'text'"),
        ({"name": "lm_eval"}, "task.harness: Field required"),
        ({"name": "lm_eval", "harness": ["a"], "test": "x"}, "unknown key 'task.test'"),
        ({"name": "nl_rx", "harness": ["a"]}, "unknown key 'task.harness'"),
        ({"name": "nl_rx", "label": "a/b"}, "task.label"),
        ({"name": "nl_rx", "label": "x" * 101}, "at most 100 characters"),
        ({"name": "probe", "test": "x", "column": "a"}, "task.train: Field required"),
        ({"name": "probe", "test": "x", "train": "y"}, "task.column: Field required"),
        ({"name": "geometry", "test": "x", "rows": 1}, "task.rows: the task compares"),
        (
            {"name": "nl_rx", "finetune": {"epoch": 1}},
            "task.finetune: unknown key 'epoch' in train; the nearest known key is 'epochs'",
        ),
        ({"name": "gsm9k", "test": "x"}, "task.name: unknown task 'gsm9k': choose one of"),
        ({}, "task.name: unknown task None: choose one of"),
    ],
)
def test_invalid_options_are_errors(tmp_path, values, message):
    with pytest.raises(UserError, match=re.escape(message)):
        parse_task(values, "task")
    if values:
        with pytest.raises(UserError, match=r"evaluation\.tasks\.0"):
            load_config(write_config(tmp_path, tiny_config(tmp_path, evaluation={"tasks": [values]})))


def test_an_option_of_a_different_task_is_reported(tmp_path):
    values = {"name": "loss", "test": "x", "databases": "y"}
    with pytest.raises(UserError, match=r"evaluation\.tasks\.0\.databases has no effect with loss; remove it"):
        load_config(write_config(tmp_path, tiny_config(tmp_path, evaluation={"tasks": [values]})))


def test_tasks_of_the_same_name_need_labels_and_tasks_check_the_views():
    two = [{"name": "gsm8k", "test": "x"}, {"name": "gsm8k", "test": "y"}]
    with pytest.raises(ValidationError, match="give one of them a label"):
        EvaluationConfig(tasks=two)
    assert [task.title for task in EvaluationConfig(tasks=[two[0], two[1] | {"label": "other"}]).tasks] == [
        "gsm8k",
        "other",
    ]
    for name in ("gsm8k", "retrieval"):
        task = parse_task({"name": name, "test": "x"}, "task")
        task.check_views(("text", "code"))
        with pytest.raises(ValueError, match=f"the task {name} "):
            task.check_views(("text",))
    probe = {"name": "probe", "test": "x", "train": "y", "column": "a"}
    parse_task(probe, "task").check_views(("text",))
    with pytest.raises(ValueError, match=r"the task probe reads the view 'code', but data\.views is \['text'\]"):
        parse_task(probe | {"view": "code"}, "task").check_views(("text",))
    retrieval = {"name": "retrieval", "test": "x"}
    parse_task(retrieval, "task").check_views(("a", "b", "c"))
    parse_task(retrieval | {"target": "in_context"}, "task").check_views(("a", "b"))
    with pytest.raises(ValueError, match="target: in_context needs two views"):
        parse_task(retrieval | {"target": "in_context"}, "task").check_views(("a", "b", "c"))


@pytest.mark.parametrize(
    "key, refused, accepted", [("layout", "independent", "joint"), ("direction", "both", "forward")]
)
def test_retrieval_in_context_needs_an_objective_with_contexts(tmp_path, key, refused, accepted):
    task = {"name": "retrieval", "test": "x", "target": "in_context"}
    for value in (refused, accepted):
        values = tiny_config(tmp_path, evaluation={"tasks": [task]}, objective={"name": "llm_jepa", key: value})
        if value == accepted:
            load_config(write_config(tmp_path, values))
        else:
            with pytest.raises(UserError, match=r"evaluation\.tasks\.0: target: in_context needs an objective with"):
                load_config(write_config(tmp_path, values))


FINETUNINGS = {
    "learning_rate": (
        {"finetune": {"learning_rate": -1, "epochs": 2}},
        "finetune.learning_rate: Input should be greater than 0",
    ),
    "two budgets": ({"finetune": {"epochs": 2, "steps": 5}}, "finetune: the budget must be exactly one of"),
    "no budget": ({"finetune": {"epochs": None}}, "finetune: there is no budget: set one of"),
    "a key of a different schedule": (
        {"finetune": {"decay_fraction": 0.5}},
        "finetune: decay_fraction has an effect with schedule=warmup_stable_decay only",
    ),
    "no number": ({"finetune": {"steps": "five"}}, "finetune.steps: Input should be a valid integer"),
    "rows that do not divide": (
        {"finetune": {"micro_batch_rows": 3}},
        "finetune: global_batch_rows (8) must be a multiple of micro_batch_rows (3)",
    ),
    "misspelt key of the objective": (
        {"finetune": {}, "finetune_objective": {"name": "llm_jepa", "weigth": 1}},
        "finetune_objective: unknown key 'objective.weigth'; the nearest known key is 'objective.weight'",
    ),
    "spans between views apart": (
        {"finetune": {}, "finetune_objective": {"name": "semantic_tube", "form": "views", "layout": "independent"}},
        "finetune_objective.form: views needs two views in one text",
    ),
}
"""Invalid finetuning keys of a task, each with the start of the error message after the key of the task."""


def task_of(folder: Path, changes: dict) -> dict:
    return tiny_config(folder, evaluation={"tasks": [{"name": "loss", "test": "x"}, {"name": "nl_rx"} | changes]})


@pytest.mark.parametrize("mistake", FINETUNINGS)
def test_an_invalid_finetuning_is_refused_with_its_key(tmp_path, mistake):
    changes, expected = FINETUNINGS[mistake]
    with pytest.raises(UserError) as refused:
        load_config(write_config(tmp_path, task_of(tmp_path, changes)))
    assert str(refused.value).startswith(f"evaluation.tasks.1.{expected}")
    config = load_config(write_config(tmp_path, tiny_config(tmp_path)))
    with pytest.raises(UserError) as refused:
        choose_tasks(config, ["nl_rx"], [f"task.{key}={json.dumps(value)}" for key, value in changes.items()])
    assert str(refused.value).startswith(f"task.{expected}")


def test_a_finetuning_inherits_the_other_keys_of_train(tmp_path):
    stable = {"train__schedule": "warmup_stable_decay", "train__decay_fraction": 0.5}

    def load(finetune: dict) -> RunConfig:
        return load_config(
            write_config(
                tmp_path,
                tiny_config(tmp_path, **stable, evaluation={"tasks": [{"name": "nl_rx", "finetune": finetune}]}),
            )
        )

    with pytest.raises(UserError, match=r"evaluation\.tasks\.0\.finetune: decay_fraction has an effect"):
        load({"schedule": "cosine"})
    for finetune in (
        {"schedule": "cosine", "decay_fraction": None},
        {"epochs": 2},
        {"global_batch_rows": 3, "micro_batch_rows": 3},
    ):
        load(finetune)


def test_a_pair_objective_on_documents_is_refused_before_a_corpus_is_prepared(tmp_path):
    tube = {"name": "semantic_tube", "regularizers": [{"name": "vicreg", "weight": 1}]}
    for objective, key in (({"name": "llm_jepa"}, "name"), (tube, "regularizers")):
        values = tiny_config(tmp_path, data__views=["text"], objective=objective)
        with pytest.raises(UserError, match=rf"objective\.{key} needs pairs of views, but data\.views are \['text'\]"):
            load_config(write_config(tmp_path, values))
    with pytest.raises(UserError, match=r"evaluation\.tasks\.0: the task gsm8k needs two views"):
        load_config(
            write_config(
                tmp_path,
                tiny_config(
                    tmp_path,
                    data__views=["text"],
                    objective={"name": "next_token"},
                    evaluation={"tasks": [{"name": "gsm8k", "test": "x"}]},
                ),
            )
        )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    prepare_corpus(write_config(folder, tiny_config(folder)))
    (folder / "rows.jsonl").write_text('{"text": "a", "code": "b"}\n')
    (folder / "empty").mkdir()
    (folder / "blank.jsonl").write_text("\n")
    (folder / "plain.jsonl").write_text("a line\n")
    (folder / "second.jsonl").write_text('{"text": "x", "code": "y"}\n{"text": "x"}\n')
    (folder / "others.jsonl").write_text('{"a": "x", "b": "y"}\n')
    return folder


REQUIREMENTS = {
    "databases": ({"name": "spider", "databases": "FOLDER/nowhere"}, "databases: there is no FOLDER/nowhere"),
    "test": ({"name": "gsm8k", "test": "FOLDER/nowhere"}, "test: there is no file FOLDER/nowhere"),
    "train": ({"name": "gsm8k", "finetune": {}, "train": "FOLDER/nowhere"}, "train: there is no file FOLDER/nowhere"),
    "views": (
        {"name": "gsm8k", "test": {"type": "json", "path": "FOLDER/rows.jsonl", "views": {"question": "text"}}},
        "test.views names ['question'], but data.views are ['text', 'code']",
    ),
    "template": (
        {"name": "gsm8k", "test": {"type": "hub", "path": "x", "views": {"text": "{text", "code": "code"}}},
        "test.views.text: cannot parse the template",
    ),
    "harness": (
        {"name": "lm_eval", "test": None, "harness": ["arc_easy", "FOLDER/mine.yaml"]},
        "harness: there is no file FOLDER/mine.yaml",
    ),
    "lm_eval": (
        {"name": "lm_eval", "test": None, "harness": ["arc_easy"]},
        "name: the task lm_eval needs the package lm_eval",
    ),
    "sklearn": (
        {"name": "probe", "train": "FOLDER/rows.jsonl", "column": "code"},
        "name: the task probe needs the package sklearn",
    ),
    "column": (
        {"name": "probe", "train": "FOLDER/rows.jsonl", "column": "label"},
        "test: row 1 has no label in the column 'label'; add it, remove the row, or choose another column",
    ),
    "peft": (
        {"name": "nl_rx", "finetune": {}, "train": "FOLDER/rows.jsonl", "finetune_lora": {"rank": 2, "alpha": 4}},
        "finetune_lora needs the package peft",
    ),
}
"""Tasks with a missing requirement, each with the start of the error message after the key of the task."""


def refusal(capsys) -> str:
    """Run the command and return its only error line."""
    with pytest.raises(SystemExit) as exit_info:
        main.main()
    assert exit_info.value.code == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    return line


@pytest.mark.parametrize("start", [[], ["--dry-run"]])
@pytest.mark.parametrize("requirement", REQUIREMENTS)
def test_a_task_with_a_missing_requirement_is_refused_at_startup(
    folder, tmp_path, monkeypatch, capsys, requirement, start
):
    """Set None in sys.modules, which makes an installed package unavailable."""
    task, expected = json.loads(json.dumps(REQUIREMENTS[requirement]).replace("FOLDER", str(folder)))
    task = {key: value for key, value in ({"test": str(folder / "rows.jsonl")} | task).items() if value is not None}
    path = write_config(tmp_path, tiny_config(folder, output_dir=str(tmp_path), evaluation={"tasks": [task]}))
    if requirement in ("lm_eval", "peft", "sklearn"):
        monkeypatch.setitem(sys.modules, requirement, None)
    monkeypatch.setattr(sys, "argv", ["run.py", str(path), *start])
    assert refusal(capsys).startswith(f"error: evaluation.tasks.0.{expected}")


UNREADABLE = {
    "no database": (
        {"databases": "FOLDER/empty", "name": "spider"},
        "FOLDER/empty (evaluation.tasks.0.databases) has no database for any row",
    ),
    "no rows": ({"test": "FOLDER/blank.jsonl"}, "evaluation.tasks.0.test: FOLDER/blank.jsonl has no rows"),
    "no JSON": ({"test": "FOLDER/plain.jsonl"}, "FOLDER/plain.jsonl:1: not JSON"),
    "other columns": (
        {"train": "FOLDER/others.jsonl", "finetune": {}},
        "FOLDER/others.jsonl:1: no text for the views text and code; the row has "
        "a, b: if a source of data.sources has these columns, add views: {text: COLUMN, code: COLUMN} to it; otherwise "
        "name the columns of the views in evaluation.tasks.0.train",
    ),
    "a view is missing": (
        {"test": {"type": "json", "path": "FOLDER/others.jsonl", "views": {"text": "a"}}},
        "FOLDER/others.jsonl:1: no text for the view code; the row has a, b",
    ),
    "a later row": (
        {"train": "FOLDER/second.jsonl", "finetune": {}},
        "FOLDER/second.jsonl:2: no text for the view code; the row has text",
    ),
    "no such local data set": (
        {"test": {"type": "hub", "path": "FOLDER/nowhere"}},
        "there is no folder FOLDER/nowhere (evaluation.tasks.0.test.path)",
    ),
    "no such folder": (
        {"test": {"type": "json", "path": "FOLDER/empty"}},
        "FOLDER/empty (evaluation.tasks.0.test.path) holds no file",
    ),
}
"""Rows that an evaluation could not read, each with the start of the error message."""


@pytest.mark.parametrize("start", [[], ["--dry-run"]])
@pytest.mark.parametrize("rows", UNREADABLE)
def test_unreadable_rows_are_refused_at_startup(folder, tmp_path, monkeypatch, capsys, rows, start):
    task, expected = json.loads(json.dumps(UNREADABLE[rows]).replace("FOLDER", str(folder)))
    task = {"name": "gsm8k", "test": str(folder / "rows.jsonl")} | task
    path = write_config(
        tmp_path, tiny_config(folder, output_dir=str(tmp_path), evaluation={"tasks": [task]}, data__decontaminate=False)
    )
    monkeypatch.setattr(sys, "argv", ["run.py", str(path), *start])
    assert refusal(capsys).startswith(f"error: {expected}")


def test_rows_in_every_format_are_accepted_at_startup(folder, tmp_path, monkeypatch, capsys):
    """Accept a mapping, a folder, a local folder as hub source, a glob, and the columns of a public data set."""
    public = tmp_path / "public"
    public.mkdir()
    (public / "test.jsonl").write_text('{"question": "how many?", "answer": "#### 1"}\n')
    mapped = {"text": "question", "code": "answer"}
    tests = [
        {"type": "json", "path": str(public / "test.jsonl"), "views": mapped},
        {"type": "json", "path": str(public)},
        {"type": "hub", "path": str(public), "hub_split": "test"},
        str(public),
        str(public / "*.jsonl"),
        str(public / "test.jsonl"),
    ]
    tasks = [{"name": "gsm8k", "label": f"form{number}", "test": test} for number, test in enumerate(tests)]
    path = write_config(tmp_path, tiny_config(folder, output_dir=str(tmp_path), evaluation={"tasks": tasks}))
    monkeypatch.setattr(sys, "argv", ["run.py", str(path), "--dry-run"])
    main.main()
    assert "next-token targets" in capsys.readouterr().out
    assert [
        [row.views for row in task.first_rows(load_config(path).data, "tasks", "test", None)]
        for task in load_config(path).evaluation.tasks
    ] == [[("how many?", "#### 1")]] * len(tests)


def test_adapters_without_peft_are_refused_at_startup(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "peft", None)
    model = {"init_from": str(folder), "lora": {"rank": 2, "alpha": 4}}
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "run.py",
            str(write_config(tmp_path, tiny_config(folder, output_dir=str(tmp_path), model=model))),
            "--dry-run",
        ],
    )
    with pytest.raises(SystemExit) as exit_info:
        main.main()
    assert exit_info.value.code == 2 and "error: model.lora needs the package peft" in capsys.readouterr().err


def test_the_pairs_of_a_task_may_be_files_of_a_folder(folder, tmp_path):
    """Tasks of the NL-RX grammar and the task loss read their files as a corpus. The other tasks read rows."""
    config: RunConfig = load_config(write_config(folder, tiny_config(folder)))
    run_dir, rows = tmp_path / "run", tmp_path / "rows"
    (run_dir / "evaluation").mkdir(parents=True)
    rows.mkdir()
    (run_dir / "model").symlink_to(folder / "corpus" / "tokenizer")
    for number in range(2):
        (rows / f"{number}.jsonl").write_text(
            json.dumps({"text": f"lines with a {number}", "code": f"a{number}"}) + "\n"
        )
    data = prepare_task_corpus(config, JsonSource(type="json", path=str(rows)), run_dir / "evaluation")
    manifest = json.loads((Path(data.path) / "manifest.json").read_text())
    assert sum(shard["records"] for shard in manifest["splits"]["train"]["shards"]) == 2
