"""Calibration samples: their sources, selection and pinning."""

SETS = {
    "wikitext": "compress.calibration.sets:WikitextSet",
    "text": "compress.calibration.sets:TextSet",
    "vqa": "compress.calibration.sets:VqaSet",
}
"""The kinds of calibration sets: the recipe's `dataset` → the class whose fields are its keys."""
