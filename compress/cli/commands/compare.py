"""`compress compare`: put runs side by side, accuracy against size."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from compress.cli.options import console


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("run", type=Path, nargs="+", metavar="RUN", help="a run's folder, or its report.json")
    forms = ("table", "markdown", "csv", "html", "json")
    parser.add_argument("--format", choices=forms, help="default: what the output's name says, otherwise table")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write there, not to standard output")
    # The shared console asks for it; JSON is a format of this command.
    parser.set_defaults(json=False)


def run(options: argparse.Namespace) -> int:
    """Print a comparison of runs, or write it to a file and print its path."""
    from compress.files import disk_errors, write_text
    from compress.report import compare_formats
    from compress.report.compare import compare, read_reports

    output: Path | None = options.output
    form = compare_formats.format_of(output, options.format)
    comparison = compare(read_reports(options.run, lambda message: print(f"compress: warning: {message}", file=sys.stderr)))
    if output is not None:
        with disk_errors(output, making=True):
            write_text(output, compare_formats.render(comparison, form))
        print(output)
    elif form == "table":
        terminal = console(options)
        for part in compare_formats.as_renderables(comparison, terminal.width):
            terminal.print(part, highlight=False, soft_wrap=False)
    else:
        print(compare_formats.render(comparison, form), end="")
    return 0
