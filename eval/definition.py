"""The definition of a VQA task: a short versioned YAML, strictly checked."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveInt, ValidationError

from compress.calibration.sets import Columns
from compress.document import dotted, read_document
from compress.errors import RecipeError
from compress.schema import Frozen, Source

_SHIPPED = Path(__file__).parent / "tasks"


class Definition(Frozen):
    """What is asked, of which data, and which answers count as right; a recipe may name other data."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    version: PositiveInt
    source: Source | None = None
    subset: str | None = None
    split: str = "test"
    revision: str = "main"
    columns: Columns = Columns()
    prompt: Annotated[str, Field(pattern=r"\{question\}")]
    max_new_tokens: PositiveInt
    metric: Literal["exact_match"]

    def ask(self, question: str) -> str:
        """Return the prompt for a question."""
        return self.prompt.replace("{question}", question)


def shipped_definitions() -> list[str]:
    """Return the names of the definitions that come with the package."""
    return sorted(path.stem for path in _SHIPPED.glob("*.yaml"))


def find_definition(value: str, base: Path) -> Path:
    """Return the file of a shipped definition by its name, or the path given, relative to `base`.

    Raises:
        ValueError: there is neither; lists the shipped ones.
    """
    if value in shipped_definitions():
        return _SHIPPED / f"{value}.yaml"
    path = base / Path(value).expanduser()
    if not path.is_file():
        raise ValueError(f"no definition file at {path}, and no shipped one is called {value}: {', '.join(shipped_definitions())}")
    return path.resolve()


def read_definition(path: Path) -> Definition:
    """Read and check a definition.

    Raises:
        RecipeError: every fault found, with file and line.
    """
    document = read_document(path)
    try:
        definition = Definition.model_validate(document.data, context={"base": path.parent})
    except ValidationError as error:
        allowed = ", ".join(Definition.model_fields)
        raise RecipeError(
            [
                f"{document.whereabouts(detail['loc'])}: {dotted(detail['loc'])}: "
                + (f"unknown key; allowed here: {allowed}" if detail["type"] == "extra_forbidden" else detail["msg"])
                for detail in error.errors(include_url=False)
            ]
        ) from error
    if definition.name != path.stem:
        raise RecipeError([f"{document.whereabouts(('name',))}: name: must be {path.stem}, as the file is called"])
    return definition
