"""Which of some texts an image shows, by a model that puts both into one space (CLIP, arXiv 2103.00020, section 3.1)."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compress.conversation import run_processor
from compress.errors import DataError
from compress.pictures import decode_image
from compress.progress import Progress
from compress.runtimes.inputs import Encoder
from compress.runtimes.runtime import Embeddings, Faults, ImageInput

_AT_ONCE = 32


@dataclass(frozen=True)
class Towers:
    """A loaded model's two towers: `texts` of tokens and their mask [texts, tokens], `images` of pixels [images, 3, height, width].

    Both give rows of one width; how alike two are is `scale` times their cosine.
    """

    texts: Callable[[Tensor, Tensor], Tensor]
    images: Callable[[Tensor], Tensor]
    scale: float


def towers_of(model: Any, device: torch.device) -> Towers:
    """Return the towers of a transformers model."""

    def texts(ids: Tensor, mask: Tensor) -> Tensor:
        return model.get_text_features(input_ids=ids.to(device), attention_mask=mask.to(device)).pooler_output

    def images(pixels: Tensor) -> Tensor:
        return model.get_image_features(pixel_values=pixels.to(device, model.dtype)).pooler_output

    return Towers(texts, images, float(model.logit_scale.exp().to(torch.float32)))


@dataclass(frozen=True)
class Embedder:
    """A loaded model with two towers, and what prepares its inputs."""

    towers: Towers
    encoder: Encoder

    def classify(
        self, pictures: Sequence[ImageInput], classes: Sequence[Sequence[str]], progress: Progress, faults: Faults | None = None
    ) -> NDArray[np.float64]:
        """Return log-probabilities [pictures, classes]: the softmax of the scaled cosines with each class's mean direction."""
        with progress.task("embed texts", len(classes), "classes") as advance:
            directions = torch.stack([self._direction(texts, advance) for texts in classes])
        rows = [
            (self.towers.scale * images @ directions.t()).to(torch.float64).log_softmax(dim=1).cpu()
            for images in self._batches(pictures, directions.shape[1], progress, faults)
        ]
        return torch.cat(rows).numpy()

    def embed(
        self, pictures: Sequence[ImageInput], texts: Sequence[str], progress: Progress, faults: Faults | None = None
    ) -> Embeddings:
        """Return the directions of all images and texts, and what their cosines are scaled by."""
        found: list[Tensor] = []
        with progress.task("embed texts", len(texts), "texts") as advance:
            for first in range(0, len(texts), _AT_ONCE):
                batch = texts[first : first + _AT_ONCE]
                found.append(self._texts(batch).cpu())
                advance(len(batch))
        written = torch.cat(found)
        images = torch.cat([images.cpu() for images in self._batches(pictures, written.shape[1], progress, faults)])
        return Embeddings(images=images.numpy(), texts=written.numpy(), scale=self.towers.scale)

    def _batches(self, pictures: Sequence[ImageInput], width: int, progress: Progress, faults: Faults | None) -> Generator[Tensor]:
        """Give the directions [images, width] of a few images at a time; see `Session.classify` for those that cannot be shown."""
        with progress.task("embed images", len(pictures), "images") as advance:
            for first in range(0, len(pictures), _AT_ONCE):
                batch = pictures[first : first + _AT_ONCE]
                own: Faults | None = None if faults is None else {}
                yield self._images(batch, width, own)
                if faults is not None and own:
                    faults |= {first + place: words for place, words in own.items()}
                advance(len(batch))

    def _direction(self, texts: Sequence[str], advance: Any) -> Tensor:
        """Return the direction of the mean of a class's texts, each of length one before."""
        parts = [self._texts(texts[first : first + _AT_ONCE]) for first in range(0, len(texts), _AT_ONCE)]
        advance(1)
        return _unit(torch.cat(parts).mean(dim=0))

    def _texts(self, texts: Sequence[str]) -> Tensor:
        encoded = self.encoder.processor.tokenizer(list(texts), padding=True, truncation=False, return_tensors="pt")
        for text, mask in zip(texts, encoded["attention_mask"], strict=True):
            length, longest = int(mask.sum()), self.encoder.longest
            if longest is not None and length > longest:
                raise DataError(f"the text {text!r} takes {length} tokens, and the model takes {longest}; shorten it")
        return _unit(self.towers.texts(encoded["input_ids"], encoded["attention_mask"]).to(torch.float32))

    def _images(self, pictures: Sequence[ImageInput], width: int, faults: Faults | None) -> Tensor:
        shown: dict[int, Tensor] = {}
        for place, picture in enumerate(pictures):
            try:
                image = decode_image(picture.image, picture.id)
                prepared = run_processor(self.encoder.processor.image_processor, picture.id, images=[image], return_tensors="pt")
            except DataError as error:
                if faults is None:
                    raise
                faults[place] = str(error)
            else:
                shown[place] = prepared["pixel_values"]
        found = torch.full((len(pictures), width), torch.nan)
        if shown:
            directions = _unit(self.towers.images(torch.cat(list(shown.values()))).to(torch.float32))
            found = found.to(directions.device)
            found[list(shown)] = directions
        return found


def _unit(vectors: Tensor) -> Tensor:
    return torch.nn.functional.normalize(vectors, dim=-1)
