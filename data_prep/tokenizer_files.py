"""Files of a Hugging Face tokenizer: their special tokens, and the tokens that they add to a sentencepiece model."""

import json
from pathlib import Path
from typing import Any

from data_prep.sentencepiece_json import added_token
from data_prep.utils.console import UserError

ADDED, CONFIG, MAP = "added_tokens.json", "tokenizer_config.json", "special_tokens_map.json"
SPECIAL_ORDER = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
FLAGS = ("single_word", "lstrip", "rstrip")
"""Flags that control how a token is matched. `normalized` is omitted: slow tokenizers match in the original text."""


def read_tokenizer_json(path: Path) -> dict[str, Any]:
    """Return the content of one of these files. Raises UserError if it is not in the Hugging Face format."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); use a folder or file that contains a tokenizer") from None
    if not isinstance(content, dict) or (
        path.name == "tokenizer.json" and not {"model", "added_tokens"} <= set(content)
    ):
        raise UserError(f"{path}: not in the Hugging Face format; write it again with save_pretrained")
    return content


def special_tokens_by_name(folder: Path) -> dict[str, str]:
    """Return the special tokens that the files name, such as `eos_token` -> `</s>`.

    Entries of lists have keys such as `additional_special_tokens.0`.
    """
    named: dict[str, str] = {}
    for name in (MAP, CONFIG):
        for key, value in _read_beside(folder, name).items():
            if key.endswith("_token") and (content := token_text(value)):
                named[key] = content
            elif key.endswith("special_tokens") and isinstance(value, list | dict):
                tokens = value if isinstance(value, list) else value.values()
                named |= {
                    f"{key}.{number}": content for number, token in enumerate(tokens) if (content := token_text(token))
                }
    return named


def add_tokens(spec: dict[str, Any], folder: Path) -> list[str]:
    """Add the tokens of the files in the folder of a sentencepiece model to `spec`, its tokenizer.json, in place.

    Returns the texts of these tokens. The tokens have the ids in the files. Special tokens without an id get the next
    free ids, in the order in which Hugging Face adds them. Raises UserError if an id is taken, or is not
    the next free one.
    """
    named = special_tokens_by_name(folder)
    special = set(named.values())
    ids = (
        spec["model"]["vocab"]
        if isinstance(spec["model"]["vocab"], dict)
        else {piece: i for i, (piece, _) in enumerate(spec["model"]["vocab"])}
    )
    listed = {token["content"] for token in spec["added_tokens"]}
    entries = {token["content"]: (token, file) for token, file in _tokens_of_files(folder, special)}
    next_id = len(ids)
    added = []
    for token, file in sorted(entries.values(), key=lambda entry: int(entry[0]["id"])):
        content = token["content"]
        expected = ids.get(content, next_id)
        if token["id"] != expected:
            raise UserError(
                f"{file}: token {content!r} cannot have id {token['id']}: with the sentencepiece model in this folder "
                f"it has id {expected}; fix that file, or move the model to a separate folder"
            )
        next_id += content not in ids
        if content not in listed:
            added.append(token)
    for key in sorted(named, key=lambda key: SPECIAL_ORDER.index(key) if key in SPECIAL_ORDER else len(SPECIAL_ORDER)):
        content = named[key]
        if content not in ids and content not in entries:
            entries[content] = (added_token(next_id, content, special=True), folder)
            added.append(entries[content][0])
            next_id += 1
    spec["added_tokens"] += added
    return [token["content"] for token in added]


def _tokens_of_files(folder: Path, special: set[str]) -> list[tuple[dict[str, Any], Path]]:
    """Return the tokens that the files add, each with its file.

    A token may occur twice; the later entry has more information.
    """
    tokens = []
    for content, token_id in _read_beside(folder, ADDED).items():
        tokens.append((added_token(_parse_id(token_id, folder / ADDED), content, content in special), folder / ADDED))
    for token_id, token in _read_beside(folder, CONFIG).get("added_tokens_decoder", {}).items():
        content = token_text(token) or ""
        entry = added_token(
            _parse_id(token_id, folder / CONFIG), content, content in special or bool(token.get("special"))
        )
        tokens.append((entry | {flag: bool(token.get(flag)) for flag in FLAGS}, folder / CONFIG))
    return tokens


def _read_beside(folder: Path, name: str) -> dict[str, Any]:
    return read_tokenizer_json(folder / name) if (folder / name).exists() else {}


def _parse_id(token_id: Any, file: Path) -> int:
    try:
        return int(token_id)
    except (TypeError, ValueError):
        raise UserError(f"{file}: {token_id!r} is not a token id; write the file again with save_pretrained") from None


def token_text(token: Any) -> str | None:
    """Return the text of a token, which is a string or an object with `content`; None for anything else."""
    if isinstance(token, dict):
        text: str | None = token.get("content")
        return text
    return token if isinstance(token, str) else None
