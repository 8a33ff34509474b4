import csv
import io
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from compress.errors import DataError, UsageError
from compress.eval.results import WholeKl
from compress.report.compare import Comparison, compare, read_report
from compress.report.compare_formats import FORMATS, as_csv, as_json, charts, group_table, render
from compress.report.model import Report, Row
from compress.report.run_charts import size_charts
from tests.preloaded import command_line
from tests.reports import report, rows

SAME = {"original": "3b1f" * 16, "textvqa": "77ad" * 16}


def run(name: str, **changes: Any) -> Report:
    return report(name=name, run=f"/runs/{name}-20250112-101500-3fa9", **{"digests": SAME, "latency": {}, **changes})


def smaller() -> tuple[Row, ...]:
    original, artifact, _ = rows()
    metrics = {**artifact.metrics, "textvqa": rows()[2].metrics["textvqa"]}
    changed = {"artifact": "vllm-gptq", "bytes": 5_400_000_000, "size_ratio": 0.3257, "bits_per_weight": 5.21, "metrics": metrics}
    return original, artifact.model_copy(update=changed)


def write(folder: Path, report: Report) -> Path:
    run_folder = folder / Path(report.run).name
    run_folder.mkdir(parents=True)
    (run_folder / "report.json").write_text(report.to_json(), encoding="utf-8")
    return run_folder


def columns(comparison: Comparison) -> list[str]:
    return [measure.head for group in comparison.groups for measure in group.measures]


def compare_command(*arguments: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command_line("compare", *arguments), capture_output=True, text=True, check=False, env=environment)


def test_runs_of_one_original_share_a_table_and_its_row() -> None:
    comparison = compare([run("first"), run("second", rows=smaller())])
    assert comparison.notes == ()
    (group,) = comparison.groups
    assert [(line.run, line.artifact) for line in group.lines] == [
        ("2 runs", "original"),
        ("first", "vllm-awq"),
        ("first", "vllm-int8"),
        ("second", "vllm-gptq"),
    ]
    assert columns(comparison) == ["textvqa", "chartqa", "text", "textvqa KL", "chartqa KL", "text KL"]
    table = group_table(group)
    assert [column.head for column in table.columns] == [
        "run", "artifact", "verdict", "size", "bits/weight", "textvqa", "chartqa", "text", "textvqa KL",
        "chartqa KL", "text KL", "in front",
    ]  # fmt: skip
    assert table.rows[2] == (
        "first", "vllm-int8", "fail", "9.41 GB (56.8%)", "9.08", "79.05% (93.83%), 3 failed", "70.21% (91.04%)", "8.447 (×1.0042)",
        "0.031", "0.040", "0.025", "yes",
    )  # fmt: skip


def test_what_another_line_beats_is_not_in_front() -> None:
    original, artifact, _ = rows()
    worse = artifact.model_copy(update={"artifact": "worse", "bytes": artifact.bytes + 1})
    (group,) = compare([run("only", rows=(original, artifact, worse))]).groups
    assert [line.front for line in group.lines] == [True, True, False]


def test_a_figure_of_fewer_items_than_the_originals_says_of_how_many() -> None:
    original, artifact, _ = rows()
    asked = artifact.metrics["textvqa"].model_copy(update={"items": 250, "failed": 0})
    changed = artifact.model_copy(update={"metrics": {**artifact.metrics, "textvqa": asked}})
    (group,) = compare([run("first", rows=(original, changed))]).groups
    assert group_table(group).rows[1][5] == "83.90%, of 250 items"


def test_other_originals_get_a_table_of_their_own_and_it_is_told() -> None:
    comparison = compare([run("first"), run("second", digests={"original": "00" * 32}, source={"source": "org/other"})])
    assert [group.original for group in comparison.groups][1] == "org/other"
    assert [len(group.lines) for group in comparison.groups] == [3, 3]
    assert comparison.notes[0] == "These runs began with 2 different originals; each has a table of its own."


def test_other_questions_get_a_column_of_their_own_and_it_is_told() -> None:
    comparison = compare([run("first"), run("second", digests={**SAME, "textvqa": "00" * 32})])
    assert columns(comparison)[:4] == ["textvqa (1)", "chartqa", "text", "textvqa (2)"]
    assert comparison.notes == (
        "textvqa asks other questions, or in another way, so its figures stand in columns of their own: textvqa (1) in first; "
        "textvqa (2) in second.",
    )
    values = [set(line.values) for line in comparison.groups[0].lines]
    assert len(values[0]) == 4  # the original's, of both runs
    assert values[1] != values[3]


def test_a_run_without_digests_is_known_by_its_source_and_recipe() -> None:
    assert len(compare([run("first", digests={}), run("second", digests={})]).groups) == 1
    moved = run("second", digests={}, source={"source": "org/other"})
    assert len(compare([run("first", digests={}), moved]).groups) == 2
    asked = run("second", digests={}, recipe={"eval": {"tasks": [{"task": "vqa", "samples": 7}]}})
    assert "textvqa (2)" in columns(compare([run("first", digests={}), asked]))


def test_an_original_that_came_out_otherwise_has_a_row_of_its_own() -> None:
    original, *others = rows()
    metrics = {**original.metrics, "textvqa": rows()[1].metrics["textvqa"]}
    comparison = compare([run("first"), run("second", rows=(original.model_copy(update={"metrics": metrics}), *others))])
    assert [line.run for line in comparison.groups[0].lines][:2] == ["first", "second"]


def test_another_machine_and_another_runtime_are_told() -> None:
    other = run("second", hardware={"processor": "Xeon", "gpus": []}, runtime_versions={"vllm": "0.16.0"})
    assert compare([run("first"), other]).notes == (
        "Not all were measured in the same runtime: first: vllm 0.15.0; second: vllm 0.16.0.",
        "Not all were measured on the same machine: first: AMD EPYC 9654, NVIDIA H200; second: Xeon.",
    )


def test_latency_is_compared_where_the_load_is_the_same() -> None:
    measured = {"latency": report().latency}
    comparison = compare([run("first", **measured), run("second", **measured)])
    assert columns(comparison)[-1] == "p95 latency"
    titles = [chart.title for chart in charts(comparison.groups[0])]
    assert titles[:1] + titles[3:4] == ["textvqa against size", "textvqa against p95 latency"]
    assert "1,558 ms (×0.62)" in group_table(comparison.groups[0]).rows[1]


def test_runs_of_one_recipe_are_told_apart_by_their_folders() -> None:
    first, second = run("a"), run("a").model_copy(update={"run": "/runs/a-20250113-080000-77c1"})
    lines = compare([first, second]).groups[0].lines
    assert lines[0].runs == ("a-20250112-101500-3fa9", "a-20250113-080000-77c1")


def test_kl_is_shown_as_the_lower_bound_that_it_is() -> None:
    original, artifact, other = rows()
    fidelity = {name: value.model_copy(update={"at_least": True}) for name, value in (artifact.fidelity or {}).items()}
    full = WholeKl(tokens=320, kl_mean=0.0052, kl_interval=(0.0048, 0.0057), kl_p99_at_most=0.1)
    fidelity["text"] = fidelity["text"].model_copy(update={"whole": full})
    comparison = compare([run("first", rows=(original, artifact.model_copy(update={"fidelity": fidelity}), other))])
    table = group_table(comparison.groups[0])
    heads = [column.head for column in table.columns]
    assert [table.rows[1][heads.index(f"{name} KL")] for name in ("textvqa", "text")] == ["at least 0.0041", "0.0052"]
    assert table.rows[2][heads.index("textvqa KL")] == "0.031"
    values = json.loads(as_json(comparison))["groups"][0]["lines"][1]["values"]
    assert [value["at_least"] for key, value in values.items() if key.endswith("/KL")] == [True, True, False]
    csv_rows = list(csv.DictReader(io.StringIO(as_csv(comparison))))
    head = "textvqa KL: mean KL from the original in nats"
    assert [row[f"{head}, at least"] for row in csv_rows] == ["", "1", "0"]


def test_a_perplexity_below_the_originals_is_as_far_off_as_one_above() -> None:
    original, artifact, _ = rows()

    def of(name: str, perplexity: float, extra: int) -> Row:
        text = artifact.metrics["text"].model_copy(update={"perplexity": perplexity})
        changes = {"artifact": name, "bytes": artifact.bytes + extra, "metrics": {**artifact.metrics, "text": text}}
        return artifact.model_copy(update=changes)

    near, below = of("near", 8.412 * 1.01, 0), of("below", 8.412 / 1.05, 1)
    (group,) = compare([run("only", rows=(original, near, below))]).groups
    assert [line.front for line in group.lines] == [True, True, False]
    (chart,) = [each for each in charts(group) if each.title == "text against size"]
    assert {point.label for point in chart.front} == {"only: near", "original"}
    assert chart.better == "better: left, and near the original"
    chart = next(each for each in size_charts(run("only", rows=(original, near, below))) if each.title == "text against size")
    assert {point.label for point in chart.front} == {"near", "original"}


def test_gates_that_differ_are_told() -> None:
    def gated(name: str, share: float, **more: Any) -> Report:
        return run(name, recipe={**report().recipe, "gate": {"accuracy": {"min_recovery": share, "confidence": 0.95}, **more}})

    notes = compare([gated("first", 0.99), gated("second", 0.95, size={"max_ratio": 0.4, "max_bytes": None})]).notes
    assert notes == (
        "The gates differ, so that one verdict is not the other: accuracy.min_recovery: 0.99 in first; 0.95 in second.",
        "The gates differ, so that one verdict is not the other: size.max_ratio: not checked in first; 0.4 in second.",
    )
    assert compare([gated("first", 0.99), gated("second", 0.99)]).notes == ()


def test_points_are_labelled_by_run_and_artifact() -> None:
    (group,) = compare([run("first"), run("second", rows=smaller())]).groups
    labels = {point.label for chart in charts(group) for series in chart.series for point in series.points}
    assert labels == {"original", "first: vllm-awq", "first: vllm-int8", "second: vllm-gptq"}


def test_a_folder_without_a_report_is_passed_over_with_a_warning(tmp_path: Path) -> None:
    folder, unfinished = write(tmp_path, run("first")), tmp_path / "killed-20250112-101500-77c1"
    unfinished.mkdir()
    done = compare_command(str(unfinished), str(folder))
    assert done.returncode == 0
    assert done.stderr == f"compress: warning: {unfinished}: has no report.json and is passed over; a run has one once it is done\n"
    assert "vllm-awq" in done.stdout
    done = compare_command(str(unfinished))
    assert (done.returncode, done.stdout) == (2, "")
    assert "none of the 1 folders has a report.json; name runs that are done" in done.stderr


def test_an_ending_that_is_not_written_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    output = tmp_path / "comparison.pdf"
    done = compare_command(str(tmp_path / "nowhere"), "-o", str(output))
    assert (done.returncode, done.stdout) == (2, "")
    message = f"{output}: .pdf is none of the endings that are written, .md, .csv, .html, .json; change it, or say --format"
    assert message in done.stderr
    assert not output.exists()
    folder = str(write(tmp_path, run("first")))
    done = compare_command(folder, "-o", str(output), "--format", "csv")
    assert done.returncode == 0 and output.read_text(encoding="utf-8").startswith("original,run")


def test_nothing_and_one_run_twice_are_refused() -> None:
    with pytest.raises(UsageError, match="no run is given"):
        compare([])
    with pytest.raises(UsageError, match="the run a-20250112-101500-3fa9 is given twice; name each once"):
        compare([run("a"), run("a")])


def test_what_is_no_report_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere: cannot be read \(No such file or directory\); name a run's folder"):
        read_report(tmp_path / "nowhere")
    folder = write(tmp_path, run("a"))
    content = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    del content["gate"]
    (folder / "report.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(DataError, match=r"report.json: no report of this version of compress \(gate: Field required\); run its"):
        read_report(folder)
    (folder / "report.json").write_bytes(b"\xff{")
    with pytest.raises(DataError, match="no report of this version of compress"):
        read_report(folder / "report.json")


def test_csv_has_plain_numbers() -> None:
    comparison = compare([run("first"), run("second", rows=smaller())])
    csv_rows = list(csv.DictReader(io.StringIO(as_csv(comparison))))
    assert [row["artifact"] for row in csv_rows] == ["original", "vllm-awq", "vllm-int8", "vllm-gptq"]
    assert csv_rows[0]["run"] == "first; second"
    assert (float(csv_rows[1]["bytes"]), float(csv_rows[1]["textvqa: vqa_vote"])) == (6_940_000_000, 0.839)
    assert float(csv_rows[1]["textvqa: vqa_vote / original"]) == pytest.approx(0.839 / 0.8425)


def test_json_holds_everything() -> None:
    content = json.loads(as_json(compare([run("first")])))
    assert content["schema"] == 1
    assert content["groups"][0]["lines"][1]["values"]


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_tells_every_artifact_and_the_notes(form: str) -> None:
    comparison = compare([run("first"), run("second", rows=smaller(), hardware={"processor": "Xeon", "gpus": []})])
    page = render(comparison, next(each for each in FORMATS if each == form))
    assert all(name in page for name in ("original", "vllm-awq", "vllm-int8", "vllm-gptq"))
    assert ("Xeon" in page) == (form != "csv")


def test_the_command_writes_what_the_files_name_says(tmp_path: Path) -> None:
    folders = [str(write(tmp_path, run("first"))), str(write(tmp_path, run("second", rows=smaller())) / "report.json")]
    for name, start in (
        ("a.md", "# Accuracy"),
        ("a.csv", "original,run"),
        ("a.html", "<!DOCTYPE html>"),
        ("a.json", "{"),
        ("a", "Qwen"),
    ):
        output = tmp_path / name
        done = compare_command(*folders, "-o", str(output))
        assert (done.returncode, done.stderr, done.stdout.strip()) == (0, "", str(output))
        assert output.read_text(encoding="utf-8").startswith(start)


def test_the_command_prints_a_table_or_where_that_is_too_wide_a_list(tmp_path: Path) -> None:
    folder = str(write(tmp_path, run("first")))
    for width, heads in (("200", 1), ("60", 0)):
        done = compare_command(folder, environment={"COLUMNS": width, "PATH": "/usr/bin:/bin"})
        assert done.returncode == 0, done.stderr
        assert [line.split()[:3] for line in done.stdout.splitlines()].count(["run", "artifact", "verdict"]) == heads
        assert "79.05%" in done.stdout
        assert max(map(len, done.stdout.splitlines())) <= int(width)


def test_the_command_prints_one_format_alone_and_tells_what_it_cannot_read(tmp_path: Path) -> None:
    folder = str(write(tmp_path, run("first")))
    done = compare_command(folder, "--format", "json")
    assert json.loads(done.stdout)["schema"] == 1
    done = compare_command(folder, folder)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "compress: compare: the run first-20250112-101500-3fa9 is given twice; name each once\n"
    done = compare_command(folder, "-o", str(tmp_path / "no" / "a.md"))
    assert done.returncode == 3
    assert "name a folder you can write" in done.stderr
