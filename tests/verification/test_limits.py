import re
from dataclasses import replace
from pathlib import Path

import pytest

from compress.checkpoints.checkpoint import open_checkpoint
from compress.families.resolve import family_at
from compress.numerics.scheme import Scheme
from compress.verification.limits import AGREEMENT, COMPONENTS, LIKELIHOODS, DifferenceLimits, ExportPrecision, limits_of
from tests.quantized import round_checkpoint
from tests.tiny import build_clip, build_mllama, build_qwen2_5_vl

PAGE = (Path(__file__).parent.parent.parent / "docs" / "verification.md").read_text(encoding="utf-8")
FOUR = Scheme(4, 32, symmetric=False)
EIGHT = Scheme(8, -1, symmetric=True, activations="token")


def limits(folder: Path, settings: ExportPrecision) -> DifferenceLimits:
    return limits_of(settings, open_checkpoint(folder), family_at(folder))


def test_the_page_has_the_tables() -> None:
    rows = re.findall(r"^\| ([a-z0-9 ]+) \| ([0-9.]+) \| ([0-9.]+) \| ([0-9.]+) \|", PAGE, re.MULTILINE)
    documented = {name: tuple(map(float, values)) for name, *values in rows}
    assert documented == {name: (COMPONENTS[name], LIKELIHOODS[name], AGREEMENT[name]) for name in COMPONENTS}


def test_the_coarsest_rounding_that_reaches_a_part_decides(tmp_path: Path) -> None:
    plain = build_qwen2_5_vl(tmp_path / "model")
    limit = limits(plain, ExportPrecision("float32", accuracy_level=4))
    assert [limit.of(component) for component in ("vision encoder", "embeddings", "decoder")] == [1e-4, 1e-4, 1e-4]
    assert limit.roundings == ("float32",)
    assert (limit.likelihood, limit.agreement) == (0.001, 0.95)
    limit = limits(plain, ExportPrecision("float16", accuracy_level=0, head_bits=8, embedding_bits=8))
    assert [limit.of(component) for component in ("vision encoder", "embeddings", "decoder")] == [0.02, 0.02, 0.02]
    assert limit.roundings == ("float16", "embeddings in 8 bits", "head in 8 bits")
    assert (limit.likelihood, limit.agreement) == (0.1, 0.0)


def test_quantized_weights_alone_loosen_nothing_and_rounded_inputs_only_their_part(tmp_path: Path) -> None:
    plain = build_qwen2_5_vl(tmp_path / "model")
    round_checkpoint(plain, tmp_path / "four", FOUR)
    settings = ExportPrecision("float32", accuracy_level=4)
    limit = limits(tmp_path / "four", settings)
    assert [limit.of(component) for component in ("vision encoder", "embeddings", "decoder")] == [1e-4, 1e-4, 0.25]
    assert limit.of("decoder", exact=True) == 1e-4
    assert limits(tmp_path / "four", replace(settings, accuracy_level=0)).of("decoder") == 1e-4
    assert limits(tmp_path / "four", replace(settings, head_bits=4)).of("decoder", exact=True) == 0.25
    round_checkpoint(plain, tmp_path / "eight", EIGHT, vision=lambda name: EIGHT if ".mlp." in name else None)
    limit = limits(tmp_path / "eight", replace(settings, accuracy_level=0))
    assert [limit.of(component) for component in ("vision encoder", "embeddings", "decoder")] == [0.25, 1e-4, 0.25]
    assert limit.of("vision encoder", exact=True) == 1e-4


def test_what_reads_images_in_the_decoder_belongs_to_the_vision_encoder(tmp_path: Path) -> None:
    plain = build_mllama(tmp_path / "model")
    round_checkpoint(plain, tmp_path / "four", lambda name: FOUR if "cross_attn.k_proj" in name else None)
    limit = limits(tmp_path / "four", ExportPrecision("float32", accuracy_level=4))
    assert [limit.of(component) for component in ("vision encoder", "embeddings", "decoder")] == [0.25, 1e-4, 1e-4]


def test_encoders_round_words_and_patches_at_their_beginning(tmp_path: Path) -> None:
    limit = limits(build_clip(tmp_path / "model"), ExportPrecision("float32", embedding_bits=8))
    assert [limit.of(component) for component in ("image encoder", "text encoder")] == [0.03, 0.03]
    assert limit.roundings == ("float32", "words and patches in 8 bits")


@pytest.mark.parametrize("table", [LIKELIHOODS, AGREEMENT])
def test_every_rounding_has_its_limits(table: dict[str, float]) -> None:
    assert list(table) == list(COMPONENTS)
