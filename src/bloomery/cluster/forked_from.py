"""Imported by the process that ranks are forked from, and by no other: ties its life to the supervisor's, and to
nothing else.

The fork server ends when the supervisor's end of a pipe closes, but every rank inherits that end and keeps it open:
without this, ranks would train on after their supervisor was killed. A scheduler sends its signals to every process
of a job: this one would die of them, and a rank whose parent is gone cannot be told from one that failed.
"""

import os
import signal

from bloomery.cluster.world import STOPS, die_with_parent

SERVER = os.getpid()
die_with_parent()
for number in STOPS:
    signal.signal(number, signal.SIG_IGN)
