"""The run's record in optuna-dashboard, with notes and bit widths for the points of the front."""

import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quant_ops.errors import EnvironmentFault
from search.evaluation import Evaluation
from search.front import ParetoFront
from search.point_row import cell_texts
from search.record import Record
from search.training.log import training_figure, training_rows

if TYPE_CHECKING:
    import plotly.graph_objects as go

log = logging.getLogger(f"bitfront.{__name__}")

FRONT_FILE = "front.json"
MAX_TRIAL_PLOTS = 12
_ANNOTATED = "bitfront:annotated"


def serve(
    folder: Path,
    *,
    port: int = 8080,
    host: str = "127.0.0.1",
    storage: str | None = None,
    name: str | None = None,
    ready: Callable[[str], None] = lambda url: None,
) -> None:
    """Show the run in a browser until interrupted.

    Args:
        folder: of the run.
        port: 0 takes a free one.
        host: loopback unless asked otherwise: the dashboard has no password.
        storage: where the run keeps its record if not in its folder.
        name: of the study, where the storage holds several.
        ready: called with the page's address once it answers.

    Raises:
        UsageError: the folder holds no run.
        EnvironmentFault: the port is taken, or the dashboard is not installed.
    """
    record = Record.open(folder, storage=storage, name=name)
    if (folder / FRONT_FILE).exists():
        annotate(record, ParetoFront.load(folder / FRONT_FILE), folder)
    from wsgiref.simple_server import WSGIRequestHandler, make_server

    class QuietHandler(WSGIRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
            log.debug(format, *args)

    try:
        server = make_server(host, port, _application(record), handler_class=QuietHandler)
    except OSError as error:
        raise EnvironmentFault(
            f"cannot serve on {host}:{port}: {error.strerror or error}; choose another --port"
        ) from error
    with server:
        ready(f"http://{host}:{server.server_port}/dashboard/studies/{_study_id(record)}")
        server.serve_forever()


def annotate(record: Record, front: ParetoFront, folder: Path | None = None) -> bool:
    """Store notes and plots of the front in the study, once per front; says whether it did.

    With the run's folder, trained points also get a plot of their training.
    """
    from optuna_dashboard import save_note, save_plotly_graph_object

    digest = hashlib.blake2b(json.dumps(front.to_json()).encode(), digest_size=8).hexdigest()
    study = record.study()
    if study.user_attrs.get(_ANNOTATED) == digest:
        return False
    save_note(study, study_note(front))
    if front.points:
        save_plotly_graph_object(study, _front_bits(front), graph_object_id="bit-widths")
    for e in front.points:
        _note_trial(record, e.trial, trial_note(front, e))
    for rank, e in enumerate(_shown(front)):
        plot_id = f"bit-widths-{rank:02d}"  # by rank, so that a later front replaces this one
        save_plotly_graph_object(study, _trial_bits(front, e), graph_object_id=plot_id)
    for e in front.points:
        rows = [] if folder is None else training_rows(folder, record, e.trial)
        if rows:
            figure = training_figure(rows, f"training of trial {e.trial}")
            save_plotly_graph_object(study, figure, graph_object_id=f"training-{e.trial}")
    study.set_user_attr(_ANNOTATED, digest)
    return True


def study_note(front: ParetoFront) -> str:
    """The front as a Markdown table."""
    rows = [cell_texts(front, e) for e in front.points]
    if not rows:
        return f"# {front.info.task}\n\nNothing is inside every budget yet."
    titles = list(rows[0])
    lines = [
        f"# {front.info.task}: Pareto front",
        f"{len(rows)} points, {front.reach()}, hypervolume {front.hypervolume:.4f}. "
        f"Feasibility of a trial is that under the budgets it was run with.",
        "",
        f"| {' | '.join(titles)} |",
        f"|{'---|' * len(titles)}",
        *(f"| {' | '.join(row.values())} |" for row in rows),
    ]
    return "\n".join(lines)


def trial_note(front: ParetoFront, evaluation: Evaluation) -> str:
    """One point: its numbers and its widths, in Markdown."""
    texts = cell_texts(front, evaluation, every_cost=True)
    facts = [f"- {name}: {text}" for name, text in texts.items()]
    widths = [f"| {name} | {quant.to_text()} |" for name, quant in evaluation.candidate.layers]
    edges = [f"| {name} | {width} |" for name, width in evaluation.candidate.activations]
    parts = [f"## Point of the front: trial {evaluation.trial}", *facts]
    parts += ["", "| layer | weight bits |", "|---|---|", *widths]
    if edges:
        parts += ["", "| activation | bits |", "|---|---|", *edges]
    return "\n".join(parts)


def _application(record: Record) -> Any:
    try:
        from optuna_dashboard import wsgi
    except ImportError as error:
        raise EnvironmentFault(
            f"the dashboard needs optuna-dashboard ({error}); run `pip install optuna-dashboard`"
        ) from error
    return wsgi(record.storage)


def _study_id(record: Record) -> int:
    return record.storage.get_study_id_from_name(record.name)


def _note_trial(record: Record, trial: int, body: str) -> None:
    """`save_note` takes trials that are still running only; ours never are."""
    from optuna_dashboard._note import note_ver_key, save_note_with_version

    storage, study_id = record.storage, _study_id(record)
    trial_id = storage.get_trial_id_from_study_id_trial_number(study_id, trial)
    version = storage.get_study_system_attrs(study_id).get(note_ver_key(trial_id), 0) + 1
    save_note_with_version(storage, study_id, trial_id, version, body)


def _shown(front: ParetoFront) -> list[Evaluation]:
    from search.plots import thinned

    return thinned(front.points, MAX_TRIAL_PLOTS)


def _front_bits(front: ParetoFront) -> "go.Figure":
    from search.interactive import bits_only_figure

    return bits_only_figure(front)


def _trial_bits(front: ParetoFront, evaluation: Evaluation) -> "go.Figure":
    from search.interactive import trial_bits_figure

    return trial_bits_figure(front, evaluation)
