"""The licence in a model's card."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from compress.untrusted.limits import limits
from compress.untrusted.reading import read_bytes

CARD = "README.md"
_FRONT = re.compile(r"\A---[ \t]*\n(.*?)\n---[ \t]*$", re.DOTALL | re.MULTILINE)
_LICENCE_LINE = re.compile(r"(?m)^(license|license_name|license_link):[ \t]*(['\"]?)([^\n'\"#]{1,300}?)\2[ \t]*$")
# Values go into the front matter of a published card: a colon or a line break could add keys of a stranger's choice.
_NAME = re.compile(r"\w[\w .+-]*")
_LINK = re.compile(r"https://[\w./%~+#?=&:-]+|[\w.-]+")


def read_licence(folder: Path) -> Mapping[str, str]:
    """Return `license`, `license_name` and `license_link` of the card in a model's folder, as far as present.

    They are lines of the card's front matter (https://huggingface.co/docs/hub/model-cards); values that are no plain name or link
    are ignored.

    Raises:
        CheckpointError: the card leads out of the folder, or is too large.
    """
    text = read_bytes(folder / CARD, limits().json_bytes, root=folder).decode("utf-8", "replace").replace("\r\n", "\n")
    front = _FRONT.search(text.removeprefix("\ufeff"))
    values = {key: value.strip() for key, _, value in _LICENCE_LINE.findall(front.group(1))} if front else {}
    return {key: value for key, value in values.items() if (_LINK if key == "license_link" else _NAME).fullmatch(value)}
