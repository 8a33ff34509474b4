"""`compress eval`: judge artifacts that are there already."""

from __future__ import annotations

import argparse
from pathlib import Path

from compress.cli.options import add_options, progress, run_folders, settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_options(parser, "--store", "--json", "--runs", "--fresh", "--set")
    parser.add_argument("artifacts", type=Path, nargs="+", metavar="ARTIFACT", help="an artifact's folder")
    parser.add_argument("--against", required=True, metavar="ORIGINAL", help="the original: a folder, or a hub id")
    by_help = "whose tasks and gate count; a file with name, eval and gate will do"
    parser.add_argument("--by", type=Path, required=True, metavar="RECIPE", help=by_help)


def run(options: argparse.Namespace) -> int:
    """Evaluate artifacts; 0 if the gate passed."""
    from compress.cli.summary import print_report
    from compress.pipeline.runner import run_evaluation

    models = (options.against, options.artifacts)
    report = run_evaluation(options.by, settings(options), models, run_folders(options), progress(), fresh=options.fresh)
    return print_report(report, options)
