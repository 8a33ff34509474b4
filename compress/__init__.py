"""Compress vision-language models and prove that they are still the same models."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.version import __version__

if TYPE_CHECKING:
    from compress.report.model import Report

__all__ = ["__version__", "evaluate", "run"]


def run(
    recipe: str | Path,
    *,
    set: Mapping[str, Any] | None = None,  # noqa: A002 - the command line's own word
    runs: str | Path = "runs",
    store: str | Path | None = None,
    fresh: bool = False,
    force: bool = False,
) -> Report:
    """Run a recipe as `compress run` does and return its report; progress goes to standard error.

    `set` maps dotted paths of the recipe to values, `runs` and `store` are folders, `fresh` makes every step again and `force`
    publishes even if the gate does not pass.

    Raises:
        CompressError: the recipe, a file, the model or the machine is at fault; the message says which and what to do.
    """
    from rich.console import Console

    from compress.cli.display import Display
    from compress.pipeline.runner import RunFolders, run_recipe

    folders = RunFolders(runs=Path(runs), store=None if store is None else Path(store))
    return run_recipe(Path(recipe), dict(set or {}), folders, Display(Console(stderr=True)), fresh=fresh, force=force)


def evaluate(
    *artifacts: str | Path,
    against: str | Path,
    by: str | Path,
    set: Mapping[str, Any] | None = None,  # noqa: A002 - the command line's own word
    runs: str | Path = "runs",
    store: str | Path | None = None,
    fresh: bool = False,
) -> Report:
    """Judge artifacts that are there already, as `compress eval` does, and return the report.

    `against` is the original, a folder or a hub id; `by` a recipe whose tasks and gate count, or a file with name, eval and gate
    alone. The others are as of `run`.

    Raises:
        CompressError: the recipe, a file, a model or the machine is at fault; the message says which and what to do.
    """
    from rich.console import Console

    from compress.cli.display import Display
    from compress.pipeline.runner import RunFolders, run_evaluation

    folders = RunFolders(runs=Path(runs), store=None if store is None else Path(store))
    models = (str(against), [Path(artifact) for artifact in artifacts])
    return run_evaluation(Path(by), dict(set or {}), models, folders, Display(Console(stderr=True)), fresh=fresh)
