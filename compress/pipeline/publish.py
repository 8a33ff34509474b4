"""Publishing to a folder: the artifact, its model card, and the digest of every file."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compress.checkpoints.artifact import (
    RECORD,
    folder_digests,
    is_terms,
    source_commit,
    write_record,
)
from compress.checkpoints.checkpoint import read_json_object
from compress.errors import StoreError
from compress.files import write_text
from compress.pipeline.publish_folders import publish_folder, replace_folder
from compress.pipeline.steps.export import ExportArtifact
from compress.progress import Progress
from compress.recipe.schema import is_local
from compress.report.model import Published, Report, Row, checks_of, fidelity_table, table
from compress.report.tabular import markdown
from compress.verification.table import answers_table, components_table

_CARD = "README.md"
_LICENCE = ("license", "license_name", "license_link")
"""The keys of a card's front matter that a hub reads a model's licence from."""


def publish(
    report: Report, artifacts: Sequence[tuple[ExportArtifact, Path]], to: Path, progress: Progress
) -> tuple[Published, ...]:
    """Copy each artifact to `to/<recipe>/<artifact>` with its card and record; an artifact published there before is replaced.

    `artifacts` are the exports, each with the folder that it wrote.

    Raises:
        StoreError: the folder cannot be written, or has something that was not published by this program.
    """
    published: list[Published] = []
    with progress.task("publishing", total=len(artifacts), unit="artifacts") as advance:
        for artifact, folder in artifacts:
            target = publish_folder(to, report.name, artifact.artifact)
            with replace_folder(target) as copy:
                _fill(copy, folder, artifact, report)
            published.append(Published(artifact=artifact.artifact, path=str(target), forced=report.gate.verdict != "pass"))
            advance(1)
    return tuple(published)


def _fill(copy: Path, folder: Path, artifact: ExportArtifact, report: Report) -> None:
    """Copy an artifact, and write its card and record."""
    # Copied, not linked: a published folder is the user's to edit, and must not share bytes with the store.
    shutil.copytree(folder, copy, dirs_exist_ok=True)
    record = read_json_object(copy / RECORD)
    # The copy is checked, not the source: what is published is what was read.
    _check_unchanged(copy, record, folder)
    write_text(copy / _CARD, card(report, artifact))
    record |= {"recipe": report.recipe, "gate": report.gate.model_dump(mode="json"), "hardware": report.hardware}
    write_record(copy, {**record, "git_commit": source_commit()})


def _check_unchanged(copy: Path, record: Mapping[str, Any], folder: Path) -> None:
    digests = folder_digests(copy)
    del digests[RECORD]
    if digests != record["files"]:
        raise StoreError(f"{folder}: is not what was measured any more; run `compress store verify`, then this command again")


def _terms(report: Report, folder: Path) -> str:
    """Return the card's sentences on the terms of use: the original's licence, and the files with its terms."""
    named = report.source.get("license_name") or report.source.get("license")
    files = sorted(path.name for path in folder.glob("*") if path.is_file() and is_terms(path.name))
    sentence = f"Its licence is the original's: {named}" if named else "Its licence is the original's, whose card names none"
    return f"{sentence}. Its terms of use are in {', '.join(f'[{name}]({name})' for name in files)}." if files else f"{sentence}."


def _loaded(rows: Sequence[Row], name: str) -> str:
    """Return the card's list of the programs that loaded the artifact in the evaluation."""
    loaded_with = dict.fromkeys(row.loaded_with for row in rows if row.artifact == name and row.loaded_with)
    if not loaded_with:
        return ""
    lines = "\n".join(f"- {program}" for program in loaded_with)
    return f"\nTo be measured it was loaded with:\n\n{lines}\n\nThe evaluation tried no other program and no other version.\n"


def card(report: Report, artifact: ExportArtifact) -> str:
    """Return the model card of an artifact, in Markdown: results, verdict, usage and provenance."""
    name, usage = artifact.artifact, artifact.export.usage
    rows = tuple(row for row in report.rows if row.artifact in ("original", name))
    source = str(report.source["source"])
    source_name = Path(source).name if is_local(source) else source
    forced = "" if report.gate.verdict == "pass" else f"\n> **Published by force: the gate's verdict was {report.gate.verdict}.**\n"
    # A local path means nothing on a hub, and would show the author's folders.
    base = [] if is_local(source) else [f"base_model: {source}"]
    kind = "zero-shot-image-classification" if artifact.family.head is None else "image-text-to-text"
    licence = [f"{key}: {report.source[key]}" for key in _LICENCE if key in report.source]
    front = "\n".join(
        ["---", *licence, *base, f"library_name: {usage.library}", f"pipeline_tag: {kind}", "tags: [compress]", "---"]
    )
    steps = " → ".join(str(stage["stage"]) for stage in report.recipe["stages"])
    notes = "\n\n".join(f"{key}: {text}" for key, text in report.notes.items())
    verifications = {name: result} if (result := report.verifications.get(name)) else {}
    tables = (components_table(verifications), answers_table(verifications))
    verified = "\n".join(f"\n{each.caption}:\n\n{markdown(each)}\n" for each in tables if each.rows)
    provenance = "\n".join(f"- {key}: {source_name if key == 'source' else value}" for key, value in report.source.items())
    return f"""{front}

# {report.name}: {name}

{source_name}, compressed ({steps}). {_terms(report, Path(rows[-1].path))}
{forced}
## Measured on this artifact and on the original, same prompts, same runtime: {rows[0].runtime}

{table(rows)}

{fidelity_table(rows)}
{verified}
{notes}

## Gate: {report.gate.verdict}

{checks_of(report.gate, name)}

## Use

{usage.instructions}
{_loaded(rows, name)}
## Provenance

{provenance}

`{RECORD}` beside this page holds the recipe, the calibration samples' digests, seeds, versions, and the SHA-256 of every file.
"""
