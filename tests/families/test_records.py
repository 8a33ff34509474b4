from typing import Any, cast

import pytest
from transformers import AutoConfig

from compress.checkpoints.checkpoint import read_config, text_config
from compress.families.resolve import family_of
from tests.published import published
from tests.tiny import BUILDERS


@pytest.mark.parametrize("source", published())
def test_a_published_config_has_a_record_and_a_builder(source: str) -> None:
    model = published()[source]
    assert family_of(read_config(model.config_file.parent)).name == model.family
    assert model.family in BUILDERS


@pytest.mark.parametrize("source", published())
def test_what_a_published_config_leaves_out_is_known(source: str) -> None:
    folder = published()[source].config_file.parent
    actual = text_config(read_config(folder))
    reference = cast("Any", AutoConfig).from_pretrained(folder, local_files_only=True).get_text_config()
    for key in ("num_attention_heads", "num_hidden_layers"):
        assert actual[key] == getattr(reference, key)
