"""The report's part on verification: how far an artifact's parts and answers are from those of the checkpoint it came from."""

from __future__ import annotations

from collections.abc import Mapping

from compress.tabular import Column, Table
from compress.verification.results import Verification


def components_table(verifications: Mapping[str, Verification]) -> Table:
    """Return, for each part of each artifact, the largest difference, its limit and the verdict."""
    columns = (
        Column("artifact"), Column("part"), Column("computed"), Column("outputs", "number"), Column("largest difference", "number"),
        Column("relative", "number"), Column("limit", "number"), Column("verdict", "verdict"), Column("at", "prose"),
    )  # fmt: skip
    rows = tuple(
        (
            name,
            found.component,
            found.computed,
            f"{found.inputs}",
            f"{found.absolute:.2g}",
            f"{found.relative:.2g}",
            f"{found.limit:g}",
            "pass" if found.passed else "fail",
            found.worst,
        )
        for name, verification in verifications.items()
        for found in verification.components
    )
    note = (
        "Each part was given what the checkpoint's own was, in float32. Relative: to the checkpoint's largest value. The limit "
        "follows from what the format rounds."
    )
    return Table("Parts of the artifact against the checkpoint it was exported from", columns, rows, note)


def answers_table(verifications: Mapping[str, Verification]) -> Table:
    """Return how many answers agree with the checkpoint's, and how many depend on the image in both."""
    shown = list(dict.fromkeys(row.shown for found in verifications.values() if found.answers for row in found.answers.agreement))
    columns = (
        Column("artifact"), *(Column(f"same with {each}", "number") for each in shown),
        Column("changed by a wrong image", "number"), Column("in the checkpoint", "number"), Column("not grounded", "number"),
        Column("nats per token", "number"), Column("limit", "number"),
    )  # fmt: skip
    rows: list[tuple[str, ...]] = []
    for name, verification in verifications.items():
        if (found := verification.answers) is not None:
            same = {row.shown: f"{row.same} of {row.prompts}" for row in found.agreement}
            rows.append(
                (
                    name,
                    *(same.get(each, "") for each in shown),
                    f"{found.changed_artifact}",
                    f"{found.changed_checkpoint}",
                    f"{found.ungrounded} of {found.seeing}",
                    f"{found.likelihood:.2g}",
                    f"{found.likelihood_limit:g}",
                )
            )
    note = (
        "Greedy answers that are the checkpoint's to the word. Not grounded: prompts whose answer another image makes more or less "
        "likely in the checkpoint and not in the artifact. Nats: the largest change of an answer's mean log-likelihood per token."
    )
    return Table("Answers of the artifact against the checkpoint's", columns, tuple(rows), note)
