"""Takes the pictures of a report that the documentation shows.

Run: python -m tests.screenshots runs/RUN/report.html docs
"""

from __future__ import annotations

import io
import sys
import tempfile
from pathlib import Path

from PIL import Image

from tests.browser import Browser

SHOTS = (
    ("report.png", 1280, 1100, 1, "light"),
    ("report-dark.png", 1280, 1100, 1, "dark"),
    ("report-mobile.png", 375, 812, 2, "light"),
)
"""Each file's name, the window's width and height, pixels per CSS pixel, and the colour scheme."""


def take(page: Path, folder: Path) -> None:
    """Write the pictures of a page into a folder, as small as they can be without loss."""
    with tempfile.TemporaryDirectory() as profile, Browser(Path(profile)) as browser:
        for name, width, height, scale, scheme in SHOTS:
            browser.resize(width, height, scale, mobile=width < 500)
            browser.prefer(scheme)
            browser.open(page)
            Image.open(io.BytesIO(browser.screenshot())).convert("RGB").save(folder / name, optimize=True)


if __name__ == "__main__":
    take(Path(sys.argv[1]).resolve(), Path(sys.argv[2]))
