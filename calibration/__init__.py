"""Where samples come from, and how they are pinned and mixed."""

SETS = {
    "wikitext": "compress.calibration.sets:WikitextSet",
    "text": "compress.calibration.sets:TextSet",
    "vqa": "compress.calibration.sets:VqaSet",
}
"""The calibration sets a recipe can name: dataset → the class whose fields are its keys."""
