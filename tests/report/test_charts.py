import math
import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.report.charts import HEIGHT, WIDTH, Axis, Chart, Limit, Point, Series, Unit, draw, pareto_front, swatch, ticks

NUMBERS = st.floats(min_value=-1e9, max_value=1e9, allow_nan=False)
SVG = "{http://www.w3.org/2000/svg}"


def plain(value: float) -> str:
    return f"{value:g}"


def chart(*series: Series, **more: object) -> Chart:
    content = {"title": "t", "summary": "s", "x": Axis("x", plain), "y": Axis("y", plain), "series": series, **more}
    return Chart(**content)  # pyright: ignore[reportArgumentType]


def parsed(drawing: str) -> ElementTree.Element:
    return ElementTree.fromstring(drawing.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1))


def texts(drawing: str, kind: str) -> list[str]:
    return [text.text or "" for text in parsed(drawing).iter(f"{SVG}text") if text.get("class") == kind]


def marks(drawing: str) -> list[tuple[float, float]]:
    marks = re.findall(r'class="mark [^"]*" d="M(\S+) ([^m]+)m', drawing)
    return [(float(x), float(y)) for x, y in marks]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 17.6, [0, 5, 10, 15]),
        (78, 84.9, [78, 80, 82, 84]),
        (0.981, 1.0, [0.985, 0.99, 0.995, 1.0]),
        (-3, 3, [-2, 0, 2]),
    ],
)
def test_ticks_are_round_numbers(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


@given(NUMBERS, st.floats(min_value=1e-3, max_value=1e9))
def test_there_are_a_few_ticks_and_they_lie_between_the_ends(low: float, spread: float) -> None:
    values = ticks(low, low + spread)
    assert 2 <= len(values) <= 7
    slack = 1e-6 * max(abs(low), spread)
    assert all(low - slack <= tick <= low + spread + slack for tick in values)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=12), st.booleans())
def test_the_front_is_what_no_other_point_beats(pairs: list[tuple[int, int]], larger: bool) -> None:
    sign = 1 if larger else -1
    front = {(point.x, point.y) for point in pareto_front([Point(*pair) for pair in pairs], lambda point: sign * point.y)}
    unbeaten = {
        (x, y)
        for x, y in pairs
        if not any((a <= x and sign * b >= sign * y) and (a, b) != (x, y) for a, b in pairs)
    }  # fmt: skip
    assert front == unbeaten


def test_every_finite_point_has_a_mark_within_the_chart_and_others_are_left_out() -> None:
    points = (Point(1, 5), Point(3, math.nan), Point(2, 9), Point(math.inf, 3))
    drawing = draw(chart(Series("a", points, 0), Series("b", (Point(1.5, 7, bounds=(6, 8)),), 1)), "c")
    assert len(marks(drawing)) == 3
    assert all(0 < x < WIDTH and 0 < y < HEIGHT for x, y in marks(drawing))
    (left, low), (right, high), _ = marks(drawing)
    assert left < right
    assert low > high


def test_one_point_alone_can_be_drawn() -> None:
    drawing = draw(chart(Series("a", (Point(3, 0),), 0)), "c")
    ((x, y),) = marks(drawing)
    assert 0 < x < WIDTH
    assert 0 < y < HEIGHT


def test_a_chart_without_finite_points_says_so() -> None:
    assert not chart(Series("a", (Point(math.nan, 1),), 0)).drawable
    assert not chart().drawable


def test_all_text_is_escaped_and_the_chart_tells_what_it_is() -> None:
    hostile = "<script>&\"'"
    drawing = draw(
        chart(
            Series(hostile, (Point(1, 2, hostile), Point(2, 3)), 0),
            title=hostile,
            summary=hostile,
            x=Axis(hostile, plain, Unit(1, hostile)),
            limits=(Limit("y", 2.5, hostile), Limit("x", 1.5, hostile)),
            better=hostile,
        ),
        "c",
    )
    root = parsed(drawing)
    assert root.get("role") == "img"
    assert (root.get("aria-labelledby") or "").split() == ["c-title", "c-summary"]
    texts = {element.get("id"): element.text for element in root if element.get("id")}
    assert texts == {"c-title": hostile, "c-summary": hostile}
    assert "<script" not in drawing


def test_ticks_carry_the_unit_and_no_more_decimals_than_they_need() -> None:
    share = Axis("y", plain, Unit(100, "%"))
    drawing = draw(chart(Series("a", (Point(0, 0.981), Point(1, 0.999)), 0), y=share), "c")
    assert texts(drawing, "tick")[:3] == ["98.0%", "98.5%", "99.0%"]


def test_ticks_of_ratios_and_of_the_data() -> None:
    decades = draw(chart(Series("a", (Point(0, 1e-4), Point(1, 2.0)), 0), y=Axis("y", plain, log=True)), "c")
    assert [label for label in texts(decades, "tick") if label in ("0.0001", "0.001", "0.01", "0.1", "1")]
    counts = tuple(Point(at, 1.0) for at in (1, 2, 4, 8, 64))
    at_data = draw(chart(Series("a", counts, 0), x=Axis("x", plain, log=True, at_data=True)), "c")
    assert {"1", "2", "4", "8", "64"} <= set(texts(at_data, "tick"))


def test_names_beside_points_do_not_lie_on_each_other() -> None:
    points = tuple(Point(1 + number / 8, 1 + number % 3 / 9, f"artifact-{number}") for number in range(6))
    drawing = draw(chart(Series("a", (*points, Point(3, 2)), 0)), "c")
    boxes: list[tuple[float, float, float, float]] = []
    for text in parsed(drawing).iter(f"{SVG}text"):
        if text.get("class") == "label":
            width = 6.5 * len(text.text or "")
            anchor = {"start": 0.0, "middle": width / 2, "end": width}[text.get("text-anchor") or ""]
            left, base = float(text.get("x") or 0) - anchor, float(text.get("y") or 0)
            boxes.append((left, base - 11, left + width, base + 3))
    assert len(boxes) >= 2
    for number, one in enumerate(boxes):
        for other in boxes[number + 1 :]:
            assert one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]


def test_data_are_given_as_rows_too() -> None:
    made = chart(Series("a", (Point(1, 2, "one", (1, 3)), Point(2, 4)), 0))
    assert made.rows() == [["one", "1", "2", "1 to 3"], ["a", "2", "4", ""]]


def test_styles_differ_in_shape_too() -> None:
    shapes = {re.sub(r"s\d", "", swatch(style)) for style in range(8)}
    assert len(shapes) == 8
    assert swatch(8) == swatch(0)
