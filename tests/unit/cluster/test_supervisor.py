"""What one command leaves for the next."""

from __future__ import annotations

import json
import platform
from pathlib import Path

from bloomery.cluster.supervisor import SUPERVISION_FILE, usual_before
from bloomery.ledger.heartbeat import PHASES
from bloomery.spec.layout import Layout


def test_only_the_same_layout_on_the_same_host_knows_how_long_phases_take(tmp_path: Path) -> None:
    layout, here, times = Layout(dp=2), platform.node(), [2.5] * len(PHASES)
    assert usual_before(tmp_path, layout) == ()
    rows = [
        {"fence": 1},  # an older version's
        {"layout": layout.describe(), "host": here, "usual_s": [9.0] * len(PHASES)},
        {"layout": layout.describe(), "host": here, "usual_s": times},
        {"layout": layout.describe(), "host": "elsewhere", "usual_s": [1.0] * len(PHASES)},
        {"layout": Layout(tp=2).describe(), "host": here, "usual_s": [1.0] * len(PHASES)},
    ]
    (tmp_path / SUPERVISION_FILE).write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert usual_before(tmp_path, layout) == tuple(times)
    with (tmp_path / SUPERVISION_FILE).open("a") as stream:
        stream.write(json.dumps({"layout": layout.describe(), "host": here, "usual_s": [1.0]}) + "\n")
    assert usual_before(tmp_path, layout) == ()
