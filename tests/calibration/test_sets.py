import json
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from compress.calibration.collect import CalibrationSelection, PinnedSet, collect
from compress.calibration.sets import WikitextSet
from compress.data.samples import read_manifest
from compress.progress import Silent
from tests.jobs import sentences
from tests.tiny import build_qwen2_5_vl


def test_wikitext_is_the_published_one_unless_a_source_is_named() -> None:
    published = WikitextSet(dataset="wikitext", samples=1, tokens=8)
    assert (published.source, published.subset, published.split) == ("Salesforce/wikitext", "wikitext-2-raw-v1", "train")


def test_a_local_copy_of_wikitext_gives_the_same_windows_in_any_form(tmp_path: Path) -> None:
    model = build_qwen2_5_vl(tmp_path / "model")
    rows = sentences(0, 60).strip().split("\n\n")
    (tmp_path / "wiki.raw").write_text("\n\n".join(rows), encoding="utf-8")
    (tmp_path / "wiki.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), encoding="utf-8")
    pq.write_table(cast("Any", pa.table({"text": rows})), tmp_path / "wiki.parquet")
    actual: list[list[str]] = []
    for path in (tmp_path / "wiki.raw", tmp_path / "wiki.jsonl", tmp_path / "wiki.parquet"):
        spec = WikitextSet(dataset="wikitext", source=str(path), samples=4, tokens=32)
        out = tmp_path / f"out-{path.suffix}"
        collect(CalibrationSelection(0, (PinnedSet(spec, (path,)),)), model, out, Silent())
        actual.append([sample["sha256"] for sample in read_manifest(out)["samples"]])
    assert len(set(actual[0])) == 4
    assert actual[0] == actual[1] == actual[2]
