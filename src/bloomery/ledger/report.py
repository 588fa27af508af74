"""`report.html`: one self-contained page, predicted beside measured. Works offline, asks the network for nothing."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from bloomery.ledger import figures, sections
from bloomery.ledger.facts import gather
from bloomery.ledger.markup import text
from bloomery.ledger.page_parts import script_json, shared_parts
from bloomery.spec.files import write_atomically

REPORT_FILE = "report.html"


def write(run_dir: str | Path, facts: dict[str, Any] | None = None) -> Path:
    """Write RUN_DIR/report.html and return its path. Raises InputError when there is nothing to report yet."""
    run_dir = Path(run_dir)
    target = run_dir / REPORT_FILE
    write_atomically(target, render(gather(run_dir) if facts is None else facts))
    return target


def render(facts: dict[str, Any]) -> str:
    """The page. The facts themselves are in it, as JSON, under the id `facts`."""
    own = resources.files("bloomery.ledger") / "page"
    found = facts["reconciliation"]
    charts = {
        "waterfall": figures.waterfall(found["waterfall"]),
        "loss": figures.loss(facts["stages"]),
        "tokens": figures.tokens_per_s(facts["stages"][0], found["tokens_per_s"]["predicted"]),
    }
    template = Template((own / "report.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=text(facts["title"]),
        verdict=text(facts["verdict"]),
        **shared_parts(),
        facts=script_json(facts),
        charts=script_json(charts),
        chips=sections.chips(facts),
        tiles=sections.tiles(facts),
        components=sections.components(facts),
        kinds=sections.kinds(facts),
        residual=sections.residual(facts),
        quality=sections.quality(facts),
        completions=sections.completions(facts),
        communication=sections.communication(facts),
        memory=sections.memory(facts),
        ledger=sections.ledger(facts),
        goodput=sections.goodput(facts),
        events=sections.events(facts),
        environment=sections.environment(facts),
        run_yaml=text(facts["run_yaml"]),
    )
