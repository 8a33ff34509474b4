"""Figures of the package's own structure: import cycles, complexity, sizes, comments.

    python -m benchmarks.structure

A cycle is a strongly connected set of modules: once by the imports that run when a module is loaded, once with those within
functions too. Imports for type checkers alone count in neither.
"""

from __future__ import annotations

import ast
import io
import json
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components  # pyright: ignore[reportUnknownVariableType]

ROOT = Path(__file__).parent.parent
PARTS = ("compress", "calibration", "export", "eval")
COMPLEXITY = 12
"""From pyproject.toml: ruff's limit."""


def sources() -> dict[str, Path]:
    """Return the package's files by their modules' names."""
    names: dict[str, Path] = {}
    for part in PARTS:
        for path in sorted((ROOT / part).rglob("*.py")):
            inside = path.relative_to(ROOT)
            if any((ROOT / parent).is_symlink() for parent in inside.parents):
                continue  # the links by which the other three lie within the package
            module = ".".join(inside.with_suffix("").parts).removesuffix(".__init__")
            names[module if part == "compress" else f"compress.{module}"] = path
    return names


def imports(tree: ast.Module, lazy: bool) -> Iterator[str]:
    """Yield what a module imports: when it is loaded, or with `lazy` whenever."""
    bodies: list[ast.AST] = [tree]
    while bodies:
        for node in ast.iter_child_nodes(bodies.pop()):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                yield from (f"{node.module}.{alias.name}" for alias in node.names)
            elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
                bodies += node.orelse
            elif lazy or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                bodies.append(node)


def cycles(trees: dict[str, ast.Module], lazy: bool) -> list[list[str]]:
    """Return the sets of modules that import each other."""
    places = {name: number for number, name in enumerate(trees)}
    edges = {
        (places[name], places[target])
        for name, tree in trees.items()
        for imported in imports(tree, lazy)
        if (target := imported if imported in places else imported.rpartition(".")[0]) in places and target != name
    }
    rows, columns = zip(*edges, strict=True)
    graph = coo_array(([1] * len(edges), (rows, columns)), shape=(len(trees), len(trees)))
    labels = cast("list[int]", connected_components(graph, directed=True, connection="strong")[1].tolist())
    groups: dict[int, list[str]] = {}
    for name, label in zip(trees, labels, strict=True):
        groups.setdefault(label, []).append(name)
    return [group for group in groups.values() if len(group) > 1]


def too_complex() -> list[str]:
    """Return the functions that branch more than they may, as ruff counts."""
    command = [sys.executable, "-m", "ruff", "check", "--select", "C901", "--output-format", "json", "--exit-zero"]
    command += ["--config", f"lint.mccabe.max-complexity = {COMPLEXITY}", *PARTS]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [f"{Path(row['filename']).name}: {row['message']}" for row in json.loads(found.stdout)]


def comments(text: str) -> int:
    """Return how many lines have a comment that is for readers, not for a tool."""
    marks = ("# noqa", "# pyright", "# fmt", "# type")
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return sum(token.type == tokenize.COMMENT and not token.string.startswith(marks) for token in tokens)


def main() -> None:
    """Print the figures as JSON."""
    files = sources()
    texts = {name: path.read_text(encoding="utf-8") for name, path in files.items()}
    trees = {name: ast.parse(text) for name, text in texts.items()}
    functions = [
        (node.end_lineno or node.lineno) - node.lineno + 1
        for tree in trees.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    lines = {name: text.count("\n") for name, text in texts.items()}
    longest = max(lines, key=lambda name: lines[name])
    figures: dict[str, Any] = {
        "modules": len(files),
        "lines": sum(lines.values()),
        "longest file": {longest: lines[longest]},
        "longest function": max(functions),
        f"functions over complexity {COMPLEXITY}": too_complex(),
        "lines with comments": sum(map(comments, texts.values())),
        "cycles when loaded": cycles(trees, lazy=False),
        "cycles with imports in functions": cycles(trees, lazy=True),
    }
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
