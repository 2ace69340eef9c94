"""From the word after `--task` to a Task."""

import difflib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from quant_ops.errors import UsageError
from search.blame import blaming
from search.task import Batches, Task
from search.tasks.training import Progress

TASKS = {
    "digits": "search.tasks.digits:make_task",
    "digits-mlp": "search.tasks.digits:make_mlp",
    "cifar10-resnet20": "search.tasks.cifar10:make_resnet20",
    "cifar10-resnet56": "search.tasks.cifar10:make_resnet56",
    "fashion-mnist": "search.tasks.fashion_mnist:make_task",
}


SUMMARIES = {
    "digits": "ResNet-18 on scikit-learn's handwritten digits; trained once, nothing to download",
    "digits-mlp": "64-32-16-10 MLP on the same digits, small enough for an FPGA circuit",
    "cifar10-resnet20": "pretrained ResNet-20 on CIFAR-10; needs --data",
    "cifar10-resnet56": "pretrained ResNet-56 on CIFAR-10; needs --data",
    "fashion-mnist": "small CNN on Fashion-MNIST, trained once; needs --data",
}


FILE_MODULE = "bitfront_task_"  # begins the name of a module that was read from a task file


def load_task(
    spec: str,
    *,
    data: Path | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Task:
    """The task named by `spec`.

    Args:
        spec: a name of `TASKS`, `path/to/file.py:function` or `package.module:function`.
        data: folder with data sets; passed on to functions that take a `data` argument, and so
            are `seed` and `progress`.
        seed: of whatever the task trains.
        progress: told of work that takes long.

    Raises:
        UsageError: no such task, or one that cannot be used.
        EnvironmentFault: a built-in task whose data are not there.
    """
    function = _find(TASKS.get(spec, spec))
    offered: dict[str, Any] = {"data": data, "seed": seed, "progress": progress}
    with blaming(f"task {spec!r} failed"):
        task = function(**_accepted(function, offered))
    return _checked(task, spec)


def from_anywhere(spec: str) -> str:
    """The same task, a file named by its whole path, so that a run resumes from any folder."""
    where, colon, name = spec.rpartition(":")
    return f"{Path(where).resolve()}:{name}" if colon and where.endswith(".py") else spec


def _find(spec: str) -> Callable[..., object]:
    where, colon, name = spec.rpartition(":")
    if not colon:
        raise UsageError(_unknown(spec))
    with blaming(f"task {spec!r} cannot be loaded"):
        module = _from_file(Path(where)) if where.endswith(".py") else _from_name(where, spec)
    function = getattr(module, name, None)
    if not callable(function):
        defined = [k for k, v in vars(module).items() if inspect.isfunction(v) and k[0] != "_"]
        raise UsageError(
            f"task {spec!r} names the function {name!r}, which {where} does not define; "
            f"it defines {', '.join(defined) or 'no function'}"
        )
    return function  # type: ignore[no-any-return]


def _unknown(spec: str) -> str:
    close = difflib.get_close_matches(spec, TASKS, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return (
        f"there is no task {spec!r}; {hint}built-in tasks are {', '.join(TASKS)}, and your own is "
        f"given as path/to/file.py:function or package.module:function"
    )


def _from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise UsageError(
            f"task file {path} does not exist (looked in {Path.cwd()}); check the path"
        )
    name = f"{FILE_MODULE}{path.stem}"
    module_spec = importlib.util.spec_from_file_location(name, path)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[name] = module  # dataclasses and pickling look the module up by name
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)  # the file may import its neighbours, as a script does
    module_spec.loader.exec_module(module)
    return module


def _from_name(module_name: str, spec: str) -> ModuleType:
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if missing and (module_name == missing or module_name.startswith(f"{missing}.")):
            raise UsageError(
                f"task {spec!r} names the module {module_name!r}, but there is no module "
                f"{missing!r}; check the name, or give a file as path/to/file.py:function"
            ) from error
        raise


def _accepted(function: Callable[..., object], offered: dict[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return offered
    return {name: value for name, value in offered.items() if name in parameters}


def _checked(task: object, spec: str) -> Task:
    if not isinstance(task, Task):
        raise UsageError(
            f"task {spec!r} must return a search.task.Task, but returned "
            f"{type(task).__name__}; see the example in README"
        )
    _require_batch(task.calibration, "calibration", f"{spec!r} sets no ranges without it")
    _require_batch(task.validation, "validation", "the search is driven by it")
    return task


def _require_batch(batches: Batches | None, split: str, why: str) -> None:
    if isinstance(batches, Iterator):
        raise UsageError(
            f"the {split} data of the task can be read only once, as a {type(batches).__name__}; "
            f"give a list of batches or a DataLoader"
        )
    first = None if batches is None else next(iter(batches), None)
    if first is None:
        raise UsageError(
            f"the task has no {split} data: {why}; give Task({split}=...) at least one batch"
        )
    fits = isinstance(first, tuple | list) and len(first) == 2
    if not fits or not isinstance(first[0], tuple | list):
        raise UsageError(
            f"a {split} batch must be ((input, ...), target), but the first one is "
            f"{_describe(first)}; wrap the inputs in a tuple"
        )
    if not first[0] or len(first[0][0]) == 0:
        raise UsageError(
            f"the first {split} batch of the task holds no sample; give it at least one"
        )


def _describe(value: object) -> str:
    if isinstance(value, tuple | list):
        return f"({', '.join(type(item).__name__ for item in value)})"
    return type(value).__name__
