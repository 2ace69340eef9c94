import json
import shutil
import socket
import threading
import time
import urllib.request
from dataclasses import replace

import pytest

from quant_ops.errors import EnvironmentFault
from search.dashboard import MAX_TRIAL_PLOTS, annotate, serve, study_note
from search.front import ParetoFront
from search.record import Record

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--window-size=1500,2400",
)  # fmt: skip


@pytest.fixture
def run(tmp_path, make_front):
    evaluations, front = make_front()
    record = Record.create(tmp_path / "run", name="toy", metadata={})
    recorded = record.append([replace(e, trial=-1) for e in evaluations], front.info.budgets.limits)
    front = ParetoFront.of(recorded, front.info, seconds=1.0)
    front.save(tmp_path / "run" / "front.json")
    return tmp_path / "run", record, front


@pytest.fixture
def address(run):
    found = []
    options = {"port": 0, "ready": found.append}
    threading.Thread(target=serve, args=(run[0],), kwargs=options, daemon=True).start()
    deadline = time.monotonic() + 60
    while not found and time.monotonic() < deadline:
        time.sleep(0.05)
    return found[0]


def test_notes_and_plots_are_stored_once_per_front(run):
    _, record, front = run
    assert annotate(record, front)
    assert not annotate(record, front)
    assert annotate(record, front.with_test({front.points[0].trial: 0.5}))
    attrs = record.storage.get_study_system_attrs(record.study()._study_id)
    plots = {key.split(":")[2] for key in attrs if key.startswith("dashboard:plot_data:")}
    n_plots = min(len(front.points), MAX_TRIAL_PLOTS)
    assert plots == {"bit-widths"} | {f"bit-widths-{rank:02d}" for rank in range(n_plots)}
    assert Record.open(run[0]).evaluations() == record.evaluations()


def test_the_note_is_the_front_as_a_table(run):
    _, _, front = run
    lines = study_note(front).splitlines()
    assert len([line for line in lines if line.startswith("|")]) == len(front.points) + 2
    assert "Nothing is inside" in study_note(ParetoFront.of([], front.info))


def test_the_dashboard_answers_with_names_feasibility_and_plots(run, address):
    base = address.split("/dashboard")[0]
    with urllib.request.urlopen(f"{base}/api/studies/0", timeout=30) as answer:
        study = json.load(answer)
    assert study["name"] == "toy"
    assert study["objective_names" if "objective_names" in study else "metric_names"] == [
        "quality loss", "size_bytes",
    ]  # fmt: skip
    trials = {trial["number"]: trial for trial in study["trials"]}
    limits = run[2].info.budgets.limits
    for e in run[1].evaluations():
        feasible = e.size_bytes <= limits["size_bytes"]
        assert all(c <= 0 for c in trials[e.trial]["constraints"]) == feasible
    assert len(study["plotly_graph_objects"]) > 1
    noted = [number for number, trial in trials.items() if trial["note"]["body"]]
    assert sorted(noted) == sorted(e.trial for e in run[2].points)


def test_a_port_that_is_taken_is_said(run):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(EnvironmentFault, match="choose another --port"):
            serve(run[0], port=taken.getsockname()[1])


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver")
def test_a_browser_shows_the_study_its_front_and_bit_widths(run, address, tmp_path):
    selenium = pytest.importorskip("selenium.webdriver")
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    options = selenium.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(flag)
    driver = selenium.Chrome(options=options, service=selenium.ChromeService(DRIVER))
    try:
        driver.get(address)
        wait = WebDriverWait(driver, 60)
        titles = ("toy (id=0)", "Pareto Front", "quality loss", "size_bytes")
        wait.until(lambda d: all(t in d.find_element(By.TAG_NAME, "body").text for t in titles))
        bars = "//*[contains(@class, 'gtitle') and contains(., 'trial ')]"
        wait.until(lambda d: d.find_elements(By.XPATH, bars))
        wait.until(
            lambda d: d.find_elements(By.CSS_SELECTOR, ".js-plotly-plot .heatmaplayer image")
        )
        points = "document.querySelectorAll('.scatterlayer .point').length"
        wait.until(lambda d: d.execute_script(f"return {points}") >= len(run[2].points))
        assert driver.get_screenshot_as_png()[:4] == b"\x89PNG"
        driver.get(f"{address}/note")
        wait.until(lambda d: "toy: Pareto front" in d.find_element(By.TAG_NAME, "body").text)
    finally:
        driver.quit()
