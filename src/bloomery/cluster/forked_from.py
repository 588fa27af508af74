"""Imported by the process that ranks are forked from, and by no other: ties its life to the supervisor's, and to
nothing else.

The fork server ends when the supervisor's end of a pipe closes, but every rank inherits that end and keeps it open:
without this, ranks would train on after their supervisor was killed.
"""

import os

from bloomery.cluster.world import die_with_parent

SERVER = os.getpid()
die_with_parent()
