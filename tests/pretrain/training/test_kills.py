"""After fifty kills or a hundred damages, a run ends bitwise equal to an undisturbed run."""

import contextlib
import json
import random
import shutil
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest

from pretrain.run_folder import list_steps, read_status, step_name
from pretrain.training.checkpoint import check
from tests.commands import (
    ROOT,
    BackgroundCommand,
    prepare_corpus,
    ranks_command,
    run_command,
    tiny_config,
    write_config,
)
from tests.pretrain.training.checkpoint_equality import assert_same_checkpoints
from tests.processes import TIMEOUT

RECORDING = ROOT / "tests" / "pretrain" / "training" / "recording_run.py"
KILLS, EPOCHS, RECORDS = 50, 20, 600
MOMENTS = ("start-up", "mid-step", "mid-save", "mid-rename", "mid-evaluation")
pytestmark = pytest.mark.slow


def prepare_runs(folder: Path, names: tuple[str, ...], **changes) -> dict[str, tuple[Path, list[str]]]:
    """Prepare the corpus of runs that differ only in their names, and return their folders and commands."""
    found = {}
    for name in names:
        values = tiny_config(
            folder,
            name=name,
            train__steps=None,
            train__epochs=EPOCHS,
            train__micro_batch_rows=2,
            monitor__log_every=1,
            monitor__validate_every=50,
            **changes,
        )
        found[name] = folder / "runs" / name, ranks_command(2, RECORDING, write_config(folder, values))
    prepare_corpus(folder / f"{names[0]}.yaml")
    return found


def evaluation_processes(run_dir: Path) -> list[psutil.Process]:
    """Return the processes of the evaluation job."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if "pretrain.evaluation" in process.cmdline() and str(run_dir) in process.cmdline():
                found.append(process)
    return found


def wait_for_moment(running: BackgroundCommand, moment: str, run_dir: Path, rng: random.Random) -> bool:
    """Wait for the moment or the end of the run, and return whether the moment came."""
    checkpoints, start_time = run_dir / "checkpoints", time.time()

    def appears(file: str) -> bool:
        # older files are left over from the previous kill
        with contextlib.suppress(FileNotFoundError):
            return any(path.stat().st_mtime > start_time for path in checkpoints.glob(f".step-*.tmp/{file}"))
        return False

    steps = len(list_steps(checkpoints))
    newest = (list_steps(checkpoints) or [0])[-1]
    if moment == "start-up":
        time.sleep(rng.uniform(0, 15))
        return True
    has_come = {
        "mid-step": lambda: (list_steps(checkpoints) or [0])[-1] > newest,
        "mid-save": lambda: appears("*.pt"),
        "mid-rename": lambda: appears("manifest.json") or len(list_steps(checkpoints)) != steps,
        "mid-evaluation": lambda: (list_steps(checkpoints) or [0])[-1] > newest and evaluation_processes(run_dir),
    }[moment]
    deadline = time.monotonic() + TIMEOUT
    while not (moment_came := bool(has_come())) and running.process.poll() is None:
        assert time.monotonic() < deadline, running.log.read_text()[-2000:]
        time.sleep(0.001)
    if moment == "mid-step":
        time.sleep(rng.uniform(0, 0.5))
    return moment_came


def test_fifty_kills_change_nothing(tmp_path, capsys):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(
        "".join(
            json.dumps({"text": f"lines with {word}", "code": f".*{word}.*"}) + "\n"
            for word in ("a", "bc", "dog", "truck")
        )
    )
    found = prepare_runs(
        tmp_path,
        ("undisturbed", "killed"),
        checkpoint={"every": 2, "keep": 2},
        evaluation={"every": 40, "tasks": [{"name": "loss", "test": str(pairs)}]},
    )
    (undisturbed, command), (run_dir, killed_command) = found.values()
    run_command(command, timeout=4 * TIMEOUT)
    rng, kills, started = random.Random(4), Counter(), time.monotonic()
    while kills.total() < KILLS:
        moment = MOMENTS[kills.total() % len(MOMENTS)]
        running = BackgroundCommand(killed_command, tmp_path / "killed.log")
        moment_came = wait_for_moment(running, moment, run_dir, rng)
        assert "every checkpoint" not in running.log.read_text() and "damaged" not in running.log.read_text()
        ranks = running.ranks() if running.process.poll() is None else []
        if ranks and moment_came:
            rng.choice(ranks).kill()
            kills[moment] += 1
            if moment == "mid-evaluation":
                for job in evaluation_processes(run_dir):
                    with contextlib.suppress(psutil.Error):
                        job.kill()
            time.sleep(rng.uniform(0, 1))
        elif moment == "start-up":
            kills[moment] += 1  # the kill hits only the launcher
        running.kill()
        with capsys.disabled():
            step = (list_steps(run_dir / "checkpoints") or [0])[-1]
            print(
                f"{time.monotonic() - started:6.0f} s  kill {kills.total():2} {moment:14} newest checkpoint {step}",
                flush=True,
            )
        if read_status(run_dir).get("status") == "finished":
            break
    last = run_command(killed_command, timeout=4 * TIMEOUT)
    assert read_status(run_dir)["status"] == "finished", last.stdout[-2000:]
    assert kills.total() == KILLS, f"the run finished after only {kills}"
    newest = list_steps(undisturbed / "checkpoints")[-1]
    assert_same_checkpoints(*(folder / "checkpoints" / step_name(newest) for folder in (undisturbed, run_dir)))
    assert_every_record_once_per_epoch(tmp_path / "runs" / "killed.records", newest)
    assert comparable_metrics(undisturbed) == comparable_metrics(run_dir)
    expected = [("loss", step) for step in range(40, newest + 1, 40)]
    assert finished_evaluations(undisturbed) == finished_evaluations(run_dir) == expected


def comparable_metrics(run_dir: Path) -> list[dict]:
    """Return the lines of metrics.jsonl without the elapsed time and the throughput."""
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [
        {
            tag: value
            for tag, value in line.items()
            if not tag.startswith(("seconds", "processor_seconds", "throughput"))
        }
        for line in lines
    ]


def finished_evaluations(run_dir: Path) -> list[tuple[str, int]]:
    """Return tasks and steps of the evaluations after the job has handled all requests."""
    deadline = time.monotonic() + TIMEOUT
    while any((run_dir / "checkpoints" / "pins").iterdir()):
        assert time.monotonic() < deadline, (run_dir / "evaluation" / "log.txt").read_text()[-2000:]
        time.sleep(1)
    return sorted(
        (line["task"], line["step"])
        for line in map(json.loads, (run_dir / "evaluation" / "results.jsonl").read_text().splitlines())
    )


def assert_every_record_once_per_epoch(path: Path, steps: int) -> None:
    """Assert that rank 0 wrote every record once per epoch to the file at `path`.

    A step that was repeated after a kill must have read the same records.
    """
    records_of_step: dict[int, list[int]] = {}
    for line in path.read_text().splitlines():
        entry = json.loads(line)
        assert records_of_step.setdefault(entry["step"], entry["records"]) == entry["records"]
    assert sorted(records_of_step) == list(range(1, steps + 1))
    counts = Counter(record for step in range(1, steps + 1) for record in records_of_step[step])
    assert counts == dict.fromkeys(range(RECORDS), EPOCHS)


def test_a_hundred_damages_are_detected_and_never_loaded(tmp_path):
    found = prepare_runs(tmp_path, ("run",), checkpoint={"every": 5, "keep": 3})
    run_dir, command = found["run"]
    run_command(command)
    newest, before = list_steps(run_dir / "checkpoints")[-1], list_steps(run_dir / "checkpoints")[-2]
    checkpoint = run_dir / "checkpoints" / step_name(newest)
    rng, damages = random.Random(5), []
    files = sorted(path.name for path in checkpoint.iterdir())
    for number in range(100):
        damages.append(
            (
                files[number % len(files)],
                ("truncate", "empty", "delete", "flip")[(number // len(files)) % 4],
                rng.random(),
            )
        )
    for file, damage, fraction in damages:
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(checkpoint, copy)
        apply_damage(copy / file, damage, fraction)
        assert check(copy), (file, damage)
    for number, (file, damage, fraction) in enumerate(rng.sample(damages, 5)):
        (run_dir / "status.json").unlink()
        kept = tmp_path / f"kept-{number}"
        shutil.copytree(checkpoint, kept)
        apply_damage(checkpoint / file, damage, fraction)
        done = run_command(command)
        assert f"{step_name(newest)} is corrupt: " in done.stdout and f"resuming from step {before}" in done.stdout
        aside = checkpoint.with_name(f"damaged-{checkpoint.name}")
        assert file in (aside / "damage.txt").read_text()
        assert_same_checkpoints(kept, checkpoint)


def apply_damage(path: Path, damage: str, fraction: float) -> None:
    content = path.read_bytes()
    match damage:
        case "truncate":
            path.write_bytes(content[: int(fraction * (len(content) - 1))])
        case "empty":
            path.write_bytes(b"")
        case "delete":
            path.unlink()
        case "flip":
            index = int(fraction * len(content))
            path.write_bytes(content[:index] + bytes([content[index] ^ 1 << int(8 * fraction)]) + content[index + 1 :])
