"""The compression methods, one file each."""

STAGES = {"awq": "compress.stages.awq:Awq"}
"""The stages a recipe can name: stage → the class whose fields are its keys."""
