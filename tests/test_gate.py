import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from compress.errors import DataError, UsageError
from compress.eval.results import (
    AnyItem,
    Fidelity,
    Grounding,
    GroundingItem,
    ItemizedMeasurement,
    PerplexityMetrics,
    QuestionItem,
    ScoreMetrics,
    TaskMeasurement,
    WholeKl,
    WindowItem,
)
from compress.gate import SCORED_TASK_KINDS, Check, Gate, MeasuredModel, Verdict, combine_verdicts, judge

WINDOWS = 12
TOKENS = 63

MEAN_KL = "scenes: mean KL 0.01000 (90% interval 0.00800–0.01200) nats per token, 800 tokens"


def question(number: int, right: bool) -> QuestionItem:
    return QuestionItem(
        id=f"q{number}",
        digest=f"digest-{number}",
        prompt="Which colour?",
        accepted=("red",),
        said="red" if right else "blue",
        cluster=f"image-{number}",
        score=float(right),
        token_ids=(1, 2),
        tokens=2,
        nll=0.5,
    )


def window(number: int, nll: float) -> WindowItem:
    return WindowItem(id=f"window-{number:05d}", digest=f"text-{number}", tokens=TOKENS, nll=nll)


def fidelity(**changes: Any) -> Fidelity:
    fields: dict[str, Any] = {"tokens": 800, "kl_mean": 0.01, "kl_p99": 0.2, "kl_interval": (0.008, 0.012), "top1_agreement": 0.97}
    return Fidelity(**(fields | changes))


def subject(
    name: str, size: int, right: list[bool] | None = None, nll: list[float] | None = None, alike: Fidelity | None = None
) -> MeasuredModel:
    tasks: dict[str, TaskMeasurement] = {}
    items: dict[str, tuple[AnyItem, ...]] = {}
    if right is not None:
        metrics = ScoreMetrics(task="vqa", metric="exact_match", score=sum(right) / len(right), items=len(right))
        tasks["scenes"] = TaskMeasurement(name="scenes", metrics=metrics, fidelity=alike)
        items["scenes"] = tuple(question(number, answer) for number, answer in enumerate(right))
    if nll is not None:
        tokens = TOKENS * len(nll)
        perplexity = PerplexityMetrics(perplexity=math.exp(sum(nll) / tokens), window=TOKENS + 1, windows=len(nll), tokens=tokens)
        tasks["text"] = TaskMeasurement(name="text", metrics=perplexity, fidelity=alike)
        items["text"] = tuple(window(number, value) for number, value in enumerate(nll))
    return MeasuredModel(artifact=name, bytes=size, measurement=ItemizedMeasurement(tasks, items))


def outcomes(both: int, lost: int, gained: int, neither: int) -> tuple[list[bool], list[bool]]:
    original = [True] * (both + lost) + [False] * (gained + neither)
    artifact = [True] * both + [False] * lost + [True] * gained + [False] * neither
    return original, artifact


def only(verdict: Verdict) -> Check:
    assert len(verdict.checks) == 1
    return verdict.checks[0]


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


@pytest.mark.parametrize(
    ("limits", "verdict", "reason"),
    [
        ({"max_kl": 0.011}, "pass", f"{MEAN_KL}; the limit is 0.011"),
        ({"max_kl": 0.009}, "fail", f"{MEAN_KL}; the limit is 0.009"),
        ({"min_top1": 0.97}, "pass", "scenes: the same top token for 97.00 % of tokens, 800 tokens; the limit is 97 %"),
        ({"min_top1": 0.98}, "fail", "scenes: the same top token for 97.00 % of tokens, 800 tokens; the limit is 98 %"),
    ],
)
def test_fidelity_is_compared_plainly(limits: dict[str, float], verdict: str, reason: str) -> None:
    original, artifact = subject("original", 100, [True]), subject("small", 40, [True], alike=fidelity())
    check = only(judge(Gate.model_validate({"fidelity": limits}), original, [artifact]))
    assert (check.check, check.verdict, check.reason) == (f"fidelity.{next(iter(limits))}", verdict, reason)


def below(kl: float, full: WholeKl | None = None, **changes: Any) -> Fidelity:
    """KL over the likeliest tokens alone."""
    return fidelity(kl_mean=kl, kl_interval=(0.9 * kl, 1.1 * kl), at_least=True, whole=full, **changes)


def over_all(mean: float, interval: tuple[float, float] | None, p99: float | None = None) -> WholeKl:
    return WholeKl(tokens=320, kl_mean=mean, kl_interval=interval, kl_p99_at_most=p99)


@pytest.mark.parametrize(
    ("compared", "verdict", "text"),
    [
        (below(0.0006), "inconclusive", "mean KL at least 0.00060 (90% interval 0.00054–0.00066) nats per token"),
        (below(0.0006), "inconclusive", "KL is known from below, which may fail a limit but cannot pass it; set the runtime"),
        (below(0.0011), "fail", "mean KL at least 0.00110"),
        (below(0.0006, over_all(0.00104, (0.00101, 0.00108))), "fail", "over the whole vocabulary 0.00104 for the same tokens"),
        (
            below(0.0006, over_all(0.0009, (0.00085, 0.00098))),
            "pass",
            "0.00090 for the same tokens, as 320 of them show (90% interval 0.00085–0.00098)",
        ),
        (below(0.0006, over_all(0.00098, (0.00092, 0.00105))), "inconclusive", "leave open; raise the runtime's whole_tokens"),
        (below(0.0006, over_all(0.0007, None)), "inconclusive", "too few for an upper bound"),
        (below(0.0012, over_all(0.0012, (0.0012, 0.0012))), "fail", "mean KL at least 0.00120"),
        (below(0.0012, over_all(0.0009, (0.0007, 0.0011))), "fail", "mean KL at least 0.00120"),
    ],
)
def test_a_lower_bound_of_kl_fails_a_limit_and_never_passes_it(compared: Fidelity, verdict: str, text: str) -> None:
    original, artifact = subject("original", 100, [True]), subject("small", 40, [True], alike=compared)
    check = only(judge(Gate.model_validate({"fidelity": {"max_kl": 0.001}}), original, [artifact]))
    assert check.verdict == verdict and text in check.reason
    assert check.at_least == (compared.whole is None)
    if check.interval is not None:
        assert check.interval_level == 0.9


@pytest.mark.parametrize(
    ("compared", "verdict", "text"),
    [
        (below(0.01, kl_p99=0.2), "inconclusive", "99th percentile of KL at least 0.20000 nats"),
        (below(0.01, kl_p99=0.4), "fail", "99th percentile of KL at least 0.40000 nats"),
        (below(0.01, over_all(0.01, (0.01, 0.02), 0.25), kl_p99=0.2), "pass", "and at most 0.25000 with 95 % confidence by 320"),
        (below(0.01, over_all(0.01, (0.01, 0.02), 0.35), kl_p99=0.2), "inconclusive", "raise the runtime's whole_tokens"),
        (fidelity(kl_p99=0.2), "pass", "KL at most 0.20000 nats for 99 % of tokens"),
    ],
)
def test_the_99th_percentile_from_below_never_passes_either(compared: Fidelity, verdict: str, text: str) -> None:
    original, artifact = subject("original", 100, [True]), subject("small", 40, [True], alike=compared)
    check = only(judge(Gate.model_validate({"fidelity": {"max_kl_p99": 0.3}}), original, [artifact]))
    assert check.verdict == verdict and text in check.reason


def with_kl(
    name: str, kl: list[float], right: list[bool], again: list[tuple[float, bool]] | None = None, same_top: float = 1.0
) -> MeasuredModel:
    """A model whose items have these KL sums, and of the original what they were when it was asked again."""
    model = subject(name, 100, right, alike=fidelity(kl_mean=sum(kl) / (2 * len(kl)), kl_interval=None))
    items = tuple(
        item.model_copy(update={"kl": value}) for item, value in zip(model.measurement.questions("scenes"), kl, strict=True)
    )
    if again is None:
        return replace(model, measurement=replace(model.measurement, items={"scenes": items}))
    repeated = tuple(
        item.model_copy(update={"kl": value, "score": float(score)}) for item, (value, score) in zip(items, again, strict=False)
    )
    noise = fidelity(kl_mean=sum(value for value, _ in again) / (2 * len(again)), top1_agreement=same_top)
    task = model.measurement.tasks["scenes"].model_copy(update={"fidelity": None, "noise": noise})
    measured = replace(model.measurement, tasks={"scenes": task}, items={"scenes": items}, repeated_items={"scenes": repeated})
    return replace(model, measurement=measured)


def test_kl_that_is_no_more_than_the_originals_own_does_not_fail() -> None:
    """The original asked again in other batches differs from itself as much as the artifact does from it."""
    spread = [0.02 + 0.001 * (number % 5) for number in range(64)]
    artifact = with_kl("small", spread, [True] * 64)
    gate = Gate.model_validate({"fidelity": {"max_kl": 0.005, "min_top1": 0.98}})
    own = [(value, True) for value in reversed(spread[:40])]
    noisy = with_kl("original", [0.0] * 64, [True] * 64, own, 0.96)
    checks = judge(gate, noisy, [artifact]).checks
    assert [check.verdict for check in checks] == ["inconclusive", "inconclusive"]
    assert "(the original asked again: 0.01" in checks[0].reason
    assert "not shown to be further off than the original is from itself, asked in another order and batch" in checks[0].reason
    assert "for 97.00 % of tokens (the original asked again: 96.00 %)" in checks[1].reason
    quiet = with_kl("original", [0.0] * 64, [True] * 64, [(0.0, True)] * 40, 0.99)
    assert [check.verdict for check in judge(gate, quiet, [artifact]).checks] == ["fail", "fail"]


def test_flips_that_are_no_more_than_the_originals_own_do_not_fail() -> None:
    right = [number % 2 == 0 for number in range(200)]
    flipped = [not answer if number % 5 == 0 else answer for number, answer in enumerate(right)]
    gate = Gate.model_validate({"flips": {"max_share": 0.1, "confidence": 0.95}})
    artifact = with_kl("small", [0.0] * 200, flipped)
    own = [(0.0, not answer if number % 6 == 1 else answer) for number, answer in enumerate(right[:100])]
    check = only(judge(gate, with_kl("original", [0.0] * 200, right, own), [artifact]))
    assert check.verdict == "inconclusive"
    assert "(the original asked again: 17.00 %)" in check.reason
    assert "not shown to be more than of the original itself (p = " in check.reason
    still = with_kl("original", [0.0] * 200, right, [(0.0, answer) for answer in right[:100]])
    check = only(judge(gate, still, [artifact]))
    assert (check.verdict, check.interval_level) == ("fail", pytest.approx(0.9))
    assert check.reason.startswith("scenes: 20 lost and 20 gained of 200 items, 20.00 % (90% interval ")


def test_fidelity_without_a_comparison_is_inconclusive() -> None:
    gate = Gate.model_validate({"fidelity": {"max_kl": 1, "min_top1": 0.1}})
    verdict = judge(gate, subject("original", 100, [True]), [subject("small", 40, [True])])
    assert [check.verdict for check in verdict.checks] == ["inconclusive", "inconclusive"]
    assert "was not compared with the original" in verdict.checks[0].reason


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
    assert Gate.model_validate({"size": {"max_ratio": 1}}).required_task_kinds() == {}
    gate = Gate.model_validate({"accuracy": {"min_recovery": 0.9, "confidence": 0.95}, "fidelity": {"max_kl": 1}})
    assert gate.required_task_kinds() == {"accuracy": SCORED_TASK_KINDS, "fidelity": (*SCORED_TASK_KINDS[:-1], "perplexity")}


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
