"""The commands of the command line, one file each."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from importlib import import_module
from typing import Protocol, cast

COMMANDS: Mapping[str, tuple[str, str]] = {
    "run": ("compress.cli.commands.run", "compress, evaluate, judge and publish"),
    "eval": ("compress.cli.commands.eval", "judge artifacts that are there already"),
    "plan": ("compress.cli.commands.plan", "show what a run would do, and what is cached"),
    "compare": ("compress.cli.commands.compare", "put runs side by side: accuracy against size"),
    "schema": ("compress.cli.commands.schema", "print the recipe's JSON Schema, for editors"),
    "store": ("compress.cli.commands.store", "list, check or shrink the cache of step outputs"),
    "runtime": ("compress.cli.commands.runtime", "install the engines that run artifacts, or list them"),
}
"""The commands: name → (module, help). Only the module of the command that is run is imported."""


class Command(Protocol):
    """What a command's module has. It imports what is slow to import within `run`, so that `--help` stays fast."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the command's arguments, or its actions with theirs."""
        ...

    def run(self, options: argparse.Namespace) -> int:
        """Run the command, print its result, and return the exit code."""
        ...


def load_command(name: str) -> Command:
    """Import a command's module."""
    return cast("Command", import_module(COMMANDS[name][0]))
