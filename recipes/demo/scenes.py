"""Scenes for the demo model: one to five equal shapes of one colour, drawn with Pillow, and questions about them.

    python recipes/demo/scenes.py --out scenes --split train --questions 100 --seed 1
    python recipes/demo/scenes.py --out test.parquet --format parquet --split test --questions 400 --seed 2
    python recipes/demo/scenes.py --text test.txt --characters 40000 --split test --seed 3

A scene belongs to the one split that the digest of its description names, and so does a paragraph of text: whatever
the seeds, no two splits share either.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import grammar
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw
from splits import SPLITS, Split, split_of, written_aside

Colour = Literal["red", "green", "blue", "yellow", "purple", "orange"]
Kind = Literal["circle", "square", "triangle", "star", "cross"]
Topic = Literal["colour", "shape", "count", "yes/no"]
RGB = tuple[int, int, int]

SIZE = 112  # pixels: 8 x 8 patches of 14, hence 16 image tokens
SCALE = 4  # scenes are drawn this much larger and reduced, so that their edges are smooth
MARGIN = 3  # pixels kept free around a shape
COLOURS: dict[Colour, RGB] = {
    "red": (215, 40, 40),
    "green": (45, 165, 70),
    "blue": (45, 85, 215),
    "yellow": (235, 205, 40),
    "purple": (140, 60, 175),
    "orange": (240, 130, 30),
}
KINDS: tuple[Kind, ...] = get_args(Kind)
TOPICS: tuple[Topic, ...] = get_args(Topic)
NUMBERS = ("one", "two", "three", "four", "five")
PLURALS: dict[Kind, str] = {
    "circle": "circles",
    "square": "squares",
    "triangle": "triangles",
    "star": "stars",
    "cross": "crosses",
}


@dataclass(frozen=True)
class Placement:
    """Where one shape lies: its centre and outer radius in pixels, its turn in degrees."""

    x: float
    y: float
    radius: float
    angle: float


@dataclass(frozen=True)
class Scene:
    """A picture before it is drawn: one kind of shape, one colour, a plain background."""

    kind: Kind
    colour: Colour
    paint: RGB
    background: RGB
    placements: tuple[Placement, ...]

    @property
    def count(self) -> int:
        """How many shapes there are, 1 to 5."""
        return len(self.placements)

    @property
    def split(self) -> Split:
        """The only split this scene may be used in."""
        return split_of(repr(self))


@dataclass(frozen=True)
class Question:
    """A question about a scene and its answer, one lowercase word."""

    topic: Topic
    text: str
    answer: str


@dataclass(frozen=True)
class Sample:
    """A question with its scene, and the name it has in a data set."""

    name: str
    scene: Scene
    question: Question


def draw_scene(rng: random.Random, kind: Kind, colour: Colour, count: int) -> Scene:
    """Places `count` shapes that do not overlap, with random size, turn, tint and background."""
    light = rng.random() < 0.5
    shade = rng.randint(200, 250) if light else rng.randint(10, 60)
    background = _jitter(rng, (shade, shade, shade), 5)
    paint = _jitter(rng, COLOURS[colour], 14)
    while True:
        size = rng.uniform(10.5, 17.0)
        placements = _place(rng, count, size)
        if placements is not None:
            return Scene(kind, colour, paint, background, placements)


def scenes(split: Split, seed: int) -> Iterator[Scene]:
    """Endless scenes of a split; every kind, colour and count is equally frequent."""
    rng = random.Random(f"scenes {split} {seed}")
    seen: set[Scene] = set()
    while True:
        kind, colour = rng.choice(KINDS), rng.choice(tuple(COLOURS))
        scene = draw_scene(rng, kind, colour, rng.randint(1, len(NUMBERS)))
        if scene.split == split and scene not in seen:
            seen.add(scene)
            yield scene


def render(scene: Scene) -> Image.Image:
    """Draws a scene, 112 x 112 pixels, RGB."""
    image = Image.new("RGB", (SIZE * SCALE, SIZE * SCALE), scene.background)
    canvas = ImageDraw.Draw(image)
    for placement in scene.placements:
        x, y, radius = placement.x * SCALE, placement.y * SCALE, placement.radius * SCALE
        if scene.kind == "circle":
            radius *= 0.9  # about the area of the other shapes: size must not give the kind away
            canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=scene.paint)
        else:
            outline = _outline(scene.kind)
            points = [_turned(px * radius, py * radius, placement.angle) for px, py in outline]
            canvas.polygon([(x + px, y + py) for px, py in points], fill=scene.paint)
    return image.reduce(SCALE)


def ask(rng: random.Random, scene: Scene, topic: Topic) -> Question:
    """A question of a topic in one of several wordings; yes and no are equally frequent."""
    shapes = PLURALS[scene.kind] if scene.count > 1 else scene.kind
    if topic == "colour":
        return Question(topic, rng.choice(_colour_wordings(scene, shapes)), scene.colour)
    if topic == "shape":
        return Question(topic, rng.choice(_shape_wordings(scene)), scene.kind)
    if topic == "count":
        wordings = (
            "How many shapes are there?",
            "How many shapes do you see?",
            f"How many {PLURALS[scene.kind]} are there?",
            f"How many {scene.colour} {PLURALS[scene.kind]} are there?",
            f"Count the {PLURALS[scene.kind]}.",
            "Count the shapes in the picture.",
        )
        return Question(topic, rng.choice(wordings), NUMBERS[scene.count - 1])
    return _ask_yes_or_no(rng, scene)


def samples(split: Split, seed: int, count: int) -> list[Sample]:
    """`count` questions, each about a scene of its own; the topics take turns."""
    rng = random.Random(f"questions {split} {seed}")
    source = scenes(split, seed)
    found: list[Sample] = []
    for index in range(count):
        scene = next(source)
        question = ask(rng, scene, TOPICS[index % len(TOPICS)])
        found.append(Sample(f"{split}-{seed}-{index:05d}", scene, question))
    return found


def png(scene: Scene) -> bytes:
    """The scene as a PNG file's bytes."""
    buffer = io.BytesIO()
    render(scene).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def write_folder(folder: Path, found: list[Sample]) -> None:
    """Writes `questions.jsonl` with id, image, question, answer, and the images beside it."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    lines: list[str] = []
    for sample in found:
        image = f"images/{sample.name}.png"
        written_aside(folder / image, png(sample.scene))
        row = {"id": sample.name, "image": image, **_text(sample)}
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    written_aside(folder / "questions.jsonl", "".join(lines).encode())


def write_parquet(file: Path, found: list[Sample]) -> None:
    """Writes one parquet file with id, image (a struct of bytes and path, as data sets on the hub), question, answer."""
    arrow: Any = pa
    image = arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())])
    features = {name: {"dtype": "string", "_type": "Value"} for name in ("id", "question", "answer")}
    info = {"info": {"features": {**features, "image": {"_type": "Image"}}}}
    columns = [("id", arrow.string()), ("image", image), ("question", arrow.string()), ("answer", arrow.string())]
    schema = arrow.schema(columns, metadata={"huggingface": json.dumps(info)})
    rows = [
        {"id": sample.name, "image": {"bytes": png(sample.scene), "path": f"{sample.name}.png"}, **_text(sample)}
        for sample in found
    ]
    buffer = io.BytesIO()
    pq.write_table(arrow.Table.from_pylist(rows, schema=schema), buffer)
    written_aside(file, buffer.getvalue())


def _text(sample: Sample) -> dict[str, str]:
    return {"question": sample.question.text, "answer": sample.question.answer}


def _jitter(rng: random.Random, colour: RGB, spread: int) -> RGB:
    red, green, blue = (min(255, max(0, part + rng.randint(-spread, spread))) for part in colour)
    return red, green, blue


def _place(rng: random.Random, count: int, size: float) -> tuple[Placement, ...] | None:
    """Shapes of about one size, each clear of the others and of the edge; None where they do not fit."""
    placements: list[Placement] = []
    for _ in range(60):
        radius = size * rng.uniform(0.9, 1.1)
        low, high = radius + MARGIN, SIZE - radius - MARGIN
        x, y = rng.uniform(low, high), rng.uniform(low, high)
        if all(math.hypot(x - p.x, y - p.y) > radius + p.radius + MARGIN for p in placements):
            angle = rng.uniform(-15.0, 15.0)
            placements.append(Placement(round(x, 2), round(y, 2), round(radius, 2), round(angle, 2)))
        if len(placements) == count:
            return tuple(placements)
    return None


def _turned(x: float, y: float, degrees: float) -> tuple[float, float]:
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return x * cosine - y * sine, x * sine + y * cosine


def _outline(kind: Kind) -> list[tuple[float, float]]:
    """The corners of a shape in the unit circle, y pointing down."""
    if kind == "square":
        half = 0.78
        return [(-half, -half), (half, -half), (half, half), (-half, half)]
    if kind == "triangle":
        return [_turned(0.0, -1.0, step * 120.0) for step in range(3)]
    if kind == "star":
        return [_turned(0.0, -1.0 if step % 2 == 0 else -0.42, step * 36.0) for step in range(10)]
    arm, thin = 1.0, 0.3
    quarter = [(thin, -arm), (thin, -thin), (arm, -thin)]
    return [_turned(x, y, turn * 90.0) for turn in range(4) for x, y in quarter]


def _colour_wordings(scene: Scene, shapes: str) -> tuple[str, ...]:
    verb, thing = ("are", "shapes") if scene.count > 1 else ("is", "shape")
    return (
        f"What colour {verb} the {thing}?",
        f"What colour {verb} the {shapes}?",
        f"Which colour {'do' if scene.count > 1 else 'does'} the {thing} have?",
        f"Name the colour of the {shapes}.",
        f"Name the colour of the {thing}.",
    )


def _shape_wordings(scene: Scene) -> tuple[str, ...]:
    if scene.count == 1:
        return ("What shape is it?", "Which shape is shown?", f"What shape is the {scene.colour} thing?", "Name the shape.")
    return (
        "What shape are they?",
        "Which shape is shown?",
        f"What shape are the {scene.colour} things?",
        "Name the kind of shape.",
    )


def _ask_yes_or_no(rng: random.Random, scene: Scene) -> Question:
    """Asks after what the scene has, or after something that differs from it in what the question names."""
    yes = rng.random() < 0.5
    colour: Colour = scene.colour if yes else rng.choice([c for c in COLOURS if c != scene.colour])
    kind: Kind = scene.kind if yes else rng.choice([k for k in KINDS if k != scene.kind])
    number = scene.count if yes else rng.choice([n for n in range(1, 6) if n != scene.count])
    article = "an" if colour == "orange" else "a"
    wordings = [
        f"Is there {article} {colour} shape?",
        f"Do you see anything {colour}?",
        f"Is there a {kind}?",
        f"Do you see any {PLURALS[kind]}?",
        f"Is the number of shapes {NUMBERS[number - 1]}?",
    ]
    if not yes and rng.random() < 0.5:
        colour, article = scene.colour, "an" if scene.colour == "orange" else "a"
    elif not yes:
        kind = scene.kind
    wordings += [f"Is there {article} {colour} {kind}?", f"Do you see {article} {colour} {kind}?"]
    return Question("yes/no", rng.choice(wordings), "yes" if yes else "no")


def main() -> None:
    """Writes what the command line asks for."""
    parser = argparse.ArgumentParser(description="Write scenes with questions, or text, for the demo model.")
    parser.add_argument("--out", type=Path, help="folder, or the file where --format is parquet")
    parser.add_argument("--split", choices=SPLITS, required=True)
    parser.add_argument("--questions", type=int, default=400)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--format", choices=["jsonl", "parquet"], default="jsonl")
    parser.add_argument("--text", type=Path, help="file to write plain text of the split to")
    parser.add_argument("--characters", type=int, default=40_000)
    arguments = parser.parse_args()
    if arguments.out is None and arguments.text is None:
        parser.error("nothing to write: name --out for scenes with questions, --text for text, or both")
    if arguments.out is not None:
        found = samples(arguments.split, arguments.seed, arguments.questions)
        write = write_parquet if arguments.format == "parquet" else write_folder
        write(arguments.out, found)
    if arguments.text is not None:
        text = grammar.text(arguments.split, arguments.seed, arguments.characters)
        written_aside(arguments.text, text.encode())


if __name__ == "__main__":
    main()
