"""The report's tables on verification: differences between an artifact's components and answers and the checkpoint's."""

from __future__ import annotations

from collections.abc import Mapping

from compress.report.tabular import Column, Table
from compress.verification.results import Verification


def components_table(verifications: Mapping[str, Verification]) -> Table:
    """Return the largest difference of each artifact's components, with its limit and verdict."""
    columns = (
        Column("artifact"), Column("part"), Column("computed"), Column("outputs", "number"), Column("largest difference", "number"),
        Column("relative", "number"), Column("limit", "number"), Column("verdict", "verdict"), Column("at", "prose"),
    )  # fmt: skip
    rows = tuple(
        (
            name,
            difference.component,
            difference.computed,
            f"{difference.inputs}",
            f"{difference.absolute:.2g}",
            f"{difference.relative:.2g}",
            f"{difference.limit:g}",
            "pass" if difference.passed else "fail",
            difference.worst,
        )
        for name, verification in verifications.items()
        for difference in verification.components
    )
    note = (
        "Each part was given what the checkpoint's own was, in float32. Relative: to the checkpoint's largest value. The limit "
        "follows from what the format rounds."
    )
    return Table("Parts of the artifact against the checkpoint it was exported from", columns, rows, note)


def answers_table(verifications: Mapping[str, Verification]) -> Table:
    """Return the number of answers that agree with the checkpoint's, and that depend on the image in both."""
    compared = [verification.answers for verification in verifications.values() if verification.answers]
    images = list(dict.fromkeys(row.shown for answers in compared for row in answers.agreement))
    columns = (
        Column("artifact"), *(Column(f"same with {image}", "number") for image in images),
        Column("changed by a wrong image", "number"), Column("in the checkpoint", "number"), Column("not grounded", "number"),
        Column("nats per token", "number"), Column("limit", "number"),
    )  # fmt: skip
    rows: list[tuple[str, ...]] = []
    for name, verification in verifications.items():
        if (answers := verification.answers) is not None:
            same = {row.shown: f"{row.same} of {row.prompts}" for row in answers.agreement}
            rows.append(
                (
                    name,
                    *(same.get(image, "") for image in images),
                    f"{answers.changed_artifact}",
                    f"{answers.changed_checkpoint}",
                    f"{answers.ungrounded} of {answers.seeing}",
                    f"{answers.likelihood:.2g}",
                    f"{answers.likelihood_limit:g}",
                )
            )
    note = (
        "Greedy answers that are the checkpoint's to the word. Not grounded: prompts whose answer another image makes more or less "
        "likely in the checkpoint and not in the artifact. Nats: the largest change of an answer's mean log-likelihood per token."
    )
    return Table("Answers of the artifact against the checkpoint's", columns, tuple(rows), note)
