"""Options that several commands share, and the consoles that commands print on."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from compress.cli.display import Display
    from compress.pipeline.runner import RunFolders


_OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "--set": {"action": "append", "default": [], "metavar": "PATH=VALUE", "help": "replace one value of the recipe"},
    "recipe": {"type": Path, "metavar": "RECIPE", "help": "a recipe file (YAML)"},
    "--store": {"type": Path, "metavar": "DIR", "help": "where step outputs are kept (default: the user's cache)"},
    "--json": {"action": "store_true", "help": "print JSON alone on standard output"},
    "--runs": {"type": Path, "default": Path("runs"), "metavar": "DIR", "help": "where run folders go (default: runs)"},
    "--fresh": {"action": "store_true", "help": "make every step again, whatever is cached"},
}


def add_options(parser: argparse.ArgumentParser, *names: str) -> None:
    """Add options, and arguments, that several commands share."""
    for name in names:
        parser.add_argument(name, **_OPTIONS[name])


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """Return what `--set` replaces: dotted path → value."""
    from compress.recipe.document import parse_setting

    return dict(parse_setting(text) for text in options.set)


def run_folders(options: argparse.Namespace) -> RunFolders:
    """Return the folders of a command that runs steps."""
    from compress.pipeline.runner import RunFolders

    return RunFolders(runs=options.runs, store=options.store)


def console(options: argparse.Namespace) -> Console:
    """Return where people read: standard error when standard output is kept for JSON."""
    from compress.cli.display import PipedConsole

    return PipedConsole(stderr=bool(options.json), soft_wrap=True)


def progress() -> Display:
    """Return what shows how far a command is: on standard error, so that standard output holds its result alone."""
    from compress.cli.display import Display, PipedConsole

    return Display(PipedConsole(stderr=True, soft_wrap=True))
