"""Settings in a tokenizer's files that truncate or pad every prompt, as tools leave them when they save it after training."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

from compress.checkpoints.checkpoint import read_json_object
from compress.files import disk_errors, write_text

CALL_SETTINGS = ("max_length", "padding", "truncation")
"""Settings of a tokenizer that transformers' processors take as arguments of every call."""

_FURTHER = ("is_split_into_words", "pad_to_multiple_of", "stride", "truncation_strategy")
"""Further such settings, which have an effect only together with those above."""


def never_cut(tokenizer: Any) -> None:
    """Make a loaded tokenizer neither truncate nor pad, whatever its files configure."""
    for name in (*CALL_SETTINGS, *_FURTHER):
        tokenizer.init_kwargs.pop(name, None)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        # the Rust tokenizer has settings of its own, which the Python object does not show
        backend.no_truncation()
        backend.no_padding()


def cutting_settings(folder: Path) -> dict[str, list[str]]:
    """Return, by file, the settings of a folder's tokenizer that truncate prompts or pad them to a length; empty where none does.

    With them vLLM fails ("Mismatch in image token count"), and transformers silently truncates questions. Padding to the longest
    text of a batch is harmless: prompts are asked one by one.

    Raises:
        CheckpointError: a file is there and cannot be read.
    """
    found = {name: harmful(read_json_object(folder / name)) for name, harmful in _FILES.items() if (folder / name).is_file()}
    return {name: settings for name, settings in found.items() if settings}


def write_uncut(folder: Path, target: Path) -> None:
    """Write the files of a folder's tokenizer that truncate or pad, without those settings, to `target`, which may be the folder.

    Raises:
        CheckpointError: a file cannot be read.
        StoreError: it cannot be written.
    """
    for name, settings in cutting_settings(folder).items():
        whole = {key: value for key, value in read_json_object(folder / name).items() if key not in settings}
        whole |= dict.fromkeys(settings) if name == _TOKENIZER else {}  # its readers look for every key
        (target / name).unlink(missing_ok=True)  # it may be a link
        write_text(target / name, json.dumps(whole, ensure_ascii=False, indent=2) + "\n")


@contextmanager
def uncut_folder(folder: Path) -> Generator[Path]:
    """Yield the folder itself or, where its tokenizer truncates, a folder of links to its files with a tokenizer that does not.

    Raises:
        CheckpointError: a file of the tokenizer cannot be read.
        StoreError: the links cannot be written.
    """
    if not cutting_settings(folder):
        yield folder
        return
    with TemporaryDirectory(prefix="compress-model-") as name:
        target = Path(name)
        with disk_errors(target):
            for path in folder.iterdir():
                # links: a model's weights are not copied for the sake of two small files
                (target / path.name).symlink_to(path.resolve())
            write_uncut(folder, target)
        yield target


def _of_tokenizer(content: dict[str, Any]) -> list[str]:
    padding: object = content.get("padding")
    strategy: object = cast("dict[str, Any]", padding).get("strategy") if isinstance(padding, dict) else None
    found = ["truncation"] if content.get("truncation") is not None else []
    return [*found, "padding"] if isinstance(strategy, dict) else found


def _of_settings(content: dict[str, Any]) -> list[str]:
    return [name for name in CALL_SETTINGS if content.get(name)]


_TOKENIZER = "tokenizer.json"
_FILES: dict[str, Callable[[dict[str, Any]], list[str]]] = {_TOKENIZER: _of_tokenizer, "tokenizer_config.json": _of_settings}
