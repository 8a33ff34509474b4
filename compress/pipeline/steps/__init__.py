"""The steps of a plan, a class and a file each."""
