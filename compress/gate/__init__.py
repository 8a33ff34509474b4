"""The gate: the limits of a recipe, the checks of each, the verdict."""
