"""Whether an exported artifact still does what the checkpoint it came from does: part by part, and in whole answers."""
