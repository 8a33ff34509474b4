"""Transforms of a block before its weights are rounded, one file each."""
