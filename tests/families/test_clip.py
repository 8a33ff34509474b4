from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import CLIPModel, CLIPProcessor

from compress.calibration.batches import load_batches
from compress.calibration.collect import CalibrationSelection, PinnedSet, collect
from compress.calibration.sets import TextSet, VqaSet
from compress.checkpoints.checkpoint import open_checkpoint, read_config
from compress.data.images import decode_image
from compress.errors import DataError, UsageError
from compress.progress import Silent
from compress.runtimes.runtime import CAPABILITIES, Embeds, Generates, ImageInput, OpenContext, Scores, capable
from compress.runtimes.transformers.runtime import Transformers
from tests.jobs import sentences, write_questions
from tests.tiny import build_clip, build_qwen2_vl, picture

CLASSES = ("a red square", "a green circle", "the harbour")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_clip(tmp_path_factory.mktemp("clip"))


def open_in_process(folder: Path) -> Any:
    return Transformers(runtime="transformers").open(OpenContext.at(folder, folder / "logs", Silent()))


def test_likelihoods_are_those_of_transformers(folder: Path) -> None:
    assert "text_model.embeddings.position_ids" in open_checkpoint(folder).tensors
    pictures = [ImageInput(str(seed), picture(seed, 60 + seed, 80)) for seed in range(35)]
    with open_in_process(folder) as session:
        actual = session.classify(pictures, [[text] for text in CLASSES], Silent())
    model: Any = CLIPModel.from_pretrained(folder, dtype=torch.float32)
    processor: Any = CLIPProcessor.from_pretrained(folder)
    images = [decode_image(sample.image, sample.id) for sample in pictures]
    with torch.no_grad():
        expected = model(**processor(text=list(CLASSES), images=images, padding=True, return_tensors="pt")).logits_per_image
    np.testing.assert_allclose(actual, expected.double().log_softmax(dim=1).numpy(), atol=1e-4)


def test_a_class_of_several_texts_stands_at_their_mean(folder: Path) -> None:
    samples = [ImageInput("a", picture(1))]
    with open_in_process(folder) as session:
        double = session.classify(samples, [[CLASSES[0]] * 2, [CLASSES[1]]], Silent())
        single = session.classify(samples, [[CLASSES[0]], [CLASSES[1]]], Silent())
        mean = session.classify(samples, [CLASSES[::2], CLASSES[1:2]], Silent())
    np.testing.assert_allclose(double, single, atol=1e-6)
    assert not np.allclose(mean, single)


def test_what_it_does_not_do_is_refused(folder: Path, tmp_path: Path) -> None:
    with open_in_process(folder) as session:
        for capability in (Generates, Scores):
            with pytest.raises(UsageError, match=f"does not offer {CAPABILITIES[capability]}"):
                capable(session, capability)
        with pytest.raises(DataError, match=r"the text 'word word .*' takes \d+ tokens, and the model takes 77; shorten it"):
            session.classify([ImageInput("a", picture(1))], [["word " * 90], ["one"]], Silent())
    with open_in_process(build_qwen2_vl(tmp_path)) as session:
        assert capable(session, Generates) is session and capable(session, Scores) is session
        with pytest.raises(UsageError, match="does not offer a comparison of images with texts"):
            capable(session, Embeds)


def selection(base: Path, tokens: int, prompt: str = "{question}") -> CalibrationSelection:
    text, questions = base / "text.txt", write_questions(base, "questions.jsonl", range(4))
    text.write_text(sentences(0, 60))
    windows = TextSet(dataset="text", source=str(text), samples=3, tokens=tokens)
    asked = VqaSet(dataset="vqa", source=str(questions), samples=4, prompt=prompt)
    return CalibrationSelection(0, (PinnedSet(windows, (text,)), PinnedSet(asked, (questions,))))


def test_calibration_frames_windows_and_needs_no_chat_template(folder: Path, tmp_path: Path) -> None:
    collect(selection(tmp_path, 75), folder, tmp_path / "out", Silent())
    windows, pairs = load_batches(tmp_path / "out", folder, 4096)
    ids = windows.inputs()["input_ids"]
    size = read_config(folder)["text_config"]["vocab_size"]
    assert ids.shape == (3, 77)
    assert windows.tokens == 3 * 77
    assert (ids[:, 0] == size - 2).all()
    assert (ids[:, -1] == size - 1).all()
    inputs = pairs.inputs()
    assert inputs.keys() == {"input_ids", "attention_mask", "pixel_values"}
    processor: Any = CLIPProcessor.from_pretrained(folder)
    texts = processor.tokenizer.batch_decode(inputs["input_ids"], skip_special_tokens=True)
    assert sorted(texts)[0] == "what is in picture 0 ? red"


def test_text_beyond_the_context_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"windows of 76 tokens, and the model takes 75; lower calibration.sets.0.tokens"):
        collect(selection(tmp_path, 76), folder, tmp_path / "long", Silent())
    collect(selection(tmp_path, 8, "{question} " + "word " * 70), folder, tmp_path / "out", Silent())
    message = r"calibration question q\d: takes \d+ tokens, and the model takes 77; leave it out, or shorten its text"
    with pytest.raises(DataError, match=message):
        load_batches(tmp_path / "out", folder, 4096)
