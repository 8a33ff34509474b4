"""Where samples come from, and how they are pinned and mixed."""

SETS = {
    "wikitext": "compress.calibration.sets:Wikitext",
    "text": "compress.calibration.sets:Text",
    "vqa": "compress.calibration.sets:Vqa",
}
"""The calibration sets a recipe can name: dataset → the class whose fields are its keys."""
