"""Trains the demo CLIP: two towers, under 6 MB, on scenes and captions drawn as it goes.

    python recipes/demo/train_clip.py --out recipes/demo/clip --seed 1

Writes `model/` and the parquet files with held-out images. In every step each image is compared with all captions there are,
with a number ("two red circles") and without ("a red circle"), which is what it is asked later. The first images are windows of
4 x 4 patches around a shape, which cost a quarter of a whole image and show as much of a shape. Linear heads on the patches, thrown
away in the end, tell which kind of shape covers each and where centres are: without them the tower is slow to see shapes.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import random
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import scenes
import torch
from splits import Split, written_aside
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

PATCH = 14
GRID = scenes.SIZE // PATCH  # patches along an edge
WINDOW = 4  # patches along an edge of a window
CONTEXT = 32  # tokens of a text at most
WORDINGS = ("{}", "a picture of {}", "a drawing of {}", "there is {} here", "{} on a plain background")
SPLIT_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
REPORT_EVERY = 50
TEST_IMAGES, CALIBRATION_IMAGES = 600, 128


@dataclass(frozen=True)
class Settings:
    """What the command line sets."""

    steps: int
    warm_steps: int
    scenes: int
    rate: float
    seed: int


@dataclass(frozen=True)
class Batch:
    """Images, whole or windows of them, with what is true of them.

    pixels: float [images, 3, edge, edge]; patches: int [images, patches], which of the 64 of a whole image they are; plain: int
    [images], the place of each one's caption without a number; counted: the same with a number; covered: int [images, patches],
    0 where no shape reaches a patch's middle, otherwise the kind counted from 1; centres: the same, 1 where a shape has its centre.
    """

    pixels: Tensor
    patches: Tensor
    plain: Tensor
    counted: Tensor
    covered: Tensor
    centres: Tensor

    def windows(self, rng: random.Random) -> Batch:
        """Of each image a window of 4 x 4 patches with the centre of one of its shapes in it."""
        corners: list[tuple[int, int]] = []
        for centres in self.centres.tolist():
            row, column = divmod(rng.choice([place for place, centre in enumerate(centres) if centre]), GRID)
            corners.append(tuple(min(max(each - rng.randint(0, 3), 0), GRID - WINDOW) for each in (row, column)))
        inside = torch.tensor(
            [[(top + row) * GRID + left + column for row in range(WINDOW) for column in range(WINDOW)] for top, left in corners]
        )
        edge = WINDOW * PATCH
        pixels = [
            image[:, top * PATCH : top * PATCH + edge, left * PATCH : left * PATCH + edge]
            for image, (top, left) in zip(self.pixels, corners, strict=True)
        ]
        covered, centres = (values.gather(1, inside) for values in (self.covered, self.centres))
        return Batch(torch.stack(pixels), inside, self.plain, self.counted, covered, centres)


def plain_captions() -> list[str]:
    """Every colour and kind: "a red circle"."""
    return [f"{'an' if colour == 'orange' else 'a'} {colour} {kind}" for colour in scenes.COLOURS for kind in scenes.KINDS]


def counted_captions() -> list[str]:
    """Every colour and kind with every number: "one red circle", "two red circles"."""
    return [
        f"{number} {colour} {kind if number == 'one' else scenes.PLURALS[kind]}"
        for colour in scenes.COLOURS
        for kind in scenes.KINDS
        for number in scenes.NUMBERS
    ]


def places(scene: scenes.Scene) -> tuple[int, int]:
    """Where a scene's captions stand among the plain and among the counted ones."""
    plain = list(scenes.COLOURS).index(scene.colour) * len(scenes.KINDS) + scenes.KINDS.index(scene.kind)
    return plain, plain * len(scenes.NUMBERS) + scene.count - 1


def patches(scene: scenes.Scene) -> tuple[list[int], list[int]]:
    """For each patch the kind, from 1, of the shape that reaches its middle, or 0; and whether a shape's centre is in it."""
    covered, centres = [0] * GRID**2, [0] * GRID**2
    for placement in scene.placements:
        centres[int(placement.y) // PATCH * GRID + int(placement.x) // PATCH] = 1
        for place in range(GRID**2):
            x, y = (place % GRID + 0.5) * PATCH, (place // GRID + 0.5) * PATCH
            if math.hypot(x - placement.x, y - placement.y) < placement.radius:
                covered[place] = scenes.KINDS.index(scene.kind) + 1
    return covered, centres


def build_tokenizer(texts: list[str]) -> CLIPTokenizer:
    """CLIP's tokenizer with the merges that these texts need, the tokens of a text's start and end last."""
    trained = Tokenizer(BPE(end_of_word_suffix="</w>"))
    trained.normalizer = normalizers.Lowercase()
    split = pre_tokenizers.Split(Regex(SPLIT_WORDS), behavior="removed", invert=True)
    trained.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = BpeTrainer(initial_alphabet=alphabet, end_of_word_suffix="</w>", min_frequency=1, show_progress=False)
    trained.train_from_iterator(texts, trainer)
    merges = [tuple(merge) for merge in json.loads(trained.to_str())["model"]["merges"]]
    tokens = [*alphabet, *(f"{byte}</w>" for byte in alphabet), *(f"{left}{right}" for left, right in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    build: Any = CLIPTokenizer  # its own annotations leave out what it takes
    return build(vocab={token: number for number, token in enumerate(tokens)}, merges=merges, model_max_length=CONTEXT)


def build_processor(tokenizer: CLIPTokenizer) -> CLIPProcessor:
    """CLIP's processor for small images."""
    images = CLIPImageProcessor(
        size={"shortest_edge": scenes.SIZE}, crop_size={"height": scenes.SIZE, "width": scenes.SIZE}, do_center_crop=True
    )
    return CLIPProcessor(image_processor=images, tokenizer=tokenizer)


def build_model(tokenizer: CLIPTokenizer) -> CLIPModel:
    """The untrained model in float32: a tower of four blocks for images, one of two for texts."""
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": CONTEXT,
        "projection_dim": 128,
        "bos_token_id": start,
        "eos_token_id": end,
        "pad_token_id": end,
    }
    vision = {
        "hidden_size": 256,
        "intermediate_size": 640,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": scenes.SIZE,
        "patch_size": PATCH,
        "projection_dim": 128,
    }
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=128))
    with torch.no_grad():
        model.vision_model.embeddings.position_embedding.weight[1:] = waves(vision["hidden_size"])
    return model


def waves(width: int) -> Tensor:
    """Where the patches are, as sines and cosines of their rows and columns, [64, width]: neighbours are alike from the start."""
    frequencies = torch.logspace(0, -2, width // 4) * math.pi / 2
    angles = torch.arange(GRID)[:, None] * frequencies
    line = torch.cat([angles.sin(), angles.cos()], dim=1)
    return 0.5 * torch.cat([line.repeat_interleave(GRID, 0), line.repeat(GRID, 1)], dim=1)


class Batches:
    """Fresh scenes without end, the same for the same seed, and all captions in a random wording."""

    def __init__(self, processor: CLIPProcessor, seed: int, split: Split = "train") -> None:
        self.tokenizer = processor.tokenizer
        self.mean = torch.tensor(processor.image_processor.image_mean)
        self.deviation = torch.tensor(processor.image_processor.image_std)
        self.rng = random.Random(f"captions {seed}")
        self.source = scenes.scenes(split, seed)

    def scenes(self, count: int) -> Batch:
        """`count` scenes."""
        found = [next(self.source) for _ in range(count)]
        pixels = torch.from_numpy(np.stack([np.asarray(scenes.render(scene)) for scene in found]))
        values = (pixels.float() / 255.0 - self.mean) / self.deviation
        captions = torch.tensor([places(scene) for scene in found])
        cells = [patches(scene) for scene in found]
        covered, centres = (torch.tensor(part) for part in zip(*cells, strict=True))
        whole = torch.arange(GRID**2).expand(count, -1)
        return Batch(values.permute(0, 3, 1, 2).contiguous(), whole, captions[:, 0], captions[:, 1], covered, centres)

    def texts(self, captions: list[str]) -> dict[str, Tensor]:
        """Every caption in a random wording, as the text tower takes it."""
        worded = [self.rng.choice(WORDINGS).format(caption) for caption in captions]
        return dict(self.tokenizer(worded, padding=True, return_tensors="pt"))


def see(model: CLIPModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """The image tower over windows as over whole images: the embeddings [images, 128] and the patches [images, patches, 256]."""
    tower: Any = model.vision_model
    patches = tower.embeddings.patch_embedding(batch.pixels).flatten(2).transpose(1, 2)
    positions = tower.embeddings.position_embedding.weight
    first = (tower.embeddings.class_embedding + positions[0]).expand(len(patches), 1, -1)
    value = tower.pre_layrnorm(torch.cat([first, patches + positions[1:][batch.patches]], dim=1))
    value = tower.encoder(inputs_embeds=value).last_hidden_state
    return model.visual_projection(tower.post_layernorm(value[:, 0])), value[:, 1:]


class Optimizers:
    """Muon (a step as long in every direction of a matrix) for the blocks, Adam for the rest; rates rise, then fall as a cosine."""

    def __init__(self, modules: list[nn.Module], steps: int, rate: float) -> None:
        named = [(name, weight) for module in modules for name, weight in module.named_parameters()]
        matrices = [weight for name, weight in named if ".layers." in name and weight.ndim == 2]
        others = [weight for name, weight in named if ".layers." not in name or weight.ndim < 2]
        self.weights = [weight for _, weight in named]
        self.each: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, lr=rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.05),
        ]
        rates = torch.optim.lr_scheduler.OneCycleLR
        self.schedules = [rates(one, rate, steps, pct_start=0.05, cycle_momentum=False) for one in self.each]

    def advance(self, loss: Tensor) -> None:
        """One step, the gradient clipped to norm 1."""
        for weight in self.weights:
            weight.grad = None
        loss.backward()
        nn.utils.clip_grad_norm_(self.weights, 1.0)
        for optimizer, schedule in zip(self.each, self.schedules, strict=True):
            optimizer.step()
            schedule.step()


def train(model: CLIPModel, batches: Batches, settings: Settings) -> None:
    """Teaches both towers, first on windows of images, which cost little, then on whole ones."""
    heads = nn.Linear(model.config.vision_config.hidden_size, len(scenes.KINDS) + 3)
    for part, steps in (("windows", settings.warm_steps), ("images", settings.steps)):
        optimizers, started = Optimizers([model, heads], steps, settings.rate), time.monotonic()
        for step in range(steps):
            if part == "windows":
                found = batches.scenes(2 * settings.scenes).windows(batches.rng)
            else:
                found = batches.scenes(settings.scenes)
            loss, shown = losses(model, heads, found, batches)
            optimizers.advance(loss)
            if step % REPORT_EVERY == 0 or step == steps - 1:
                words = " ".join(f"{name} {value:.3f}" for name, value in shown.items())
                print(f"{part} {step + 1} {time.monotonic() - started:.0f} s {words}", flush=True)


def losses(model: CLIPModel, heads: nn.Module, batch: Batch, batches: Batches) -> tuple[Tensor, dict[str, float]]:
    """What is to become small for a batch, and figures that tell how far the model is."""
    plain, counted, kinds = plain_captions(), counted_captions(), len(scenes.KINDS) + 1
    with torch.autocast("cpu", torch.bfloat16):
        images, patches = see(model, batch)
        captions = model.text_projection(model.text_model(**batches.texts(plain + counted)).pooler_output)
        covered, centres = heads(patches).float().flatten(0, 1).split((kinds, 2), dim=1)
    cosines = functional.normalize(images.float(), dim=-1) @ functional.normalize(captions.float(), dim=-1).t()
    named, numbered = (model.logit_scale.exp() * cosines).split((len(plain), len(counted)), dim=1)
    truth, marked = batch.covered.flatten(), batch.centres.flatten()
    loss = functional.cross_entropy(named, batch.plain) + 2 * functional.cross_entropy(covered, truth)
    if batch.pixels.shape[-1] == scenes.SIZE:  # a window does not show how many shapes there are
        loss = loss + functional.cross_entropy(numbered, batch.counted) / 2
    shown = {
        "loss": loss.item(),
        "captions": _share(named, batch.plain),
        "counted": _share(numbered, batch.counted),
        "patches": _share(covered[truth > 0], truth[truth > 0]),
        "centres": _share(centres[marked > 0], marked[marked > 0]),
    }
    return loss + 2 * functional.cross_entropy(centres, marked), shown


def _share(guesses: Tensor, truth: Tensor) -> float:
    return (guesses.argmax(1) == truth).float().mean().item()


def write_parquet(file: Path, split: Split, seed: int, count: int) -> None:
    """Writes images of a split with id, image (a struct of bytes and path), label (without a number), caption (with one)."""
    arrow: Any = pa
    plain, counted = plain_captions(), counted_captions()
    texts = ("id", "label", "caption")
    info = {"info": {"features": {**{name: {"dtype": "string", "_type": "Value"} for name in texts}, "image": {"_type": "Image"}}}}
    image = arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())])
    columns = [("id", arrow.string()), ("image", image), ("label", arrow.string()), ("caption", arrow.string())]
    rows: list[dict[str, Any]] = []
    source = scenes.scenes(split, seed)
    for number in range(count):
        scene, name = next(source), f"{split}-{seed}-{number:05d}"
        label, caption = (captions[place] for captions, place in zip((plain, counted), places(scene), strict=True))
        picture = {"bytes": scenes.png(scene), "path": f"{name}.png"}
        rows.append({"id": name, "image": picture, "label": label, "caption": caption})
    buffer = io.BytesIO()
    schema = arrow.schema(columns, metadata={"huggingface": json.dumps(info)})
    pq.write_table(arrow.Table.from_pylist(rows, schema=schema), buffer)
    written_aside(file, buffer.getvalue())


@torch.no_grad()
def accuracy(model: CLIPModel, processor: CLIPProcessor, seed: int) -> tuple[float, float]:
    """The share of held-out images whose caption is the likeliest, without and with a number."""
    net, found = cast("Any", model), Batches(processor, seed, "test").scenes(TEST_IMAGES)
    images = functional.normalize(net.get_image_features(pixel_values=found.pixels).pooler_output, dim=-1)
    shares: list[float] = []
    for captions, truth in ((plain_captions(), found.plain), (counted_captions(), found.counted)):
        tokens = processor.tokenizer(captions, padding=True, return_tensors="pt")
        texts = functional.normalize(net.get_text_features(**tokens).pooler_output, dim=-1)
        shares.append(((images @ texts.t()).argmax(1) == truth).float().mean().item())
    return shares[0], shares[1]


def save(model: CLIPModel, processor: CLIPProcessor, folder: Path) -> None:
    """Writes the model in float16 in Hugging Face layout, aside and then into place."""
    aside = folder.with_name(f".{folder.name}.aside")
    shutil.rmtree(aside, ignore_errors=True)
    model.half().save_pretrained(aside)
    processor.save_pretrained(aside)
    (aside / "model.safetensors").chmod(0o644)
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)


def main() -> None:
    """Trains and writes the model, and the images it is calibrated and measured on."""
    parser = argparse.ArgumentParser(description="Train the demo CLIP.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model and its data")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--warm-steps", type=int, default=1200, help="steps on windows of images")
    parser.add_argument("--scenes", type=int, default=32, help="scenes in a step")
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    settings = Settings(steps=given.steps, warm_steps=given.warm_steps, scenes=given.scenes, rate=given.rate, seed=given.seed)
    torch.manual_seed(settings.seed)
    torch.use_deterministic_algorithms(True)
    tokenizer = build_tokenizer([word.format(caption) for word in WORDINGS for caption in plain_captions() + counted_captions()])
    processor, model = build_processor(tokenizer), build_model(tokenizer)
    print(f"{sum(weight.numel() for weight in model.parameters())} parameters, {len(tokenizer)} tokens", flush=True)
    with sdpa_kernel(SDPBackend.MATH):  # on a CPU the backward pass of the fused kernel takes far longer
        train(model, Batches(processor, settings.seed), settings)
    save(model, processor, given.out / "model")
    write_parquet(given.out / "test.parquet", "test", 2, TEST_IMAGES)
    write_parquet(given.out / "calibration.parquet", "calibration", 3, CALIBRATION_IMAGES)
    plain, counted = accuracy(model.float().eval(), processor, 4)
    print(f"held-out images right: {plain:.3f} of {len(plain_captions())} captions, {counted:.3f} of {len(counted_captions())}")


if __name__ == "__main__":
    main()
