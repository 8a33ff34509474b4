"""Module names in a `quantization_config` that every program which reads an artifact resolves; free of torch.

A module is `visual.blocks.0.attn.qkv` on disk and `model.visual.blocks.0.attn.qkv` in transformers 5; vLLM drops that prefix again
and fuses `q_proj`, `k_proj` and `v_proj` into `qkv_proj`. A program that does not find a linear in `ignore` treats it as quantized,
and no file has its scales. compressed-tensors and vLLM match exact names and, from the start of the name, patterns (`re:`); vLLM
maps exact names, but no patterns, to its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

from compress.families import Family

FUSED: Mapping[str, tuple[str, ...]] = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""Linears that vLLM fuses, by the name of the fused linear; they need one scheme."""

_PATTERN = "re:"
_CLASS = "Linear"
_WRAPPERS = r"(?:model\.|language_model\.)*"
"""Prefixes of the modules around the decoder or the whole model, which differ between programs and their versions."""

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_ANY = r"\d+"


def all_names(family: Family, names: Iterable[str]) -> list[str]:
    """Return names on disk, each followed by its names in transformers and in vLLM where they differ."""
    return list(dict.fromkeys(form for name in names for form in _forms(family, name)))


def _forms(family: Family, name: str) -> Iterator[str]:
    yield name
    yield _transformers_name(family, name)
    for pattern, replacement in family.served_names:
        yield re.sub(pattern, replacement, name)


def _transformers_name(family: Family, name: str) -> str:
    return family.module_name(f"{name}.weight").removesuffix(".weight")


def portable_config(settings: Mapping[str, Any], family: Family, linears: Iterable[str]) -> dict[str, Any]:
    """Return a `quantization_config` of compressed-tensors whose names every program resolves.

    `linears` are the names on disk of all linears, quantized or not: a pattern matches any block number only where all blocks have
    the linear. Exact names stay in `ignore`, for vLLM's own mapping of architectures without a family record; in `targets` they
    become patterns, because compressed-tensors warns of each target that a model does not have. Patterns and classes do not change.
    """
    all_linears = set(linears)
    ignored = list(cast("Iterable[str]", settings.get("ignore") or ()))
    return {
        **settings,
        "config_groups": {
            key: {**group, "targets": _targets(group["targets"], family, all_linears)} for key, group in _groups(settings).items()
        },
        "ignore": list(dict.fromkeys([*ignored, *_patterns(_exact(ignored, all_linears), family, all_linears)])),
    }


def _groups(settings: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    return cast("Mapping[str, Mapping[str, Any]]", settings.get("config_groups") or {})


def _targets(targets: Sequence[str], family: Family, all_linears: set[str]) -> list[str]:
    exact = _exact(targets, all_linears)
    # a derived family knows no names of vLLM: exact ones stay, for vLLM's own mapping
    unchanged = [target for target in targets if family.derived or target not in exact]
    return list(dict.fromkeys([*unchanged, *_patterns(exact, family, all_linears)]))


def _exact(names: Iterable[str], all_linears: set[str]) -> set[str]:
    """Return the names of modules: neither patterns nor classes, which have no dot."""
    return {name for name in names if name in all_linears or ("." in name and not name.startswith(_PATTERN))}


def _patterns(names: set[str], family: Family, all_linears: set[str]) -> list[str]:
    """Return patterns that match exactly the linears `names` (on disk) of all linears, one for each kind of linear of a block."""
    chosen, existing = _kinds(names, family), _kinds(all_linears | names, family)
    return sorted(_pattern(kinds, chosen, existing) for kinds in chosen)


_Kinds = Mapping[tuple[str, ...], set[str]]
"""The numbers of the blocks that have each kind of linear; a kind is its names without wrappers, with `#` for the number."""


def _kinds(names: Iterable[str], family: Family) -> _Kinds:
    kinds_of_blocks: dict[tuple[str, ...], set[str]] = {}
    for name in names:
        # wrappers are matched by the pattern's beginning, so that names that differ in them alone are one
        cores = dict.fromkeys(re.sub(f"^{_WRAPPERS}", "", form) for form in _forms(family, name))
        number = _NUMBER.search(name)
        # the first number only: an index within a block (a layer of a projector) belongs to the kind
        kinds = tuple(_NUMBER.sub("#", core, count=1) for core in cores)
        kinds_of_blocks.setdefault(kinds, set()).add(number.group() if number else "")
    return kinds_of_blocks


def _pattern(kinds: tuple[str, ...], chosen: _Kinds, existing: _Kinds) -> str:
    alternatives = [_alternative(kind, chosen[kinds], existing[kinds]) for kind in kinds]
    # vLLM looks up the fused module's name: it is matched where all of its parts are chosen
    for fused, (first, *others) in FUSED.items():
        if kinds[0].rpartition(".")[2] == first:
            siblings = [tuple(_sibling(kind, other) for kind in kinds) for other in others]
            common = chosen[kinds].intersection(*(chosen.get(sibling, set()) for sibling in siblings))
            alternatives += [_alternative(_sibling(kind, fused), common, existing[kinds]) for kind in kinds if common]
    union = "|".join(alternatives)
    return f"{_PATTERN}{_WRAPPERS}{union if len(alternatives) == 1 else f'(?:{union})'}$"


def _sibling(kind: str, name: str) -> str:
    return f"{kind.rpartition('.')[0]}.{name}"


def _alternative(kind: str, numbers: set[str], existing: set[str]) -> str:
    # by number where only some blocks have the linear in this group, as mixed precision gives
    choice = _ANY if numbers == existing else f"(?:{'|'.join(sorted(numbers, key=int))})"
    return re.escape(kind).replace(re.escape("#"), choice)


def misnamed(settings: Mapping[str, Any], family: Family, quantized: Iterable[str], plain: Iterable[str]) -> list[str]:
    """Return the linears, by names on disk, that a `quantization_config` resolves wrongly by their names in transformers.

    `quantized` and `plain` are names on disk. Resolved wrongly are plain linears that are not ignored, and quantized ones that are
    ignored or in another group than by their names on disk.
    """
    wrong = [name for name in plain if group_of(settings, _transformers_name(family, name)) is not None]
    for name in quantized:
        group = group_of(settings, _transformers_name(family, name))
        if group is None or group != group_of(settings, name):
            wrong.append(name)
    return sorted(wrong)


def misnaming_message(where: str, linears: Sequence[str], family: Family) -> str:
    """Return the message for a file with `misnamed` linears: the effect on loading it, and the remedy."""
    others = f" and {len(linears) - 1} more" if len(linears) > 1 else ""
    return (
        f"{where}: quantization_config does not say of {linears[0]}{others} what it is by the name that transformers has for it "
        f"({_transformers_name(family, linears[0])}): loaded with from_pretrained, the model computes there without the weights' "
        "own scales: it fails, or does not see its images. vLLM and the runtime `transformers` of this program read it rightly. "
        "Run its recipe again: the export writes the names anew, from the same weights"
    )


def group_of(settings: Mapping[str, Any], module: str) -> str | None:
    """Return a linear's group in `config_groups` by compressed-tensors' rules; None where it is ignored or in none.

    An exact name takes precedence over a pattern, and a pattern over the class.
    """
    ignore = cast("Sequence[str]", settings.get("ignore") or ())
    if any(_rank(target, module) is not None for target in ignore):
        return None
    ranked = [
        (rank, index, key)
        for index, (key, group) in enumerate(_groups(settings).items())
        for target in cast("Sequence[str]", group["targets"])
        if (rank := _rank(target, module)) is not None
    ]
    return min(ranked)[2] if ranked else None


def _rank(target: str, module: str) -> int | None:
    if target.startswith(_PATTERN):
        return 1 if re.match(target.removeprefix(_PATTERN), module) else None
    return 0 if target == module else 2 if target == _CLASS else None
