"""The configurations for GPU clusters train with a small shape on two CPU ranks.

Local data sets replace the data sets of the Hugging Face hub.
"""

import json

import pytest
import yaml
from datasets import Dataset

from data_prep.nlrx_grammar import generate
from tests.commands import ROOT, ranks_command, run_command

NAMES = ("llama_1b_pairs", "llama_8b_pairs")
COLUMNS = (
    ("func_documentation_string", "func_code_string"),
    ("sql_prompt", "sql"),
    ("anchor", "positive"),
    ("text", "text"),
)
"""Columns of each source for the context view and the target view."""
SMALL = [
    "model.shape.hidden_size=64",
    "model.shape.intermediate_size=128",
    "model.shape.num_hidden_layers=2",
    "model.shape.num_attention_heads=4",
    "model.shape.num_key_value_heads=2",
    "model.shape.head_dim=16",
    "data.sequence_length=256",
    "data.tokenizer.vocab_size=400",
    "data.workers=1",
    "train.tokens=null",
    "train.steps=3",
    "train.global_batch_rows=8",
    "train.micro_batch_rows=2",
    "train.compile=false",
    "data.validation_fraction=0.05",
    "checkpoint.every=3",
    "monitor.log_every=1",
]


@pytest.fixture(scope="module")
def local_data_sets(tmp_path_factory) -> list[str]:
    """Write local data sets with the columns of the ones on the hub, and return overrides that select them."""
    folder = tmp_path_factory.mktemp("stand-ins")
    overrides = [f"data.path={folder / 'corpus'}", f"output_dir={folder / 'runs'}"]
    for number, (context, target) in enumerate(COLUMNS):
        rows = [generate(number, "train", index) for index in range(300)]
        columns = {
            context: [row[0] for row in rows],
            target: [row[1] for row in rows],
            "sql_context": ["CREATE TABLE t (a INT)"] * len(rows),
        }
        if context == "text":
            columns["text"] = [" ".join(row[0] for row in rows[first : first + 40]) for first in range(len(rows))]
        Dataset.from_dict(columns).save_to_disk(folder / str(number))
        overrides += [f"data.sources.{number}.path={folder / str(number)}", f"data.sources.{number}.config=null"]
    run_command(["python", "-m", "data_prep", ROOT / "configs" / f"{NAMES[0]}.yaml", *overrides, *SMALL])
    return overrides


@pytest.mark.parametrize("name", NAMES)
def test_a_configuration_trains_on_two_ranks_in_bf16(local_data_sets, name):
    config = ROOT / "configs" / f"{name}.yaml"
    run_command(ranks_command(2, "launcher/run.py", config, f"name={name}", *local_data_sets, *SMALL))
    run_dir = ROOT / local_data_sets[1].removeprefix("output_dir=") / name
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 3 and lines[-1]["loss/lm"] < lines[0]["loss/lm"] and all("loss/jepa" in line for line in lines)
    resolved = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert resolved["train"]["precision"] == "bf16"
    assert (
        resolved["deepspeed"]["zero_optimization"]
        == yaml.safe_load(config.read_text())["deepspeed"]["zero_optimization"]
    )


@pytest.mark.parametrize("name", NAMES)
def test_docs_show_the_plan_of_an_unchanged_configuration(tmp_path, name):
    """Check that docs/cluster.md shows the plan for 1, 8 and 64 ranks, which needs no corpus."""
    done = run_command(
        [
            "python",
            "launcher/run.py",
            ROOT / "configs" / f"{name}.yaml",
            "--dry-run",
            f"data.path={tmp_path / 'corpus'}",
        ]
    )
    assert "micro steps per rank (64 ranks)" in done.stdout
    printed = done.stdout[done.stdout.index("model states of a rank") :].split("\n\n")[0]
    assert printed in (ROOT / "docs" / "cluster.md").read_text()
