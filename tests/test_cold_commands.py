"""Every command works in a new interpreter. A fork of a process with all imports would hide a missing import."""

import json

import pytest
import yaml

from data_prep.nlrx_grammar import generate
from tests.commands import deepspeed_command, run_command, tiny_config, write_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with pairs, the configuration of a run, and a study that is based on it."""
    folder = tmp_path_factory.mktemp("cold")
    pairs = (generate(0, "test", index) for index in range(20))
    (folder / "pairs.jsonl").write_text(
        "".join(json.dumps({"text": text, "code": code}) + "\n" for text, code in pairs)
    )
    tasks = [{"name": "loss", "test": str(folder / "pairs.jsonl")}]
    write_config(folder, tiny_config(folder, data__views=["text", "code"], evaluation={"tasks": tasks}))
    study = {
        "name": "study",
        "base": "run.yaml",
        "output_dir": str(folder / "studies"),
        "seeds": [1],
        "matched_by": "tokens",
        "baseline": "plain",
        "metric": {"task": "loss", "name": "lm", "higher_is_better": False},
        "arms": {"plain": {"objective.name": "next_token"}, "jepa": {}},
    }
    (folder / "study.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    return folder


def test_all_commands_from_preparation_to_report(folder):
    config, run = folder / "run.yaml", folder / "runs" / "run"

    def run_cold(*command) -> str:
        return run_command(["python", *map(str, command)], cold=True).stdout

    assert "records" in run_cold("-m", "data_prep", config)
    assert run_cold("-m", "data_prep", "verify", folder / "corpus")
    assert "record 0: " in run_cold("-m", "pretrain.data", "inspect", folder / "corpus", 1)
    assert "train: how full packed rows are" in run_cold("-m", "pretrain.data", "stats", folder / "corpus")
    assert "next-token targets" in run_cold("launcher/run.py", config, "--dry-run")
    assert "2 arms x 1 seed = 2 runs" in run_cold("launcher/study.py", folder / "study.yaml", "--dry-run")
    assert "finished at step 4" in run_cold("launcher/run.py", config)
    assert "loss at step 4" in run_command(deepspeed_command(2, "launcher/evaluate.py", run)).stdout
    assert "rows of 32 numbers" in run_cold(
        "launcher/evaluate.py", run / "export" / "step-00000004", "--embed", folder / "pairs.jsonl"
    )
    assert "# run" in run_cold("launcher/report.py", run, "--output", folder / "report")
    assert (folder / "report" / "report.html").exists()
