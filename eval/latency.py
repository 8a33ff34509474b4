"""How latency is measured: the load, its size, and the limits that requests are held to, as a recipe's `eval.latency`."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Annotated, ClassVar, Literal, Self, cast

from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveInt, model_validator

from compress.schema import Frozen

Milliseconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Confidence = Annotated[float, Field(gt=0.5, lt=1)]
Side = Annotated[int, Field(ge=16, le=16384)]

_PER_SLOT = 4


def _listed(value: object) -> object:
    return cast("object", value) if isinstance(value, (list, tuple)) else (value,)


def _resolutions(value: object) -> object:
    """Take one `[width, height]` for a list of one."""
    if not isinstance(value, (list, tuple)):
        return value
    rows = cast("Sequence[object]", value)
    return (rows,) if rows and not isinstance(rows[0], (list, tuple)) else rows


class LoadPoint(Frozen):
    """One kind of load: `concurrency` requests are under way at any time, each with so many images of `width` × `height` pixels.

    `prompt_tokens` are the text's, images and the chat template's own left out; `output_tokens` is what every answer has.
    """

    concurrency: PositiveInt
    images: NonNegativeInt
    width: Side
    height: Side
    prompt_tokens: PositiveInt
    output_tokens: PositiveInt

    @property
    def label(self) -> str:
        """What tells the point from others, in plain words."""
        images = f"{self.images} × {self.width}×{self.height}" if self.images else "no image"
        return f"{self.concurrency} at once, {images}, {self.prompt_tokens} → {self.output_tokens} tokens"

    @property
    def shape(self) -> LoadPoint:
        """The same requests, one at a time: what points of another concurrency share."""
        return self.model_copy(update={"concurrency": 1})

    def at(self, concurrency: int) -> LoadPoint:
        """Return the same requests at another concurrency."""
        return self.model_copy(update={"concurrency": concurrency})


class LatencyGoal(Frozen):
    """What a request must keep to count for goodput: its first token, its mean time per further token, its end, in ms."""

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
    """The load that the original and every artifact are put under, in turn, in a server each, on the same machine.

    Each of `images`, `resolution`, `prompt_tokens` and `output_tokens` is one value or a list; every combination is a shape of
    requests. `concurrency` lists how many are under way at once; `auto` finds, for each shape and model, the one with the most
    output tokens per second at which at least 95 % of requests keep `goal` (with no goal: the most of all), among at most
    `max_concurrency`, and measures every model at one request at a time and at what was found for any. Every point gets `requests`
    requests in each of `rounds` rounds; a round starts a server for each model in turn, and each load comes after `warmup` requests
    that do not count. `confidence` is that of each bound of an interval. `component_repeats` is how often each part of the
    model is timed in this process; 0 leaves that out.
    """

    revision: ClassVar[int] = 1
    """Raised whenever the same settings measure something else."""

    concurrency: Annotated[tuple[PositiveInt, ...], Field(min_length=1), BeforeValidator(_listed)] | Literal["auto"]
    requests: Annotated[int, Field(ge=2)] = 64
    warmup: PositiveInt = 8
    rounds: Annotated[int, Field(ge=2)] = 3
    images: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1), BeforeValidator(_listed)] = (1,)
    resolution: Annotated[tuple[tuple[Side, Side], ...], Field(min_length=1), BeforeValidator(_resolutions)] = ((640, 480),)
    prompt_tokens: Annotated[tuple[PositiveInt, ...], Field(min_length=1), BeforeValidator(_listed)] = (128,)
    output_tokens: Annotated[tuple[PositiveInt, ...], Field(min_length=1), BeforeValidator(_listed)] = (128,)
    goal: LatencyGoal | None = None
    max_concurrency: PositiveInt = 256
    confidence: Confidence = 0.95
    component_repeats: NonNegativeInt = 5
    seed: NonNegativeInt = 0

    @model_validator(mode="after")
    def _check_distinct(self) -> Self:
        lists = ("images", "resolution", "prompt_tokens", "output_tokens", "concurrency")
        for name in lists:
            value = getattr(self, name)
            if value != "auto" and len(set(value)) != len(value):
                raise ValueError(f"{name} names the same value twice; write each once")
        if self.concurrency != "auto" and (most := max(self.concurrency)) > self.requests:
            raise ValueError(f"requests: {self.requests} are too few to have {most} under way at once; raise requests")
        return self

    @property
    def shapes(self) -> tuple[LoadPoint, ...]:
        """The kinds of requests, one at a time; those without an image come once, whatever the resolutions are."""
        found = [
            LoadPoint(concurrency=1, images=images, width=size[0], height=size[1], prompt_tokens=prompt, output_tokens=output)
            for images, size, prompt, output in product(self.images, self.resolution, self.prompt_tokens, self.output_tokens)
            if images or size == self.resolution[0]
        ]
        return tuple(found)

    @property
    def points(self) -> tuple[LoadPoint, ...]:
        """The points that are written down: every shape at every concurrency; none with `auto`."""
        if self.concurrency == "auto":
            return ()
        return tuple(shape.at(number) for shape in self.shapes for number in self.concurrency)

    def requests_at(self, point: LoadPoint) -> int:
        """Return how many requests a load has; where concurrencies are found, at least four for each that is under way at once."""
        return max(self.requests, _PER_SLOT * point.concurrency) if self.concurrency == "auto" else self.requests

    def seed_of(self, point: LoadPoint, part: str) -> int:
        """Return the seed of one load: all models get the same requests, and no two loads of one server share an image."""
        text = f"{self.seed}/{part}/{point.model_dump_json()}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
