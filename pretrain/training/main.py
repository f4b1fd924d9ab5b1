"""The training command: `run.py CONFIG [key=value ...] [--dry-run]`. Light, so that a mistake in the configuration shows at once."""

import argparse
import os
import sys
import warnings

from data_prep.console import UserError, exit_on_user_error, report
from pretrain.config import RunConfig, load_config
from pretrain.run_folder import read_status, write_status
from pretrain.training.stop import StopRequest

STOPPED = 75
"""Exit code of a run that was asked to stop and can go on (EX_TEMPFAIL); launchers may lose it, status.json does not."""


def main() -> None:
    """Parse the command line; train, or with --dry-run print what training would take."""
    parser = argparse.ArgumentParser(
        description="Pretrain a language model. Started by deepspeed, torchrun or srun on several processes, or as it is on one.")
    parser.add_argument("config", help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted keys of the YAML file")
    parser.add_argument("--dry-run", action="store_true", help="print parameters, batch, FLOPs, steps and memory of the run, and start nothing")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # deepspeed passes it; the environment says the same
    arguments = parser.parse_intermixed_args()  # key=value may stand behind --dry-run too
    action = plan if arguments.dry_run else run
    exit_on_user_error(lambda: action(load_config(arguments.config, arguments.overrides)), silent=_another_process_speaks)


def _another_process_speaks() -> bool:
    """Every rank meets the same mistake; one on each node reports it."""
    return int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0) != 0


def plan(config: RunConfig) -> None:
    """Print what the run would take."""
    _quiet()
    from pretrain.training.dry_run import dry_run

    dry_run(config)


def run(config: RunConfig) -> None:
    """Train as the configuration says; ends the process with STOPPED where a signal came first."""
    stop = StopRequest()  # from here on a signal is kept until all ranks can agree on it
    _quiet()
    from pretrain.training.distributed import init_world
    from pretrain.training.setup import set_up

    try:
        world, trainer = init_world(), None
    except UserError as error:  # the ranks cannot meet: no mistake of the configuration, another start may succeed
        report(error, silent=_another_process_speaks())
        sys.exit(1)
    try:
        trainer = set_up(config, world, stop)
        if trainer is None:
            return
        status = trainer.train()
    except UserError as error:
        if trainer and world.is_main:
            write_status(config.run_dir, "failed", trainer.progress.step, str(error), again=False)
        if world.size > 1:  # at once: gloo aborts a process that is torn down after its peers
            report(error, silent=_another_process_speaks())
            os._exit(2)
        raise
    except Exception as error:
        if world.is_main and config.run_dir.exists():
            write_status(config.run_dir, "failed", read_status(config.run_dir).get("step", 0), f"{type(error).__name__}: {error}")
        raise
    if world.is_main:
        trainer.metrics.close()
        write_status(config.run_dir, status, trainer.progress.step, trainer.reason)
        trainer.lock.close()
        print(f"{status} at step {trainer.progress.step}: {config.run_dir}", flush=True)
    world.barrier()
    if status == "resumable":
        sys.exit(STOPPED)


def _quiet() -> None:
    """Silence what the libraries say at every start."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning)
