"""The README's table of methods, from the results that `benchmarks/methods.py` has kept.

    python -m benchmarks.table

A row has the KL from the original on held-out text of this package's method, of llm-compressor's nearest method, and of a baseline:
rounding to nearest in the same layout, or for `bits: auto` one width for all at the same size. All are means over so many draws of
calibration samples; the ratio to llm-compressor's has its 95 % interval over draws and windows of text.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.methods import BASELINES

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
    "gptq, auto": "GPTQ, `bits: auto`",
}
"""The methods that the table has, as the README calls them."""


def table(results: Path = RESULTS) -> str:
    """Return the table as Markdown."""
    lines = [
        "| KL on wikitext-2's test text | draws | here | llm-compressor | ratio (95 %) | baseline |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for file, model in MODELS.items():
        if not (results / file).is_file():
            continue
        result: dict[str, Any] = json.loads((results / file).read_text(encoding="utf-8"))
        rows: list[dict[str, Any]] = result["rows"]
        for row in rows:
            if row["side"] == "compress" and row["method"] in NAMES:
                peer = _row(rows, row, "llm-compressor", PEERS.get(row["method"]))
                baseline = next(filter(None, (_row(rows, row, "compress", method) for method in BASELINES)), None)
                cells = [
                    str(row.get("draws", result["draws"])),
                    _figure(row),
                    _figure(peer),
                    _ratio(result, row, peer),
                    _figure(baseline),
                ]
                comparison = "" if row["comparison"] == "int8" else f", {row['comparison']}"
                lines.append(f"| {model}: {NAMES[row['method']]}{comparison} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _ratio(result: dict[str, Any], row: dict[str, Any], peer: dict[str, Any] | None) -> str:
    """Return our KL over llm-compressor's with its interval."""
    if peer is None:
        return ""
    wanted = (row["comparison"], row["method"], f"llm-compressor's {peer['method']}")
    found = next(ratio for ratio in result["ratios"] if (ratio["comparison"], ratio["ours"], ratio["theirs"]) == wanted)["text_kl"]
    low, high = found["interval"]
    return f"{found['ratio']:.2f} ({low:.2f} to {high:.2f})"


def _row(rows: list[dict[str, Any]], like: dict[str, Any], side: str, method: str | None) -> dict[str, Any] | None:
    """Return the row of one side in the comparison of another row."""
    wanted = (like["comparison"], side, method)
    return next((row for row in rows if (row["comparison"], row["side"], row["method"]) == wanted), None)


def _figure(row: dict[str, Any] | None) -> str:
    return "" if row is None else f"{row['text_kl']:.2g}" if row["text_kl"] < 0.001 else f"{row['text_kl']:.3g}"


if __name__ == "__main__":
    print(table())
