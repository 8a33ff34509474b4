"""A stand-in of the hub that serves the published models' configs and tensor tables, and names the data sets of the recipes."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub
import pytest

from tests.hub_server import Repo, hub_server
from tests.published import published

DATASETS = {
    "Salesforce/wikitext": ("wikitext-2-raw-v1/train-00000-of-00001.parquet", "wikitext-2-raw-v1/test-00000-of-00001.parquet"),
    "jxie/flickr8k": ("data/train-00000-of-00002.parquet", "data/test-00000-of-00001.parquet"),
    "lmms-lab/DocVQA": ("DocVQA/validation-00000-of-00006.parquet",),
    "lmms-lab/MMMU": ("data/validation-00000-of-00001.parquet",),
    "uoft-cs/cifar10": ("plain_text/test-00000-of-00001.parquet",),
    "lmms-lab/textvqa": ("data/train-00000-of-00020.parquet", "data/validation-00000-of-00003.parquet"),
}
"""The data sets that recipes name, with those of their files that hold the splits in use."""


@contextmanager
def published_hub(cache: Path) -> Generator[None]:
    """Have huggingface_hub ask the stand-in while the block runs, and keep what it fetches in a folder."""
    with hub_server() as running, pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_PROXY", "127.0.0.1")
        patch.setattr(huggingface_hub.constants, "ENDPOINT", running.endpoint)
        template = f"{running.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        patch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
        for source, model in published().items():
            running.repos["model", source] = model.repository()
        for source, files in DATASETS.items():
            running.repos["dataset", source] = Repo(dict.fromkeys(files, b""))
        yield
        huggingface_hub.close_session()
