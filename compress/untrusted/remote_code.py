"""The Python files of a model that brings its own classes: which of a folder's belong to it. They are read here, and never run."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import cast

from compress.errors import CheckpointError
from compress.untrusted.reading import inside, read_object

_NAMING = (
    "config.json",
    "tokenizer_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)
"""The files whose `auto_map` names classes: https://huggingface.co/docs/transformers/custom_models."""


def code_files(folder: Path) -> list[str]:
    """Return the paths, in a model's folder, of the Python files that its `auto_map`s name and of those which these import.

    Classes of another repository (`org/name--module.Class`) are none of the folder's files.

    Raises:
        CheckpointError: a file that names them cannot be read, or a Python file leads out of the folder or is no Python.
    """
    waiting = [f"{module}.py" for module in dict.fromkeys(_named(folder))]
    found: dict[str, None] = {}
    while waiting:
        name = waiting.pop()
        if name in found or not (folder / name).is_file():
            continue
        found[name] = None
        waiting += _imported(folder, name)
    return sorted(found)


def _named(folder: Path) -> Iterable[str]:
    """Give the modules whose classes a model names."""
    for name in _NAMING:
        if not (folder / name).is_file():
            continue
        table = read_object(folder / name, root=folder).get("auto_map")
        for value in cast("Mapping[str, object]", table).values() if isinstance(table, dict) else ():
            for each in cast("list[object]", value) if isinstance(value, list) else [value]:  # of tokenizers, slow and fast
                module, _, owner = str(each).rpartition(".")
                # An identifier: a module called `../../x` would be a path out of the folder.
                if owner and "--" not in module and module.isidentifier():
                    yield module


def _imported(folder: Path, name: str) -> Iterable[str]:
    """Give the files beside or below a Python file that it imports by relative imports."""
    path = folder / name
    try:
        # Parsed, not imported: the code may be anyone's, and which files belong to a model must be known before it is trusted.
        tree = ast.parse(inside(folder, path).read_bytes(), str(path))
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise CheckpointError(f"{path}: cannot be read as Python ({error}); fetch the file again") from error
    parents = Path(name).parts[:-1]
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or not 0 < node.level <= len(parents) + 1:
            continue
        package = (*parents[: len(parents) + 1 - node.level], *(node.module or "").split("."))
        place = "/".join(part for part in package if part)
        names = [place, *("/".join(part for part in (place, alias.name) if part) for alias in node.names)]
        for module in filter(None, names):
            yield from (f"{module}.py", f"{module}/__init__.py")
