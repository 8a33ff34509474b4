"""Prompts, images, questions, texts and tables, as calibration and evaluation both read them."""
