"""What every tiny checkpoint is made of: sizes, text to train a tokenizer on, pictures, random weights, saving."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]
from transformers import GenerationConfig, PreTrainedModel

TEXT = """\
The river rises in the northern hills and runs for two hundred miles before it meets the sea. In the early years of the
last century, small boats carried timber, wool and stone between the market towns along its banks. A railway came later, and
with it the harbour lost most of its trade; today only a handful of fishing vessels remain. What colour is the largest
shape? How many circles, squares and triangles are there in the picture? Is there a red square beside the green circle?
Yes, no, one, two, three, four, five; blue, yellow, purple, orange, white, black. The castle, built by order of the king in
1284, was besieged twice during the civil war and has stood empty since 1651. Its keep, however, is still sound, and
visitors may climb the winding stair to look out over the valley. Scientists have measured the flow of the water every
summer since 1923 and found that it changes slowly with the weather of the preceding winter. The population of the district
was 48,367 at the most recent census. Several novels and at least one film were set here, among them a story of two
brothers who sail upstream in search of their father. Critics praised the photography but thought the second half too long.
"""


@dataclass(frozen=True)
class Sizes:
    """The shape of a tiny model; every field is a keyword of the builders."""

    hidden: int = 128
    intermediate: int = 256
    heads: int = 4
    kv_heads: int = 2
    layers: int = 3
    vision_hidden: int = 64
    vision_intermediate: int = 128
    vision_heads: int = 2
    vision_blocks: int = 2
    vocabulary: int = 608
    context: int = 2048
    tied: bool = False
    seed: int = 0
    spread: float = 0.08
    dtype: torch.dtype = torch.bfloat16


def picture(seed: int, width: int = 112, height: int = 112) -> bytes:
    """Return a PNG of coarse random colour patches; the same for the same arguments."""
    generator = np.random.default_rng(seed)
    patches = generator.integers(0, 256, size=(4, 4, 3), dtype=np.uint8)
    image = Image.fromarray(patches).resize((width, height), Image.Resampling.NEAREST)
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


def token_id(tokenizer: Any, token: str) -> int:
    """Return a token's number."""
    return cast("int", tokenizer.convert_tokens_to_ids(token))


def save(
    folder: Path,
    sizes: Sizes,
    model: PreTrainedModel,
    processor: Any,
    generation: GenerationConfig,
    *,
    published: tuple[str, str] | None = None,
) -> Path:
    """Fill a model with random weights and write it, its processor and generation config; return the folder.

    `published` is a pattern and its replacement, which turn the names that transformers writes into those that are published.
    """
    fill(model, sizes)
    model.generation_config = generation
    model.config.architectures = [type(model).__name__]
    cast("torch.nn.Module", model).to(sizes.dtype)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    if published is not None:
        with cast("Any", safe_open)(folder / "model.safetensors", "pt") as file:
            renamed: dict[str, torch.Tensor] = {re.sub(*published, name): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@torch.no_grad()
def fill(model: PreTrainedModel, sizes: Sizes) -> None:
    """Draw every weight anew: matrices that pass a signal on, uneven norms and biases that are not zero, as trained ones are."""
    generator = torch.Generator().manual_seed(sizes.seed)
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() > 1:
            parameter.copy_(noise * sizes.spread)
        elif name.endswith("bias"):
            parameter.copy_(noise * 0.1)
        else:
            parameter.copy_(torch.exp(noise * 0.5))
