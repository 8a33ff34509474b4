"""What the recipe's models share: the frozen base class, sources that are a path or a hub id, and lazy unions."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Union, cast

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, model_validator

from compress.files import is_path


class Frozen(BaseModel):
    """A part of a recipe: checked when made, never changed afterwards."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def resolve_source(value: str, info: ValidationInfo) -> str:
    """Return an absolute path where `value` names something on disk, otherwise `value`, a hub id such as `org/name`.

    Paths are relative to the recipe's folder (the validation context's `base`).

    Raises:
        ValueError: `value` is neither an existing path nor of the form of a hub id.
    """
    context = cast("Mapping[str, Any]", info.context or {})
    path = Path(value).expanduser()
    full = path if path.is_absolute() else Path(context.get("base", ".")) / path
    if full.exists():
        # Resolved when it is read: a run that changes its folder, or another that reads the record, still finds it.
        return str(full.resolve())
    # A mistyped path must not be asked for on a hub: "./models/qwen" is no id.
    if is_path(value) or value.count("/") > 1 or not value.strip():
        raise ValueError(f"no file or folder at {full}; name an existing path or a hub id such as org/name")
    return value


Source = Annotated[str, AfterValidator(resolve_source)]


def is_local(source: str) -> bool:
    """Return whether a resolved source is a path on this machine, not a hub id."""
    return Path(source).is_absolute()


def load_attribute(row: str) -> Any:
    """Import what `module:name` points to: a table's row stands for it, so that it is imported when it is asked for."""
    module, _, attribute = row.partition(":")
    return getattr(importlib.import_module(module), attribute)


def load_row(table: Mapping[str, str], name: str) -> type[Frozen]:
    """Import the class that a table's row `name → "module:Class"` points to."""
    return cast("type[Frozen]", load_attribute(table[name]))


def union_of(table: Mapping[str, str], discriminator: str) -> Any:
    """Return the type of "one of the table's classes, told apart by the field `discriminator`"."""
    classes = tuple(load_row(table, name) for name in table)
    if len(classes) == 1:  # pydantic refuses a discriminator where there is nothing to tell apart
        return next(iter(classes))
    return Annotated[Union[classes], Field(discriminator=discriminator)]  # noqa: UP007 - built at run time


def sets_a_limit() -> Any:
    """Return the check, for a part of a recipe all of whose fields are limits, that at least one is written."""

    def check(part: Frozen) -> Frozen:
        names = list(type(part).model_fields)
        if all(getattr(part, name) is None for name in names):
            listed = ", ".join(names[:-1])
            raise ValueError(f"sets no limit; write {listed} or {names[-1]}" if listed else f"sets no limit; write {names[-1]}")
        return part

    return model_validator(mode="after")(check)
