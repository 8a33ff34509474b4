"""The tokens that end an answer are read in one order for every runtime."""

import json
from pathlib import Path

import pytest

from compress.checkpoints.special_tokens import end_tokens

CONFIG = {"eos_token_id": 3, "text_config": {"eos_token_id": [4, 5]}}
ADDED = {"added_tokens": [{"id": 6, "content": "<pad>"}, {"id": 7, "content": "<end>"}]}


@pytest.mark.parametrize(
    ("files", "tokens"),
    [
        ({"generation_config.json": {"eos_token_id": [1, 2]}, "config.json": CONFIG}, (1, 2)),
        ({"generation_config.json": {"eos_token_id": None}, "config.json": CONFIG}, (4, 5)),
        ({"config.json": {"eos_token_id": 3, "text_config": {}}}, (3,)),
        ({"config.json": {}, "tokenizer_config.json": {"eos_token": "<end>"}, "tokenizer.json": ADDED}, (7,)),
        (
            {
                "config.json": {},
                "tokenizer_config.json": {
                    "eos_token": {"content": "<end>"},
                    "added_tokens_decoder": {"8": {"content": "<end>"}},
                },
            },
            (8,),
        ),
        ({"config.json": {}, "tokenizer_config.json": {"eos_token": None}, "tokenizer.json": ADDED}, ()),
    ],
)
def test_the_first_file_that_names_them_counts(files: dict[str, object], tokens: tuple[int, ...], tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert end_tokens(tmp_path) == tokens
