"""Hubs of models and datasets: each lists, fetches and reads ranges of a repository's files."""
