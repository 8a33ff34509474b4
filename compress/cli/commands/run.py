"""`compress run`: compress, evaluate, judge and publish."""

from __future__ import annotations

import argparse

from compress.cli.options import add_options, progress, run_folders, settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_options(parser, "--set", "recipe", "--store", "--json", "--runs", "--fresh")
    parser.add_argument("--force", action="store_true", help="publish even if the gate does not pass; the model card says so")


def run(options: argparse.Namespace) -> int:
    """Run a recipe; 0 if its gate passed."""
    from compress.cli.summary import print_report
    from compress.pipeline.runner import run_recipe

    folders = run_folders(options)
    report = run_recipe(options.recipe, settings(options), folders, progress(), fresh=options.fresh, force=options.force)
    return print_report(report, options)
