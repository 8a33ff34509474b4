"""Whether the files of ONNX graphs are whole, found without reading their data or loading a runtime."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath

import onnx

from compress.checkpoints.checkpoint import read_config
from compress.errors import CheckpointError
from compress.untrusted.reading import inside, library_errors


def check_artifact(folder: Path, graphs: Iterable[str]) -> None:
    """Check that an artifact has its config.json, these graphs, and the data of all its graphs.

    Raises:
        CheckpointError: a file is missing, truncated, or no graph.
    """
    read_config(folder)
    # The family's graphs come first, so that one that is missing is named; the rest covers graphs of other names.
    for path in dict.fromkeys([*(folder / f"{name}.onnx" for name in graphs), *sorted(folder.glob("*.onnx"))]):
        check_files(path)


def check_files(path: Path) -> None:
    """Check that a graph can be read and that all its data is there, without reading the data.

    Raises:
        CheckpointError: a file is missing, truncated, or no graph; or the graph points outside its folder.
    """
    if not inside(path.parent, path).is_file():
        raise CheckpointError(f"{path}: missing; export it again, or copy the whole folder")
    with library_errors(f"{path}: truncated, or no ONNX file", remedy="export it again"):
        # Without the data: a graph is some megabytes, its weights may be gigabytes.
        model = onnx.load(path, load_external_data=False)
    # protobuf parses an empty file, or one cut at a field's end, as a valid message: a graph without outputs shows that.
    if not model.graph.output:
        raise CheckpointError(f"{path}: truncated, or no ONNX file (it has no output); export it again")
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            _check_data(path, tensor.name, {entry.key: entry.value for entry in tensor.external_data})


def _check_data(path: Path, name: str, place: Mapping[str, str]) -> None:
    location = place.get("location", "")
    relative = PurePosixPath(location)
    # A hostile graph could name any file of this machine as its weights, and the runtime would map it.
    if not location or relative.is_absolute() or ".." in relative.parts:
        raise CheckpointError(f"{path}: {name} points to {location!r}, outside the graph's folder; do not use this artifact")
    data = inside(path.parent, path.parent / location)
    if not data.is_file():
        raise CheckpointError(
            f"{path}: its data file {location} is missing; put it beside the graph, or copy the whole folder again"
        )
    with library_errors(f"{path}: {name} has no readable place in its data", remedy="export it again"):
        end = int(place.get("offset", 0)) + int(place.get("length", 0))
    size = data.stat().st_size
    # The graph says how long its data must be: a copy that broke off is found without reading gigabytes.
    if end > size:
        raise CheckpointError(
            f"{data}: truncated: {name} ends at byte {end}, the file at {size}; copy it again, or export it again"
        )
