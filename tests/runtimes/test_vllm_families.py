"""vLLM serves every family that it has, in a layout of 4 bits and in W8A8, and answers as the in-process runtime does."""

from __future__ import annotations

import base64
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.torch import load_file  # pyright: ignore[reportUnknownVariableType]

from compress.runtimes.runtime import ImageInput, OpenContext
from compress.runtimes.transformers.runtime import Transformers
from compress.runtimes.vllm.session import VllmSession
from tests.quantized import scheme
from tests.runtimes.agreement import FEW_BLOCKS, SILENT, TOKEN, Case, compare, make_artifact, serving
from tests.tiny import BUILDERS, build_clip, picture

PRELOADED = ("vllm",)

AWQ = Case("awq", scheme(4, 32), "float16")
GPTQ = Case("gptq", scheme(4, 32, symmetric=True), "float16")
PACKED = Case("compressed-tensors", scheme(4, 32), "float16")
W8A8 = Case("compressed-tensors", TOKEN, "float32")

PICTURES = tuple(ImageInput(str(seed), picture(seed)) for seed in range(3))
TEXTS = ("a red square", "two circles", "the castle")

FOUR_BITS = {
    "qwen2-vl": GPTQ,
    "qwen2.5-vl": AWQ,
    "qwen3-vl": AWQ,
    "llava": GPTQ,
    "llava-next": AWQ,
    "internvl3": GPTQ,
    "blip-2": PACKED,
}
"""Each family that vLLM generates text with, and the layout of 4 bits it is tried in."""


@pytest.mark.slow
@pytest.mark.parametrize("width", ["4 bits", "W8A8"])
@pytest.mark.parametrize("family", FOUR_BITS)
def test_vllm_answers_as_the_in_process_runtime(family: str, width: str, tmp_path: Path) -> None:
    case = FOUR_BITS[family] if width == "4 bits" else W8A8
    artifact = make_artifact(BUILDERS[family](tmp_path / "source"), tmp_path, case)
    agreement = compare(artifact, serving(case), tmp_path / "logs")
    assert agreement.clear == (), agreement
    assert agreement.same >= agreement.compared * 2 // 3, agreement


@pytest.mark.slow
@pytest.mark.parametrize("case", [GPTQ, W8A8], ids=["4 bits", "W8A8"])
def test_vllm_embeds_as_the_in_process_runtime(case: Case, tmp_path: Path) -> None:
    """What CLIP says of three pictures and three texts by vLLM's embeddings, both towers quantized."""
    source = build_clip(tmp_path / "source", vision_hidden=128, vision_intermediate=256, vision_heads=4)
    artifact = make_artifact(source, tmp_path, replace(case, vision=case.held))
    context = OpenContext.at(artifact, tmp_path / "logs", SILENT)
    with Transformers(runtime="transformers", dtype="float32", device="cpu").open(context) as inside:
        expected = inside.classify(PICTURES, [[text] for text in TEXTS], SILENT)
    pooling = serving(case).model_copy(update={"max_model_len": None, "arguments": (*FEW_BLOCKS, "--runner", "pooling")})
    with pooling.open(context) as served:
        assert isinstance(served, VllmSession)
        texts = embed(served, {"input": list(TEXTS)})
        images = np.concatenate([embed(served, {"messages": [shown(picture)]}) for picture in PICTURES])
    logits = np.exp(float(load_file(artifact / "model.safetensors")["logit_scale"])) * images @ texts.T
    np.testing.assert_allclose(logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)), expected, atol=0.05)


def embed(served: VllmSession, body: dict[str, Any]) -> NDArray[np.float64]:
    """Return the embeddings that vLLM gives for a request's inputs, one in each row."""
    answer = served.endpoint.client.post("/v1/embeddings", json={"model": served.endpoint.model, **body})
    answer.raise_for_status()
    return np.array([row["embedding"] for row in answer.json()["data"]])


def shown(picture: ImageInput) -> dict[str, Any]:
    """Return the message that holds a picture alone."""
    url = "data:image/png;base64," + base64.b64encode(picture.image).decode()
    return {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}


def test_every_family_is_tried_that_vllm_has() -> None:
    assert BUILDERS.keys() - FOUR_BITS.keys() == {"clip", "mllama"}  # CLIP is tried apart; vLLM dropped mllama after 0.10.2
