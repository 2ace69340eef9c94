from pathlib import Path

import pytest

from quant_ops.errors import UsageError
from search.tasks.table import TASKS, load_task
from search.tasks.training import accuracy

TASK_TEXT = """
import torch
from search.task import Task
BATCH = ((torch.zeros(2, 3),), torch.zeros(2, dtype=torch.int64))
def make_task({arguments}):
    {body}
    return Task("t", torch.nn.Linear(3, 2), calibration={calibration}, validation={validation})
"""


@pytest.fixture
def write(tmp_path):
    def write(body="", arguments="", calibration="[BATCH]", validation="[BATCH]"):
        path = tmp_path / "mine.py"
        path.write_text(
            TASK_TEXT.format(
                arguments=arguments, body=body, calibration=calibration, validation=validation
            )
        )
        return path

    return write


def test_example_task_loads_from_its_file_and_is_good():
    task = load_task(f"{Path(__file__).parent / 'my_task.py'}:make_task")
    assert task.name == "wine"
    assert accuracy(task.model, task.validation) > 0.9


def test_unknown_task_lists_the_built_in_ones_and_the_closest():
    with pytest.raises(UsageError, match=r"did you mean 'cifar10-resnet20'\?") as caught:
        load_task("cifar-resnet20")
    assert all(name in str(caught.value) for name in TASKS)


@pytest.mark.parametrize("name", TASKS.values())
def test_every_built_in_row_names_a_function(name):
    module, function = name.split(":")
    assert callable(getattr(__import__(module, fromlist=[function]), function))


def test_missing_file_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"nowhere\.py does not exist"):
        load_task(f"{tmp_path}/nowhere.py:make_task")


def test_missing_module_is_named():
    with pytest.raises(UsageError, match="no module 'no_such_package'"):
        load_task("no_such_package.tasks:make")


def test_missing_function_is_named_with_those_that_exist(write):
    with pytest.raises(UsageError, match=r"'make_tusk'.*it defines make_task"):
        load_task(f"{write()}:make_tusk")


def test_file_that_raises_is_reported_with_its_line(write):
    path = write(body="1 / 0")
    with pytest.raises(UsageError, match=r"ZeroDivisionError: division by zero \(line 6 of .*mine"):
        load_task(f"{path}:make_task")


def test_file_that_raises_on_import_is_reported_with_its_line(tmp_path):
    path = tmp_path / "broken.py"
    path.write_text("\nimport no_such_module_at_all\n")
    with pytest.raises(UsageError, match=r"no_such_module_at_all.* \(line 2 of .*broken\.py\)"):
        load_task(f"{path}:make_task")


def test_syntax_error_is_reported_with_its_line(tmp_path):
    path = tmp_path / "broken.py"
    path.write_text("x = 1\ndef broken(:\n")
    with pytest.raises(UsageError, match=r"SyntaxError: .* \(line 2 of .*broken\.py\)"):
        load_task(f"{path}:make_task")


def test_something_else_than_a_task_is_refused(write):
    with pytest.raises(UsageError, match=r"must return a search\.task\.Task, but returned int"):
        load_task(f"{write(body='return 3')}:make_task")


@pytest.mark.parametrize("nothing", ["None", "[]"])
@pytest.mark.parametrize("split", ["calibration", "validation"])
def test_a_split_without_data_is_refused(write, split, nothing):
    with pytest.raises(UsageError, match=f"the task has no {split} data"):
        load_task(f"{write(**{split: nothing})}:make_task")


def test_data_that_can_be_read_only_once_are_refused(write):
    with pytest.raises(UsageError, match="only once"):
        load_task(f"{write(validation='iter([BATCH])')}:make_task")


def test_a_batch_without_a_tuple_of_inputs_is_refused(write):
    with pytest.raises(UsageError, match=r"must be \(\(input, \.\.\.\), target\).*\(Tensor, int\)"):
        load_task(f"{write(validation='[(torch.zeros(2, 3), 0)]')}:make_task")


def test_a_batch_without_samples_is_refused(write):
    with pytest.raises(UsageError, match="holds no sample"):
        load_task(f"{write(calibration='[((torch.zeros(0, 3),), None)]')}:make_task")


def test_a_function_gets_the_arguments_that_it_takes(write, tmp_path):
    path = write(arguments="seed, data=None", body="assert (seed, str(data)) == (7, 'there')")
    assert load_task(f"{path}:make_task", data=Path("there"), seed=7).name == "t"
