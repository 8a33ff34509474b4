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
from typing import NoReturn

from compress import interrupts
from compress.cli.commands import COMMANDS, load_command
from compress.errors import CompressError
from compress.untrusted.reading import printable
from compress.untrusted.redaction import redact
from compress.version import __version__

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
            words = sys.argv[1:] if arguments is None else arguments
            options = build_parser(words).parse_args(words)
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
    """Run one command, report what stopped it, and return the exit code.

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
        # A traceback may show a URL with credentials or a foreign file's text.
        print(printable(redact(traceback.format_exc())), end="", file=sys.stderr)
        print("this is a fault of compress itself; please report it with the lines above", file=sys.stderr)
        code = _OWN_FAULT
    return code


def _complain(message: str, *, as_json: bool, code: int) -> None:
    for line in message.split("\n"):
        print(f"compress: {printable(line)}", file=sys.stderr)
    if as_json:
        print(json.dumps({"error": message, "exit_code": code}, ensure_ascii=False))


def build_parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    """Return the parser of a command line, with the arguments of the command that it names alone."""
    parser = argparse.ArgumentParser(
        prog="compress",
        description="Compress vision-language models and prove that they are still the same models.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"compress {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    # Only the named command's module is imported: `--help` of one must not wait for another's libraries.
    named = next((argument for argument in arguments if not argument.startswith("-")), None)
    for name, (_, help_text) in COMMANDS.items():
        command_parser = commands.add_parser(name, help=help_text)
        if name == named:
            command = load_command(name)
            command.add_arguments(command_parser)
            command_parser.set_defaults(command=command.run)
    return parser
