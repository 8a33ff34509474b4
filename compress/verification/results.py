"""The record of a verification: each component's difference from the checkpoint, and the agreement of answers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

from pydantic import AliasChoices, Field, ValidationError

from compress.errors import DataError
from compress.files import write_text
from compress.recipe.schema import Frozen

VERIFICATION = "verification.json"

Component = Literal["vision encoder", "embeddings", "decoder", "image encoder", "text encoder"]
"""A component with a graph of its own; CLIP has the last two."""

Shown = Literal["right image", "wrong image", "no image"]
"""The image that a question is asked with."""

Computed = Literal["as it runs", "inputs not rounded"]
"""How a graph was computed: as in its runtime, or with the same weights and without activation quantization."""


class Difference(Frozen):
    """The largest difference of a component's outputs from the checkpoint's, over all inputs."""

    component: Component
    computed: Computed = "as it runs"
    inputs: int
    """The number of outputs that were compared."""

    absolute: float
    """The largest absolute difference, for the worst input."""

    relative: float
    """The same over the largest magnitude of that output in the checkpoint."""

    limit: float
    """The limit of `relative`."""

    worst: str
    """The input with the largest relative difference."""

    @property
    def passed(self) -> bool:
        """Whether it is finite and within its limit."""
        return math.isfinite(self.relative) and self.relative <= self.limit


class Agreement(Frozen):
    """How many prompts, asked with the image of `shown`, the artifact answers exactly as the checkpoint."""

    shown: Shown
    prompts: int
    same: int


class Answers(Frozen):
    """The comparison of greedy answers. For CLIP a prompt is an image, and its answer the nearest text."""

    agreement: tuple[Agreement, ...]
    likelihood: float
    """The largest difference, in nats, of the mean log-likelihood per token of the checkpoint's answers to the right image."""

    likelihood_limit: float
    """The limit of `likelihood`."""

    least_agreement: float
    """The smallest share of identical answers that passes."""

    seeing: int
    """The number of prompts whose likelihood in the checkpoint changes with the image."""

    ungrounded: int = Field(validation_alias=AliasChoices("ungrounded", "blind"))  # "blind" in older reports
    """How many of these do not change in the artifact."""

    changed_checkpoint: int
    """How many of the checkpoint's answers differ with the wrong image."""

    changed_artifact: int
    """How many of the artifact's answers differ with the wrong image."""


class Verification(Frozen):
    """The result of a verification; only one within all limits is written."""

    roundings: tuple[str, ...]
    """The rows of the tables of limits that applied."""

    components: tuple[Difference, ...]
    answers: Answers | None = None


def write_verification(folder: Path, verification: Verification) -> None:
    """Write a verification to its step's folder."""
    write_text(folder / VERIFICATION, verification.model_dump_json(indent=2) + "\n")


def read_verification(folder: Path) -> Verification:
    """Read a verification from its step's folder.

    Raises:
        DataError: the file is missing or invalid.
    """
    path = folder / VERIFICATION
    try:
        return Verification.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise DataError(f"{path}: is no record of a verification ({error}); run again with --fresh") from error
