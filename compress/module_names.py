"""By which names each program that reads an artifact knows its modules, for config.json's `quantization_config`; free of torch.

A file calls a module `visual.blocks.0.attn.qkv`, transformers 5 has it as `model.visual.blocks.0.attn.qkv`, vLLM drops that prefix
again and asks for `q_proj`, `k_proj` and `v_proj` by one name, `qkv_proj`. A linear that one of them does not find in `ignore` is
taken for a quantized one there, whose scales are in no file. compressed-tensors and vLLM compare exact names and, from their
beginning, patterns (`re:`); vLLM turns exact names, and no patterns, into its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

from compress.families import Family

FUSED: Mapping[str, tuple[str, ...]] = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""Linears that vLLM joins into one, which must be quantized alike, by the name of what they become."""

_PATTERN = "re:"
_CLASS = "Linear"
_WRAPPERS = r"(?:model\.|language_model\.)*"
"""What programs and their versions put before a name, or leave away: the modules that hold the decoder, or the whole model."""

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_ANY = r"\d+"


def all_names(family: Family, names: Iterable[str]) -> list[str]:
    """Return names on disk, each followed by those in transformers' memory and in vLLM where these are others."""
    return list(dict.fromkeys(form for name in names for form in _forms(family, name)))


def _forms(family: Family, name: str) -> Iterator[str]:
    yield name
    yield _in_memory(family, name)
    for pattern, replacement in family.served_names:
        yield re.sub(pattern, replacement, name)


def _in_memory(family: Family, name: str) -> str:
    return family.module_name(f"{name}.weight").removesuffix(".weight")


def portable_config(settings: Mapping[str, Any], family: Family, linears: Iterable[str]) -> dict[str, Any]:
    """Return a `quantization_config` of compressed-tensors whose names every reader finds.

    `linears` are the names on disk of all linears, quantized or not: a pattern may say "every block" only where it is every block.
    Exact names stay in `ignore`, for vLLM's own mapping of an architecture that has no record; in `targets` they become patterns,
    because compressed-tensors warns of each target that a model does not have. Patterns and classes are left as they are.
    """
    every = set(linears)
    ignored = list(cast("Iterable[str]", settings.get("ignore") or ()))
    return {
        **settings,
        "config_groups": {
            key: {**group, "targets": _targets(group["targets"], family, every)} for key, group in _groups(settings).items()
        },
        "ignore": list(dict.fromkeys([*ignored, *_patterns(_exact(ignored, every), family, every)])),
    }


def _groups(settings: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    return cast("Mapping[str, Mapping[str, Any]]", settings.get("config_groups") or {})


def _targets(targets: Sequence[str], family: Family, every: set[str]) -> list[str]:
    exact = _exact(targets, every)
    kept = [target for target in targets if family.derived or target not in exact]
    return list(dict.fromkeys([*kept, *_patterns(exact, family, every)]))


def _exact(names: Iterable[str], every: set[str]) -> set[str]:
    """Return the names of modules: neither patterns nor classes, which have no dot in them."""
    return {name for name in names if name in every or ("." in name and not name.startswith(_PATTERN))}


def _patterns(names: set[str], family: Family, every: set[str]) -> list[str]:
    """Return patterns for exactly the linears `names` (on disk) among `every`, one for each kind of linear of a block."""
    chosen, known = _kinds(names, family), _kinds(every | names, family)
    return sorted(_pattern(kinds, chosen, known) for kinds in chosen)


_Kinds = Mapping[tuple[str, ...], set[str]]
"""The numbers of the blocks that have each kind of linear; a kind is its names after the wrappers, `#` for the number."""


def _kinds(names: Iterable[str], family: Family) -> _Kinds:
    found: dict[tuple[str, ...], set[str]] = {}
    for name in names:
        cores = dict.fromkeys(re.sub(f"^{_WRAPPERS}", "", form) for form in _forms(family, name))
        number = _NUMBER.search(name)
        kinds = tuple(_NUMBER.sub("#", core, count=1) for core in cores)
        found.setdefault(kinds, set()).add(number.group() if number else "")
    return found


def _pattern(kinds: tuple[str, ...], chosen: _Kinds, known: _Kinds) -> str:
    alternatives = [_alternative(kind, chosen[kinds], known[kinds]) for kind in kinds]
    for joined, (first, *others) in FUSED.items():
        if kinds[0].rpartition(".")[2] == first:
            siblings = [tuple(_beside(kind, other) for kind in kinds) for other in others]
            common = chosen[kinds].intersection(*(chosen.get(sibling, set()) for sibling in siblings))
            alternatives += [_alternative(_beside(kind, joined), common, known[kinds]) for kind in kinds if common]
    together = "|".join(alternatives)
    return f"{_PATTERN}{_WRAPPERS}{together if len(alternatives) == 1 else f'(?:{together})'}$"


def _beside(kind: str, name: str) -> str:
    return f"{kind.rpartition('.')[0]}.{name}"


def _alternative(kind: str, numbers: set[str], known: set[str]) -> str:
    choice = _ANY if numbers == known else f"(?:{'|'.join(sorted(numbers, key=int))})"
    return re.escape(kind).replace(re.escape("#"), choice)


def misnamed(settings: Mapping[str, Any], family: Family, quantized: Iterable[str], plain: Iterable[str]) -> list[str]:
    """Return the linears that transformers, which has names of its own, takes for something else than the file holds.

    `quantized` and `plain` are names on disk, `settings` a `quantization_config` of compressed-tensors. What is returned, by names
    on disk, are plain linears that are not ignored there, and quantized ones that are ignored or in another group than the file's.
    """
    found = [name for name in plain if group_of(settings, _in_memory(family, name)) is not None]
    for name in quantized:
        group = group_of(settings, _in_memory(family, name))
        if group is None or group != group_of(settings, name):
            found.append(name)
    return sorted(found)


def misnaming_message(where: str, found: Sequence[str], family: Family) -> str:
    """Return what a file's linears `found` by `misnamed` mean for who loads it, and what to do."""
    others = f" and {len(found) - 1} more" if len(found) > 1 else ""
    return (
        f"{where}: quantization_config does not say of {found[0]}{others} what it is by the name that transformers has for it "
        f"({_in_memory(family, found[0])}): loaded with from_pretrained, the model computes there without the weights' own scales: "
        "it fails, or does not see its images. vLLM and the runtime `transformers` of this program read it rightly. "
        "Run its recipe again: the export writes the names anew, from the same weights"
    )


def group_of(settings: Mapping[str, Any], module: str) -> str | None:
    """Return the group of `config_groups` that a linear is in by compressed-tensors' rules, None where it is ignored or in none.

    An exact name goes before a pattern, and a pattern before the class.
    """
    ignore = cast("Sequence[str]", settings.get("ignore") or ())
    if any(_rank(target, module) is not None for target in ignore):
        return None
    ranked = [
        (rank, place, key)
        for place, (key, group) in enumerate(_groups(settings).items())
        for target in cast("Sequence[str]", group["targets"])
        if (rank := _rank(target, module)) is not None
    ]
    return min(ranked)[2] if ranked else None


def _rank(target: str, module: str) -> int | None:
    if target.startswith(_PATTERN):
        return 1 if re.match(target.removeprefix(_PATTERN), module) else None
    return 0 if target == module else 2 if target == _CLASS else None
