"""The check that nothing a stage was calibrated on is asked in the evaluation."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

from compress.calibration.collect import read_manifest
from compress.calibration.questions import Question
from compress.calibration.texts import Document, pieces
from compress.errors import DataError

_REMEDY = "use another split or file for one of the two, or remove the sample from one"


def check_overlap(folder: Path, questions: Iterable[Question], documents: Iterable[Document]) -> list[str]:
    """Compare the evaluation's questions and text with the calibration samples of a folder that `collect` wrote.

    Returns one line for each image that stands in both with different questions, which is allowed but worth knowing.

    Raises:
        DataError: a question about the same images, or a paragraph of a text, stands in both; names the sample and both origins.
    """
    samples = cast("list[dict[str, Any]]", read_manifest(folder)["samples"])
    asked = {sample["question"]: sample for sample in samples if sample["kind"] == "question"}
    seen = {digest: sample for sample in samples if sample["kind"] == "question" for digest in sample["images"]}
    written = {digest: (sample, origin) for sample in samples for digest, origin in sample.get("paragraphs", {}).items()}
    warnings = list[str]()
    for question in questions if asked else ():
        if question.digest in asked:
            sample = asked[question.digest]
            raise DataError(
                f"question {question.id} ({question.origin}) of the evaluation is calibration sample {sample['id']} "
                f"({sample['origin']}): a measurement on it proves nothing; {_REMEDY}"
            )
        shared = {digest: seen[digest] for digest in question.image_digests if digest in seen}
        warnings += [
            f"an image of question {question.id} ({question.origin}) of the evaluation is also calibration sample "
            f"{sample['id']}'s ({sample['origin']}), with another question"
            for sample in shared.values()
        ]
    for document in documents if written else ():
        for piece in pieces(document):
            found = next((digest for digest in piece.digests if digest in written), None)
            if found is not None:
                sample, origin = written[found]
                raise DataError(
                    f"a paragraph of the evaluation's text ({piece.origin}: {_excerpt(piece.text)}) is part of calibration sample "
                    f"{sample['id']} ({origin}): a measurement on it proves nothing; {_REMEDY}"
                )
    return warnings


def _excerpt(text: str) -> str:
    text = " ".join(text.split())
    return repr(text if len(text) <= 60 else f"{text[:57]}…")
