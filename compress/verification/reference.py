"""What the checkpoint's own parts give: what enters its decoder, and what leaves it, in float32."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from compress.errors import DataError
from compress.families import Family
from compress.pictures import decode_image
from compress.progress import Progress
from compress.runtimes.inputs import Encoded, Encoder
from compress.runtimes.runtime import Passage
from compress.runtimes.transformers_session import TransformersSession
from compress.verification.samples import VerificationPrompt, captions, pictures

_CONTINUATION = "The picture shows a"
_FURTHER = 3
_LAST = 8

Array = NDArray[Any]


@dataclass(frozen=True)
class Reference:
    """One prompt with tokens that follow it, as the checkpoint computes it; the first `prompt_length` are the prompt's own.

    `images` are the processor's tensors of its images, by name. `embeddings` [tokens, hidden] come from the embedding matrix,
    `entering` [tokens, hidden] is what the decoder reads, `seen` [tokens] says which of that are images' features. `positions` are
    [tokens], or [axes, tokens]. `features` are what comes of the images, by the names of the vision encoder's outputs:
    `image_features` [image tokens, hidden], `deepstack_features` [levels, image tokens, hidden], or keys and values [kv heads,
    states, head dimension] of cross-attention blocks, which `cross_mask` [tokens, images, tiles] lets tokens see. `logits` are
    those of the tokens from `first` on.
    """

    shown: str
    ids: NDArray[np.int64]
    prompt_length: int
    images: dict[str, Array]
    embeddings: NDArray[np.float32]
    entering: NDArray[np.float32]
    seen: NDArray[np.bool_]
    positions: NDArray[np.int64]
    features: dict[str, NDArray[np.float32]]
    cross_mask: NDArray[np.int64] | None
    first: int
    logits: NDArray[np.float32]


@dataclass(frozen=True)
class ReferenceTowers:
    """What the two towers of a checkpoint that compares images with texts give, before anything is normalised.

    `pixels` [images, 3, height, width] and `texts` (token ids and mask of all, padded as the tokenizer does) are what goes in; each
    text was computed on its own here.
    """

    images: list[str]
    pixels: NDArray[np.float32]
    image_embeds: NDArray[np.float32]
    captions: list[str]
    texts: dict[str, NDArray[np.int64]]
    text_embeds: NDArray[np.float32]


@dataclass
class _Heard:
    """What passed through the model in one forward."""

    embeddings: Tensor | None = None
    entering: Tensor | None = None
    positions: Tensor | None = None
    levels: Sequence[Tensor] = ()
    cross: dict[str, Tensor] = field(default_factory=lambda: dict[str, Tensor]())


@torch.inference_mode()
def references(session: TransformersSession, samples: Sequence[VerificationPrompt], progress: Progress) -> list[Reference]:
    """Return what the checkpoint makes of each sample, in order; those that the model does not take are left out.

    Raises:
        DataError: it takes none.
    """
    encoder = replace(session.encoder, tokens_per_batch=1)
    follow = _continuation(encoder)
    passages = [Passage(sample.prompt.id, follow, sample.prompt) for sample in samples]
    faults: dict[int, str] = {}
    found: dict[int, Reference] = {}
    with progress.task("ask the checkpoint", len(samples), "prompts") as advance:
        for (encoded,) in encoder.passages(passages, faults):
            shown = samples[encoded.place].shown
            found[encoded.place] = _reference(session.model, encoder, encoded, (shown, encoded.length - len(follow)))
            advance(1)
    if not found:
        raise DataError(f"the artifact cannot be verified: the model takes none of the prompts it is tried on ({faults[0]})")
    for place, words in faults.items():
        progress.warn(f"verification: {samples[place].shown} left out: {words}")
    return [found[place] for place in sorted(found)]


def _continuation(encoder: Encoder) -> tuple[int, ...]:
    """Return a few tokens that follow every prompt, so that decoding with a cache is compared too."""
    ids = cast("list[int]", encoder.processor.tokenizer(_CONTINUATION, add_special_tokens=False)["input_ids"])
    return tuple(ids[:_FURTHER])


def _reference(model: Any, encoder: Encoder, encoded: Encoded, told: tuple[str, int]) -> Reference:
    shown, prompt_length = told
    family = encoder.family
    inputs = encoder.collate([encoded], "right", torch.device("cpu"))
    with _listening(model, family) as heard:
        logits = model.get_submodule(family.entry(inputs))(**inputs, use_cache=False).logits[0]
    assert heard.embeddings is not None
    entering = heard.embeddings if heard.entering is None else heard.entering
    ids = inputs["input_ids"][0]
    standing = () if family.vision_readers else family.placeholders(model.config.to_dict())
    seen = torch.isin(ids, torch.tensor(standing, dtype=ids.dtype))
    mask = inputs.get(family.image_mask) if family.image_mask else None
    features = {name: _array(value[0]) for name, value in heard.cross.items()}
    if bool(seen.any()):
        features = {"image_features": _array(entering[0][seen])}
        if heard.levels:
            features["deepstack_features"] = _array(torch.stack(list(heard.levels)))
    first = max(prompt_length - _LAST, 0)
    return Reference(
        shown=shown,
        ids=ids.numpy(),
        prompt_length=prompt_length,
        images={name: value.numpy() for name, value in encoded.extras.items()},
        embeddings=_array(heard.embeddings[0]),
        entering=_array(entering[0]),
        seen=seen.numpy(),
        positions=_positions(heard.positions, len(ids)),
        features=features,
        cross_mask=None if mask is None else mask[0].numpy(),
        first=first,
        logits=_array(logits[first:]),
    )


def _positions(given: Tensor | None, length: int) -> NDArray[np.int64]:
    """Return a prompt's positions: those given to the decoder [axes, 1, tokens] or [1, tokens], or its tokens' numbers.

    Of four axes the first is the text's own, which attention masks are made from, and not a rotation.
    """
    if given is None:
        return np.arange(length, dtype=np.int64)
    if given.dim() == 2:
        return given[0].numpy()
    return given[-3:, 0].numpy()


def _array(tensor: Tensor) -> NDArray[np.float32]:
    return tensor.detach().to(torch.float32).numpy().copy()


@contextmanager
def _listening(model: Any, family: Family) -> Generator[_Heard]:
    """Note what enters the decoder while the block runs."""
    heard = _Heard()

    def embedded(module: nn.Module, args: object, output: Tensor) -> None:
        heard.embeddings = output

    def entered(module: nn.Module, args: object, given: dict[str, Any]) -> None:
        heard.entering = given.get("inputs_embeds")
        heard.positions = given.get("position_ids")
        heard.levels = given.get("deepstack_visual_embeds") or ()

    decoder: nn.Module = model.get_submodule(family.blocks.rpartition(".")[0])
    handles = [
        model.get_submodule(family.embeddings).register_forward_hook(embedded),
        decoder.register_forward_pre_hook(entered, with_kwargs=True),
        *_cross_hooks(model, family, heard),
    ]
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()


def _cross_hooks(model: Any, family: Family, heard: _Heard) -> list[Any]:
    """Note the keys and values of blocks that read images' states, [samples, kv heads, states, head dimension]."""
    handles: list[Any] = []
    blocks: list[nn.Module] = list(model.get_submodule(family.blocks)) if family.vision_readers else []
    for number, block in enumerate(blocks):
        attention: Any = getattr(block, "cross_attn", None)
        if attention is None:
            continue

        key, value = f"past_key_values.{number}.key", f"past_key_values.{number}.value"
        split = (1, -1, attention.num_key_value_heads, attention.head_dim)
        handles.append(attention.k_norm.register_forward_hook(_keeping(heard, key, lambda output: output)))
        handles.append(
            attention.v_proj.register_forward_hook(
                _keeping(heard, value, lambda output, split=split: output.reshape(split).transpose(1, 2))
            )
        )
    return handles


def _keeping(heard: _Heard, name: str, form: Callable[[Tensor], Tensor]) -> Callable[[nn.Module, object, Tensor], None]:
    def hook(module: nn.Module, args: object, output: Tensor) -> None:
        heard.cross[name] = form(output)

    return hook


@torch.inference_mode()
def towers(session: TransformersSession) -> ReferenceTowers:
    """Return what the two towers of a checkpoint give for pictures and texts made here."""
    model, processor = session.model, session.encoder.processor
    shown, said = pictures(), captions()
    images = [decode_image(picture.image, picture.id) for picture in shown]
    pixels: Tensor = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    rows: list[Tensor] = []
    for text in said:
        ids = torch.tensor([cast("list[int]", processor.tokenizer(text)["input_ids"])])
        rows.append(model.get_text_features(input_ids=ids, attention_mask=torch.ones_like(ids)).pooler_output[0])
    padded = processor.tokenizer(said, padding=True, return_tensors="np")
    return ReferenceTowers(
        images=[picture.id for picture in shown],
        pixels=_array(pixels),
        image_embeds=_array(model.get_image_features(pixel_values=pixels).pooler_output),
        captions=said,
        texts={name: np.asarray(padded[name], np.int64) for name in ("input_ids", "attention_mask")},
        text_embeds=_array(torch.stack(rows)),
    )
