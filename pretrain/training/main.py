"""The training command: `run.py CONFIG [key=value ...] [--dry-run]`.

It imports slow packages late, so an error in the configuration is reported immediately.
"""

import argparse
import logging
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from data_prep.utils.console import UserError, exit_on_user_error, file_system_error, ignore_output_errors, report
from data_prep.utils.launch_env import is_silent_rank
from pretrain.config import RunConfig, load_config
from pretrain.imports import libraries
from pretrain.run_folder import list_steps, read_status, write_status
from pretrain.training.rank_log import RankLog
from pretrain.training.stop import Stopped, StopRequest

logger = logging.getLogger(__name__)

ABORT_GRACE_SECONDS = 10.0
"""Time that a rank waits for mpirun to end it after rank 0 has aborted, in seconds."""

if TYPE_CHECKING:
    from pretrain.training.distributed import World

EXIT_CODE_STOPPED = 75
"""Exit code of a run that stopped on request and can resume (EX_TEMPFAIL). Launchers may replace this code, so
status.json records the state too."""


def main() -> None:
    """Parse the command line; train, or with --dry-run print the resource estimate of the run."""
    parser = argparse.ArgumentParser(
        description="Pretrain a language model. Start this command with deepspeed, torchrun or srun for several "
        "processes, or directly for one."
    )
    parser.add_argument("config", help="YAML configuration file of the run")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="overrides of the file, with dotted keys"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print parameters, batch, FLOPs, steps and memory of the run without starting it",
    )
    # deepspeed passes --local_rank, but the environment has the same value
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    arguments = parser.parse_intermixed_args()  # allows key=value after --dry-run
    action = plan if arguments.dry_run else run_and_leave_group
    exit_on_user_error(lambda: action(load_config(arguments.config, arguments.overrides)), silent=is_silent_rank)


def plan(config: RunConfig) -> None:
    """Print the resource estimate of the run."""
    with libraries():
        from pretrain.training.dry_run import dry_run

    dry_run(config)


def run_and_leave_group(config: RunConfig) -> None:
    """Train, then leave the process group. With several ranks this ends the process."""
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
    """Train according to the configuration; exit with EXIT_CODE_STOPPED if the run stops before its end."""
    stop = StopRequest()  # from here on a signal is stored until all ranks can act on it together
    with libraries(compiles=config.train.compile):
        from pretrain.training.distributed import RendezvousError, init_world

    try:
        world = init_world()
    except RendezvousError as error:  # not an error in the configuration, so a restart may succeed
        report(error, silent=is_silent_rank())
        sys.exit(1)
    try:
        log = world.run_and_sync_errors(lambda: RankLog(config.run_dir, world.rank))
    except UserError as error:
        _exit_with_error(world, error)
    with log:
        _train(config, world, stop, log)


def _train(config: RunConfig, world: "World", stop: StopRequest, log: RankLog) -> None:
    with libraries(compiles=config.train.compile):
        from pretrain.training.first_error import report_first_error
        from pretrain.training.setup import RunLock, set_up

    trainer = None
    lock = RunLock(config.run_dir)
    try:
        trainer = set_up(config, world, stop, lock)
        if trainer is None:
            return
        trainer.print_fatal = log.print_fatal
        status = trainer.train()
    except UserError as error:
        if trainer and world.is_main:
            write_status(config.run_dir, "failed", trainer.progress.step, str(error), can_restart=False)
        _exit_with_error(world, error)
    except Stopped as stopped:
        if world.is_main:
            step = max(list_steps(config.run_dir / "checkpoints"), default=0)
            write_status(config.run_dir, "resumable", step, str(stopped))
            logger.info(f"resumable at step {step}: {config.run_dir}")
        world.barrier()
        sys.exit(EXIT_CODE_STOPPED)
    except Exception as error:
        step = trainer.progress.step if trainer else read_status(config.run_dir).get("step", 0)
        log.write_traceback(error)
        if world.size == 1:
            if lock.held:
                write_status(config.run_dir, "failed", step, f"{type(error).__name__}: {error}")
            if trainer and (problem := file_system_error(error)):  # may be over soon, so a restart may succeed
                report(problem)
                sys.exit(1)
            raise
        line = report_first_error(world, error, step, log.print_fatal)
        # a peer that can no longer reach rank 0 does not know the cause, which rank 0 may have written already
        is_known = not world.is_main and read_status(config.run_dir).get("status") == "failed"
        if line is not None and lock.held and not is_known:  # without the lock, another run owns the folder
            write_status(config.run_dir, "failed", step, line)
        log.close()
        os._exit(1)
    if world.is_main:
        write_status(config.run_dir, status, trainer.progress.step, trainer.reason)
        lock.release()
        logger.info(f"{status} at step {trainer.progress.step}: {config.run_dir}")
    world.barrier()
    if status == "resumable":
        sys.exit(EXIT_CODE_STOPPED)


def _exit_with_error(world: "World", error: UserError) -> NoReturn:
    """Print an error that all ranks have raised, and exit with code 2."""
    report(error, silent=not world.is_main)
    if world.size > 1:
        # mpirun kills all ranks when the first one ends, so wait here until the main rank has printed the error.
        world.barrier()
        if (mpi := sys.modules.get("mpi4py.MPI")) and world.is_main:
            mpi.COMM_WORLD.Abort(2)
        time.sleep(ABORT_GRACE_SECONDS if mpi else 0)
        os._exit(2)  # skips teardown, because gloo aborts a process that is torn down after its peers
    sys.exit(2)
