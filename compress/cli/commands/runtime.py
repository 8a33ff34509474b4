"""`compress runtime`: install the engines that run artifacts, or list them."""

from __future__ import annotations

import argparse
import json

from compress.cli.options import add_options, console, progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the actions."""
    actions = parser.add_subparsers(required=True, metavar="ACTION", dest="action")
    install = actions.add_parser("install", help="make a runtime's own environment from its lock file")
    add_options(install, "--json")
    install.add_argument("name", metavar="NAME", help="vllm, llmcompressor, onnxruntime-genai, lmms-eval or lm-eval")
    add_options(actions.add_parser("list", help="say which are installed"), "--json")


def run(options: argparse.Namespace) -> int:
    """Install one environment, or list all."""
    from compress.workers import environment

    if options.action == "install":
        installed = environment.install(options.name, progress())
        rows = {installed.name: installed}
    else:
        rows = {name: environment.find(name) for name in environment.LOCKS}
    found = {name: {"python": str(row.python), "versions": row.versions} if row else None for name, row in rows.items()}
    if options.json:
        print(json.dumps(found, indent=2))
    people = console(options)
    for name, row in found.items():
        people.print(f"{name}: {row['python'] if row else f'not installed; compress runtime install {name}'}", highlight=False)
    return 0
