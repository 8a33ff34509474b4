"""The pages that the tests look at: reports with and without everything, and a comparison."""

from __future__ import annotations

from typing import Any

from compress.report.compare import compare
from compress.report.compare_formats import as_html
from compress.report.html import render_html
from compress.report.model import Report
from tests.reports import gallery, report, verdict

PAGES = ("report", "bare", "passed", "compare")


def bare() -> Report:
    """Return a report with nothing in it that can be left out."""
    rows = tuple(row.model_copy(update={"fidelity": None, "grounding": None, "noise": None}) for row in report().rows)
    nothing: dict[str, Any] = {"warnings": (), "published": (), "notes": {}, "widths": {}, "latency": {}, "digests": {}}
    return report(rows=rows, timings=(), recipe={}, **nothing)


def passed() -> Report:
    """Return a report whose gate passed."""
    checks = tuple(check.model_copy(update={"verdict": "pass"}) for check in verdict().checks)
    artifacts = dict.fromkeys(verdict().artifacts, "pass")
    return report(gate=verdict().model_copy(update={"verdict": "pass", "artifacts": artifacts, "checks": checks}))


def content(name: str) -> str:
    """Return one of the pages."""
    if name == "compare":
        other = report(name="other", run="/runs/other", digests={"original": "3b1f" * 16, "textvqa": "00" * 32})
        elsewhere = report(name="elsewhere", run="/runs/elsewhere", digests={"original": "aa" * 32}, latency={})
        return as_html(compare([report(), other, elsewhere]))
    made = {"report": report, "bare": bare, "passed": passed}[name]()
    return render_html(made, gallery() if name != "bare" else None)
