import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from compress.errors import DataError, UsageError
from compress.eval import TASKS
from compress.eval.results import (
    Grounding,
    GroundingItem,
)
from compress.eval.tasks.task import kinds_judged_by
from compress.gate.gate import Check, Gate, MeasuredModel, Verdict, combine_verdicts
from compress.gate.judge import judge
from tests.judged import TOKENS, only, outcomes, subject

WINDOWS = 12


def judge_accuracy(counts: tuple[int, int, int, int], min_recovery: float) -> Check:
    before, after = outcomes(*counts)
    gate = Gate.model_validate({"accuracy": {"min_recovery": min_recovery, "confidence": 0.95}})
    return only(judge(gate, subject("original", 100, before), [subject("small", 40, after)]))


def test_accuracy_that_is_kept_passes() -> None:
    check = judge_accuracy((385, 1, 1, 13), 0.97)
    assert (check.artifact, check.check, check.task, check.verdict) == ("small", "accuracy.min_recovery", "scenes", "pass")
    assert (check.value, check.limit, check.items_needed) == (1.0, 0.97, None)
    assert check.interval is not None
    assert 0.97 <= check.interval[0] < 1 < check.interval[1]
    low, high = (f"{100 * bound:.2f}" for bound in check.interval)
    assert (
        check.reason
        == f"scenes: recovery 100.00 % (90% interval {low}–{high} %) of 400 items, 1 lost and 1 gained (as uneven by chance: "
        "p = 1); the limit is 97 %"
    )


def test_accuracy_that_is_lost_fails() -> None:
    check = judge_accuracy((330, 50, 2, 18), 0.97)
    assert check.verdict == "fail"
    assert check.interval is not None
    assert check.interval[1] < 0.97


def about_shared_images(model: MeasuredModel, questions: int) -> MeasuredModel:
    """Let as many questions in a row be about one image."""
    items = tuple(
        item.model_copy(update={"cluster": f"image-{number // questions}"})
        for number, item in enumerate(model.measurement.questions("scenes"))
    )
    return replace(model, measurement=replace(model.measurement, items={"scenes": items}))


def test_questions_about_one_image_say_less_than_as_many_about_their_own() -> None:
    """Twenty answers lost about two images are two draws, not twenty."""
    before, after = [True] * 400, [number >= 20 for number in range(400)]
    gate = Gate.model_validate({"accuracy": {"min_recovery": 0.92, "confidence": 0.95}})
    pair = subject("original", 100, before), subject("small", 40, after)
    alone = only(judge(gate, pair[0], [pair[1]]))
    shared = only(judge(gate, *(about_shared_images(pair[0], 10), [about_shared_images(pair[1], 10)])))
    assert alone.value == shared.value == 0.95
    assert alone.interval is not None and shared.interval is not None
    assert shared.interval[0] < alone.interval[0] - 0.02
    assert (alone.verdict, shared.verdict) == ("pass", "inconclusive")


def test_an_item_that_failed_in_both_is_one_that_failed() -> None:
    def failing(model: MeasuredModel, *indices: int) -> MeasuredModel:
        items = list(model.measurement.questions("scenes"))
        for index in indices:
            items[index] = items[index].model_copy(update={"fault": "cannot be decoded", "score": 0.0})
        task = model.measurement.tasks["scenes"]
        metrics = task.metrics.model_copy(update={"failed": len(indices)})
        measured = replace(
            model.measurement, tasks={"scenes": task.model_copy(update={"metrics": metrics})}, items={"scenes": tuple(items)}
        )
        return replace(model, measurement=measured)

    gate = Gate.model_validate({"accuracy": {"min_recovery": 0.5, "confidence": 0.95}})
    right = [True] * 50
    check = only(judge(gate, failing(subject("original", 100, right), 3), [failing(subject("small", 40, right), 3, 7)]))
    assert "of 50 items, 2 of them failed and count 0" in check.reason


def test_too_few_items_are_inconclusive_and_say_how_many_would_do() -> None:
    check = judge_accuracy((380, 3, 2, 15), 0.99)
    assert check.verdict == "inconclusive"
    assert check.items_needed is not None
    assert check.items_needed > 400
    assert check.reason.endswith(f"the limit is 99 %: {check.items_needed:,} items would settle it")
    factor = check.items_needed / 400
    settled = judge_accuracy((math.ceil(380 * factor), int(3 * factor), math.ceil(2 * factor), round(15 * factor)), 0.99)
    assert settled.verdict == "pass"


def test_an_estimate_at_the_limit_says_that_no_number_would_do() -> None:
    check = judge_accuracy((90, 10, 0, 0), 0.9)
    assert (check.verdict, check.items_needed) == ("inconclusive", None)
    assert check.reason.endswith("what was observed stands at the limit, so no number of items would settle it")


def test_an_original_that_is_never_right_proves_nothing() -> None:
    check = judge_accuracy((0, 0, 3, 20), 0.9)
    assert (check.verdict, check.value, check.interval) == ("inconclusive", None, None)
    assert "the original answers none of the 23 items right" in check.reason


def judge_text(extra: list[float], max_ratio: float) -> Check:
    before = [200.0 + 3 * number for number in range(len(extra))]
    after = [old + new for old, new in zip(before, extra, strict=True)]
    gate = Gate.model_validate({"perplexity": {"max_ratio": max_ratio, "confidence": 0.95}})
    return only(judge(gate, subject("original", 100, nll=before), [subject("small", 40, nll=after)]))


def test_perplexity_verdicts() -> None:
    noise = np.random.default_rng(0).normal(0, 0.4, WINDOWS)
    extra = [float(TOKENS * math.log(1.02) + noise_part) for noise_part in noise - noise.mean()]
    passed = judge_text(extra, 1.05)
    assert (passed.verdict, passed.check, passed.task) == ("pass", "perplexity.max_ratio", "text")
    assert passed.value == pytest.approx(1.02)
    assert passed.interval is not None
    low, high = passed.interval
    expected = (
        f"text: 1.0200 times the original's perplexity (90% interval {low:.4f}–{high:.4f}) over 12 windows; the limit is 1.05"
    )
    assert passed.reason == expected
    assert judge_text(extra, 1.01).verdict == "fail"
    unsettled = judge_text(extra, 1.021)
    assert unsettled.verdict == "inconclusive"
    assert unsettled.reason.endswith(f"{unsettled.items_needed:,} windows would settle it")
    single = judge_text([0.1], 1.5)
    assert single.verdict == "inconclusive"
    assert single.reason.endswith("a single window has no spread; measure more of them")


def test_size_is_compared_with_the_originals() -> None:
    gate = Gate.model_validate({"size": {"max_ratio": 0.4}})
    original = subject("original", 1_000_000)
    small_enough = only(judge(gate, original, [subject("small", 400_000)]))
    assert (small_enough.verdict, small_enough.value, small_enough.task) == ("pass", 0.4, None)
    assert small_enough.reason == "400,000 bytes, 40.00 % of the original's 1,000,000; the limit is 40 %"
    assert only(judge(gate, original, [subject("small", 400_001)])).verdict == "fail"


def test_a_check_that_nothing_measures_is_inconclusive() -> None:
    gate = Gate.model_validate({"accuracy": {"min_recovery": 0.9, "confidence": 0.95}, "fidelity": {"max_kl": 1}})
    verdict = judge(gate, subject("original", 100), [subject("small", 40)])
    assert [check.verdict for check in verdict.checks] == ["inconclusive", "inconclusive"]
    assert "add a task to eval.tasks" in verdict.checks[0].reason


def test_the_worst_check_decides_for_the_artifact_and_the_worst_artifact_for_the_run() -> None:
    before, same = outcomes(390, 0, 0, 10)
    _, few = outcomes(384, 6, 0, 10)
    original = subject("original", 100, before)
    gate = Gate.model_validate({"accuracy": {"min_recovery": 0.98, "confidence": 0.95}, "size": {"max_ratio": 0.5}})
    verdict = judge(gate, original, [subject("good", 40, same), subject("open", 40, few)])
    assert verdict.artifacts == {"good": "pass", "open": "inconclusive"}
    assert verdict.verdict == "inconclusive"
    verdict = judge(gate, original, [subject("good", 40, same), subject("open", 40, few), subject("large", 60, same)])
    assert verdict.artifacts == {"good": "pass", "open": "inconclusive", "large": "fail"}
    assert verdict.verdict == "fail"
    assert judge(gate, original, [subject("good", 40, same)]).verdict == "pass"
    assert Verdict.model_validate_json(verdict.model_dump_json()) == verdict


def test_other_items_than_the_originals_are_refused() -> None:
    gate = Gate.model_validate({"accuracy": {"min_recovery": 0.9, "confidence": 0.95}})
    with pytest.raises(DataError, match="task scenes: 2 items, and 3 when the original was measured"):
        judge(gate, subject("original", 100, [True] * 3), [subject("small", 40, [True] * 2)])


def test_nothing_to_judge_is_refused() -> None:
    with pytest.raises(UsageError, match="the gate was given no artifact"):
        judge(Gate.model_validate({"size": {"max_ratio": 0.4}}), subject("original", 100), [])


@pytest.mark.parametrize(
    ("gate", "fault"),
    [
        ({}, "checks nothing; write at least one of accuracy, perplexity, fidelity, flips, grounding, size, latency, memory"),
        ({"size": None}, "checks nothing"),
        ({"fidelity": {}}, "sets no limit; write max_kl, max_kl_p99 or min_top1"),
        ({"accuracy": {"min_recovery": 0.9}}, "confidence\n  Field required"),
        ({"accuracy": {"min_recovery": 1.1, "confidence": 0.95}}, "less than or equal to 1"),
        ({"accuracy": {"min_recovery": 0.9, "confidence": 95}}, "less than 1"),
        ({"accuracy": {"min_recovery": 0.9, "confidence": 0.5}}, "greater than 0.5"),
        ({"size": {"max_ratio": 0}}, "greater than 0"),
        ({"size": {"max_ratio": float("inf")}}, "finite number"),
        ({"speed": {}}, "Extra inputs are not permitted"),
    ],
)
def test_faults_of_a_gate(gate: dict[str, Any], fault: str) -> None:
    with pytest.raises(ValidationError, match=fault):
        Gate.model_validate(gate)


def test_the_tasks_that_checks_need() -> None:
    assert Gate.model_validate({"size": {"max_ratio": 1}}).task_checks() == ()
    gate = Gate.model_validate({"accuracy": {"min_recovery": 0.9, "confidence": 0.95}, "fidelity": {"max_kl": 1}})
    assert gate.task_checks() == ("accuracy", "fidelity")
    assert kinds_judged_by("accuracy") == kinds_judged_by("flips")
    assert {*kinds_judged_by("accuracy"), *kinds_judged_by("perplexity")} == TASKS.keys()
    assert "perplexity" in kinds_judged_by("perplexity")
    assert "perplexity" not in kinds_judged_by("accuracy")
    assert {"vqa", "zero-shot", "perplexity"} <= set(kinds_judged_by("fidelity"))
    assert "adapter" not in kinds_judged_by("fidelity")


def verdict_of(limits: dict[str, Any], original: MeasuredModel, artifact: MeasuredModel) -> Verdict:
    return judge(Gate.model_validate(limits), original, [artifact])


def test_the_size_limits_are_checked_each_by_itself() -> None:
    limits = {"size": {"max_ratio": 0.5, "max_bits_per_weight": 5, "max_bytes": 39}}
    checks = verdict_of(limits, subject("original", 100), replace(subject("small", 40), bits_per_weight=4.5)).checks
    assert [(check.check, check.verdict, check.value) for check in checks] == [
        ("size.max_ratio", "pass", 0.4),
        ("size.max_bits_per_weight", "pass", 4.5),
        ("size.max_bytes", "fail", 40),
    ]
    (unknown,) = verdict_of({"size": {"max_bits_per_weight": 5}}, subject("original", 100), subject("small", 40)).checks
    assert unknown.verdict == "inconclusive"


def test_flips_either_way_count_against_their_limit() -> None:
    before, after = outcomes(380, 10, 10, 0)
    original, small = subject("original", 100, before), subject("small", 40, after)
    (check,) = verdict_of({"flips": {"max_share": 0.02, "confidence": 0.95}}, original, small).checks
    assert (check.verdict, check.value) == ("fail", 0.05)
    assert "10 lost and 10 gained of 400 items, 5.00 %" in check.reason
    (check,) = verdict_of({"flips": {"max_share": 0.08, "confidence": 0.95}}, original, small).checks
    assert check.verdict == "pass"
    (check,) = verdict_of({"flips": {"max_share": 0.055, "confidence": 0.95}}, original, small).checks
    assert check.verdict == "inconclusive"
    assert check.items_needed is not None and check.items_needed > 400


def seeing(artifact: MeasuredModel, own: int, other: int, items: int = 64) -> MeasuredModel:
    """Return a subject that was asked `items` questions, so many of them right with their own and with another image."""
    asked = tuple(
        GroundingItem(
            id=f"q{number}",
            digest=f"digest-{number}",
            cluster=f"image-{number}",
            other="q0",
            prompt="Which colour?",
            accepted=("red",),
            said_own="red" if number < own else "blue",
            said_other="red" if number < other else "blue",
            said_none=None,
            score_own=float(number < own),
            score_other=float(number < other),
            score_none=None,
        )
        for number in range(items)
    )
    changed = sum(item.said_own != item.said_other for item in asked) / items
    grounding = Grounding(
        task="scenes", metric="exact_match", binary=True, items=items, failed=0, score_own=own / items, score_other=other / items,
        score_none=None, changed_other=changed, changed_none=None,
    )  # fmt: skip
    return replace(artifact, measurement=replace(artifact.measurement, grounding=grounding, grounding_items=asked))


def test_an_artifact_that_does_not_look_at_images_fails_and_a_blind_original_proves_nothing() -> None:
    gate = {"grounding": {"confidence": 0.95}}
    original, small = seeing(subject("original", 100), 60, 15), subject("small", 40)
    (alive,) = verdict_of(gate, original, seeing(small, 58, 16)).checks
    assert (alive.verdict, alive.task) == ("pass", "scenes")
    assert "answers depend on the image: 90.6 % with the own image, 25.0 % with another" in alive.reason
    (dead,) = verdict_of(gate, original, seeing(small, 20, 20)).checks
    assert dead.verdict == "fail"
    assert (
        "answers do not depend on the image: 31.2 % with the own image, 31.2 % with another, 0.0 % of answers changed"
        in dead.reason
    )
    (useless,) = verdict_of(gate, seeing(subject("original", 100), 20, 20), seeing(small, 20, 20)).checks
    assert useless.verdict == "inconclusive"
    assert "the original itself answers 64 questions no better with their own image" in useless.reason
    (unasked,) = verdict_of(gate, original, small).checks
    assert (unasked.verdict, unasked.reason) == (
        "inconclusive",
        "it was not seen whether answers depend on the image; add eval.grounding",
    )


def test_the_mean_over_tasks_has_a_limit_of_its_own() -> None:
    def both(name: str, size: int, answers: list[bool]) -> MeasuredModel:
        one = subject(name, size, answers)
        measured = one.measurement
        tasks = measured.tasks | {"again": measured.tasks["scenes"].model_copy(update={"name": "again"})}
        return replace(one, measurement=replace(measured, tasks=tasks, items={**measured.items, "again": measured.items["scenes"]}))

    before, after = outcomes(370, 10, 0, 20)
    gate = {"accuracy": {"min_recovery": 0.95, "confidence": 0.95, "overall": 0.96}}
    checks = verdict_of(gate, both("original", 100, before), both("small", 40, after)).checks
    assert [(check.check, check.task) for check in checks] == [
        ("accuracy.min_recovery", "scenes"),
        ("accuracy.min_recovery", "again"),
        ("accuracy.overall", None),
    ]
    one, _, overall = checks
    assert overall.value == one.value == pytest.approx(370 / 380)
    assert one.interval is not None and overall.interval is not None
    assert one.interval[0] < overall.interval[0] < overall.interval[1] < one.interval[1]


def test_a_task_may_have_a_limit_of_its_own() -> None:
    before, after = outcomes(330, 50, 2, 18)
    limit = {"min_recovery": 0.99, "confidence": 0.95, "tasks": {"scenes": 0.8}}
    (check,) = verdict_of({"accuracy": limit}, subject("original", 100, before), subject("small", 40, after)).checks
    assert (check.verdict, check.limit) == ("pass", 0.8)
    assert check.reason.endswith("the limit is 80 %")
    stopping = Gate.model_validate({"accuracy": {**limit, "sequential": 3}}).stopping("local", ["scenes", "other"])
    assert {name: (rule.limit, rule.looks) for name, rule in stopping.items()} == {"scenes": (0.8, 3), "other": (0.99, 3)}


def test_an_evaluation_that_stopped_early_is_judged_on_what_was_asked_at_the_levels_of_its_look() -> None:
    before, after = outcomes(370, 0, 0, 30)
    order = [number * 7 % 400 for number in range(400)]
    before, after = ([answers[index] for index in order] for answers in (before, after))
    original, small = subject("original", 100, before), subject("small", 40, after[:200])
    tasks = {"scenes": small.measurement.tasks["scenes"].model_copy(update={"look": 2, "looks": 4})}
    small = replace(small, measurement=replace(small.measurement, tasks=tasks))
    limit = {"min_recovery": 0.9, "confidence": 0.95}
    (check,) = verdict_of({"accuracy": {**limit, "sequential": 4}}, original, small).checks
    assert check.verdict == "pass"
    assert "of 200 items, settled after part 2 of 4, 0 lost and 0 gained; the limit is 90 %" in check.reason
    fixed = only(
        judge(Gate.model_validate({"accuracy": limit}), subject("original", 100, before[:200]), [subject("s", 40, after[:200])])
    )
    assert check.interval is not None and fixed.interval is not None
    assert check.interval[0] < fixed.interval[0]  # early looks ask for more
    tasks = {"scenes": tasks["scenes"].model_copy(update={"look": None, "looks": None})}
    with pytest.raises(DataError, match="200 items, and 400 when the original was measured"):
        verdict_of({"accuracy": limit}, original, replace(small, measurement=replace(small.measurement, tasks=tasks)))


def test_a_task_that_was_not_measured_leaves_its_checks_open() -> None:
    original, small = subject("original", 100, [True] * 10), subject("small", 40)
    small = replace(small, measurement=replace(small.measurement, skipped={"scenes": "the server gives no answers"}))
    limits = {"accuracy": {"min_recovery": 0.9, "confidence": 0.95}, "fidelity": {"max_kl": 1}}
    checks = verdict_of(limits, original, small).checks
    assert {check.verdict for check in checks} == {"inconclusive"}
    assert {check.reason for check in checks} == {"scenes: not measured: the server gives no answers"}


def test_a_target_has_limits_of_its_own_and_the_worst_target_decides() -> None:
    gate = Gate.model_validate({"size": {"max_ratio": 0.5}, "targets": {"edge": {"size": {"max_ratio": 0.3}}}})
    models = subject("original", 100), [subject("small", 40)]
    verdicts = [judge(gate, *models, target) for target in ("server", "edge")]
    assert [verdict.verdict for verdict in verdicts] == ["pass", "fail"]
    both = combine_verdicts(verdicts)
    assert (both.verdict, both.artifacts) == ("fail", {"small": "fail"})
    assert [check.target for check in both.checks] == ["server", "edge"]
