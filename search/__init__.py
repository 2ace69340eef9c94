"""The search engine and the command.

import search

front = search.run(task, budget="4MB")
model = front.best("2MB")
front.plot()
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from search.api import Front, load, run

PROJECT = "bitfront"

__all__ = ["Front", "load", "run"]


def __getattr__(name: str) -> Any:
    if name in __all__:  # imported when asked for, so that `import search` stays light
        from search import api

        return getattr(api, name)
    raise AttributeError(f"module 'search' has no attribute {name!r}")
