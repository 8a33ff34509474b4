"""The metrics on cases worked out by hand from their published definitions."""

import math
from collections import Counter
from collections.abc import Sequence
from types import SimpleNamespace

import pytest

from compress.eval.metrics import METRICS, load_metric, metrics_of
from compress.eval.metrics.anls import anls, edit_distance
from compress.eval.metrics.cider import Cider, tokens
from compress.eval.metrics.letter import letter, named_option
from compress.eval.metrics.metric import mean_score
from compress.eval.metrics.relaxed import relaxed
from compress.eval.metrics.vqa_vote import vqa_vote
from compress.eval.metrics.yes_no import says_yes, yes_no, yes_no_figures


def test_every_row_is_a_metric_of_that_name() -> None:
    assert {name: load_metric(name).name for name in METRICS} == {name: name for name in METRICS}
    assert [name for name in METRICS if not load_metric(name).binary] == ["anls", "vqa_vote", "cider", "recall@1", "perplexity"]
    assert (metrics_of("choice"), metrics_of("caption")) == (("letter",), ("cider",))
    perplexity, unknown = load_metric("perplexity"), load_metric("a harness's own")
    assert (perplexity.show(8.4123), perplexity.show_ratio(1.02), perplexity.larger_is_better) == ("8.412", "×1.0200", False)
    assert (unknown.show(0.75), unknown.show_ratio(0.9), unknown.binary) == ("75.00%", "90.00%", True)
    with pytest.raises(ValueError, match="a harness's own does not score answers"):
        unknown.scorer([])


OPTIONS = ("a red fox", "a blue whale", "7", "none of these")


def test_a_mean_is_over_all_items() -> None:
    assert mean_score([SimpleNamespace(score=score) for score in (1.0, 0.5, 0.0)]) == 0.5


def test_every_metric_gives_scores_from_0_to_1_and_binary_ones_nothing_between() -> None:
    answers = ["yes", "no", "B", "12", "12.4", "the red fox", "", "(C) 7"]
    assert len(metrics_of("vqa")) >= 4
    for name in metrics_of("vqa"):
        metric = load_metric(name)
        score = metric.scorer([])
        scores = {score(answer, [accepted] * 10) for answer in answers for accepted in answers if accepted}
        assert all(0 <= score <= 1 for score in scores)
        assert {0.0, 1.0} <= scores
        assert not metric.binary or scores == {0.0, 1.0}


# https://visualqa.org/evaluation.html: min(people who said it / 3, 1), averaged over all ten sets of nine people
@pytest.mark.parametrize(("agreeing", "score"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (9, 1.0), (10, 1.0)])
def test_votes_are_averaged_over_leaving_each_person_out(agreeing: int, score: float) -> None:
    accepted = ["red"] * agreeing + [f"other {number}" for number in range(10 - agreeing)]
    assert vqa_vote("red", accepted) == pytest.approx(score, abs=1e-12)


@pytest.mark.parametrize(
    ("answer", "accepted"),
    [
        ("Two", "2"),  # number words become digits
        ("2.", "two"),
        ("a dog", "The dog!"),  # articles and punctuation vanish
        ("dont know", "don't know"),  # contractions get their apostrophe
        ("100,978", "100978"),
        ("2:50 PM", "2:50 pm"),  # colons stay
        ("none", "0"),
    ],
)
def test_votes_are_compared_in_the_published_form(answer: str, accepted: str) -> None:
    assert vqa_vote(answer, [accepted] * 3 + ["other"] * 7) == pytest.approx(0.9)
    assert vqa_vote(answer, ["other"] * 10) == 0


def test_a_blank_answer_of_a_person_agrees_with_nobody() -> None:
    assert vqa_vote("red", ["red"] * 3 + ["blue"] * 4) == pytest.approx(0.9)  # the three blank ones are not among the accepted


def test_a_single_answer_is_taken_for_that_of_all() -> None:
    assert (vqa_vote("Red.", ["red"]), vqa_vote("blue", ["red"])) == (1.0, 0.0)
    assert vqa_vote("red", ["red", "blue"]) == pytest.approx(0.3)


# arXiv 2203.10244, section 5.1: "within 5% of the gold answer"; "for non-numeric answers, we still need an exact match"
@pytest.mark.parametrize(
    ("answer", "accepted", "score"),
    [
        ("105", "100", 1.0),
        ("95", "100", 1.0),
        ("105.1", "100", 0.0),
        ("94.9", "100", 0.0),
        ("-1.04", "-1", 1.0),
        ("1", "-1", 0.0),
        ("0.5", "50%", 1.0),  # a percent sign divides by 100
        ("48%", "50%", 1.0),
        ("50", "50%", 0.0),
        ("50%", "50", 0.0),
        ("2019", "2020", 1.0),  # years are numbers like others
        ("1900", "2020", 0.0),
        ("0", "0", 1.0),  # nothing is within 5 % of 0 but itself, as a text
        ("0.0", "0", 0.0),
        ("0.01", "0", 0.0),
        ("Yes", "yes", 1.0),
        ("Yes.", "yes", 0.0),
        ("1,000", "1000", 0.0),
        ("United States", "united states", 1.0),
        ("nan", "nan", 1.0),
        ("inf", "5", 0.0),
        ("", "5", 0.0),
        (" 14 \n", "14", 1.0),
    ],
)
def test_numbers_may_be_5_percent_off(answer: str, accepted: str, score: float) -> None:
    assert relaxed(answer, [accepted]) == score
    assert relaxed(answer, ["something else", accepted]) == score


# arXiv 1907.00490, equation 1, and arXiv 2007.00398: 1 - NL where NL < 0.5, else 0; case does not count, spaces do
@pytest.mark.parametrize(
    ("answer", "accepted", "score"),
    [
        ("Amsterdam", ["amsterdam"], 1.0),
        ("amsterdm", ["amsterdam"], 1 - 1 / 9),
        ("abcd", ["abxy"], 0.0),  # half of the letters are wrong: at the threshold
        ("abcde", ["abcxy"], 1 - 2 / 5),  # below it
        ("abcde", ["abxyz"], 0.0),  # above it
        ("ab", ["a b"], 1 - 1 / 3),
        ("  a   b ", ["a b"], 1.0),
        ("red", ["blue", "reds"], 0.75),  # the best of the accepted ones
        ("", ["x"], 0.0),
        ("a very long answer about 12", ["12"], 0.0),
    ],
)
def test_letters_that_must_change(answer: str, accepted: list[str], score: float) -> None:
    assert anls(answer, accepted) == pytest.approx(score, abs=1e-12)


@pytest.mark.parametrize(
    ("one", "other", "distance"), [("kitten", "sitting", 3), ("flaw", "lawn", 2), ("", "abc", 3), ("abc", "", 3), ("ab", "ba", 2)]
)
def test_edit_distance(one: str, other: str, distance: int) -> None:
    assert edit_distance(one, other) == edit_distance(other, one) == distance


@pytest.mark.parametrize(
    ("answer", "index"),
    [
        ("B", 1),
        ("b", 1),
        (" (b). ", 1),
        ("B.", 1),
        ("B: a blue whale", 1),
        ("The answer is (C).", 2),
        ("(A) cannot be, so it is (D)", 3),  # the last one counts
        ("A is wrong, so it is C.", 2),
        ("a blue whale", 1),
        ("A blue whale.", 1),  # its text, though it begins with a letter
        ("7", 2),
        ("I believe that it must be a blue whale here", 1),  # more than five words, and the text of one of them
        ("one might think a red fox, but it is a blue whale", 1),
        ("it is 7", None),  # too short to look for a text in it
        ("E", None),  # there is no fifth
        ("DNA", None),  # no letter of its own
        ("B's", None),
        ("I do not know what this is at all", None),
        ("", None),
    ],
)
def test_the_option_that_an_answer_names(answer: str, index: int | None) -> None:
    assert named_option(answer, OPTIONS) == index


def test_a_letter_alone_is_a_letter_though_it_may_be_a_text_too() -> None:
    assert named_option("A", ("it", "but", "a")) == 0
    assert named_option("B", ("B", "C", "A")) == 1
    assert named_option("d", ("b", "c", "d")) == 2  # there is no fourth option


def test_equal_options_are_told_by_their_letter_alone() -> None:
    assert named_option("same", ("same", "same")) is None
    assert named_option("B", ("same", "same")) == 1


def test_a_letter_beside_accepted_letters() -> None:
    assert letter("The answer is (C).", ["C"]) == 1
    assert letter("c", ["C"]) == 1
    assert letter("B", ["C"]) == 0
    assert letter("nothing", ["C"]) == 0


# https://github.com/RUCAIBox/POPE, evaluate.py: no where the first sentence has the word "no" or "not", else yes
@pytest.mark.parametrize(
    ("answer", "yes"),
    [
        ("Yes", True),
        ("No", False),
        ("no, there is none", False),
        ("There is not.", False),
        ("Yes. There is no cat, though.", True),
        ("Nothing of the kind", True),  # as published
        ("", True),
    ],
)
def test_yes_and_no(answer: str, yes: bool) -> None:
    assert says_yes(answer) is yes
    assert yes_no(answer, ["yes"]) == float(yes)
    assert yes_no(answer, ["no"]) == float(not yes)


def test_precision_recall_and_f1_of_yes() -> None:
    answers = ["yes", "yes", "yes", "no", "no", None, None]
    expected = ["yes", "yes", "no", "yes", "no", "yes", "no"]
    figures = yes_no_figures([(answer, [right]) for answer, right in zip(answers, expected, strict=True)])
    # 2 hits, 2 false alarms (one without an answer), 2 misses (one without an answer)
    assert figures == {"precision": 0.5, "recall": 0.5, "f1": 0.5, "yes_share": 4 / 7}
    assert load_metric("yes_no").figures([("no", ["no"])]) == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "yes_share": 0.0}
    assert load_metric("anls").figures([("no", ["no"])]) == {}


REFERENCES = [
    ["a man rides a brown horse", "a man on a horse", "the man is riding"],
    ["two dogs play in the snow", "dogs run through deep snow"],
    ["a man eats a red apple", "somebody eats an apple"],
]


def cider_by_the_formula(answer: str, references: Sequence[str], corpus: Sequence[Sequence[str]]) -> float:
    """CIDEr-D of arXiv 1411.5726: equations 1 to 4, the last with its penalty and clipping as COCO's script sets them."""

    def grams(text: str, n: int) -> Counter[str]:
        words = text.split()
        return Counter(" ".join(words[i : i + n]) for i in range(len(words) - n + 1))

    def weights(text: str, n: int) -> dict[str, float]:
        images = len(corpus)
        return {
            gram: times * math.log(images / max(1, sum(any(gram in grams(text, n) for text in texts) for texts in corpus)))
            for gram, times in grams(text, n).items()
        }

    def norm(vector: dict[str, float]) -> float:
        return math.sqrt(sum(value * value for value in vector.values()))

    total = 0.0
    for n in (1, 2, 3, 4):
        for reference in references:
            one, other = weights(answer, n), weights(reference, n)
            dot = sum(min(one.get(gram, 0.0), value) * value for gram, value in other.items())
            length = norm(one) * norm(other)
            gap = len(answer.split()) - len(reference.split())
            total += (dot / length if length else 0.0) * math.exp(-(gap**2) / (2 * 6**2)) / len(references)
    return 10 * total / 4


@pytest.mark.parametrize(
    ("index", "answer"),
    [
        (0, "a man rides a brown horse"),
        (0, "a man rides a horse"),
        (0, "a horse a horse a horse"),  # clipped: a horse is counted once
        (0, "brown horse"),
        (1, "a man rides a brown horse"),
        (1, "dogs in the deep snow play two games of chess with a man for hours"),
        (2, "somebody eats an apple"),
        (2, "zebras"),
    ],
)
def test_cider_is_that_of_the_formula(index: int, answer: str) -> None:
    expected = cider_by_the_formula(answer, REFERENCES[index], REFERENCES)
    assert Cider(REFERENCES).score(answer, REFERENCES[index]) == pytest.approx(expected, rel=1e-12, abs=1e-15)


def test_cider_worked_out_by_hand() -> None:
    # two images with one caption each; no n-gram stands in both, so every weight is its count times log 2
    cider = Cider([["red square"], ["blue circle"]])
    # the same words: cosines 1 for n = 1 and 2, none for 3 and 4 as there are no such n-grams: 10 * 2 / 4
    assert cider.score("Red square.", ["red square"]) == pytest.approx(5.0)
    # one of two words: (log 2)² / (log 2 * sqrt(2) log 2) = 1 / sqrt(2) for n = 1, and one word less: exp(-1 / 72)
    assert cider.score("red", ["red square"]) == pytest.approx(10 / 4 / math.sqrt(2) * math.exp(-1 / 72))
    # another order: cosine 1 for n = 1, no common pair
    assert cider.score("square red", ["red square"]) == pytest.approx(2.5)
    assert cider.score("", ["red square"]) == 0


def test_words_that_every_image_has_weigh_nothing() -> None:
    cider = Cider([["a cat"], ["a dog"]])
    assert cider.score("a", ["a cat"]) == 0
    assert cider.score("a cat", ["a cat"]) == pytest.approx(5.0)


def test_words_as_the_treebank_tokenizer_gives_them() -> None:
    assert tokens("A man's dog, it seems, doesn't like (red) T-shirts!") == [
        *("a", "man", "'s", "dog", "it", "seems", "does", "n't", "like", "red", "t-shirts"),
    ]
    assert tokens("It\u2019s 3.5 or 10:30; they\u2019re at the\u2026 \u201cend\u201d") == [
        *("it", "'s", "3.5", "or", "10:30", "they", "'re", "at", "the", "end"),
    ]
