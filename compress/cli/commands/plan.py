"""`compress plan`: show what a run would do, and what is cached."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from compress.cli.options import add_options, console, settings

if TYPE_CHECKING:
    from rich.console import Console

    from compress.pipeline.plan import Plan
    from compress.pipeline.store import Store


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_options(parser, "--set", "recipe", "--store", "--json")


def run(options: argparse.Namespace) -> int:
    """Print a recipe's plan."""
    from compress.pipeline.plan import make_plan
    from compress.pipeline.store import Store, default_store
    from compress.untrusted.redaction import redact_value

    store = Store(options.store or default_store())
    plan = make_plan(options.recipe, settings(options), store)
    if options.json:
        print(json.dumps(redact_value(plan.summary(store)), indent=2, ensure_ascii=False))
    else:
        print_plan(plan, store, console(options))
    return 0


def print_plan(plan: Plan, store: Store, console: Console) -> None:
    """Print the plan: its steps, which of their outputs are cached, warnings and notes."""
    from compress.cli.display import print_table
    from compress.report.figures import size
    from compress.report.tabular import Column, Table

    summary = plan.summary(store)
    source = ", ".join(f"{key} {value}" for key, value in summary["source"].items())
    console.print(f"{plan.name}: {source}; on {plan.inputs.device}", highlight=False, markup=False)
    rows = [
        (
            str(step["step"]),
            str(step["key"])[:12],
            "yes" if step["cached"] else "no",
            size(step["expected_bytes"]) if step["expected_bytes"] else "",
        )
        for step in summary["steps"]
    ]
    columns = (Column("step"), Column("key", "code"), Column("cached"), Column("expected size", "number"))
    print_table(console, Table("Steps", columns, tuple(rows)))
    warnings = (*((plan.family.derived,) if plan.family.derived else ()), *plan.kernel_faults, *plan.gate_notes)
    for label, notes in (("warning", warnings), ("note", (*plan.power, *plan.notes))):
        for note in notes:
            console.print(f"{label}: {note}", highlight=False, markup=False)
