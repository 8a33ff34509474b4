import json
import re
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from compress.calibration.batches import Exchange, load_processor, process
from compress.checkpoints.checkpoint import open_checkpoint, read_config
from compress.checkpoints.output_head import head_is_tied
from compress.data.images import decode_image
from compress.data.prompts import Prompt, load_tokenizer, longest_input, write_prompt
from compress.engine.replay import Replay, WalkConfig
from compress.errors import CheckpointError
from compress.families.blip2 import BLIP2
from compress.families.resolve import family_of
from compress.progress import Silent
from compress.runtimes.runtime import OpenContext, Passage
from compress.runtimes.transformers.runtime import Transformers
from tests.families.samples import batches, load_plain, plain_outputs, tensors_of
from tests.tiny import build_blip2, picture
from tests.tiny.blip2 import QUERIES

PUBLISHED = Path(__file__).parent.parent / "published" / "blip-2"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_blip2(tmp_path_factory.mktemp("blip2"), context=128)


def open_in_process(folder: Path) -> Any:
    return Transformers(runtime="transformers").open(OpenContext.at(folder, folder / "logs", Silent()))


def test_prompts_are_those_of_the_published_examples(folder: Path) -> None:
    assert not list(folder.glob("chat_template*"))
    processor, prompt = load_processor(folder), Prompt("a", "What is it?", (picture(1),))
    assert write_prompt(processor, prompt) == "</s>Question: What is it? Answer:"
    assert write_prompt(processor, prompt, "a cat") == "</s>Question: What is it? Answer: a cat\n"
    ids = cast("list[int]", process(processor, [Exchange(prompt, None)])["input_ids"][0].tolist())
    begin = processor.tokenizer.bos_token_id
    assert ids[: QUERIES + 1] == [read_config(folder)["image_token_index"]] * QUERIES + [begin]
    assert begin not in ids[QUERIES + 1 :]
    usual = processor(
        text=["Question: What is it? Answer:"], images=[decode_image(picture(1), "picture")], add_special_tokens=False
    )["input_ids"][0]
    assert ids == [*usual[:QUERIES], begin, *usual[QUERIES:]]


def test_a_template_that_ships_is_used(folder: Path, tmp_path: Path) -> None:
    other = build_blip2(tmp_path)
    (other / "chat_template.jinja").write_text("{% for message in messages %}Say: {{ message['content'][-1]['text'] }}{% endfor %}")
    assert write_prompt(load_processor(other), Prompt("a", "What is it?")) == "Say: What is it?"


def test_text_alone_is_scored_by_the_decoder_alone(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    tokens = cast("tuple[int, ...]", tuple(tokenizer("The river rises in the northern hills.")["input_ids"]))
    with open_in_process(folder) as session:
        (score,) = session.score([Passage("text", tokens)], None, None, Silent())
    model, ids = load_plain(folder, "float32"), torch.tensor([tokens])
    with torch.no_grad():
        logits = model.language_model(input_ids=ids).logits[0, :-1]
    expected = -logits.log_softmax(dim=1).gather(1, ids[0, 1:, None]).squeeze(1)
    torch.testing.assert_close(torch.from_numpy(score.negative_log_likelihood).float(), expected, rtol=1e-4, atol=1e-4)


def test_two_images_in_a_question_are_refused(folder: Path) -> None:
    prompt = Prompt("q7", "What is it?", (picture(1), picture(2)))
    with open_in_process(folder) as session:
        (answer,) = session.answer([prompt], 4, Silent())
    assert answer.fault == "q7: has 2 images, and blip-2 takes one at a time; leave it out"


def test_a_prompt_beyond_the_models_context_is_refused(folder: Path) -> None:
    asked = [Prompt("q8", "word " * 110, (picture(1),))]
    message = (
        r"q8: takes \d+ tokens with 4 for its answer, and the model takes 128; leave it out, or shorten its text or use smaller"
    )
    window = Passage("window-0", tuple(range(5, 205)))
    with open_in_process(folder) as session:
        (answer,) = session.answer(asked, 4, Silent())
        (score,) = session.score([window], None, None, Silent())
    assert re.search(message, answer.fault or "")
    assert "window-0: takes 200 tokens, and the model takes 128" in (score.fault or "")


def test_what_a_published_config_leaves_out_is_known(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(build_blip2(tmp_path))
    (tmp_path / "config.json").write_text((PUBLISHED / "config.json").read_text())
    assert longest_input(tmp_path) == 2048
    assert head_is_tied(open_checkpoint(tmp_path), BLIP2)
    assert head_is_tied(checkpoint, BLIP2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "t5"}, "text_config.model_type is 't5'; of blip-2 only checkpoints with 'opt' there are supported"),
        ({"do_layer_norm_before": False}, "text_config.do_layer_norm_before is False; of blip-2 only checkpoints with True"),
        ({"activation_function": "gelu"}, "text_config.activation_function is 'gelu'; of blip-2 only checkpoints with 'relu'"),
    ],
)
def test_another_decoder_is_refused(change: dict[str, Any], message: str) -> None:
    config = json.loads((PUBLISHED / "config.json").read_text())
    assert family_of(config).name == "blip-2"
    with pytest.raises(CheckpointError, match=f"some/model: {message}"):
        family_of(config | {"text_config": config["text_config"] | change}, "some/model")


def test_the_parts_that_stay_in_float32_do_so_in_the_walk(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(build_blip2(tmp_path, dtype=torch.float16))
    calibration = batches(tmp_path)[1:2]
    replay = Replay(WalkConfig(checkpoint, family_of(checkpoint.config), calibration, "cpu", tmp_path, 1 << 30))
    expected = plain_outputs(tmp_path, calibration, ["qformer", "language_projection"])
    seen: set[str] = set()
    for visit in replay.walk(replay.vision_units()):
        if visit.name in expected:
            seen.add(visit.name)
            dtype = torch.float32 if visit.name == "qformer" else torch.float16
            assert {parameter.dtype for parameter in visit.module.parameters()} == {dtype}
            actual = [tensors_of(visit.run(call)) for call in visit.calls]
            assert len(actual) == 1
            assert all(torch.equal(one, other) for one, other in zip(actual[0], expected[visit.name][0], strict=True))
    assert seen == expected.keys()
