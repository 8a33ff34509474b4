"""Zero-shot classification and embeddings by a model with an image and a text tower (CLIP, arXiv 2103.00020, section 3.1)."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compress.data.images import decode_image
from compress.data.prompts import run_processor
from compress.errors import DataError
from compress.progress import Progress
from compress.runtimes.inputs import Encoder
from compress.runtimes.runtime import Embeddings, Faults, ImageInput

_BATCH_SIZE = 32
"""Images, or texts, in one forward pass: bounds memory, not the results."""


@dataclass(frozen=True)
class Towers:
    """A loaded model's two towers, whose outputs have the same width."""

    texts: Callable[[Tensor, Tensor], Tensor]
    """Token ids and attention mask, each [texts, tokens] → [texts, width]."""

    images: Callable[[Tensor], Tensor]
    """Pixels [images, 3, height, width] → [images, width]."""

    scale: float
    """The logit scale: an image-text logit is `scale` times their cosine similarity."""


def towers_of(model: Any, device: torch.device) -> Towers:
    """Return the towers of a transformers model."""

    def texts(ids: Tensor, mask: Tensor) -> Tensor:
        return model.get_text_features(input_ids=ids.to(device), attention_mask=mask.to(device)).pooler_output

    def images(pixels: Tensor) -> Tensor:
        return model.get_image_features(pixel_values=pixels.to(device, model.dtype)).pooler_output

    # CLIP learns the scale's logarithm.
    return Towers(texts, images, float(model.logit_scale.detach().exp().to(torch.float32)))


class EmbeddingSession:
    """A model with two towers, loaded in this process."""

    def __init__(self, towers: Towers, encoder: Encoder) -> None:
        self.encoder = encoder
        self._towers: Towers | None = towers

    @property
    def towers(self) -> Towers:
        """The loaded towers."""
        assert self._towers is not None, "the session is closed"
        return self._towers

    def close(self) -> None:
        """Free the towers."""
        self._towers = None

    @torch.inference_mode()
    def classify(
        self, images: Sequence[ImageInput], classes: Sequence[Sequence[str]], progress: Progress, faults: Faults | None = None
    ) -> NDArray[np.float64]:
        """Return log-probabilities: the softmax of the scaled cosines with each class's mean embedding; see `Embeds.classify`."""
        with progress.task("embed texts", len(classes), "classes") as advance:
            prototypes = torch.stack([self._class_embedding(texts, advance) for texts in classes])
        rows = [
            # float64: with a scale of 100 the log-softmax of close classes would lose digits in float32.
            (self.towers.scale * batch @ prototypes.t()).to(torch.float64).log_softmax(dim=1).cpu()
            for batch in self._batches(images, prototypes.shape[1], progress, faults)
        ]
        return torch.cat(rows).numpy()

    @torch.inference_mode()
    def embed(
        self, images: Sequence[ImageInput], texts: Sequence[str], progress: Progress, faults: Faults | None = None
    ) -> Embeddings:
        """Return the embeddings of all images and texts; see `Embeds.embed`."""
        batches: list[Tensor] = []
        with progress.task("embed texts", len(texts), "texts") as advance:
            for first in range(0, len(texts), _BATCH_SIZE):
                batch = texts[first : first + _BATCH_SIZE]
                batches.append(self._texts(batch).cpu())
                advance(len(batch))
        text_embeds = torch.cat(batches)
        image_embeds = torch.cat([batch.cpu() for batch in self._batches(images, text_embeds.shape[1], progress, faults)])
        return Embeddings(images=image_embeds.numpy(), texts=text_embeds.numpy(), scale=self.towers.scale)

    def _batches(self, images: Sequence[ImageInput], width: int, progress: Progress, faults: Faults | None) -> Generator[Tensor]:
        """Yield embeddings [images, width] batch by batch; see `Embeds.classify` for images that cannot be decoded."""
        with progress.task("embed images", len(images), "images") as advance:
            for first in range(0, len(images), _BATCH_SIZE):
                batch = images[first : first + _BATCH_SIZE]
                batch_faults: Faults | None = None if faults is None else {}
                yield self._images(batch, width, batch_faults)
                if faults is not None and batch_faults:
                    faults |= {first + index: fault for index, fault in batch_faults.items()}
                advance(len(batch))

    def _class_embedding(self, texts: Sequence[str], advance: Any) -> Tensor:
        """Return the normalised mean of the normalised embeddings of a class's texts."""
        batches = [self._texts(texts[first : first + _BATCH_SIZE]) for first in range(0, len(texts), _BATCH_SIZE)]
        advance(1)
        # Normalised before and after the mean, as in CLIP's own zero-shot code: each template weighs the same whatever its norm.
        return _normalised(torch.cat(batches).mean(dim=0))

    def _texts(self, texts: Sequence[str]) -> Tensor:
        # Not truncated: a cut class name would be measured as if it were the class.
        encoded = self.encoder.processor.tokenizer(list(texts), padding=True, truncation=False, return_tensors="pt")
        for text, mask in zip(texts, encoded["attention_mask"], strict=True):
            length, limit = int(mask.sum()), self.encoder.max_length
            if limit is not None and length > limit:
                raise DataError(f"the text {text!r} takes {length} tokens, and the model takes {limit}; shorten it")
        return _normalised(self.towers.texts(encoded["input_ids"], encoded["attention_mask"]).to(torch.float32))

    def _images(self, images: Sequence[ImageInput], width: int, faults: Faults | None) -> Tensor:
        pixels: dict[int, Tensor] = {}
        for index, item in enumerate(images):
            try:
                image = decode_image(item.image, item.id)
                prepared = run_processor(self.encoder.processor.image_processor, item.id, images=[image], return_tensors="pt")
            except DataError as error:
                if faults is None:
                    raise
                faults[index] = str(error)
            else:
                pixels[index] = prepared["pixel_values"]
        # NaN rather than a missing row: rows stay aligned with the items, and no metric can mistake one for an answer.
        rows = torch.full((len(images), width), torch.nan)
        if pixels:
            embeds = _normalised(self.towers.images(torch.cat(list(pixels.values()))).to(torch.float32))
            rows = rows.to(embeds.device)
            rows[list(pixels)] = embeds
        return rows


def _normalised(vectors: Tensor) -> Tensor:
    return torch.nn.functional.normalize(vectors, dim=-1)
