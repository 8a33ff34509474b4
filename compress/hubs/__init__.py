"""The hubs that models and datasets come from: each lists, fetches and reads parts of a repository's files."""
