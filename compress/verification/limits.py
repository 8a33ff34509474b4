"""How much an artifact may differ from its checkpoint, by what its format rounds: the tables of docs/verification.md."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from compress.checkpoints.checkpoint import Checkpoint
from compress.checkpoints.layouts import quantized_linears
from compress.families import Family
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
"""A source of differences between an artifact and its checkpoint, which is computed in float32 with the same integer weights.

`inputs in blocks`: MatMulNBits quantizes activations to 8 bits in blocks (`accuracy_level: 4`), the checkpoint does not.
`inputs to 8 bits`: both quantize activations, and float error decides ties differently.
`words and patches in 8 bits`: the first matrices of CLIP's encoders, whose outputs are compared after all blocks.
"""

COMPONENTS: Mapping[Rounding, float] = {
    "float32": 1e-4,
    "float16": 0.02,
    "inputs in blocks": 0.25,
    "inputs to 8 bits": 0.25,
    "embeddings in 8 bits": 0.005,
    "words and patches in 8 bits": 0.03,
    "head in 8 bits": 0.02,
    "head in 4 bits": 0.25,
}
"""The largest difference of a component's outputs per rounding, relative to the checkpoint's largest magnitude.

These limits and those below lie above the worst values measured, which docs/verification.md lists. Another limit is another
`verification_revision`.
"""

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
"""The largest change per rounding of an answer's mean log-likelihood per token, in nats."""

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
"""The smallest share of identical answers per rounding; 0 where near ties can go either way at every token."""


@dataclass(frozen=True)
class ExportPrecision:
    """The precision settings of an ONNX export."""

    dtype: Literal["float32", "float16"]
    accuracy_level: int = 0
    head_bits: int | None = None
    embedding_bits: int | None = None


@dataclass(frozen=True)
class DifferenceLimits:
    """An artifact's limits: the roundings that affect each component's outputs."""

    vision: frozenset[Rounding]
    embeddings: frozenset[Rounding]
    decoder: frozenset[Rounding]

    @property
    def roundings(self) -> tuple[Rounding, ...]:
        """All of them, in the order of the tables."""
        roundings = self.vision | self.embeddings | self.decoder
        return tuple(rounding for rounding in COMPONENTS if rounding in roundings)

    def of(self, component: Component, *, exact: bool = False) -> float:
        """Return the limit of a component's relative difference; `exact` for comparisons without activation quantization."""
        vision = component in ("vision encoder", "image encoder")
        roundings = self.embeddings if component == "embeddings" else self.vision if vision else self.decoder
        # the coarsest decides: the finer ones are small beside it
        return max(COMPONENTS[rounding] for rounding in roundings if not (exact and rounding.startswith("inputs")))

    @property
    def likelihood(self) -> float:
        """The limit of an answer's change of mean log-likelihood per token, in nats."""
        return max(LIKELIHOODS[rounding] for rounding in self.roundings)

    @property
    def agreement(self) -> float:
        """The smallest share of identical answers that passes."""
        return min(AGREEMENT[rounding] for rounding in self.roundings)


def limits_of(settings: ExportPrecision, checkpoint: Checkpoint, family: Family) -> DifferenceLimits:
    """Return the limits of an artifact that was exported from a checkpoint; reads headers only."""
    schemes = quantized_linears(checkpoint)
    vision_linears = {
        name for name in schemes if family.inside_vision(family.module_name(name)) or name.endswith(family.cross_attention_linears)
    }
    embeddings: set[Rounding] = {settings.dtype}
    decoder = _roundings(settings, (scheme for name, scheme in schemes.items() if name not in vision_linears))
    vision = _roundings(settings, (schemes[name] for name in vision_linears))
    # CLIP's graphs include their first matrices, so that their rounding is seen at the end of a tower only
    if settings.embedding_bits and family.head is None:
        for roundings in (vision, decoder):
            roundings.add("words and patches in 8 bits")
    elif settings.embedding_bits:
        embeddings.add("embeddings in 8 bits")
    if settings.head_bits:
        decoder.add("head in 8 bits" if settings.head_bits == 8 else "head in 4 bits")
        decoder.update(_input_roundings(settings, Scheme(settings.head_bits, -1, symmetric=True)))
    return DifferenceLimits(frozenset(vision), frozenset(embeddings), frozenset(decoder))


def _roundings(settings: ExportPrecision, schemes: Iterable[Scheme]) -> set[Rounding]:
    roundings: set[Rounding] = {settings.dtype}
    for scheme in schemes:
        roundings.update(_input_roundings(settings, scheme))
    return roundings


def _input_roundings(settings: ExportPrecision, scheme: Scheme) -> tuple[Rounding, ...]:
    """Return the rounding of a linear's input by its scheme, if any."""
    if scheme.activations is not None:
        return ("inputs to 8 bits",)
    return ("inputs in blocks",) if settings.accuracy_level == 4 else ()  # 4: int8 products
