"""One tiny checkpoint with calibration samples for all tests of stages."""

import pytest

from tests.stages.bench import Bench, prepare
from tests.tiny import build_qwen2_5_vl


@pytest.fixture(scope="package")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    base = tmp_path_factory.mktemp("stages")
    return prepare(base, build_qwen2_5_vl(base / "model"))
