"""What a page of HTML is made of, read without a browser: its elements, headings, ids and links."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = {"meta", "link", "img", "br", "hr", "input", "path", "circle", "use"}


@dataclass
class Element:
    """One element with its attributes, all text below it, and the elements around it."""

    tag: str
    attributes: dict[str, str]
    around: tuple[str, ...]
    text: str = ""
    children: list[Element] = field(default_factory=lambda: list[Element]())

    def find(self, tag: str) -> list[Element]:
        """Return the elements of a kind below this one."""
        below = [each for child in self.children for each in (child, *child.find("*"))]
        return [each for each in below if tag in ("*", each.tag)]


class Page(HTMLParser):
    """A parsed page; raises AssertionError where an element is not closed in its place."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.root = Element("", {}, ())
        self._open = [self.root]
        self.feed(content)
        self.close()
        assert self._open == [self.root], f"never closed: {[element.tag for element in self._open[1:]]}"

    def find(self, tag: str) -> list[Element]:
        """Return the elements of a kind."""
        return self.root.find(tag)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        around = tuple(element.tag for element in self._open[1:])
        element = Element(tag, {name: value or "" for name, value in attrs}, around)
        self._open[-1].children.append(element)
        if tag not in VOID:
            self._open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._open[-1].children.append(Element(tag, {name: value or "" for name, value in attrs}, ()))

    def handle_endtag(self, tag: str) -> None:
        if tag in VOID:
            return
        assert self._open[-1].tag == tag, f"</{tag}> closes <{self._open[-1].tag}>"
        self._open.pop()

    def handle_data(self, data: str) -> None:
        for element in self._open:
            element.text += data


def luminance(colour: str) -> float:
    """Return a colour's relative luminance (WCAG 2): of `#rrggbb`."""
    channels = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    """Return the contrast of two colours (WCAG 2), from 1 to 21."""
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def palettes(style: str) -> dict[str, dict[str, str]]:
    """Return a style sheet's named colours, of the light and of the dark scheme."""
    light, dark = re.findall(r":root \{(.*?)\}", style, re.DOTALL)[:2]
    read = {name: dict(re.findall(r"--([\w-]+): (#\w{6});", part)) for name, part in (("light", light), ("dark", dark))}
    return {"light": read["light"], "dark": read["light"] | read["dark"]}
