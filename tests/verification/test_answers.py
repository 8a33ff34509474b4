from pathlib import Path

import pytest

from compress.errors import VerificationError
from compress.runtimes.runtime import Answer
from compress.verification.answers import AnswerSet, judge_answers
from compress.verification.limits import DifferenceLimits, Rounding
from compress.verification.results import Answers, Shown
from compress.verification.verify import check_answers

EXACT: frozenset[Rounding] = frozenset(("float32",))
LIMITS = DifferenceLimits(EXACT, EXACT, EXACT)
BLOCKS: frozenset[Rounding] = frozenset(("float32", "inputs in blocks"))
ROUNDED = DifferenceLimits(EXACT, EXACT, BLOCKS)


def answer_set(texts_by_image: dict[Shown, list[str]], likelihoods: dict[Shown, list[float]]) -> AnswerSet:
    answers: dict[Shown, list[Answer]] = {}
    for shown, texts in texts_by_image.items():
        answers[shown] = [Answer(f"{index}", text, (index,)) for index, text in enumerate(texts)]
    return AnswerSet(answers, likelihoods)


REFERENCE = answer_set(
    {"right image": ["red", "two"], "wrong image": ["blue", "two"], "no image": ["grey", "none"]},
    {"right image": [-0.2, -0.4], "wrong image": [-0.9, -0.5]},
)


def artifact_answers(right: list[float], wrong: list[float], *, last: str = "none") -> AnswerSet:
    return answer_set(
        {"right image": ["red", "two"], "wrong image": ["blue", "two"], "no image": ["grey", last]},
        {"right image": right, "wrong image": wrong},
    )


def judged(artifact: AnswerSet, limits: DifferenceLimits = LIMITS) -> Answers:
    return judge_answers(REFERENCE, artifact, limits)


def test_answers_are_counted_by_what_was_shown() -> None:
    comparison = judged(artifact_answers([-0.2, -0.4], [-0.9, -0.5], last="nothing"))
    assert [(row.shown, row.same, row.prompts) for row in comparison.agreement] == [
        ("right image", 2, 2),
        ("wrong image", 2, 2),
        ("no image", 1, 2),
    ]
    assert (comparison.seeing, comparison.ungrounded, comparison.likelihood) == (2, 0, 0.0)
    assert (comparison.changed_checkpoint, comparison.changed_artifact) == (1, 1)


def test_an_artifact_whose_likelihoods_no_image_moves_is_blind() -> None:
    comparison = judged(artifact_answers([-0.2, -0.4], [-0.2, -0.4]))
    assert (comparison.seeing, comparison.ungrounded) == (2, 2)
    with pytest.raises(VerificationError, match=r"onnx: not grounded in its images: for 2 of 2 prompts another image changes what"):
        check_answers(Path("onnx"), comparison)


def test_a_prompt_that_no_image_moves_in_the_checkpoint_proves_nothing() -> None:
    reference = answer_set({"right image": ["a"], "wrong image": ["a"]}, {"right image": [-0.2], "wrong image": [-0.2]})
    comparison = judge_answers(reference, reference, LIMITS)
    assert (comparison.seeing, comparison.ungrounded) == (0, 0)
    check_answers(Path("onnx"), comparison)


def test_likelihoods_beyond_the_limit_fail_and_those_that_are_missing_too() -> None:
    with pytest.raises(VerificationError, match=r"more or less likely by 0.05 nats per token \(limit 0.001\)"):
        check_answers(Path("onnx"), judged(artifact_answers([-0.25, -0.4], [-0.9, -0.5])))
    check_answers(Path("onnx"), judged(artifact_answers([-0.25, -0.4], [-0.9, -0.5]), ROUNDED))
    with pytest.raises(VerificationError, match=r"by inf nats per token"):
        check_answers(Path("onnx"), judged(artifact_answers([float("nan"), -0.4], [-0.9, -0.5]), ROUNDED))


def test_other_answers_fail_where_nothing_is_rounded() -> None:
    artifact = artifact_answers([-0.2, -0.4], [-0.9, -0.5], last="nothing")
    with pytest.raises(VerificationError, match=r"gives 5 of 6 answers as the checkpoint does \(limit 95%\)"):
        check_answers(Path("onnx"), judged(artifact))
    check_answers(Path("onnx"), judged(artifact, ROUNDED))


def test_a_prompt_that_the_checkpoint_does_not_take_is_not_held_against_the_artifact() -> None:
    refused = [Answer("0", "", (), fault="takes 900 tokens")]
    unknown = [float("nan")]
    reference = AnswerSet({"right image": refused, "wrong image": refused}, {"right image": unknown, "wrong image": unknown})
    comparison = judge_answers(reference, reference, LIMITS)
    assert comparison.agreement == ()
    check_answers(Path("onnx"), comparison)
