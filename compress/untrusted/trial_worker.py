"""The process in which foreign text is tried: limits itself, then does what the job on its standard input says. Run by its path.

A job is `{"seconds", "bytes", "templates", "conversations", "tokens"}` or `{"seconds", "bytes", "patterns", "names"}`. It ends with
0 where all was done, whatever came of it; with `NO_MEMORY`, or by SIGXCPU, where a limit was met.
"""

from __future__ import annotations

import contextlib
import json
import re
import resource
import sys
from datetime import datetime
from typing import Any, cast

# Not 1, with which Python itself ends after an error.
NO_MEMORY = 3
_ORDINARY = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
"""What a template that does not work raises beside jinja's own errors; that is told where it is used, with its conversation."""


def main() -> None:
    """Do the job."""
    job: dict[str, Any] = json.load(sys.stdin)
    # CPU time, not the clock: a busy machine must not make a good template fail.
    resource.setrlimit(resource.RLIMIT_CPU, (job["seconds"], job["seconds"] + 1))
    resource.setrlimit(resource.RLIMIT_AS, (job["bytes"], job["bytes"]))
    # No core file of what a foreign template filled the memory with.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        for template in job.get("templates", ()):
            _write(template, job)
        for pattern in job.get("patterns", ()):
            _match(pattern, job["names"])
    except MemoryError:
        sys.exit(NO_MEMORY)


def _match(pattern: str, names: list[str]) -> None:
    with contextlib.suppress(re.error, *_ORDINARY):
        compiled = re.compile(pattern)
        for name in names:
            compiled.match(name)


def _write(template: str, job: dict[str, Any]) -> None:
    """Write conversations with a template as transformers does (`utils/chat_template_utils.py` there)."""
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012 - jinja's own way

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def now(form: str) -> str:
        return datetime.now().astimezone().strftime(form)

    # As transformers configures it: another setting would try another program.
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = to_json
    cast("dict[str, Any]", environment.globals).update(raise_exception=refuse, strftime_now=now)
    with contextlib.suppress(jinja2.TemplateError, *_ORDINARY):
        compiled = environment.from_string(template)
        for conversation in job["conversations"]:
            for begun in (False, True):
                with contextlib.suppress(jinja2.TemplateError, *_ORDINARY):
                    compiled.render(messages=conversation, tools=None, documents=None, add_generation_prompt=begun, **job["tokens"])


if __name__ == "__main__":
    main()
