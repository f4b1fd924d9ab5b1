"""Processor time of a start: of `--dry-run`, and of a rank until it is ready for its first step.

    python benchmarks/start.py [--rounds 3] > start.json

The checkout in the current folder is measured, with its configs/demo.yaml on CPU in one process and one thread. The
figures are user and system time in seconds, including child processes: the smallest of the rounds, because other
processes on the machine add to them. The preparation of the corpus and a dry run come first, so Python's bytecode and
the user's cache exist.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

CONFIG = "configs/demo.yaml"
UNTIL_READY = """
import os, runpy, sys
import pretrain.run_folder
def stop(*status, **more):
    os._exit(0 if status[1] == "running" else 1)
pretrain.run_folder.write_status = stop
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""Program that ends a run when it writes that it is running, which is just before its first step."""


def main() -> None:
    """Measure both starts in turn and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        settings = [CONFIG, f"data.path={folder}/corpus", f"output_dir={folder}/runs"]
        starts = {
            "dry_run": ["launcher/run.py", *settings, "--dry-run"],
            "rank": ["-c", UNTIL_READY, "launcher/run.py", *settings],
        }
        seconds: dict[str, list[float]] = {name: [] for name in starts}
        processor_seconds(["-m", "data_prep", *settings[:2]])
        processor_seconds(starts["dry_run"])
        for _ in range(arguments.rounds):
            for name, command in starts.items():
                seconds[name].append(processor_seconds(command))
    print(json.dumps({name: {"seconds": min(values), "rounds": values} for name, values in seconds.items()}))


def processor_seconds(arguments: list[str]) -> float:
    """Run Python in the current folder and return its processor time. Raises CalledProcessError if it fails."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    path = os.pathsep.join([str(Path.cwd()), os.environ.get("PYTHONPATH", "")])
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    subprocess.run([sys.executable, *arguments], env=environment, stdout=subprocess.DEVNULL, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 2)


if __name__ == "__main__":
    main()
