"""Conversations: rows with `messages` (role, content), or with `conversations` (from, value) as ShareGPT has them."""

from collections.abc import Callable
from typing import Any

from data_prep.sources.text_values import NotTextError, to_text

COLUMNS = ("messages", "conversations")
"""Columns that hold a conversation."""
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant"}
"""Names of ShareGPT for roles."""


def is_conversation(value: Any) -> bool:
    """Return whether a column holds the turns of a conversation, rather than its name or nothing."""
    return isinstance(value, list) and bool(value)


def role_reader(column: str, role: str) -> Callable[[dict[str, Any]], str | None]:
    """Return the function that finds the text of a role in a row: its only turn that has text; None if there is none.

    The function raises NoText for a second such turn, and for a turn that is not text. Turns without text, such as the calls of tools
    before the final answer, do not count.
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
            raise NotTextError(f"`{column}` has {turns} turns of the {role}, a view holds one")
        return text

    return read


def _content(content: Any, name: str) -> str | None:
    """Return the text of a turn: a text, or a list of parts that are all text."""
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
