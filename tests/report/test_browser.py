"""What Chromium makes of the HTML pages: drawn, readable, and usable by keyboard, at any width, in light and dark."""

import re
import shutil
from collections.abc import Generator
from pathlib import Path

import pytest

from tests.browser import Browser
from tests.made_pages import PAGES, content
from tests.page_checks import CHARTS, CONTRAST, FOCUSED, INTERACTIVE, OVERFLOW, SCROLLED

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Generator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture(scope="module", params=PAGES)
def file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / f"{request.param}.html"
    path.write_text(content(request.param), encoding="utf-8")
    return path


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
    charts = browser.ask(CHARTS)
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


def test_it_reads_the_same_without_javascript(browser: Browser, file: Path) -> None:
    browser.resize(375, 800)
    browser.prefer("light")
    browser.open(file)
    with_scripts = browser.ask("document.body.innerText")
    browser.call("Emulation.setScriptExecutionDisabled", value=True)
    browser.open(file)
    assert browser.ask("document.body.innerText") == with_scripts
    assert browser.ask(CHARTS)
    browser.call("Emulation.setScriptExecutionDisabled", value=False)
    assert browser.messages == []


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


def test_a_wide_table_is_scrolled_by_key_within_itself(browser: Browser, file: Path) -> None:
    browser.resize(375, 800)
    browser.open(file)
    browser.ask("[...document.querySelectorAll('.scroll')].find(e => e.scrollWidth > e.clientWidth).focus()")
    browser.press("ArrowRight")
    assert browser.ask(SCROLLED)
    assert browser.ask("scrollX") == 0


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
