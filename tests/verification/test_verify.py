import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from compress.errors import CheckpointError, VerificationError
from compress.export.format import VerifyContext
from compress.export.onnx.format import Onnx
from compress.families.resolve import family_at
from compress.numerics.scheme import Activations, Scheme
from compress.progress import Silent
from tests.quantized import round_checkpoint
from tests.tiny import build_clip, build_llava, build_qwen2_5_vl
from tests.verification.artifacts import export_onnx, spoil, verify


class Noted(Silent):
    """Keeps the warnings it is told."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, message: str) -> None:
        self.warnings.append(message)


ROUNDED = Scheme(bits=4, group_size=32, symmetric=False)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_qwen2_5_vl(tmp_path_factory.mktemp("source") / "model")


@pytest.fixture(scope="module")
def artifact(source: Path) -> tuple[Onnx, Path]:
    folder = source.parent / "onnx"
    return export_onnx(source, folder), folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[Onnx, Path, Path]:
    folder = tmp_path_factory.mktemp("clip")
    model = build_clip(folder / "model")
    return export_onnx(model, folder / "onnx"), folder / "onnx", model


def test_a_faithful_artifact_agrees_part_by_part_and_in_every_answer(source: Path, artifact: tuple[Onnx, Path]) -> None:
    verification = verify(*artifact, source)
    assert verification.roundings == ("float32",)
    assert [difference.component for difference in verification.components] == ["vision encoder", "embeddings", "decoder"]
    assert [difference.inputs for difference in verification.components] == [4, 5, 10]
    for difference in verification.components:
        assert difference.relative < 1e-5
        assert difference.limit == 1e-4
        assert difference.passed
    assert verification.answers is not None
    assert [(row.shown, row.prompts, row.same) for row in verification.answers.agreement] == [
        ("right image", 8, 8),
        ("wrong image", 8, 8),
        ("no image", 8, 8),
    ]
    assert verification.answers.likelihood < 1e-5
    assert verification.answers.seeing == 8
    assert verification.answers.ungrounded == 0
    assert verification.answers.changed_artifact == verification.answers.changed_checkpoint > 0


def test_a_vision_encoder_without_weights_is_named_first(source: Path, artifact: tuple[Onnx, Path], tmp_path: Path) -> None:
    export, folder = artifact
    broken = spoil(folder, tmp_path / "onnx", "vision_encoder", r"\.(weight|bias)", np.zeros_like)
    broken = spoil(broken, tmp_path / "both", "decoder_model_merged", r"layers\.1.*down_proj", np.zeros_like)
    with pytest.raises(VerificationError) as caught:
        verify(export, broken, source)
    message = str(caught.value)
    assert message.startswith(f"{broken / 'vision_encoder.onnx'}: the vision encoder differs from the checkpoint's: by ")
    assert "1 of its largest value (limit 0.0001; as it runs), for " in message
    assert " pixels; nothing of it is measured or published. Run again with --fresh" in message


def test_exchanged_positions_are_found_in_the_vision_encoder(tmp_path: Path) -> None:
    model = build_llava(tmp_path / "model")
    export = export_onnx(model, tmp_path / "onnx")
    broken = spoil(tmp_path / "onnx", tmp_path / "broken", "vision_encoder", r"position_embedding", lambda rows: rows[::-1])
    with pytest.raises(VerificationError, match=r"the vision encoder differs from the checkpoint's: by .* for .*an image"):
        verify(export, broken, model)


def test_one_exchanged_weight_of_the_decoder_is_found(source: Path, artifact: tuple[Onnx, Path], tmp_path: Path) -> None:
    export, folder = artifact
    broken = spoil(folder, tmp_path / "onnx", "decoder_model_merged", r"layers\.1\..*o_proj\.weight", lambda rows: rows[::-1])
    with pytest.raises(VerificationError, match=r"decoder_model_merged.onnx: the decoder differs .* in a batch of 3"):
        verify(export, broken, source)


def test_exchanged_embeddings_are_found_before_the_decoder(source: Path, artifact: tuple[Onnx, Path], tmp_path: Path) -> None:
    export, folder = artifact
    broken = spoil(folder, tmp_path / "onnx", "embed_tokens", r"embed_tokens", lambda rows: np.roll(rows, 1, 0))
    with pytest.raises(VerificationError, match=r"embed_tokens.onnx: the embeddings differ"):
        verify(export, broken, source)


def test_numbers_that_are_none_never_agree(source: Path, artifact: tuple[Onnx, Path], tmp_path: Path) -> None:
    export, folder = artifact

    def spread(rows: np.ndarray) -> np.ndarray:
        return np.full_like(rows, np.nan)

    broken = spoil(folder, tmp_path / "onnx", "decoder_model_merged", r"layers\.2\..*o_proj\.weight", spread)
    with pytest.raises(VerificationError, match=r"the decoder differs from the checkpoint's: by inf, inf of its largest value"):
        verify(export, broken, source)


def test_an_artifact_that_sees_every_image_alike_has_a_dead_vision_path(
    source: Path, artifact: tuple[Onnx, Path], tmp_path: Path
) -> None:
    """Its graphs are right, and its processor makes one grey of every image."""
    export, folder = artifact
    shutil.copytree(folder, tmp_path / "onnx")
    for name in ("processor_config.json", "preprocessor_config.json"):
        path = tmp_path / "onnx" / name
        config = json.loads(path.read_text(encoding="utf-8"))
        config.get("image_processor", config)["image_std"] = [1e9] * 3
        path.write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(VerificationError, match=r"not grounded in its images: for 8 of 8 prompts another image changes"):
        verify(export, tmp_path / "onnx", source)


def test_one_wrong_code_does_not_hide_behind_what_the_runtime_rounds(source: Path, tmp_path: Path) -> None:
    round_checkpoint(source, tmp_path / "rounded", ROUNDED)
    export = export_onnx(tmp_path / "rounded", tmp_path / "onnx")
    verification = verify(export, tmp_path / "onnx", tmp_path / "rounded")
    assert verification.roundings == ("float32", "inputs in blocks")
    exact, as_it_runs = [difference for difference in verification.components if difference.component == "decoder"]
    assert (exact.computed, exact.limit) == ("inputs not rounded", 1e-4)
    assert exact.relative < 1e-5
    assert (as_it_runs.computed, as_it_runs.limit) == ("as it runs", 0.25)
    assert 1e-3 < as_it_runs.relative < 0.1
    assert exact.inputs < as_it_runs.inputs  # a step with the cache is compared as it runs

    def wrong(codes: np.ndarray) -> np.ndarray:
        codes[3, 0, 5] ^= 0x0F
        return codes

    broken = spoil(tmp_path / "onnx", tmp_path / "broken", "decoder_model_merged", r"layers\.1\..*down_proj\.codes", wrong)
    with pytest.raises(VerificationError, match=r"the decoder differs .*\(limit 0.0001; inputs not rounded\)"):
        verify(export, broken, tmp_path / "rounded")


@pytest.mark.parametrize("activations", ["token", "tensor"])
def test_what_the_checkpoint_rounds_too_is_compared_without_it_first(
    source: Path, tmp_path: Path, activations: Activations
) -> None:
    w8a8 = Scheme(8, -1, symmetric=True, activations=activations)
    round_checkpoint(source, tmp_path / "rounded", w8a8, vision=lambda name: w8a8 if ".mlp." in name else None)
    export = export_onnx(tmp_path / "rounded", tmp_path / "onnx")
    verification = verify(export, tmp_path / "onnx", tmp_path / "rounded")
    assert verification.roundings == ("float32", "inputs to 8 bits")
    assert [difference.component for difference in verification.components] == [
        *["vision encoder"] * 2,
        "embeddings",
        *["decoder"] * 2,
    ]
    for difference in verification.components:
        assert difference.relative < (
            1e-5 if difference.computed == "inputs not rounded" or difference.component == "embeddings" else 0.1
        )

    def wrong(codes: np.ndarray) -> np.ndarray:
        codes[7, 3] ^= 20
        return codes

    broken = spoil(tmp_path / "onnx", tmp_path / "broken", "decoder_model_merged", r"layers\.1\..*down_proj\.codes", wrong)
    with pytest.raises(VerificationError, match=r"the decoder differs .*\(limit 0.0001; inputs not rounded\)"):
        verify(export, broken, tmp_path / "rounded")


def test_the_two_towers_of_clip_are_compared_and_what_they_find_nearest(clip: tuple[Onnx, Path, Path]) -> None:
    verification = verify(*clip)
    assert [difference.component for difference in verification.components] == ["image encoder", "text encoder"]
    assert all(difference.relative < 1e-5 for difference in verification.components)
    assert verification.answers is not None
    assert [(row.shown, row.same) for row in verification.answers.agreement] == [("right image", 8), ("wrong image", 8)]
    assert verification.answers.ungrounded == 0


def test_exchanged_weights_of_clip_are_found_in_their_tower(clip: tuple[Onnx, Path, Path], tmp_path: Path) -> None:
    export, folder, model = clip
    broken = spoil(folder, tmp_path / "onnx", "text_model", r"layers\.0\..*fc1\.weight", lambda rows: rows[::-1])
    with pytest.raises(VerificationError, match=r"text_model.onnx: the text encoder differs .* for the text '"):
        verify(export, broken, model)


def test_a_prompt_that_is_too_long_for_the_model_is_left_out_with_a_warning(tmp_path: Path) -> None:
    model = build_qwen2_5_vl(tmp_path / "model", context=100, layers=1)
    export = export_onnx(model, tmp_path / "onnx")
    progress = Noted()
    verification = export.verify(VerifyContext(tmp_path / "onnx", model, family_at(model), progress, tmp_path / "logs"))
    assert [difference.inputs for difference in verification.components] == [2, 3, 6]
    assert [warning.split(" left out: ")[0] for warning in progress.warnings] == [
        "verification: images of 97×61 and 252×140 pixels",
        "verification: an image of 252×140 pixels",
    ]
    assert "takes 104 tokens with 3 for its answer, and the model takes 100" in progress.warnings[0]


def test_a_graph_that_is_missing_is_named(source: Path, artifact: tuple[Onnx, Path], tmp_path: Path) -> None:
    export, folder = artifact
    shutil.copytree(folder, tmp_path / "onnx")
    (tmp_path / "onnx" / "embed_tokens.onnx").unlink()
    with pytest.raises(CheckpointError, match=r"embed_tokens.onnx: missing; export it again"):
        verify(export, tmp_path / "onnx", source)
