from pathlib import Path

from benchmarks.table import MODELS, RESULTS, table

ROOT = Path(__file__).parent.parent


def test_the_readmes_table_of_methods_is_that_of_the_kept_results() -> None:
    assert all((RESULTS / file).is_file() for file in MODELS)
    made = table()
    assert made.count("\n") > 10
    assert made in (ROOT / "README.md").read_text(encoding="utf-8")
