"""Whether a model's embeddings have a row for every token of its tokenizer; read from files, without torch or the tokenizer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import cast

from compress.checkpoints.checkpoint import Checkpoint
from compress.errors import CheckpointError
from compress.families import Family
from compress.untrusted.reading import printable, read_json


def check_tokens(checkpoint: Checkpoint, family: Family) -> None:
    """Check that every token has a row; placeholders of images need none, since image features replace their embeddings.

    Raises:
        CheckpointError: one has none, as after adding tokens to the tokenizer alone; or a tokenizer's file cannot be read.
    """
    name = f"{family.embeddings}.weight"
    rows = next((entry.shape[0] for disk, entry in checkpoint.tensors.items() if family.module_name(disk) == name), None)
    if rows is None:
        return
    # image features replace these tokens' embeddings before anything reads them
    standing = family.placeholders(checkpoint.config)
    beyond = {number: token for number, token in _tokens(checkpoint.folder) if number >= rows and number not in standing}
    if not beyond:
        return
    first = min(beyond)
    more = f" and {len(beyond) - 1} more have" if len(beyond) > 1 else " has"
    raise CheckpointError(
        f"{checkpoint.folder}: the token {printable(beyond[first])!r} (number {first}){more} no row in the embeddings, which end "
        f"at {rows - 1}; take the tokenizer that belongs to the weights, or give the tokens rows with "
        "model.resize_token_embeddings(len(tokenizer)) and save model and tokenizer"
    )


def _tokens(folder: Path) -> Iterator[tuple[int, str]]:
    """Give the number and the text of every token that a tokenizer's files name."""
    if (folder / "tokenizer.json").is_file():
        whole = _table(folder, "tokenizer.json")
        yield from _vocabulary(cast("Mapping[str, object]", whole.get("model") or {}).get("vocab"))
        # added tokens may be missing from the vocabulary, and mostly have the highest numbers
        for entry in cast("list[Mapping[str, object]]", whole.get("added_tokens") or []):
            if isinstance(number := entry.get("id"), int):
                yield number, str(entry.get("content"))
    # tokenizer.json contains the vocabulary: the slow tokenizer's file counts only without it
    elif (folder / "vocab.json").is_file():
        yield from _vocabulary(_table(folder, "vocab.json"))
    if (folder / "added_tokens.json").is_file():
        yield from _vocabulary(_table(folder, "added_tokens.json"))


def _vocabulary(tokens: object) -> Iterator[tuple[int, str]]:
    """Give the tokens of a vocabulary: a table of numbers by text, or a list of pairs that begin with the text."""
    if isinstance(tokens, dict):
        pairs = cast("dict[str, object]", tokens)
        yield from ((number, token) for token, number in pairs.items() if isinstance(number, int))
    elif isinstance(tokens, list):
        yield from ((number, str(token)) for number, token in enumerate(cast("list[object]", tokens)))


def _table(folder: Path, name: str) -> Mapping[str, object]:
    value: object = read_json(folder / name, root=folder)
    return cast("Mapping[str, object]", value) if isinstance(value, dict) else {}
