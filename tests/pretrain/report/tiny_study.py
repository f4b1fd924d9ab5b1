"""Studies of tiny runs, and copies of runs with different results."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import yaml

from data_prep.utils.files import read_json_lines

SEEDS = (1, 2)
ARMS = {
    "next_token": {"objective": {"name": "next_token"}},
    "llm_jepa": {"objective": {"name": "llm_jepa", "distance": "info_nce", "weight": 0.5}},
}
ROWS = 12


def write_study(folder: Path, arms: dict[str, dict[int, str]], name: str = "tiny") -> None:
    """Write study.json for runs whose paths are relative to its folder."""
    (folder / "study.json").write_text(
        json.dumps(
            {
                "name": name,
                "matched_by": "tokens",
                "baseline": next(iter(arms)),
                "metric": {"task": "nl_rx", "name": "exact", "higher_is_better": True},
                "arms": {
                    arm: {"overrides": {}, "runs": {str(seed): path for seed, path in runs.items()}}
                    for arm, runs in arms.items()
                },
            }
        )
    )


def copy_run(source: Path, target: Path, seed: int, exact: float) -> None:
    """Copy a run without its weights, and replace its seed and result."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("checkpoints", "export", "model", "logs", ".lock"))
    config = yaml.safe_load((target / "config.yaml").read_text()) | {"seed": seed, "name": target.name}
    (target / "config.yaml").write_text(yaml.safe_dump(config))
    change_lines(target / "evaluation" / "results.jsonl", lambda line: line["metrics"].update(exact=exact))


def change_lines(path: Path, change: Callable[[dict], None]) -> None:
    """Change each line of a JSON lines file."""
    lines = read_json_lines(path)
    for line in lines:
        change(line)
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
