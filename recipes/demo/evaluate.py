"""Measures a demo model: answers to held-out questions by greedy generation, and perplexity on held-out text.

    python recipes/demo/evaluate.py --model recipes/demo/model --questions recipes/demo/test.parquet \
        --text recipes/demo/test.txt

Everything is measured twice: as saved, and with the decoder's linear weights rounded to 4 bits in groups of 64. The
questions are also asked of other questions' images, which shows how far an answer can be guessed.
"""

from __future__ import annotations

import argparse
import io
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pyarrow.parquet as pq
import scenes
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

BATCH = 50
WINDOW = 256  # tokens
GROUP = 64


@dataclass(frozen=True)
class Asked:
    """A held-out question, its image and the right answer."""

    image: Image.Image
    question: str
    answer: str


def read_questions(file: Path) -> list[Asked]:
    """The rows of a parquet file that `scenes.py` wrote."""
    rows = cast("list[dict[str, Any]]", pq.read_table(file).to_pylist())
    return [Asked(Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB"), row["question"], row["answer"]) for row in rows]


def topic(answer: str) -> str:
    """What a question with this answer is about."""
    if answer in scenes.COLOURS:
        return "colour"
    if answer in scenes.NUMBERS:
        return "count"
    return "shape" if answer in scenes.KINDS else "yes/no"


def generate(model: Any, processor: Any, asked: list[Asked]) -> list[str]:
    """The model's answers through processor, chat template and greedy generation."""
    answers: list[str] = []
    for start in range(0, len(asked), BATCH):
        part = asked[start : start + BATCH]
        prompts = [
            processor.apply_chat_template(
                [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": one.question}]}],
                add_generation_prompt=True,
                tokenize=False,
            )
            for one in part
        ]
        inputs = processor(text=prompts, images=[one.image for one in part], padding=True, padding_side="left", return_tensors="pt")
        found = model.generate(**inputs, max_new_tokens=8)
        answers += processor.batch_decode(found[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    return [answer.strip() for answer in answers]


def accuracy(answers: list[str], asked: list[Asked]) -> dict[str, float]:
    """Share of exactly right answers, in all and by topic."""
    right, total = Counter[str](), Counter[str]()
    for answer, one in zip(answers, asked, strict=True):
        for name in ("all", topic(one.answer)):
            total[name] += 1
            right[name] += answer == one.answer
    return {name: right[name] / total[name] for name in total}


@torch.no_grad()
def perplexity(model: Qwen2_5_VLForConditionalGeneration, processor: Qwen2_5_VLProcessor, text: str) -> float:
    """Perplexity per token over whole windows of 256 tokens."""
    tokens = torch.tensor(processor.tokenizer(text, verbose=False).input_ids)
    windows = tokens[: len(tokens) // WINDOW * WINDOW].view(-1, WINDOW)
    losses: list[Tensor] = []
    for start in range(0, len(windows), 16):
        part = windows[start : start + 16]
        logits = model(input_ids=part).logits[:, :-1]
        losses.append(functional.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="none"))
    return math.exp(torch.cat(losses).mean().item())


@torch.no_grad()
def round_decoder(model: Qwen2_5_VLForConditionalGeneration) -> None:
    """Rounds every linear weight of the decoder's blocks to the nearest of 16 values between its group's ends."""
    for module in model.model.language_model.layers.modules():
        if isinstance(module, nn.Linear):
            groups = module.weight.view(-1, GROUP)
            low = groups.amin(1, keepdim=True).clamp(max=0)
            scale = (groups.amax(1, keepdim=True).clamp(min=0) - low).clamp(min=1e-8) / 15
            zero = (-low / scale).round()
            rounded = ((groups / scale + zero).round().clamp(0, 15) - zero) * scale
            module.weight.copy_(rounded.view_as(module.weight))


def measure(name: str, model: Qwen2_5_VLForConditionalGeneration, arguments: argparse.Namespace) -> None:
    """Prints accuracy and perplexity of one state of the model."""
    processor = Qwen2_5_VLProcessor.from_pretrained(arguments.model)
    asked = read_questions(arguments.questions)
    found = generate(model, processor, asked)
    shown = " ".join(f"{key} {share:.4f}" for key, share in accuracy(found, asked).items())
    print(f"{name}: {shown}", flush=True)
    wrong = Counter((one.question, one.answer, answer) for one, answer in zip(asked, found, strict=True) if answer != one.answer)
    for (question, right, answer), _ in wrong.most_common(8):
        print(f"{name}:   {question} {right}, not {answer}", flush=True)
    for file in arguments.text:
        print(f"{name}: perplexity on {file.name} {perplexity(model, processor, file.read_text()):.3f}", flush=True)


def main() -> None:
    """Measures the model named on the command line."""
    parser = argparse.ArgumentParser(description="Measure a demo model.")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--questions", type=Path, required=True, help="parquet file written by scenes.py")
    parser.add_argument("--text", type=Path, nargs="*", default=[])
    arguments = parser.parse_args()
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(arguments.model, dtype=torch.float32).eval()
    measure("saved", model, arguments)
    asked = read_questions(arguments.questions)
    moved = [Asked(other.image, one.question, one.answer) for one, other in zip(asked, asked[2:] + asked[:2], strict=True)]
    processor = Qwen2_5_VLProcessor.from_pretrained(arguments.model)
    shown = " ".join(f"{key} {share:.4f}" for key, share in accuracy(generate(model, processor, moved), moved).items())
    print(f"with other images: {shown}", flush=True)
    round_decoder(model)
    measure("rounded to 4 bits", model, arguments)


if __name__ == "__main__":
    main()
