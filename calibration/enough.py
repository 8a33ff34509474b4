"""A test whether fetched files suffice for a calibration set, so that no more of a dataset is fetched."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from compress.calibration.sets import TextSet, VqaSet, WikitextSet
from compress.data.tables import parquet_bytes
from compress.data.windows import REACH
from compress.hubs.datasets import enough_rows

_BYTES_PER_TOKEN = 8
"""More bytes of running text than a token of any common tokenizer has on average, so that enough text is fetched."""


def enough_for(spec: TextSet | WikitextSet | VqaSet) -> Callable[[Sequence[Path]], bool]:
    """Return a test whether files have as much data as a calibration set is drawn from."""
    if isinstance(spec, VqaSet):
        return enough_rows(spec.samples)
    required = spec.samples * spec.tokens * REACH * _BYTES_PER_TOKEN

    def are_enough(paths: Sequence[Path]) -> bool:
        # of the text column alone, unpacked: a parquet file's own size says little about its text
        sizes = (parquet_bytes(path, spec.column) if path.suffix == ".parquet" else path.stat().st_size for path in paths)
        return sum(sizes) >= required

    return are_enough
