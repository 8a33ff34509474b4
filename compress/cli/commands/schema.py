"""`compress schema`: print the recipe's JSON Schema, for editors."""

from __future__ import annotations

import argparse
import json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare no arguments."""
    del parser


def run(options: argparse.Namespace) -> int:
    """Print the schema."""
    del options
    from compress.recipe.model import recipe_schema

    print(json.dumps(recipe_schema(), indent=2, ensure_ascii=False))
    return 0
