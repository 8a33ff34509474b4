"""How often the gate errs: simulated evaluations of artifacts whose true loss is known.

    python benchmarks/gate_simulation.py --output benchmarks/results/gate_simulation.json

Each row is one setting of `--evaluations` simulated evaluations, at the number of items that the plan's power rule asks for:
right/wrong items, alone and three to an image whose flips are correlated, and scores as accepted-answer voting gives them (0, 0.3,
0.6, 0.9, 1), alone and one to five to an image. `at the limit`: the artifact's true mean score is exactly the limit times the
original's; at most 5 % may pass, and at most 5 % fail. `no loss`: as many items lost as gained; at most 5 % may fail, and 80 % are
planned to pass. Each with all items at once and in four looks.

`clusters` holds numbers of items fixed beforehand instead: 3 and 10 questions to an image, 100, 400 and 2,000 items, whose flips
are correlated by half or nearly wholly, at the limit. Each cell is simulated as often as the first of `--cell-evaluations` says,
and anew, as often as the next one says, until three standard errors lie between the larger rate and 5.5 %, so that the chance of
the simulation does not decide; a rate's standard error stands beside it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
import scipy
from numpy.typing import NDArray

from compress.eval.statistics.estimates import Levels
from compress.eval.statistics.paired import Pairs, decide
from compress.eval.statistics.power import POWER, AssumedChanges, AssumedFlips, items_for
from compress.eval.statistics.sequential import Sequential
from compress.files import write_json
from compress.hardware import describe

CONFIDENCE = 0.95
LOOKS = 4
SHARED = 0.5
"""The correlation of the normal variables behind what happens to two items of one image."""

VOTES = np.array([0.0, 0.3, 0.6, 0.9, 1.0])
SETTINGS = ((0.6, 0.02, 0.95), (0.6, 0.05, 0.97), (0.85, 0.02, 0.98), (0.85, 0.05, 0.97), (0.98, 0.02, 0.99), (0.98, 0.03, 0.97))
"""The original's mean score, the share of items that flip where nothing is lost, and the limit."""

Kind = Literal["right/wrong", "right/wrong, 3 per image", "right/wrong, 10 per image", "votes", "votes, 1-5 per image"]
PER_IMAGE: dict[Kind, int] = {"right/wrong, 3 per image": 3, "right/wrong, 10 per image": 10}
ITEMS = (100, 400, 2000)
CORRELATIONS = (SHARED, 0.9)
MOST = 0.055
ERRORS = 3
Truth = Literal["at the limit", "no loss"]
Floats = NDArray[np.float64]
Draw = Callable[[np.random.Generator, int], Pairs]


@dataclass(frozen=True)
class Setting:
    """One row: what the items are, the original's mean score, the share that flips where nothing is lost, and the limit."""

    kind: Kind
    score: float
    flips: float
    limit: float
    shared: float = SHARED

    def draw(self, truth: Truth, generator: np.random.Generator, items: int) -> Pairs:
        """Simulate the scores of at least so many items; whole images are drawn."""
        sizes = self._sizes(generator, items)
        clusters = np.repeat(np.arange(len(sizes)), sizes)
        levels = VOTES if self.kind.startswith("votes") else VOTES[[0, -1]]
        shares = _level_shares(levels, self.score)
        original = np.searchsorted(np.cumsum(shares)[:-1], _uniforms(generator, sizes, self.shared), side="right")
        lost, gained = _rates(levels, shares, self.flips, self.score * (1 - self.limit) if truth == "at the limit" else 0.0)
        place = original.copy()
        falls = (_uniforms(generator, sizes, self.shared) < lost) & (original > 0)
        rises = (_uniforms(generator, sizes, self.shared) < gained) & (original < len(levels) - 1) & ~falls
        step = generator.random(len(clusters))
        place[falls] = np.floor(step[falls] * original[falls]).astype(np.int64)
        room = len(levels) - 1 - original[rises]
        place[rises] = original[rises] + 1 + np.floor(step[rises] * room).astype(np.int64)
        return Pairs(levels[original], levels[place], clusters.astype(np.int64))

    def _sizes(self, generator: np.random.Generator, items: int) -> NDArray[np.int64]:
        if self.kind == "votes, 1-5 per image":
            sizes = generator.integers(1, 6, size=items)
            return sizes[: int(np.searchsorted(np.cumsum(sizes), items)) + 1]
        each = PER_IMAGE.get(self.kind, 1)
        return np.full(math.ceil(items / each), each, dtype=np.int64)

    def items(self, passing: float) -> int:
        """Return how many items the plan asks for, given what a long simulated run says of the clusters' effect and the spread."""
        pairs = self.draw("no loss", np.random.default_rng(0), 300_000)
        differences = pairs.artifact - self.limit * pairs.original
        centred = differences - differences.mean()
        design = float((np.bincount(pairs.clusters, centred) ** 2).sum() / (centred**2).sum())
        if self.kind.startswith("votes"):
            change = np.abs(np.bincount(pairs.clusters, pairs.artifact - pairs.original))
            sizes = np.bincount(pairs.clusters)
            step = float((change**2).sum() / change.sum())
            changed = float(differences.var()) / step**2
            assumed = AssumedChanges(self.score, changed, step, design, float((sizes**2).sum() / sizes.sum()))
            return _known(items_for(self.limit, passing, assumed))
        return _known(items_for(self.limit, passing, AssumedFlips(self.flips, self.score, design)))


def _known(items: int | None) -> int:
    if items is None:
        raise ValueError("no number of items resolves the limit")
    return items


def _uniforms(generator: np.random.Generator, sizes: NDArray[np.int64], shared: float) -> Floats:
    """Draw a number between 0 and 1 per item; those of one image are correlated."""
    alone = generator.standard_normal(int(sizes.sum()))
    if sizes.max() == 1:
        return scipy.special.ndtr(alone)
    image = np.repeat(generator.standard_normal(len(sizes)), sizes)
    return scipy.special.ndtr(math.sqrt(shared) * image + math.sqrt(1 - shared) * alone)


def _level_shares(levels: Floats, score: float) -> Floats:
    """Return how frequent each level is, so that the mean is `score`; most items lie at the ends."""
    if len(levels) == 2:
        return np.array([1 - score, score])
    middle = np.full(3, 0.4 * min(score, 1 - score) / 3)
    top = score - float((middle * levels[1:-1]).sum())
    return np.array([1 - top - middle.sum(), *middle, top])


def _rates(levels: Floats, shares: Floats, flips: float, loss: float) -> tuple[float, float]:
    """Return how likely an item that can fall (rise) does, so that the mean falls by `loss` and the share `flips` changes.

    Where the loss alone takes more flips than that, no item rises.
    """
    places = np.arange(len(levels))
    drops = np.array([levels[place] - levels[:place].mean() if place else 0.0 for place in places])
    climbs = np.array([levels[place + 1 :].mean() - levels[place] if place + 1 < len(levels) else 0.0 for place in places])
    can_fall, can_rise = float(shares[1:].sum()), float(shares[:-1].sum())
    drop, climb = float(shares @ drops) / can_fall, float(shares @ climbs) / can_rise
    falling = (loss + flips * climb) / (drop + climb)
    if falling > flips:
        return loss / drop / can_fall, 0.0
    return falling / can_fall, (flips - falling) / can_rise


def outcome(pairs: Pairs, limit: float, looks: int, plan: Sequential) -> tuple[str, float]:
    """Return the verdict, and the share of the items that it took."""
    if looks == 1:
        return decide(pairs, limit, Levels.at(CONFIDENCE)), 1.0
    for look, items in enumerate(plan.items(pairs.items)):
        while items < pairs.items and pairs.clusters[items] == pairs.clusters[items - 1]:
            items += 1
        decision = plan.decide(pairs.first(items), look, limit)
        if decision != "go on":
            return decision, items / pairs.items
    raise AssertionError("the last look decides")


def row(setting: Setting, truth: Truth, looks: int, evaluations: int, seed: int) -> dict[str, Any]:
    """Simulate one setting and count the verdicts."""
    plan = Sequential.even(looks, CONFIDENCE)
    items = setting.items(plan.nominal(looks - 1).passing)
    generator = np.random.default_rng([seed, items, looks])
    results = [outcome(setting.draw(truth, generator, items), setting.limit, looks, plan) for _ in range(evaluations)]
    verdicts = [verdict for verdict, _ in results]
    return {
        "items": setting.kind,
        "score": setting.score,
        "flips": setting.flips,
        "limit": setting.limit,
        "truth": truth,
        "looks": looks,
        "number": items,
        "pass": verdicts.count("pass") / evaluations,
        "fail": verdicts.count("fail") / evaluations,
        "items used": float(np.mean([share for _, share in results])),
    }


def cell(setting: Setting, number: int, evaluations: int, seed: int) -> dict[str, Any]:
    """Simulate so many evaluations of one number of items at the limit and count the verdicts."""
    generator = np.random.default_rng([seed, number, evaluations])
    known: dict[bytes, str] = {}
    verdicts: list[str] = []
    for _ in range(evaluations):
        pairs = setting.draw("at the limit", generator, number)
        same = b"".join(part.tobytes() for part in pairs.totals.distinct)  # the verdict depends on nothing else
        if same not in known:
            known[same] = decide(pairs, setting.limit, Levels.at(CONFIDENCE))
        verdicts.append(known[same])
    rates = {verdict: verdicts.count(verdict) / evaluations for verdict in ("pass", "fail")}
    return {
        "items": setting.kind,
        "correlation": setting.shared,
        "number": number,
        "score": setting.score,
        "flips": setting.flips,
        "limit": setting.limit,
        "evaluations": evaluations,
        **rates,
        "standard error": round(math.sqrt(max(rates.values()) * (1 - max(rates.values())) / evaluations), 5),
    }


def cells(evaluations: Sequence[int], seed: int) -> list[dict[str, Any]]:
    """Simulate every number of clustered items, and those that may err too often with more evaluations, anew."""
    rows: list[dict[str, Any]] = []
    for kind, shared, number, numbers in product(PER_IMAGE, CORRELATIONS, ITEMS, SETTINGS):
        setting = Setting(kind, *numbers, shared=shared)
        found: dict[str, Any] = {}
        for again, count in enumerate(evaluations):
            found = cell(setting, number, count, seed + again)
            if max(found["pass"], found["fail"]) + ERRORS * found["standard error"] < MOST:
                break
        rows.append(found)
        print(json.dumps(found), file=sys.stderr, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--evaluations", type=int, default=1000)
    parser.add_argument("--cell-evaluations", type=int, nargs="+", default=[500, 2000, 6000, 20_000])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    kinds: tuple[Kind, ...] = ("right/wrong", "right/wrong, 3 per image", "votes", "votes, 1-5 per image")
    truths: tuple[Truth, ...] = ("at the limit", "no loss")
    started = time.monotonic()
    clusters = cells(arguments.cell_evaluations, arguments.seed)
    rows: list[dict[str, Any]] = []
    for kind, numbers, truth, looks in product(kinds, SETTINGS, truths, (1, LOOKS)):
        rows.append(row(Setting(kind, *numbers), truth, looks, arguments.evaluations, arguments.seed))
        print(json.dumps(rows[-1]), file=sys.stderr)
    result = {
        "machine": describe(),
        "versions": {name: importlib.metadata.version(name) for name in ("vlm-compress", "numpy", "scipy")},
        "evaluations": arguments.evaluations,
        "seed": arguments.seed,
        "confidence": CONFIDENCE,
        "planned power": POWER,
        "seconds": round(time.monotonic() - started),
        "rows": rows,
        "clusters": clusters,
    } | summary(rows, clusters)
    print(json.dumps(summary(rows, clusters), indent=1))
    if arguments.output:
        write_json(arguments.output, result)


def summary(rows: list[dict[str, Any]], clusters: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the worst rate of each kind of error, and the lowest power, over all rows."""
    at_limit = [entry for entry in rows if entry["truth"] == "at the limit"]
    sound = [entry for entry in rows if entry["truth"] == "no loss"]
    return {
        "a true loss at the limit passes": max(entry["pass"] for entry in at_limit),
        "a true loss at the limit fails": max(entry["fail"] for entry in at_limit),
        "worst of clusters": max(clusters, key=lambda entry: max(entry["pass"], entry["fail"])),
        "no loss fails": max(entry["fail"] for entry in sound),
        "no loss passes": [min(entry["pass"] for entry in sound), max(entry["pass"] for entry in sound)],
    }


if __name__ == "__main__":
    main()
