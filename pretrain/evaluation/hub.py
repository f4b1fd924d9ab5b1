"""Pushes of exports to the Hugging Face hub: one commit and one tag `step-N` for each export."""

import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, set_client_factory
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils._http import default_client_factory

from data_prep.utils.console import UserError
from data_prep.utils.files import read_json_or_none, try_lock, write_json
from pretrain.evaluation.export import export_checkpoint, exported_files
from pretrain.relevant_env import redact
from pretrain.run_folder import HUB, list_steps, step_name
from pretrain.sections import HubConfig
from pretrain.training.hub_pushes import LOCK, PROBLEM, check_hub, push_command, unpushed_step

logger = logging.getLogger(__name__)

PAUSES = (2.0, 10.0, 60.0, 300.0)
"""Pauses before the further attempts at a push that fails, in seconds."""
TIMEOUT_SECONDS = 60.0
"""Time after which a request without any progress fails, in seconds. The library itself would wait forever."""
RETRIED_STATUS = (408, 409, 412, 423, 425, 429)
"""Status codes of client errors that may disappear: time-outs, conflicts with another commit, and rate limits."""


def push_in_background(run_dir: Path, hub: HubConfig, pauses: Sequence[float] = PAUSES) -> None:
    """Push the newest export, and any newer ones, unless another process does so.

    Exports that appear while this process holds the lock are found after it has released the lock.
    """
    failed = None
    while (step := unpushed_step(run_dir, hub.repo)) is not None and step != failed:
        lock = try_lock(run_dir / HUB / LOCK)
        if lock is None:
            return
        with lock:
            try:
                failed = None
                push_newest(run_dir, hub, pauses)
            except UserError as error:
                failed = step
                write_json(run_dir / HUB / PROBLEM, {"error": str(error), "time": time.time()})
                logger.warning(f"{error}; {push_command(run_dir)}")


def push_now(run_dir: Path, hub: HubConfig | None) -> None:
    """Push the newest export, after the push of another process. Raises UserError if it cannot be pushed."""
    if hub is None:
        raise UserError(f"{run_dir} has no export.hub; add export.hub.repo=ORG/NAME to the command")
    check_hub(hub)
    (run_dir / HUB).mkdir(exist_ok=True)
    lock = try_lock(run_dir / HUB / LOCK)
    if lock is None:
        logger.info(f"waiting for another push of {run_dir} to end; its log is {run_dir / HUB / 'log.txt'}")
    while lock is None:
        time.sleep(1)
        lock = try_lock(run_dir / HUB / LOCK)
    with lock:
        if push_newest(run_dir, hub, PAUSES[:2]) is None:
            steps = list_steps(run_dir / HUB)
            if not steps:
                raise UserError(f"{run_dir} has no checkpoint and no export yet; wait for the first one")
            print(f"step {steps[-1]} has already been pushed to {hub.repo}")


def push_newest(run_dir: Path, hub: HubConfig, pauses: Sequence[float]) -> int | None:
    """Push until there is nothing newer to push, and return the last pushed step; None if there was nothing.

    The caller holds the lock. An attempt that fails is repeated after each of the `pauses`, with the newest export at
    that time. Raises UserError if the last attempt fails, or at once if further attempts would fail too.
    """
    set_client_factory(_client_with_timeout)
    (run_dir / HUB).mkdir(exist_ok=True)
    pushed, failures = None, 0
    while (step := unpushed_step(run_dir, hub.repo)) is not None:
        try:
            _push_step(run_dir, hub, step)
        except Exception as error:
            message = f"the push of step {step} to {hub.repo} failed: {_error_text(error)}"
            if _is_permanent(error) or failures == len(pauses):
                raise UserError(message) from None
            logger.warning(f"{message}; trying again in {pauses[failures]:.0f} s")
            time.sleep(pauses[failures])
            failures += 1
        else:
            pushed, failures = step, 0
            (run_dir / HUB / PROBLEM).unlink(missing_ok=True)
            print(f"step {step} is pushed to {hub.repo}", flush=True)
    return pushed


def _push_step(run_dir: Path, hub: HubConfig, step: int) -> None:
    """Push one export as a commit with a tag, and record it. An attempt that was interrupted can be repeated."""
    export = export_checkpoint(run_dir, step)
    identity = export.stat().st_ino
    api = HfApi(token=True)  # the token of HF_TOKEN or of `hf auth login`
    _create_repository(api, hub)
    files = exported_files(export)
    outdated = _pushed_files(run_dir, hub.repo) - set(files)
    if outdated:
        outdated &= set(api.list_repo_files(hub.repo))
    # `upload_folder` might divide the files among several commits.
    commit = api.create_commit(
        hub.repo,
        [
            *(CommitOperationAdd(file, export / file) for file in files),
            *(CommitOperationDelete(file) for file in sorted(outdated)),
        ],
        commit_message=f"Step {step}",
    )
    _tag(api, hub.repo, f"step-{step}", commit.oid)
    if export.exists() and export.stat().st_ino == identity:  # a rewind may have removed it
        write_json(run_dir / HUB / step_name(step), {"repo": hub.repo, "commit": commit.oid, "files": files})


def _create_repository(api: HfApi, hub: HubConfig) -> None:
    """Create the repository if it does not exist. Raises UserError if it is public but should be private."""
    try:
        existing = api.model_info(hub.repo)
    except RepositoryNotFoundError:
        api.create_repo(hub.repo, private=hub.private, exist_ok=True)
        return
    if hub.private and existing.private is False:
        raise UserError(
            "the repository is public, but export.hub.private is true; make the repository private, or set "
            "export.hub.private=false"
        )


def _pushed_files(run_dir: Path, repo: str) -> set[str]:
    """Return the files of all exports that this run has pushed to the repository."""
    records = [read_json_or_none(run_dir / HUB / step_name(step)) for step in list_steps(run_dir / HUB)]
    return {file for record in records if record and record["repo"] == repo for file in record["files"]}


def _tag(api: HfApi, repo: str, tag: str, commit: str) -> None:
    """Tag a commit. A tag of an earlier attempt, or from before a rewind, is moved."""
    try:
        api.create_tag(repo, tag=tag, revision=commit)
    except HfHubHTTPError as error:
        if error.response.status_code != 409:
            raise
        api.delete_tag(repo, tag=tag)
        api.create_tag(repo, tag=tag, revision=commit)


def _client_with_timeout() -> Any:
    client = default_client_factory()
    client.event_hooks["request"].append(_limit_wait)
    return client


def _limit_wait(request: Any) -> None:
    """Set the timeout of a request. The one of the client does not suffice: some calls of the library disable it."""
    request.extensions["timeout"] = dict.fromkeys(("connect", "read", "write", "pool"), TIMEOUT_SECONDS)


def _is_permanent(error: Exception) -> bool:
    """Return whether further attempts would fail too, because the token, the repository or the export is wrong."""
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        return 400 <= status < 500 and status not in RETRIED_STATUS
    return isinstance(error, UserError | LocalTokenNotFoundError)


def _error_text(error: Exception) -> str:
    """Return an error as one line without secrets."""
    text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    return " ".join(redact(text, os.environ).split())[:300]
