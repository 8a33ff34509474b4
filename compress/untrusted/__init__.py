"""Reading of files, text and settings from outside, within limits; and what must not leave: secrets."""
