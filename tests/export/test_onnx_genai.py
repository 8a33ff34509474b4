import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import numpy_helper

from compress.checkpoints.artifact import side_files
from compress.checkpoints.checkpoint import open_checkpoint, read_json_object
from compress.checkpoints.layouts import quantized_linears
from compress.errors import CheckpointError, MissingError, ServerError, StoreError, VerificationError
from compress.export import FORMATS
from compress.export.format import ExportContext, VerifyContext
from compress.export.onnx_genai.builder import write_builder_input
from compress.export.onnx_genai.format import OnnxGenai
from compress.families.resolve import family_at, family_of
from compress.files import write_json
from compress.numerics.scheme import Scheme
from compress.progress import Silent
from compress.recipe.schema import load_row
from compress.workers.environment import require
from tests.quantized import exact_weights, round_checkpoint, scheme
from tests.specs import planned
from tests.tiny import BUILDERS, build_qwen2_5_vl, build_qwen2_vl, build_qwen3_vl

PRELOADED = ("onnxruntime-genai",)

ORT: Any = onnxruntime
NUMPY: Any = numpy_helper
DEMO = Path(__file__).parents[2] / "recipes" / "demo" / "model"


@dataclass
class Warnings(Silent):
    """Progress that keeps what it was told."""

    heard: list[str] = field(default_factory=lambda: list[str]())

    def warn(self, message: str) -> None:
        self.heard.append(message)


def onnx_genai(**settings: Any) -> OnnxGenai:
    return OnnxGenai.model_validate({"format": "onnx-genai", **settings})


def exported(source: Path, target: Path, progress: Silent | None = None, **settings: Any) -> Path:
    target.mkdir()
    family = family_of(open_checkpoint(source).config)
    onnx_genai(**settings).apply(ExportContext(source, target, family, progress or Silent()))
    return target


def verified(source: Path, artifact: Path, **settings: Any) -> dict[str, float]:
    """Verify an artifact and return by which share of its largest value each part differs."""
    family = family_of(open_checkpoint(source).config)
    context = VerifyContext(artifact, source, family, Silent(), artifact.parent / "logs")
    return {difference.component: difference.relative for difference in onnx_genai(**settings).verify(context).components}


def faults(source: Path, quantized: Scheme | Callable[[str], Scheme | None] | None, folder: Path, **settings: Any) -> list[str]:
    if quantized is not None:
        round_checkpoint(source, folder / "rounded", quantized)
        source = folder / "rounded"
    checkpoint = open_checkpoint(source)
    return onnx_genai(**settings).check(planned(checkpoint, family_of(checkpoint.config), quantized_linears(checkpoint)))


def ran(path: Path, **feeds: NDArray[Any]) -> NDArray[Any]:
    return ORT.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, feeds)[0]


def tensors(path: Path) -> dict[str, NDArray[Any]]:
    return {tensor.name: NUMPY.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(DEMO, tmp_path_factory.mktemp("demo") / "artifact")


def test_the_table_of_formats_has_it() -> None:
    assert load_row(FORMATS, "onnx-genai") is OnnxGenai
    names = [onnx_genai(), onnx_genai(decoder="own", dtype="float16"), onnx_genai(accuracy_level=0, head_bits=8, embedding_bits=8)]
    assert [export.artifact for export in names] == [
        "onnx-genai", "onnx-genai-own-float16", "onnx-genai-exact-head8-embeddings8",
    ]  # fmt: skip


@pytest.mark.parametrize("family", sorted(BUILDERS.keys() - {"qwen2-vl", "qwen2.5-vl", "qwen3-vl"}))
def test_a_family_without_images_there_is_refused(family: str, tmp_path: Path) -> None:
    messages = faults(BUILDERS[family](tmp_path / "source"), None, tmp_path)
    assert len(messages) == 1
    assert messages[0].startswith("onnxruntime-genai 0.18 runs qwen2-vl, qwen2.5-vl, qwen3-vl with images, and ")
    assert messages[0].endswith("use format: onnx")


def test_what_the_builder_does_not_read_is_refused_and_the_own_decoder_holds_it(tmp_path: Path) -> None:
    source = build_qwen2_5_vl(tmp_path / "source", layers=2)
    cases: dict[str, tuple[Scheme | Callable[[str], Scheme | None], str]] = {
        "rounded inputs": (
            Scheme(8, -1, symmetric=True, activations="token"), r"reads no linears whose inputs are rounded to 8 bits",
        ),
        "asymmetric": (scheme(8, 64), r"8 bits as GPTQ lays them out, symmetric, and this grid is asymmetric"),
        "several": (lambda name: scheme(4, 32 if "mlp" in name else 64), r"reads one scheme for all linears of the decoder"),
        "some": (lambda name: scheme() if "mlp" in name else None, r"q_proj and \d+ others|k_proj and \d+ others"),
    }  # fmt: skip
    for number, (quantized, pattern) in enumerate(cases.values()):
        (tmp_path / str(number)).mkdir()
        messages = faults(source, quantized, tmp_path / str(number))
        assert len(messages) == 1
        assert messages[0].endswith("set decoder: own")
        assert re.search(pattern, messages[0])
        rounded = tmp_path / str(number) / "rounded"
        assert faults(rounded, None, tmp_path, decoder="own") == []
    (tmp_path / "three").mkdir()
    assert "MatMulNBits holds 4 or 8 bits, not 3" in faults(source, scheme(3, 32), tmp_path / "three")[0]
    assert faults(build_qwen2_vl(tmp_path / "qwen2"), None, tmp_path) == [
        "onnxruntime-genai's model builder does not know Qwen2VLForConditionalGeneration; set decoder: own"
    ]


def test_the_folder_holds_what_the_runtime_reads(demo: Path) -> None:
    files = {path.name for path in demo.iterdir()}
    sides = set(side_files(DEMO))
    assert files == sides | {
        "config.json", "genai_config.json", "vision_processor.json", "model.onnx", "model.onnx.data",
        "vision_encoder.onnx", "vision_encoder.onnx_data", "embeddings.onnx", "embeddings.onnx_data",
    }  # fmt: skip
    for name in sides:
        assert (demo / name).read_bytes() == (DEMO / name).read_bytes()
    config = read_json_object(demo / "genai_config.json")
    model = config["model"]
    assert {key: model[key] for key in ("type", "eos_token_id", "image_token_id", "vision_start_token_id", "context_length")} == {
        "type": "qwen2_5_vl", "eos_token_id": [1010, 1011], "image_token_id": 1022, "vision_start_token_id": 1019,
        "context_length": 2048,
    }  # fmt: skip
    assert model["decoder"]["hidden_size"] == 192
    assert config["search"]["do_sample"] is False
    transforms = [row["operation"] for row in read_json_object(demo / "vision_processor.json")["processor"]["transforms"]]
    assert [row["type"] for row in transforms] == ["DecodeImage", "Resize", "Rescale", "Normalize", "PatchImage"]
    assert transforms[1]["attrs"] == {
        "smart_resize": 1, "interpolation": "CUBIC", "min_pixels": 3136, "max_pixels": 50176, "patch_size": 14, "merge_size": 2,
    }  # fmt: skip
    onnx.checker.check_model(str(demo / "vision_encoder.onnx"), full_check=True)
    onnx.checker.check_model(str(demo / "embeddings.onnx"), full_check=True)


def test_images_that_were_filled_up_give_what_each_gives_alone(demo: Path) -> None:
    random = np.random.default_rng(0)
    grids = np.array([[1, 4, 6], [1, 10, 6], [1, 6, 4]])
    patches = [random.standard_normal((int(grid.prod()), 1176)).astype(np.float32) for grid in grids]
    longest = max(map(len, patches))
    filled = np.full((3, longest, 1176), np.nan, np.float32)
    for image, image_patches in enumerate(patches):
        filled[image, : len(image_patches)] = image_patches
    path = demo / "vision_encoder.onnx"
    together = ran(path, pixel_values=filled.reshape(-1, 1176), image_grid_thw=grids)
    alone = [
        ran(path, pixel_values=image_patches, image_grid_thw=grid[None]) for image_patches, grid in zip(patches, grids, strict=True)
    ]
    np.testing.assert_allclose(together, np.concatenate(alone), atol=1e-5)


def test_features_take_the_places_of_image_tokens(demo: Path) -> None:
    ids = np.array([[5, 1022, 1022, 7], [1022, 8, 9, 10]])
    features = np.arange(3 * 192, dtype=np.float32).reshape(3, 192)
    embeds = ran(demo / "embeddings.onnx", input_ids=ids, image_features=features)
    np.testing.assert_array_equal(embeds[ids == 1022], features)
    words = ran(demo / "embeddings.onnx", input_ids=np.array([[5, 7, 8, 9, 10]]), image_features=features[:0])
    np.testing.assert_array_equal(embeds[ids != 1022], words[0])


def test_the_builder_takes_the_stages_own_integers(tmp_path: Path) -> None:
    source, heard = DEMO, Warnings()
    schemes = round_checkpoint(source, tmp_path / "rounded", scheme(4, 32))
    artifact = exported(tmp_path / "rounded", tmp_path / "artifact", heard, accuracy_level=0)
    stored, exact = tensors(artifact / "model.onnx"), exact_weights(source, schemes)
    for name, row in (("q_proj", "model.layers.1.self_attn.q_proj"), ("down_proj", "model.layers.2.mlp.down_proj")):
        prefix = f"model.layers.{row.split('.')[2]}.{'attn' if 'attn' in row else 'mlp'}.{name}.MatMulNBits"
        codes, scales, points = (stored[f"{prefix}.{suffix}"] for suffix in ("qweight", "scales", "qzeros"))
        nibbles = np.stack([codes & 15, codes >> 4], axis=-1).reshape(*codes.shape[:2], 32).astype(np.float32)
        flat = points.reshape(len(codes), -1)
        zeros = np.stack([flat & 15, flat >> 4], axis=-1).reshape(len(codes), -1)[:, : codes.shape[1]]
        steps = scales.reshape(len(codes), codes.shape[1], 1)
        dequantized = ((nibbles - zeros[..., None]) * steps).reshape(len(codes), -1)
        np.testing.assert_array_equal(dequantized, exact[row].numpy())
    assert stored["lm_head.MatMul.weight"].dtype == np.float32
    assert not list(artifact.glob(".*"))
    assert max(verified(tmp_path / "rounded", artifact, accuracy_level=0).values()) < 1e-4
    assert heard.heard == []


@pytest.mark.parametrize("decoder", ["builder", "own"])
def test_the_size_is_known_before_with_a_head_that_is_the_embeddings(decoder: str, tmp_path: Path) -> None:
    source = build_qwen2_5_vl(tmp_path / "source", layers=1, tied=True, dtype=torch.float32)
    artifact = exported(source, tmp_path / "artifact", decoder=decoder)
    expected = onnx_genai(decoder=decoder).predict_bytes(planned(open_checkpoint(source), family_at(source), {}))
    stored = sum(path.stat().st_size for path in (*artifact.glob("*.onnx_data"), *artifact.glob("*.onnx.data")))
    assert expected <= stored < expected + 100_000  # the matrix once more has 311,296 bytes, the tables of positions 262,144


def test_scales_that_are_no_float16_numbers_are_told(tmp_path: Path) -> None:
    source = build_qwen2_5_vl(tmp_path / "source", layers=1, dtype=torch.float32)
    round_checkpoint(source, tmp_path / "rounded", scheme(4, 32))
    checkpoint, heard = open_checkpoint(tmp_path / "rounded"), Warnings()
    family = family_of(checkpoint.config)
    (tmp_path / "laid").mkdir()
    context = ExportContext(tmp_path / "rounded", tmp_path / "target", family, heard)
    write_builder_input(context, planned(checkpoint, family, quantized_linears(checkpoint)), tmp_path / "laid")
    laid_out = open_checkpoint(tmp_path / "laid")
    assert len(heard.heard) == 1
    assert heard.heard[0].startswith("onnxruntime-genai's builder reads scales as float16: those of 7 linears (model.layers.0.")
    assert heard.heard[0].endswith("decoder: own keeps them")
    assert not [name for name in laid_out.tensors if name.startswith("visual.")]
    assert laid_out.tensors["model.layers.0.self_attn.q_proj.qweight"].dtype == "I32"


@pytest.mark.parametrize(("build", "decoder"), [(build_qwen3_vl, "builder"), (build_qwen3_vl, "own"), (build_qwen2_vl, "own")])
def test_every_part_is_the_checkpoints(build: Any, decoder: str, tmp_path: Path) -> None:
    source: Path = build(tmp_path / "source")
    differences = verified(source, exported(source, tmp_path / "artifact", decoder=decoder), decoder=decoder)
    assert differences.keys() == {"vision encoder", "embeddings", "decoder"}
    assert max(differences.values()) < 1e-4


def test_float16_is_for_gpus_and_is_verified_without_one(tmp_path: Path) -> None:
    artifact = exported(DEMO, tmp_path / "artifact", dtype="float16")
    session = read_json_object(artifact / "genai_config.json")["model"]["decoder"]["session_options"]
    assert session["provider_options"] == [{"cuda": {}}]
    assert {value.dtype for name, value in tensors(artifact / "model.onnx").items() if name.endswith("MatMul.weight")} == {
        np.dtype("f2")
    }
    assert max(verified(DEMO, artifact, dtype="float16").values()) < 0.02


def test_a_changed_part_is_found_and_named(demo: Path, tmp_path: Path) -> None:
    spoilt = tmp_path / "spoilt"
    spoilt.mkdir()
    for path in demo.iterdir():
        (spoilt / path.name).write_bytes(path.read_bytes())
    data = np.fromfile(spoilt / "model.onnx.data", np.float32)
    data[len(data) // 2 :] *= 1.05
    data.tofile(spoilt / "model.onnx.data")
    with pytest.raises(VerificationError, match=r"model\.onnx: the decoder differs from the checkpoint's"):
        verified(DEMO, spoilt)


def test_a_builder_that_fails_is_told_with_its_own_words(tmp_path: Path) -> None:
    source = build_qwen2_5_vl(tmp_path / "source", layers=1)
    config = read_json_object(source / "config.json")
    write_json(source / "config.json", config | {"architectures": ["Qwen2_5_VLForAnythingElse"]})
    with pytest.raises(CheckpointError, match=r"model builder failed on it; set decoder: own.*\n.*(not currently supported)"):
        exported(source, tmp_path / "artifact")


@pytest.mark.parametrize(
    ("script", "error", "words"),
    [
        ("kill -9 $$", ServerError, r"model builder was killed; .* Set decoder: own, which does not\.\n(?s:.*)\(SIGKILL\)"),
        (
            "echo 'OSError: [Errno 28] No space left on device' >&2; exit 1",
            StoreError,
            "the disk is full; free space, and run again",
        ),
    ],
)
def test_how_a_builder_was_ended_is_told(
    script: str, error: type[Exception], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the place of the environment's Python stands a program that ends as the builder does on a machine that is too small."""
    folder = tmp_path / require("onnxruntime-genai").python.parents[1].name
    (folder / "bin").mkdir(parents=True)
    (folder / "compress-environment.json").write_text("{}")
    (folder / "bin" / "python").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "bin" / "python").chmod(0o755)
    monkeypatch.setenv("COMPRESS_RUNTIMES", str(tmp_path))
    source = build_qwen2_5_vl(tmp_path / "source", layers=1)
    with pytest.raises(error, match=words):
        exported(source, tmp_path / "artifact")


def test_a_missing_environment_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPRESS_RUNTIMES", str(tmp_path / "none"))
    with pytest.raises(MissingError, match="run `compress runtime install onnxruntime-genai`"):
        exported(DEMO, tmp_path / "artifact")
    with pytest.raises(MissingError, match="run `compress runtime install onnxruntime-genai`"):
        onnx_genai().verification_versions()


def test_a_processor_that_it_has_no_operation_for_is_told(tmp_path: Path) -> None:
    source = build_qwen2_vl(tmp_path / "source", layers=1)
    processor = read_json_object(source / "processor_config.json")
    write_json(
        source / "processor_config.json", processor | {"image_processor": processor["image_processor"] | {"do_normalize": False}}
    )
    with pytest.raises(CheckpointError, match="do_normalize is false, and onnxruntime-genai always does it; use format: onnx"):
        exported(source, tmp_path / "artifact", decoder="own")


def test_the_size_is_predicted(demo: Path) -> None:
    checkpoint = open_checkpoint(DEMO)
    predicted = onnx_genai().predict_bytes(planned(checkpoint, family_of(checkpoint.config), {}))
    written = sum(path.stat().st_size for path in demo.iterdir() if "data" in path.suffix)
    assert abs(written - predicted) < 0.05 * written
