"""How much of a dataset a set of samples needs, so that no more of it is fetched."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from compress.calibration.json_rows import read_json_rows
from compress.calibration.sets import TextSet, VqaSet, WikitextSet
from compress.calibration.tables import parquet_bytes, parquet_rows
from compress.calibration.windows import REACH

_BYTES_PER_TOKEN = 8
"""More than any tokenizer in use takes of running text on average, so that a text is not cut short."""


def enough_rows(rows: int | None) -> Callable[[Sequence[Path]], bool]:
    """Return whether files hold at least so many rows; never, where all are wanted."""

    def held(paths: Sequence[Path]) -> bool:
        return rows is not None and sum(_rows(path) for path in paths) >= rows

    return held


def enough_for(spec: TextSet | WikitextSet | VqaSet) -> Callable[[Sequence[Path]], bool]:
    """Return whether files hold as much as a calibration set is drawn from."""
    if isinstance(spec, VqaSet):
        return enough_rows(spec.samples)
    wanted = spec.samples * spec.tokens * REACH * _BYTES_PER_TOKEN

    def held(paths: Sequence[Path]) -> bool:
        sizes = (parquet_bytes(path, spec.column) if path.suffix == ".parquet" else path.stat().st_size for path in paths)
        return sum(sizes) >= wanted

    return held


def _rows(path: Path) -> int:
    if path.suffix == ".parquet":
        return parquet_rows(path)
    return len(read_json_rows(path))
