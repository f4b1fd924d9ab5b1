"""The loggers of experiment trackers, with their libraries, offline."""

import json
import os
import shutil
import sqlite3
import struct
from collections import defaultdict
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from pretrain.config import dump_config, load_config
from pretrain.run_folder import LAYERS, flat_values, step_name
from pretrain.training.loggers import send_evaluations
from tests.commands import ROOT, BackgroundCommand, prepare_corpus, run_command, tiny_config, write_config
from tests.processes import TIMEOUT
from tests.ranks import free_port

FAULTY_RUN = ROOT / "tests" / "pretrain" / "training" / "faulty_run.py"
TRACKERS = [name for name in ("wandb", "mlflow", "trackio") if find_spec(name)]
SECRETS = {
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "MLFLOW_TRACKING_PASSWORD": "mlflow-password-1",
    "MLFLOW_TRACKING_TOKEN": "mlflow-token-2",
    "HF_TOKEN": "hf_secret_token_3",
    "TRACKIO_WRITE_TOKEN": "trackio-token-4",
}
PATIENT_RUN = (
    "python",
    "-c",
    f"from pretrain.training.loggers import _tracker; _tracker.CLOSE_SECONDS = {TIMEOUT}\n"
    "from pretrain.training.main import main; main()",
)
"""Training that waits for the trackers on a machine of any speed."""
STEPS = 8
Points = dict[str, dict[int, list[float]]]
"""Tag -> step -> all values that a tracker has for it."""


def environment(folder: Path) -> dict[str, str]:
    """Return variables for a command that has secrets, and no access to the files of the user's logins."""
    return SECRETS | {
        "HOME": str(folder / "home"),
        "WANDB_MODE": "offline",
        "WANDB__TRANSACTION_LOG_FLUSH_INTERVAL": "0.1",
        "TRACKIO_DIR": str(folder / "trackio"),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trackers")
    (folder / "home").mkdir()
    prepare_corpus(write_config(folder, tiny_config(folder)))
    return folder


def tracked_config(folder: Path, name: str, loggers: list[str], **changes) -> Path:
    values = tiny_config(folder, name=name, monitor__loggers=loggers, **changes)
    return write_config(folder, values | {"checkpoint": {"every": 3}, "train": values["train"] | {"steps": STEPS}})


@pytest.fixture(scope="module")
def run(folder) -> tuple[Path, str]:
    """Return a run that was killed, rewound, killed again and completed, and its console output.

    Both kills are after step 7, the last checkpoint is of step 6, and the rewind is to step 3.
    """
    path = tracked_config(folder, "run", ["tensorboard", *TRACKERS], monitor__layers_every=1)
    run_dir = folder / "runs" / "run"
    output = ""
    for launch in range(2):
        command = BackgroundCommand(
            ["python", str(FAULTY_RUN), f"hold:{STEPS}", str(path)], folder / f"{launch}.log", **environment(folder)
        )
        for name in TRACKERS:
            command.wait_until(lambda name=name, launch=launch: has_step_7(folder, name, launch), f"step 7 in {name}")
        command.kill()
        output += command.log.read_text()
        if launch == 0:
            first_ids = {name: entry_id(run_dir, name) for name in TRACKERS}
            shutil.rmtree(run_dir / "checkpoints" / step_name(6))
            rewind = {"step": 7, "score": 9.0, "to": 3, "left_out": []}
            (run_dir / "rewinds.json").write_text(json.dumps([rewind]))
    output += run_command([*PATIENT_RUN, str(path)], **environment(folder)).stdout
    ids = {name: entry_id(run_dir, name) for name in TRACKERS}
    assert [name for name in TRACKERS if ids[name] == first_ids[name]] == ["wandb"], "mlflow and trackio cannot rewind"
    return run_dir, output


def entry_id(run_dir: Path, name: str) -> str:
    return json.loads((run_dir / "trackers" / f"{name}.json").read_text())["id"]


def wandb_records(path: Path) -> Iterator:
    """Yield the records of a W&B file, which has the format of LevelDB's log with a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    data, position, record = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        if (left := 32768 - position % 32768) < 7:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # complete, or the last part
            yield wandb_internal_pb2.Record.FromString(record)
            record = b""


def wandb_points(run_dir: Path, name: str = "wandb") -> Points:
    """Return the points of an entry as W&B shows them after a sync of its folders in the order of their names."""
    points: Points = defaultdict(lambda: defaultdict(list))
    for path in sorted((run_dir / "wandb").glob(f"offline-run-*/run-{entry_id(run_dir, name)}.wandb")):
        for record in wandb_records(path):
            kind = record.WhichOneof("record_type")
            if kind == "run" and record.run.branch_point.run:
                assert record.run.branch_point.run == record.run.run_id, "a rewind, not a fork"
                for steps in points.values():
                    for step in [step for step in steps if step > record.run.branch_point.value]:
                        del steps[step]
            elif kind == "history":
                for item in record.history.item:
                    (tag,) = [item.key] if item.key else item.nested_key  # a second key would be another series
                    if not tag.startswith("_"):
                        points[tag][record.history.step.num].append(float(json.loads(item.value_json)))
    return points


def mlflow_run(run_dir: Path) -> tuple:
    """Return a client of MLflow and the only run that it knows."""
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{run_dir.parent / 'mlflow.db'}")
    (found,) = client.search_runs([client.get_experiment_by_name("jepa-pretrain").experiment_id])
    return client, found


def mlflow_points(run_dir: Path) -> Points:
    client, found = mlflow_run(run_dir)
    assert found.data.tags["jepa.entry"] == entry_id(run_dir, "mlflow")
    points: Points = defaultdict(lambda: defaultdict(list))
    for tag in found.data.metrics:
        for metric in client.get_metric_history(found.info.run_id, tag):
            points[tag][metric.step].append(metric.value)
    return points


def trackio_points(folder: Path, entry: str) -> Points:
    points: Points = defaultdict(lambda: defaultdict(list))
    with sqlite3.connect(folder / "trackio" / "jepa-pretrain.db") as database:
        rows = database.execute("select step, metrics from metrics where run_name = ?", [entry]).fetchall()
    for step, metrics in rows:
        for tag, value in json.loads(metrics).items():
            points[tag][step].append(value)
    return points


def has_step_7(folder: Path, name: str, launch: int) -> bool:
    """Return whether a tracker has stored step 7 of a launch, in files that the launch is still writing."""
    run_dir = folder / "runs" / "run"
    try:
        if name == "wandb":
            files = sorted((run_dir / "wandb").glob("offline-run-*/*.wandb"))
            return len(files) > launch and any(record.history.step.num == 7 for record in wandb_records(files[-1]))
        if name == "trackio":
            return 7 in trackio_points(folder, f"run-{entry_id(run_dir, name)[:8]}")["loss/lm"]
        with sqlite3.connect(run_dir.parent / "mlflow.db") as database:
            query = (
                "select count(*) from metrics join tags on metrics.run_uuid = tags.run_uuid "
                "where tags.key = 'jepa.entry' and tags.value = ? and metrics.key = 'loss/lm' and metrics.step = 7"
            )
            return database.execute(query, [entry_id(run_dir, name)]).fetchone()[0] > 0
    except (FileNotFoundError, sqlite3.Error):
        return False


def logged(run_dir: Path) -> dict[int, dict[str, float]]:
    """Return the values of metrics.jsonl by step and tag."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    flat = map(flat_values, lines)
    return {line["step"]: {tag: value for tag, value in line.items() if "/" in tag} for line in flat}


def check_points(points: Points, run_dir: Path, unequal: tuple[str, ...] = ()) -> None:
    """Check that each step is there once, with the values of metrics.jsonl; tags in `unequal` may differ in step 7."""
    metrics = logged(run_dir)
    assert {(tag, step) for tag in points for step in points[tag]} == {
        (tag, step) for step, values in metrics.items() for tag in values
    }
    for tag, steps in points.items():
        for step, values in steps.items():
            assert len(values) == 1, (tag, step)
            if not (step == STEPS - 1 and tag.startswith(unequal)):
                digits = 1e-3 if tag.startswith(LAYERS) else 1e-12  # metrics.jsonl has four digits of layers
                assert values[0] == pytest.approx(metrics[step][tag], rel=digits), (tag, step)


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_after_kills_and_a_rewind_there_is_one_entry_with_each_step_once_and_the_values_of_metrics_jsonl(run, name):
    if name not in TRACKERS:
        pytest.skip(f"{name} is not installed: requirements.lock cannot contain it")
    run_dir, _ = run
    # mlflow and trackio keep the values of a repeated step from before the kill; only durations can differ
    durations = ("throughput/",)
    if name == "wandb":
        check_points(wandb_points(run_dir), run_dir)
    elif name == "mlflow":
        check_points(mlflow_points(run_dir), run_dir, durations)
    else:
        folder = run_dir.parent.parent
        entry = f"run-{entry_id(run_dir, name)[:8]}"
        check_points(trackio_points(folder, entry), run_dir, durations)
        with sqlite3.connect(folder / "trackio" / "jepa-pretrain.db") as database:
            assert database.execute("select distinct run_name from metrics").fetchall() == [(entry,)]


def test_the_configuration_and_the_revision_are_in_the_entry(run):
    run_dir, _ = run
    revision = json.loads((run_dir / "environment.json").read_text())["revision"]
    _, found = mlflow_run(run_dir)
    assert (found.info.run_name, found.info.status) == ("run", "FINISHED")
    assert found.data.params["train.learning_rate"] == "0.003"
    assert found.data.params["environment.revision"] == found.data.tags["mlflow.source.git.commit"] == revision
    files = sorted((run_dir / "wandb").glob("offline-run-*/*.wandb"))
    records = [record for record in wandb_records(files[-1]) if record.WhichOneof("record_type") == "run"]
    config = {item.key: json.loads(item.value_json) for item in records[0].run.config.update}
    assert config["train"]["learning_rate"] == 0.003 and config["environment"]["revision"] == revision
    assert (records[0].run.display_name, records[0].run.run_group) == ("run", "run")


def test_no_secret_is_written_or_printed(run):
    run_dir, output = run
    folder = run_dir.parent.parent
    files = [path for root in (folder / "runs", folder / "trackio") for path in root.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    for secret in SECRETS.values():
        assert secret not in output
        assert [path for path in files if secret.encode() in path.read_bytes()] == []


def test_evaluations_are_sent_once_also_after_a_rewind(run, monkeypatch):
    run_dir, _ = run
    folder = run_dir.parent.parent
    for key, value in environment(folder).items():
        monkeypatch.setenv(key, value)
    config = load_config(folder / "run.yaml")

    def send(*results: tuple[int, float]) -> None:
        """Send all valid evaluations, as an evaluation process does after it has added one."""
        send_evaluations(
            config, run_dir, [{"step": step, "task": "nl_rx", "metrics": {"exact": value}} for step, value in results]
        )

    tag = "evaluation/nl_rx/exact"
    send((3, 0.25))
    send((3, 0.25), (6, 0.5))
    assert list(wandb_points(run_dir, "wandb-evaluation")[tag].values()) == [[0.25], [0.5]]
    assert dict(mlflow_points(run_dir)[tag]) == {3: [0.25], 6: [0.5]}
    send((3, 0.25), (6, 0.75))  # a rewind has made the second one invalid, and step 6 was evaluated again
    points = wandb_points(run_dir, "wandb-evaluation")
    assert list(points["step"].values()) == [[3], [6]] and list(points[tag].values()) == [[0.25], [0.75]]
    if "trackio" in TRACKERS:
        entry = f"run-evaluation-{entry_id(run_dir, 'trackio-evaluation')[:8]}"
        assert dict(trackio_points(folder, entry)[tag]) == {3: [0.25], 6: [0.75]}


def test_a_tracker_without_a_server_is_one_warning_and_the_run_finishes(folder):
    path = tracked_config(folder, "no-server", ["wandb", "mlflow"])
    address = f"127.0.0.1:{free_port()}"
    done = run_command(
        ["python", "launcher/run.py", str(path)],
        **environment(folder)
        | {
            "WANDB_MODE": "online",
            "WANDB_BASE_URL": f"http://{address}",
            "WANDB_INIT_TIMEOUT": "2",
            "MLFLOW_TRACKING_URI": f"http://user:uri-password@{address}",
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
        },
    )
    printed = done.stdout + done.stderr
    for name in ("wandb", "mlflow"):
        assert printed.count(f"WARNING: the logger {name} failed") == 1, printed
    assert f"finished at step {STEPS}" in printed and len(logged(folder / "runs" / "no-server")) == STEPS
    for secret in (*SECRETS.values(), "uri-password"):
        assert secret not in printed


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (
            ["monitor.loggers=[wandb]"],
            "monitor.loggers: wandb is not logged in: run `wandb login`, set",
        ),
        (
            ["monitor.loggers=[mlflow]", "monitor.mlflow.tracking_uri=https://user:uri-password@host/x"],
            "monitor.mlflow.tracking_uri: must not contain a user name, password or token",
        ),
        (["monitor.loggers=[mlflow]", "monitor.mlflow.tracking_uri=mlruns"], "mlflow does not write to folders"),
        (["monitor.wandb.mode=offline"], "monitor.wandb has an effect only if monitor.loggers contains wandb"),
        pytest.param(
            ["monitor.loggers=[trackio]"],
            "monitor.loggers: trackio needs the package trackio, which is not installed; run pip install '.[trackio]'",
            marks=pytest.mark.skipif("trackio" in TRACKERS, reason="trackio is installed"),
        ),
    ],
)
def test_what_a_tracker_lacks_is_one_line_before_the_start(folder, settings, problem):
    path = tracked_config(folder, "refused", ["tensorboard"])
    for dry_run in ([], ["--dry-run"]):
        done = run_command(
            ["python", "launcher/run.py", str(path), *settings, *dry_run], check=False, HOME=str(folder / "home")
        )
        assert done.returncode == 2 and done.stderr.startswith("error: ") and problem in done.stderr, done.stderr
        assert "uri-password" not in done.stderr and done.stderr.count("\n") == 1
    assert not (folder / "runs" / "refused" / "trackers").exists()


def test_a_configuration_without_trackers_has_no_key_of_them(folder):
    config = load_config(tracked_config(folder, "plain", ["tensorboard"]))
    assert not {"wandb", "mlflow", "trackio"} & yaml.safe_load(dump_config(config))["monitor"].keys()
