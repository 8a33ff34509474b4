"""The HTML pages as files: what is in them."""

import re
from itertools import pairwise
from typing import Any

import pytest

from compress.report.gallery import Card, Gallery, GalleryAnswer
from compress.report.html import render_html, verdict_sentence
from compress.report.page import TEMPLATES
from tests.made_pages import PAGES, content
from tests.pages import Page, contrast, palettes
from tests.reports import report, verdict

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&amp;</td></title></style>\n{{ 7 * 7 }}"


@pytest.fixture(scope="module", params=PAGES)
def html(request: pytest.FixtureRequest) -> str:
    return content(request.param)


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def test_nothing_is_loaded_and_nothing_runs(page: Page) -> None:
    policy = next(meta for meta in page.find("meta") if meta.attributes.get("http-equiv") == "Content-Security-Policy")
    assert policy.attributes["content"].startswith("default-src 'none'; style-src 'unsafe-inline'; img-src data:;")
    assert not [element.tag for tag in ("script", "iframe", "object", "embed", "form", "base") for element in page.find(tag)]
    for element in page.find("*"):
        assert not [name for name in element.attributes if name.startswith("on")]
        for name in ("src", "href", "srcset", "data", "action"):
            target = element.attributes.get(name, "#")
            assert target.startswith(("#", "data:")), f"{element.tag} {name}={target}"
    assert "@import" not in "".join(style.text for style in page.find("style"))
    assert "url(" not in "".join(style.text for style in page.find("style"))


def test_headings_ids_and_links_fit_together(page: Page) -> None:
    levels = [int(element.tag[1]) for element in page.find("*") if re.fullmatch(r"h[1-6]", element.tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    ids = [element.attributes["id"] for element in page.find("*") if "id" in element.attributes]
    assert len(ids) == len(set(ids))
    for element in page.find("*"):
        named = element.attributes.get("aria-labelledby", "").split()
        linked = element.attributes.get("href", "")
        assert set(named) <= set(ids)
        assert not linked.startswith("#") or linked[1:] in ids
    assert [page.find(tag)[0].tag for tag in ("header", "nav", "main", "footer")] == ["header", "nav", "main", "footer"]
    assert page.find("html")[0].attributes["lang"] == "en"


def test_tables_have_captions_and_heads_and_can_be_scrolled_by_keyboard(html: str, page: Page) -> None:
    assert page.find("table")
    for table in page.find("table"):
        assert table.find("caption")[0].text.strip()
        assert all(head.attributes.get("scope") in ("col", "row", "rowgroup") for head in table.find("th"))
        widths = {sum(int(cell.attributes.get("colspan", "1")) for cell in row.children) for row in table.find("tr")}
        assert len(widths) == 1
    scrolled = re.findall(r'<div class="scroll" role="region" aria-label="[^"]+" tabindex="0">\s*<table', html)
    assert len(scrolled) == len(page.find("table"))


def test_images_and_charts_tell_what_they_show(page: Page) -> None:
    assert all(image.attributes["alt"] for image in page.find("img"))
    for drawing in page.find("svg"):
        labelled = drawing.attributes.get("role") == "img" and "aria-labelledby" in drawing.attributes
        assert labelled or drawing.attributes.get("aria-hidden") == "true"
    charts = [drawing for drawing in page.find("svg") if drawing.attributes.get("class") == "chart"]
    tables = [figure.find("table") for figure in page.find("figure")]
    assert len(charts) == len(tables)
    assert all(len(found) == 1 for found in tables)


def test_the_verdict_comes_first_in_words_sign_and_colour() -> None:
    page = Page(content("report"))
    banner = next(element for element in page.find("header")[0].find("p") if "banner" in element.attributes["class"])
    assert banner.attributes["class"] == "banner fail"
    assert banner.text.startswith(
        "fail Of 9 checks, 3 fail: vllm-int8 (accuracy.min_recovery), vllm-int8 (size.max_ratio) and 1 is"
    )
    assert banner.find("use")[0].attributes["href"] == "#sign-fail"
    shapes = {symbol.attributes["id"]: symbol.children[0].attributes for symbol in page.find("symbol")}
    assert len({str(shape) for shape in shapes.values()}) == 3
    assert page.find("title")[0].text == "qwen2.5-vl-7b: fail"


@pytest.mark.parametrize(
    ("outcomes", "sentence"),
    [
        (["pass"], "The artifact keeps every limit of the gate, its one check."),
        (["pass", "pass"], "Both artifacts keep every limit of the gate, 2 checks."),
        (["pass", "fail"], "Of 2 checks, 1 fails: b (size.max_ratio)."),
        (["inconclusive", "inconclusive"], "Of 2 checks, 2 are open: a (size.max_ratio), b (size.max_ratio)."),
    ],
)
def test_the_sentence_beside_the_verdict(outcomes: list[Any], sentence: str) -> None:
    limit = verdict().checks[4]
    names = "ab"[: len(outcomes)]
    checks = tuple(
        limit.model_copy(update={"artifact": name, "verdict": outcome}) for name, outcome in zip(names, outcomes, strict=True)
    )
    worst = next(outcome for outcome in ("fail", "inconclusive", "pass") if outcome in outcomes)
    gate = verdict().model_copy(update={"verdict": worst, "artifacts": dict(zip(names, outcomes, strict=True)), "checks": checks})
    assert verdict_sentence(report(gate=gate)) == sentence


def test_what_models_and_data_say_is_only_ever_text() -> None:
    answer = GalleryAnswer(HOSTILE, HOSTILE, HOSTILE, 0.0)
    card = Card(
        task=HOSTILE, id=HOSTILE, kind="lost", binary=True, original=answer, artifacts=(answer,), accepted=((HOSTILE, 2),),
        question=HOSTILE, options=(HOSTILE,),
    )  # fmt: skip
    check = verdict().checks[0].model_copy(update={"artifact": HOSTILE, "task": HOSTILE, "reason": HOSTILE})
    hostile_report = report(
        name=HOSTILE,
        gate=verdict().model_copy(update={"checks": (check,)}),
        warnings=(HOSTILE,),
        notes={HOSTILE: HOSTILE},
        recipe={HOSTILE: HOSTILE},
        source={"source": HOSTILE},
        rows=tuple(row.model_copy(update={"metrics": {HOSTILE: row.metrics["textvqa"]}}) for row in report().rows),
    )
    html = render_html(hostile_report, Gallery(cards=(card,), lost=1, missing=(HOSTILE,)))
    page = Page(html)
    assert not page.find("script")
    assert not page.find("img")
    assert "49" not in page.find("h1")[0].text
    assert HOSTILE.split("\n")[0] in page.find("h1")[0].text
    assert html.count("<style") == 1


def test_flips_are_shown_with_both_answers_and_how_many_are_not() -> None:
    page = Page(content("report"))
    text = " ".join(page.find("main")[0].text.split())
    assert (
        "41 items score less with an artifact than with the original, 17 score more. Shown are 4 of them; 54 more are not." in text
    )
    cards = page.find("article")
    assert [" ".join(card.text.split())[:20] for card in cards[:2]] == ["▼ lost chartqa, q0 W", "▼ lost textvqa, q1 W"]
    assert "no answer: the server answered 503 three times" in cards[0].text


def test_that_nothing_flipped_is_told_only_where_it_was_looked_for() -> None:
    text = "No item scores otherwise with an artifact than with the original."
    assert text in render_html(report(), Gallery())
    assert text not in render_html(report())


def test_a_page_is_the_same_every_time() -> None:
    assert content("report") == content("report")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_palette_has_enough_contrast(scheme: str) -> None:
    palette = palettes((TEMPLATES / "style.css").read_text(encoding="utf-8"))[scheme]
    text = [("ink", "page"), ("ink", "raised"), ("soft", "page"), ("soft", "raised"), ("link", "page")]
    text += [(word, "page") for word in ("pass", "fail", "inconclusive")]
    text += [(word, f"{word}-back") for word in ("pass", "fail", "inconclusive")]
    text += [("ink", f"{word}-back") for word in ("pass", "fail", "inconclusive")]
    text += [("ink", f"w{width}") for width in (2, 3, 4, 8, 16)]
    assert {pair: contrast(palette[pair[0]], palette[pair[1]]) for pair in text if _low(palette, pair, 4.5)} == {}
    pairs = [(f"s{number}", "page") for number in range(8)] + [("focus", "page")]
    assert {pair: contrast(palette[pair[0]], palette[pair[1]]) for pair in pairs if _low(palette, pair, 3)} == {}


def _low(palette: dict[str, str], pair: tuple[str, str], least: float) -> bool:
    return contrast(palette[pair[0]], palette[pair[1]]) < least
