"""The files of a folder of calibration samples, and its manifest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

from compress.errors import DataError

MANIFEST = "manifest.json"
QUESTIONS = "questions.jsonl"
WINDOWS = "windows.safetensors"
SHINGLES = "shingles.safetensors"
IMAGES = "images"
"""The files of the folder; `compress.calibration.collect` describes them."""


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a calibration folder.

    Raises:
        DataError: it is missing or cannot be read.
    """
    try:
        return cast("dict[str, Any]", json.loads((folder / MANIFEST).read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{folder}: its {MANIFEST} cannot be read ({error}); run again with --fresh to collect the samples anew"
        ) from error
