"""The README's table of methods, from the results that `benchmarks/methods.py` has kept.

    python -m benchmarks.table

A row has the KL from the original on held-out text of this package's method, of llm-compressor's nearest method, and of rounding to
nearest in the same layout, all three in one run.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
MODELS = {"methods.json": "demo model", "methods_real_weights.json": "SmolLM2-135M"}
PEERS = {
    "awq": "awq",
    "gptq": "gptq",
    "gptq with awq's scales": "gptq",
    "int8": "int8",
    "fp8": "fp8",
}
"""llm-compressor's method beside each of this package's."""

NAMES = {
    "awq": "AWQ",
    "gptq": "GPTQ without AWQ's scales",
    "gptq with awq's scales": "GPTQ",
    "int8": "INT8 with SmoothQuant",
    "awq, auto": "AWQ, a width per layer",
    "gptq, auto": "GPTQ, a width per layer",
}
"""The methods that the table has, as the README calls them."""


def table(results: Path = RESULTS) -> str:
    """Return the table as Markdown."""
    lines = ["| KL on wikitext-2's test text | here | llm-compressor | round to nearest |", "| --- | ---: | ---: | ---: |"]
    for file, model in MODELS.items():
        if not (results / file).is_file():
            continue
        rows: list[dict[str, Any]] = json.loads((results / file).read_text(encoding="utf-8"))["rows"]
        for row in rows:
            if row["side"] == "compress" and row["method"] in NAMES:
                comparison = "" if row["comparison"] == "int8" else f", {row['comparison'].replace('auto at ', '')}"
                figures = [row, _row(rows, row, "llm-compressor", PEERS.get(row["method"])), _row(rows, row, "compress", "rtn")]
                cells = [_figure(found) for found in figures]
                lines.append(f"| {model}: {NAMES[row['method']]}{comparison} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _row(rows: list[dict[str, Any]], like: dict[str, Any], side: str, method: str | None) -> dict[str, Any] | None:
    """Return the row of one side in the comparison of another row."""
    wanted = (like["comparison"], side, method)
    return next((row for row in rows if (row["comparison"], row["side"], row["method"]) == wanted), None)


def _figure(row: dict[str, Any] | None) -> str:
    return "" if row is None else f"{row['text_kl']:.2g}" if row["text_kl"] < 0.001 else f"{row['text_kl']:.3g}"


if __name__ == "__main__":
    print(table())
