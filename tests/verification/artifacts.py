"""Exported tiny checkpoints, and ways to break them that a file check does not see."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from compress.export.format import ExportContext, VerifyContext
from compress.export.onnx.format import Onnx
from compress.families.resolve import family_at
from compress.progress import Silent
from compress.verification.results import Verification


def export_onnx(source: Path, target: Path, **fields: Any) -> Onnx:
    """Write the ONNX artifact of a checkpoint to a new folder."""
    export = Onnx.model_validate({"format": "onnx", "dtype": "float32", **fields})
    target.mkdir()
    export.apply(ExportContext(source, target, family_at(source), Silent()))
    return export


def verify(export: Onnx, artifact: Path, source: Path) -> Verification:
    """Compare an artifact with the checkpoint it came from."""
    return export.verify(VerifyContext(artifact, source, family_at(source), Silent(), artifact.parent / "logs"))


def spoil(artifact: Path, target: Path, graph: str, name: str, change: Callable[[NDArray[Any]], Any]) -> Path:
    """Copy an artifact, with those weights of a graph changed in place whose names have the pattern `name` in them."""
    shutil.copytree(artifact, target)
    changed = 0
    for tensor in onnx.load(target / f"{graph}.onnx", load_external_data=False).graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL and re.search(name, tensor.name):
            location = {entry.key: entry.value for entry in tensor.external_data}
            dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
            data = np.memmap(target / location["location"], dtype, "r+", int(location["offset"]), tuple(tensor.dims))
            data[...] = change(np.array(data))
            data.flush()
            changed += 1
    assert changed, f"no weight of {graph} is called {name}"
    return target
