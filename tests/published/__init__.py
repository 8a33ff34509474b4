"""The best-known published model of each family: its own config.json, and from it the table of tensors that its weights have.

The weights are not here: transformers' model is built from the config without memory, and its parameters are given the names and
types they have on disk, which for checkpoints of before transformers 4.52 are other names than those in memory.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, cast

import torch
import transformers

from tests.hub_server import Repo

_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "I64": 8}
_QWEN = ((r"^model\.language_model\.", "model."), (r"^model\.visual\.", "visual."))
_LLAVA = (
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^model\.language_model\.", "language_model.model."),
    (r"^model\.vision_tower\.", "vision_tower.vision_model."),
    (r"^model\.", ""),
)
_INTERNVL = (*_LLAVA[:2], _LLAVA[3])


@dataclass(frozen=True)
class Published:
    """A published model; `names` turn module names into those on disk, `parameters` is how many the hub counts.

    `blocks`, `tower` and `projector` are the modules whose linears compression is about: the blocks of the decoder, or of the text
    tower where there is none, those of the vision tower, and what lies between the two. `tied` is the output head where it is not
    on disk; `extra` are tensors on disk that are no parameters: name, type, shape.
    """

    family: str
    source: str
    dtype: str
    parameters: int
    blocks: tuple[str, ...]
    tower: tuple[str, ...]
    projector: tuple[str, ...]
    names: tuple[tuple[str, str], ...] = ()
    tied: str = ""
    extra: tuple[tuple[str, str, tuple[int, ...]], ...] = ()

    @property
    def config_file(self) -> Path:
        """Where its config.json is kept."""
        return Path(__file__).parent / self.family / "config.json"

    @cached_property
    def model(self) -> Any:
        """Transformers' model of that config, its parameters without memory."""
        library = cast("Any", transformers)
        config = library.AutoConfig.from_pretrained(self.config_file.parent, local_files_only=True)
        with torch.device("meta"):
            return getattr(library, config.architectures[0])._from_config(config)

    @cached_property
    def tensors(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Every tensor on disk by its name there: its type and shape."""
        found = {
            self.disk_name(name): (self.dtype, tuple(parameter.shape))
            for name, parameter in self.model.named_parameters(remove_duplicate=False)
            if name != self.tied
        }
        return found | {name: (dtype, shape) for name, dtype, shape in self.extra}

    @property
    def weight_bytes(self) -> int:
        """The size of all tensors on disk."""
        return sum(math.prod(shape) * _BYTES[dtype] for dtype, shape in self.tensors.values())

    def disk_name(self, name: str) -> str:
        """Return what the checkpoint calls a tensor or module of the model."""
        for pattern, replacement in self.names:
            renamed, count = re.subn(pattern, replacement, name, count=1)
            if count:
                return renamed
        return name

    def linears(self, *containers: str) -> dict[str, tuple[int, int]]:
        """Return the linears below some modules, by their names on disk: [out, in]."""
        return {
            self.disk_name(f"{name}.").removesuffix("."): (module.out_features, module.in_features)
            for name, module in self.model.named_modules()
            if isinstance(module, torch.nn.Linear) and f"{name}.".startswith(tuple(f"{container}." for container in containers))
        }

    def repository(self) -> Repo:
        """Return its repository on the hub: the config whole, of the weights only the header."""
        table: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, (dtype, shape) in self.tensors.items():
            end = offset + math.prod(shape) * _BYTES[dtype]
            table[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
            offset = end
        header = json.dumps(table).encode()
        start = len(header).to_bytes(8, "little") + header
        files = {"config.json": self.config_file.read_bytes(), "model.safetensors": start}
        return Repo(files, lengths={"model.safetensors": len(start) + offset})


_DECODER = ("model.language_model.layers",)
_PROJECTOR = ("model.multi_modal_projector",)
_MODELS = (
    Published(
        family="qwen2-vl",
        source="Qwen/Qwen2-VL-7B-Instruct",
        dtype="BF16",
        parameters=8_291_375_616,
        blocks=_DECODER,
        tower=("model.visual.blocks",),
        projector=("model.visual.merger",),
        names=_QWEN,
    ),
    Published(
        family="qwen2.5-vl",
        source="Qwen/Qwen2.5-VL-7B-Instruct",
        dtype="BF16",
        parameters=8_292_166_656,
        blocks=_DECODER,
        tower=("model.visual.blocks",),
        projector=("model.visual.merger",),
        names=_QWEN,
    ),
    Published(
        family="qwen3-vl",
        source="Qwen/Qwen3-VL-8B-Instruct",
        dtype="BF16",
        parameters=8_767_123_696,
        blocks=_DECODER,
        tower=("model.visual.blocks",),
        projector=("model.visual.merger", "model.visual.deepstack_merger_list"),
    ),
    Published(
        family="llava",
        source="llava-hf/llava-1.5-7b-hf",
        dtype="F16",
        parameters=7_063_427_072,
        blocks=_DECODER,
        tower=("model.vision_tower.encoder.layers",),
        projector=_PROJECTOR,
        names=_LLAVA,
    ),
    Published(
        family="llava-next",
        source="llava-hf/llava-v1.6-mistral-7b-hf",
        dtype="F16",
        parameters=7_566_747_648,
        blocks=_DECODER,
        tower=("model.vision_tower.encoder.layers",),
        projector=_PROJECTOR,
        names=_LLAVA,
    ),
    Published(
        family="internvl3",
        source="OpenGVLab/InternVL3-8B-hf",
        dtype="BF16",
        parameters=7_944_373_760,
        blocks=_DECODER,
        tower=("model.vision_tower.encoder.layer",),
        projector=_PROJECTOR,
        names=_INTERNVL,
    ),
    Published(
        family="mllama",
        source="meta-llama/Llama-3.2-11B-Vision-Instruct",
        dtype="BF16",
        parameters=10_670_220_835,
        blocks=_DECODER,
        tower=("model.vision_model.transformer.layers", "model.vision_model.global_transformer.layers"),
        projector=_PROJECTOR,
        names=_INTERNVL,
    ),
    Published(
        family="blip-2",
        source="Salesforce/blip2-opt-2.7b",
        dtype="F32",
        parameters=3_744_761_856,
        blocks=("language_model.model.decoder.layers",),
        tower=("vision_model.encoder.layers",),
        projector=("qformer", "language_projection"),
        tied="language_model.lm_head.weight",
    ),
    Published(
        family="clip",
        source="openai/clip-vit-large-patch14",
        dtype="F32",
        parameters=427_616_513,
        blocks=("text_model.encoder.layers",),
        tower=("vision_model.encoder.layers",),
        projector=("visual_projection", "text_projection"),
        extra=(
            ("text_model.embeddings.position_ids", "I64", (1, 77)),
            ("vision_model.embeddings.position_ids", "I64", (1, 257)),
        ),
    ),
)


@cache
def published() -> dict[str, Published]:
    """Return the models by their hub ids."""
    return {model.source: model for model in _MODELS}
