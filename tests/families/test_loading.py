from pathlib import Path

import pytest
import torch

from compress.checkpoints.checkpoint import open_checkpoint
from compress.families.resolve import family_at
from compress.progress import Silent
from compress.runtimes.runtime import OpenContext
from compress.runtimes.transformers.model import load_model
from tests.families.samples import batches, load_plain, tensors_of
from tests.tiny import BUILDERS


def assert_loaded_alike(folder: Path) -> None:
    """Compare all that a model returns with what it returns as transformers loads it."""
    family = family_at(folder)
    loaded = load_model(OpenContext.at(folder, folder, Silent()), torch.float32, torch.device("cpu"))
    reference = load_plain(folder, "float32")
    for batch in batches(folder):
        inputs = batch.inputs()
        with torch.no_grad():
            entries = [model.get_submodule(family.entry(inputs)) for model in (loaded, reference)]
            actual, expected = (tensors_of(entry(**inputs, use_cache=False)) for entry in entries)
        assert len(actual) == len(expected) > 0
        assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))


@pytest.mark.parametrize("name", BUILDERS)
def test_a_model_is_loaded_as_transformers_loads_it(name: str, tmp_path: Path) -> None:
    assert_loaded_alike(BUILDERS[name](tmp_path))


@pytest.mark.parametrize("name", BUILDERS)
def test_every_tensor_on_disk_has_a_place_in_the_model(name: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(BUILDERS[name](tmp_path))
    family = family_at(tmp_path)
    model = load_plain(tmp_path)
    needed = {part: tuple(tensor.shape) for part, tensor in model.named_parameters()}  # a head that is tied is left out
    computed = {part: tuple(tensor.shape) for part, tensor in model.named_buffers()}  # some of which older files hold too
    actual = {family.module_name(part): entry.shape for part, entry in checkpoint.tensors.items()}
    assert len(actual) == len(checkpoint.tensors)
    assert needed.items() <= actual.items() <= (needed | computed).items()
