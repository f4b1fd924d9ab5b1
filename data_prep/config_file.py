"""The configuration file: its dotted overrides, and its mistakes told in one line.

A run is described by one YAML file. Every key can be overridden on the command line by its dotted
name (`data.sources.0.path=train.jsonl`). An unknown key is an error that names the nearest known one.
"""

import difflib
import os
import re
import types
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from data_prep.console import UserError


class _UniqueKeyLoader(yaml.SafeLoader):
    """Reads YAML, and raises an error for a key that is given twice: the later one would win silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return the mapping of a node."""
        keys: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in keys:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value!r} is given twice", key.start_mark
                    )
                keys.add(key.value)
        return super().construct_mapping(node, deep)


SECTIONS = (
    "name",
    "seed",
    "output_dir",
    "data",
    "model",
    "objective",
    "train",
    "deepspeed",
    "checkpoint",
    "evaluation",
    "monitor",
)


LocalPath = Annotated[str, AfterValidator(os.path.expanduser)]
"""Path of a file or folder; `~` is the home directory, also where no shell has replaced it."""


class Section(BaseModel):
    """Base of every configuration section: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)


def load_yaml(
    path: str | Path, overrides: typing.Sequence[str] = (), sections: typing.Sequence[str] = SECTIONS
) -> dict[str, Any]:
    """Read a configuration file of these top-level keys and apply `dotted.key=value` overrides, whose values are YAML.

    `{dotted.key}` inside `name` is replaced by that key's value, so that arms of a study get folders of their own.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read the configuration {path}: {error.strerror}") from None
    try:
        config = yaml.load(content, _UniqueKeyLoader)  # a SafeLoader
    except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, or 2024-13-45, which YAML takes for a date
        raise UserError(f"{path} is not valid YAML: {_one_line(str(error))}") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} holds no mapping of keys; it should start with `name:`")
    in_file = set(config)
    apply_overrides(config, overrides)
    unknown = [key for key in config if key not in sections]
    if unknown:
        raise UserError(
            _unknown_key(str(unknown[0]), sections, str(path) if unknown[0] in in_file else "the command line")
        )
    if isinstance(config.get("name"), str):
        config["name"] = re.sub(r"\{([\w.]+)\}", lambda found: str(_look_up(config, found[1])), config["name"])
    return config


def apply_overrides(config: dict[str, Any], overrides: typing.Sequence[str]) -> None:
    """Set each `dotted.key=value` in the plain values of a configuration. Raises UserError for one that cannot be read."""
    for override in overrides:
        _override(config, override)


def _override(config: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise UserError(f"cannot read the override {override!r}: write key=value, such as train.steps=100")
    node: Any = config
    *parents, last = key.split(".")
    for position, part in enumerate(parents):
        node = _child(node, part, key)
        if not isinstance(node, dict | list):
            raise UserError(f"{key}: {'.'.join(parents[: position + 1])} is a single value, it has no keys below it")
    try:
        parsed = yaml.safe_load(value)
    except (yaml.YAMLError, ValueError):
        raise UserError(f"{key}: cannot read the value {value!r} as YAML") from None
    if isinstance(node, list):
        _child(node, last, key)
        node[int(last)] = parsed
    else:
        node[last] = parsed


def _child(node: Any, part: str, key: str) -> Any:
    if isinstance(node, list):
        if not part.isdecimal() or int(part) >= len(node):
            raise UserError(f"{key}: {part!r} is no entry of that list, which has {len(node)} (counted from 0)")
        return node[int(part)]
    if node.get(part) is None:
        node[part] = {}
    return node[part]


def _look_up(config: dict[str, Any], key: str) -> Any:
    node: Any = config
    for part in key.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    if node is None or isinstance(node, dict | list):
        raise UserError(f"name: {{{key}}} names no single value of this configuration")
    return node


Model = typing.TypeVar("Model", bound=BaseModel)


def validate(model: type[Model], values: Any, where: str = "") -> Model:
    """Build a section from plain values; the first mistake becomes a UserError that names its dotted key."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        mistakes = error.errors()  # a misspelt key often is a missing one too: the spelling comes first
        order = ("extra_forbidden", "union_tag_invalid", "union_tag_not_found")
        first = min(
            mistakes, key=lambda mistake: order.index(mistake["type"]) if mistake["type"] in order else len(order)
        )
        tags = union_tags(model)
        parts = [
            str(part)
            for part in first["loc"]
            if part not in tags and not re.match(r"(function|tagged-union)\b", str(part))
        ]
        key = ".".join([where] * bool(where) + parts)
        if first["type"] == "extra_forbidden":
            known = [f"{where}.{known}" if where else known for known in known_keys(model)]
            if _with_list_index(key) in known:
                chosen = next(part for part in reversed(first["loc"]) if part in tags)
                raise UserError(f"{key} has no effect with {chosen}: leave it out") from None
            raise UserError(_unknown_key(key, known)) from None
        if first["type"] == "union_tag_invalid":
            tag = first["ctx"]
            raise UserError(
                f"{key}.{tag['discriminator'].strip(chr(39))}: {tag['tag']!r} is none of {tag['expected_tags']}"
            ) from None
        if first["type"] == "union_tag_not_found":
            raise UserError(
                f"{key}.{first['ctx']['discriminator'].strip(chr(39))} is missing: it says of which kind this section is"
            ) from None
        message = first["msg"].removeprefix("Value error, ")
        given = "" if first["type"] in ("missing", "value_error") else f" (given: {first['input']!r})"
        raise UserError(f"{key or 'configuration'}: {_one_line(message)}{given}") from None


def known_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    """All dotted keys below a section; entries of a list stand under `0`."""
    keys: list[str] = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        for section, below in subsections(field.annotation, prefix + name):
            keys += known_keys(section, below + ".")
    return keys


def subsections(annotation: Any, prefix: str) -> list[tuple[type[BaseModel], str]]:
    """The sections that a key of this type holds, each with its dotted key."""
    origin = typing.get_origin(annotation)
    if isinstance(annotation, type) and origin is None and issubclass(annotation, BaseModel):
        return [(annotation, prefix)]
    if origin is list:
        prefix += ".0"
    if origin in (list, typing.Union, types.UnionType, Annotated):
        return [found for part in typing.get_args(annotation) for found in subsections(part, prefix)]
    return []


def union_tags(model: type[BaseModel]) -> set[str]:
    """The values that choose among sections, as `nlrx` and `json` do among sources; pydantic puts them into the path of a mistake."""
    tags: set[str] = set()
    for field in model.model_fields.values():
        for section, _ in subsections(field.annotation, ""):
            chooser = section.model_fields.get("type") or section.model_fields.get("name")
            if chooser and typing.get_origin(chooser.annotation) is Literal:
                tags |= set(typing.get_args(chooser.annotation))
            tags |= union_tags(section)
    return tags


def _with_list_index(key: str) -> str:
    return re.sub(r"\.\d+\b", ".0", key)


def _unknown_key(key: str, known: typing.Sequence[str], where: str = "") -> str:
    nearest = difflib.get_close_matches(_with_list_index(key), known, n=1, cutoff=0.0)
    return f"unknown key {key!r}{f' in {where}' if where else ''}" + (
        f"; the nearest known one is {nearest[0]!r}" if nearest else ""
    )


def _one_line(text: str) -> str:
    return " ".join(text.split())
