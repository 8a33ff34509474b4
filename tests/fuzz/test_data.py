"""Data files that a stranger made: read as a run reads them before anything is asked; nothing breaks, hangs or reads elsewhere."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz.data import KINDS, change, lines, sound
from tests.fuzz.harness import Harness, cases, drawn, leaked, make_decoys
from tests.tiny import build_qwen2_5_vl

SEEDED, DRAWN = 400, 100
"""How many files are made from seeds, and how many Hypothesis draws: 500."""

MODULES = (
    *(
        "compress.cli.main",
        "tests.fuzz.data",
        "transformers.models.auto.tokenization_auto",
        "transformers.models.qwen2.tokenization_qwen2",
    ),
    *("transformers.models.qwen2_5_vl.configuration_qwen2_5_vl", "torch", "pyarrow.compute", "PIL.PngImagePlugin"),
)


@dataclass(frozen=True)
class Ground:
    """Where everything lies."""

    folder: Path
    harness: Harness

    @property
    def case(self) -> Path:
        return self.folder / "case"

    @property
    def decoys(self) -> Path:
        return self.folder / "decoys"

    def fresh(self, kind: str) -> Path:
        shutil.rmtree(self.case, ignore_errors=True)
        self.case.mkdir()
        return sound(self.case, kind)

    def attempt(self, path: Path, kind: str) -> list[str]:
        """Read a file; return what it must not do and does."""
        target = self.folder / "target"
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()
        outcome = self.harness.call("tests.fuzz.data:consume", str(path), kind, str(self.folder / "model"), str(target))
        faults = outcome.faults({0, 2}, [self.case, target, self.folder / "model"])
        if outcome.code == 2 and len(outcome.stderr.splitlines()) != 1:
            faults.append("its error is not one line")
        if outcome.code == 2 and len(outcome.stderr) > 5000:
            faults.append(f"its error has {len(outcome.stderr):,} characters")
        if "\x1b[2J" in outcome.stderr or "SECRET-OF-SOMEBODY" in outcome.stdout + outcome.stderr:
            faults.append("it shows what it must not")
        faults += [f"a copy of a decoy at {copy}" for copy in leaked(self.decoys, [target])]
        return [f"{kind}: {fault} … {outcome.stderr[-1500:]}" for fault in faults]


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    folder = tmp_path_factory.mktemp("ground")
    build_qwen2_5_vl(folder / "model", layers=1, vision_blocks=1)
    home = {"HF_HOME": str(folder / "target")}  # where a token would be looked for
    with Harness(MODULES, make_decoys(folder / "decoys"), home) as harness:
        yield Ground(folder, harness)
        print(f"\ndata files: {harness.tally}")  # noqa: T201 - the figures of make fuzz


@pytest.mark.parametrize("kind", KINDS)
def test_a_sound_file_is_read_and_found_to_be_the_calibrations_own(ground: Ground, kind: str) -> None:
    path, target = ground.fresh(kind), ground.folder / "target"
    assert ground.attempt(path, kind) == []
    outcome = ground.harness.call("tests.fuzz.data:consume", str(path), kind, str(ground.folder / "model"), str(target))
    assert "a measurement on it proves nothing" in outcome.stderr


@pytest.mark.timeout(7200)
def test_files_from_seeds(ground: Ground) -> None:
    faults = list[str]()
    for seed in range(cases(SEEDED)):
        kind = KINDS[seed % len(KINDS)]
        faults += [f"seed {seed}: {fault}" for fault in ground.attempt(change(ground.fresh(kind), kind, ground.decoys, seed), kind)]
    assert not faults, "\n".join(faults)


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(["0.png", "../decoys/secret.txt", "<image>"]),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["bytes", "path", "from", "value", "role", "content"]), inner)
    ),
    max_leaves=8,
)
FIELDS = st.sampled_from(["id", "image", "images", "question", "answer", "options", "conversations", "messages", "text", "\x1b[2J"])


@drawn(DRAWN)
@given(rows=st.lists(st.dictionaries(FIELDS, VALUES, max_size=5), max_size=3), listed=st.booleans(), texts=st.booleans())
@pytest.mark.timeout(7200)
def test_rows_of_any_values(ground: Ground, rows: list[dict[str, object]], listed: bool, texts: bool) -> None:
    path = ground.fresh("jsonl")
    path.write_text(json.dumps(rows) if listed else lines(rows), encoding="utf-8")
    assert ground.attempt(path, "texts.jsonl" if texts else "jsonl") == []
