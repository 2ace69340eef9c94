"""The documents say what is true: keys, tables, strategies."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("quant_ops", "cost_models", "search", "agents")
KEY = re.compile(r"\[([A-Z][A-Za-z]+(?:19|20)[0-9]{2}[a-z]?)[,\]]")


def cited_keys():
    keys = set()
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            keys |= set(KEY.findall(path.read_text()))
    return sorted(keys)


@pytest.mark.parametrize("key", cited_keys())
def test_every_cited_work_is_listed(key):
    assert f"| [{key}] |" in (ROOT / "REFERENCES.md").read_text()


def test_readme_lists_every_strategy():
    from search.strategies.table import STRATEGIES

    readme = (ROOT / "README.md").read_text()
    for name in STRATEGIES:
        assert f"| `{name}` |" in readme


def test_readme_lists_every_cost_model():
    from cost_models.table import COST_MODELS, cost_model

    readme = (ROOT / "README.md").read_text()
    for name in COST_MODELS:
        model = cost_model(name)
        assert f"| `{name}` |" in readme
        assert model.kind in ("exact", "measured", "fitted", "analytic")


def test_readme_task_example_is_the_tested_one():
    example = (ROOT / "tests/search/tasks/my_task.py").read_text().strip()
    assert example in (ROOT / "README.md").read_text()
