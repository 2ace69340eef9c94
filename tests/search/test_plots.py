import re
from dataclasses import replace

import matplotlib.image
import numpy as np
import pytest

from search.budget import Budgets
from search.front import ParetoFront
from search.interactive import interactive_figure, save_html, trial_bits_figure
from search.plots import MAX_COLUMNS, bits_figure, save_plots, thinned, width_table


@pytest.mark.parametrize("n_layers", [2, 21, 56])
def test_plots_are_readable_images(make_front, tmp_path, n_layers):
    evaluations, front = make_front(n_layers)
    paths = save_plots(front, tmp_path, evaluations=evaluations)
    assert [path.name for path in paths] == ["front.png", "bits.png"]
    for path in paths:
        pixels = matplotlib.image.imread(path)
        assert pixels.shape[0] > 300
        assert pixels.std() > 0.01


def test_every_layer_is_named_and_every_width_written(make_front):
    _, front = make_front(56)
    axes = bits_figure(front).axes[0]
    names, widths = width_table(thinned(front.points, MAX_COLUMNS))
    assert [label.get_text() for label in axes.get_yticklabels()] == names
    assert len(axes.texts) == widths.size


def test_long_fronts_are_thinned_with_both_ends_kept():
    assert thinned(range(100), 5) == [0, 25, 50, 74, 99]
    assert thinned(range(3), 5) == [0, 1, 2]


def test_a_layer_that_stays_float_is_not_a_number(make_front):
    _, front = make_front(3)
    first = front.points[0]
    candidate = replace(first.candidate, layers=first.candidate.layers[:1])
    names, widths = width_table([first, replace(first, candidate=candidate)])
    assert len(names) == 3
    assert np.isnan(widths[:, 1]).tolist() == [False, True, True]
    bits_figure(replace(front, points=(first, replace(first, candidate=candidate))))


def test_an_empty_front_and_unknown_metrics_are_drawn(make_front, tmp_path):
    evaluations, front = make_front(3)
    nothing = ParetoFront.of([], front.info)
    assert [path.name for path in save_plots(nothing, tmp_path)] == ["front.png"]
    save_html(nothing, tmp_path / "front.html")
    blind = [replace(e, metric=None, agreement=None, loss_stderr=0.0) for e in evaluations]
    info = replace(front.info, float_validation=None, percent=False, budgets=Budgets({}))
    save_plots(ParetoFront.of(blind, info), tmp_path)
    save_html(ParetoFront.of(blind, info), tmp_path / "front.html")


def test_the_page_needs_no_network(make_front, tmp_path):
    _, front = make_front()
    save_html(front, tmp_path / "front.html")
    page = (tmp_path / "front.html").read_text()
    assert not re.search(r"<(script|link)[^>]+(src|href)=", page)
    assert "Plotly.newPlot" in page
    assert "<title>toy - bitfront</title>" in page


def test_the_mouse_shows_trial_widths_and_costs(make_front):
    _, front = make_front(budgets=Budgets.parse(["30kB", "bops=1T"]))
    texts = [trace.text for trace in interactive_figure(front).data if trace.name == "front"]
    for text, e in zip(texts[0], front.points, strict=True):
        assert f"<b>trial</b> {e.trial}<br>" in text
        assert "<b>bops</b>" in text
        assert "<b>weight bits</b>" in text


def test_a_stored_plot_is_small(make_front):
    _, front = make_front(56)
    assert len(trial_bits_figure(front, front.points[0]).to_json()) < 6000
