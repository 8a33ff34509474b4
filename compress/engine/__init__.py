"""The walk over a model's blocks that every compression method shares."""
