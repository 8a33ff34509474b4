"""Every family through ONNX Runtime with images: as it is, in 4 bits and in 8-bit integers, each against its own checkpoint."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import onnx
import pytest

from compress.checkpoints.checkpoint import open_checkpoint
from compress.checkpoints.layouts import quantized_linears
from compress.export.format import ExportContext, VerifyContext, format_of
from compress.export.onnx.format import Onnx
from compress.export.onnx.graphs import GRAPHS
from compress.families.resolve import family_at
from compress.numerics.scheme import Scheme
from compress.progress import Silent
from tests.quantized import round_checkpoint
from tests.specs import planned
from tests.tiny import BUILDERS

SILENT = Silent()
LARGE = 4096
"""From how many bytes on two tensors of the same bytes are one that is stored twice."""
SCHEMES = {
    "fp32": None,
    "int4": Scheme(4, 32, symmetric=False),
    "int8": Scheme(8, -1, symmetric=True, activations="token"),
}
"""How the decoder's linears are held."""


@dataclass(frozen=True)
class Made:
    """A checkpoint and what was exported of it."""

    checkpoint: Path
    artifact: Path
    export: Onnx


@pytest.fixture(scope="module", params=GRAPHS)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return BUILDERS[request.param](tmp_path_factory.mktemp("onnx") / "model")


def make(source: Path, folder: Path, precision: str) -> Made:
    """Export a checkpoint; what is quantized computes with inputs as the checkpoint says, so that only the integers matter."""
    checkpoint, scheme = source, SCHEMES[precision]
    if scheme is not None:
        checkpoint = folder / "quantized"
        round_checkpoint(source, checkpoint, scheme)
    export, artifact = Onnx(format="onnx", accuracy_level=0), folder / "onnx"
    artifact.mkdir()
    export.apply(ExportContext(checkpoint, artifact, family_at(source), SILENT))
    return Made(checkpoint, artifact, export)


@pytest.mark.parametrize("precision", SCHEMES)
def test_an_artifact_is_well_formed_and_does_what_its_checkpoint_does(source: Path, precision: str, tmp_path: Path) -> None:
    case = make(source, tmp_path, precision)
    check_files(case)
    verification = case.export.verify(VerifyContext(case.artifact, case.checkpoint, family_at(source), SILENT, tmp_path / "logs"))
    assert verification.answers is not None
    assert verification.answers.ungrounded == 0
    if precision != "int8":  # there the last digit of an input decides to which code it is rounded
        assert all(difference.relative < 1e-4 for difference in verification.components)
        assert all(agreed.same >= 0.99 * agreed.prompts for agreed in verification.answers.agreement)
    if precision == "fp32":
        assert all(difference.absolute < 1e-4 for difference in verification.components)


def check_files(case: Made) -> None:
    """Check the graphs by onnx's own rules, and that every weight is there once and no other."""
    assert format_of(case.artifact) is Onnx
    contents: dict[tuple[str, int], str] = {}
    for path in sorted(case.artifact.glob("*.onnx")):
        onnx.checker.check_model(str(path), full_check=True)
        graph = onnx.load(path, load_external_data=False).graph
        read = {name for node in graph.node for name in node.input}
        assert {tensor.name for tensor in graph.initializer} <= read
        assert {value.name for value in graph.input} <= read
        for tensor in graph.initializer:
            location = {entry.key: entry.value for entry in tensor.external_data}
            if location and int(location["length"]) >= LARGE:
                first, length = int(location["offset"]), int(location["length"])
                data = (case.artifact / location["location"]).read_bytes()[first : first + length]
                contents[location["location"], first] = hashlib.sha256(data).hexdigest()
    assert len(set(contents.values())) == len(contents)
    stored = sum(path.stat().st_size for path in case.artifact.glob("*.onnx_data"))
    checkpoint = open_checkpoint(case.checkpoint)
    expected = case.export.predict_bytes(planned(checkpoint, family_at(case.checkpoint), quantized_linears(checkpoint)))
    assert 0.94 * expected <= stored <= expected + 4096 * len(contents) + 64_000  # LLaVA leaves its tower's last block unused
    assert stored <= Onnx.weight_bytes(case.artifact)
