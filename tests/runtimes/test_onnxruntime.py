import os
import shutil
import subprocess
import sys
from collections.abc import Generator, Sequence
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pyarrow.parquet as parquet
import pytest
import safetensors.torch
from onnx import TensorProto, helper

from compress.checkpoints.checkpoint import open_checkpoint, read_json_object
from compress.data.prompts import Prompt
from compress.errors import CheckpointError, MissingError, StoreError, UsageError
from compress.eval.full_vocabulary import kl_divergence
from compress.export.format import ExportContext
from compress.export.onnx.format import Onnx
from compress.export.onnx.graphs import GRAPHS
from compress.families.qwen2_5_vl import QWEN2_5_VL
from compress.families.resolve import family_at
from compress.files import write_json
from compress.numerics.scheme import Scheme
from compress.progress import Silent
from compress.runtimes.onnxruntime import runtime as row
from compress.runtimes.onnxruntime.graph import Engine, GraphSession
from compress.runtimes.onnxruntime.runtime import Onnxruntime
from compress.runtimes.runtime import (
    UNSCORED,
    Answer,
    Embeds,
    FullVocabularySession,
    Generates,
    ImageInput,
    OpenContext,
    Passage,
    Runtime,
    Score,
    Scores,
)
from compress.runtimes.transformers.runtime import Transformers
from tests.quantized import round_checkpoint
from tests.tiny import BUILDERS, build_blip2, build_clip, build_qwen2_5_vl, picture, writes

FILES: Any = safetensors.torch
PARQUET: Any = parquet
SILENT = Silent()
NEW_TOKENS = 6
WRITING = [name for name in GRAPHS if writes(name)]
DEMO = Path(__file__).parents[2] / "recipes" / "demo"


def in_onnxruntime(**fields: Any) -> Onnxruntime:
    return Onnxruntime.model_validate({"runtime": "onnxruntime", "threads": 1, "providers": ["cpu"], **fields})


def in_process() -> Transformers:
    return Transformers(runtime="transformers", device="cpu", dtype="float32")


def opened(artifact: Path, runtime: Runtime | None = None) -> Any:
    return (runtime or in_onnxruntime()).open(OpenContext.at(artifact, artifact.parent / "logs", SILENT))


def answers(artifact: Path, prompts: Sequence[Prompt], runtime: Runtime | None = None) -> list[Answer]:
    with opened(artifact, runtime) as session:
        return session.answer(prompts, NEW_TOKENS, SILENT)


def export(source: Path, target: Path) -> Path:
    target.mkdir()
    fields = {"format": "onnx", "dtype": "float32"}
    Onnx.model_validate(fields).apply(ExportContext(source, target, family_at(source), SILENT))
    return target


def asked(*, single: bool = False) -> list[Prompt]:
    """Prompts of several lengths: one image of a size that does not divide a window, none, and two of different sizes."""
    prompts = [
        Prompt("one", "What colour is it?", (picture(0),)),
        Prompt("wide", "How many circles are there in the picture, and where are they?", (picture(1, 140, 84),)),
        Prompt("small", "Yes?", (picture(2, 56, 56),)),
        Prompt("none", "What colour is the sky on a clear day?"),
        Prompt("short", "Well?"),
    ]
    two = (picture(1, 140, 84), picture(3, 56, 28))
    return prompts if single else [*prompts, Prompt("two", "Which?", two), Prompt("swapped", "Which is larger?", two[::-1])]


def passages_of(prompts: Sequence[Prompt], answers: Sequence[Answer]) -> list[Passage]:
    """What was said after each prompt, and tokens that hardly anyone says; and texts of several lengths, down to one token."""
    forced = [Passage(prompt.id, (*answer.token_ids, 5, 17, 33), prompt) for prompt, answer in zip(prompts, answers, strict=True)]
    return [*forced, Passage("long", tuple(range(3, 30))), Passage("short", (3, 9, 8)), Passage("single", (4,))]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_qwen2_5_vl(tmp_path_factory.mktemp("model") / "original")


@pytest.fixture(scope="module")
def artifact(original: Path) -> Path:
    return export(original, original.parent / "artifact")


@pytest.fixture(scope="module")
def session(artifact: Path) -> Generator[Any]:
    with opened(artifact) as session:
        yield session


@pytest.fixture(scope="module")
def said(session: Any) -> list[Answer]:
    return session.answer(asked(), NEW_TOKENS, SILENT)


@pytest.mark.parametrize("name", WRITING)
def test_answers_and_scores_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    """Of an original, whose graphs are gone as soon as they are loaded."""
    folder = BUILDERS[name](tmp_path / "model")
    prompts = asked(single=family_at(folder).single_image)
    with opened(folder, in_process()) as session:
        expected = session.answer(prompts, NEW_TOKENS, SILENT)
        passages = passages_of(prompts, expected)
        expected_scores = session.score(passages, None, None, SILENT)
    with opened(folder) as session:
        generated = session.answer(prompts, NEW_TOKENS, SILENT)
        likely = session.score(passages, None, None, SILENT)
        assert isinstance(session, Generates) and isinstance(session, Scores) and not isinstance(session, Embeds)
        assert list((tmp_path / "logs").iterdir()) == []
    assert generated == expected
    assert len({answer.token_ids for answer in generated}) > 2
    for actual, reference in zip(likely, expected_scores, strict=True):
        np.testing.assert_allclose(actual.negative_log_likelihood, reference.negative_log_likelihood, atol=1e-4)


@pytest.fixture(scope="module")
def questions() -> list[Prompt]:
    """A hundred of the demo's questions about images."""
    rows = PARQUET.read_table(DEMO / "test.parquet").slice(0, 100).to_pylist()
    return [Prompt(row["id"], row["question"], (row["image"]["bytes"],)) for row in rows]


def test_the_demo_model_says_the_same_to_a_hundred_questions(questions: list[Prompt], tmp_path: Path) -> None:
    by_runtime: list[list[Answer]] = []
    for runtime in (in_process(), in_onnxruntime()):
        with runtime.open(OpenContext.at(DEMO / "model", tmp_path, SILENT)) as session:
            by_runtime.append(session.answer(questions, 16, SILENT))
    assert by_runtime[0] == by_runtime[1]
    assert len({answer.text for answer in by_runtime[0]}) > 5


def test_in_four_bits_the_demo_model_says_what_its_checkpoint_says(questions: list[Prompt], tmp_path: Path) -> None:
    """With inputs as they are and rounded in blocks, as the kernels for CPUs do it unless told otherwise."""
    quantized = tmp_path / "quantized"
    round_checkpoint(DEMO / "model", quantized, Scheme(4, 64, symmetric=False))
    with opened(quantized, in_process()) as session:
        expected = session.answer(questions, 16, SILENT)
    for level in (0, 4):
        target = tmp_path / f"level-{level}"
        target.mkdir()
        settings = Onnx.model_validate({"format": "onnx", "accuracy_level": level})
        settings.apply(ExportContext(quantized, target, family_at(quantized), SILENT))
        with opened(target) as session:
            generated = session.answer(questions, 16, SILENT)
        assert sum(actual.token_ids == reference.token_ids for actual, reference in zip(generated, expected, strict=True)) >= 99


def test_the_batch_does_not_change_answers(artifact: Path, said: list[Answer]) -> None:
    assert answers(artifact, asked(), in_onnxruntime(tokens_per_batch=1)) == said
    assert answers(artifact, asked()[::-1], in_onnxruntime(tokens_per_batch=200)) == said[::-1]


def test_an_answer_ends_before_the_first_stop_token(artifact: Path, said: list[Answer], tmp_path: Path) -> None:
    """Rows of one batch end at different places, and those that go on are not changed by it."""
    stop = said[0].token_ids[2]
    folder = Path(shutil.copytree(artifact, tmp_path / "artifact"))
    config = read_json_object(folder / "generation_config.json")
    write_json(folder / "generation_config.json", {**config, "eos_token_id": [stop]})
    for ended, full in zip(answers(folder, asked()), said, strict=True):
        first = full.token_ids.index(stop) if stop in full.token_ids else None
        assert ended.token_ids == full.token_ids[:first]


def test_an_answer_holds_no_image_token(original: Path, said: list[Answer], tmp_path: Path) -> None:
    """The model would say the image's token wherever it said the one that its row of the head is doubled from."""
    folder = Path(shutil.copytree(original, tmp_path / "model"))
    config = open_checkpoint(folder).config
    tensors = FILES.load_file(folder / "model.safetensors")
    head = next(tensor for name, tensor in tensors.items() if name.endswith("lm_head.weight"))
    head[config["image_token_id"]] = 2 * head[said[0].token_ids[0]]
    head[config["video_token_id"]] = 3 * head[said[0].token_ids[0]]
    FILES.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert answers(folder, asked()) == said


def test_half_precision_is_like_the_whole(session: Any, said: list[Answer], original: Path, tmp_path: Path) -> None:
    """An original is exported in the type that is asked for."""
    passages = passages_of(asked(), said)
    session.score(passages, tmp_path / "record", None, SILENT)
    with opened(original, in_onnxruntime(dtype="float16")) as half:
        scores = half.score(passages, None, tmp_path / "record", SILENT)
    divergences = np.concatenate([score.kl for score in scores if score.kl is not None])
    assert 0 < divergences.mean() < 1e-3


def test_a_model_is_as_unlike_another_as_transformers_says(
    session: Any, said: list[Answer], original: Path, tmp_path: Path
) -> None:
    """And not unlike itself. With as many top tokens as there are, KL is that over the whole vocabulary."""
    other = build_qwen2_5_vl(tmp_path / "other", seed=7)
    full_vocabulary = in_onnxruntime(top_logprobs=int(open_checkpoint(original).text_config["vocab_size"]))
    passages = passages_of(asked(), said)
    session.score(passages, tmp_path / "few", None, SILENT)
    for score in session.score(passages, None, tmp_path / "few", SILENT):
        assert score.kl is not None and score.same_top is not None
        assert (score.kl == 0).all() and score.same_top.all()
    with opened(original, full_vocabulary) as complete:
        complete.score(passages, tmp_path / "all", None, SILENT)
    with opened(original, in_process()) as inside:
        inside.score(passages, tmp_path / "exact", None, SILENT)
    scores: dict[str, list[Score]] = {}
    for name, runtime in (("exact", in_process()), ("few", in_onnxruntime()), ("all", full_vocabulary)):
        with opened(other, runtime) as session:
            scores[name] = session.score(passages, None, tmp_path / name, SILENT)
    exact, few, every = ([score.kl for score in scores[name] if score.kl is not None] for name in ("exact", "few", "all"))
    np.testing.assert_allclose(np.concatenate(every), np.concatenate(exact), atol=1e-3)
    assert (np.concatenate(few) <= np.concatenate(exact) + 1e-3).all()
    assert np.concatenate(few).max() > 0.1
    for actual, reference in zip(scores["few"], scores["exact"], strict=True):
        np.testing.assert_array_equal(actual.same_top, reference.same_top)


def test_records_that_do_not_fit_are_refused(session: Any, tmp_path: Path) -> None:
    passages = [Passage("a", (1, 2, 3)), Passage("b", (4, 5))]
    session.score(passages, tmp_path / "record", None, SILENT)
    with pytest.raises(UsageError, match="was recorded on other passages than these"):
        session.score(passages[1:], None, tmp_path / "record", SILENT)
    content = read_json_object(tmp_path / "record" / "record.json")
    write_json(tmp_path / "record" / "record.json", {**content, "top": 5})
    with pytest.raises(UsageError, match="was recorded with top_logprobs 5, not 20"):
        session.score(passages, None, tmp_path / "record", SILENT)


def test_an_item_that_cannot_be_read_is_a_fault_of_its_own(session: Any, said: list[Answer], tmp_path: Path) -> None:
    broken, good, long = Prompt("broken", "What is this?", (b"no image",)), asked()[0], Prompt("long", "word " * 3000)
    passages = [Passage("p", (1, 2), broken), Passage("q", (1, 2), good)]
    heard: list[Answer] = []
    results = session.answer([broken, good, long], NEW_TOKENS, SILENT, heard.append)
    assert "broken: image 0: cannot be read as an image" in (results[0].fault or "")
    assert results[1] == said[0]
    assert "long: takes" in (results[2].fault or "") and "shorten its text or use smaller images" in (results[2].fault or "")
    assert sorted(answer.id for answer in heard) == ["broken", "long", "one"]
    for record, against in ((tmp_path / "record", None), (None, tmp_path / "record")):
        first, second = session.score(passages, record, against, SILENT)
        assert "broken: image 0" in (first.fault or "") and len(first.negative_log_likelihood) == 0
        assert second.fault is None and len(second.negative_log_likelihood) == 2
    assert second.kl is not None and (second.kl == 0).all()


def test_what_the_original_has_no_score_of_is_not_compared(session: Any, tmp_path: Path) -> None:
    """The original could not decode an image that the artifact can."""
    broken, good = Passage("p", (1, 2), Prompt("p", "?", (b"no image",))), Passage("q", (1, 2, 3))
    session.score([broken, good], tmp_path / "record", None, SILENT)
    mended = [Passage("p", (1, 2), asked()[0]), good]
    session.score(mended, tmp_path / "other", None, SILENT)
    content, other = (read_json_object(tmp_path / name / "record.json") for name in ("record", "other"))
    write_json(tmp_path / "record" / "record.json", {**content, "passages": other["passages"]})
    assert [score.fault for score in session.score(mended, None, tmp_path / "record", SILENT)] == [UNSCORED, None]


def test_more_images_than_the_model_takes_are_a_fault(tmp_path: Path) -> None:
    several = Prompt("several", "Which?", (picture(0), picture(1)))
    (answer,) = answers(build_blip2(tmp_path / "model"), [several])
    assert answer.fault == "several: has 2 images, and blip-2 takes one at a time; leave it out"


def test_pictures_and_texts_are_compared_as_transformers_does(tmp_path: Path) -> None:
    folder = build_clip(tmp_path / "model")
    pictures = [ImageInput(str(index), picture(index, 40 + 20 * index, 60)) for index in range(5)]
    classes = [["a red circle", "a picture of something red"], ["a blue square"], ["nothing"]]
    outputs: list[tuple[Any, Any]] = []
    for runtime in (in_process(), in_onnxruntime()):
        with opened(folder, runtime) as session:
            assert isinstance(session, Embeds) and not isinstance(session, Generates) and not isinstance(session, Scores)
            outputs.append((session.classify(pictures, classes, SILENT), session.embed(pictures, ["red", "a blue square"], SILENT)))
    (expected_likelihoods, expected), (likely, embedded) = outputs
    np.testing.assert_allclose(likely, expected_likelihoods, atol=1e-4)
    np.testing.assert_allclose(embedded.images, expected.images, atol=1e-5)
    np.testing.assert_allclose(embedded.texts, expected.texts, atol=1e-5)
    assert embedded.scale == pytest.approx(expected.scale)


def damaged(artifact: Path, folder: Path) -> Path:
    """Return a copy of an artifact's folder that may be spoilt."""
    return Path(shutil.copytree(artifact, folder))


def test_a_graph_that_is_missing_or_truncated_is_named(artifact: Path, tmp_path: Path) -> None:
    folder = damaged(artifact, tmp_path / "artifact")
    path = folder / "decoder_model_merged.onnx"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with (
        pytest.raises(CheckpointError, match=r"decoder_model_merged\.onnx: truncated, or no ONNX file .* export it again"),
        opened(folder),
    ):
        pass
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"decoder_model_merged\.onnx: truncated, or no ONNX file"), opened(folder):
        pass
    path.unlink()
    with pytest.raises(CheckpointError, match=r"decoder_model_merged\.onnx: missing; export it again"), opened(folder):
        pass


def test_a_folder_that_moved_without_its_data_is_named(artifact: Path, tmp_path: Path) -> None:
    folder = damaged(artifact, tmp_path / "artifact")
    data = folder / "decoder_model_merged.onnx_data"
    content = data.read_bytes()
    data.write_bytes(content[:-1])
    with (
        pytest.raises(CheckpointError, match=rf"onnx_data: truncated: .* ends at byte {len(content)}, the file at"),
        opened(folder),
    ):
        pass
    data.unlink()
    message = r"decoder_model_merged\.onnx: its data file decoder_model_merged\.onnx_data is missing; put it beside the graph"
    with pytest.raises(CheckpointError, match=message), opened(folder):
        pass


def graph_file(path: Path, operator: str, opset: int, domain: str = "", location: str | None = None) -> Path:
    """Write a graph of one operator, with a weight outside it if there is a `location` for it."""
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node(operator, ["x"], ["y"], domain=domain)], "graph", values[:1], values[1:])
    if location is not None:
        weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
        weight.external_data.add(key="location", value=location)
        graph.initializer.append(weight)
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


def test_an_opset_or_operator_that_this_onnx_runtime_lacks_is_told(tmp_path: Path) -> None:
    engine = Engine(("cpu",), 1)
    assert set(GraphSession(graph_file(tmp_path / "known.onnx", "Relu", 21), engine).inputs) == {"x"}
    with pytest.raises(MissingError, match=r"later\.onnx: ONNX Runtime .* it lacks an opset or operator .* install a newer one"):
        GraphSession(graph_file(tmp_path / "later.onnx", "Relu", 999), engine)
    with pytest.raises(MissingError, match=r"other\.onnx: ONNX Runtime .* it lacks an opset or operator .*Invented"):
        GraphSession(graph_file(tmp_path / "other.onnx", "Invented", 21, "com.microsoft"), engine)


def test_a_graph_that_points_outside_its_folder_is_refused(tmp_path: Path) -> None:
    for location in ("../w.bin", "/w.bin"):
        with pytest.raises(
            CheckpointError, match=f"w points to '{location}', outside the graph's folder; do not use this artifact"
        ):
            GraphSession(graph_file(tmp_path / "graph.onnx", "Relu", 21, location=location), Engine(("cpu",), 1))


def test_a_graph_of_another_make_is_refused(artifact: Path, tmp_path: Path) -> None:
    folder = damaged(artifact, tmp_path / "artifact")
    shutil.copy(folder / "embed_tokens.onnx", folder / "decoder_model_merged.onnx")
    with (
        pytest.raises(
            CheckpointError, match=r"merged\.onnx: of another make, it has no attention_mask, inputs_embeds, logits, num"
        ),
        opened(folder),
    ):
        pass


def test_a_provider_that_is_not_here_is_told() -> None:
    """In a process that sees no GPU, whatever the machine has and whichever ONNX Runtime is installed."""
    program = "from compress.runtimes.onnxruntime.graph import choose_engine as c; print(c(None, 1)); c(('tensorrt', 'cpu'), None)"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "Engine(providers=('cpu',), threads=1)"
    assert done.returncode == 1
    assert "MissingError: providers: tensorrt" in done.stderr


def test_a_package_that_is_missing_is_told_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    versions = in_onnxruntime().versions()
    assert {"onnx", "transformers"} <= versions.keys() and any(name.startswith("onnxruntime") for name in versions)

    def version(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(row, "version", version)
    with pytest.raises(MissingError, match=r"is not installed here: pip install 'vlm-compress\[onnx\]', or, for CUDA,"):
        in_onnxruntime().open(OpenContext(tmp_path, tmp_path, SILENT, QWEN2_5_VL))


def test_what_an_original_is_exported_to_is_removed_when_it_fails(original: Path, tmp_path: Path) -> None:
    folder = damaged(original, tmp_path / "model")
    tensors = FILES.load_file(folder / "model.safetensors")
    FILES.save_file({name: value for name, value in tensors.items() if "norm2" not in name}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="norm2"), opened(folder):
        pass
    assert list((tmp_path / "logs").iterdir()) == []
    (tmp_path / "logs").rmdir()
    (tmp_path / "logs").write_text("in the way")
    with (
        pytest.raises(StoreError, match=r"original\.onnx-export: .* cannot be exported there .* free space"),
        opened(folder),
    ):
        pass


def test_whole_distributions_are_those_that_transformers_compares(
    session: Any, said: list[Answer], original: Path, tmp_path: Path
) -> None:
    other = build_qwen2_5_vl(tmp_path / "other", seed=7)
    passages = passages_of(asked(), said)
    with opened(original, in_process()) as inside:
        inside.score(passages, tmp_path / "exact", None, SILENT)
    with opened(other, in_process()) as inside:
        exact = inside.score(passages, None, tmp_path / "exact", SILENT)
    positions = [(index, token) for index, score in enumerate(exact) for token in range(len(score.negative_log_likelihood))][::3]
    assert isinstance(session, FullVocabularySession)
    before = session.distributions(passages, positions, SILENT)
    with opened(other, in_onnxruntime()) as artifact:
        assert isinstance(artifact, FullVocabularySession)
        after = artifact.distributions(passages, positions, SILENT)
    for (index, token), old, new in zip(positions, before, after, strict=True):
        kl = exact[index].kl
        assert old is not None and new is not None and kl is not None
        assert kl_divergence(old, new) == pytest.approx(kl[token], abs=1e-3)
