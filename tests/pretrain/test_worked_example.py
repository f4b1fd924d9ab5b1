"""The worked example of docs/objectives.md: a model trains with the objective that its two files add."""

import json
import re
import shutil

from tests.commands import ROOT, run_command, tiny_config, write_config


def test_the_objective_of_the_documentation_trains(tmp_path):
    config_source, objective_source = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs" / "objectives.md").read_text(), re.DOTALL
    )
    for package in ("data_prep", "pretrain", "launcher"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "pretrain" / "objectives" / "configs" / "huber_jepa.py").write_text(config_source)
    (tmp_path / "pretrain" / "objectives" / "huber_jepa.py").write_text(objective_source)
    objective = {"name": "huber_jepa", "weight": 0.5, "delta": 0.3, "regularizers": [{"name": "vicreg", "weight": 0.1}]}
    config = write_config(tmp_path, tiny_config(tmp_path, objective=objective, train__steps=3, monitor__loggers=[]))
    run_command(["python", "-m", "data_prep", str(config)])
    run_command(["python", str(tmp_path / "launcher" / "run.py"), str(config)], PYTHONPATH=str(tmp_path))
    lines = [json.loads(line) for line in (tmp_path / "runs" / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 3 and all(line["loss/jepa"] > 0 and line["loss/vicreg"] > 0 for line in lines)
    assert lines[-1]["validation/loss/jepa"] > 0
