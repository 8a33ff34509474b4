import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import psutil
import pyarrow.parquet as parquet
import pytest
from PIL import Image

from compress.checkpoints.checkpoint import open_checkpoint, read_json_object
from compress.data.prompts import Prompt
from compress.errors import CheckpointError, MissingError, ServerError, UsageError
from compress.export.format import ExportContext
from compress.export.onnx.format import Onnx
from compress.export.onnx_genai.format import OnnxGenai
from compress.families.resolve import family_of
from compress.files import write_json
from compress.progress import Silent
from compress.runtimes.onnxruntime.runtime import Onnxruntime
from compress.runtimes.onnxruntime_genai.runtime import OnnxruntimeGenai
from compress.runtimes.runtime import Answer, Embeds, Generates, OpenContext, Passage, Runtime, Score, Scores, capable
from compress.runtimes.transformers.runtime import Transformers
from tests.quantized import round_checkpoint, scheme
from tests.tiny import build_qwen2_vl, build_qwen3_vl

PRELOADED = ("onnxruntime-genai",)

PARQUET: Any = parquet
SILENT = Silent()
DEMO = Path(__file__).parents[2] / "recipes" / "demo"
NEW_TOKENS = 12


def in_process() -> Transformers:
    return Transformers(runtime="transformers", device="cpu", dtype="float32")


def in_genai(**fields: Any) -> OnnxruntimeGenai:
    return OnnxruntimeGenai.model_validate({"runtime": "onnxruntime-genai", **fields})


def opened(artifact: Path, runtime: Runtime, logs: Path) -> Any:
    return runtime.open(OpenContext.at(artifact, logs, SILENT))


def exported(source: Path, target: Path, **settings: Any) -> Path:
    family = family_of(open_checkpoint(source).config)
    target.mkdir()
    export = OnnxGenai.model_validate({"format": "onnx-genai", **settings})
    export.apply(ExportContext(source, target, family, SILENT))
    return target


def resized(image: bytes, width: int, height: int) -> bytes:
    found = io.BytesIO()
    Image.open(io.BytesIO(image)).convert("RGB").resize((width, height)).save(found, "PNG")
    return found.getvalue()


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    """Questions of the demo's test set, then one with images of several sizes, ones that do not divide a window, and none."""
    rows = PARQUET.read_table(DEMO / "test.parquet").slice(0, 12).to_pylist()
    own = [Prompt(f"demo{place}", row["question"], (picture_of(row),)) for place, row in enumerate(rows)]
    pictures = [prompt.images[0] for prompt in own]
    small, wide, large = resized(pictures[1], 56, 84), resized(pictures[2], 196, 84), resized(pictures[3], 168, 224)
    return [
        *own,
        Prompt("small-first", own[0].text, (small, large, wide)),
        Prompt("large-first", own[1].text, (large, small)),
        Prompt("alike", own[2].text, (pictures[4], pictures[5])),
        Prompt("stretched", own[3].text, (resized(pictures[6], 331, 118),)),
        Prompt("wide", own[4].text, (wide,)),
        Prompt("blank", own[5].text),
    ]


def picture_of(row: dict[str, Any]) -> bytes:
    found = row.get("image") or row["images"]
    found = cast("list[Any]", found)[0] if isinstance(found, list) else found
    return cast("dict[str, bytes]", found)["bytes"] if isinstance(found, dict) else cast("bytes", found)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(DEMO / "model", tmp_path_factory.mktemp("demo") / "artifact")


@pytest.fixture(scope="module")
def expected(prompts: list[Prompt], tmp_path_factory: pytest.TempPathFactory) -> list[Answer]:
    with opened(DEMO / "model", in_process(), tmp_path_factory.mktemp("logs")) as session:
        return session.answer(prompts, NEW_TOKENS, SILENT)


def compare(
    source: Path, artifact: Path, prompts: Sequence[Prompt], folder: Path, within: float
) -> tuple[list[Answer], list[Answer]]:
    """Return the answers of transformers and of onnxruntime-genai; what the former says must be as likely in both."""
    with opened(source, in_process(), folder) as session:
        theirs: list[Answer] = session.answer(prompts, NEW_TOKENS, SILENT)
        passages = [Passage(answer.id, answer.token_ids, prompt) for answer, prompt in zip(theirs, prompts, strict=True)]
        likely: list[Score] = session.score(passages, None, None, SILENT)
    with opened(artifact, in_genai(), folder) as session:
        ours: list[Answer] = session.answer(prompts, NEW_TOKENS, SILENT)
        found: list[Score] = session.score(passages, None, None, SILENT)
    for their, our in zip(likely, found, strict=True):
        assert our.fault is None
        np.testing.assert_allclose(our.negative_log_likelihood, their.negative_log_likelihood, atol=within)
    return theirs, ours


def test_answers_are_those_of_the_checkpoint(demo: Path, prompts: list[Prompt], expected: list[Answer], tmp_path: Path) -> None:
    told: list[Answer] = []
    with opened(demo, in_genai(), tmp_path) as session:
        assert isinstance(session, Generates) and isinstance(session, Scores) and not isinstance(session, Embeds)
        found: list[Answer] = session.answer(prompts, NEW_TOKENS, SILENT, told.append)
    assert found == expected == told
    assert len({answer.text for answer in found}) > 5


def test_our_own_runner_says_the_same(demo: Path, prompts: list[Prompt], tmp_path: Path) -> None:
    source, graphs = DEMO / "model", tmp_path / "graphs"
    graphs.mkdir()
    Onnx(format="onnx").apply(ExportContext(source, graphs, family_of(open_checkpoint(source).config), SILENT))
    with opened(graphs, Onnxruntime(runtime="onnxruntime", providers=("cpu",)), tmp_path) as session:
        ours: list[Answer] = session.answer(prompts, NEW_TOKENS, SILENT)
    with opened(demo, in_genai(), tmp_path) as session:
        assert session.answer(prompts, NEW_TOKENS, SILENT) == ours


def test_4_bits_of_a_stage_answer_as_the_quantized_checkpoint(prompts: list[Prompt], tmp_path: Path) -> None:
    round_checkpoint(DEMO / "model", tmp_path / "rounded", scheme(4, 32), vision=lambda name: scheme(8, 32, True))
    artifact = exported(tmp_path / "rounded", tmp_path / "artifact", accuracy_level=0, decoder="own")
    theirs, ours = compare(tmp_path / "rounded", artifact, prompts, tmp_path, 0.002)
    assert ours == theirs


def test_features_from_within_the_tower_reach_the_decoder(prompts: list[Prompt], tmp_path: Path) -> None:
    source = build_qwen3_vl(tmp_path / "source")
    theirs, ours = compare(source, exported(source, tmp_path / "artifact", decoder="own"), prompts[-6:], tmp_path, 0.002)
    assert ours == theirs


def test_qwen2_vl_runs_with_the_decoder_of_this_package(prompts: list[Prompt], tmp_path: Path) -> None:
    source = build_qwen2_vl(tmp_path / "source", tied=True)
    theirs, ours = compare(source, exported(source, tmp_path / "artifact", decoder="own"), prompts[-6:], tmp_path, 0.002)
    assert ours == theirs


def test_the_original_is_exported_to_be_measured(prompts: list[Prompt], expected: list[Answer], tmp_path: Path) -> None:
    with opened(DEMO / "model", in_genai(), tmp_path) as session:
        assert session.answer(prompts[:3], NEW_TOKENS, SILENT) == expected[:3]
    source = build_qwen2_vl(tmp_path / "qwen2", layers=1)  # which the builder does not know
    with opened(source, in_process(), tmp_path) as session:
        theirs = session.answer(prompts[:3], NEW_TOKENS, SILENT)
    with opened(source, in_genai(), tmp_path) as session:
        assert session.answer(prompts[:3], NEW_TOKENS, SILENT) == theirs


def test_scores_are_compared_with_the_original(demo: Path, prompts: list[Prompt], expected: list[Answer], tmp_path: Path) -> None:
    passages = [
        *(Passage(answer.id, answer.token_ids, prompt) for answer, prompt in zip(expected, prompts, strict=True)),
        Passage("text", tuple(range(40, 90))),
        Passage("nothing", (), prompts[0]),
        Passage("alone", (7,)),
        Passage("long", (7,) * 3000),
    ]
    with opened(DEMO / "model", in_process(), tmp_path) as session:
        theirs: list[Score] = session.score(passages[:-1], None, None, SILENT)
    with opened(demo, in_genai(), tmp_path) as session:
        session.score(passages, tmp_path / "record", None, SILENT)
        found: list[Score] = session.score(passages, None, tmp_path / "record", SILENT)
        with pytest.raises(UsageError, match="recorded on other passages"):
            session.score(passages[:3], None, tmp_path / "record", SILENT)
    for their, our in zip(theirs, found, strict=False):
        assert our.kl is not None and our.same_top is not None
        np.testing.assert_allclose(our.negative_log_likelihood, their.negative_log_likelihood, atol=1e-3)
        np.testing.assert_allclose(our.kl, 0, atol=1e-9)
        assert our.same_top.all()
    assert [len(score.negative_log_likelihood) for score in found[-4:]] == [49, 0, 0, 0]
    assert found[-1].fault is not None
    assert "takes 0 tokens with 3000 more, and the model takes 2048" in found[-1].fault


def test_a_prompt_that_cannot_be_asked_is_a_fault_of_its_own(
    demo: Path, prompts: list[Prompt], expected: list[Answer], tmp_path: Path
) -> None:
    asked = [
        Prompt("damaged", "What is it?", (prompts[0].images[0][:40],)),
        prompts[0],
        Prompt("long", "word " * 3000),
        Prompt("marked", "Is <|vision_start|> a token?"),
        prompts[1],
    ]
    with opened(demo, in_genai(), tmp_path) as session:
        found: list[Answer] = session.answer(asked, NEW_TOKENS, SILENT)
        assert not list(session._image_folder.iterdir())
    assert [found[1], found[4]] == expected[:2]
    faults = [found[place].fault or "" for place in (0, 2, 3)]
    assert faults[0].startswith("damaged: image 0: cannot be read as an image")
    assert "long: takes" in faults[1]
    assert "and the model takes 2048" in faults[1]
    assert faults[2] == "marked: Prompt contained 1 vision_start tokens but received 0 images."
    assert [found[place].text for place in (0, 2, 3)] == ["", "", ""]


def test_no_answer_holds_an_image_token(demo: Path, prompts: list[Prompt], tmp_path: Path) -> None:
    with opened(demo, in_genai(), tmp_path) as session:
        first: Answer = session.answer(prompts[:1], NEW_TOKENS, SILENT)[0]
        object.__setattr__(session._encoder.tokens, "placeholders", (first.token_ids[0],))
        second: Answer = session.answer(prompts[:1], NEW_TOKENS, SILENT)[0]
    assert first.token_ids[0] not in second.token_ids
    assert second.token_ids


def test_the_process_ends_with_the_session(demo: Path, prompts: list[Prompt], tmp_path: Path) -> None:
    with opened(demo, in_genai(), tmp_path) as session:
        server = session._worker._server
        folder: Path = session._image_folder.parent
        assert server.process.poll() is None
    assert server.process.poll() is not None
    assert not folder.exists()
    with opened(demo, in_genai(), tmp_path) as session:
        session._worker._server.process.stdin.close()
        session._worker._server.process.wait()
        with pytest.raises(ServerError, match=r"onnxruntime-genai ended; the machine may have run out of memory"):
            session.answer(prompts[:1], NEW_TOKENS, SILENT)


def test_a_process_that_does_not_answer_is_given_up(
    demo: Path, prompts: list[Prompt], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is stopped: it cannot answer, however fast the machine is."""
    monkeypatch.delenv("COMPRESS_RUNTIMES")  # the worker itself is to be stopped
    with opened(demo, in_genai(), tmp_path) as session:
        (worker,) = psutil.Process(session._worker._server.process.pid).children()
        session._worker._seconds = 0.1
        worker.suspend()
        try:
            with pytest.raises(ServerError, match=r"did not answer within 0\.1 seconds; raise request_seconds"):
                session.answer(prompts[:1], NEW_TOKENS, SILENT)
        finally:
            worker.resume()


def test_a_damaged_folder_is_told(demo: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for path in demo.iterdir():
        (damaged / path.name).write_bytes(path.read_bytes())

    def refused(words: str) -> None:
        with pytest.raises(CheckpointError, match=words), opened(damaged, in_genai(), tmp_path):
            pass

    whole = (demo / "model.onnx").read_bytes()
    (damaged / "model.onnx").write_bytes(whole[:5000])
    refused(r"damaged/model\.onnx: truncated, or no ONNX file .*; export it again")
    (damaged / "model.onnx").write_bytes(whole)
    (damaged / "model.onnx.data").unlink()
    refused(r"damaged/model\.onnx: its data file model\.onnx\.data is missing; put it beside the graph")
    (damaged / "model.onnx.data").write_bytes((demo / "model.onnx.data").read_bytes())
    config = read_json_object(demo / "genai_config.json")
    write_json(damaged / "genai_config.json", config | {"model": config["model"] | {"type": "llava"}})
    refused(r"damaged: onnxruntime-genai cannot load it \(Unsupported model_type in config\.json: llava\); export it again")


def test_what_it_does_not_offer_is_told(demo: Path, tmp_path: Path) -> None:
    assert Embeds not in OnnxruntimeGenai.offers
    with opened(demo, in_genai(), tmp_path) as session, pytest.raises(UsageError, match="does not offer"):
        capable(session, Embeds)


def test_a_missing_environment_is_told(demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPRESS_RUNTIMES", str(tmp_path / "none"))
    with pytest.raises(MissingError, match="run `compress runtime install onnxruntime-genai`"):
        in_genai().versions()
    with pytest.raises(MissingError, match="run `compress runtime install onnxruntime-genai`"), opened(demo, in_genai(), tmp_path):
        pass
