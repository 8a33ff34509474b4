"""The order of the tests, slow files first, so that workers that share them end at about the same time; and how vLLM starts."""

import gc
import os
from collections.abc import Generator
from typing import cast

import pytest

from tests import preloaded

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
# vLLM's worker is then in its engine's process: a server imports vLLM twice instead of three times, which is most of its start with
# a tiny model. tests/test_demo.py starts servers as users do.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
# vLLM compiles one small function, which finds tokens' ranks: in each server anew, in more time than it takes to load a tiny model.


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    slow: dict[str, int] = {}
    for item in items:
        slow[item.path.name] = slow.get(item.path.name, 0) + (item.get_closest_marker("slow") is not None)
    first = {"test_verdicts.py": 1000}  # a handful of tests on nine starts of a server
    items.sort(key=lambda item: -first.get(item.path.name, slow[item.path.name]))


def pytest_collection_finish() -> None:
    """Leave modules and tests out of garbage collections, of which a runtime makes one whenever it closes a model."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def preloaded_environments(request: pytest.FixtureRequest) -> Generator[None]:
    """Run the commands of the environments that a test file names in `PRELOADED` with their imports done; see `tests/preloaded`."""
    names: tuple[str, ...] = getattr(cast("object", request.module), "PRELOADED", ())
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            preloaded.add(name)
        if names:
            patch.setenv("COMPRESS_RUNTIMES", str(preloaded.folder()))
        yield
