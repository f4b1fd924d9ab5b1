"""The training command: `run.py CONFIG [key=value ...] [--dry-run]`. Light, so that a mistake in the configuration shows at once."""

import argparse
import os
import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from data_prep.console import UserError, exit_on_user_error, ignore_output_errors, report
from data_prep.launch_env import is_silent_rank
from pretrain.config import RunConfig, load_config
from pretrain.run_folder import list_steps, read_status, write_status
from pretrain.training.rank_log import RankLog
from pretrain.training.stop import Stopped, StopRequest

ABORT_GRACE_SECONDS = 10.0
"""Seconds in which mpirun ends the other ranks."""

if TYPE_CHECKING:
    from pretrain.training.distributed import World

EXIT_CODE_STOPPED = 75
"""Exit code of a run that was asked to stop and can go on (EX_TEMPFAIL); launchers may lose it, status.json does not."""


def main() -> None:
    """Parse the command line; train, or with --dry-run print what training would take."""
    parser = argparse.ArgumentParser(
        description="Pretrain a language model. Started by deepspeed, torchrun or srun on several processes, or as it is on one."
    )
    parser.add_argument("config", help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted keys of the YAML file")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print parameters, batch, FLOPs, steps and memory of the run, and start nothing",
    )
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # deepspeed passes it; the environment says the same
    arguments = parser.parse_intermixed_args()  # key=value may stand behind --dry-run too
    action = plan if arguments.dry_run else run_alone
    exit_on_user_error(lambda: action(load_config(arguments.config, arguments.overrides)), silent=is_silent_rank)


def plan(config: RunConfig) -> None:
    """Print what the run would take."""
    _quiet()
    from pretrain.training.dry_run import dry_run

    dry_run(config)


def run_alone(config: RunConfig) -> None:
    """Train as the only run of this process, which leaves its process group afterwards, and with it ends if there are other ranks."""
    from data_prep.shards import read_manifest

    read_manifest(Path(config.data.path))  # report a missing corpus before torch and DeepSpeed are loaded
    code = 0
    try:
        with ignore_output_errors():
            run(config)
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    from pretrain.training.distributed import leave_group

    leave_group(code)
    if code:
        sys.exit(code)


def run(config: RunConfig) -> None:
    """Train as the configuration says; ends the process with EXIT_CODE_STOPPED where a signal came first."""
    stop = StopRequest()  # from here on a signal is kept until all ranks can agree on it
    _quiet()
    from pretrain.training.distributed import RendezvousError, init_world

    try:
        world = init_world()
    except RendezvousError as error:  # no mistake of the configuration, another start may succeed
        report(error, silent=is_silent_rank())
        sys.exit(1)
    try:
        log = world.run_and_sync_errors(lambda: RankLog(config.run_dir, world.rank))
    except UserError as error:
        _end(world, error)
    with log:
        _train(config, world, stop, log)


def _train(config: RunConfig, world: "World", stop: StopRequest, log: RankLog) -> None:
    from pretrain.training.first_error import report_first_error
    from pretrain.training.setup import RunLock, set_up

    trainer, lock = None, RunLock(config.run_dir)
    try:
        trainer = set_up(config, world, stop, lock)
        if trainer is None:
            return
        trainer.print_fatal = log.print_fatal
        status = trainer.train()
    except UserError as error:
        if trainer and world.is_main:
            write_status(config.run_dir, "failed", trainer.progress.step, str(error), can_restart=False)
        _end(world, error)
    except Stopped as stopped:
        if world.is_main:
            step = max(list_steps(config.run_dir / "checkpoints"), default=0)
            write_status(config.run_dir, "resumable", step, str(stopped))
            print(f"resumable at step {step}: {config.run_dir}", flush=True)
        world.barrier()
        sys.exit(EXIT_CODE_STOPPED)
    except Exception as error:
        step = trainer.progress.step if trainer else read_status(config.run_dir).get("step", 0)
        log.write_traceback(error)
        if world.size == 1:
            if lock.held:
                write_status(config.run_dir, "failed", step, f"{type(error).__name__}: {error}")
            raise
        line = report_first_error(world, error, step, log.print_fatal)
        if line is not None and lock.held:  # otherwise another run owns the folder
            write_status(config.run_dir, "failed", step, line)
        log.close()
        os._exit(1)
    if world.is_main:
        assert trainer.metrics is not None  # the main rank has it
        trainer.metrics.close()
        write_status(config.run_dir, status, trainer.progress.step, trainer.reason)
        lock.release()
        print(f"{status} at step {trainer.progress.step}: {config.run_dir}", flush=True)
    world.barrier()
    if status == "resumable":
        sys.exit(EXIT_CODE_STOPPED)


def _end(world: "World", error: UserError) -> NoReturn:
    """End in the line of a mistake that all ranks have met, and exit code 2."""
    report(error, silent=not world.is_main)
    if world.size > 1:
        world.barrier()  # mpirun kills what is left when the first rank ends, before it has spoken, and with an exit code of its own
        if (mpi := sys.modules.get("mpi4py.MPI")) and world.is_main:
            mpi.COMM_WORLD.Abort(2)
        time.sleep(ABORT_GRACE_SECONDS if mpi else 0)
        os._exit(2)  # at once: gloo aborts a process that is torn down after its peers
    sys.exit(2)


def _quiet() -> None:
    """Silence what the libraries say at every start."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning)
