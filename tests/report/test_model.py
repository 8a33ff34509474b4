import json

import pytest

from compress.eval.results import PerplexityMetrics, ScoreMetrics, WholeKl
from compress.report.figures import check_values, format_recovery, milliseconds, size
from compress.report.html import render_html
from compress.report.latency import components_table
from compress.report.model import Report, render
from compress.report.run_tables import checks_table, results_table
from compress.report.tabular import Column, Table, markdown
from tests.reports import check, report, rows


@pytest.fixture(scope="module")
def page() -> str:
    return render(report())


def lines_of(page: str, start: str) -> list[str]:
    return [line for line in page.splitlines() if line.startswith(start)]


def test_a_report_comes_back_from_its_json() -> None:
    assert Report.model_validate_json(report().to_json()) == report()


def test_the_verdict_comes_first_and_every_check_has_its_reason(page: str) -> None:
    assert page.startswith("# qwen2.5-vl-7b: fail\n")
    assert len(lines_of(page, "- **")) == len(report().gate.checks)
    assert "- **inconclusive** · vllm-awq · accuracy.min_recovery: chartqa: what was found is 0.9926" in page


def test_what_is_kept_stands_beside_each_figure_and_failures_are_counted(page: str) -> None:
    assert "| original | 16.6 GB (100.0%) | 16.00 | 84.25% | 77.12% | 8.412 |" in page
    assert "| vllm-int8 | 9.41 GB (56.8%) | 9.08 | 79.05% (93.83%), 3 failed | 70.21% (91.04%) | 8.447 (×1.0042) |" in page


def test_the_page_tells_fidelity_grounding_and_latency(page: str) -> None:
    assert "| vllm-awq | textvqa | 0.0041 | 0.0037–0.0045 | 0.086 | 98.77% | 21 lost, 10 gained | 72 |" in page
    assert "| original, asked again | text | 0.00016 |" in page
    assert "| vllm-awq | textvqa | 64 | 83.90% | 11.30% | 9.40% | 89.10% | 93.80% |" in page
    assert "| artifact | at once | TTFT p50 | TTFT p95 | TPOT p50 | TPOT p95 | end to end p50 | end to end p95 |" in page
    assert "| vllm-awq | 16 | 268 ms | 428 ms | 11.8 ms | 18.8 ms | 1,764 ms | 2,822 ms | 9.07 | 1,161 | 8.44 |" in page
    assert "| vllm-awq | 64 | ×0.62 (0.60–0.64) |" in page
    assert "- context lowered from 8192 to 4096: the cache did not fit" in page


def test_the_times_of_components_say_how_they_were_run() -> None:
    (measured,) = report().latency.values()
    assert components_table(measured).note.startswith("Medians, computed in one process with dense weights; decode is")
    timed = measured.original.components
    assert timed is not None
    graphs = measured.original.model_copy(update={"components": timed.model_copy(update={"runtime": "onnxruntime"})})
    table = components_table(measured.model_copy(update={"original": graphs, "artifacts": {}}))
    assert "in one process by ONNX Runtime; the projector is part of vision; decode" in table.note


def test_targets_are_told_only_where_there_are_several() -> None:
    assert "target" not in [column.head for column in results_table(rows()).columns]
    moved = tuple(row.model_copy(update={"target": "prod"}) for row in rows())
    table = results_table([*rows(), *moved])
    assert "target" in [column.head for column in table.columns]
    assert [row[1] for row in table.rows] == ["local"] * 3 + ["prod"] * 3
    assert "(99.58%)" in table.rows[4][4]


def test_a_task_that_was_not_measured_is_told() -> None:
    original, artifact, _ = rows()
    lacking = artifact.model_copy(update={"metrics": {"chartqa": artifact.metrics["chartqa"]}, "fidelity": None})
    table = results_table([original, lacking])
    assert table.rows[1][3:] == ("not measured", "76.55% (99.26%)", "not measured")


def test_an_artifact_that_was_asked_fewer_items_is_not_held_against_the_original_over_all() -> None:
    original, artifact, _ = rows()
    fewer = artifact.metrics["chartqa"].model_copy(update={"items": 250})
    table = results_table([original, artifact.model_copy(update={"metrics": {**artifact.metrics, "chartqa": fewer}})])
    assert table.rows[1][3:5] == ("83.90% (99.58%)", "76.55%, of 250 items")
    assert format_recovery(original.metrics["chartqa"], fewer) == ""


def test_checks_that_fail_come_first() -> None:
    table = checks_table(report().gate.checks)
    assert [row[2] for row in table.rows] == ["fail"] * 3 + ["inconclusive"] + ["pass"] * 5
    assert [(name, len(rows)) for name, rows in table.groups] == [("vllm-int8", 3), ("vllm-awq", 6)]
    checks = [check.model_copy(update={"target": target}) for target in ("local", "prod") for check in report().gate.checks]
    assert [name for name, _ in checks_table(checks).groups][:2] == ["vllm-int8 @local", "vllm-int8 @prod"]


@pytest.mark.parametrize(
    ("name", "figures", "expected"),
    [
        ("accuracy.min_recovery", (0.99512, (0.99, 1.0012), 0.985), ("99.51%", "99.00%–100.12%", "≥ 98.5%")),
        ("perplexity.max_ratio", (1.02187, (1.0201, 1.0236), 1.03), ("1.0219", "1.0201–1.0236", "≤ 1.03")),
        ("fidelity.max_kl", (0.00412, None, 0.02), ("0.00412", "", "≤ 0.02")),
        ("size.max_ratio", (0.41857, None, 0.45), ("41.86%", "", "≤ 45%")),
        ("size.max_bytes", (6_940_000_000.0, None, 7e9), ("6.94 GB", "", "≤ 7 GB")),
        ("latency.max_ttft_p95_ms", (61.234, (60, 62.9), 500), ("61.2 ms", "60.0 ms–62.9 ms", "≤ 500 ms")),
        ("latency.max_p95_ratio", (0.812, (0.8, 0.83), 1.0), ("0.8120", "0.8000–0.8300", "≤ 1")),
        ("memory.max_ratio", (0.612, None, 0.7), ("61.20%", "", "≤ 70%")),
        ("grounding", (0.731, (0.61, 0.84), 0.0), ("73.10%", "61.00%–84.00%", "> 0%")),
        ("size.max_bits_per_weight", (4.51, None, 4.6), ("4.5100", "", "≤ 4.6")),
        ("flips.max_share", (0.0125, None, 0.02), ("1.25%", "", "≤ 2%")),
    ],
)
def test_values_and_limits_are_told_in_their_own_units(
    name: str, figures: tuple[float, tuple[float, float] | None, float], expected: tuple[str, str, str]
) -> None:
    assert check_values(check("a", name, None, figures, "pass")) == expected


def test_a_check_that_nothing_measured_has_no_value() -> None:
    unmeasured = check("a", "accuracy.min_recovery", None, (0, None, 0.99), "inconclusive").model_copy(update={"value": None})
    assert check_values(unmeasured) == ("", "", "≥ 99%")
    assert check_values(unmeasured.model_copy(update={"check": "latency", "limit": 0.0})) == ("", "", "")


def test_nothing_is_kept_of_nothing() -> None:
    nothing = ScoreMetrics(task="vqa", metric="exact_match", score=0.0, items=4)
    some = nothing.model_copy(update={"score": 0.5})
    text = PerplexityMetrics(perplexity=8.0, window=16, windows=2, tokens=32)
    assert format_recovery(nothing, some) == ""
    assert format_recovery(some, nothing) == "0.00%"
    assert format_recovery(some, text) == ""
    assert format_recovery(text, text) == "×1.0000"


def test_numbers_have_three_digits_that_matter() -> None:
    assert [milliseconds(value) for value in (0.0123, 7.36, 19.0, 412.4, 10_317.2)] == [
        "0.0123 ms", "7.36 ms", "19.0 ms", "412 ms", "10,317 ms"
    ]  # fmt: skip
    assert [size(value) for value in (0, 999, 6_940_000_000, 2.5e13)] == ["0 B", "999 B", "6.94 GB", "25 TB"]


def test_a_cell_cannot_break_its_table() -> None:
    table = Table("t", (Column("a|b"), Column("n", "number")), (("x | y\nz", "1"), ('q"u', "2,5")))
    assert markdown(table) == '| a\\|b | n |\n| --- | ---: |\n| x \\| y z | 1 |\n| q"u | 2,5 |'


def test_intervals_are_named_by_their_confidence_and_lower_bounds_as_such() -> None:
    original, artifact, other = report().rows
    fidelity = {name: value.model_copy(update={"at_least": True}) for name, value in (artifact.fidelity or {}).items()}
    full = WholeKl(tokens=320, kl_mean=0.0052, kl_interval=(0.0048, 0.0057), kl_p99_at_most=None)
    fidelity["text"] = fidelity["text"].model_copy(update={"whole": full})
    changed = report(rows=(original, artifact.model_copy(update={"fidelity": fidelity}), other))
    for page in (render(changed), render_html(changed)):
        assert "90% interval" in page and "95% interval" not in page
        assert "at least 0.0041" in page and "at least 0.086" in page
        assert "0.0052 (0.0048–0.0057) by 320" in page
    content = json.loads(changed.to_json())["rows"][1]["fidelity"]["text"]
    assert (content["at_least"], content["interval_level"], content["whole"]["interval_level"]) == (True, 0.9, 0.9)
