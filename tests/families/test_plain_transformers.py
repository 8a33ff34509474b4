"""transformers alone, with compressed-tensors, loads every family's artifacts and sees images as the in-process runtime does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CompressedTensorsConfig, GenerationConfig

from compress.families import FAMILIES
from compress.families.resolve import family_at
from compress.numerics.scheme import Scheme
from compress.progress import Silent
from compress.runtimes.runtime import OpenContext
from compress.runtimes.transformers.model import load_model
from tests.families.samples import batches, load_plain
from tests.quantized import scheme
from tests.runtimes.agreement import TOKEN, Case, make_artifact
from tests.tiny import BUILDERS

CASES: dict[str, Case] = {
    "4 bits": Case("compressed-tensors", scheme(4, 32), "float32"),
    "W8A8, fixed scales": Case("compressed-tensors", Scheme(8, -1, symmetric=True, activations="tensor"), "float32"),
    "FP8": Case("compressed-tensors", Scheme(8, -1, symmetric=True, type="float", activations="token"), "float32"),
    "4 bits, the vision tower in W8A8": Case("compressed-tensors", scheme(4, 32), "float32", vision=TOKEN),
}

EXACT = 1e-6

TOKEN_STEPS = 0.04
"""compressed-tensors divides a token's largest value by 127.5 where vLLM's kernels, and we, divide it by 127; relative."""

TOKENS_APART = 0.1
"""compressed-tensors gives each number a scale of its own where a linear's input has no batch dimension, as OPT's `fc1`."""

UNPACKED = {"blip-2"}
"""Families whose `generate` goes past the model's own forward, at which compressed-tensors unpacks: told to unpack at once."""

NOISE = 1.0
"""What a tower of random weights gives is at 1.4."""


@pytest.fixture(scope="module", params=FAMILIES)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return BUILDERS[request.param](tmp_path_factory.mktemp("plain") / "source", dtype=torch.float32)


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize("case", CASES)
def test_what_transformers_makes_of_an_artifact(source: Path, case: str, tmp_path: Path) -> None:
    artifact = make_artifact(source, tmp_path, CASES[case])
    family = family_at(artifact)
    settings: dict[str, Any] = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if family.name in UNPACKED else {}
    context = OpenContext.at(artifact, artifact, Silent())
    plain, loaded = (
        load_plain(artifact, **settings),
        load_model(context, torch.float32, torch.device("cpu")),
    )
    text, with_image = (batch.inputs() for batch in batches(artifact)[:2])
    limit = TOKEN_STEPS if case.endswith("W8A8") else TOKENS_APART if (family.name, case) == ("blip-2", "FP8") else EXACT
    if family.head is not None:  # as one asks it: weights are unpacked by the first forward of the whole model
        assert torch.equal(said(plain, with_image), said(loaded, with_image)) or limit > EXACT
    differences = [apart(plain, loaded, inputs, family.entry(inputs)) for inputs in (with_image, text)]
    assert max(differences) < limit < NOISE, differences


def said(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Return the greedy answer's tokens."""
    settings = GenerationConfig(do_sample=False, max_new_tokens=4, min_new_tokens=4, pad_token_id=0)
    return model.generate(**inputs, generation_config=settings)


def apart(plain: Any, loaded: Any, inputs: dict[str, Tensor], entry: str) -> float:
    """Return how far the outputs of two models are apart, relative to their size."""
    rows = [outputs(model.get_submodule(entry), inputs) for model in (plain, loaded)]
    return float((rows[0] - rows[1]).square().mean().sqrt() / rows[1].square().mean().sqrt())


def outputs(entry: Callable[..., Any], inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        output = entry(**inputs)
    if "logits" in output:
        return output.logits[inputs["attention_mask"].bool()].double()
    if "image_embeds" in output:
        return torch.cat([output.image_embeds, output.text_embeds]).double()
    return output.pooler_output.double()
