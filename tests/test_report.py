"""``report.html`` in a real browser: it filters, sorts, opens rows, asks nothing of the network and fits a phone."""

import html
import json
import math
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from callbacks.evaluation.result import Calls
from commands.compare import compare
from tests.compared_runs import HOSTILE, make_run

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--virtual-time-budget=8000",
    "--window-size=1280,1000",
)

WATCH = """<script>
const seen = { errors: [], blocked: [] };
addEventListener("error", (event) => seen.errors.push(String(event.message || event.target.outerHTML)), true);
addEventListener("unhandledrejection", (event) => seen.errors.push(String(event.reason)));
addEventListener("securitypolicyviolation", (event) => seen.blocked.push(event.blockedURI));
console.error = (...told) => seen.errors.push(told.join(" "));
</script>"""

ACT = """<script>
addEventListener("load", async () => {
  const wait = () => new Promise((resolve) => setTimeout(resolve, 200));
  const order = () => [...document.querySelectorAll(".row")].map((row) => +row.dataset.index);
  const set = (id, value) => {
    byId(id).value = value;
    byId(id).dispatchEvent(new Event("input"));
    byId(id).dispatchEvent(new Event("change"));
    return order();
  };
  try {
    for (const details of document.querySelectorAll("details")) details.open = true;
    charts.forEach(draw);
    await wait();
    seen.start = { rows: order().length, shown: byId("shown").textContent, run: columns[byId("run").value].name };
    seen.against = [...byId("against").options].map((option) => option.textContent);
    seen.order = order();
    seen.best = set("sort", "best");
    seen.worst = set("sort", "worst");
    seen.longest = set("sort", "longest");
    set("sort", "order");
    seen.wins = set("outcome", "win");
    seen.failed = set("outcome", "failed");
    set("outcome", "");
    set("against", "1");
    seen.wins_over_other = set("outcome", "win");
    set("outcome", "");
    seen.found = set("text", "QUESTION 3");
    seen.shown = byId("shown").textContent;
    document.querySelector(".row summary").click();
    await wait();
    seen.detail = document.querySelector(".row .detail").textContent;
    seen.outcomes = [...document.querySelectorAll(".row .answer")].map((answer) => answer.className);
    set("text", "");
    await wait();
    seen.charts = charts.map((chart) => chart.querySelectorAll(".main-svg").length > 0);
    const dots = charts.find((chart) => chart.data.some((trace) => trace.text));
    Plotly.Fx.hover(dots, [{ curveNumber: 1, pointNumber: 0 }]);
    await wait();
    seen.hover = dots.querySelector(".hoverlayer").textContent;
    seen.images = document.querySelectorAll("img, iframe, object, embed").length;
    seen.legend = [...document.querySelectorAll(".legendtext")].map((text) => text.textContent);
    seen.resources = performance.getEntriesByType("resource").map((entry) => entry.name);
    seen.width = [document.documentElement.scrollWidth, innerWidth];
  } catch (error) { seen.errors.push(String(error.stack)); }
  parent.postMessage(JSON.stringify(seen), "*");
});
</script>"""

FRAME = """<!doctype html><body style="margin:0">
<iframe src="acted.html" style="width:{width}px;height:900px;border:0"></iframe>
<pre id="result"></pre><script>
addEventListener("message", (event) => {{ document.getElementById("result").textContent = event.data; }});
</script>"""


def acted(page: Path, *, width: int) -> dict[str, Any]:
    """What a browser saw while the report was filtered, sorted and opened in a frame of ``width`` pixels."""
    assert CHROMIUM
    text = page.read_text("utf-8").replace("<title>", f"{WATCH}<title>", 1)
    head, end, tail = text.rpartition("</body>")
    (page.parent / "acted.html").write_text(head + ACT + end + tail, "utf-8")
    frame = page.parent / "frame.html"
    frame.write_text(FRAME.format(width=width), "utf-8")
    profile = f"--user-data-dir={page.parent / 'profile'}"
    command = [CHROMIUM, *FLAGS, profile, "--dump-dom", frame.as_uri()]
    dumped = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    found = re.search(r'<pre id="result">(.*?)</pre>', dumped, flags=re.DOTALL)
    assert found, dumped[-2000:]
    assert found[1], "the page never came to its end"
    result: dict[str, Any] = json.loads(html.unescape(found[1]))
    return result


@pytest.fixture(scope="module", params=[1280, 390])
def seen(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two runs with 100 prompts, whose first rewards a reader can sort by eye; the reference scores 0 everywhere."""
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine")
    folder = tmp_path_factory.mktemp("report")
    calls = {"asked": 9, "cached": 0, "requests": 9, "failed_requests": 1, "reasons": {HOSTILE * 3: 1}}
    first = make_run(folder / "a<b>", rewards=[1.0, 1.0, 1.0, 9.0, 1.0] + [0.0] * 95, calls=Calls(**calls))
    make_run(first, rewards=[1.0, 0.0], folder="epoch=0")
    second = make_run(folder / "b", rewards=[3.0, -2.0, math.nan, 5.0, -1.0] + [0.0] * 95, calls=Calls(**calls))
    compare([first, second], folder / "report", wandb_mode="disabled")
    return {"frame": request.param, **acted(folder / "report" / "report.html", width=request.param)}


def test_nothing_fails_and_nothing_is_asked_of_the_network(seen: dict[str, Any]) -> None:
    assert seen["errors"] == []
    assert seen["blocked"] == []
    assert seen["resources"] == []
    assert len(seen["charts"]) == 4 + 2 * 2  # the overview, and two curves of each run
    assert all(seen["charts"])


def test_nothing_overflows_sideways(seen: dict[str, Any]) -> None:
    content, window = seen["width"]
    assert window == seen["frame"]
    assert content <= window


def test_rows_sort_by_score_difference_and_length_and_unscored_ones_come_last(seen: dict[str, Any]) -> None:
    assert (seen["start"]["run"], seen["against"]) == ("b", ["reference", "a<b>"])
    assert seen["order"] == list(range(len(seen["order"])))
    assert seen["best"][:3] == [3, 0, 5]
    assert seen["worst"][:3] == [1, 4, 5]
    assert 2 not in seen["best"][:60]
    assert seen["longest"][:3] == [99, 98, 97]


def test_rows_filter_by_outcome_against_the_reference_and_against_another_run(seen: dict[str, Any]) -> None:
    assert seen["wins"] == [0, 3]
    assert seen["failed"] == [2]
    assert seen["wins_over_other"] == [0]


def test_rows_filter_by_text_in_any_case(seen: dict[str, Any]) -> None:
    assert seen["start"]["shown"] == "100 of 100 prompts"
    assert seen["found"] == [3, *range(30, 40)]
    assert seen["shown"] == "11 of 100 prompts"


def test_few_rows_are_built_at_first(seen: dict[str, Any]) -> None:
    assert seen["start"]["rows"] == 60


def test_a_click_opens_a_row_in_which_every_text_stays_text(seen: dict[str, Any]) -> None:
    for text in (
        f"{HOSTILE} question 3",
        f"{HOSTILE}a<b> 3",
        f"{HOSTILE}b 3",
        f"from {HOSTILE}1",
        "9.00",
        "5.00",
        "ref",
    ):
        assert text in seen["detail"]
    assert seen["outcomes"] == ["answer ", "answer win", "answer win"]
    assert seen["images"] == 0
    assert "a<b>" in seen["legend"]
    assert f"{HOSTILE} question 0" in seen["hover"]
