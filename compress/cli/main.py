"""The command line: the only place that prints and that decides how a process ends.

Exit codes: 0 gate passed, 1 gate failed or inconclusive, or an export differs from its checkpoint, 2 recipe or usage error,
3 something is missing here, 70 a fault of this program itself, 130 interrupted, 141 whoever read the output went.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from compress import __version__, interrupts
from compress.errors import CompressError
from compress.untrusted.reading import printable
from compress.untrusted.redaction import redact, redact_value

if TYPE_CHECKING:
    from rich.console import Console

    from compress.cli.display import Display

_INTERRUPTED = 130
_PIPE_CLOSED = 141  # 128 + SIGPIPE, what a shell reports of any program whose reader went
_OWN_FAULT = 70  # EX_SOFTWARE of sysexits
_EPILOG = """\
examples:
  compress run recipes/demo.yaml
  compress plan recipes/qwen-vl-awq.yaml --set model.source=/models/qwen --set stages.0.group_size=64
  compress runtime install vllm

exit codes: 0 gate passed, 1 gate failed or inconclusive, or an export differs from its checkpoint, 2 recipe or usage error,
3 something is missing on this machine, 70 a fault of compress itself, 130 interrupted, 141 whoever read the output went"""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one command and end the process with its exit code."""
    try:
        try:
            options = _parser().parse_args(arguments)
        finally:
            sys.stdout.flush()  # help ends the process here
        interrupts.install()
        code = _attempt(options)
    except BrokenPipeError:
        for stream in (sys.stdout, sys.stderr):  # what is left in their buffers has nowhere to go
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        code = _PIPE_CLOSED
    sys.exit(code)


def _attempt(options: argparse.Namespace) -> int:
    """Run one command, tell what stopped it, and return the exit code.

    Raises:
        BrokenPipeError: whoever read the output has gone.
    """
    try:
        code = int(options.command(options))
        sys.stdout.flush()
    except CompressError as error:
        _complain(str(error), as_json=getattr(options, "json", False), code=error.exit_code)
        code = error.exit_code
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where this one was", file=sys.stderr)
        code = _INTERRUPTED
    except BrokenPipeError:
        raise
    except Exception:
        print(printable(redact(traceback.format_exc())), end="", file=sys.stderr)
        print("this is a fault of compress itself; please report it with the lines above", file=sys.stderr)
        code = _OWN_FAULT
    return code


def _complain(message: str, *, as_json: bool, code: int) -> None:
    for line in message.split("\n"):
        print(f"compress: {printable(line)}", file=sys.stderr)
    if as_json:
        print(json.dumps({"error": message, "exit_code": code}, ensure_ascii=False))


def _console(options: argparse.Namespace) -> Console:
    """Return where people read: standard error when standard output is kept for JSON."""
    from compress.cli.display import PipedConsole

    return PipedConsole(stderr=bool(options.json), soft_wrap=True)


def _progress() -> Display:
    """Return what shows how far a command is: on standard error, so that standard output holds its result alone."""
    from compress.cli.display import Display, PipedConsole

    return Display(PipedConsole(stderr=True, soft_wrap=True))


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    from compress.recipe.document import parse_setting

    return dict(parse_setting(text) for text in options.set)


def _run(options: argparse.Namespace) -> int:
    from compress.pipeline.runner import RunFolders, run_recipe
    from compress.report.summary import show

    places = RunFolders(runs=options.runs, store=options.store)
    report = run_recipe(options.recipe, _settings(options), places, _progress(), fresh=options.fresh, force=options.force)
    if options.json:
        print(report.to_json())
    show(report, _console(options))
    return 0 if report.gate.verdict == "pass" else 1


def _eval(options: argparse.Namespace) -> int:
    from compress.pipeline.runner import RunFolders, run_evaluation
    from compress.report.summary import show

    places = RunFolders(runs=options.runs, store=options.store)
    models = (options.against, options.artifacts)
    report = run_evaluation(options.by, _settings(options), models, places, _progress(), fresh=options.fresh)
    if options.json:
        print(report.to_json())
    show(report, _console(options))
    return 0 if report.gate.verdict == "pass" else 1


def _plan(options: argparse.Namespace) -> int:
    from compress.pipeline.plan import make_plan, show
    from compress.pipeline.store import Store, default_store

    store = Store(options.store or default_store())
    console = _console(options)
    plan = make_plan(options.recipe, _settings(options), store)
    if options.json:
        print(json.dumps(redact_value(plan.summary(store)), indent=2, ensure_ascii=False))
    else:
        show(plan, store, console)
    return 0


def _compare(options: argparse.Namespace) -> int:
    from compress.files import telling_where, write_text
    from compress.report import compare_formats
    from compress.report.compare import compare, read_reports

    output: Path | None = options.output
    form = compare_formats.format_of(output, options.format)
    comparison = compare(read_reports(options.run, lambda message: print(f"compress: warning: {message}", file=sys.stderr)))
    if output is not None:
        with telling_where(output, making=True):
            write_text(output, compare_formats.render(comparison, form))
        print(output)
    elif form == "table":
        console = _console(options)
        for part in compare_formats.as_renderables(comparison, console.width):
            console.print(part, highlight=False, soft_wrap=False)
    else:
        print(compare_formats.render(comparison, form), end="")
    return 0


def _schema(options: argparse.Namespace) -> int:
    del options
    from compress.recipe.model import recipe_schema

    print(json.dumps(recipe_schema(), indent=2, ensure_ascii=False))
    return 0


def _store(options: argparse.Namespace) -> int:
    from compress.cli.commands import store as store_commands

    value, code = store_commands.ACTIONS[options.action](options, _console(options))
    if options.json:
        print(json.dumps(value, indent=2))
    return code


def _runtime(options: argparse.Namespace) -> int:
    from compress.workers import environment

    console = _console(options)
    if options.action == "install":
        installed = environment.install(options.name, _progress())
        rows = {installed.name: installed}
    else:
        rows = {name: environment.find(name) for name in environment.LOCKS}
    found = {name: {"python": str(row.python), "versions": row.versions} if row else None for name, row in rows.items()}
    if options.json:
        print(json.dumps(found, indent=2))
    for name, row in found.items():
        console.print(f"{name}: {row['python'] if row else f'not installed; compress runtime install {name}'}", highlight=False)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="compress",
        description="Compress vision-language models and prove that they are still the same models.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"compress {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    overrides = argparse.ArgumentParser(add_help=False)
    overrides.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", help="replace one value of the recipe")
    recipe = argparse.ArgumentParser(add_help=False, parents=[overrides])
    recipe.add_argument("recipe", type=Path, metavar="RECIPE", help="a recipe file (YAML)")

    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--json", action="store_true", help="print JSON alone on standard output")
    store = argparse.ArgumentParser(add_help=False)
    store.add_argument("--store", type=Path, metavar="DIR", help="where step outputs are kept (default: the user's cache)")

    running = argparse.ArgumentParser(add_help=False)
    running.add_argument("--runs", type=Path, default=Path("runs"), metavar="DIR", help="where run folders go (default: runs)")
    running.add_argument("--fresh", action="store_true", help="make every step again, whatever is cached")

    run = commands.add_parser("run", parents=[recipe, store, shared, running], help="compress, evaluate, judge and publish")
    run.add_argument("--force", action="store_true", help="publish even if the gate does not pass; the model card says so")
    run.set_defaults(command=_run)

    evaluate = commands.add_parser(
        "eval", parents=[store, shared, running, overrides], help="judge artifacts that are there already"
    )
    evaluate.add_argument("artifacts", type=Path, nargs="+", metavar="ARTIFACT", help="an artifact's folder")
    evaluate.add_argument("--against", required=True, metavar="ORIGINAL", help="the original: a folder, or a hub id")
    evaluate.add_argument(
        "--by",
        type=Path,
        required=True,
        metavar="RECIPE",
        help="whose tasks and gate count; a file with name, eval and gate will do",
    )
    evaluate.set_defaults(command=_eval)

    plan = commands.add_parser("plan", parents=[recipe, store, shared], help="show what a run would do, and what is cached")
    plan.set_defaults(command=_plan)

    _compare_parser(commands)

    schema = commands.add_parser("schema", help="print the recipe's JSON Schema, for editors")
    schema.set_defaults(command=_schema)

    _store_parser(commands, [store, shared])

    runtime = commands.add_parser("runtime", help="install the engines that run artifacts, or list them")
    actions = runtime.add_subparsers(required=True, metavar="ACTION")
    install = actions.add_parser("install", parents=[shared], help="make a runtime's own environment from its lock file")
    install.add_argument("name", metavar="NAME", help="vllm, llmcompressor, onnxruntime-genai, lmms-eval or lm-eval")
    install.set_defaults(command=_runtime, action="install")
    actions.add_parser("list", parents=[shared], help="say which are installed").set_defaults(command=_runtime, action="list")
    return parser


def _compare_parser(commands: Any) -> None:
    parser = commands.add_parser("compare", help="put runs side by side: accuracy against size")
    parser.add_argument("run", type=Path, nargs="+", metavar="RUN", help="a run's folder, or its report.json")
    forms = ("table", "markdown", "csv", "html", "json")
    parser.add_argument("--format", choices=forms, help="default: what the output's name says, otherwise table")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write there, not to standard output")
    parser.set_defaults(command=_compare, json=False)


def _days(text: str) -> float:
    days = float(text)
    if not 0 <= days < float("inf"):
        raise ValueError
    return days


def _store_parser(commands: Any, parents: list[argparse.ArgumentParser]) -> None:
    store = commands.add_parser("store", help="list, check or shrink the cache of step outputs")
    actions = store.add_subparsers(required=True, metavar="ACTION")
    actions.add_parser("list", parents=parents, help="what is there, the latest used first").set_defaults(action="list")
    actions.add_parser("verify", parents=parents, help="read every file again").set_defaults(action="verify")
    prune = actions.add_parser("prune", parents=parents, help="remove what was not used for long")
    prune.add_argument("--unused-for", type=_days, default=30.0, metavar="DAYS", help="days without use (default: 30; 0: all)")
    prune.add_argument("--dry-run", action="store_true", help="say what would be removed, and remove nothing")
    prune.add_argument("--keep", type=float, metavar="GB", help="then remove the longest unused until this size is left")
    prune.set_defaults(action="prune")
    for action in actions.choices.values():
        action.set_defaults(command=_store)
