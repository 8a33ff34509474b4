"""Checkpoints that a stranger made: planned with, and where the plan takes them, compressed; nothing breaks, hangs or leaks."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz.checkpoints import CHANGES, TEMPLATES, make_checkpoint
from tests.fuzz.harness import Harness, Outcome, Tally, cases, drawn, leaked, make_decoys
from tests.jobs import sentences
from tests.tiny import build_qwen2_5_vl

SEEDED, ARTIFACTS, DRAWN = 1400, 300, 300
"""How many checkpoints are made from seeds, how many artifacts, and how many Hypothesis draws: 2,000."""

_OURS = ("case", "sound", "measured", "texts.txt", "recipe.yaml", "by.yaml")


@dataclass(frozen=True)
class Ground:
    """Where everything lies."""

    folder: Path
    harness: Harness

    @property
    def decoys(self) -> Path:
        return self.folder / "decoys"

    @property
    def model(self) -> Path:
        return self.folder / "case/model"

    def attempt(self, changes: list[tuple[str, int]]) -> list[str]:
        """Plan with a changed checkpoint and, where the plan takes it, run; return what it must not do and does."""
        case = self.folder / "case"
        shutil.rmtree(case, ignore_errors=True)
        case.mkdir()
        make_checkpoint(self.folder / "sound", self.model, self.decoys, changes)
        places = ["--store", case / "store", "--json"]
        planned = self.harness.command("plan", self.folder / "recipe.yaml", *places)
        faults = self.judge(planned, "plan", {0, 2, 3})
        if planned.code == 0 and not faults:
            run = self.harness.command("run", self.folder / "recipe.yaml", "--runs", case / "runs", *places)
            faults += self.judge(run, "run", {0, 1, 2, 3})
            faults += [f"run: a copy of a decoy at {path}" for path in leaked(self.decoys, [case / "store", case / "runs"])]
        return faults

    def attempt_artifact(self, changes: list[tuple[str, int]]) -> list[str]:
        """Evaluate a changed artifact against the sound checkpoint that it was made from; return what it must not do and does."""
        case = self.folder / "case"
        shutil.rmtree(case, ignore_errors=True)
        case.mkdir()
        make_checkpoint(self.folder / "artifact", self.model, self.decoys, changes)
        places = ["--store", self.folder / "measured", "--runs", case / "runs", "--json"]
        outcome = self.harness.command("eval", self.model, "--against", self.folder / "sound", "--by", self.by, *places)
        return self.judge(outcome, "eval", {0, 1, 2, 3})

    def judge(self, outcome: Outcome, command: str, codes: set[int]) -> list[str]:
        """Return the faults of one command, what it printed last with them."""
        faults = outcome.faults(codes, [self.folder / name for name in _OURS])
        if "\x1b[2J" in outcome.stderr or "SECRET-OF-SOMEBODY" in outcome.stdout + outcome.stderr:
            faults.append("it shows what it must not")
        try:
            told = json.loads(outcome.stdout)
        except ValueError:
            faults.append(f"standard output is no JSON: {outcome.stdout[:200]!r}")
        else:
            verdict = command in ("run", "eval") and "gate" in told
            faults += [] if verdict or outcome.code != 1 else ["exit code 1 without a verdict"]
        return [f"{command}: {fault} … {outcome.stderr[-1500:]}" for fault in faults]

    @property
    def by(self) -> Path:
        return self.folder / "by.yaml"


def seeded(number: int) -> list[tuple[str, int]]:
    """Return the changes of one case."""
    chance = random.Random(number)
    return [(chance.choice(sorted(CHANGES)), chance.randrange(10**6)) for _ in range(chance.choice([1, 1, 2, 3]))]


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    folder = tmp_path_factory.mktemp("ground")
    build_qwen2_5_vl(folder / "sound", layers=1, vision_blocks=1)
    decoys = make_decoys(folder / "decoys")
    (folder / "texts.txt").write_text(sentences(0, 4), encoding="utf-8")
    recipe: dict[str, Any] = {
        "name": "fuzz",
        "model": {"source": "case/model"},
        "stages": [{"stage": "rtn", "bits": 4, "group_size": 32, "symmetric": True}],
        "export": [{"format": "vllm", "layout": "compressed-tensors"}],
        "eval": {
            "runtime": {"runtime": "transformers"},
            "tasks": [{"task": "perplexity", "dataset": "text", "source": "texts.txt", "window": 32}],
        },
        "gate": {"perplexity": {"max_ratio": 9.0, "confidence": 0.95}},
    }
    first = {**recipe, "model": {"source": "sound"}, "publish": {"to": str(folder / "published")}}
    (folder / "first.yaml").write_text(yaml.safe_dump(first), encoding="utf-8")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    judged = {name: recipe[name] for name in ("name", "eval", "gate")}
    (folder / "by.yaml").write_text(yaml.safe_dump(judged), encoding="utf-8")
    modules = [
        "compress.cli.main", "compress.pipeline.runner", "compress.stages.quantization.quantize", "compress.export.vllm.writer",
        "compress.engine.derive.derived",
        "compress.runtimes.transformers.session", "compress.data.prompts", "transformers.models.qwen2_5_vl",
        "transformers.models.auto.processing_auto", "compress.report.html", "compress.eval.tasks.perplexity", "scipy.stats",
        "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl", "transformers.models.qwen2_5_vl.processing_qwen2_5_vl", "torchvision",
        "transformers.models.qwen2_vl.image_processing_qwen2_vl", "transformers.models.qwen2_vl.video_processing_qwen2_vl",
        "transformers.models.auto.modeling_auto", "transformers.models.auto.tokenization_auto", "torch._dynamo",
    ]  # fmt: skip
    with Harness(modules, decoys) as harness:
        store, runs = folder / "store", folder / "runs"
        made = harness.command("run", folder / "first.yaml", "--store", store, "--runs", runs)
        assert made.code == 0, made.stderr
        (published,) = (folder / "published").glob("**/compress.json")
        published.parent.rename(folder / "artifact")
        harness.tally = Tally()
        yield Ground(folder, harness)
        print(f"\ncheckpoints: {harness.tally}")  # noqa: T201 - the figures of make fuzz


def test_the_sound_checkpoint_goes_through(ground: Ground) -> None:
    assert ground.attempt([]) == []
    assert ground.attempt_artifact([]) == []
    assert ground.harness.tally.codes == {0: 3}


@pytest.mark.parametrize("template", range(len(TEMPLATES)))
def test_every_template_of_the_corpus(ground: Ground, template: int) -> None:
    seed = next(seed for seed in range(10_000) if random.Random(seed).choice(TEMPLATES) == TEMPLATES[template])
    assert ground.attempt([("template", seed)]) == []


@pytest.mark.slow
@pytest.mark.timeout(14400)
def test_checkpoints_from_seeds(ground: Ground) -> None:
    found: list[str] = []
    for number in range(cases(SEEDED)):
        changes = seeded(number)
        found += [f"{changes}: {fault}" for fault in ground.attempt(changes)]
    assert found == []


@pytest.mark.slow
@pytest.mark.timeout(14400)
def test_artifacts_from_seeds(ground: Ground) -> None:
    found: list[str] = []
    for number in range(cases(ARTIFACTS)):
        changes = seeded(10**6 + number)
        found += [f"{changes}: {fault}" for fault in ground.attempt_artifact(changes)]
    assert found == []


@pytest.mark.slow
@pytest.mark.timeout(14400)
@drawn(DRAWN)
@given(changes=st.lists(st.tuples(st.sampled_from(sorted(CHANGES)), st.integers(0, 10**6)), min_size=1, max_size=3))
def test_checkpoints_that_hypothesis_draws(ground: Ground, changes: list[tuple[str, int]]) -> None:
    assert ground.attempt(changes) == []
