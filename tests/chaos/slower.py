"""A training process in which one rank is slower than it should be, in place of `bloomery.train.worker`.

SLOWER is JSON: rank, bucket, from which step on, and the seconds that each entry into the bucket takes longer.
"""

from __future__ import annotations

import json
import os
import time

from bloomery.ledger.heartbeat import Heartbeat
from bloomery.train import worker


def main() -> int:
    """Train, one rank held up again and again."""
    rank, bucket, first, seconds = json.loads(os.environ["SLOWER"])
    enter = Heartbeat.enter

    def entered(self: Heartbeat, name: str) -> None:
        enter(self, name)
        if name == bucket and self.step >= first and int(os.environ["RANK"]) == rank:
            time.sleep(seconds)

    Heartbeat.enter = entered  # type: ignore[method-assign]
    return worker.main()
