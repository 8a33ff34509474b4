from __future__ import annotations

import hashlib
import io
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from compress.calibration.batches import Batches, load_batches, load_processor
from compress.calibration.collect import CalibrationSelection, PinnedSet, collect
from compress.calibration.sets import TextSet, VqaSet
from compress.checkpoints.artifact import folder_digests
from compress.data import overlap
from compress.data.overlap import check_overlap
from compress.data.prompts import Prompt, messages, open_images, write_prompt
from compress.data.questions import open_questions
from compress.data.samples import read_manifest
from compress.data.sources import Columns, RowFilter
from compress.data.texts import read_documents
from compress.errors import CheckpointError, CompressError, DataError
from compress.progress import Silent
from tests.tiny import build_qwen2_5_vl, picture

SENTENCE = "The harbour of town {0} was closed in the year {0} , when the river changed its course and left the quays dry . "


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_qwen2_5_vl(tmp_path_factory.mktemp("model"))


def write_text(folder: Path, first: int, last: int, name: str = "text.txt") -> Path:
    path = folder / name
    path.write_text("".join(f" = Heading = \n\n{SENTENCE.format(number)}\n\n" for number in range(first, last)))
    return path


def write_questions(folder: Path, first: int, last: int, name: str = "questions.jsonl", **changes: Any) -> Path:
    rows = list[dict[str, Any]]()
    for number in range(first, last):
        images = [f"{number}-{index}.png" for index in range(1 + number % 2)]
        for index, image in enumerate(images):
            (folder / image).write_bytes(picture(1000 * index + number, 112 + 28 * (number % 3), 112))
        question = "What is it, " + "really " * (number % 5) + f"in scene {number}?"
        rows.append({"id": number, "image": images, "question": question, "answer": ["red", "blue", "blue"], **changes})
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def selection(text: Path | None, questions: Path | None, seed: int = 0, **changes: Any) -> CalibrationSelection:
    sets = list[PinnedSet]()
    if text:
        windows: dict[str, Any] = {"dataset": "text", "source": str(text), "samples": 6, "tokens": 96, **changes}
        sets.append(PinnedSet(TextSet(**windows), (text,)))
    if questions:
        asked: dict[str, Any] = {"dataset": "vqa", "source": str(questions), "samples": 8, "prompt": "{question} One word."}
        sets.append(PinnedSet(VqaSet(**asked), (questions,)))
    return CalibrationSelection(seed, tuple(sets))


@pytest.fixture(scope="module")
def collected(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calibration")
    data = tmp_path_factory.mktemp("data")
    collect(selection(write_text(data, 0, 200), write_questions(data, 0, 12)), model, folder, Silent())
    return folder


def test_manifest_pins_every_sample(collected: Path) -> None:
    manifest = read_manifest(collected)
    samples = manifest["samples"]
    assert [sample["kind"] for sample in samples] == ["text"] * 6 + ["question"] * 8
    assert len({sample["sha256"] for sample in samples}) == 14
    joined = "\n".join(["0", *(sample["sha256"] for sample in samples)])
    assert manifest["digest"] == hashlib.sha256(joined.encode()).hexdigest()
    rows = [json.loads(line) for line in (collected / "questions.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == [sample["id"] for sample in samples[6:]]
    for row, sample in zip(rows, samples[6:], strict=True):
        assert row["prompt"].endswith("? One word.")
        assert row["answer"] == "blue"
        written = [hashlib.sha256((collected / image).read_bytes()).hexdigest() for image in row["images"]]
        assert written == sample["images"]
        picture = [hashlib.sha256(decoded(collected / image)).hexdigest() for image in row["images"]]
        assert picture == [look["pixels"] for look in sample["looks"]]
    assert samples[0]["origin"].startswith("text.txt:")
    assert samples[6]["origin"].startswith("questions.jsonl:")


def decoded(path: Path) -> bytes:
    image = Image.open(path).convert("RGB")
    return f"{image.width}x{image.height}:".encode() + image.tobytes()


def test_collecting_again_gives_the_same_bytes(model: Path, tmp_path: Path) -> None:
    text, questions = write_text(tmp_path, 0, 200), write_questions(tmp_path, 0, 12)
    actual = list[dict[str, str]]()
    for number, seed in enumerate((0, 0, 1)):
        collect(selection(text, questions, seed), model, tmp_path / f"out{number}", Silent())
        actual.append(folder_digests(tmp_path / f"out{number}"))
    assert actual[0] == actual[1]
    assert read_manifest(tmp_path / "out2")["digest"] != read_manifest(tmp_path / "out0")["digest"]


def test_the_checkpoint_is_not_touched(model: Path, tmp_path: Path) -> None:
    before = folder_digests(model)
    collect(selection(write_text(tmp_path, 0, 200), write_questions(tmp_path, 0, 12)), model, tmp_path / "out", Silent())
    for batch in load_batches(tmp_path / "out", model, 512):
        batch.inputs()
    assert folder_digests(model) == before


def rows_of(batches: Batches) -> dict[str, dict[str, torch.Tensor]]:
    return {
        batch.ids[row]: {"input_ids": inputs["input_ids"][row][inputs["attention_mask"][row].bool()]}
        for batch in batches
        for inputs in [batch.inputs()]
        for row in range(len(batch.ids))
    }


def test_batches_hold_every_sample_whole(collected: Path, model: Path) -> None:
    alone, together = load_batches(collected, model, 1), load_batches(collected, model, 400)
    assert all(len(batch.ids) == 1 for batch in alone)
    assert 1 < len(together) < len(alone)
    assert all(batch.tokens <= 400 for batch in together)
    single, joint = rows_of(alone), rows_of(together)
    assert single.keys() == joint.keys()
    assert all(torch.equal(single[name]["input_ids"], joint[name]["input_ids"]) for name in single)


def test_padding_stands_right_and_is_masked(collected: Path, model: Path) -> None:
    padded = 0
    for batch in load_batches(collected, model, 2000):
        inputs = batch.inputs()
        mask = inputs["attention_mask"]
        assert tuple(mask.shape) == tuple(inputs["input_ids"].shape) == tuple(inputs["mm_token_type_ids"].shape)
        assert batch.tokens == mask.numel()
        assert torch.equal(mask, mask.sort(dim=1, descending=True).values)
        padded += int((mask == 0).sum())
    assert padded > 0


def test_questions_are_as_the_processor_makes_them(collected: Path, model: Path) -> None:
    processor = load_processor(model)
    batch = load_batches(collected, model, 1)[-1]
    row = next(
        json.loads(line)
        for line in (collected / "questions.jsonl").read_text().splitlines()
        if json.loads(line)["id"] == batch.ids[0]
    )
    prompt = Prompt(row["id"], row["prompt"], tuple((collected / name).read_bytes() for name in row["images"]))
    text = processor.apply_chat_template(messages(prompt, row["answer"]), tokenize=False)
    expected = processor(text=[text], images=open_images(prompt), return_tensors="pt")
    inputs = batch.inputs()
    assert inputs.keys() == expected.keys()
    assert all(torch.equal(inputs[name], expected[name]) for name in inputs)
    assert "blue<|im_end|>" in processor.tokenizer.decode(inputs["input_ids"][0])


def test_the_model_takes_every_batch_and_padding_changes_nothing(collected: Path, model: Path) -> None:
    network: Any = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32)
    alone = {batch.ids[0]: batch for batch in load_batches(collected, model, 1)}
    batch = max(load_batches(collected, model, 2000), key=lambda batch: int((batch.inputs()["attention_mask"] == 0).sum()))
    assert len(batch.ids) > 1
    with torch.no_grad():
        logits = network(**batch.inputs()).logits
        for row, name in enumerate(batch.ids):
            expected = network(**alone[name].inputs()).logits[0]
            assert torch.allclose(logits[row, : len(expected)], expected, atol=1e-4)


def test_special_tokens_in_text_stay_text(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("An <|image_pad|> in the middle . " * 200)
    collect(selection(path, None), model, tmp_path / "out", Silent())
    image_token = json.loads((model / "config.json").read_text())["image_token_id"]
    batches = load_batches(tmp_path / "out", model, 512)
    assert len(batches) > 0
    for batch in batches:
        assert not bool((batch.inputs()["input_ids"] == image_token).any())


def test_special_tokens_in_a_question_are_refused(model: Path, tmp_path: Path) -> None:
    path = write_questions(tmp_path, 0, 8, question="What does <|image_pad|> mean?")
    with pytest.raises(DataError, match=r"questions.jsonl:1: question 0: holds '<\|image_pad\|>', a special token of the model"):
        collect(selection(None, path), model, tmp_path / "out", Silent())


def test_a_question_without_answer_ends_where_the_model_begins(model: Path, tmp_path: Path) -> None:
    path = write_questions(tmp_path, 0, 8, answer=None)
    collect(selection(None, path), model, tmp_path / "out", Silent())
    processor = load_processor(model)
    row = load_batches(tmp_path / "out", model, 1)[0].inputs()["input_ids"][0]
    assert processor.tokenizer.decode(row).endswith("<|im_start|>assistant\n")


def test_questions_of_text_alone_where_they_are_asked_for(model: Path, tmp_path: Path) -> None:
    path = write_questions(tmp_path, 0, 6)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows[::2]:
        del row["image"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked: dict[str, Any] = {"dataset": "vqa", "source": str(path), "samples": 6}
    with pytest.raises(DataError, match=r"questions.jsonl:1: has no field 'image'"):
        collect(CalibrationSelection(0, (PinnedSet(VqaSet(**asked), (path,)),)), model, tmp_path / "refused", Silent())
    collect(CalibrationSelection(0, (PinnedSet(VqaSet(**asked, text_only=True), (path,)),)), model, tmp_path / "out", Silent())
    batches = load_batches(tmp_path / "out", model, 2000)
    inputs = [batch.inputs() for batch in batches]
    assert sorted(name for batch in batches for name in batch.ids) == [str(number) for number in range(6)]
    assert ["pixel_values" in each for each in inputs] == [False, True]
    network: Any = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        assert all(bool(network(**each).logits.isfinite().all()) for each in inputs)
    with pytest.raises(DataError, match=r"question 0 .* of the evaluation is calibration sample 0 "):
        check_overlap(tmp_path / "out", open_questions([path], Columns(), RowFilter(text_only=True)).read({0}), [])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"tokens": 4096},
            r"calibration.sets.0: windows of 4096 tokens, and the model takes 2048; lower calibration.sets.0.tokens",
        ),
        ({"samples": 9999}, r"calibration.sets.0: the text gives \d+ windows of 96 tokens, 9999 are asked for"),
    ],
)
def test_text_that_does_not_fit(model: Path, tmp_path: Path, changes: dict[str, int], message: str) -> None:
    with pytest.raises(DataError, match=message):
        collect(selection(write_text(tmp_path, 0, 20), None, **changes), model, tmp_path / "out", Silent())


def test_questions_that_do_not_fit(model: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"calibration.sets.0: .*questions.jsonl holds 3 questions, 8 are asked for; lower"):
        collect(selection(None, write_questions(tmp_path, 0, 3)), model, tmp_path / "out", Silent())
    path = write_questions(tmp_path, 0, 8, question="long " * 2100)
    collect(selection(None, path), model, tmp_path / "out", Silent())
    with pytest.raises(DataError, match=r"calibration question \d+: takes \d+ tokens, and the model takes 2048; leave it out"):
        load_batches(tmp_path / "out", model, 512)


def test_a_truncated_image_is_found_while_collecting(model: Path, tmp_path: Path) -> None:
    path = write_questions(tmp_path, 0, 8)
    full = (tmp_path / "3-0.png").read_bytes()
    (tmp_path / "3-0.png").write_bytes(full[: len(full) // 2])
    with pytest.raises(DataError, match=r"questions.jsonl:4.*cannot be read as an image"):
        collect(selection(None, path), model, tmp_path / "out", Silent())


def test_damaged_folders(model: Path, collected: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no calibration samples; run again with --fresh"):
        load_batches(tmp_path / "empty", model, 512)
    with pytest.raises(DataError, match=r"its manifest.json cannot be read .* run again with --fresh"):
        read_manifest(tmp_path / "empty")
    broken = shutil.copytree(collected, tmp_path / "broken")
    shutil.rmtree(broken / "images")
    with pytest.raises(DataError, match=r"questions.jsonl: cannot be read .* run again with --fresh"):
        load_batches(broken, model, 512)
    bare = shutil.copytree(model, tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    with pytest.raises(CheckpointError, match="bare: has no chat template; use an instruction-tuned checkpoint"):
        load_batches(collected, bare, 512)
    shutil.copyfile(model / "chat_template.jinja", bare / "chat_template.jinja")
    (bare / "processor_config.json").unlink()
    with pytest.raises(CheckpointError, match="bare: "):
        load_batches(collected, bare, 512)
    (bare / "chat_template.jinja").write_text("{{ messages[0].content | nothing }}")
    shutil.copyfile(model / "processor_config.json", bare / "processor_config.json")
    with pytest.raises(CheckpointError, match=r"bare: its chat template cannot be used \(.*nothing.*\); correct it"):
        load_batches(collected, bare, 512)
    (bare / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"bare: has no tokenizer; add its tokenizer.json, or fetch the checkpoint again"):
        collect(selection(write_text(tmp_path, 0, 200), None), bare, tmp_path / "out", Silent())
    (bare / "tokenizer.json").write_text("{")
    with pytest.raises(CompressError, match=r"bare/tokenizer.json: not readable as JSON"):
        collect(selection(write_text(tmp_path, 0, 200), None), bare, tmp_path / "out", Silent())


@pytest.mark.parametrize("several", [False, True])
def test_a_chat_template_in_the_tokenizers_settings_alone_counts(several: bool, model: Path, tmp_path: Path) -> None:
    prompt, processor = Prompt("one", "What is it?", (picture(0),)), load_processor(model)
    moved = shutil.copytree(model, tmp_path / "moved")
    template = (moved / "chat_template.jinja").read_text(encoding="utf-8")
    (moved / "chat_template.jinja").unlink()
    settings = json.loads((moved / "tokenizer_config.json").read_text(encoding="utf-8"))
    named = [{"name": "tool_use", "template": "{{ tools }}"}, {"name": "default", "template": template}]
    settings["chat_template"] = named if several else template
    (moved / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    assert write_prompt(load_processor(moved), prompt, "red") == write_prompt(processor, prompt, "red")


def test_no_overlap(collected: Path, tmp_path: Path) -> None:
    questions = open_questions([write_questions(tmp_path, 20, 24)], Columns()).read()
    assert check_overlap(collected, questions, read_documents(write_text(tmp_path, 300, 400))) == []


def test_a_question_in_both_stops(collected: Path, tmp_path: Path) -> None:
    row = json.loads((collected / "questions.jsonl").read_text().splitlines()[0])
    path = write_questions(tmp_path, 20, 22)
    shared = write_questions(tmp_path, int(row["id"]), int(row["id"]) + 1, "shared.jsonl")
    path.write_text(path.read_text() + shared.read_text().replace("What is it,", "what  is IT,"))
    message = (
        rf"question {row['id']} \(questions.jsonl:3\) of the evaluation is calibration sample {row['id']} "
        rf"\(questions.jsonl:\d+\): a measurement on it proves nothing; use another split or file"
    )
    with pytest.raises(DataError, match=message):
        check_overlap(collected, open_questions([path], Columns()).read(), [])


def test_one_image_of_several_in_both_with_the_same_question_stops(collected: Path, tmp_path: Path) -> None:
    row = next(row for row in map(json.loads, (collected / "questions.jsonl").read_text().splitlines()) if int(row["id"]) % 2 == 0)
    number = int(row["id"])
    path = write_questions(tmp_path, number, number + 1)
    (tmp_path / "more.png").write_bytes(picture(77, 112, 112))
    path.write_text(json.dumps({**json.loads(path.read_text()), "image": [f"{number}-0.png", "more.png"]}) + "\n")
    with pytest.raises(
        DataError, match=rf"question {number} \(questions.jsonl:1\) of the evaluation is calibration sample {number} "
    ):
        check_overlap(collected, open_questions([path], Columns()).read(), [])


def test_an_image_in_both_with_another_question_warns(collected: Path, tmp_path: Path) -> None:
    row = json.loads((collected / "questions.jsonl").read_text().splitlines()[0])
    path = write_questions(tmp_path, int(row["id"]), int(row["id"]) + 1, question="Something else?")
    (warning, *_) = check_overlap(collected, open_questions([path], Columns()).read(), [])
    assert warning.startswith(f"an image of question {row['id']} (questions.jsonl:1) of the evaluation is also calibration sample")


def encoded_again(path: Path, **options: Any) -> None:
    """Write an image's pixels in another encoding to its place."""
    image, buffer = Image.open(path).convert("RGB"), io.BytesIO()
    size = options.pop("size", image.size)
    image.resize(size, Image.Resampling.LANCZOS).save(buffer, **options)
    path.write_bytes(buffer.getvalue())


@pytest.mark.parametrize(
    ("old", "new"), [("What", "What"), ("What is it,", "w\u200bHAT  is it\u00ad;"), ("scene 1?", "scene \uff11 \uff1f!")]
)
def test_a_question_in_both_is_found_in_other_letters_and_with_its_images_in_another_encoding(
    collected: Path, tmp_path: Path, old: str, new: str
) -> None:
    number = next(
        int(row["id"])
        for row in map(json.loads, (collected / "questions.jsonl").read_text().splitlines())
        if "scene 1" in row["prompt"]
    )
    path = write_questions(tmp_path, number, number + 1)
    row = json.loads(path.read_text())
    path.write_text(json.dumps({**row, "question": row["question"].replace(old, new)}))
    for image in row["image"]:
        encoded_again(tmp_path / image, format="WEBP", lossless=True)
    with pytest.raises(DataError, match=rf"question {number} .* of the evaluation is calibration sample {number} "):
        check_overlap(collected, open_questions([path], Columns()).read(), [])


def test_an_image_that_looks_like_one_in_both_warns(collected: Path, tmp_path: Path) -> None:
    written = json.loads((collected / "questions.jsonl").read_text().splitlines()[0])
    number = int(written["id"])
    path = write_questions(tmp_path, number, number + 1)
    for image in json.loads(path.read_text())["image"]:
        encoded_again(tmp_path / image, format="JPEG", quality=80, size=(90, 90))
    (warning, *_) = check_overlap(collected, open_questions([path], Columns()).read(), [])
    assert f"looks like calibration sample {number}'s" in warning
    assert warning.endswith("with the same question")


def test_options_do_not_hide_a_question(collected: Path, tmp_path: Path) -> None:
    written = json.loads((collected / "questions.jsonl").read_text().splitlines()[0])
    path = write_questions(tmp_path, int(written["id"]), int(written["id"]) + 1, options=["red", "blue"])
    with pytest.raises(DataError, match="of the evaluation is calibration sample"):
        check_overlap(collected, open_questions([path], Columns(options="options")).read(), [])


PLAIN = (
    "Long before the railway came , the mill stood at the bend of the river and ground the corn of nine villages . "
    "Its wheel was made of oak , and every spring two brothers mended the paddles that the ice had broken ."
)


@pytest.fixture(scope="module")
def of_prose(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prose")
    path = folder / "text.txt"
    path.write_text(PLAIN)
    collect(selection(path, None, samples=1, tokens=16), model, folder / "out", Silent())
    return folder / "out"


@pytest.mark.parametrize(
    "text",
    [
        PLAIN,
        PLAIN.replace(" ,", ",").replace(" .", "!").upper(),
        PLAIN.replace("nine", "ten"),
        " ".join(PLAIN.split()[:25]) + "\n" + " ".join(PLAIN.split()[25:]),
    ],
)
def test_a_paragraph_in_both_stops(of_prose: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "test.txt").write_text(f"Something else .\n\n{text}\n")
    message = (
        r"a paragraph of the evaluation's text \(test.txt:3: '.*…'\) is part of calibration sample "
        r"calibration.sets.0:\d+ \(text.txt:1.*\): a measurement on it proves nothing"
    )
    with pytest.raises(DataError, match=message):
        check_overlap(of_prose, [], read_documents(tmp_path / "test.txt"))


def with_changes(every: int) -> str:
    """The prose with a word put in after each so many, such that no longer run of words stands in both."""
    words = PLAIN.replace(" ,", "").replace(" .", "").split()
    runs = [words[index : index + every] for index in range(0, len(words), every)]
    return " ".join(word for number, run in enumerate(runs) for word in (*run, f"new{number}"))


def test_runs_of_thirteen_words_count_and_shorter_ones_do_not(of_prose: Path, tmp_path: Path) -> None:
    (tmp_path / "test.txt").write_text(with_changes(13))
    with pytest.raises(DataError, match="a paragraph of the evaluation's text"):
        check_overlap(of_prose, [], read_documents(tmp_path / "test.txt"))
    (tmp_path / "test.txt").write_text(with_changes(12))
    assert check_overlap(of_prose, [], read_documents(tmp_path / "test.txt")) == []


def test_a_leak_is_found_wherever_it_stands_in_a_long_text(of_prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlap, "_CHUNK_WORDS", 40)
    others = [" ".join(f"other{number}x{index}" for index in range(25)) for number in range(6)]
    for index in range(len(others) + 1):
        (tmp_path / "test.txt").write_text("\n\n".join([*others[:index], PLAIN, *others[index:]]))
        with pytest.raises(DataError, match="a paragraph of the evaluation's text"):
            check_overlap(of_prose, [], read_documents(tmp_path / "test.txt"))


def test_a_quotation_is_no_leak(of_prose: Path, tmp_path: Path) -> None:
    quoted = " ".join(PLAIN.split()[:16])
    sentence = "They say that in this country nobody has ever written more than a line without adding another one to it"
    (tmp_path / "test.txt").write_text(f"{sentence} : {quoted} , {sentence} .\n")
    assert check_overlap(of_prose, [], read_documents(tmp_path / "test.txt")) == []


def test_fifty_words_in_a_long_line_are_a_leak(model: Path, tmp_path: Path) -> None:
    words = [f"word{number}" for number in range(300)]
    (tmp_path / "text.txt").write_text(" ".join(words))
    collect(selection(tmp_path / "text.txt", None, samples=1, tokens=64), model, tmp_path / "out", Silent())
    other = [f"other{number}" for number in range(400)]
    (tmp_path / "test.txt").write_text(" ".join([*other, *words[:50], *other]))
    with pytest.raises(DataError, match="a paragraph of the evaluation's text"):
        check_overlap(tmp_path / "out", [], read_documents(tmp_path / "test.txt"))
    (tmp_path / "test.txt").write_text(" ".join([*other, *words[:49], *other]))
    assert check_overlap(tmp_path / "out", [], read_documents(tmp_path / "test.txt")) == []


@dataclass
class Listening(Silent):
    warnings: list[str] = field(default_factory=lambda: list[str]())

    def warn(self, message: str) -> None:
        self.warnings.append(message)


def test_a_question_that_the_processor_refuses_is_left_out_by_name(model: Path, tmp_path: Path) -> None:
    source = write_questions(tmp_path, 0, 4)
    (tmp_path / "2-0.png").write_bytes(picture(2, 2000, 9))
    heard = Listening()
    chosen = VqaSet.model_validate({"dataset": "vqa", "source": str(source), "samples": 4})
    selection = CalibrationSelection(0, (PinnedSet(chosen, (source,)),))
    collect(selection, model, tmp_path / "out", heard)
    (warning,) = heard.warnings
    assert warning.startswith("calibration leaves out a question: questions.jsonl:3: question 2: the model's processor does not")
    assert "aspect ratio" in warning
    assert sorted(sample["id"] for sample in read_manifest(tmp_path / "out")["samples"]) == ["0", "1", "3"]
    batches = load_batches(tmp_path / "out", model, 4096)
    assert sorted(identity for batch in batches for identity in batch.ids) == ["0", "1", "3"]
    for number in (0, 1, 3):
        (tmp_path / f"{number}-0.png").write_bytes(picture(number, 2000, 9))
    with pytest.raises(DataError, match=r"calibration: none of 4 questions can be shown to the model; the first: questions"):
        collect(selection, model, tmp_path / "none", Silent())
