"""How far an artifact may be from the checkpoint it came from, by what its format rounds; the tables of docs/verification.md."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from compress.checkpoint import Checkpoint
from compress.families import Family
from compress.layouts import quantized_linears
from compress.numerics.scheme import Scheme
from compress.verification.results import Component

Rounding = Literal[
    "float32",
    "float16",
    "inputs in blocks",
    "inputs to 8 bits",
    "embeddings in 8 bits",
    "words and patches in 8 bits",
    "head in 8 bits",
    "head in 4 bits",
]
"""What makes an artifact's numbers others than the checkpoint's, which is computed in float32 with the same integers.

`inputs in blocks` are those of matrices that compute with 8-bit inputs though the checkpoint does not (`accuracy_level: 4`),
`inputs to 8 bits` those that the checkpoint rounds too, where the last digit decides to which side;
`words and patches in 8 bits` the first matrices of two encoders, whose outputs are compared at the far end.
"""

PARTS: Mapping[Rounding, float] = {
    "float32": 1e-4,
    "float16": 0.02,
    "inputs in blocks": 0.25,
    "inputs to 8 bits": 0.25,
    "embeddings in 8 bits": 0.005,
    "words and patches in 8 bits": 0.03,
    "head in 8 bits": 0.02,
    "head in 4 bits": 0.25,
}
"""What each rounding may change of a part's outputs, over the checkpoint's largest magnitude."""

LIKELIHOODS: Mapping[Rounding, float] = {
    "float32": 0.001,
    "float16": 0.05,
    "inputs in blocks": 0.25,
    "inputs to 8 bits": 0.25,
    "embeddings in 8 bits": 0.1,
    "words and patches in 8 bits": 0.1,
    "head in 8 bits": 0.1,
    "head in 4 bits": 0.5,
}
"""By how many nats each rounding may change the mean log-likelihood per token of an answer."""

AGREEMENT: Mapping[Rounding, float] = {
    "float32": 0.95,
    "float16": 0.75,
    "inputs in blocks": 0.0,
    "inputs to 8 bits": 0.0,
    "embeddings in 8 bits": 0.0,
    "words and patches in 8 bits": 0.0,
    "head in 8 bits": 0.0,
    "head in 4 bits": 0.0,
}
"""Which share of the answers has to be the very same; 0 where a near tie can go either way at every token."""


@dataclass(frozen=True)
class ExportPrecision:
    """What an artifact leaves open of the checkpoint's numbers, and settles for itself."""

    dtype: Literal["float32", "float16"]
    accuracy_level: int = 0
    head_bits: int | None = None
    embedding_bits: int | None = None


@dataclass(frozen=True)
class DifferenceLimits:
    """What an artifact's differences may be, by the roundings that reach each part's outputs."""

    vision: frozenset[Rounding]
    embeddings: frozenset[Rounding]
    decoder: frozenset[Rounding]

    @property
    def roundings(self) -> tuple[Rounding, ...]:
        """All of them, in the order of the tables."""
        every = self.vision | self.embeddings | self.decoder
        return tuple(each for each in PARTS if each in every)

    def of(self, component: Component, *, exact: bool = False) -> float:
        """Return what a part's largest difference may be; `exact` where no inputs are rounded, in the checkpoint neither."""
        vision = component in ("vision encoder", "image encoder")
        found = self.embeddings if component == "embeddings" else self.vision if vision else self.decoder
        return max(PARTS[each] for each in found if not (exact and each.startswith("inputs")))

    @property
    def likelihood(self) -> float:
        """By how many nats per token an answer may be more or less likely."""
        return max(LIKELIHOODS[each] for each in self.roundings)

    @property
    def agreement(self) -> float:
        """The least share of answers that have to be the same."""
        return min(AGREEMENT[each] for each in self.roundings)


def limits_of(settings: ExportPrecision, checkpoint: Checkpoint, family: Family) -> DifferenceLimits:
    """Return the limits of an artifact that was made of a checkpoint; reads headers only."""
    schemes = quantized_linears(checkpoint)
    seeing = {name for name in schemes if family.inside_vision(family.module_name(name)) or name.endswith(family.vision_readers)}
    embeddings: set[Rounding] = {settings.dtype}
    decoder = _roundings(settings, (scheme for name, scheme in schemes.items() if name not in seeing))
    vision = _roundings(settings, (schemes[name] for name in seeing))
    if settings.embedding_bits and family.head is None:
        for part in (vision, decoder):
            part.add("words and patches in 8 bits")
    elif settings.embedding_bits:
        embeddings.add("embeddings in 8 bits")
    if settings.head_bits:
        decoder.add("head in 8 bits" if settings.head_bits == 8 else "head in 4 bits")
        decoder.update(_inputs(settings, Scheme(settings.head_bits, -1, symmetric=True)))
    return DifferenceLimits(frozenset(vision), frozenset(embeddings), frozenset(decoder))


def _roundings(settings: ExportPrecision, schemes: Iterable[Scheme]) -> set[Rounding]:
    found: set[Rounding] = {settings.dtype}
    for scheme in schemes:
        found.update(_inputs(settings, scheme))
    return found


def _inputs(settings: ExportPrecision, scheme: Scheme) -> tuple[Rounding, ...]:
    """Return how the input of a linear that is held so is rounded, if at all."""
    if scheme.activations is not None:
        return ("inputs to 8 bits",)
    return ("inputs in blocks",) if settings.accuracy_level == 4 else ()
