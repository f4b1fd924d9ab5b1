"""The variables that ranks on other nodes get: those that DeepSpeed's pdsh launcher forwards, and those of `.deepspeed_env`.

deepspeed/launcher/runner.py (0.19.8): names that begin with one of FORWARDED_PREFIXES, with NCCL too where the launcher's accelerator is CUDA; then the
lines of `.deepspeed_env` (or of the file that DS_ENV_FILE names) in the home folder and in the working folder, the later one deciding.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path

from data_prep.console import UserError
from data_prep.files import write_text
from pretrain.relevant_env import relevant_env

FORWARDED_PREFIXES = ("MLFLOW", "PYTHON", "MV2", "UCX")
FORWARDED_FROM_CUDA = "NCCL"


def env_files() -> list[Path]:
    """The files that DeepSpeed reads, in its order."""
    name = os.environ.get("DS_ENV_FILE", ".deepspeed_env")
    paths = dict.fromkeys([Path.home() / name, Path(name)])
    return [path for path in paths if path.is_file()]


def invalid_lines(path: Path) -> list[str]:
    """The lines that DeepSpeed cannot read, or that it would hand to a shell as something else."""
    faults = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        name, equals, value = line.partition("=")
        if not equals:
            faults.append(f"line {number} ({line!r}) has no =")
        elif not re.fullmatch(r"\s*[A-Za-z_]\w*\s*", name):
            faults.append(f"line {number}: {name!r} is no name of a variable")
        elif not _survives(value):
            faults.append(f'line {number}: the shell would change the value of {name.strip()} (", $, ` or \\)')
    return faults


def read_env_files() -> dict[str, str]:
    """The variables that stand there, without lines that cannot be read."""
    values: dict[str, str] = {}
    for path in env_files():
        values |= _read(path)
    return values


def forwarded_variables(environment: Mapping[str, str], cuda: bool) -> dict[str, str]:
    """What the launcher hands on from this shell by itself, but PYTHONPATH, which the agents have already."""
    prefixes = (*FORWARDED_PREFIXES, *([FORWARDED_FROM_CUDA] if cuda else []))
    return {name: value for name, value in environment.items() if name.startswith(prefixes) and name != "PYTHONPATH"}


def write_env_file(environment: Mapping[str, str]) -> tuple[Path, list[str]]:
    """Write what matters of this shell over what stands in the working folder's file; return its path and the names left out.

    Left out are values that would not reach the nodes as they are. Raises UserError where the file cannot be written.
    """
    path = Path(os.environ.get("DS_ENV_FILE", ".deepspeed_env"))
    local_env = relevant_env(environment)
    left_out = [name for name, value in local_env.items() if not _survives(value) or "\n" in value]
    try:
        values = (_read(path) if path.is_file() else {}) | {
            name: value for name, value in local_env.items() if name not in left_out
        }
        write_text(path, "".join(f"{name}={value}\n" for name, value in values.items()))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    return path, left_out


def _read(path: Path) -> dict[str, str]:
    pairs = (line.partition("=") for line in path.read_text().splitlines())
    return {
        name.strip(): value.strip()
        for name, equals, value in pairs
        if equals and re.fullmatch(r"\s*[A-Za-z_]\w*\s*", name)
    }


def _survives(value: str) -> bool:
    """Whether DeepSpeed's double quotes keep the value as it is."""
    return not re.search(r'["$`\\]', value)
