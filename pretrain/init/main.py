"""The init command: look at data, and write a first configuration with the reason for each value."""

import argparse
import json
import logging
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.utils.console import UserError, exit_on_user_error, print_table

if TYPE_CHECKING:
    from data_prep.inspection.look import Inspection
    from pretrain.init.write import Choices

logger = logging.getLogger(__name__)

DEFAULT_OUTPUT = Path("configs/mine.yaml")
MOST_TEST_ROWS = {"cpu": 500, "cuda": None}
"""Largest number of test rows that are evaluated, because generation on a CPU takes minutes."""
LATER = ("evaluate", "status", "generate", "search")
COMMANDS = {
    True: ("python -m data_prep", "launcher/run.py", *(f"python launcher/{name}.py" for name in LATER)),
    False: ("jepa-prepare", "--module pretrain.training", *(f"jepa-{name}" for name in LATER)),
}
"""Commands for preparation and training, then the commands of LATER, by whether they run in a checkout."""


def main() -> None:
    """Parse the command line and write the configuration."""
    parser = argparse.ArgumentParser(
        description="Look at data and write a first configuration with the reason for each value: views, splits, "
        "tokenizer, row length, model, budget and a task. Ambiguous points are comments that begin with check.",
    )
    parser.add_argument(
        "data",
        metavar="FILE|FOLDER|HUB_NAME",
        help="JSON, CSV, Parquet, Arrow, text or Python files, or a hub data set",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=DEFAULT_OUTPUT,
        metavar="CONFIG",
        help=f"configuration file to write; default: {DEFAULT_OUTPUT}",
    )
    parser.add_argument("--config", metavar="NAME", help="configuration of a hub data set that has several")
    parser.add_argument("--force", action="store_true", help="replace the output file if it exists")
    arguments = parser.parse_args()
    exit_on_user_error(lambda: write_config(arguments.data, arguments.output, arguments.config, arguments.force))


def write_config(data: str, output: Path, config: str | None, force: bool) -> None:
    """Write a configuration for data, and print what was seen and chosen. Raises UserError."""
    if output.exists() and not force:
        raise UserError(f"{output} exists: choose another file with -o, or replace it with --force")
    if output.suffix not in (".yaml", ".yml"):
        raise UserError(f"-o {output}: the name of a configuration ends in .yaml")
    from data_prep.inspection.look import inspect  # imported late because it loads pyarrow

    started = time.monotonic()
    inspection = inspect(data, config)
    logger.info(f"read {data} in {time.monotonic() - started:.0f} s")
    _print_inspection(inspection)
    choices = _choose(inspection, output)
    if choices.held_out and held_out_path(output).exists() and not force:
        raise UserError(f"{held_out_path(output)} exists: choose another file with -o, or replace both with --force")
    choices = _write_checked(choices)
    _print_choices(choices)


def _choose(inspection: "Inspection", output: Path) -> "Choices":
    """Return all choices for the data on this machine."""
    from data_prep.inspection.held_out import hold_out
    from pretrain.init.budget import choose_budget  # imported late, because torch takes seconds to import
    from pretrain.init.task import choose_task
    from pretrain.init.write import Choices
    from pretrain.planning.speed import this_machine

    machine = this_machine()
    held_out = hold_out(inspection)
    test = None if held_out is None else str(held_out_path(output))
    task = choose_task(inspection, MOST_TEST_ROWS[machine.device], test)
    budget = choose_budget(inspection, machine)
    commands = next_commands(output, machine.processes, not task.off)
    return Choices(output, inspection, budget, task, machine, commands, held_out)


def held_out_path(output: Path) -> Path:
    """Return the file of the test rows that are made from training rows."""
    return output.with_name(f"{output.stem}-test.jsonl")


def next_commands(output: Path, processes: int, evaluates: bool) -> tuple[str, str, str]:
    """Return the commands that prepare the corpus, train, and evaluate the run, or show its state."""
    from pretrain.init.write import run_name

    prepare, train, evaluate, status, *_ = COMMANDS[Path(sys.argv[0]).name == "init.py"]
    config = shlex.quote(str(output))
    last = evaluate if evaluates else status
    return (
        f"{prepare} {config}",
        f"deepspeed --num_gpus {processes} {train} {config}",
        f"{last} {shlex.quote(f'runs/{run_name(output)}')}",
    )


def use_commands(choices: "Choices") -> list[str]:
    """Return the commands that use a model of pairs. A model of labels is not searched with."""
    *_, generate, search = COMMANDS[Path(sys.argv[0]).name == "init.py"]
    run = shlex.quote(f"runs/{choices.name}")
    context, *others = choices.inspection.choice.views
    if not others:
        return []
    test = choices.task.tasks[0]["test"]
    index = shlex.quote(test) if isinstance(test, str) and not choices.task.off else "FILE"
    answer, find = f"{generate} {run} {context.upper()}", f"{search} {run} --index {index} {context.upper()}"
    return [answer] if choices.task.is_labels else [answer, find]


def _write_checked(choices: "Choices") -> "Choices":
    """Write the file after the checks of the dry run, and return the choices.

    A task whose rows do not fit becomes a comment. Raises UserError if the configuration does not pass.
    """
    from dataclasses import replace

    from data_prep.utils.files import atomic_path, write_text
    from pretrain.config import load_config
    from pretrain.init.write import render
    from pretrain.training.dry_run import checked_plan

    choices.path.parent.mkdir(parents=True, exist_ok=True)
    test = held_out_path(choices.path)
    if choices.held_out:
        lines = [json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in choices.held_out.rows]
        write_text(test, "".join(lines))
    with atomic_path(choices.path) as temporary:
        while True:
            temporary.write_text(render(choices), encoding="utf-8")
            try:
                checked_plan(load_config(temporary), choices.machine.processes)
                return choices
            except UserError as error:
                if choices.held_out:
                    test.unlink()
                if choices.task.off or "evaluation.tasks" not in str(error):
                    raise
                task = replace(choices.task, off=f"the task does not accept its rows: {error}")
                commands = next_commands(choices.path, choices.machine.processes, evaluates=False)
                choices = replace(choices, task=task, commands=commands, held_out=None)


def _print_inspection(inspection: "Inspection") -> None:
    """Print the tables of splits and columns."""
    rows = [("split", "source", "rows", "unreadable", "contexts in train")]
    for split, sample in inspection.samples.items():
        values = inspection.found.splits[split]
        source = values["path"] + (f" ({values['hub_split']})" if "hub_split" in values else "")
        count = f"{sample.total:,}" if sample.complete else f"about {sample.total:,}"
        seen = "" if split == "train" else f"{inspection.seen_contexts(split):,}"
        rows.append((split, source, count, f"{len(sample.problems):,}", seen))
    print_table(rows)
    table = [("column", "content", "filled", "different", "characters", "longest")]
    for column in inspection.columns:
        has_text = column.kind == "text"
        table.append(
            (
                column.name,
                column.described,
                f"{column.filled / max(1, column.rows):.0%}",
                f"{column.distinct:,}" if has_text else "",
                f"{column.median:,}" if has_text else "",
                f"{column.longest:,}" if has_text else "",
            )
        )
    print_table(table)
    lengths = inspection.lengths
    means = ", ".join(
        f"{view} {mean:.0f}" for view, mean in zip(inspection.choice.views, lengths.mean(axis=0), strict=True)
    )
    print(
        f"\n{inspection.total:,} different records, {inspection.repeated:,} repeated, {inspection.incomplete:,} "
        f"incomplete; about {inspection.tokens:,} tokens (mean per record: {means})",
        flush=True,
    )


def _print_choices(choices: "Choices") -> None:
    """Print the choices with their reasons, the ambiguous points, the predicted time and the next commands."""
    from pretrain.init.budget import time_text
    from pretrain.init.write import CHECK, data_questions, malformed_text, reasons

    rows = reasons(choices)
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    print()
    for key, value, reason in rows:
        print(f"{key.ljust(widths[0])}  {value.ljust(widths[1])}  {reason}")
    malformed = [malformed_text(choices.inspection)] if choices.inspection.malformed else []
    for question in [*data_questions(choices), *malformed, *choices.task.questions]:
        print(f"{CHECK}{question}")
    machine = choices.machine.described
    files = f"{choices.path} and {held_out_path(choices.path)}" if choices.held_out else str(choices.path)
    print(f"\nwrote {files}; the configuration passes --dry-run")
    seconds = time_text(choices.budget.seconds)
    print(f"training takes {seconds} on {machine} if it is idle (estimated from measured steps). Next:")
    for command in choices.commands:
        print(f"  {command}")
    if commands := use_commands(choices):
        print("Then use the model:", *commands, sep="\n  ")
