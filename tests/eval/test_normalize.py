import pytest

from compress.eval.metrics.exact_match import exact_match
from compress.eval.metrics.normalize import normalize


@pytest.mark.parametrize(
    ("said", "normal"),
    [
        ("Red", "red"),  # lower case
        ("  a red   circle\n", "red circle"),  # articles, spaces
        ("An apple and the pear", "apple and pear"),
        ("another", "another"),  # only whole words are articles
        ("Three", "3"),
        ("none", "0"),
        ("ten dogs", "10 dogs"),
        ("someone", "someone"),  # only whole words are numbers
        ("Yes.", "yes"),
        ("U.S.A.", "usa"),
        ("3.5", "3.5"),  # a decimal point stays
        ("3.", "3"),
        (".5", ".5"),
        ("100,978", "100978"),  # no space where a comma stood between digits
        ("red,blue", "red blue"),
        ("red, blue", "red blue"),
        ("black/white", "black white"),
        ("t-shirt", "t shirt"),
        ("really?!", "really"),
        ('"stop"', "stop"),
        ("(left) [right] {up}", "left right up"),
        ("2:50 pm", "2:50 pm"),  # colons tell the time
        ("girl's", "girl's"),  # apostrophes tell possessives from plurals
        ("girl\u2019s", "girl's"),
        ("dont", "don't"),
        ("Wouldnt've", "wouldn't've"),
        ("wouldn'tve", "wouldn't've"),
        ("wouldntve", "wouldn't've"),
        ("oclock", "o'clock"),
        ("twas", "'twas"),
        ("$5", "$5"),
        ("50%", "50%"),
        ("", ""),
    ],
)
def test_answers_take_the_published_form(said: str, normal: str) -> None:
    assert normalize(said) == normal


@pytest.mark.parametrize("word", ["well", "were", "ill", "shed", "its", "wed", "hell", "whore", "id"])
def test_words_of_their_own_are_no_contractions(word: str) -> None:
    assert normalize(word) == word


def test_normalizing_twice_changes_nothing() -> None:
    for text in ("The 100,978 Dogs, dont (ever) bark.", "two t-shirts/ 3.5 o'clock"):
        assert normalize(normalize(text)) == normalize(text)


def test_any_accepted_answer_matches() -> None:
    assert exact_match("Two.", ("three", "2"))
    assert not exact_match("Two.", ("three", "22"))
    assert not exact_match("", ("red",))
