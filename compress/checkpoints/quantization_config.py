"""Schemes to and from the `quantization_config` that compressed-tensors keeps in config.json; free of torch.

Format: https://github.com/vllm-project/compressed-tensors, `compressed_tensors/quantization/quant_args.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal, cast

from compress.errors import CheckpointError
from compress.numerics.scheme import BLOCK, Scheme

METHOD = "compressed-tensors"
"""The `quant_method` of compressed-tensors."""

MIXED = "mixed-precision"
"""The `format` of a checkpoint whose groups have different ones."""

FORMATS = ("pack-quantized", "int-quantized", "float-quantized", MIXED)
"""The formats that can be read and written; compressed-tensors has more."""

_PACKED_BITS = 4
"""The width of the products called "4-bit weights"."""

KernelKind = Literal["4-bit weights", "8-bit inputs"]
"""Matrix products that need a kernel of their own: activations × 4-bit weights, and 8-bit activations × 8-bit weights."""


def quantization_config(schemes: Mapping[str, Scheme], ignore: Iterable[str], kv_cache: bool = False) -> dict[str, Any]:
    """Return the `quantization_config`: `schemes` by the names of the quantized linears, `ignore` the names of all other linears.

    With one scheme its group targets every `Linear`; with several, each targets its linears by name. The output head (`lm_head`, or
    a name without a dot) is no `Linear` to vLLM, which knows it by another prefix, so it is always targeted by a pattern.
    With `kv_cache` the checkpoint has scales of keys and values, which are then cached as 8-bit floats.
    """
    groups: dict[Scheme, list[str]] = {}
    for name, scheme in schemes.items():
        groups.setdefault(scheme, []).append(name)
    # with several, readers go by each group's own `format`
    formats = sorted({scheme.format for scheme in groups})
    return {
        "config_groups": {
            f"group_{number}": _group(scheme, _targets(names, alone=len(groups) == 1))
            for number, (scheme, names) in enumerate(groups.items())
        },
        "format": formats[0] if len(formats) == 1 else MIXED,
        "global_compression_ratio": None,
        "ignore": sorted(ignore),
        "kv_cache_scheme": _arguments(8, "float", "tensor", dynamic=False) if kv_cache else None,
        "quant_method": METHOD,
        # says that files hold codes; transformers takes any other status for weights still to be compressed
        "quantization_status": "compressed",
    }


def is_readable(config: Mapping[str, Any]) -> bool:
    """Return whether this package reads a config.json's weights linear by linear: those that are not quantized, and `FORMATS`."""
    settings = cast("Mapping[str, Any]", config.get("quantization_config") or {})
    ours = settings.get("quant_method") == METHOD and settings.get("format") in FORMATS
    # scales of another cache would be read as FP8's, by the same names
    return not settings or (ours and caches_as_fp8(settings))


def caches_as_fp8(settings: Mapping[str, Any]) -> bool:
    """Return whether the `kv_cache_scheme` of a `quantization_config` is none, or FP8 with a static scale per tensor.

    compressed-tensors has others, such as 8-bit integers, whose scales have the same names.
    """
    scheme = cast("Mapping[str, Any]", settings.get("kv_cache_scheme") or {})
    kind = (scheme.get("num_bits"), scheme.get("type"), scheme.get("strategy"), scheme.get("dynamic"))
    return not scheme or kind == (8, "float", "tensor", False)


def foreign_format(config: Mapping[str, Any]) -> str:
    """Return the format of a config.json's weights where compressed-tensors has it and only vLLM reads it, else an empty string."""
    settings = cast("Mapping[str, Any]", config.get("quantization_config") or {})
    if settings.get("quant_method") != METHOD:
        return ""
    # weights alone do not give the model: inputs have to be rotated too
    if settings.get("transform_config"):
        return "rotated where it runs"
    groups = cast("Mapping[str, Any]", settings.get("config_groups") or {}).values()
    formats = [settings.get("format"), *(group.get("format") for group in groups)]
    return next((str(name) for name in formats if name and name not in FORMATS), "")


def products_of(schemes: Iterable[Scheme]) -> frozenset[KernelKind]:
    """Return the matrix products that linears of these schemes need."""
    kernel_kinds: set[KernelKind] = set()
    for scheme in schemes:
        if scheme.format == "pack-quantized" and scheme.bits == _PACKED_BITS:
            kernel_kinds.add("4-bit weights")
        if scheme.format == "int-quantized":
            kernel_kinds.add("8-bit inputs")
    return frozenset(kernel_kinds)


def kernel_kinds_in(config: Mapping[str, Any]) -> frozenset[KernelKind]:
    """Return the matrix products that an artifact of any layout needs, by its config.json; none for other quantization."""
    settings = cast("Mapping[str, Any]", config.get("quantization_config") or {})
    if settings.get("quant_method") in ("awq", "gptq"):
        return frozenset({"4-bit weights"}) if settings.get("bits") == _PACKED_BITS else frozenset()
    groups = cast("Mapping[str, Mapping[str, Any]]", settings.get("config_groups") or {})
    kernel_kinds: set[KernelKind] = set()
    for group in groups.values():
        weights = cast("Mapping[str, Any]", group.get("weights") or {})
        if weights.get("type") != "int":
            continue
        if group.get("input_activations"):
            kernel_kinds.add("8-bit inputs")
        elif weights.get("num_bits") == _PACKED_BITS:
            kernel_kinds.add("4-bit weights")
    return frozenset(kernel_kinds)


def scheme_of(settings: Mapping[str, Any], name: str, where: str) -> Scheme:
    """Return the scheme of the linear `name` by a `quantization_config`; `where` is the file that an error names.

    Raises:
        CheckpointError: no group targets it, or the group's settings are none that this package writes.
    """
    groups = cast("Mapping[str, Any]", settings.get("config_groups") or {}).values()
    matching = [group for group in groups if any(_matches(str(target), name) for target in group["targets"])]
    if not matching:
        raise CheckpointError(f"{where}: no group of quantization_config targets {name}, which is packed; fetch the files again")
    weights, inputs = matching[0]["weights"], matching[0].get("input_activations")
    strategy = weights["strategy"]
    block = tuple(weights.get("block_structure") or (BLOCK, BLOCK))
    if strategy not in ("group", "channel", "tensor", "block") or block != (BLOCK, BLOCK):
        raise CheckpointError(
            f"{where}: {name} is quantized per {strategy} {block if strategy == 'block' else ''}, which cannot be read; "
            "start from the model's original"
        )
    return Scheme(
        bits=int(weights["num_bits"]),
        group_size=BLOCK if strategy == "block" else int(weights.get("group_size") or -1),
        symmetric=bool(weights["symmetric"]),
        type=weights.get("type", "int"),
        block_rows={"block": BLOCK, "tensor": -1}.get(strategy, 1),
        activations=inputs["strategy"] if inputs else None,
    )


def _targets(names: list[str], alone: bool) -> list[str]:
    heads = [name for name in names if "." not in name or name.endswith(".lm_head")]
    patterns = sorted(rf"re:(.*\.)?{name.rpartition('.')[2]}$" for name in heads)
    return (["Linear"] if alone else sorted(set(names) - set(heads))) + patterns


def _group(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
    inputs = None
    if scheme.activations is not None:
        dynamic = scheme.activations != "tensor"
        size = BLOCK if scheme.activations == "group" else None
        inputs = _arguments(8, scheme.type, scheme.activations, dynamic, group_size=size)
    weights = _arguments(scheme.bits, scheme.type, scheme.strategy, dynamic=False, group_size=_group_size(scheme))
    weights["symmetric"] = scheme.symmetric
    weights["block_structure"] = [BLOCK, BLOCK] if scheme.block_rows == BLOCK else None
    return {
        "format": scheme.format,
        "input_activations": inputs,
        "output_activations": None,
        "targets": targets,
        "weights": weights,
    }


def _arguments(bits: int, kind: str, strategy: str, dynamic: bool, group_size: int | None = None) -> dict[str, Any]:
    return {
        # groups are neighbouring columns even where GPTQ rounds in another order, so there is no g_idx to announce
        "actorder": None,
        "block_structure": None,
        "dynamic": dynamic,
        "group_size": group_size,
        "num_bits": bits,
        # a dynamic scale is computed from each input, with nothing observed before
        "observer": None if dynamic else "minmax",
        "observer_kwargs": {},
        "strategy": strategy,
        "symmetric": True,
        "type": kind,
    }


def _group_size(scheme: Scheme) -> int | None:
    return scheme.group_size if scheme.strategy == "group" else None


def _matches(target: str, name: str) -> bool:
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), name) is not None
    return target in ("Linear", name)
