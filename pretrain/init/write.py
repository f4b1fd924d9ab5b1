"""The text of a configuration, with a comment for each value."""

import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from data_prep.inspection.held_out import HeldOut
from data_prep.inspection.look import Inspection
from pretrain.init.budget import (
    FITTING,
    LONGEST,
    MOST_EPOCHS,
    TOKENS_PER_PARAMETER,
    Budget,
    rounded,
    time_text,
)
from pretrain.init.task import TaskChoice
from pretrain.planning.speed import Machine

WIDTH = 120
MONITORED_PAIRS = 1000
"""Number of validation records that the monitors use."""
CHECK = "check: "
"""Beginning of a comment on an ambiguous point."""


@dataclass(frozen=True)
class Choices:
    """Everything that a written configuration depends on."""

    path: Path
    inspection: Inspection
    budget: Budget
    task: TaskChoice
    machine: Machine
    commands: tuple[str, ...]
    """Commands that use the configuration, in order."""
    held_out: HeldOut | None = None
    """Training rows that are the test rows, if there is no test split."""

    @property
    def name(self) -> str:
        """Name of the run: the name of the file."""
        return run_name(self.path)


def run_name(path: Path) -> str:
    """Return the name of a run from the name of its configuration, with letters that the name may have."""
    name = "".join(letter if letter.isalnum() or letter in "_.+-" else "-" for letter in path.stem)
    return name if name[:1].isalnum() or name.startswith("_") else f"run{name}"


def validation_fraction(total: int) -> float:
    """Return the fraction of records that is held out: enough for the monitors, but at most 5%, or 10% of few."""
    if total < MONITORED_PAIRS:
        return 0.1
    return min(0.05, max(0.001, float(f"{MONITORED_PAIRS / total:.1g}")))


def render(choices: Choices) -> str:
    """Return the text of the configuration."""
    lines = [
        *_comment("", f"Made by jepa-init for {choices.inspection.where}. The comments give the reasons."),
        *_comment("", f"Comments that begin with {CHECK.strip()} name ambiguous points."),
        *(f"#   {command}" for command in choices.commands),
        f"name: {flow(choices.name)}",
        "seed: 1",
        "output_dir: runs",
        "",
        *_data(choices),
        "",
        *_model(choices),
        "",
        *_objective(choices),
        "",
        *_train(choices),
        "",
        *_rest(choices),
    ]
    return "\n".join(lines) + "\n"


def reasons(choices: Choices) -> list[tuple[str, str, str]]:
    """Return the main choices for the console: key, value and reason."""
    inspection, budget = choices.inspection, choices.budget
    mapping = inspection.choice.mapping
    views = mapping if isinstance(mapping, str) else ", ".join(f"{view}: {column}" for view, column in mapping.items())
    tasks = ", ".join(str(task["name"]) for task in choices.task.tasks)
    rows = [
        ("views", views.replace("\n", "\\n"), inspection.choice.reason),
        ("vocabulary", f"{inspection.vocabulary:,}", vocabulary_reason(inspection)),
        ("row length", f"{budget.row_length:,}", row_reason(choices)),
        ("model", f"{budget.parameters:,} parameters", model_reason(choices)),
        ("budget", budget_text(budget).replace("_", ","), budget_reason(choices)),
        ("batch", f"{budget.rows} rows", batch_reason(choices)),
        ("learning rate", f"{budget.learning_rate:g}", rate_reason(budget)),
        ("task", tasks + (" (a comment)" if choices.task.off else ""), choices.task.off or choices.task.reason),
    ]
    if choices.held_out:
        reason = "training rows, because there is no test split; the preparation drops them from training"
        rows.append(("test rows", f"{len(choices.held_out.rows):,}", reason))
    return rows


def data_questions(choices: Choices) -> list[str]:
    """Return the ambiguous points of the data."""
    inspection = choices.inspection
    found = [*inspection.choice.questions, *inspection.found.notes]
    if choices.budget.dropped > 1 - FITTING:
        found.append(f"{choices.budget.dropped:.1%} of the records are too long for a row and are dropped")
    if choices.held_out and choices.held_out.similar:
        found.append(
            f"{choices.held_out.similar:,} training records share a long passage with a test row and are dropped from "
            "training too; decontaminate: false keeps them, and the test rows"
        )
    if choices.budget.records < 1000:
        found.append(f"{choices.budget.records:,} records are enough to try the commands, but not to learn a task")
    return found


def malformed_text(inspection: Inspection) -> str:
    """Return the number of rows that are not valid records, and the first of them."""
    count = len(inspection.malformed)
    rows = f"{count:,} rows are" if count > 1 else "1 row is"
    return f"{rows} not valid and dropped, such as {inspection.malformed[0][:200]}"


def held_out_text(held_out: HeldOut) -> str:
    """Return how the test rows were made."""
    return (
        f"The data have no test split: {len(held_out.rows):,} training rows, drawn by a hash of the context, are the "
        "test rows. The preparation drops them from the training data."
    )


def vocabulary_reason(inspection: Inspection) -> str:
    """Return why the vocabulary has its size."""
    mean = inspection.tokens // inspection.vocabulary
    source = "a piece needs about 100 occurrences, arXiv 2004.02334"
    return f"{mean:,} of {inspection.tokens:,} tokens per piece; {source}"


def row_reason(choices: Choices) -> str:
    """Return why rows have their length."""
    if choices.inspection.is_text:
        return f"longer documents are cut; a usual length on {choices.machine.device}"
    fitting = f"{1 - choices.budget.dropped:.2%} of the" if choices.budget.dropped else "all"
    return f"fits {fitting} records, with the copy of the target"


def model_reason(choices: Choices) -> str:
    """Return why the model has its shape."""
    budget = choices.budget
    per_parameter = budget.tokens / budget.parameters
    if budget.is_smallest:
        return (
            f"the smallest shape: {per_parameter:.1f} tokens per parameter, below the {TOKENS_PER_PARAMETER} of "
            "arXiv 2203.15556"
        )
    return f"the largest shape with {TOKENS_PER_PARAMETER} tokens per parameter (arXiv 2203.15556): {per_parameter:.0f}"


def budget_text(budget: Budget) -> str:
    """Return the budget as a key and its value."""
    if budget.epochs >= 1:
        return f"epochs: {budget.epochs:.0f}"
    digits = len(str(budget.tokens)) - 2
    return f"tokens: {max(1, round(budget.tokens, -digits)):_}"


def budget_reason(choices: Choices) -> str:
    """Return why the budget has its size."""
    budget = choices.budget
    limit = f"{LONGEST[choices.machine.device] / 3600:.0f} h on {choices.machine.described}"
    if budget.is_limited_by_time:
        return f"fits into {limit}; about {budget.steps:,} steps"
    return f"more than {MOST_EPOCHS} add little, arXiv 2305.16264; about {budget.steps:,} steps"


def batch_reason(choices: Choices) -> str:
    """Return why a batch has its number of rows."""
    budget = choices.budget
    return f"{budget.rows * budget.row_length:,} positions; by arXiv 2401.02954, with at least 200 steps if possible"


def rate_reason(budget: Budget) -> str:
    """Return why the learning rate has its value."""
    return f"2e-3 for width 144 (docs/studies), 3e-4 for width 2048; this width is {budget.shape['hidden_size']}"


def flow(value: Any) -> str:
    """Return a value as YAML on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10**9)
    return text.removesuffix("\n").removesuffix("\n...")


def _comment(indent: str, text: str) -> list[str]:
    width = WIDTH - len(indent) - 2
    return [f"{indent}# {line}" for line in textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)]


def _line(indent: str, text: str, reason: str) -> list[str]:
    """Return a key with its reason: on the same line if there is room, else above it."""
    line = f"{indent}{text}  # {reason}"
    return [line] if len(line) <= WIDTH else [*_comment(indent, reason), f"{indent}{text}"]


def _data(choices: Choices) -> list[str]:
    inspection, budget = choices.inspection, choices.budget
    lines = ["data:", f"  path: {flow(f'runs/data/{choices.name}')}", *_sources(choices)]
    if inspection.malformed:
        lines += _line("  ", "on_malformed: drop", CHECK + malformed_text(inspection))
    if inspection.repeated:
        lines += _line("  ", "deduplicate: exact", f"{inspection.repeated:,} training records are repeated")
    if seen := [
        (split, count)
        for split in ("validation", "test")
        if split in inspection.samples and (count := inspection.seen_contexts(split))
    ]:
        counts = " and ".join(f"{count:,} {split}" for split, count in seen)
        lines += _line(
            "  ", "decontaminate: true", f"{counts} records have a context that is also in the training data"
        )
    if choices.held_out:
        lines += _line("  ", "decontaminate: true", "drops the test rows of the task from the training data")
    if "validation" not in inspection.found.splits:
        lines += _line(
            "  ",
            f"validation_fraction: {(fraction := validation_fraction(budget.records))}",
            f"no validation split; about {fraction * budget.records:,.0f} records, of which the monitors use up to "
            f"{MONITORED_PAIRS:,}",
        )
    lines += _line("  ", f"tokenizer: {{vocab_size: {inspection.vocabulary}}}", vocabulary_reason(inspection))
    return lines + _line("  ", f"sequence_length: {budget.row_length}", row_reason(choices))


def _sources(choices: Choices) -> list[str]:
    inspection = choices.inspection
    choice = inspection.choice
    lines = _line("  ", f"views: {flow(list(choice.views))}", choice.reason)
    lines += [line for question in data_questions(choices) for line in _comment("  ", CHECK + question)]
    lines.append("  sources:")
    for split in ("train", "validation"):
        values = inspection.found.splits.get(split)
        if values is not None:
            source = values | ({} if split == "train" else {"split": split}) | {"views": choice.mapping}
            languages = _languages(inspection) if split == "train" else ""
            lines += [*(_comment("    ", languages) if languages else []), *_entry("    ", source)]
    return lines


def _entry(indent: str, values: dict[str, Any]) -> list[str]:
    """Return an entry of a list, on one line if there is room."""
    line = f"{indent}- {flow(values)}"
    if len(line) <= WIDTH:
        return [line]
    first, *others = [f"{key}: {flow(value)}" for key, value in values.items()]
    return [f"{indent}- {first}", *(f"{indent}  {other}" for other in others)]


def _languages(inspection: Inspection) -> str:
    """Return the contents of the columns of the views."""
    mapping = inspection.choice.mapping
    used = mapping if isinstance(mapping, str) else " ".join(mapping.values())
    columns = [
        column for column in inspection.columns if column.name in used.replace("{", " ").replace("}", " ").split()
    ]
    return "; ".join(f"{column.name}: {column.described}" for column in columns)


def _model(choices: Choices) -> list[str]:
    shape = [f"    {key}: {flow(value)}" for key, value in choices.budget.shape.items()]
    return ["model:", "  family: llama", *_line("  ", "shape:", model_reason(choices)), *shape]


def _objective(choices: Choices) -> list[str]:
    if choices.inspection.is_text:
        return [
            "objective:",
            *_line(
                "  ",
                "name: semantic_tube",
                "one view makes no pairs, which this term does not need (docs/objectives.md)",
            ),
            *_line("  ", "weight: 0.02", "a published weight, arXiv 2602.22617"),
        ]
    return [
        "objective:",
        *_line("  ", "name: llm_jepa", "objective.name=next_token trains the baseline on the same records"),
        *_line("  ", "distance: info_nce", "the paper's cosine collapses from random weights (docs/objectives.md)"),
        *_line("  ", "weight: 0.1", "the value of this project's studies (docs/studies)"),
        "  predictor_tokens: 1",
    ]


def _train(choices: Choices) -> list[str]:
    budget = choices.budget
    key = budget_text(budget)
    on_gpu = choices.machine.device == "cuda"
    return [
        "train:",
        *_line("  ", key, budget_reason(choices)),
        *_line("  ", f"global_batch_rows: {budget.rows}", batch_reason(choices)),
        *_line("  ", f"micro_batch_rows: {budget.micro_rows}", f"rows of a forward pass on one of {_ranks(choices)}"),
        *_line("  ", f"learning_rate: {_rate(budget.learning_rate)}", rate_reason(budget)),
        "  warmup_fraction: 0.05",
        *(_line("  ", "precision: bf16", "for GPUs") if on_gpu else []),
    ]


def _rate(rate: float) -> str:
    """Return a rate such as 2.0e-3, which YAML reads as a number."""
    digits, _, exponent = f"{rate:.1e}".partition("e")
    return f"{digits}e{int(exponent)}"


def _ranks(choices: Choices) -> str:
    return choices.machine.described if choices.machine.processes > 1 else f"{choices.machine.described} in all"


def _rest(choices: Choices) -> list[str]:
    budget = choices.budget
    lines = [
        *_line(
            "", f"checkpoint: {{every: {rounded(budget.steps / 5)}}}", f"training takes {time_text(budget.seconds)}"
        ),
        f"monitor: {{log_every: {rounded(budget.steps / 50)}, validate_every: {rounded(budget.steps / 10)}}}",
        "",
    ]
    task = choices.task
    entries = [line for entry in task.tasks for line in _entry("    ", entry)]
    if task.off:
        section = ["evaluation:", "  tasks:", *entries]
        return [*lines, *_comment("", CHECK + task.off), *(f"# {line}" for line in section)]
    checks = [line for question in task.questions for line in _comment("  ", CHECK + question)]
    made = [] if choices.held_out is None else _comment("  ", held_out_text(choices.held_out))
    return [*lines, "evaluation:", *checks, *made, *_line("  ", "tasks:", task.reason), *entries]
