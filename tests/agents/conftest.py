"""The fixtures of the engine's tests: tiny tasks, and the command `search` to be called."""

import importlib.util
from pathlib import Path

_PATH = Path(__file__).parents[1] / "search" / "conftest.py"
_SPEC = importlib.util.spec_from_file_location("search_fixtures", _PATH)
_FIXTURES = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(_FIXTURES)

tiny, tiny_tasks, search_call = _FIXTURES.tiny, _FIXTURES.tiny_tasks, _FIXTURES.search_call
