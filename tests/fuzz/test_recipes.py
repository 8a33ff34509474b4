"""Recipes that a stranger wrote: planned with, and overridden on the command line; nothing breaks or hangs."""

from __future__ import annotations

import copy
import json
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz.checkpoints import HOSTILE, TEXTS
from tests.fuzz.harness import Harness, Outcome, cases, drawn, make_decoys
from tests.jobs import Job, content, make_job

SEEDED, DRAWN = 420, 80
"""How many recipes are made from seeds, and how many Hypothesis draws: 500."""

WIDE = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + before] * 9)}]\n" for before, name in zip("abcdefghi", "bcdefghij", strict=True)
)
CORPUS: tuple[bytes, ...] = (
    *TEXTS,
    WIDE.encode(),
    WIDE.replace("[x", "{<<: [").encode(),
    b"a: &a [*a]\n",
    b"a: &a {b: *a}\n",
    b"&a *a\n",
    b"name: a\nname: b\n",
    b"? [a, b]\n: c\n",
    b"? {a: b}\n: c\n",
    b"1: a\ntrue: b\n2024-01-01: c\nnull: d\n",
    b"name: 2024-13-45\n",
    b"name: !!python/object/apply:os.system ['touch /tmp/owned']\n",
    b"name: !!binary x\n",
    b"name: !!set {a, b}\n",
    b"name: !!timestamp x\n",
    b"name: !!int x\n",
    b"name: !!float .inf.\n",
    b"name: .inf\nmodel: .nan\n",
    b'name: "\\ud800"\n',
    b'name: "\\0"\n',
    b"name: " + b"9" * 5000 + b"\n",
    b"name: 0x" + b"f" * 60_000 + b"\n",
    b"name: 1" + b":59" * 20_000 + b"\n",
    b"<<: 7\n",
    b"<<: [7]\n",
    b"%YAML 9.9\n---\na: b\n",
    b"a: |\n" + b"  x\n" * 60_000,
    b"--- a\n--- b\n",
    b"- " * 100_000,
    b"a:\n" + b"".join(b" " * depth + b"a:\n" for depth in range(1, 400)),
    "name: \u202e\x85".encode(),
    b"name: \x1b[2J\n",
    b"x" * 300_000,
)


def places(value: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """Collect each place of a recipe: its container and the key in it."""
    rows: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        rows = list(cast("dict[Any, Any]", value).items())
    elif isinstance(value, list):
        rows = list(enumerate(cast("list[Any]", value)))
    for key, item in rows:
        found.append((cast("Any", value), key))
        places(item, found)
    return found


def change(recipe: dict[str, Any], chance: random.Random) -> dict[str, Any]:
    """Return a recipe in which one to three places hold something else, are gone, or stand elsewhere too."""
    changed = copy.deepcopy(recipe)
    for _ in range(chance.randrange(1, 4)):
        found = places(changed, [])
        if not found:
            break
        container, key = chance.choice(found)
        kind = chance.randrange(5)
        if kind == 0:
            del container[key]
        elif kind == 1:
            source, other = chance.choice(found)
            container[key] = copy.deepcopy(source[other])
        elif kind == 2 and isinstance(container, dict):
            container[chance.choice(["extra", "stage", "source", "task", "layout", "tasks", "\x1b[2J", "a.b", ""])] = container.pop(
                key
            )
        else:
            container[key] = chance.choice([*HOSTILE, float("inf"), float("nan"), "~/x", "$HOME", "hf://a/b", 0.1, "auto", 128])
    return changed


@dataclass(frozen=True)
class Ground:
    """A sound recipe with all it reads, and where changed ones are written."""

    job: Job
    harness: Harness

    def attempt(self, text: bytes, *more: str) -> list[str]:
        """Plan with a recipe; return what it must not do and does."""
        path = self.job.folder / "changed.yaml"
        path.write_bytes(text)
        shutil.rmtree(self.job.store, ignore_errors=True)
        outcome = self.harness.command("plan", path, "--store", self.job.store, "--json", *more)
        return self.judge(outcome)

    def judge(self, outcome: Outcome) -> list[str]:
        """Return the faults of one command, what it printed last with them."""
        faults = outcome.faults({0, 2, 3}, [self.job.folder])
        if "\x1b[2J" in outcome.stderr:
            faults.append("it steers the terminal")
        try:
            json.loads(outcome.stdout)
        except ValueError:
            faults.append(f"standard output is no JSON: {outcome.stdout[:200]!r}")
        return [f"{fault} … {outcome.stderr[-1500:]}" for fault in faults]


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    folder = tmp_path_factory.mktemp("ground")
    job = make_job(folder / "job", layers=1, vision_blocks=1)
    decoys = make_decoys(folder / "decoys")
    with Harness(
        ["compress.cli.main", "compress.pipeline.plan", "compress.engine.derive.derived", "huggingface_hub.hf_api"], decoys
    ) as harness:
        yield Ground(job, harness)
        print(f"\nrecipes: {harness.tally}")  # noqa: T201 - the figures of make fuzz


def test_the_sound_recipe_is_planned(ground: Ground) -> None:
    assert ground.attempt(ground.job.recipe.read_bytes()) == []
    assert ground.harness.tally.codes == {0: 1}


@pytest.mark.parametrize("number", range(len(CORPUS)))
def test_every_recipe_of_the_corpus(ground: Ground, number: int) -> None:
    assert ground.attempt(CORPUS[number]) == []


@pytest.mark.parametrize(
    "setting",
    [
        "a=*b",
        "name=\ud800",
        "name=\x1b[2J",
        "stages.0.bits=" + "9" * 5000,
        "model.source=a\0b",
        "=",
        "a",
        "...=1",
        "stages.-1=2",
        "x=" + "[" * 9000,
    ],
)
def test_every_override_of_the_corpus(ground: Ground, setting: str) -> None:
    assert ground.attempt(ground.job.recipe.read_bytes(), "--set", setting) == []


@pytest.mark.slow
@pytest.mark.timeout(14400)
def test_recipes_from_seeds(ground: Ground) -> None:
    sound = content(ground.job)
    found: list[str] = []
    for number in range(cases(SEEDED)):
        chance = random.Random(number)
        text = yaml.safe_dump(change(sound, chance), sort_keys=False).encode("utf-8", "surrogatepass")
        if number % 5 == 0 and text:
            data = bytearray(text)
            for _ in range(chance.randrange(1, 6)):
                data[chance.randrange(len(data))] = chance.randrange(256)
            text = bytes(data)
        found += [f"seed {number}: {fault}" for fault in ground.attempt(text)]
    assert found == []


@pytest.mark.slow
@pytest.mark.timeout(14400)
@drawn(DRAWN)
@given(
    place=st.sampled_from(["name", "model", "stages", "export", "eval", "gate", "calibration", "publish", "other"]),
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.sampled_from(["awq", "vllm", "vqa"]),
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.dictionaries(st.text(max_size=12) | st.sampled_from(["stage", "bits"]), inner, max_size=4)
        ),
        max_leaves=12,
    ),
)
def test_recipes_that_hypothesis_draws(ground: Ground, place: str, value: Any) -> None:
    text = yaml.safe_dump({**content(ground.job), place: value}).encode("utf-8", "surrogatepass")
    assert ground.attempt(text) == []
