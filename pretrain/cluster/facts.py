"""Facts about this node, as JSON-serializable values. If a function raises, the agent (agent.py) returns an `error`."""

import contextlib
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sysconfig
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from pretrain.cluster.sharing import nearest_existing_folder
from pretrain.revision import ROOT, revision, source_hashes

MANIFEST = "manifest.json"
BUILD_PROCESSES = ("ninja", "c++", "g++", "cc1plus", "nvcc", "cicc", "ptxas")
"""Names of processes that run while a DeepSpeed op is being built."""
GPU_FIELDS = ("name", "memory.total", "memory.used", "driver_version", "uuid")
COMMAND_TIMEOUT = 20.0
"""Timeout of nvidia-smi and of hostname, in seconds."""


def python_and_system() -> dict[str, Any]:
    """Return the versions of Python, the operating system and the C library."""
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "libc": " ".join(platform.libc_ver()),
    }


def packages() -> dict[str, Any]:
    """Return `installed` and `locked`, which map each package to a version, and `required`, a list of package names.

    Without a lock file, all three are empty.
    """
    locked, required = {}, []
    with contextlib.suppress(FileNotFoundError):
        lines = (ROOT / "requirements.lock").read_text().splitlines()
        locked = {
            _normalized_name(name): version.strip().split("+")[0]
            for name, equals, version in (line.partition("==") for line in lines)
            if equals and not name.startswith("#")
        }
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        names = [re.split(r"[=<>~!\[ ]", requirement)[0] for requirement in project["dependencies"]]
        required = [_normalized_name(name) for name in names]
    installed = {}
    for name in locked:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed[name] = importlib.metadata.version(name)
    return {"installed": installed, "locked": locked, "required": required}


def _normalized_name(name: str) -> str:
    """Return the normalized name of a package: Py_YAML and py-yaml are the same package."""
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


def code() -> dict[str, Any]:
    """Return the project's revision and the hash of each of its Python files."""
    return {"revision": revision(), "files": source_hashes()}


def corpus(data: str) -> dict[str, Any]:
    """Return a hash of the manifest, a hash of all tokenizer files, and the shards of the manifest that do not exist.

    If the corpus cannot be read, the only key is `unreadable`, which contains the reason.
    """
    folder = Path(data)
    try:
        content = (folder / MANIFEST).read_bytes()
        tokenizer = hashlib.sha256()
        for path in sorted((folder / "tokenizer").iterdir()):
            tokenizer.update(path.name.encode() + b"\0" + path.read_bytes())
        present = set(os.listdir(folder))
        listed = [shard["file"] for split in json.loads(content)["splits"].values() for shard in split["shards"]]
    except FileNotFoundError as error:
        return {"unreadable": f"{error.filename} does not exist"}
    except (OSError, ValueError, KeyError) as error:
        return {"unreadable": f"cannot read the corpus: {error}"}
    return {
        "manifest": hashlib.sha256(content).hexdigest()[:12],
        "tokenizer": tokenizer.hexdigest()[:12],
        "missing": [name for name in listed if name not in present],
    }


def run_folder(run_dir: str) -> dict[str, Any]:
    """Return the run folder or its nearest existing parent, its free bytes, and whether a run holds the run's lock.

    If writing to the folder fails, `unwritable` contains the error.
    """
    folder = nearest_existing_folder(run_dir)
    test_file = folder / f".doctor-{os.getpid()}-{socket.gethostname()}"
    found: dict[str, Any] = {
        "folder": str(folder),
        "free": shutil.disk_usage(folder).free,
        "locked": _is_locked(Path(run_dir) / ".lock"),
    }
    try:
        with open(test_file, "wb") as file:
            file.write(bytes(4096))
            os.fsync(file.fileno())
    except OSError as error:
        found["unwritable"] = error.strerror
    finally:
        with contextlib.suppress(OSError):
            test_file.unlink(missing_ok=True)
    return found


def _is_locked(path: Path) -> bool:
    """Return whether a run holds the lock; False if the lock file cannot be opened."""
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def memory() -> dict[str, Any]:
    """Return the available bytes of host memory and the free bytes of /dev/shm.

    If a container limits the memory, at most the remainder of its limit is available.
    """
    available = psutil.virtual_memory().available
    with contextlib.suppress(OSError, ValueError):  # no such file, or "max": there is no limit
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        available = min(available, limit - used)
    return {"available": available, "shm_free": shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 0}


def devices() -> dict[str, Any]:
    """Return the GPUs, the CUDA version of the torch build, and the accelerator of DeepSpeed.

    The GPUs are the ones that CUDA_VISIBLE_DEVICES selects. The accelerator is DS_ACCELERATOR if that is set.
    Otherwise, it is cuda if there is a GPU, else cpu.
    """
    found: dict[str, Any] = {"gpus": []}
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader,nounits"]
        try:
            listed = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_TIMEOUT, check=True).stdout
            found["gpus"] = [_gpu(line) for line in listed.splitlines() if line.strip()]
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            output = getattr(error, "stdout", None) or str(error)
            found["driver_fault"] = f"nvidia-smi: {output.strip().splitlines()[-1]}"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        found["gpus"] = _select_gpus(found["gpus"], visible)
    return found | {
        "accelerator": os.environ.get("DS_ACCELERATOR") or ("cuda" if found["gpus"] else "cpu"),
        "torch_cuda": _torch_cuda_version(),
    }


def _torch_cuda_version() -> str | None:
    """Return the CUDA version that the installed torch was built for, or None for a build without CUDA.

    Reads torch's version file instead of importing torch.
    """
    spec = importlib.util.find_spec("torch")
    for folder in (spec.submodule_search_locations if spec else None) or ():
        with contextlib.suppress(OSError):
            if match := re.search(
                r"^cuda\b.*=\s*['\"]([\d.]+)['\"]", (Path(folder) / "version.py").read_text(), re.MULTILINE
            ):
                return match[1]
    return None


def _gpu(line: str) -> dict[str, Any]:
    name, total, used, driver, uuid = (field.strip() for field in line.split(","))
    return {"name": name, "memory": int(total) * 2**20, "used": int(used) * 2**20, "driver": driver, "uuid": uuid}


def _select_gpus(gpus: list[dict[str, Any]], visible: str) -> list[dict[str, Any]]:
    """Return the GPUs that CUDA_VISIBLE_DEVICES selects, by index or by the beginning of a UUID.

    As in CUDA, the list ends at the first entry that names no GPU, such as -1.
    """
    selected = []
    for entry in map(str.strip, visible.split(",")):
        if entry.isdecimal():
            matches = gpus[int(entry) : int(entry) + 1]
        else:
            matches = [gpu for gpu in gpus if entry and gpu["uuid"].startswith(entry)]
        if len(matches) != 1:
            break
        selected += matches
    return selected


def extensions() -> dict[str, Any]:
    """Return the folder of DeepSpeed's compiled ops, the ops and build locks in it, and the tools for a build.

    `locks` contains the age of each lock in seconds. `compiling` is true while a build is running.
    """
    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(root) if root else cache / "torch_extensions"
    locks = [path for pattern in ("*/lock", "*/*/lock") for path in folder.glob(pattern)]
    now = time.time()
    return {
        "folder": str(folder),
        "ops": sorted({path.stem for pattern in ("*/*.so", "*/*/*.so") for path in folder.glob(pattern)}),
        "locks": [{"path": str(path), "age": now - path.stat().st_mtime} for path in locks],
        "compiling": any(process.info["name"] in BUILD_PROCESSES for process in psutil.process_iter(["name"])),
        "compiler": shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++"),
        "c_compiler": shutil.which(os.environ.get("CC", "gcc")) or shutil.which("clang"),
        "python_header": (Path(sysconfig.get_paths()["include"]) / "Python.h").exists(),
    }


def addresses() -> dict[str, Any]:
    """Return the first address of `hostname -I`, the host name, and the address to which this node resolves its name.

    If this is the first node, DeepSpeed uses the first address for the rendezvous.
    """
    listed = subprocess.run(["hostname", "-I"], capture_output=True, text=True, timeout=COMMAND_TIMEOUT).stdout.split()
    name = socket.gethostname()
    try:
        own = socket.gethostbyname(name)
    except OSError:
        own = None
    return {"first": listed[0] if listed else None, "name": name, "own": own}


TOPICS: dict[str, Callable[..., dict[str, Any]]] = {
    "python_and_system": python_and_system,
    "packages": packages,
    "code": code,
    "corpus": corpus,
    "run_folder": run_folder,
    "devices": devices,
    "memory": memory,
    "extensions": extensions,
    "addresses": addresses,
}
