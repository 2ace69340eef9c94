"""The four packages carry generic names; a collision must be loud, and imports go one way."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "quant_ops": set(),
    "cost_models": {"quant_ops"},
    "search": {"quant_ops", "cost_models"},
    "agents": {"quant_ops", "cost_models", "search"},
}


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_package_is_ours(name):
    assert getattr(importlib.import_module(name), "PROJECT", None) == "bitfront"


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_package_is_claimed_by_one_distribution(name):
    owners = set(importlib.metadata.packages_distributions().get(name, ()))
    assert owners <= {"bitfront"}


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_imports_go_one_way(name):
    allowed = MAY_IMPORT[name] | {name}
    for path in (ROOT / name).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module]
            heads = {n.split(".")[0] for n in names} & (set(MAY_IMPORT) | {"studies", "tests"})
            assert heads <= allowed, f"{path} imports {heads - allowed}"


def test_import_search_is_lean():
    code = (
        "import sys, search, search.cli; "
        "print([m for m in ('ray', 'stable_baselines3', 'gymnasium', 'optuna_dashboard') "
        "if m in sys.modules])"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert out.stdout.strip() == "[]"
