"""Calibration sets of a recipe: their fields are the recipe's keys."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt

from compress.data.sources import QuestionSource, RowFilter, TextSource
from compress.recipe.schema import Source


class TextSet(TextSource):
    """Running text, packed into windows of exactly `tokens` tokens."""

    dataset: Literal["text"]
    samples: PositiveInt
    tokens: PositiveInt


class WikitextSet(TextSource):
    """Wikitext from the hub, or a local copy, packed into windows of exactly `tokens` tokens."""

    dataset: Literal["wikitext"]
    source: Source = "Salesforce/wikitext"
    subset: str | None = "wikitext-2-raw-v1"
    samples: PositiveInt
    tokens: PositiveInt


class VqaSet(QuestionSource):
    """Images with a question and its answer, formatted by the model's chat template and processor.

    With `text_only`, rows without an image are included.
    """

    dataset: Literal["vqa"]
    samples: PositiveInt
    text_only: bool = False
    prompt: str = Field(default="{question}", pattern=r"\{question\}")

    @property
    def rows(self) -> RowFilter:
        """The selection of rows."""
        return RowFilter(text_only=self.text_only)
