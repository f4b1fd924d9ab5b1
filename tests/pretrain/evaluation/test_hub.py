"""Pushes to the hub: a real run and real commands push to a stand-in, which may be down, hang or refuse."""

import json
import os
import shutil
import socket
import threading
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import psutil
import pytest
from huggingface_hub import ModelCard

from data_prep.utils.console import UserError
from pretrain.config import load_config
from pretrain.evaluation.export import export_checkpoint, exported_files
from pretrain.evaluation.hub import push_in_background, push_newest, push_now
from pretrain.run_folder import HUB, list_steps, remove_later_steps, step_name
from pretrain.sections import HubConfig
from pretrain.training.hub_pushes import PROBLEM, BackgroundPushes, check_hub
from tests.commands import prepare_corpus, ranks_command, run_command, tiny_config, write_config
from tests.local_hub import TOKEN, LocalHub
from tests.processes import wait_for

REPO = "lab/tiny"
SETTINGS = HubConfig(repo=REPO)


@pytest.fixture
def hub(monkeypatch):
    """Return a stand-in that this process uses too."""
    server = LocalHub()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.endpoint)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    yield server
    server.close()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Train a run that pushes to a stand-in; return its configuration, its folder, its output and the stand-in."""
    folder = tmp_path_factory.mktemp("hub")
    config = write_config(
        folder,
        tiny_config(folder, export={"hub": {"repo": REPO}}, checkpoint={"every": 2}, monitor__validate_every=2),
    )
    prepare_corpus(config)
    server = LocalHub()
    printed = run_command(ranks_command(2, "launcher/run.py", config), **server.environment).stdout
    run_dir = folder / "runs" / "run"
    wait_for(lambda: 4 in list_steps(run_dir / HUB))
    wait_for(lambda: not pushing_processes(run_dir))
    yield config, run_dir, printed, server
    server.close()


@pytest.fixture
def run_dir(trained, tmp_path) -> Path:
    """Return a copy of the run that has the checkpoint of step 2 only and has pushed nothing."""
    copy = shutil.copytree(trained[1], tmp_path / "copy")
    shutil.rmtree(copy / HUB)
    shutil.rmtree(copy / "export")
    (copy / "checkpoints" / step_name(4)).rename(copy / "later")
    return copy


def add_step_4(run_dir: Path) -> None:
    (run_dir / "later").rename(run_dir / "checkpoints" / step_name(4))


def pushing_processes(run_dir: Path) -> list[psutil.Process]:
    """Return the processes that push a run in the background."""
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if "pretrain.evaluation.hub_job" in (process.info["cmdline"] or []) and str(run_dir) in process.info["cmdline"]
    ]


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_export_of_a_run_arrives_unchanged_with_a_message_and_a_tag(trained):
    _, run_dir, printed, server = trained
    repository = server.repositories[REPO]
    assert repository.private
    assert repository.commits[-1].message == "Step 4"
    assert repository.tags["step-4"] == repository.commits[-1].oid
    pushed = dict(repository.files)
    assert pushed.pop(".gitattributes")
    assert pushed == files_of(run_dir / "export" / step_name(4))
    assert {"model.safetensors", "jepa.safetensors", "jepa.json", "tokenizer.json"} <= pushed.keys()
    assert f"to {REPO} in the background" in printed
    assert "--push" in printed  # the push of the last step cannot be complete when the training ends
    assert json.loads((run_dir / "hub" / step_name(4)).read_text())["commit"] == repository.commits[-1].oid


def test_the_token_and_local_paths_are_nowhere(trained):
    config, run_dir, printed, server = trained
    published = server.repositories[REPO].files
    for content in [*files_of(run_dir).values(), *published.values(), printed.encode()]:
        assert TOKEN.encode() not in content
    for name, content in published.items():
        assert str(config.parent).encode() not in content, name


def test_the_card_has_metadata_that_the_hub_reads_and_the_figures_of_the_run(trained):
    _, run_dir, _, server = trained
    card = ModelCard(server.repositories[REPO].files["README.md"].decode())
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["llama", "llm-jepa"],
    }
    last = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    for text in (
        "| NL-RX grammar (generated) | train | 600 |",
        "600 records and",
        "L = L_lm + 0.5 * L_jepa",
        "- distance `info_nce`",
        "- predictor tokens: 1 per context",
        "| steps | 4 | 4 |",
        f"| corpus tokens | {last['tokens']:,} | 4 |",
        f"| `loss/lm` | {last['loss/lm']:.4f} | 4 |",
        f"| `validation/loss/jepa` | {last['validation/loss/jepa']:.4f} | 4 |",
        "There were no results",
        "## How to generate",
        "## How to embed",
        "def embed_record(text, code)",
        "## How to search",
        "python launcher/search.py THIS_FOLDER --index FILE",
        "## How to use sentence-transformers",
        "python launcher/evaluate.py THIS_FOLDER --sentence-transformers FOLDER",
    ):
        assert text in card.text, text


def test_the_code_of_the_card_generates(trained, monkeypatch, capsys):
    monkeypatch.chdir(trained[1] / "export" / step_name(4))
    namespace: dict = {}
    exec(Path("README.md").read_text().split("```python\n")[1].split("```")[0], namespace)
    assert 1 <= len(namespace["output"]) <= 60 and capsys.readouterr().out


def test_the_card_names_public_data_the_base_model_and_results(trained, run_dir, tmp_path):
    cached = tmp_path / "models--org--base" / "snapshots" / ("0" * 40)
    config = (run_dir / "config.yaml").read_text()
    before, rest = config.split("  sources:\n")
    after = rest[rest.index("  views:") :]
    model = f"model:\n  init_from: {cached}\n"
    after = after[: after.index("model:")] + model + after[after.index("objective:") :]
    sources = "  sources:\n  - {type: hub, path: org/pairs}\n  - {type: json, path: /secret/place/pairs.jsonl}\n"
    (run_dir / "config.yaml").write_text(before + sources + after)
    result = {"step": 2, "task": "nl_rx", "scoring": 2, "metrics": {"exact": 0.25}, "finetune": None}
    (run_dir / "evaluation").mkdir(exist_ok=True)
    (run_dir / "evaluation" / "results.jsonl").write_text(json.dumps(result) + "\n")
    (run_dir / "environment.json").write_text(json.dumps({"data": {"corpus": {"train": {"records": 7}}}}))
    card = ModelCard((export_checkpoint(run_dir, 2) / "README.md").read_text())
    assert card.data.base_model == "org/base"
    assert card.data.datasets == ["org/pairs"]
    assert card.data.license is None and card.data.language is None
    assert "pairs.jsonl (json)" in card.text and "secret" not in card.text
    assert "| nl_rx | 2 | no | exact | 0.2500 |" in card.text


def test_files_of_earlier_exports_are_replaced_and_other_files_are_kept(run_dir, hub):
    export = export_checkpoint(run_dir, 2)
    (export / "part.txt").write_text("only in the export of step 2")
    assert push_newest(run_dir, SETTINGS, ()) == 2
    repository = hub.repositories[REPO]
    repository.commit("by hand", repository.files | {"notes.md": b"mine"})
    add_step_4(run_dir)
    assert push_newest(run_dir, SETTINGS, ()) == 4
    assert set(repository.files) == {".gitattributes", "notes.md", *exported_files(export_checkpoint(run_dir, 4))}
    assert [commit.message for commit in repository.commits] == ["initial commit", "Step 2", "by hand", "Step 4"]
    assert repository.tags == {"step-2": repository.commits[1].oid, "step-4": repository.commits[3].oid}
    assert push_newest(run_dir, SETTINGS, ()) is None


def test_a_step_that_is_trained_again_after_a_rewind_is_pushed_again(run_dir, hub):
    shutil.copytree(run_dir / "later", run_dir / "kept")
    add_step_4(run_dir)
    assert push_newest(run_dir, SETTINGS, ()) == 4
    remove_later_steps(run_dir, 2)
    (run_dir / "kept").rename(run_dir / "checkpoints" / step_name(4))
    readme = export_checkpoint(run_dir, 4) / "README.md"
    readme.write_text(readme.read_text() + "after the rewind\n")
    assert push_newest(run_dir, SETTINGS, ()) == 4
    repository = hub.repositories[REPO]
    assert repository.files["README.md"].endswith(b"after the rewind\n")
    assert repository.tags == {"step-4": repository.commits[-1].oid}


def test_a_newer_export_replaces_one_that_waits(run_dir, hub):
    hub.released.clear()
    hub.failures = [500]
    push = threading.Thread(target=push_newest, args=(run_dir, SETTINGS, (0.0,)))
    push.start()
    wait_for(lambda: bool(hub.requests))
    add_step_4(run_dir)
    hub.released.set()
    push.join()
    assert [commit.message for commit in hub.repositories[REPO].commits] == ["initial commit", "Step 4"]


def test_failures_that_may_pass_are_retried(run_dir, hub, messages):
    hub.failures = [500, 429, 503]
    assert push_newest(run_dir, SETTINGS, (0.0, 0.0, 0.0)) == 2
    assert len([line for line in messages if "trying again" in line]) == 3
    assert hub.repositories[REPO].tags == {"step-2": hub.repositories[REPO].commits[-1].oid}


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refused_push_is_not_retried_and_the_run_names_the_command(run_dir, hub, messages, status):
    run = SimpleNamespace(config=SimpleNamespace(run_dir=run_dir))
    hook = BackgroundPushes(SETTINGS)
    (run_dir / HUB).mkdir()  # the run has started the push
    hook.start(run)
    hub.failures = [status]
    push_in_background(run_dir, SETTINGS, (0.0, 0.0))
    assert len(hub.requests) == 1
    hook.end(run, "finished")
    warnings = [line for line in messages if line.startswith("WARNING")]
    assert len(warnings) == 2 and all(f"launcher/evaluate.py {run_dir} --push" in line for line in warnings)
    assert all(f"the push of step 2 to {REPO} failed" in line and TOKEN not in line for line in warnings)
    push_in_background(run_dir, SETTINGS)
    assert list_steps(run_dir / HUB) == [2] and not (run_dir / HUB / PROBLEM).exists()


def test_a_hub_that_is_down_is_given_up_on(run_dir, hub):
    hub.close()
    with pytest.raises(UserError, match=rf"the push of step 2 to {REPO} failed: ConnectError"):
        push_newest(run_dir, SETTINGS, (0.0,))


def test_a_hub_that_does_not_answer_is_given_up_on(run_dir, hub, monkeypatch):
    monkeypatch.setattr("pretrain.evaluation.hub.TIMEOUT_SECONDS", 0.5)
    hub.released.clear()
    hub.failures = [500]
    with pytest.raises(UserError, match=rf"the push of step 2 to {REPO} failed: ReadTimeout"):
        push_newest(run_dir, SETTINGS, ())
    hub.released.set()


def test_nothing_is_pushed_to_a_public_repository_unless_the_configuration_allows_it(run_dir, hub):
    assert push_newest(run_dir, HubConfig(repo=REPO, private=False), ()) == 2
    assert not hub.repositories[REPO].private
    add_step_4(run_dir)
    with pytest.raises(UserError, match=r"the repository is public, but export\.hub\.private is true"):
        push_newest(run_dir, SETTINGS, (0.0,))
    assert len(hub.repositories[REPO].commits) == 2


def test_a_run_ends_while_the_hub_hangs_and_the_push_is_completed_later(trained, tmp_path, hub):
    config, _, _, _ = trained
    hub.released.clear()
    hub.failures = [500]
    command = ["python", "launcher/run.py", config, f"output_dir={tmp_path}", "train.steps=2"]
    printed = run_command(command, **hub.environment).stdout
    assert f"finished at step 2: {tmp_path / 'run'}" in printed
    assert f"step 2 has not been pushed to {REPO} yet" in printed
    wait_for(lambda: bool(hub.requests))
    assert list_steps(tmp_path / "run" / HUB) == []
    hub.released.set()
    wait_for(lambda: list_steps(tmp_path / "run" / HUB) == [2])
    assert "trying again in 2 s" in (tmp_path / "run" / HUB / "log.txt").read_text()


def test_a_run_that_is_started_again_pushes_what_is_missing(trained, tmp_path, hub):
    config, _, _, _ = trained
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        down = hub.environment | {"HF_ENDPOINT": f"http://127.0.0.1:{unused.getsockname()[1]}"}
        command = ["python", "launcher/run.py", config, f"output_dir={tmp_path}", "train.steps=2"]
        run_command(command, **down)
        run_dir = tmp_path / "run"
        log = run_dir / HUB / "log.txt"
        wait_for(lambda: "trying again" in log.read_text())
        for process in pushing_processes(run_dir):
            process.kill()
            process.wait()
    assert "is already finished" in run_command(command, **hub.environment).stdout
    wait_for(lambda: list_steps(run_dir / HUB) == [2])
    assert hub.repositories[REPO].tags == {"step-2": hub.repositories[REPO].commits[-1].oid}


def test_a_push_by_hand(run_dir, hub, capsys):
    push = ["python", "launcher/evaluate.py", run_dir, "--push"]
    add_step_4(run_dir)
    assert f"step 4 is pushed to {REPO}" in run_command(push, cold=True, **hub.environment).stdout
    assert set(hub.repositories[REPO].tags) == {"step-4"}
    push_now(run_dir, SETTINGS)
    assert capsys.readouterr().out == f"step 4 has already been pushed to {REPO}\n"


def test_a_missing_token_is_reported_at_the_start(trained, tmp_path):
    no_token = {"HF_TOKEN": "", "HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9"}
    for more in ([], ["--dry-run"]):
        command = ["python", "launcher/run.py", trained[0], f"output_dir={tmp_path}", *more]
        failed = run_command(command, check=False, cold=True, **no_token)
        assert failed.returncode == 2
        assert failed.stderr.count("\n") == 1 and "set the environment variable HF_TOKEN" in failed.stderr


def test_a_login_file_is_a_token(trained, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    with pytest.raises(UserError, match="there is no token of the Hugging Face hub"):
        push_now(trained[1], SETTINGS)
    (tmp_path / "token").write_text(TOKEN)
    check_hub(SETTINGS)


@pytest.mark.parametrize("repo", ["tiny", "a/b/c", "lab/", "lab/a b", "lab/a--b", "https://huggingface.co/lab/tiny"])
def test_the_name_of_a_repository_is_checked(trained, repo):
    with pytest.raises(UserError, match=r"export\.hub\.repo: .* is not the name of a repository: write ORG/NAME"):
        load_config(trained[0], [f"export.hub.repo={repo}"])


def test_a_checkpoint_is_exported_to_any_folder(run_dir, tmp_path):
    target = tmp_path / "new" / "folder"
    command = ["python", "launcher/evaluate.py", run_dir, "--export", target, "--step", "2"]
    assert run_command(command).stdout == f"step 2 of {run_dir} is exported to {target}\n"
    assert not (run_dir / "export" / step_name(2)).exists()
    exported = files_of(target)
    assert exported == files_of(export_checkpoint(run_dir, 2))
    for added in ("embeddings", "index"):
        (run_dir / "export" / step_name(2) / added).mkdir()
        (run_dir / "export" / step_name(2) / added / "file.npz").write_bytes(b"")
    assert exported_files(run_dir / "export" / step_name(2)) == sorted(exported, key=Path)
    (tmp_path / "empty").mkdir()
    run_command(["python", "launcher/evaluate.py", run_dir, "--export", tmp_path / "empty", "--step", "2"])
    assert files_of(tmp_path / "empty") == exported
    assert not list((run_dir / "checkpoints" / "pins").iterdir())
    failed = run_command(command, check=False)
    assert failed.returncode == 2
    assert failed.stderr == f"error: --export: {target} is not an empty folder; choose a new folder\n"
    assert sorted(os.listdir(target.parent)) == ["folder"]
