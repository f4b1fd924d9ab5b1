"""A study that is killed, restarted and changed by its user. Each run is trained and evaluated once."""

import json
import shutil
import signal
import sys

import psutil
import pytest
import yaml

from pretrain.report.cost import flops_per_token
from pretrain.report.runs import read_run
from pretrain.run_folder import read_metrics, read_status
from pretrain.studies.calibration import ROUNDS
from pretrain.studies.runner import EXIT_CODE_STOPPED, run_environments
from tests.commands import ROOT, BackgroundCommand, read_complete_lines, run_command
from tests.pretrain.studies.conftest import STEPS
from tests.pretrain.training.pause_points import release_file
from tests.processes import TIMEOUT, wait_for

STUDY = ["python", "launcher/study.py"]
WAIT = 12


@pytest.fixture
def start():
    """Yield a function that starts a study in the background. Studies still running after the test are killed."""
    started = []

    def run(path, log, **environment):
        started.append(BackgroundCommand([*STUDY, str(path)], log, **environment))
        return started[-1]

    yield run
    for running in started:
        if running.process.poll() is None:
            running.kill()


def results(run_dir):
    return read_complete_lines(run_dir / "evaluation" / "results.jsonl")


@pytest.fixture
def hold(folder):
    """Return a function that makes a PYTHONPATH.

    The runs of the given names wait in step WAIT until they are released or receive a signal.
    """

    def python_path(*names):
        modules = folder / f"waiting-{names[0]}"
        modules.mkdir(exist_ok=True)
        configs = tuple(f"/{name}.yaml" for name in names)
        (modules / "sitecustomize.py").write_text(f"""
import sys
from pathlib import Path

if sys.orig_argv[-1].endswith({configs!r}) and "launcher/run.py" in " ".join(sys.orig_argv):
    from tests.pretrain.training.pause_points import hold_steps
    hold_steps(Path(sys.orig_argv[-1]), [{WAIT}])
""")
        return f"{modules}:{ROOT}"

    return python_path


@pytest.fixture
def waiting(hold):
    """Return a function that makes a `launch` command for a study, one run of which waits; see `hold`."""
    return lambda name: f"env PYTHONPATH={hold(name)} {sys.executable}"


def has_logged_steps(run_dir):
    return lambda: len(read_metrics(run_dir)) > 2


def processes_of(folder):
    """Return the living processes with the folder of the study in their command line."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        if process.info["status"] != psutil.STATUS_ZOMBIE and any(
            str(folder) in word for word in process.info["cmdline"] or []
        ):
            found.append(process)
    return found


def test_a_killed_study_resumes_without_repeating_work(start, write_study, waiting, folder):
    path, study = write_study(launch=waiting("jepa-seed1")), folder / "studies" / "two"
    plain, jepa = study / "plain-seed1", study / "jepa-seed1"
    shown = run_command([*STUDY, str(path), "--dry-run"]).stdout
    assert "2 arms x 1 seed = 2 runs, matched by tokens" in shown and not study.exists()

    first = start(path, folder / "first.log")
    first.wait_until((study / "configs").exists, "the first run")
    second = run_command([*STUDY, str(path)], check=False)
    assert second.returncode == 2 and second.stderr.startswith("error: this study is already running in "), (
        second.stderr
    )
    first.wait_until(has_logged_steps(jepa), "steps of the second run")
    first.process.kill()
    release_file(study / "configs" / "jepa-seed1.yaml", WAIT).touch()
    wait_for(lambda: not processes_of(study))
    assert read_status(jepa)["status"] == "resumable" and read_status(plain)["status"] == "finished"
    before, reached = (plain / "metrics.jsonl").read_bytes(), read_status(jepa)["step"]
    assert 0 < reached < STEPS and len(results(plain)) == 1 and not results(jepa)

    resumed = run_command([*STUDY, str(path)], cold=True).stdout
    assert "plain-seed1 done" not in resumed and "[2/2] jepa-seed1 done" in resumed
    assert f"resuming from step {reached}" in (study / "logs" / "jepa-seed1.log").read_text()
    assert (plain / "metrics.jsonl").read_bytes() == before
    assert [len(results(run_dir)) for run_dir in (plain, jepa)] == [1, 1]
    record = json.loads((study / "study.json").read_text())
    assert {key: record[key] for key in ("name", "matched_by", "baseline", "metric")} == {
        "name": "two",
        "matched_by": "tokens",
        "baseline": "plain",
        "metric": {"task": "loss", "name": "lm", "higher_is_better": False},
    }
    assert {arm: (entry["overrides"], entry["runs"]) for arm, entry in record["arms"].items()} == {
        "plain": ({"objective.name": "next_token"}, {"1": "plain-seed1"}),
        "jepa": ({}, {"1": "jepa-seed1"}),
    }
    tokens = [read_metrics(run_dir)[-1]["tokens"] for run_dir in (plain, jepa)]
    assert tokens[0] == pytest.approx(tokens[1], rel=1.5 / STEPS)
    for arm, run_dir in (("plain", plain), ("jepa", jepa)):
        assert record["arms"][arm]["flops_per_token"] == flops_per_token(read_run(run_dir))

    wrong = run_command([*STUDY, str(path), "metric.name=ml"], check=False)
    assert wrong.returncode == 2 and "metric.name is 'ml', but the task loss reports lm, jepa" in wrong.stderr, (
        wrong.stderr
    )
    assert json.loads((study / "study.json").read_text()) == record

    elsewhere = folder / "elsewhere" / "two"
    shutil.copytree(study / "records", elsewhere / "records")
    shutil.copy(study / "study.json", elsewhere)
    moved = run_command([*STUDY, str(path), f"output_dir={elsewhere.parent}"]).stdout
    assert " done in " not in moved and "jepa      1" in moved and not (elsewhere / "jepa-seed1").exists()


def test_runs_at_the_same_time_all_save_when_the_study_stops(start, write_study, hold, folder):
    path, study = write_study(name="parallel", parallel_runs=2, seeds=[1, 2]), folder / "studies" / "parallel"
    run_dirs = [study / f"{arm}-seed1" for arm in ("plain", "jepa")]
    names = [run_dir.name for run_dir in run_dirs]
    first = start(path, folder / "parallel.log", PYTHONPATH=hold(*names))
    for run_dir in run_dirs:  # each waits for its release, so both are running
        first.wait_until(has_logged_steps(run_dir), f"steps of {run_dir.name}")
    first.process.send_signal(signal.SIGTERM)
    for name in names:
        release_file(study / "configs" / f"{name}.yaml", WAIT).touch()
    assert first.end() == EXIT_CODE_STOPPED
    assert first.log.read_text().count("stopped by SIGTERM; run the same command to resume") == 1
    assert not processes_of(study) and not list(study.glob("*-seed2"))
    assert {read_status(run_dir)["status"] for run_dir in run_dirs} == {"resumable"}

    done = run_command([*STUDY, str(path)]).stdout
    assert done.count(" done in ") == 4 and done.index("[1/4]") < done.index("[3/4]")
    assert all(len(results(study / f"{arm}-seed{seed}")) == 1 for arm in ("plain", "jepa") for seed in (1, 2))
    assert json.loads((study / "study.json").read_text())["wall_seconds"].keys() == {
        *names,
        "plain-seed2",
        "jepa-seed2",
    }


@pytest.mark.parametrize(
    "count, gpus, visible, threads, expected",
    [
        (1, 4, None, None, [{}]),
        (3, 2, None, None, [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in "010"]),
        (2, 2, "5,7", None, [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in "57"]),
        (2, 0, None, None, [{"OMP_NUM_THREADS": "3"}] * 2),
        (100, 0, None, None, [{"OMP_NUM_THREADS": "1"}] * 100),
        (2, 0, None, "1", [{"OMP_NUM_THREADS": "1"}] * 2),
    ],
)
def test_runs_at_the_same_time_share_gpus_or_cores(monkeypatch, count, gpus, visible, threads, expected):
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(7)))
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    for name, value in {"CUDA_VISIBLE_DEVICES": visible, "OMP_NUM_THREADS": threads}.items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    assert run_environments(count) == expected
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")  # GPUs are not used
    assert not any("CUDA_VISIBLE_DEVICES" in variables for variables in run_environments(count))


@pytest.mark.slow
def test_ctrl_c_saves_and_a_restart_completes_the_study_although_one_arm_fails(start, write_study, waiting, folder):
    arms = {"plain": {"objective.name": "next_token"}, "broken": {"model.attention": "flex_attention"}, "jepa": {}}
    path, study = (
        write_study(name="three", seeds=[1, 2], arms=arms, launch=waiting("plain-seed1")),
        folder / "studies" / "three",
    )
    first = start(path, folder / "interrupted.log")
    first.wait_until(has_logged_steps(study / "plain-seed1"), "steps of the first run")
    first.process.send_signal(signal.SIGINT)
    release_file(study / "configs" / "plain-seed1.yaml", WAIT).touch()
    assert (
        first.end() == EXIT_CODE_STOPPED
        and "stopped by SIGINT; run the same command to resume" in first.log.read_text()
    )
    assert read_status(study / "plain-seed1")["status"] == "resumable" and not processes_of(study)

    done = run_command([*STUDY, str(path)], check=False)
    assert done.returncode == 1 and done.stdout.count(" FAILED: training ended with exit code") == 2, done.stdout
    assert all(len(results(study / f"{arm}-seed{seed}")) == 1 for arm in ("plain", "jepa") for seed in (1, 2))
    changed = run_command(
        [*STUDY, str(write_study(name="three", seeds=[1, 2], arms=arms | {"jepa": {"objective.weight": 0.25}}))],
        check=False,
    )
    assert (
        changed.returncode == 2
        and "objective.weight (0.5, now 0.25)" in changed.stderr
        and changed.stderr.count("\n") == 1
    ), changed.stderr
    less = run_command(
        [*STUDY, str(write_study(name="three", seeds=[1, 2], arms={arm: arms[arm] for arm in ("plain", "jepa")}))]
    )
    assert " done in " not in less.stdout and "its output" not in less.stdout
    base = yaml.safe_load((folder / "base.yaml").read_text())
    base["evaluation"]["tasks"].append(base["evaluation"]["tasks"][0] | {"label": "again"})
    (folder / "base.yaml").write_text(yaml.safe_dump(base))
    more = run_command(
        [*STUDY, str(write_study(name="three", seeds=[1, 2], arms={arm: arms[arm] for arm in ("plain", "jepa")}))]
    )
    assert more.stdout.count(" done in ") == 4
    for run_dir in (study / f"{arm}-seed{seed}" for arm in ("plain", "jepa") for seed in (1, 2)):
        assert [result["task"] for result in results(run_dir)] == ["loss", "again"]


@pytest.mark.slow
def test_matched_by_seconds_on_two_ranks(write_study, folder):
    """The steps of the wide arm need more processor time, so it gets fewer tokens in about the same time."""
    arms = {
        "plain": {"objective.name": "next_token"},
        "wide": {"model.shape.hidden_size": 128, "model.shape.intermediate_size": 512},
    }
    path = write_study(
        name="seconds", matched_by="seconds", arms=arms, launch="deepspeed --num_gpus 2 --master_port 29873"
    )
    output = run_command([*STUDY, str(path)], timeout=4 * TIMEOUT).stdout
    assert output.count("speed, of plain") == 2 and "processor seconds" in output
    study = folder / "studies" / "seconds"
    record = json.loads((study / "study.json").read_text())
    entry = record["calibration"]["wide"]
    pairs = list(zip(entry["baseline_seconds_per_token"], entry["seconds_per_token"], strict=True))
    assert record["calibration"].keys() == {"wide"} and entry["unit"] == "processor seconds" and len(pairs) == ROUNDS
    ratio = entry["speed_ratio"]
    assert ratio["high"] < 1 and ratio["median"] == pytest.approx(sorted(one / other for one, other in pairs)[1])
    runs = {path.name for path in (study / "calibration").iterdir() if path.name != "configs"}
    assert runs == {f"{arm}-round{number}" for arm in arms for number in range(1, ROUNDS + 1)}
    last = {arm: read_metrics(study / f"{arm}-seed1")[-1] for arm in arms}
    budget = {arm: record["arms"][arm]["matched"]["train.tokens"] for arm in arms}
    assert budget["wide"] / budget["plain"] == pytest.approx(ratio["median"], rel=1e-3)
    for arm, line in last.items():
        # A run ends with the step that reaches its budget.
        assert 0 <= line["tokens"] - budget[arm] < 1.5 * line["tokens"] / line["step"]

    # Budgets of existing runs do not change with different settings or a different version of the project.
    record["calibration"]["wide"]["started_as"] = "other settings"
    (study / "study.json").write_text(json.dumps(record))
    assert "measuring the speed" not in run_command([*STUDY, str(path)]).stdout
