"""The checkpoint's reference values in float32: the inputs of its decoder, its logits, and its image features."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from compress.data.images import decode_image
from compress.errors import DataError
from compress.families import Family
from compress.progress import Progress
from compress.runtimes.embedding import EmbeddingSession
from compress.runtimes.inputs import Encoded, Encoder
from compress.runtimes.runtime import Passage
from compress.runtimes.transformers.session import TransformersSession
from compress.verification.samples import VerificationPrompt, captions, sample_images

_CONTINUATION = "The picture shows a"
"""The text whose first tokens follow every prompt, so that decoding with a KV cache is compared too."""

_CONTINUATION_TOKENS = 3
"""Decode steps that are compared per prompt."""

_LOGIT_POSITIONS = 8
"""At how many of a prompt's last positions logits are compared."""

Array = NDArray[Any]


@dataclass(frozen=True)
class Reference:
    """The checkpoint's values for one prompt and a few tokens that continue it."""

    description: str
    """The prompt's images, for messages."""

    ids: NDArray[np.int64]
    """[tokens]"""

    prompt_length: int
    """How many of the tokens are the prompt's."""

    images: dict[str, Array]
    """The processor's tensors for its images, by name."""

    embeddings: NDArray[np.float32]
    """The output of the embedding matrix [tokens, hidden]."""

    decoder_inputs: NDArray[np.float32]
    """The embeddings with image features inserted [tokens, hidden]."""

    image_mask: NDArray[np.bool_]
    """Which of the tokens are image tokens [tokens]."""

    positions: NDArray[np.int64]
    """[tokens], or [axes, tokens] for M-RoPE."""

    features: dict[str, NDArray[np.float32]]
    """The vision encoder's outputs by name: `image_features` [image tokens, hidden] and `deepstack_features` [levels, image tokens,
    hidden], or keys and values [kv heads, states, head dimension] of cross-attention blocks."""

    cross_mask: NDArray[np.int64] | None
    """The image tiles that each token attends to [tokens, images, tiles]; None without cross-attention."""

    first: int
    """The index of the first token with logits."""

    logits: NDArray[np.float32]
    """[tokens from `first` on, vocabulary]"""


@dataclass(frozen=True)
class ReferenceTowers:
    """Inputs and unnormalised outputs of the two towers of a CLIP checkpoint."""

    images: list[str]
    """Descriptions of the images."""

    pixels: NDArray[np.float32]
    """[images, 3, height, width]"""

    image_embeds: NDArray[np.float32]
    """[images, width]"""

    captions: list[str]
    texts: dict[str, NDArray[np.int64]]
    """Token ids and mask [texts, tokens] of all captions, padded by the tokenizer."""

    text_embeds: NDArray[np.float32]
    """[texts, width], each computed on its own, without padding."""


@dataclass
class _Captured:
    """Activations captured by hooks during one forward pass."""

    embeddings: Tensor | None = None
    decoder_inputs: Tensor | None = None
    positions: Tensor | None = None
    deepstack: Sequence[Tensor] = ()
    cross: dict[str, Tensor] = field(default_factory=lambda: dict[str, Tensor]())


@torch.inference_mode()
def references(session: TransformersSession, samples: Sequence[VerificationPrompt], progress: Progress) -> list[Reference]:
    """Return the checkpoint's values for each sample, in order; samples that the model cannot take are left out.

    Raises:
        DataError: it can take none.
    """
    # one prompt per batch: the reference has no padding, so that faults in the artifact's masks show
    encoder = replace(session.encoder, tokens_per_batch=1)
    continuation = _continuation(encoder)
    passages = [Passage(sample.prompt.id, continuation, sample.prompt) for sample in samples]
    faults: dict[int, str] = {}
    by_index: dict[int, Reference] = {}
    with progress.task("ask the checkpoint", len(samples), "prompts") as advance:
        for (encoded,) in encoder.passages(passages, faults):
            sample, prompt_length = samples[encoded.index], encoded.length - len(continuation)
            by_index[encoded.index] = _reference(session.model, encoder, encoded, sample.description, prompt_length)
            advance(1)
    if not by_index:
        raise DataError(f"the artifact cannot be verified: the model takes none of the prompts it is tried on ({faults[0]})")
    for index, fault in faults.items():
        progress.warn(f"verification: {samples[index].description} left out: {fault}")
    return [by_index[index] for index in sorted(by_index)]


def _continuation(encoder: Encoder) -> tuple[int, ...]:
    """Return the tokens that continue every prompt."""
    # a special token in the middle of a conversation would not continue it
    ids = cast("list[int]", encoder.processor.tokenizer(_CONTINUATION, add_special_tokens=False)["input_ids"])
    return tuple(ids[:_CONTINUATION_TOKENS])


def _reference(model: Any, encoder: Encoder, encoded: Encoded, description: str, prompt_length: int) -> Reference:
    family = encoder.family
    inputs = encoder.collate([encoded], "right", torch.device("cpu"))
    with _capturing(model, family) as captured:
        # without a cache, all positions at once: the artifact's decoding with its cache is held against it
        logits = model.get_submodule(family.entry(inputs))(**inputs, use_cache=False).logits[0]
    assert captured.embeddings is not None
    decoder_inputs = captured.embeddings if captured.decoder_inputs is None else captured.decoder_inputs
    ids = inputs["input_ids"][0]
    # with cross-attention an image token has an embedding of its own, which the artifact must give as well
    placeholders = () if family.cross_attention_linears else encoder.tokens.placeholders
    image_mask = torch.isin(ids, torch.tensor(placeholders, dtype=ids.dtype))
    mask = inputs.get(family.image_mask) if family.image_mask else None
    features = {name: _array(value[0]) for name, value in captured.cross.items()}
    if bool(image_mask.any()):
        features = {"image_features": _array(decoder_inputs[0][image_mask])}
        if captured.deepstack:
            features["deepstack_features"] = _array(torch.stack(list(captured.deepstack)))
    first = max(prompt_length - _LOGIT_POSITIONS, 0)
    return Reference(
        description=description,
        ids=ids.numpy(),
        prompt_length=prompt_length,
        images={name: value.numpy() for name, value in encoded.extras.items()},
        embeddings=_array(captured.embeddings[0]),
        decoder_inputs=_array(decoder_inputs[0]),
        image_mask=image_mask.numpy(),
        positions=_positions(captured.positions, len(ids)),
        features=features,
        cross_mask=None if mask is None else mask[0].numpy(),
        first=first,
        logits=_array(logits[first:]),
    )


def _positions(position_ids: Tensor | None, length: int) -> NDArray[np.int64]:
    """Return a prompt's positions: the decoder's [axes, 1, tokens] or [1, tokens], or the tokens' indices for None.

    The first of four axes is the text position, from which transformers builds attention masks; RoPE takes the other three.
    """
    if position_ids is None:
        return np.arange(length, dtype=np.int64)
    if position_ids.dim() == 2:
        return position_ids[0].numpy()
    return position_ids[-3:, 0].numpy()


def _array(tensor: Tensor) -> NDArray[np.float32]:
    # copied: a slice would keep the whole tensor alive, logits of all positions for instance
    return tensor.detach().to(torch.float32).numpy().copy()


@contextmanager
def _capturing(model: Any, family: Family) -> Generator[_Captured]:
    """Capture the decoder's inputs while the context lasts."""
    captured = _Captured()

    def on_embeddings(module: nn.Module, args: object, output: Tensor) -> None:
        captured.embeddings = output

    def on_decoder(module: nn.Module, args: object, kwargs: dict[str, Any]) -> None:
        captured.decoder_inputs = kwargs.get("inputs_embeds")
        captured.positions = kwargs.get("position_ids")
        captured.deepstack = kwargs.get("deepstack_visual_embeds") or ()

    decoder: nn.Module = model.get_submodule(family.blocks.rpartition(".")[0])
    handles = [
        model.get_submodule(family.embeddings).register_forward_hook(on_embeddings),
        decoder.register_forward_pre_hook(on_decoder, with_kwargs=True),
        *_cross_hooks(model, family, captured),
    ]
    try:
        yield captured
    finally:
        for handle in handles:
            handle.remove()


def _cross_hooks(model: Any, family: Family, captured: _Captured) -> list[Any]:
    """Capture the keys and values of cross-attention blocks [samples, kv heads, states, head dimension]."""
    handles: list[Any] = []
    blocks: list[nn.Module] = list(model.get_submodule(family.blocks)) if family.cross_attention_linears else []
    for number, block in enumerate(blocks):
        attention: Any = getattr(block, "cross_attn", None)
        if attention is None:
            continue

        key, value = f"past_key_values.{number}.key", f"past_key_values.{number}.value"
        split = (1, -1, attention.num_key_value_heads, attention.head_dim)
        # keys are cached after their norm, values as they are projected
        handles.append(attention.k_norm.register_forward_hook(_capture(captured, key, lambda output: output)))
        handles.append(
            attention.v_proj.register_forward_hook(
                _capture(captured, value, lambda output, split=split: output.reshape(split).transpose(1, 2))
            )
        )
    return handles


def _capture(captured: _Captured, name: str, transform: Callable[[Tensor], Tensor]) -> Callable[[nn.Module, object, Tensor], None]:
    def hook(module: nn.Module, args: object, output: Tensor) -> None:
        captured.cross[name] = transform(output)

    return hook


@torch.inference_mode()
def towers(session: EmbeddingSession) -> ReferenceTowers:
    """Return the outputs of a CLIP checkpoint's two towers for generated images and captions."""
    processor = session.encoder.processor
    image_inputs, texts = sample_images(), captions()
    images = [decode_image(item.image, item.id) for item in image_inputs]
    pixels: Tensor = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    rows: list[Tensor] = []
    for text in texts:
        ids = torch.tensor([cast("list[int]", processor.tokenizer(text)["input_ids"])])
        # each alone, without padding: the graph's padded batch has to give the same
        rows.append(session.towers.texts(ids, torch.ones_like(ids))[0])
    padded = processor.tokenizer(texts, padding=True, return_tensors="np")
    return ReferenceTowers(
        images=[item.id for item in image_inputs],
        pixels=_array(pixels),
        image_embeds=_array(session.towers.images(pixels)),
        captions=texts,
        texts={name: np.asarray(padded[name], np.int64) for name in ("input_ids", "attention_mask")},
        text_embeds=_array(torch.stack(rows)),
    )
