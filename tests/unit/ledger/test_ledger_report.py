"""The page: self-contained, true to the JSON, and safe to open whatever a model wrote."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import synthetic_run

from bloomery.ledger.facts import gather
from bloomery.ledger.page_parts import finite
from bloomery.ledger.report import render, write
from bloomery.ledger.sections import events, memory
from bloomery.spec.errors import InputError


class Page(HTMLParser):
    """Attributes, element texts by id, and whether every element is closed."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: dict[str, str] = {}
        self.visible = ""
        self.open: list[tuple[str, str]] = []
        self.feed(content)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in ("meta", "link", "br"):
            self.open.append((tag, dict(attrs).get("id") or ""))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        tag, name = self.open[-1] if self.open else ("", "")
        if tag == "script":
            self.texts[name] = self.texts.get(name, "") + data
        elif tag != "style":
            self.visible += data


@pytest.fixture
def facts(tmp_path: Path) -> dict[str, object]:
    return gather(synthetic_run.make(tmp_path / "toy"))


@pytest.fixture
def page(facts: dict[str, object]) -> Page:
    return Page(render(facts))


def test_nothing_on_the_page_points_outside(page: Page, facts: dict[str, object]) -> None:
    loading = [(tag, name, value) for tag, name, value in page.attributes if name in ("src", "href", "action", "data")]
    assert loading == [("link", "href", "data:,")]
    own = (Path(synthetic_run.__file__).parents[3] / "src/bloomery/ledger/page").glob("*")
    for path in own:
        assert not re.search(r"https?://|@import|url\(", path.read_text(encoding="utf-8"))
    policy = next(value for _, name, value in page.attributes if name == "content" and "default-src" in value)
    assert "default-src 'none'" in policy and "http" not in policy


def test_the_page_holds_the_facts_as_json(page: Page, facts: dict[str, object]) -> None:
    assert json.loads(page.texts["facts"]) == json.loads(json.dumps(finite(facts)))


def test_every_figure_of_the_component_table_is_the_json_one(page: Page, facts: dict[str, object]) -> None:
    for component in facts["reconciliation"]["components"]:  # type: ignore[index]
        for side in ("predicted", "measured"):
            assert f"{component['seconds'][side] * 1e3:,.1f}" in page.visible


def test_memory_compares_tensors_with_tensors_where_a_step_was_profiled(facts: dict[str, Any]) -> None:
    rank = facts["reconciliation"]["ranks"][0]
    rank["memory_bytes"] = {"predicted": 40 * 2**20, "measured": 120 * 2**20, "ratio": 3.0}
    rank["allocated_bytes"] = {"predicted": 32 * 2**20, "measured": 33 * 2**20, "ratio": 33 / 32}
    shown = Page(memory(facts)).visible
    assert "32.0 MiB" in shown and "33.0 MiB" in shown and "120.0 MiB" in shown
    assert "40.0 MiB" not in shown
    rank["allocated_bytes"]["measured"] = None
    assert "40.0 MiB" in Page(memory(facts)).visible


def test_the_page_says_its_language_and_title(page: Page) -> None:
    assert ("html", "lang", "en") in page.attributes
    assert "toy · Bloomery report" in page.visible


def test_what_a_model_wrote_is_shown_and_never_run(page: Page) -> None:
    assert "<script>alert(1)</script>" in page.visible
    assert "<b>once" in page.visible
    assert not any("alert" in text for name, text in page.texts.items() if name == "")


def test_the_verdict_states_time_plan_and_learning(facts: dict[str, object]) -> None:
    text = str(facts["verdict"])
    assert "12 steps of toy on 2 processes" in text
    assert "1.12 s where the plan said 1.00 s (12% more, inside" in text
    assert "2.07 to 1.67" in text


def test_values_that_json_lacks_become_null() -> None:
    assert finite({"a": [float("nan"), float("inf"), 1.5], "b": (1, "x")}) == {"a": [None, None, 1.5], "b": [1, "x"]}


def test_a_run_without_evaluation_or_alignment_still_has_a_report(tmp_path: Path) -> None:
    folder = synthetic_run.make(tmp_path / "bare", align=False)
    for name in ("evaluation.json", "environment.json", "events.jsonl", "metrics.jsonl"):
        (folder / name).unlink()
    path = write(folder)
    assert path.name == "report.html"
    assert "Not recorded" in Page(path.read_text(encoding="utf-8")).visible


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"run\.yaml"):
        gather(tmp_path)


def test_the_waterfall_shows_every_loss_in_its_order_predicted_beside_measured(page: Page) -> None:
    predicted, measured = json.loads(page.texts["charts"])["waterfall"]["data"]
    names = [name.replace("<br>", " ") for name in predicted["x"]]
    assert names == [
        "peak",
        "kernels below peak",
        "recomputation",
        "pipeline bubble and sends",
        "exposed communication",
        "optimizer",
        "waiting for data",
        "checkpoint stalls",
        "everything else",
        "useful: model FLOPs",
    ]
    assert measured["x"] == predicted["x"]
    for side in (predicted, measured):
        assert sum(side["y"][1:]) == pytest.approx(1.0)


def test_on_a_narrow_screen_the_waterfall_lies_with_its_labels_one_below_another(page: Page) -> None:
    chart = json.loads(page.texts["charts"])["waterfall"]
    for upright, lying in zip(chart["data"], chart["narrow"]["data"], strict=True):
        assert lying["orientation"] == "h" and "%{y}" in lying["hovertemplate"]
        assert (lying["x"], lying["y"]) == (upright["y"], upright["x"])
        assert (lying["base"], lying["text"]) == (upright["base"], upright["text"])
    layout = chart["narrow"]["layout"]
    assert layout["yaxis"]["autorange"] == "reversed" and layout["xaxis"]["tickformat"] == ".0%"
    assert layout["height"] >= 50 * len(upright["x"])


def test_what_several_ranks_wrote_alike_is_one_line_of_events(facts: dict[str, object]) -> None:
    facts["stages"][0]["events"] = [{"event": "finished", "rank": rank, "step": 12, "time": rank} for rank in (1, 0)]  # type: ignore[index]
    table = events(facts)
    assert table.count("finished") == 2  # one for each stage
    assert "<td>0, 1</td>" in table


def test_each_start_that_resumed_has_its_own_line_with_its_time_and_figures_are_short(facts: dict[str, Any]) -> None:
    stage = facts["stages"][0]
    resumed = [
        {"event": "resumed", "rank": rank, "step": 10, "time": 100.0 + time}
        for time, rank in ((1.0, 0), (1.0, 1), (4000.4, 1), (4000.2, 0))
    ]
    slow = {"event": "slow_step", "rank": 10, "step": 11, "time": 105.0, "seconds": 1.9693875950033544}
    norms = {"event": "step_skipped", "rank": 0, "time": 106.0, "module_norms": {"head": 1.23456789}}
    stage |= {"began": 100.0, "events": [*resumed, slow, norms, {"event": "shrunk"}]}
    table = events({"stages": [stage]})
    assert table.count("<td>resumed</td><td>0, 1</td>") == 2
    assert "<td>0:00:01</td>" in table and "<td>1:06:40</td>" in table
    assert "seconds 1.969<" in table and "1.235}" in table
    assert "<td>–</td><td>shrunk</td><td></td>" in table
