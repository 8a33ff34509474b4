"""A whole recipe on tiny things: a random model, text and questions made here; small enough to run in seconds."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.tiny import build_qwen2_5_vl, picture

WORDS = ("red", "green", "blue", "circle", "square", "star", "one", "two", "three", "big", "small", "left", "above", "near", "old")


def sentences(first: int, count: int) -> str:
    """Return paragraphs of text, in which no words in a row are the same for other numbers."""
    lines: list[str] = []
    for number in range(first, first + count):
        words = random.Random(number).choices(WORDS, k=24)
        lines.append(f"Sentence number {number} says " + " ".join(words) + ".")
    return "\n\n".join(lines) + "\n"


def write_questions(folder: Path, name: str, seeds: range) -> Path:
    """Write a JSONL file of questions about random pictures, one each."""
    (folder / "images").mkdir(exist_ok=True)
    rows: list[dict[str, str]] = []
    for seed in seeds:
        (folder / "images" / f"{seed}.png").write_bytes(picture(seed))
        rows.append({"id": f"q{seed}", "image": f"images/{seed}.png", "question": f"What is in picture {seed}?", "answer": "red"})
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@dataclass(frozen=True)
class Job:
    """A recipe in a folder of its own, with where its runs and store go."""

    folder: Path

    @property
    def recipe(self) -> Path:
        return self.folder / "recipe.yaml"

    @property
    def runs(self) -> Path:
        return self.folder / "runs"

    @property
    def store(self) -> Path:
        return self.folder / "store"

    @property
    def published(self) -> Path:
        return self.folder / "published"

    def arguments(self, *more: str) -> list[str]:
        return ["run", str(self.recipe), "--runs", str(self.runs), "--store", str(self.store), *more]

    def places(self) -> dict[str, Any]:
        return {"runs": self.runs, "store": self.store}


def make_job(folder: Path, **sizes: Any) -> Job:
    """Build a model, data and a recipe whose gate it passes."""
    folder.mkdir(parents=True, exist_ok=True)
    build_qwen2_5_vl(folder / "model", **sizes)
    (folder / "calibration.txt").write_text(sentences(0, 60), encoding="utf-8")
    (folder / "test.txt").write_text(sentences(1000, 30), encoding="utf-8")
    write_questions(folder, "calibration.jsonl", range(100, 104))
    write_questions(folder, "test.jsonl", range(200, 206))
    job = Job(folder)
    job.recipe.write_text(yaml.safe_dump(content(job)), encoding="utf-8")
    return job


def content(job: Job) -> dict[str, Any]:
    """Return the recipe as plain data."""
    return {
        "name": "tiny",
        "model": {"source": "model"},
        "calibration": {
            "seed": 0,
            "sets": [
                {"dataset": "text", "source": "calibration.txt", "samples": 4, "tokens": 32},
                {"dataset": "vqa", "source": "calibration.jsonl", "samples": 4},
            ],
        },
        "stages": [{"stage": "awq", "bits": 4, "group_size": 32, "grid": 4}],
        "export": [{"format": "vllm", "layout": "awq"}, {"format": "vllm", "layout": "compressed-tensors"}],
        "eval": {
            "runtime": {"runtime": "transformers"},
            "tasks": [
                {"task": "vqa", "definition": "scenes", "source": "test.jsonl"},
                {"task": "perplexity", "dataset": "text", "source": "test.txt", "window": 32},
            ],
        },
        "gate": {"perplexity": {"max_ratio": 2.0, "confidence": 0.95}, "size": {"max_ratio": 0.9}},
        "publish": {"to": str(job.published)},
    }
