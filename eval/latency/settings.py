"""The settings of latency measurements, a recipe's `eval.latency`: the loads, and the goal of a request."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Annotated, ClassVar, Literal, Self, cast

from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveInt, model_validator

from compress.recipe.schema import Frozen

Milliseconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Confidence = Annotated[float, Field(gt=0.5, lt=1)]
Side = Annotated[int, Field(ge=16, le=16384)]

_REQUESTS_PER_SLOT = 4
"""With `concurrency: auto`, a load has at least so many requests for each that is under way at once."""


def _as_list(value: object) -> object:
    return cast("object", value) if isinstance(value, (list, tuple)) else (value,)


def _resolutions(value: object) -> object:
    """Return a single `[width, height]` as a list of one."""
    if not isinstance(value, (list, tuple)):
        return value
    rows = cast("Sequence[object]", value)
    return (rows,) if rows and not isinstance(rows[0], (list, tuple)) else rows


class LoadPoint(Frozen):
    """One kind of load: a shape of requests, at a concurrency."""

    concurrency: PositiveInt
    """The number of requests under way at any time."""

    images: NonNegativeInt
    """The images of each request, of `width` × `height` pixels."""

    width: Side
    height: Side
    prompt_tokens: PositiveInt
    """The text's tokens, without those of images and of the chat template."""

    output_tokens: PositiveInt
    """The tokens of every answer."""

    @property
    def label(self) -> str:
        """The point in words, which identifies it in reports."""
        images = f"{self.images} × {self.width}×{self.height}" if self.images else "no image"
        return f"{self.concurrency} at once, {images}, {self.prompt_tokens} → {self.output_tokens} tokens"

    @property
    def shape(self) -> LoadPoint:
        """The point at concurrency 1, which identifies its kind of requests."""
        return self.model_copy(update={"concurrency": 1})

    def at(self, concurrency: int) -> LoadPoint:
        """Return the same requests at another concurrency."""
        return self.model_copy(update={"concurrency": concurrency})


class LatencyGoal(Frozen):
    """The latency limits that a request must meet to count for goodput: TTFT, TPOT and end to end, in ms."""

    ttft_ms: Milliseconds | None = None
    tpot_ms: Milliseconds | None = None
    e2el_ms: Milliseconds | None = None

    @model_validator(mode="after")
    def _check_any(self) -> Self:
        if not self.limits:
            raise ValueError("sets no limit; write ttft_ms, tpot_ms, e2el_ms or several")
        return self

    @property
    def limits(self) -> Mapping[str, float]:
        """The limits that are set: figure → milliseconds."""
        named = {"ttft": self.ttft_ms, "tpot": self.tpot_ms, "e2el": self.e2el_ms}
        return {figure: limit for figure, limit in named.items() if limit is not None}


class LatencySettings(Frozen):
    """The loads on the original's and every artifact's server, one server after the other on the same machine.

    Each of `images`, `resolution`, `prompt_tokens` and `output_tokens` is one value or a list; every combination is a shape of
    requests.
    """

    revision: ClassVar[int] = 1
    """Raised whenever the same settings measure something else."""

    concurrency: Annotated[tuple[PositiveInt, ...], Field(min_length=1), BeforeValidator(_as_list)] | Literal["auto"]
    """The numbers of requests under way at once. `auto` finds, for each shape and model, the one with the most output tokens per
    second at which at least 95 % of requests meet `goal`, and measures every model at 1 and at each that was found."""

    requests: Annotated[int, Field(ge=2)] = 64
    """The requests of a point in each round."""

    warmup: PositiveInt = 8
    """Requests before each load, which do not count."""

    rounds: Annotated[int, Field(ge=2)] = 3
    """Each round starts a server for each model in turn."""

    images: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1), BeforeValidator(_as_list)] = (1,)
    resolution: Annotated[tuple[tuple[Side, Side], ...], Field(min_length=1), BeforeValidator(_resolutions)] = ((640, 480),)
    prompt_tokens: Annotated[tuple[PositiveInt, ...], Field(min_length=1), BeforeValidator(_as_list)] = (128,)
    output_tokens: Annotated[tuple[PositiveInt, ...], Field(min_length=1), BeforeValidator(_as_list)] = (128,)
    goal: LatencyGoal | None = None
    max_concurrency: PositiveInt = 256
    """The largest concurrency that `auto` tries."""

    confidence: Confidence = 0.95
    """The confidence of each bound of an interval."""

    component_repeats: NonNegativeInt = 5
    """How often each component of the model is timed in this process; 0 leaves that out."""

    seed: NonNegativeInt = 0

    @model_validator(mode="after")
    def _check_distinct(self) -> Self:
        lists = ("images", "resolution", "prompt_tokens", "output_tokens", "concurrency")
        for name in lists:
            value = getattr(self, name)
            if value != "auto" and len(set(value)) != len(value):
                raise ValueError(f"{name} names the same value twice; write each once")
        if self.concurrency != "auto" and (highest := max(self.concurrency)) > self.requests:
            raise ValueError(f"requests: {self.requests} are too few to have {highest} under way at once; raise requests")
        return self

    @property
    def shapes(self) -> tuple[LoadPoint, ...]:
        """The kinds of requests, at concurrency 1; without images, the resolutions make no difference and one is taken."""
        shapes = [
            LoadPoint(concurrency=1, images=images, width=size[0], height=size[1], prompt_tokens=prompt, output_tokens=output)
            for images, size, prompt, output in product(self.images, self.resolution, self.prompt_tokens, self.output_tokens)
            if images or size == self.resolution[0]
        ]
        return tuple(shapes)

    @property
    def points(self) -> tuple[LoadPoint, ...]:
        """Every shape at every listed concurrency; empty with `auto`."""
        if self.concurrency == "auto":
            return ()
        return tuple(shape.at(number) for shape in self.shapes for number in self.concurrency)

    def requests_at(self, point: LoadPoint) -> int:
        """Return the number of requests of a load."""
        # With as many requests as slots a closed loop would be ramp-up and drain alone.
        return max(self.requests, _REQUESTS_PER_SLOT * point.concurrency) if self.concurrency == "auto" else self.requests

    def seed_of(self, point: LoadPoint, label: str) -> int:
        """Return the seed of one load: equal for all models, different for every load of a server, so that none share an image."""
        text = f"{self.seed}/{label}/{point.model_dump_json()}"
        # Four bytes: numpy's legacy generators, which vLLM's client seeds, take no larger seed.
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
