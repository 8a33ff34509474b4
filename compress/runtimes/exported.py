"""The original in a format that a runtime runs, so that it and its artifacts are measured in one runtime."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from compress.errors import StoreError
from compress.export import FORMATS
from compress.export.format import Export, ExportContext, format_name
from compress.recipe.schema import load_row
from compress.runtimes.runtime import OpenContext, Runtime


def in_format_of(runtime: Runtime, context: OpenContext, settings: Mapping[str, Any], folder: Path) -> Path:
    """Return the artifact's folder where the runtime runs its format; else `folder`, to which it is exported by `settings`.

    Raises:
        CheckpointError: the checkpoint cannot be exported.
        StoreError: the disk is too full for the export.
    """
    # Only the original is exported here: an artifact that the runtime does not run is refused in the plan.
    if runtime.runs(format_name(context.artifact)):
        return context.artifact
    export = cast("Export", load_row(FORMATS, settings["format"]).model_validate(settings))
    try:
        folder.mkdir(parents=True)
        export.apply(ExportContext(context.artifact, folder, context.family, context.progress))
    except OSError as error:
        raise StoreError(f"{folder}: {context.artifact} cannot be exported there ({error}); free space") from error
    return folder
