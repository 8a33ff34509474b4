"""The time of each part of real tiny models, of every kind of family: which parts there are, not how long they take."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from compress.data.prompts import Prompt
from compress.errors import DataError
from compress.eval.latency.load_generator import make_prompts
from compress.eval.latency.settings import LoadPoint
from compress.progress import Silent
from compress.runtimes.runtime import OpenContext
from compress.runtimes.transformers.runtime import Transformers
from tests.tiny import (
    build_blip2,
    build_clip,
    build_internvl,
    build_llava,
    build_llava_next,
    build_mllama,
    build_qwen2_vl,
    build_qwen3_vl,
)

DEMO = Path(__file__).parents[2] / "recipes" / "demo" / "model"
BUILDERS: dict[str, Callable[..., Path]] = {
    "blip-2": build_blip2,
    "clip": build_clip,
    "internvl": build_internvl,
    "llava": build_llava,
    "llava-next": build_llava_next,
    "mllama": build_mllama,
    "qwen2-vl": build_qwen2_vl,
    "qwen3-vl": build_qwen3_vl,
}
ALL = ["vision", "projector", "prefill", "decode"]


def _parts(artifact: Path, images: int, text: str | None = None) -> list[str]:
    point = LoadPoint(concurrency=1, images=images, width=56, height=56, prompt_tokens=4, output_tokens=4)
    (prompt,) = make_prompts(artifact, point, 1, 0)
    if text is not None:
        prompt = Prompt(prompt.id, text, prompt.images)
    runtime = Transformers(runtime="transformers", device="cpu")
    table = runtime.time_components(OpenContext.at(artifact, artifact, Silent()), point, prompt, 2)
    assert (table.device, table.dtype, table.point) == ("cpu", "float32", point)
    assert all(part.repeats == 2 and 0 < part.least_ms <= part.median_ms for part in table.components)
    assert table.sequence_tokens > 0
    return [part.component for part in table.components]


def test_every_part_of_the_demo_is_timed() -> None:
    assert _parts(DEMO, 1) == ALL


def test_prompt_without_an_image_has_no_vision() -> None:
    assert _parts(DEMO, 0) == ["prefill", "decode"]


@pytest.mark.parametrize("family", sorted(BUILDERS))
def test_every_family_has_its_parts(family: str, tmp_path: Path) -> None:
    artifact = BUILDERS[family](tmp_path / "model")
    assert _parts(artifact, 1, "what is it") == (["vision", "projector"] if family == "clip" else ALL)


def test_prompt_that_is_too_long_is_named() -> None:
    with pytest.raises(DataError, match="the parts of the model cannot be timed: load-0: takes"):
        _parts(DEMO, 0, "word " * 5000)
