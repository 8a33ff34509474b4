"""Work on a checkpoint block by block: the walk, commits and resuming, whatever a method makes of a block."""
