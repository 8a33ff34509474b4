"""Grids and roundings of integer weights, one file each."""
