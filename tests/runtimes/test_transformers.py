import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import safetensors.torch
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig

from compress.checkpoints.checkpoint import open_checkpoint, read_json_object
from compress.checkpoints.skeleton import build_skeleton
from compress.data.prompts import Prompt, messages, open_images
from compress.errors import CheckpointError, StoreError, UsageError
from compress.export.format import ExportContext
from compress.export.vllm.format import VllmExport
from compress.families.resolve import family_of
from compress.files import write_json
from compress.progress import Silent
from compress.runtimes.fidelity import Head, predict
from compress.runtimes.runtime import UNSCORED, Answer, OpenContext, Passage, Score
from compress.runtimes.transformers.model import choose_dtype, load_model
from compress.runtimes.transformers.runtime import Transformers
from tests.quantized import exact_weights, round_checkpoint, scheme
from tests.tiny import build_qwen2_5_vl, build_qwen2_vl, picture

FILES: Any = safetensors.torch
AUTO_MODEL: Any = AutoModelForImageTextToText
AUTO_PROCESSOR: Any = AutoProcessor
NEW_TOKENS = 6
QUESTIONS = ("What colour is the largest shape?", "How many circles are there in the picture?", "Yes or no?")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_qwen2_5_vl(tmp_path_factory.mktemp("model") / "original")


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    """Questions of several lengths about images of several sizes, and some without one or with two."""
    images = [picture(0), picture(1, 140, 84), picture(2, 56, 56)]
    shown = [(images[0],), (images[1],), (), (images[2],), (images[0], images[2])]
    return [Prompt(f"q{index}", QUESTIONS[index % 3], shown[index % 5]) for index in range(6)]


@pytest.fixture(scope="module")
def passages(prompts: list[Prompt]) -> list[Passage]:
    generator = np.random.default_rng(0)
    lengths = (24, 31, 7, 24, 1, 0)
    texts = [Passage(f"t{index}", tuple(generator.integers(0, 500, size).tolist())) for index, size in enumerate(lengths)]
    forced = [Passage(f"p{index}", (17 + index, 40, 99), prompts[index]) for index in range(5)]
    return [*texts, *forced, Passage("silent", (), prompts[0])]


def opened(artifact: Path, tokens_per_batch: int = 4096, **fields: Any) -> Any:
    runtime = Transformers(runtime="transformers", device="cpu", tokens_per_batch=tokens_per_batch, **fields)
    return runtime.open(OpenContext.at(artifact, artifact.parent, Silent()))


def answers(artifact: Path, prompts: Sequence[Prompt], tokens_per_batch: int = 4096) -> list[Answer]:
    with opened(artifact, tokens_per_batch) as session:
        return session.answer(prompts, NEW_TOKENS, Silent())


def score(session: Any, passages: Sequence[Passage], record: Path | None = None, reference: Path | None = None) -> list[Score]:
    return session.score(passages, record, reference, Silent())


def generated_by_transformers(folder: Path, prompt: Prompt, **settings: Any) -> list[int]:
    """Return what transformers' own loading and generation say, one prompt at a time."""
    model: Any = AUTO_MODEL.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AUTO_PROCESSOR.from_pretrained(folder)
    text = processor.apply_chat_template(messages(prompt), add_generation_prompt=True, tokenize=False)
    inputs = processor(text=[text], images=open_images(prompt) or None, return_tensors="pt")
    model.generation_config = GenerationConfig(**{**model.generation_config.to_dict(), "repetition_penalty": 1.0})
    ids = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, temperature=None, **settings)
    return cast("list[int]", ids[0, inputs["input_ids"].shape[1] :].tolist())


def placeholders(folder: Path) -> list[int]:
    config = open_checkpoint(folder).config
    return [config["image_token_id"], config["video_token_id"]]


def stops(folder: Path) -> list[int]:
    return cast("list[int]", read_json_object(folder / "generation_config.json")["eos_token_id"])


@pytest.mark.parametrize("build", [build_qwen2_5_vl, build_qwen2_vl])
def test_answers_are_those_of_transformers_itself(build: type, prompts: list[Prompt], tmp_path: Path) -> None:
    folder: Path = build(tmp_path / "model", layers=2)
    generated = answers(folder, prompts)
    assert [answer.id for answer in generated] == [prompt.id for prompt in prompts]
    for prompt, answer in zip(prompts, generated, strict=True):
        expected = generated_by_transformers(folder, prompt, bad_words_ids=[[token] for token in placeholders(folder)])
        ends = [index for index, token in enumerate(expected) if token in stops(folder)]
        assert list(answer.token_ids) == expected[: ends[0] if ends else None], prompt.id
    assert len({answer.token_ids for answer in generated}) > 3


def test_an_answer_ends_before_the_first_stop_token(original: Path, prompts: list[Prompt], tmp_path: Path) -> None:
    before = next(answer for answer in answers(original, prompts) if len(answer.token_ids) == NEW_TOKENS)
    folder = build_qwen2_5_vl(tmp_path / "model")
    config = GenerationConfig.from_pretrained(folder).to_dict() | {"eos_token_id": [before.token_ids[3]]}
    write_json(folder / "generation_config.json", config)
    after = next(answer for answer in answers(folder, prompts) if answer.id == before.id)
    assert after.token_ids == before.token_ids[: before.token_ids.index(before.token_ids[3])]


def test_an_answer_holds_no_image_token_and_can_be_scored(original: Path, prompts: list[Prompt], tmp_path: Path) -> None:
    """The artifact would say the image's token wherever the original said the one that its row of the head is doubled from."""
    before = answers(original, prompts)
    first_token = before[0].token_ids[0]
    folder = Path(shutil.copytree(original, tmp_path / "model"))
    image, video = placeholders(folder)
    tensors = FILES.load_file(folder / "model.safetensors")
    head = next(tensor for name, tensor in tensors.items() if name.endswith("lm_head.weight"))
    head[image] = 2 * head[first_token]
    head[video] = 3 * head[first_token]
    FILES.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert generated_by_transformers(folder, prompts[0])[0] in (image, video)
    assert answers(folder, prompts) == before
    with opened(folder) as session:
        after = session.answer(prompts, NEW_TOKENS, Silent())
        scores = score(session, [Passage(p.id, a.token_ids, p) for p, a in zip(prompts, after, strict=True)])
    assert all(np.isfinite(item.negative_log_likelihood).all() for item in scores)


def test_the_batch_does_not_change_answers(original: Path, prompts: list[Prompt]) -> None:
    together = answers(original, prompts, tokens_per_batch=4096)
    assert answers(original, prompts, tokens_per_batch=1) == together
    assert answers(original, prompts[::-1], tokens_per_batch=200) == together[::-1]


def test_the_likelihood_is_the_models_own_loss(original: Path, passages: list[Passage]) -> None:
    model = AUTO_MODEL.from_pretrained(original, dtype=torch.float32).eval()
    with opened(original) as session:
        scores = score(session, passages)
    assert [item.id for item in scores] == [passage.id for passage in passages]
    for passage, item in zip(passages, scores, strict=True):
        if passage.prompt is None and len(passage.token_ids) > 1:
            ids = torch.tensor([passage.token_ids])
            with torch.inference_mode():
                loss = float(model(input_ids=ids, labels=ids).loss)
            assert len(item.negative_log_likelihood) == len(passage.token_ids) - 1
            assert item.negative_log_likelihood.mean() == pytest.approx(loss, rel=1e-5)
    sizes = {item.id: len(item.negative_log_likelihood) for item in scores}
    assert (sizes["t4"], sizes["t5"], sizes["silent"], sizes["p1"]) == (0, 0, 0, 3)


def test_an_answer_after_images_is_scored_as_the_model_predicts_it(original: Path, prompts: list[Prompt]) -> None:
    prompt = next(prompt for prompt in prompts if len(prompt.images) == 2)
    model = AUTO_MODEL.from_pretrained(original, dtype=torch.float32).eval()
    processor = AUTO_PROCESSOR.from_pretrained(original)
    answer = "two red circles"
    passage = Passage("two", tuple(processor.tokenizer(answer).input_ids), prompt)
    text = processor.apply_chat_template(messages(prompt), add_generation_prompt=True, tokenize=False) + answer
    inputs = processor(text=[text], images=open_images(prompt), return_tensors="pt")
    count = len(passage.token_ids)
    assert tuple(inputs["input_ids"][0, -count:].tolist()) == passage.token_ids
    with torch.inference_mode():
        scores = model(**inputs).logits[0, -count - 1 : -1].log_softmax(1)
    expected = [-float(scores[index, token]) for index, token in enumerate(passage.token_ids)]
    with opened(original) as session:
        (result,) = score(session, [passage])
    assert result.negative_log_likelihood == pytest.approx(expected, rel=1e-5)


def test_the_batch_does_not_change_scores(original: Path, passages: list[Passage]) -> None:
    assert len(passages) > 1
    with opened(original) as together, opened(original, 1) as alone:
        for first, second in zip(score(together, passages), score(alone, passages), strict=True):
            assert first.negative_log_likelihood == pytest.approx(second.negative_log_likelihood, rel=1e-5)


def test_a_model_does_not_differ_from_itself(original: Path, passages: list[Passage], tmp_path: Path) -> None:
    with opened(original) as session:
        recorded = score(session, passages, record=tmp_path / "record")
        compared = score(session, passages, reference=tmp_path / "record")
    assert [path.name for path in tmp_path.iterdir()] == ["record"]
    for first, second in zip(recorded, compared, strict=True):
        assert first.kl is None and first.same_top is None
        assert second.kl is not None and second.same_top is not None
        assert np.array_equal(first.negative_log_likelihood, second.negative_log_likelihood)
        assert not second.kl.any() and second.same_top.all()
        assert len(second.kl) == len(second.same_top) == len(first.negative_log_likelihood)


@pytest.mark.parametrize("layout", ["awq", "compressed-tensors"])
def test_the_divergence_is_that_of_the_whole_vocabulary(
    layout: Any, original: Path, passages: list[Passage], tmp_path: Path
) -> None:
    schemes = round_checkpoint(original, tmp_path / "rounded", scheme(4, 64))
    (tmp_path / "artifact").mkdir()
    family = family_of(open_checkpoint(original).config)
    VllmExport(format="vllm", layout=layout).apply(ExportContext(tmp_path / "rounded", tmp_path / "artifact", family, Silent()))
    with opened(original) as session:
        score(session, passages, record=tmp_path / "record")
    with opened(tmp_path / "artifact", tokens_per_batch=64) as session:
        by_id = {item.id: item for item in score(session, passages, reference=tmp_path / "record")}
    reference = AUTO_MODEL.from_pretrained(original, dtype=torch.float32).eval()
    rounded = AUTO_MODEL.from_pretrained(original, dtype=torch.float32).eval()
    for name, weight in exact_weights(original, schemes).items():
        rounded.get_submodule(family.module_name(name)).weight.data = weight
    passage = passages[1]
    ids = torch.tensor([passage.token_ids])
    with torch.inference_mode():
        first, second = (model(input_ids=ids).logits[0, :-1].double().log_softmax(1) for model in (reference, rounded))
    item = by_id[passage.id]
    assert item.kl is not None and item.same_top is not None
    assert item.kl == pytest.approx((first.exp() * (first - second)).sum(1).numpy(), rel=1e-3, abs=1e-6)
    assert item.kl.mean() > 1e-4
    assert np.array_equal(item.same_top, (first.argmax(1) == second.argmax(1)).numpy())


def test_a_long_vocabulary_is_taken_in_parts() -> None:
    generator = torch.Generator().manual_seed(0)
    vocabulary, positions = 40_000, 900
    weight, bias = torch.randn(vocabulary, 4, generator=generator), torch.randn(vocabulary, generator=generator)
    head = Head(weight, bias)
    hidden = torch.randn(positions, 4, generator=generator)
    other = hidden + 0.1
    tokens = torch.randint(vocabulary, (positions,), generator=generator)
    predictions = predict(hidden, head, tokens, (other, head))
    scores, reference = ((states @ weight.t() + bias).log_softmax(1) for states in (hidden, other))
    assert predictions.kl is not None and predictions.same_top is not None
    assert predictions.negative_log_likelihood == pytest.approx((-scores[range(positions), tokens]).numpy(), rel=1e-5)
    assert predictions.kl == pytest.approx((reference.exp() * (reference - scores)).sum(1).numpy(), rel=1e-3, abs=1e-6)
    assert predictions.same_top.dtype == np.bool_


def test_a_record_of_other_passages_is_refused(original: Path, passages: list[Passage], tmp_path: Path) -> None:
    with opened(original) as session:
        score(session, passages, record=tmp_path / "record")
        with pytest.raises(UsageError, match=r"record: was recorded on other passages than these; record the original again"):
            score(session, passages[1:], reference=tmp_path / "record")


def test_models_of_other_vocabularies_are_not_compared(original: Path, passages: list[Passage], tmp_path: Path) -> None:
    other = build_qwen2_5_vl(tmp_path / "other", layers=1, vocabulary=600)
    with opened(original) as session:
        score(session, passages[:1], record=tmp_path / "record")
    with opened(other) as session, pytest.raises(UsageError, match=r"head has 608 tokens, this artifact's 600"):
        score(session, passages[:1], reference=tmp_path / "record")


def test_an_item_that_cannot_be_read_is_a_fault_of_its_own(original: Path, prompts: list[Prompt], tmp_path: Path) -> None:
    broken = Prompt("broken", "What is this?", (b"no image",))
    passages = [Passage("q", (1, 2), broken), Passage("p", (1, 2), prompts[0])]
    heard: list[Answer] = []
    with opened(original) as session:
        answers = session.answer([broken, prompts[0]], NEW_TOKENS, Silent(), heard.append)
        assert [answer.id for answer in answers] == ["broken", "q0"]
        assert "broken: image 0: cannot be read as an image" in answers[0].fault
        assert (answers[0].text, answers[0].token_ids, answers[1].fault) == ("", (), None)
        assert sorted(answer.id for answer in heard) == ["broken", "q0"]
        assert answers[1] == session.answer(prompts[:1], NEW_TOKENS, Silent())[0]
        scores = score(session, passages, record=tmp_path / "record")
        assert "broken: image 0" in (scores[0].fault or "")
        assert [len(row.negative_log_likelihood) for row in scores] == [0, 2]
        again = score(session, passages, reference=tmp_path / "record")
        assert again[1].kl is not None and (again[1].kl < 1e-6).all()
        assert again[0].kl is not None and len(again[0].kl) == 0


def test_what_the_original_has_no_score_of_is_not_compared(original: Path, prompts: list[Prompt], tmp_path: Path) -> None:
    """The record lacks one of the passages, as if the original's had been cut short there."""
    passages = [Passage("p", (1, 2), prompts[0]), Passage("q", (3, 4), prompts[1])]
    with opened(original) as session:
        score(session, passages, record=tmp_path / "record")
        path = tmp_path / "record" / "record.json"
        content = json.loads(path.read_text(encoding="utf-8"))
        del content["files"]["0"]
        path.write_text(json.dumps(content), encoding="utf-8")
        first, second = score(session, passages, reference=tmp_path / "record")
    assert first.fault == UNSCORED
    assert len(first.negative_log_likelihood) == 0
    assert second.fault is None and len(second.negative_log_likelihood) == 2


def test_records_beside_each_other_share_the_head(original: Path, prompts: list[Prompt], tmp_path: Path) -> None:
    passages = [Passage("p", (1, 2), prompts[0]), Passage("q", (3, 4), prompts[1])]
    for index in range(2):
        with opened(original) as session:
            score(session, passages[index : index + 1], record=tmp_path / "record" / str(index))
    assert [path.parent.name for path in (tmp_path / "record").glob("*/head.safetensors")] == ["0"]
    other = build_qwen2_5_vl(tmp_path / "other", layers=1, seed=5)
    with opened(other) as session:
        score(session, passages, record=tmp_path / "record" / "other")
    assert (tmp_path / "record" / "other" / "head.safetensors").is_file()
    with opened(original) as session:
        for index in range(2):
            (result,) = score(session, passages[index : index + 1], reference=tmp_path / "record" / str(index))
            assert result.kl is not None and (result.kl < 1e-6).all()


def test_a_record_that_cannot_be_written_leaves_nothing(original: Path, prompts: list[Prompt], tmp_path: Path) -> None:
    with opened(original) as session, pytest.raises(StoreError, match="choose a folder that can be written to"):
        score(session, [Passage("p", (1, 2), prompts[0])], record=original / "config.json" / "record")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("tied", [False, True])
def test_loading_equals_transformers_own(tied: bool, tmp_path: Path) -> None:
    folder = build_qwen2_5_vl(tmp_path / "model", layers=2, tied=tied)
    loaded = load_model(OpenContext.at(folder, folder, Silent()), torch.float32, torch.device("cpu"))
    reference = AUTO_MODEL.from_pretrained(folder, dtype=torch.float32)
    expected = dict(reference.named_parameters()) | dict(reference.named_buffers())
    actual = dict(loaded.named_parameters()) | dict(loaded.named_buffers())
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype and torch.equal(actual[name], tensor), name
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == tied


def test_a_skeleton_takes_no_memory_for_weights(original: Path) -> None:
    model: Any = build_skeleton(original, torch.bfloat16, torch.device("cpu"))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())
    assert not model.training


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("drop", r"holds no weight for model\.language_model\.norm\.weight"),
        ("add", r"holds model\.layers\.9\.extra\.weight, which this model does not have"),
        ("reshape", r"model\.norm\.weight has the shape \(3,\), the model \(128,\) there"),
    ],
)
def test_weights_that_do_not_fit_the_config_are_named(change: str, message: str, tmp_path: Path) -> None:
    folder = build_qwen2_5_vl(tmp_path / "model", layers=1)
    tensors = FILES.load_file(folder / "model.safetensors")
    if change == "drop":
        del tensors["model.norm.weight"]
    else:
        tensors["model.norm.weight" if change == "reshape" else "model.layers.9.extra.weight"] = torch.ones(3)
    FILES.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        load_model(OpenContext.at(folder, folder, Silent()), torch.float32, torch.device("cpu"))


def test_an_artifact_of_another_kind_is_refused(tmp_path: Path) -> None:
    folder = build_qwen2_5_vl(tmp_path / "model", layers=1)
    write_json(folder / "config.json", {**open_checkpoint(folder).config, "quantization_config": {"quant_method": "fp8"}})
    with pytest.raises(CheckpointError, match="quant_method 'fp8' cannot be read here; evaluate it with runtime: vllm"):
        load_model(OpenContext.at(folder, folder, Silent()), torch.float32, torch.device("cpu"))


def test_a_checkpoint_without_a_processor_is_refused(tmp_path: Path) -> None:
    folder = build_qwen2_5_vl(tmp_path / "model", layers=1)
    for name in ("processor_config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(CheckpointError, match="its processor cannot be loaded"), opened(folder):
        pass


def test_a_broken_chat_template_is_told_before_weights_are_read(original: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(original, tmp_path / "model"))
    (folder / "chat_template.jinja").write_text("{% for message in messages %}")
    with pytest.raises(CheckpointError, match=r"model: its chat template cannot be used \(.*\); correct it"), opened(folder):
        pass


def test_auto_computes_in_float32_on_a_cpu_and_in_the_models_type_elsewhere(original: Path) -> None:
    assert choose_dtype("auto", original, torch.device("cpu")) == torch.float32
    assert choose_dtype("auto", original, torch.device("cuda")) == torch.bfloat16
    assert choose_dtype("float16", original, torch.device("cpu")) == torch.float16


def test_a_missing_device_is_told() -> None:
    """In a process that sees no GPU, whatever the machine has."""
    program = "from compress.runtimes.transformers.model import choose_device; choose_device('cuda')"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "MissingError: device: cuda, and torch finds no CUDA device here; set device: auto" in done.stderr


def test_versions_name_what_shapes_the_answers() -> None:
    versions = Transformers(runtime="transformers").versions()
    assert versions["torch"] == torch.__version__.partition("+")[0] or versions["torch"] == torch.__version__
    assert {"transformers", "tokenizers", "pillow"} <= versions.keys()


def test_a_config_of_a_model_that_cannot_run_is_refused(tmp_path: Path) -> None:
    folder = build_qwen2_5_vl(tmp_path / "model", layers=1)
    config = dict(open_checkpoint(folder).config)
    config["text_config"]["rope_parameters"]["mrope_section"] = "x"
    write_json(folder / "config.json", config)
    with pytest.raises(CheckpointError, match=r"config\.json: the model that it describes does not run \(split"), opened(folder):
        pass


def test_a_picture_that_the_processor_refuses_is_a_fault_of_its_item(original: Path, prompts: list[Prompt]) -> None:
    """Qwen's processors take none that is 200 times as wide as it is high."""
    wide = Prompt("wide", "What is it?", (picture(0, 2000, 9),))
    with opened(original) as session:
        results = session.answer([prompts[0], wide, prompts[1]], NEW_TOKENS, Silent())
        scores = session.score([Passage("before", (17, 40)), Passage("wide passage", (17, 40), wide)], None, None, Silent())
    message = "wide: the model's processor does not take it (absolute aspect ratio must be smaller than 200"
    assert [(answer.id, answer.fault is None) for answer in results] == [("q0", True), ("wide", False), ("q1", True)]
    assert results[1].fault is not None and results[1].fault.startswith(message)
    assert scores[0].fault is None
    assert scores[1].fault is not None and scores[1].fault.startswith(message)
    assert [results[0], results[2]] == answers(original, prompts[:2])
