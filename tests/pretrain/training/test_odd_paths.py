"""Folder names with characters that are special in shells or glob patterns, or that are not ASCII."""

import json
import shutil

from pretrain.run_folder import list_steps, step_name
from tests.commands import ranks_command, run_command, tiny_config, write_config


def test_a_run_in_an_odd_folder_resumes_on_a_different_number_of_ranks_and_is_evaluated(tmp_path):
    home = tmp_path / 'it\'s [a] "b" * ? $HOME `c` (ü) 例 {d} + ^'
    home.mkdir()
    rows = home / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"text": f"lines with {word}", "code": f".*{word}.*"}) + "\n" for word in ("dog", "cat"))
    )
    tasks = [{"name": "geometry", "test": "~/rows.jsonl"}]
    path = write_config(
        home,
        tiny_config(
            home, output_dir="~/runs", data__path="~/corpus", evaluation={"tasks": tasks}, checkpoint={"every": 2}
        ),
    )
    run_command(["python", "-m", "data_prep", path], HOME=str(home))
    run_command(ranks_command(2, "launcher/run.py", path), HOME=str(home))
    run_dir = home / "runs" / "run"
    shutil.rmtree(run_dir / "checkpoints" / step_name(4))
    (run_dir / "status.json").unlink()
    done = run_command(["python", "launcher/run.py", path, "train.micro_batch_rows=8"], HOME=str(home))
    assert "converting it" in done.stdout and "finished at step 4" in done.stdout
    assert list_steps(run_dir / "checkpoints") == [2, 4]
    run_command(["python", "launcher/evaluate.py", str(run_dir)], HOME=str(home))
    assert json.loads((run_dir / "evaluation" / "results.jsonl").read_text())["task"] == "geometry"
    assert not (tmp_path / "~").exists()
