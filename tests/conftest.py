"""The order of the tests: files with slow ones first, so that workers that share them end at about the same time."""

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    slow: dict[str, int] = {}
    for item in items:
        slow[item.path.name] = slow.get(item.path.name, 0) + (item.get_closest_marker("slow") is not None)
    first = {"test_verdicts.py": 1000}  # a handful of tests on fifteen starts of a server
    items.sort(key=lambda item: -first.get(item.path.name, slow[item.path.name]))
