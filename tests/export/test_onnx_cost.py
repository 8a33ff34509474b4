"""What the plan says that floats cost in an ONNX artifact, beside what the settings it names save."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import pytest

from compress.checkpoints.checkpoint import open_checkpoint
from compress.checkpoints.spec import CheckpointSpec, spec_of
from compress.export.onnx.format import Onnx
from compress.families.resolve import family_at
from compress.numerics.scheme import Scheme
from compress.report.figures import size
from tests.quantized import round_checkpoint, scheme
from tests.specs import planned
from tests.tiny import build_clip, build_qwen2_5_vl


def spec(folder: Path) -> CheckpointSpec:
    return spec_of(open_checkpoint(folder), family_at(folder))


def onnx(**settings: object) -> Onnx:
    return Onnx.model_validate({"format": "onnx", **settings})


def chosen(how: Scheme, name: str) -> Scheme | None:
    return how if "blocks" in name else None


def saved(note: str) -> list[str]:
    return re.findall(r"saves ([\d.]+ \w+)", note)


@pytest.mark.parametrize("tied", [True, False])
def test_the_plan_says_what_floats_cost_and_what_each_setting_saves(tied: bool, tmp_path: Path) -> None:
    source = build_qwen2_5_vl(tmp_path / "source", layers=1, tied=tied)
    tower = partial(chosen, scheme(8, -1, True))
    decoder = round_checkpoint(source, tmp_path / "decoder", scheme(4, 32))
    everything = round_checkpoint(source, tmp_path / "both", scheme(4, 32), vision=tower)
    checkpoint, family, ends = open_checkpoint(source), family_at(source), {"head_bits": 8, "embedding_bits": 8}
    plain, both = planned(checkpoint, family, decoder), planned(checkpoint, family, everything)
    total = onnx().predict_bytes(plain)
    others = (onnx(**ends).predict_bytes(plain), onnx().predict_bytes(both), onnx(dtype="float16").predict_bytes(plain))
    (note,) = onnx().notes(plain, checkpoint.weight_bytes)
    assert saved(note) == [size(total - other) for other in others]
    assert note.startswith(
        f"onnx: about {size(total)} of weights, {total / checkpoint.weight_bytes:.2f} times the original's: what"
    )
    (written,) = onnx().notes(spec(tmp_path / "decoder"))
    assert saved(written) == saved(note)
    assert "the original's" not in written
    (note,) = onnx(**ends).notes(plain)
    assert "head_bits" not in note
    (note,) = onnx(dtype="float16").notes(both)
    assert "component: vision" not in note
    assert "dtype" not in note


def test_what_is_not_quantized_at_all_has_no_note(tmp_path: Path) -> None:
    assert onnx().notes(spec(build_qwen2_5_vl(tmp_path, layers=1))) == []


def test_a_model_without_a_head_is_told_of_its_embeddings(tmp_path: Path) -> None:
    round_checkpoint(build_clip(tmp_path / "source"), tmp_path / "rounded", scheme(4, 32))
    (note,) = onnx().notes(spec(tmp_path / "rounded"))
    assert "embeddings in 8 bits (embedding_bits: 8) saves" in note
    assert "head_bits" not in note
