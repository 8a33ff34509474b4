"""The HTML pages: what is in the file, and what Chromium makes of it."""

import re
import shutil
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from compress.compare import compare
from compress.compare_formats import as_html
from compress.gallery import Card, Gallery, Said
from compress.page import TEMPLATES
from compress.report import Report
from compress.report_html import render_html, verdict_sentence
from tests.browser import Browser
from tests.pages import Page, contrast, palettes
from tests.reports import gallery, report, verdict

PAGES = ("report", "bare", "passed", "compare")
HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&amp;</td></title></style>\n{{ 7 * 7 }}"


def bare() -> Report:
    """Return a report with nothing in it that can be left out."""
    rows = tuple(row.model_copy(update={"fidelity": None, "liveness": None, "noise": None}) for row in report().rows)
    nothing: dict[str, Any] = {"warnings": (), "published": (), "notes": {}, "widths": {}, "latency": {}, "digests": {}}
    return report(rows=rows, timings=(), recipe={}, **nothing)


def passed() -> Report:
    checks = tuple(check.model_copy(update={"verdict": "pass"}) for check in verdict().checks)
    artifacts = dict.fromkeys(verdict().artifacts, "pass")
    return report(gate=verdict().model_copy(update={"verdict": "pass", "artifacts": artifacts, "checks": checks}))


def content(name: str) -> str:
    if name == "compare":
        other = report(name="other", run="/runs/other", digests={"original": "3b1f" * 16, "textvqa": "00" * 32})
        elsewhere = report(name="elsewhere", run="/runs/elsewhere", digests={"original": "aa" * 32}, latency={})
        return as_html(compare([report(), other, elsewhere]))
    made = {"report": report, "bare": bare, "passed": passed}[name]()
    return render_html(made, gallery() if name != "bare" else None)


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
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False))
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
        assert all(head.attributes.get("scope") in ("col", "row") for head in table.find("th"))
        widths = {len(row.children) for row in table.find("tr")}
        assert len(widths) == 1
    scrolled = re.findall(r'<div class="scroll" role="region" aria-label="[^"]+" tabindex="0">\s*<table', html)
    assert len(scrolled) == len(page.find("table"))


def test_images_and_charts_tell_what_they_show(page: Page) -> None:
    assert all(image.attributes["alt"] for image in page.find("img"))
    for drawing in page.find("svg"):
        told = drawing.attributes.get("role") == "img" and "aria-labelledby" in drawing.attributes
        assert told or drawing.attributes.get("aria-hidden") == "true"
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
        (["pass", "fail"], "Of 2 checks, 1 fails: b (size.max_ratio)."),
        (["inconclusive", "inconclusive"], "Of 2 checks, 2 are open: a (size.max_ratio), b (size.max_ratio)."),
    ],
)
def test_the_sentence_beside_the_verdict(outcomes: list[Any], sentence: str) -> None:
    limit = verdict().checks[4]
    names = "ab"[: len(outcomes)]
    checks = tuple(limit.model_copy(update={"artifact": name, "verdict": told}) for name, told in zip(names, outcomes, strict=True))
    worst = next(told for told in ("fail", "inconclusive", "pass") if told in outcomes)
    gate = verdict().model_copy(update={"verdict": worst, "artifacts": dict(zip(names, outcomes, strict=True)), "checks": checks})
    assert verdict_sentence(report(gate=gate)) == sentence


def test_what_models_and_data_say_is_only_ever_text() -> None:
    said = Said(HOSTILE, HOSTILE, HOSTILE, 0.0)
    card = Card(
        task=HOSTILE, id=HOSTILE, kind="lost", binary=True, original=said, artifacts=(said,), accepted=((HOSTILE, 2),),
        question=HOSTILE, options=(HOSTILE,),
    )  # fmt: skip
    check = verdict().checks[0].model_copy(update={"artifact": HOSTILE, "task": HOSTILE, "reason": HOSTILE})
    made = report(
        name=HOSTILE,
        gate=verdict().model_copy(update={"checks": (check,)}),
        warnings=(HOSTILE,),
        notes={HOSTILE: HOSTILE},
        recipe={HOSTILE: HOSTILE},
        source={"source": HOSTILE},
        rows=tuple(row.model_copy(update={"metrics": {HOSTILE: row.metrics["textvqa"]}}) for row in report().rows),
    )
    html = render_html(made, Gallery(cards=(card,), lost=1, missing=(HOSTILE,)))
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
    drawn = [(f"s{number}", "page") for number in range(8)] + [("focus", "page")]
    assert {pair: contrast(palette[pair[0]], palette[pair[1]]) for pair in drawn if _low(palette, pair, 3)} == {}


def _low(palette: dict[str, str], pair: tuple[str, str], least: float) -> bool:
    return contrast(palette[pair[0]], palette[pair[1]]) < least


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Generator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture(scope="module")
def file(html: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(html, encoding="utf-8")
    return path


OVERFLOW = """[...document.querySelectorAll('body *')]
  .filter(e => !e.closest('.scroll') && !e.closest('.unseen') && !e.closest('svg') && e.getBoundingClientRect().right > innerWidth + 0.5)
  .map(e => e.tagName + '.' + e.className + ' ' + e.textContent.slice(0, 40))"""
MARKS = """[...document.querySelectorAll('svg.chart')].map(svg => {
  const frame = svg.getBoundingClientRect();
  const boxes = [...svg.querySelectorAll('.mark')].map(mark => mark.getBoundingClientRect());
  const texts = [...svg.querySelectorAll('text')].map(text => text.getBoundingClientRect());
  const inside = box => box.left >= frame.left - 1 && box.right <= frame.right + 1 && box.top >= frame.top - 1 && box.bottom <= frame.bottom + 1;
  return {wide: frame.width, high: frame.height, marks: boxes.length, empty: boxes.filter(b => b.width < 4 || b.height < 4).length,
          outside: [...boxes, ...texts].filter(box => !inside(box)).length};
})"""
CONTRAST = """(() => {
  const parse = text => { const [r, g, b, a = 1] = text.match(/[\\d.]+/g).map(Number); return [r, g, b, a]; };
  const light = rgb => { const [r, g, b] = rgb.map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
                         return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const behind = e => { for (; e; e = e.parentElement) { const c = parse(getComputedStyle(e).backgroundColor); if (c[3] > 0.99) return c; }
                        return [255, 255, 255, 1]; };
  const found = [];
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const e = walk.currentNode.parentElement;
    if (!walk.currentNode.textContent.trim() || e.closest('.unseen, title, desc')) continue;
    const style = getComputedStyle(e);
    const [a, b] = [parse(e.closest('svg') ? style.fill : style.color), behind(e)].map(c => light(c.slice(0, 3)));
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) found.push(`${walk.currentNode.textContent.trim().slice(0, 30)}: ${ratio.toFixed(2)}`);
  }
  return found;
})()"""
INTERACTIVE = """[...document.querySelectorAll('a[href], summary, [tabindex="0"], button, input, select')]
  .filter(e => e.checkVisibility()).map(e => e.outerHTML.slice(0, 120))"""
FOCUSED = """(() => { const e = document.activeElement, box = e.getBoundingClientRect(), style = getComputedStyle(e);
  return {what: e.outerHTML.slice(0, 120), outline: style.outlineStyle, width: parseFloat(style.outlineWidth),
          seen: box.width > 0 && box.bottom > 0 && box.top < innerHeight && box.right > 0 && box.left < innerWidth}; })()"""


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 375, 1280])
def test_it_is_drawn_at_any_width_and_says_nothing_in_the_console(browser: Browser, file: Path, width: int, scheme: str) -> None:
    browser.resize(width, 800, mobile=width < 500)
    browser.prefer(scheme)
    browser.open(file)
    assert browser.messages == []
    assert browser.requests == [file.as_uri()] or all(url.startswith("data:") for url in browser.requests[1:])
    assert browser.ask("document.documentElement.scrollWidth") <= width
    assert browser.ask(OVERFLOW) == []
    charts = browser.ask(MARKS)
    assert charts
    for chart in charts:
        assert chart["wide"] > 200
        assert chart["high"] > 100
        assert chart["marks"] > 0
        assert (chart["empty"], chart["outside"]) == (0, 0)
    assert browser.ask(CONTRAST) == []
    assert browser.ask("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    ink = browser.ask("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", ink)[:3])) < 200) == (scheme == "dark")


@pytest.mark.browser
def test_it_reads_the_same_without_javascript(browser: Browser, file: Path) -> None:
    browser.resize(375, 800)
    browser.prefer("light")
    browser.open(file)
    with_scripts = browser.ask("document.body.innerText")
    browser.call("Emulation.setScriptExecutionDisabled", value=True)
    browser.open(file)
    assert browser.ask("document.body.innerText") == with_scripts
    assert browser.ask(MARKS)
    browser.call("Emulation.setScriptExecutionDisabled", value=False)
    assert browser.messages == []


@pytest.mark.browser
def test_every_interactive_thing_is_reached_by_tab_in_order_and_shows_it(browser: Browser, file: Path) -> None:
    browser.resize(1280, 800)
    browser.prefer("light")
    browser.open(file)
    browser.call("Page.bringToFront")
    expected = browser.ask(INTERACTIVE)
    assert "Skip to the content" in expected[0]
    reached: list[str] = []
    for _ in expected:
        browser.press("Tab")
        found = browser.ask(FOCUSED)
        reached.append(found["what"])
        assert found["seen"], found["what"]
        assert found["outline"] != "none", found["what"]
        assert found["width"] >= 2
    assert reached == expected


@pytest.mark.browser
def test_the_skip_link_leads_to_the_content_and_details_open_by_key(browser: Browser, file: Path) -> None:
    browser.resize(1280, 800)
    browser.open(file)
    browser.press("Tab")
    browser.press("Enter")
    assert browser.ask("document.activeElement.id") == "main"
    for _ in range(60):
        browser.press("Tab")
        if browser.ask("document.activeElement.tagName") == "SUMMARY":
            break
    assert not browser.ask("document.activeElement.parentElement.open")
    browser.press("Enter")
    assert browser.ask("document.activeElement.parentElement.open")
    assert browser.ask("document.activeElement.parentElement.querySelector('.scroll').checkVisibility()")


@pytest.mark.browser
def test_a_wide_table_is_scrolled_by_key_within_itself(browser: Browser, file: Path) -> None:
    browser.resize(375, 800)
    browser.open(file)
    browser.ask("[...document.querySelectorAll('.scroll')].find(e => e.scrollWidth > e.clientWidth).focus()")
    browser.press("ArrowRight")
    browser.ask("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(1))))")
    assert browser.ask(
        "new Promise(done => document.activeElement.scrollLeft ? done(1) : document.activeElement.onscroll = () => done(1))"
    )
    assert browser.ask("scrollX") == 0


@pytest.mark.browser
def test_a_screen_reader_is_told_what_there_is(browser: Browser, file: Path) -> None:
    browser.open(file)
    nodes = browser.call("Accessibility.getFullAXTree")["nodes"]
    told = [(node.get("role", {}).get("value"), node.get("name", {}).get("value", "")) for node in nodes if not node.get("ignored")]
    roles = [role for role, _ in told]
    assert {"banner", "navigation", "main", "contentinfo"} <= set(roles)
    for role in ("table", "region", "image", "figure", "heading", "link"):
        assert all(name for found, name in told if found == role), role
    assert roles.count("columnheader") > 0
    assert roles.count("rowheader") > 0


@pytest.mark.browser
def test_it_is_printed_on_white(browser: Browser, file: Path) -> None:
    browser.resize(1280, 800)
    browser.prefer("dark", media="print")
    browser.open(file)
    assert browser.ask("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert browser.ask("[...document.querySelectorAll('.scroll')].every(e => getComputedStyle(e).overflowX === 'visible')")
    browser.prefer("light")


def test_the_tests_say_how_to_get_a_browser(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(AssertionError, match="run `make browser`"):
        Browser(tmp_path).__enter__()
    assert shutil.which("chromium") is None
