"""The configuration file, its dotted overrides, and one-line messages for its errors.

A run is described by one YAML file. Every key can be overridden on the command line by its dotted
name (`data.sources.0.path=train.jsonl`). The message for an unknown key names a similar known key, if there is one.
"""

import difflib
import os
import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

from data_prep.utils.console import UserError

SafeLoader: Any = yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader
"""The fastest safe loader of YAML: a study reads hundreds of files."""


class _UniqueKeyLoader(SafeLoader):  # type: ignore[misc]
    """YAML loader that rejects a key that is given twice, because the later value would win silently."""

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
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


SIMILARITY = 0.7
"""Lowest ratio of difflib at which an unknown key counts as a misspelling of a known one."""
LocalPath = Annotated[str, AfterValidator(os.path.expanduser)]
"""Path of a file or folder; a leading `~` is expanded to the home directory."""


def parse_yaml(text: str) -> Any:
    """Return the value of a YAML text of plain types. Raises yaml.YAMLError or ValueError if it is not valid."""
    return yaml.load(text, SafeLoader)


class Section(BaseModel):
    """Base of every configuration section: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)


def load_yaml(
    path: str | Path, overrides: typing.Sequence[str] = (), sections: typing.Sequence[str] | None = None
) -> dict[str, Any]:
    """Read a configuration file and apply `dotted.key=value` overrides, whose values are YAML.

    `sections` are the allowed top-level keys; with None, all keys are allowed. `{dotted.key}` inside `name` is replaced
    by that key's value, for example to give each arm of a study its own folder.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read the configuration {path}: {error.strerror}") from None
    try:
        config = yaml.load(content, _UniqueKeyLoader)  # safe: this is a SafeLoader
    except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, or an invalid date such as 2024-13-45
        raise UserError(f"{path} is not valid YAML: {_one_line(str(error))}") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} is not a mapping of keys; it should start with `name:`")
    in_file = set(config)
    apply_overrides(config, overrides)
    for key in config:
        if sections is not None and key not in sections:
            raise UserError(unknown_key(str(key), sections, str(path) if key in in_file else "the command line"))
    if isinstance(config.get("name"), str):
        config["name"] = re.sub(r"\{([\w.]+)\}", lambda match: str(_look_up(config, match[1])), config["name"])
    return config


def apply_overrides(config: dict[str, Any], overrides: typing.Sequence[str]) -> None:
    """Set each `dotted.key=value` in the plain values of a configuration.

    Raises UserError if an override cannot be read.
    """
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
            raise UserError(f"{key}: {'.'.join(parents[: position + 1])} is a single value and has no keys below it")
    try:
        parsed = parse_yaml(value)
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
            raise UserError(f"{key}: {part!r} is not an index of that list, which has {len(node)} entries (from 0)")
        return node[int(part)]
    if node.get(part) is None:
        node[part] = {}
    return node[part]


def _look_up(config: dict[str, Any], key: str) -> Any:
    node: Any = config
    for part in key.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    if node is None or isinstance(node, dict | list):
        raise UserError(f"name: {{{key}}} does not name a single value of this configuration")
    return node


Model = typing.TypeVar("Model", bound=BaseModel)


def validate(model: type[Model], values: Any, where: str = "") -> Model:
    """Build a section from plain values.

    Raises UserError if a value is wrong. The message names the dotted key of the first error.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        # A misspelt key often causes a missing key too; the message about the misspelt key helps more.
        order = ("extra_forbidden", "union_tag_invalid", "union_tag_not_found")
        first = min(
            error.errors(),
            key=lambda problem: order.index(problem["type"]) if problem["type"] in order else len(order),
        )
        tags = union_tags(model)
        location: list[int | str] = []
        for part in first["loc"]:  # pydantic's path includes the union tags, one of which may also be a key elsewhere
            if part not in tags or _with_list_index(".".join(map(str, [*location, part]))) in known_keys(model):
                location.append(part)
        parts = [str(part) for part in location if not re.match(r"(function|tagged-union|float|list)\b", str(part))]
        key = ".".join([where] * bool(where) + parts)
        if first["type"] == "extra_forbidden":
            dotted_keys = [f"{where}.{name}" if where else name for name in known_keys(model)]
            if _with_list_index(key) in dotted_keys:
                section_type = next(part for part in reversed(first["loc"]) if part in tags)
                raise UserError(f"{key} has no effect with {section_type}; remove it") from None
            raise UserError(unknown_key(key, dotted_keys)) from None
        if first["type"] == "union_tag_invalid":
            tag = first["ctx"]
            raise UserError(
                f"{key}.{tag['discriminator'].strip(chr(39))}: {tag['tag']!r} is not one of {tag['expected_tags']}"
            ) from None
        if first["type"] == "union_tag_not_found":
            raise UserError(
                f"{key}.{first['ctx']['discriminator'].strip(chr(39))} is missing; it selects the kind of this section"
            ) from None
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] in ("model_type", "model_attributes_type"):
            message = "must be a section of keys, such as {key: value}"
        if first["input"] is None and first["type"] not in ("missing", "value_error"):
            raise UserError(f"{key or 'configuration'}: {_null_message(model, '.'.join(parts), key)}") from None
        given_value = "" if first["type"] in ("missing", "value_error") else f" (given: {first['input']!r})"
        raise UserError(f"{key or 'configuration'}: {_one_line(message)}{given_value}") from None


def _null_message(model: type[BaseModel], key: str, dotted_key: str) -> str:
    """Return the message for a key whose value is null: it names its default, and 0 if this is allowed too."""
    fields = [field for name, field in _known_fields(model) if name == _with_list_index(key)]
    has_default = bool(fields) and not any(field.is_required() for field in fields)
    defaults = [field.get_default(call_default_factory=True) for field in fields] if has_default else []
    if not defaults or any(default != defaults[0] for default in defaults):
        return "must not be null; set a value"
    if isinstance(defaults[0], BaseModel):
        return f"must not be null; for the defaults, remove the section or set {dotted_key}={{}}"
    default = yaml.safe_dump(defaults[0], default_flow_style=True).removesuffix("...\n").strip()
    choices = [f"{dotted_key}={default} (the default)"]
    if defaults[0] and any(getattr(limit, "ge", None) == 0 for limit in fields[0].metadata):
        choices.append(f"{dotted_key}=0")
    return f"must not be null; set {' or '.join(choices)}"


def known_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Return all dotted keys below a section. Entries of a list have the index `0`."""
    return [name for name, _ in _known_fields(model, prefix)]


def _known_fields(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield all dotted keys below a section, with their fields."""
    for name, field in model.model_fields.items():
        yield prefix + name, field
        for section, below in subsections(field.annotation, prefix + name):
            yield from _known_fields(section, below + ".")


def subsections(annotation: Any, prefix: str) -> list[tuple[type[BaseModel], str]]:
    """Return the sections inside a key of this type, each with its dotted key."""
    origin = typing.get_origin(annotation)
    if isinstance(annotation, type) and origin is None and issubclass(annotation, BaseModel):
        return [(annotation, prefix)]
    if origin is list:
        prefix += ".0"
    if origin in (list, typing.Union, types.UnionType, Annotated):
        return [section for part in typing.get_args(annotation) for section in subsections(part, prefix)]
    return []


def union_tags(model: type[BaseModel]) -> set[str]:
    """Return the values that select among sections, such as the source types `nlrx` and `json`.

    Pydantic includes them in the location of an error.
    """
    tags: set[str] = set()
    for field in model.model_fields.values():
        for section, _ in subsections(field.annotation, ""):
            discriminator = section.model_fields.get("type") or section.model_fields.get("name")
            if discriminator and typing.get_origin(discriminator.annotation) is Literal:
                tags |= set(typing.get_args(discriminator.annotation))
            tags |= union_tags(section)
    return tags


def _with_list_index(key: str) -> str:
    return re.sub(r"\.\d+\b", ".0", key)


def similar_key(key: str, known: typing.Iterable[str]) -> str | None:
    """Return the known key that `key` is probably a misspelling of; None if there is no similar one."""
    names, key = list(known), _with_list_index(key)
    longer = [name for name in names if name.startswith(f"{key}_")]
    return longer[0] if len(longer) == 1 else next(iter(difflib.get_close_matches(key, names, 1, SIMILARITY)), None)


def unknown_key(key: str, known: typing.Iterable[str], where: str = "") -> str:
    """Return the message for an unknown key: it names a similar known key, or else all known keys of its section."""
    location = f" in {where}" if where else ""
    nearest = similar_key(key, known)
    if nearest is not None:
        return f"unknown key {key!r}{location}; the nearest known key is {nearest!r}"
    section = _with_list_index(key).rpartition(".")[0]
    parts = [_with_list_index(name).rpartition(".") for name in known]
    names = dict.fromkeys(name for parent, _, name in parts if parent == section)
    return f"unknown key {key!r}{location}; the known keys there are {', '.join(names)}"


def _one_line(text: str) -> str:
    return " ".join(text.split())
