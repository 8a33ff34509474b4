"""Pure functions on tensors: grids, rounding, packing."""
