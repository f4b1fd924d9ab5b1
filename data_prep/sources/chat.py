"""Conversations: rows with `messages` (role, content), or with ShareGPT's `conversations` (from, value)."""

from collections.abc import Callable
from typing import Any

from data_prep.sources.text_values import NotTextError, to_text

COLUMNS = ("messages", "conversations")
"""Columns that hold a conversation."""
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant"}
"""ShareGPT's names of the roles."""


def is_conversation(value: Any) -> bool:
    """Return whether the value of a column is the turns of a conversation: a list that is not empty."""
    return isinstance(value, list) and bool(value)


def role_reader(column: str, role: str) -> Callable[[dict[str, Any]], str | None]:
    """Return a function that returns the text of a role in a row, or None if no turn of the role has text.

    The text is the role's only turn with text. Turns without text, such as tool calls before the final answer, are
    ignored. The function raises NotTextError for a second turn with text, and for a turn that is not text.
    """
    name = f"{column}.{role}"

    def read(row: dict[str, Any]) -> str | None:
        messages = row.get(column)
        if messages is None:
            return None
        text, turns = None, 0
        try:
            for message in messages:
                speaker = message.get("role") or message.get("from")
                if speaker != role and ROLES.get(speaker) != role:
                    continue
                content = message.get("content")
                content = _content(message.get("value") if content is None else content, name)
                if content and not content.isspace():
                    text = content
                    turns += 1
        except (TypeError, AttributeError):
            raise NotTextError(f"`{column}` is not a list of objects") from None
        if turns > 1:
            raise NotTextError(f"`{column}` has {turns} turns of the {role}, but a view holds one")
        return text

    return read


def _content(content: Any, name: str) -> str | None:
    """Return the text of a turn; its content is a string, or a list of parts that are all text."""
    if content.__class__ is str and content.isascii():
        return content
    if not isinstance(content, list):
        return to_text(content, name)
    texts = [to_text(part.get("text") if isinstance(part, dict) else part, name) for part in content]
    for part, text in zip(content, texts, strict=True):
        if text is None:
            kind = part.get("type", "unknown") if isinstance(part, dict) else "null"
            raise NotTextError(f"{name!r} holds a part of type {kind}, not text")
    return "".join(text for text in texts if text)
