"""Trains the demo model: Qwen2.5-VL's architecture, under 6 MB, on scenes and text drawn as it goes.

    python recipes/demo/train.py --out recipes/demo/model --text wiki.valid.tokens --seed 1

First the vision tower alone learns to find shapes and to name kind and colour, then the whole model learns to answer, with
a text batch in every step. Two linear heads help and are thrown away: one on the image tokens in the first part, one in
the middle of the decoder that tells whether a word of a question is true of the scene. Without it the model names what it
sees but is slow to find out what yes and no mean.
"""

from __future__ import annotations

import argparse
import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import build
import grammar
import scenes
import torch
from batches import ASKED, IGNORED, Batches, SceneBatch, text_batches
from network import Network, check
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

TEXT_CHARACTERS = 6_000_000
TEXT_ROWS, TEXT_LENGTH = 6, 192
REPORT_EVERY = 50


@dataclass(frozen=True)
class Settings:
    """What the command line sets."""

    steps: int
    warm_steps: int
    warm_scenes: int
    scenes: int
    rate: float
    vision_rate: float
    seed: int


class Schedule:
    """Rises for a twentieth of the steps, then falls as a cosine to nothing."""

    def __init__(self, optimizer: torch.optim.Optimizer, steps: int) -> None:
        self.optimizer, self.steps = optimizer, steps
        self.peaks: list[float] = [group["lr"] for group in optimizer.param_groups]

    def at(self, step: int) -> None:
        """Sets the rates for a step."""
        rising = max(1, self.steps // 20)
        if step < rising:
            share = (step + 1) / rising
        else:
            share = 0.5 + 0.5 * math.cos(math.pi * (step - rising) / max(1, self.steps - rising))
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * share


def warm_vision(network: Network, batches: Batches, settings: Settings) -> None:
    """Teaches the vision tower, through linear heads, which kind of shape has its centre in each image token, and the colour."""
    sizes = (len(scenes.COLOURS), len(scenes.KINDS) + 1)
    heads = nn.Linear(network.width, sum(sizes))
    weights = [*network.model.model.visual.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=settings.vision_rate, betas=(0.9, 0.98), weight_decay=0.02)
    schedule, started = Schedule(optimizer, settings.warm_steps), time.monotonic()
    for step in range(settings.warm_steps):
        schedule.at(step)
        batch = batches.scenes(settings.warm_scenes)
        with torch.autocast("cpu", torch.bfloat16):
            colours, kinds = heads(network.vision(batch.patches)).float().split(sizes, dim=2)
        colour_loss = functional.cross_entropy(colours.mean(1), batch.colours)
        cell_loss = functional.cross_entropy(kinds.flatten(0, 1), batch.cells.flatten())
        advance(optimizer, colour_loss + 4 * cell_loss, weights)
        if step % REPORT_EVERY == 0 or step == settings.warm_steps - 1:
            filled = batch.cells > 0
            right = (kinds.argmax(2) == batch.cells)[filled].float().mean().item()
            apart = ((kinds.argmax(2) > 0) == filled).float().mean().item()
            colour = (colours.mean(1).argmax(1) == batch.colours).float().mean().item()
            report("vision", step, started, f"loss {cell_loss.item():.3f} colour {colour:.2f} kind {right:.2f} place {apart:.3f}")


def train(network: Network, batches: Batches, streams: list[list[int]], settings: Settings) -> None:
    """Teaches the whole model to answer and to read."""
    visual = list(network.model.model.visual.parameters())
    known = {id(weight) for weight in visual}
    rest = [weight for weight in network.model.parameters() if id(weight) not in known]
    truth = nn.Linear(network.width, 2)
    rest += truth.parameters()
    groups = [{"params": visual, "lr": settings.rate / 4}, {"params": rest, "lr": settings.rate}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.05)
    schedule, started = Schedule(optimizer, settings.steps), time.monotonic()
    windows = text_batches(streams, TEXT_ROWS, TEXT_LENGTH, settings.seed)
    for step in range(settings.steps):
        schedule.at(step)
        batch, tokens = batches.scenes(settings.scenes), next(windows)
        with torch.autocast("cpu", torch.bfloat16):
            middle, last = network.hidden(batch)
            logits = network.model.lm_head(last[batch.labels != IGNORED])
            guesses = truth(middle[batch.matches != IGNORED])
            read = network.text(tokens[:, :-1])
        answering = functional.cross_entropy(logits.float(), batch.labels[batch.labels != IGNORED])
        reading = functional.cross_entropy(read.flatten(0, 1).float(), tokens[:, 1:].flatten())
        matching = functional.cross_entropy(guesses.float(), batch.matches[batch.matches != IGNORED])
        advance(optimizer, answering + 0.5 * matching + 0.2 * reading, visual + rest)
        if step % REPORT_EVERY == 0 or step == settings.steps - 1:
            shown = " ".join(f"{topic} {share:.2f}" for topic, share in right_by_topic(logits, batch).items())
            report(
                "model",
                step,
                started,
                f"answers {answering.item():.3f} truth {matching.item():.3f} text {reading.item():.3f} {shown}",
            )


def advance(optimizer: torch.optim.Optimizer, loss: Tensor, weights: list[nn.Parameter]) -> None:
    """One step of the optimizer, the gradient clipped to norm 1."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(weights, 1.0)
    optimizer.step()


def right_by_topic(logits: Tensor, batch: SceneBatch) -> dict[str, float]:
    """Share of questions whose every answer token is the likeliest, by topic."""
    labelled = batch.labels != IGNORED
    hit = torch.ones_like(labelled)
    hit[labelled] = logits.argmax(-1) == batch.labels[labelled]
    shares = cast("list[float]", hit.all(-1).float().mean(0).tolist())
    return dict(zip(ASKED, shares, strict=True))


def report(part: str, step: int, started: float, shown: str) -> None:
    """One line of progress."""
    seconds = time.monotonic() - started
    print(f"{part} step {step + 1} {seconds:.0f} s {(step + 1) / max(seconds, 1e-9):.2f} steps/s {shown}", flush=True)


def chat_texts(seed: int) -> list[str]:
    """Questions and answers as text, for the tokenizer."""
    return [f"user\n{s.question.text}\nassistant\n{s.question.answer}\n" for s in scenes.samples("train", seed, 4000)]


def compare_with_own_forward(network: Network, batches: Batches) -> None:
    """Makes sure that what is trained is what transformers runs."""
    batch = batches.scenes(2)
    segment = cast("list[int]", batch.tokens[0, -1].tolist())
    labels = cast("list[int]", batch.labels[0, -1].tolist())
    first = next(place for place, label in enumerate(labels) if label != IGNORED)
    image = [network.model.config.image_token_id] * (batches.layout.prefix - len(batches.layout.before) - 1)
    prompt = [*batches.layout.before, *image, *batches.layout.after, *segment[: first + 1]]
    check(network, batch, prompt, first)


def save(model: Qwen2_5_VLForConditionalGeneration, processor: Qwen2_5_VLProcessor, folder: Path) -> None:
    """Writes the model in bfloat16 in Hugging Face layout, aside and then into place."""
    aside = folder.with_name(f".{folder.name}.aside")
    shutil.rmtree(aside, ignore_errors=True)
    model.bfloat16().save_pretrained(aside)
    processor.save_pretrained(aside)
    (aside / "model.safetensors").chmod(0o644)
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)


def main() -> None:
    """Trains and writes the model."""
    parser = argparse.ArgumentParser(description="Train the demo model.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model")
    parser.add_argument("--text", type=Path, nargs="*", default=[], help="further text to train on")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--warm-steps", type=int, default=1500, help="steps of the vision tower alone")
    parser.add_argument("--scenes", type=int, default=32, help="scenes in a step")
    parser.add_argument("--warm-scenes", type=int, default=64, help="scenes in a step of the vision tower alone")
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--vision-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    settings = Settings(
        steps=arguments.steps,
        warm_steps=arguments.warm_steps,
        warm_scenes=arguments.warm_scenes,
        scenes=arguments.scenes,
        rate=arguments.rate,
        vision_rate=arguments.vision_rate,
        seed=arguments.seed,
    )
    torch.manual_seed(settings.seed)
    torch.use_deterministic_algorithms(True)
    own = grammar.text("train", settings.seed, TEXT_CHARACTERS)
    extra = [file.read_text() for file in arguments.text]
    tokenizer = build.build_tokenizer([own[:400_000], *(text[:400_000] for text in extra), *chat_texts(settings.seed)])
    processor = build.build_processor(tokenizer)
    model = build.build_model(tokenizer)
    batches = Batches(processor, settings.seed)
    network = Network(model, batches.layout)
    compare_with_own_forward(network, batches)
    count = sum(weight.numel() for weight in model.parameters())
    print(f"{count} parameters, {len(tokenizer)} tokens, sequences of {batches.layout.length}", flush=True)
    streams = [batches.encode(text) for text in (own, *extra)]
    with sdpa_kernel(SDPBackend.MATH):  # on a CPU the backward pass of the fused kernel takes far longer
        warm_vision(network, batches, settings)
        train(network, batches, streams, settings)
    save(model, processor, arguments.out)


if __name__ == "__main__":
    main()
