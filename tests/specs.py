"""Specs of checkpoints for tests: of one on disk, or of what it becomes once linears are quantized."""

from collections.abc import Mapping

from compress.checkpoints.checkpoint import Checkpoint
from compress.checkpoints.spec import CheckpointSpec, quantized_spec, spec_of
from compress.families import Family
from compress.numerics.scheme import Scheme


def planned(checkpoint: Checkpoint, family: Family, schemes: Mapping[str, Scheme], kv_cache: bool = False) -> CheckpointSpec:
    """Return the spec of a checkpoint with linears quantized: those it has, or `schemes` by their names on disk."""
    spec = spec_of(checkpoint, family)
    if spec.quantized:
        assert spec.schemes == schemes
        return spec
    return quantized_spec(spec, schemes, kv_cache) if schemes or kv_cache else spec
