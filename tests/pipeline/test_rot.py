"""What a disk lost, or a hand changed, without the file's size or time of change telling of it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import compress
from compress.checkpoints.artifact import file_digest, folder_digests
from compress.eval.results import MEASUREMENT
from compress.pipeline.store import Store
from compress.pipeline.store_entries import Entry
from compress.report.model import Report
from tests.jobs import make_job


def lose_a_bit(path: Path) -> None:
    """Change a file's last byte and leave its size and times; not of an artifact that shares the file."""
    before, content = path.stat(), path.read_bytes()
    path.unlink()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def write_by_hand(entry: Entry, name: str, content: str) -> None:
    """Replace a file of an entry, and what its record says of it."""
    (entry.folder / name).write_text(content, encoding="utf-8")
    record_path = entry.folder.parent / "entry.json"
    record = json.loads(record_path.read_text(encoding="utf-8"))
    status = (entry.folder / name).stat()
    row = {"size": status.st_size, "sha256": file_digest(entry.folder / name), "changed": status.st_mtime_ns}
    record["files"][name] = row
    record_path.write_text(json.dumps(record), encoding="utf-8")


def made(report: Report) -> list[str]:
    return [timing.step for timing in report.timings if not timing.cached]


def test_what_an_export_and_a_verdict_are_made_of_is_read_whole(tmp_path: Path) -> None:
    job = make_job(tmp_path, layers=1)
    text = {"task": "perplexity", "dataset": "text", "source": str(job.folder / "test.txt"), "window": 32, "samples": 8}
    one: dict[str, Any] = {"export": [{"format": "vllm", "layout": "compressed-tensors"}], "eval.tasks": [text]}
    first = compress.run(job.recipe, set=one, **job.places())
    before = folder_digests(Path(first.rows[1].path))
    store = Store(job.store)
    entries = {entry.step: entry for entry in store.entries()}

    lose_a_bit(next(entries["awq"].folder.glob("*.safetensors")))
    lose_a_bit(entries["calibration"].folder / "questions.jsonl")
    both = one | {"export": [*one["export"], {"format": "vllm", "layout": "awq"}]}
    second = compress.run(job.recipe, set=both, **job.places())
    assert made(second) == ["export vllm-awq", "measure vllm-awq"]
    assert any(
        "awq: " in warning and "its digest is not the recorded one; the step is made again" in warning
        for warning in second.warnings
    )
    assert any("calibration: " in warning and "the step is made again" in warning for warning in second.warnings)
    assert store.verify() == {}
    assert second.rows[1].fidelity == second.rows[2].fidelity == first.rows[1].fidelity

    lose_a_bit(next(entries["measure original"].folder.glob("items-*.parquet")))
    measured = next(entry for entry in store.entries() if entry.step == "measure vllm-awq")
    write_by_hand(measured, MEASUREMENT, '{"tasks": "all passed"}')
    third = compress.run(job.recipe, set=both, **job.places())
    assert made(third) == ["measure original", "measure vllm-awq"]
    assert any("measure vllm-awq: " in warning and "no measurement" in warning for warning in third.warnings)
    assert third.rows == second.rows
    assert folder_digests(Path(third.rows[1].path)) == before
