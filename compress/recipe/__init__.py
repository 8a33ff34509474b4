"""The recipe: its model, its checks with file and line, its JSON Schema."""
