"""What the runtimes share that give the top tokens of each position, and the full vocabulary only on request."""

from __future__ import annotations

from abc import ABC
from typing import ClassVar

from pydantic import NonNegativeInt, PositiveInt

from compress.runtimes.runtime import Runtime

LOWER_BOUND = (
    "Merging tokens only lowers KL: such a figure is a lower bound, reported as `at least`. At tokens drawn at random (320 of each "
    "task unless whole_tokens says otherwise) it is taken over the full vocabulary too, where the runtime gives that"
)
"""The report's text on KL over the top tokens alone."""


class TopTokensRuntime(Runtime, ABC):
    """A runtime whose KL is taken over the original's top tokens, and over the full vocabulary at a random sample of tokens."""

    kl_definition: ClassVar[str] = (
        "KL(original ‖ artifact) per token in nats, over the original's top tokens (20 unless top_logprobs says otherwise) and one "
        "bucket for all others; top tokens of the original that the artifact does not have among its own are in that bucket for "
        f"both. {LOWER_BOUND}"
    )

    top_logprobs: PositiveInt = 20
    """How many of the original's top tokens KL is taken over; all others are merged into one bucket."""

    whole_tokens: NonNegativeInt = 320
    """At how many of a task's scored tokens, drawn at random, KL is over the full vocabulary too, a request each; 0 for none. From
    299 on, the largest KL of the sample bounds the 99th percentile of all tokens with 95 % confidence (0.99 ** 299 < 0.05)."""
