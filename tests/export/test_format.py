"""What a format says of itself, and a runtime of formats: nobody else compares their names."""

from pathlib import Path
from typing import cast

import pytest

from compress.export import FORMATS
from compress.export.format import Export, format_name, format_of
from compress.numerics.scheme import Scheme
from compress.recipe.schema import load_row
from compress.runtimes import RUNTIMES
from compress.runtimes.runtime import runtime_named, runtimes_for
from tests.tiny.qwen2_5_vl import build_qwen2_5_vl


@pytest.mark.parametrize(
    ("files", "name"),
    [
        (("genai_config.json", "decoder.onnx"), "onnx-genai"),
        (("config.json", "vision_model.onnx"), "onnx"),
        (("config.json", "model.safetensors"), "vllm"),
        ((), "vllm"),  # what is no artifact at all is read as a checkpoint, whose reader says what is missing
    ],
)
def test_a_folder_is_of_one_format(files: tuple[str, ...], name: str, tmp_path: Path) -> None:
    for file in files:
        (tmp_path / file).touch()
    assert format_name(tmp_path) == name
    assert format_of(tmp_path) is load_row(FORMATS, name)


def test_every_format_is_run_somewhere_and_every_runtime_runs_known_ones() -> None:
    runtimes = {name: runtime_named(name) for name in RUNTIMES}
    for name in FORMATS:
        usable = runtimes_for(name)
        assert usable
        assert set(usable) == {runtime for runtime, row in runtimes.items() if name in row.formats}
        assert usable == sorted(usable, key=lambda runtime: (runtimes[runtime].elsewhere, runtime))
    assert runtimes_for("onnx", "vllm")[-1] == "endpoint"
    assert set(runtimes_for("onnx", "vllm")) == {*runtimes_for("onnx"), *runtimes_for("vllm")}
    for row in runtimes.values():
        assert row.formats <= FORMATS.keys()


def test_only_what_a_format_names_counts_as_its_files(tmp_path: Path) -> None:
    folder = build_qwen2_5_vl(tmp_path / "model")
    export_format = format_of(folder)
    before = export_format.total_bytes(folder)
    (folder / "notes.bin").write_bytes(b"12345")
    (folder / "vision_processor.json").write_text("{}")  # of another format
    assert export_format.total_bytes(folder) == before
    names = {path.name for path in export_format.files(folder)}
    assert names == {path.name for path in folder.iterdir()} - {"notes.bin", "vision_processor.json"}
    assert before == sum((folder / name).stat().st_size for name in names)
    assert export_format.weight_bytes(folder) < (folder / "model.safetensors").stat().st_size  # tensors, without the header


def test_only_vllm_needs_kernels_for_products() -> None:
    four = Scheme(4, 32, symmetric=True)
    made = {
        "vllm": {"format": "vllm", "layout": "awq"},
        "onnx": {"format": "onnx"},
        "onnx-genai": {"format": "onnx-genai"},
    }
    rows = {name: cast("type[Export]", load_row(FORMATS, name)).model_validate(fields) for name, fields in made.items()}
    assert {name: export.kernel_kinds([four]) for name, export in rows.items()} == {
        "vllm": {"4-bit weights"},
        "onnx": frozenset(),
        "onnx-genai": frozenset(),
    }
