"""The record of a run: an Optuna study to which whole finished trials are appended."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage
from optuna.study import StudyDirection

from quant_ops.candidate import Candidate
from quant_ops.errors import EnvironmentFault, UsageError
from search.evaluation import Evaluation
from search.journal import open_journal, writing
from search.trial_codec import Layout, from_trial, layout_key, to_trial

JOURNAL = "study.journal"
METRIC_NAMES = ("quality loss", "size_bytes")

_DIRECTIONS = [StudyDirection.MINIMIZE, StudyDirection.MINIMIZE]
_FORMAT, _METADATA, _BUDGETS = "bitfront:record", "bitfront:metadata", "bitfront:budgets"
_LAYOUT, _FACT = "bitfront:layout:", "bitfront:fact:"
_VERSION = 1


class Record:
    """Every evaluation of a run, in memory and in an append-only study.

    Trials are never rewritten. What is learned later about one is a fact beside it. The list in
    memory is what is read; the storage is read when the record is opened and in `refresh`.
    """

    def __init__(self, storage: BaseStorage, name: str) -> None:
        self._storage = storage
        self._name = name
        self._study_id = storage.get_study_id_from_name(name)
        attrs = storage.get_study_user_attrs(self._study_id)
        if attrs.get(_FORMAT) != _VERSION:
            raise UsageError(
                f"study {name!r} was not written by this version of bitfront (record format "
                f"{attrs.get(_FORMAT)}, wanted {_VERSION}); give the folder of a bitfront run"
            )
        self._metadata: dict[str, Any] = attrs[_METADATA]
        self._budgets: dict[str, float] = attrs.get(_BUDGETS, {})
        self._layouts: dict[str, Layout] = {}
        self._read_layouts(attrs)
        self._evaluations: dict[int, Evaluation] = {}
        self._known: dict[Candidate, Evaluation] = {}
        self.refresh()

    @classmethod
    def create(
        cls,
        folder: Path,
        *,
        name: str,
        metadata: Mapping[str, Any],
        storage: str | BaseStorage | None = None,
    ) -> "Record":
        """A new record.

        Args:
            folder: of the run; holds the journal unless `storage` says otherwise.
            name: of the study.
            metadata: JSON values that never change: task, digests, seed.
            storage: any Optuna storage or URL.

        Raises:
            UsageError: the folder or the storage already holds a study of that kind.
            EnvironmentFault: the storage cannot be written.
        """
        path = folder / JOURNAL
        if storage is not None:
            backend = _storage(storage)
            _create_study(backend, name, metadata)
            return cls(backend, name)
        if path.exists():
            raise UsageError(
                f"{folder} already holds a run; go on with --resume {folder}, or choose another "
                f"--out"
            )
        # Renamed when whole: a writer killed here leaves no half-made run behind.
        part = path.with_name(path.name + ".part")
        with writing(path):
            part.unlink(missing_ok=True)
            _create_study(open_journal(part), name, metadata)
            part.rename(path)
        return cls(open_journal(path), name)

    @classmethod
    def open(
        cls, folder: Path, *, name: str | None = None, storage: str | BaseStorage | None = None
    ) -> "Record":
        """The record of an earlier run; what a killed writer left unfinished is dropped.

        Raises:
            UsageError: there is none, or several and no `name`.
        """
        path = folder / JOURNAL
        if storage is None and not path.exists():
            raise UsageError(
                f"{folder} holds no run (no {JOURNAL}); give the folder that `search run` wrote"
            )
        with _quiet():
            backend = _storage(storage) if storage is not None else open_journal(path)
            return cls(backend, _study_name(backend, name, str(storage or path)))

    @property
    def name(self) -> str:
        """Of the study."""
        return self._name

    @property
    def storage(self) -> BaseStorage:
        """Where the study lives."""
        return self._storage

    @property
    def metadata(self) -> Mapping[str, Any]:
        """As given to `create`."""
        return self._metadata

    @property
    def budgets(self) -> Mapping[str, float]:
        """Cost name to limit, of the latest run: constraints of older trials are not rewritten."""
        return self._budgets

    def study(self) -> optuna.Study:
        """The study, for reading and for the dashboard."""
        with _quiet():
            return optuna.load_study(study_name=self._name, storage=self._storage)

    def append(
        self, evaluations: Sequence[Evaluation], budgets: Mapping[str, float]
    ) -> list[Evaluation]:
        """Write whole finished trials; gives the evaluations with their numbers.

        Each is on disk before the next is written. Constraints are (cost - limit) / limit.
        """
        self.set_budgets(budgets)
        return [self._append(evaluation, budgets) for evaluation in evaluations]

    def evaluations(self) -> list[Evaluation]:
        """All, in order of trial."""
        return list(self._evaluations.values())

    def __len__(self) -> int:
        return len(self._evaluations)

    def find(self, candidate: Candidate) -> Evaluation | None:
        """The complete evaluation of `candidate` with its plain weights, if there is one."""
        return self._known.get(candidate)

    def set_budgets(self, budgets: Mapping[str, float]) -> None:
        """What the run keeps to from now on."""
        if dict(budgets) != self._budgets:
            self._budgets = dict(budgets)
            self._storage.set_study_user_attr(self._study_id, _BUDGETS, self._budgets)

    def add_fact(self, trial: int, name: str, value: Any) -> None:
        """A JSON value learned about a recorded trial: its test metric, a measured latency."""
        if trial not in self._evaluations:
            raise UsageError(f"there is no trial {trial} in the record {self._name!r}")
        self._storage.set_study_user_attr(self._study_id, f"{_FACT}{trial}:{name}", value)

    def facts(self, name: str) -> dict[int, Any]:
        """Trial to the fact of that name."""
        found: dict[int, Any] = {}
        for key, value in self._storage.get_study_user_attrs(self._study_id).items():
            trial, _, fact = key.removeprefix(_FACT).partition(":")
            if key.startswith(_FACT) and fact == name:
                found[int(trial)] = value
        return found

    def refresh(self) -> list[Evaluation]:
        """Read trials that others appended to the same study since; gives the new ones."""
        trials = self._storage.get_all_trials(self._study_id, deepcopy=False)
        new: list[Evaluation] = []
        for trial in trials:
            key = layout_key(trial)
            if key is None or trial.number in self._evaluations:
                continue
            if key not in self._layouts:
                self._read_layouts(self._storage.get_study_user_attrs(self._study_id))
            new.append(from_trial(trial, self._layouts[key]))
        for evaluation in new:
            self._keep(evaluation)
        if new:
            self._evaluations = dict(sorted(self._evaluations.items()))
        return new

    def _append(self, evaluation: Evaluation, budgets: Mapping[str, float]) -> Evaluation:
        layout = self._layout_of(evaluation.candidate)
        trial = to_trial(evaluation, layout, budgets)
        trial_id = self._storage.create_new_trial(self._study_id, template_trial=trial)
        number = self._storage.get_trial_number_from_id(trial_id)
        recorded = evaluation.with_trial(number)
        self._keep(recorded)
        return recorded

    def _keep(self, evaluation: Evaluation) -> None:
        self._evaluations[evaluation.trial] = evaluation
        if not (evaluation.pruned or evaluation.recipe or evaluation.weights_digest):
            self._known.setdefault(evaluation.candidate, evaluation)

    def _layout_of(self, candidate: Candidate) -> Layout:
        layout = Layout.of(candidate)
        if layout.key not in self._layouts:
            self._storage.set_study_user_attr(
                self._study_id, _LAYOUT + layout.key, [layout.layers, layout.activations]
            )
            self._layouts[layout.key] = layout
        return self._layouts[layout.key]

    def _read_layouts(self, attrs: Mapping[str, Any]) -> None:
        for key, value in attrs.items():
            if key.startswith(_LAYOUT):
                layers, activations = value
                self._layouts[key.removeprefix(_LAYOUT)] = Layout(tuple(layers), tuple(activations))


def _storage(storage: str | BaseStorage) -> BaseStorage:
    try:
        return optuna.storages.get_storage(storage)
    except Exception as error:  # each database driver has errors of its own
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise EnvironmentFault(
            f"cannot open the storage {storage}: {first}; check the URL, the server and its driver"
        ) from error


def _create_study(storage: BaseStorage, name: str, metadata: Mapping[str, Any]) -> None:
    with _quiet():
        try:
            study = optuna.create_study(storage=storage, study_name=name, directions=_DIRECTIONS)
        except optuna.exceptions.DuplicatedStudyError as error:
            raise UsageError(
                f"the storage already holds a study named {name!r}; go on with --resume, or "
                f"choose another --out"
            ) from error
        study.set_metric_names(list(METRIC_NAMES))
    study.set_user_attr(_METADATA, dict(metadata))
    study.set_user_attr(_FORMAT, _VERSION)


def _study_name(storage: BaseStorage, name: str | None, where: str) -> str:
    names = [study.study_name for study in storage.get_all_studies()]
    if name is None and len(names) == 1:
        return names[0]
    if name is not None and name in names:
        return name
    wanted = "one study" if name is None else f"a study named {name!r}"
    raise UsageError(
        f"{where} should hold {wanted}, it holds {', '.join(map(repr, names)) or 'none'}; "
        f"say which run is meant"
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Optuna announces new studies on stderr and calls metric names experimental."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(verbosity)
