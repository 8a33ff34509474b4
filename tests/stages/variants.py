"""The methods of the table `STAGES` with every combination of the settings that choose their parts."""

import types
import typing
from collections.abc import Iterator
from itertools import product
from typing import Any, Literal, Union, cast

from compress.recipe.schema import load_row
from compress.stages import STAGES
from compress.stages.quantization.quantizer import Quantizer
from compress.stages.stage import Stage

REQUIRED: dict[str, Any] = {"bits": 4, "group_size": 32}
"""Values of settings that have no default."""


def stage_named(name: str) -> type[Stage]:
    return cast("type[Stage]", load_row(STAGES, name))


def stage_of(stage: str, **fields: Any) -> Stage:
    """Return a stage with these settings, and with those that it needs beside them."""
    row = stage_named(stage)
    required = {field: value for field, value in REQUIRED.items() if field in row.model_fields}
    return row.model_validate({"stage": stage, **required, **fields})


def quantizers() -> Iterator[Quantizer]:
    """Yield every quantizer with every combination of the values of its own switches."""
    for name in STAGES:
        row = stage_named(name)
        if issubclass(row, Quantizer):
            choices = {
                field: _values(row.model_fields[field].annotation) for field in row.__annotations__ if field in row.model_fields
            }
            switches = {field: values for field, values in choices.items() if values and field != "stage"}
            for values in product(*switches.values()):
                stage = stage_of(name, **dict(zip(switches, values, strict=True)))
                assert isinstance(stage, Quantizer)
                yield stage


def _values(annotation: Any) -> list[object]:
    """Return the values of a switch; none for a field that has other values than some that are listed."""
    if annotation is bool:
        return [False, True]
    if typing.get_origin(annotation) in (Union, types.UnionType):
        return [value for argument in typing.get_args(annotation) for value in _values(argument)]
    return list(typing.get_args(annotation)) if typing.get_origin(annotation) is Literal else []
