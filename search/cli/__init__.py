"""The command `search`: parses and prints; the work is one call per subcommand."""

import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

INTERRUPTED = 130
ENVIRONMENT = 4


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit code.

    0 done, 2 usage or input, 3 nothing met the budget, 4 environment (disk, missing tool),
    5 verification failed, 130 interrupted.
    """
    import typer

    from quant_ops.errors import BitfrontError
    from search.cli.app import app

    try:
        code = app(args=list(argv) if argv is not None else None, standalone_mode=False)
    except BitfrontError as error:
        print(f"search: {error}", file=sys.stderr)
        return int(error.exit_code)
    except _click_exception(typer.BadParameter) as error:
        error.show()
        return int(error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        print("search: interrupted; what is finished is kept", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        return 0
    except OSError as error:
        where, reason = error.filename or "a file", error.strerror or error
        print(f"search: cannot read or write {where}: {reason}", file=sys.stderr)
        return ENVIRONMENT
    return code if isinstance(code, int) else 0


def command() -> NoReturn:
    """The process `search`: exits with the code of `main`."""
    code = main()
    if code == INTERRUPTED:
        # Where the interrupt came inside exec of a text, as in many an import, the interpreter
        # ends itself by SIGINT although it was handled.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _click_exception(bad_parameter: type) -> Any:
    """The base of typer's usage errors: of the package click, or of the copy in newer typers."""
    return next(cls for cls in bad_parameter.__mro__ if cls.__name__ == "ClickException")
