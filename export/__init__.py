"""Turning a compressed checkpoint into what a runtime loads."""

FORMATS = {"vllm": "compress.export.vllm:Vllm"}
"""The export formats a recipe can name: format → the class whose fields are its keys."""
