"""The choice of the context and the target among the columns of rows, from their names and their contents."""

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from data_prep.config import MAX_VIEWS, DataConfig
from data_prep.inspection.columns import Column
from data_prep.sources.chat import COLUMNS
from data_prep.utils.console import UserError

CONTEXT, TARGET = "context", "target"
"""Names of the views of a pair whose columns cannot give their names to the views."""
TARGET_NAMES = {
    *("answer", "answers", "output", "response", "completion", "target", "solution", "reply", "chosen", "gold"),
    *("sql", "code", "regex", "regexp", "label", "labels", "class", "category", "sentiment", "stars", "rating"),
    *("translation", "summary", "highlights", "func_code_string", "correct_answer", "best_answer", "tgt", "positive"),
    "query",
}
"""Names of columns that usually hold what a model shall predict."""
CONTEXT_NAMES = {
    *("question", "prompt", "instruction", "input", "context", "premise", "hypothesis", "source", "problem", "src"),
    *("text", "sentence", "review", "comment", "utterance", "document", "article", "description", "nl", "anchor"),
    *("docstring", "func_documentation_string", "sql_context", "sql_prompt", "passage", "body", "content", "dialogue"),
}
"""Names of columns that usually hold what a model is given."""
FILLED = 0.5
"""Smallest fraction of rows with a value in a column that can be a view."""
NEARLY_ALL = 0.99
"""Smallest fraction of rows with a value in a column that is joined with other ones, because a view of several
columns is absent if one of them is."""
CONTENTS = {"labels": "labels", "SQL": "SQL queries", "regex": "regexes", "code": "code", "numbers": "numbers"}
"""Contents of a column that is usually the target, in words."""
MOST_JOINED = 3
"""Maximum number of columns in a context."""


@dataclass
class ViewChoice:
    """The views, and the columns from which they are made."""

    mapping: dict[str, str] | str
    """`views` of the sources: the column or template of each view, or one column of lists of texts."""
    views: tuple[str, ...]
    """`data.views`."""
    target: Column | None
    """Column of the target; None if the views are not made from columns with different roles."""
    reason: str
    questions: list[str] = field(default_factory=list)
    """Ambiguous points, as sentences for the user."""


def choose_views(columns: Sequence[Column], where: str) -> ViewChoice:
    """Return the views of rows with these columns. Raises UserError if no column has text."""
    usable = [column for column in columns if column.kind == "text" and column.filled >= FILLED * column.rows]
    names = {column.name for column in usable}
    turns = {column.name for column in usable if column.is_role}
    conversations = [name for name in COLUMNS if {f"{name}.user", f"{name}.assistant"} <= turns]
    if conversations:
        return _conversation(conversations[0], columns)
    if {"db_id", "question", "query"} <= names:
        target = next(column for column in usable if column.name == "query")
        mapping = {CONTEXT: "For db_id:[{db_id}]\n\n{question}", TARGET: "query"}
        reason = "the columns of Spider; the context names the database, as in its public form"
        return ViewChoice(mapping, (CONTEXT, TARGET), target, reason)
    candidates = [column for column in usable if not column.is_identifier and _varies(column)]
    candidates = [column for column in candidates if column.content != "numbers" or _name_in(column, TARGET_NAMES)]
    texts = [column for column in candidates if column.content != "labels"]
    if texts:
        candidates = [column for column in candidates if column in texts or _is_target_label(column, texts)]
    lists = [column for column in columns if column.kind == "texts" and column.filled >= FILLED * column.rows]
    if lists and not texts:
        return _lists(lists)
    several = max((column.several_turns for column in columns), default=0)
    if not texts and several:
        raise UserError(
            f"{where}: {several:,} of {columns[0].rows:,} conversations have several turns, but a view holds one turn "
            "of a role: split the conversations into one row per answer"
        )
    if not texts:
        labels = ", ".join(column.name for column in candidates) or "none"
        found = [column.name + (f" ({column.unreadable})" if column.unreadable else "") for column in columns]
        raise UserError(
            f"{where}: no column has text to train on (columns: {', '.join(found)}; with few different values: "
            f"{labels}); add a column of texts"
        )
    choice = _single(texts[0]) if len(candidates) == 1 else _pair(candidates, texts)
    _check_names(choice, columns, where)
    choice.questions += _unused(choice, columns)
    return choice


def _check_names(choice: ViewChoice, columns: Sequence[Column], where: str) -> None:
    """Raise UserError if the name of a column that a view needs has another meaning in `views`."""
    assert isinstance(choice.mapping, dict)
    for column in columns:
        conversation, dot, _ = column.name.partition(".")
        meaning = "braces mark the columns of a template" if re.search("[{}]", column.name) else ""
        if dot and conversation in COLUMNS and not column.is_role:
            meaning = f"it names a role of a conversation in {conversation}"
        if meaning and any(column.name in view for view in choice.mapping.values()):
            raise UserError(
                f"{where}: the column {column.name!r} cannot become a view, because {meaning}: rename the column"
            )


def _is_target_label(column: Column, texts: Sequence[Column]) -> bool:
    """Return whether a column with few different values is what a model shall predict, and not a property of the row.

    Its name must be one of a target, or the row must consist of a text to classify: one text, named as a context.
    """
    named = any(part in TARGET_NAMES for part in re.split(r"[\W_]+", column.name.lower()))
    return named or (len(texts) == 1 and _name_in(texts[0], CONTEXT_NAMES))


def _varies(column: Column) -> bool:
    return column.distinct > 1


def _base_name(column: Column) -> str:
    """Return the name of a column without a number or letter that distinguishes it: `text` for `text_a`."""
    return re.sub(r"(?<=[a-z])([_-]?\d|[_-][a-c])$", "", column.name.lower())


def _name_in(column: Column, names: set[str]) -> bool:
    return column.name.lower() in names or _base_name(column) in names


def _quoted(columns: Sequence[Column]) -> str:
    return ", ".join(column.name for column in columns)


def _conversation(name: str, columns: Sequence[Column]) -> ViewChoice:
    roles = {column.name.partition(".")[2]: column for column in columns if column.name.startswith(f"{name}.")}
    mapping = {CONTEXT: f"{name}.user", TARGET: f"{name}.assistant"}
    choice = ViewChoice(mapping, (CONTEXT, TARGET), roles["assistant"], "the turns of a conversation")
    system = roles.get("system")
    if system is not None and system.distinct > 1:
        if system.filled >= NEARLY_ALL * system.rows:
            mapping[CONTEXT] = f"{{{name}.system}}\n{{{name}.user}}"
            choice.reason += "; system prompts differ, so the context has them"
        else:
            choice.questions.append(
                f"{system.filled:,} of {system.rows:,} rows have a system prompt, which the context does not have"
            )
    elif system is not None:
        choice.reason += "; all system prompts are equal and are not used"
    if several := max(roles["user"].several_turns, roles["assistant"].several_turns):
        choice.questions.append(
            f"{several:,} conversations have several turns, but a view holds one; split them into one row per answer"
        )
    if others := [column for column in columns if column not in roles.values() and not column.is_identifier]:
        choice.questions.append(f"columns that are not used: {_quoted(others)}")
    return choice


def _lists(lists: list[Column]) -> ViewChoice:
    """Return the views of a column of lists of texts: each text is the context of the next one."""
    column = lists[0]
    equal = column.median == column.longest and 2 < column.longest <= MAX_VIEWS
    views = tuple(f"text_{number}" for number in range(1, column.longest + 1)) if equal else (CONTEXT, TARGET)
    choice = ViewChoice(column.name, views, None, f"{column.name} has lists of texts; each is the context of the next")
    choice.questions.append(f"are all texts in a list of {column.name} about the same thing, such as paraphrases?")
    if len(lists) > 1:
        choice.questions.append(f"other columns of lists, which are not used: {_quoted(lists[1:])}")
    return choice


def _single(column: Column) -> ViewChoice:
    return ViewChoice({"text": column.name}, ("text",), column, "the only column of texts, so there are no pairs")


def _pair(candidates: list[Column], texts: list[Column]) -> ViewChoice:
    def by_name(column: Column) -> float:
        return 2.0 * _name_in(column, TARGET_NAMES) - 2.0 * _name_in(column, CONTEXT_NAMES)

    def toward_target(column: Column) -> float:
        """Return how much the name and the content of a column speak for the target, negative for the context."""
        content = {"labels": 0.5, "SQL": 1.5, "regex": 1.5, "code": 1.0, "numbers": 0.5}.get(column.content, 0.0)
        return by_name(column) + content

    order = {column.name: number for number, column in enumerate(candidates)}
    target = max(candidates, key=lambda column: (toward_target(column), order[column.name]))
    if texts == [target]:  # the only text is the context of a label
        target = max((one for one in candidates if one is not target), key=toward_target)
    others = [column for column in texts if column is not target]
    first = min(others, key=lambda column: (toward_target(column), order[column.name]))
    joined = [column for column in others if _belongs(column, first)]
    joined = joined if len(joined) <= MOST_JOINED else [first]
    context = first.name if len(joined) == 1 else "\n".join(f"{{{column.name}}}" for column in joined)
    views = (context, target.name) if _are_view_names(context, target.name) else (CONTEXT, TARGET)
    choice = ViewChoice(dict(zip(views, (context, target.name), strict=True)), views, target, "")
    difference = toward_target(target) - toward_target(first)
    if difference > 0 and by_name(target) > by_name(first):
        choice.reason = "chosen by the names of the columns"
    elif difference > 0 and target.content != "labels":
        choice.reason = f"chosen by the contents of the columns: {target.name} has {CONTENTS[target.content]}"
        choice.questions.append(
            f"the names of the columns do not decide which one is the context; swap them if {target.name} predicts "
            f"{first.name}"
        )
    elif target.content == "labels":
        choice.reason = f"{target.name} has only {target.distinct} values, so it is a label of the text"
        choice.questions.append(f"is {target.name} what the model shall predict from {_quoted(joined)}?")
    else:
        choice.reason = "chosen by the order of the columns"
        choice.questions.append(
            f"no name or content decides which column is the context; swap them if {target.name} predicts {first.name}"
        )
    if len(joined) > 1:
        choice.questions.append(f"the context joins {_quoted(joined)}; use one of them if that suffices")
        same_name = len({_base_name(column) for column in joined}) == 1
        if target.content == "labels" and same_name and len(joined) == 2:
            choice.questions.append(
                f"to predict {joined[1].name} from {joined[0].name} instead, keep only the rows whose {target.name} "
                "marks a pair (a source cannot filter by value)"
            )
    return choice


def _are_view_names(*names: str) -> bool:
    """Return whether columns may give their names to views. Other files with the same columns then need no mapping."""
    try:
        DataConfig.check_view_names(names)
    except ValueError:
        return False
    return True


def _belongs(column: Column, first: Column) -> bool:
    """Return whether a column is part of the context: the first column of it, or one that is named as a context."""
    if column is first:
        return True
    named = _name_in(column, CONTEXT_NAMES) and _name_in(first, CONTEXT_NAMES)
    same_name = _base_name(column) == _base_name(first)
    complete = min(column.filled / column.rows, first.filled / first.rows) >= NEARLY_ALL
    return complete and (named or same_name) and not _name_in(column, TARGET_NAMES)


def _unused(choice: ViewChoice, columns: Sequence[Column]) -> list[str]:
    """Return sentences on the columns that no view uses, except identifiers."""
    assert isinstance(choice.mapping, dict)
    used = " ".join(choice.mapping.values())
    named = [column for column in columns if not re.search(rf"(?<!\w){re.escape(column.name)}(?!\w)", used)]
    reasons: dict[str, list[Column]] = defaultdict(list)
    for column in named:
        if column.is_identifier:
            continue
        if column.kind == "texts":
            reasons["lists of texts, which must be joined to one text before a view can use them"].append(column)
        elif column.kind == "other":
            reasons[column.unreadable or "not text"].append(column)
        elif column.filled < FILLED * column.rows:
            reasons["mostly empty"].append(column)
        elif not _varies(column):
            reasons["the same value in all rows"].append(column)
        elif column.content == "labels":
            reasons["few different values; to predict them, make this column the target"].append(column)
        else:
            reasons["a template could join it to the context"].append(column)
    return [f"not used: {_quoted(columns)} ({reason})" for reason, columns in reasons.items()]
