"""What a verification holds: how far each part is from the checkpoint's, and how many answers agree."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

from pydantic import AliasChoices, Field, ValidationError

from compress.errors import DataError
from compress.files import write_text
from compress.schema import Frozen

VERIFICATION = "verification.json"

Component = Literal["vision encoder", "embeddings", "decoder", "image encoder", "text encoder"]
"""A part of an artifact that is a graph of its own; of a model that compares images with texts, the last two."""

Shown = Literal["right image", "wrong image", "no image"]
"""What a question is asked with."""

Computed = Literal["as it runs", "inputs not rounded"]
"""How a graph was computed: as its runtime does, or with the same weights and without the inputs that only the runtime rounds."""


class Difference(Frozen):
    """How far a part's outputs are from the checkpoint's, over all inputs that were tried.

    `absolute` is the largest difference of any number, `relative` the same over the largest magnitude of that output in the
    checkpoint, each that of the worst input, which `worst` describes. `limit` is what `relative` may be.
    """

    component: Component
    computed: Computed = "as it runs"
    inputs: int
    absolute: float
    relative: float
    limit: float
    worst: str

    @property
    def passed(self) -> bool:
        """Whether it is within its limit; what is not a number never is."""
        return math.isfinite(self.relative) and self.relative <= self.limit


class Agreement(Frozen):
    """How many prompts, asked with `shown`, the artifact answers with the very words of the checkpoint."""

    shown: Shown
    prompts: int
    same: int


class Answers(Frozen):
    """What whole answers say, greedily decoded.

    `likelihood` is the largest difference of the mean log-likelihood per token, in nats, of what the checkpoint answers to the
    right image, and `likelihood_limit` what it may be. Of the prompts whose likelihood another image changes in the checkpoint
    (`seeing`), `ungrounded` are those where it does not in the artifact. `changed_checkpoint` and `changed_artifact` count the
    answers that are others with the wrong image. For a model that compares images with texts a prompt is a picture, and its
    answer the nearest text.
    """

    agreement: tuple[Agreement, ...]
    likelihood: float
    likelihood_limit: float
    least_agreement: float
    seeing: int
    ungrounded: int = Field(validation_alias=AliasChoices("ungrounded", "blind"))  # as reports before called it
    changed_checkpoint: int
    changed_artifact: int


class Verification(Frozen):
    """What one verification found; it is written only where everything is within its limits.

    `roundings` are the rows of the table of limits by which it was judged.
    """

    roundings: tuple[str, ...]
    components: tuple[Difference, ...]
    answers: Answers | None = None


def write_verification(folder: Path, verification: Verification) -> None:
    """Write what was found to a step's folder."""
    write_text(folder / VERIFICATION, verification.model_dump_json(indent=2) + "\n")


def read_verification(folder: Path) -> Verification:
    """Read what a verification found.

    Raises:
        DataError: the file is no such record.
    """
    path = folder / VERIFICATION
    try:
        return Verification.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise DataError(f"{path}: is no record of a verification ({error}); run again with --fresh") from error
