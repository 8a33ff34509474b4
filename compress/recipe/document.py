"""A YAML document that remembers on which line everything stands, and the overrides laid over it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import yaml

from compress.errors import RecipeError
from compress.files import is_path
from compress.untrusted.limits import limits
from compress.untrusted.reading import printable, read_text
from compress.untrusted.yaml import YamlError, parse_yaml

Place = tuple[str | int, ...]
"""Where a value stands in a document: keys and list positions from the root."""

_SPECIAL = tuple("*&!%@`")
"""Characters that a text cannot begin with in YAML, unless it is quoted."""

_TEXT = "tag:yaml.org,2002:str"

# Keys whose values are read. `publish.to` is written to, and needs no file that is there.
_READ_FROM_HERE = ("source", "definition", "image_folder")


@dataclass
class RecipeDocument:
    """Plain data read from `path`, the line of each place, the overrides that replaced places, and notes on what was read."""

    path: Path
    data: dict[str, Any]
    lines: dict[Place, int]
    overridden: dict[Place, str] = field(default_factory=lambda: dict[Place, str]())
    notes: tuple[str, ...] = ()

    def whereabouts(self, place: Place) -> str:
        """Return how a message names the place: the override that set it, or `file:line`."""
        # The nearest that is known: a missing key has no line, and is reported at the table that lacks it.
        beginnings = [place[:end] for end in range(len(place), -1, -1)]
        for beginning in beginnings:
            if beginning in self.overridden:
                return f"--set {self.overridden[beginning]}"
        for beginning in beginnings:
            if beginning in self.lines:
                return f"{self.path.name}:{self.lines[beginning]}"
        return self.path.name


def read_document(path: Path) -> RecipeDocument:
    """Read a YAML mapping; only plain data is ever built from it.

    Raises:
        RecipeError: the file is missing, is no YAML, holds no mapping, or names a key twice.
    """
    try:
        text = read_text(path, limits().yaml_bytes, RecipeError, name="yaml_bytes")
    except FileNotFoundError as error:
        raise RecipeError([f"{printable(str(path))}: no such file"]) from error
    name = printable(path.name)
    try:
        parsed = parse_yaml(text)
    except YamlError as error:
        raise RecipeError([f"{name}{f':{error.line}' if error.line else ''}: no valid YAML: {error.problem}"]) from error
    if parsed.root is None or not isinstance(parsed.data, dict):
        raise RecipeError([f"{name}:1: holds no mapping of keys to values"])
    lines: dict[Place, int] = {}
    faults: list[str] = []
    _note_lines(parsed.root, (), lines, faults)
    if faults:
        raise RecipeError([f"{name}:{fault}" for fault in faults])
    return RecipeDocument(path=path, data=cast("dict[str, Any]", parsed.data), lines=lines)


def _note_lines(node: yaml.Node, place: Place, lines: dict[Place, int], faults: list[str]) -> None:
    lines.setdefault(place, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        for key, value in cast("list[tuple[yaml.Node, yaml.Node]]", node.value):
            line = key.start_mark.line + 1
            # YAML reads `on`, `no` and 1 as booleans and numbers: as keys they would never match a field.
            if key.tag != _TEXT:
                faults.append(f"{line}: {dotted((*place, _shown(key)))}: is no text, and keys are texts; put quotes around it")
                continue
            here = (*place, str(key.value))
            # PyYAML keeps the last of two equal keys without an error.
            if here in lines:
                faults.append(f"{line}: {dotted(here)}: stands twice; keep one")
            lines[here] = line
            _note_lines(value, here, lines, faults)
    elif isinstance(node, yaml.SequenceNode):
        for position, value in enumerate(cast("list[yaml.Node]", node.value)):
            _note_lines(value, (*place, position), lines, faults)


def _shown(key: yaml.Node) -> str:
    return str(key.value) if isinstance(key, yaml.ScalarNode) else "a list or table"


def dotted(place: Place) -> str:
    """Return a place the way `--set` writes it."""
    return ".".join(str(part) for part in place)


def override(document: RecipeDocument, settings: Mapping[str, Any]) -> None:
    """Lay `settings` (dotted path → value) over the document; a file named by one is looked up from the current folder.

    Raises:
        RecipeError: a path that leads nowhere; all faults at once.
    """
    faults: list[str] = []
    for path, given in settings.items():
        value = str(given) if isinstance(given, Path) else given
        # Digits are positions: no key of a recipe is a number.
        place = tuple(int(part) if part.isdigit() else part for part in str(path).split("."))
        fault = _assign(document.data, place, _from_here(place, value, document.path.parent))
        if fault:
            faults.append(f"--set {path}: {fault}")
        document.overridden[place] = f"{path}={_written(value)}"
    if faults:
        raise RecipeError(faults)


def _written(value: Any) -> str:
    """Return a value the way it is written after `--set PATH=`."""
    if isinstance(value, str):
        return value
    try:
        return yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=math.inf).removesuffix("...\n").strip()
    except yaml.YAMLError:  # from Python, a value may be anything
        return str(value)


def _from_here(place: Place, value: Any, base: Path) -> Any:
    """Let a path mean the file in the current folder; one that is only in the recipe's folder `base` is left for that."""
    if isinstance(value, dict):
        return {key: _from_here((*place, key), item, base) for key, item in cast("dict[str, Any]", value).items()}
    if isinstance(value, list):
        return [_from_here((*place, position), item, base) for position, item in enumerate(cast("list[Any]", value))]
    if not isinstance(value, str) or not value or place[-1] not in _READ_FROM_HERE:
        return value
    here = Path(value).expanduser().absolute()
    return str(here) if here.exists() or (is_path(value) and not (base / value).exists()) else value


def _assign(data: dict[str, Any], place: Place, value: Any) -> str | None:
    current: Any = data
    for depth, part in enumerate(place):
        last = depth == len(place) - 1
        where = dotted(place[:depth]) or "the recipe"
        if isinstance(current, list):
            items = cast("list[Any]", current)
            if not isinstance(part, int) or part > len(items) or (part == len(items) and not last):
                count = f"{len(items)} item{'' if len(items) == 1 else 's'}"
                return f"{where} has {count}, numbered from 0; {part} names none of them"
            if last:
                items[part:] = [value, *items[part + 1 :]]
            else:
                current = items[part]
        elif isinstance(current, dict):
            keys = cast("dict[str, Any]", current)
            if last:
                keys[str(part)] = value
            else:
                current = keys.setdefault(str(part), {})
        else:
            return f"{where} is {current!r}, which holds no {part}"
    return None


def parse_setting(text: str) -> tuple[str, Any]:
    """Split `PATH=VALUE` as given on a command line; the value is read as YAML.

    Raises:
        RecipeError: there is no `=`, or the value is no YAML.
    """
    path, equals, value = text.partition("=")
    if not equals or not path:
        raise RecipeError([f"--set {text}: must be PATH=VALUE, for example --set stages.0.group_size=64"])
    try:
        return path, parse_yaml(value).data if value else ""
    except YamlError as error:
        hint = "; put quotes around what is a text" if value[:1] in _SPECIAL else ""
        raise RecipeError([f"--set {printable(text)}: the value is no valid YAML: {error.problem}{hint}"]) from error
