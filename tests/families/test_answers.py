from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from compress.checkpoints.checkpoint import open_checkpoint
from compress.data.prompts import Prompt, load_processor, open_images, write_prompt
from compress.families import FAMILIES, Family
from compress.families.resolve import family_of
from compress.progress import Silent
from compress.runtimes.runtime import OpenContext, Passage
from compress.runtimes.transformers.runtime import Transformers
from tests.families.samples import LONG, ONE_IMAGE, SHORT, load_plain
from tests.tiny import BUILDERS, picture, writes

TOKENS = 5
WRITING = [name for name in FAMILIES if writes(name)]


def prompts(family: Family) -> list[Prompt]:
    """One image, two of them where the family can, and none."""
    several = (picture(2, 140, 56),) if family.name in ONE_IMAGE else (picture(2, 140, 56), picture(3, 28, 28))
    return [Prompt("one", SHORT, (picture(1),)), Prompt("several", LONG, several), Prompt("none", LONG)]


def in_process(folder: Path, tokens_per_batch: int) -> Any:
    runtime = Transformers(runtime="transformers", tokens_per_batch=tokens_per_batch)
    return runtime.open(OpenContext.at(folder, folder / "logs", Silent()))


def inputs_of(folder: Path, prompt: Prompt) -> dict[str, torch.Tensor]:
    processor = load_processor(folder)
    images = open_images(prompt) or None
    return dict(processor(text=[write_prompt(processor, prompt)], images=images, add_special_tokens=False, return_tensors="pt"))


@torch.no_grad()
def plain_answer(folder: Path, family: Family, prompt: Prompt) -> tuple[tuple[int, ...], torch.Tensor]:
    """Return the tokens that transformers alone says, and the logits [tokens, vocabulary] they were chosen from."""
    model, inputs = load_plain(folder, "float32"), inputs_of(folder, prompt)
    stops = model.generation_config.eos_token_id
    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=TOKENS,
        eos_token_id=stops,
        pad_token_id=0,
        suppress_tokens=list(family.placeholders(open_checkpoint(folder).config)) or None,
        return_dict_in_generate=True,
        output_logits=True,
    )
    for module in model.modules():
        if getattr(module, "generation_config", None) is not None:
            module.generation_config = GenerationConfig()
    generated = model.get_submodule(family.entry(inputs)).generate(**inputs, generation_config=settings)
    tokens = generated.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    return tuple(tokens), torch.cat(generated.logits)


@pytest.mark.parametrize("name", WRITING)
def test_answers_and_their_likelihoods_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    family = family_of(open_checkpoint(BUILDERS[name](tmp_path)).config)
    asked = prompts(family)
    sessions: list[Any] = []
    for tokens_per_batch in (1, 4096):
        with in_process(tmp_path, tokens_per_batch) as session:
            answers = session.answer(asked, TOKENS, Silent())
            passages = [Passage(prompt.id, answer.token_ids, prompt) for prompt, answer in zip(asked, answers, strict=True)]
            scores = session.score(passages, None, None, Silent())
            sessions.append(session)
        for prompt, answer, score in zip(asked, answers, scores, strict=True):
            tokens, logits = plain_answer(tmp_path, family, prompt)
            assert answer.token_ids == tokens[: len(answer.token_ids)]
            assert len(answer.token_ids) >= 2
            token_ids = torch.tensor(answer.token_ids).unsqueeze(1)
            expected = -logits[: len(token_ids)].log_softmax(dim=1).gather(1, token_ids).squeeze(1)
            torch.testing.assert_close(torch.from_numpy(score.negative_log_likelihood).float(), expected, rtol=1e-3, atol=1e-3)
