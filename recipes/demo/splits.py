"""Which split an example belongs to, and how files are written."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal, get_args

Split = Literal["train", "calibration", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)


def split_of(content: str) -> Split:
    """The split that the content's digest names: 14 of 16 examples are for training, one for each of the others."""
    bucket = hashlib.sha256(content.encode()).digest()[0] % 16
    return "test" if bucket == 0 else "calibration" if bucket == 1 else "train"


def written_aside(file: Path, content: bytes) -> None:
    """Writes a file whole or not at all: aside in the same folder, then renamed into place."""
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_name(f".{file.name}.aside")
    aside.write_bytes(content)
    aside.replace(file)
