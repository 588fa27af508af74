"""A list of hosts, each reached by ssh: one `bloomery train` on each, their output here, all stopped when one fails.

Host keys are checked as the user's own configuration says, and nobody is asked for anything. A host's run ends when the
connection does: it reads its standard input, and saves and stops when that is closed.
"""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from bloomery.cluster.hostfile import Host, parse_hosts
from bloomery.cluster.place import PORT, named_for_port
from bloomery.cluster.sites.order import Order, program
from bloomery.spec.errors import InputError
from bloomery.spec.files import read_text
from bloomery.spec.job import STOPPED_BY_SIGNAL

SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=3")
POLL_S = 0.1
_WRAPPER = 'exec 3<&0; { cat <&3; kill -TERM $$; } >/dev/null 2>&1 & exec "$@" <&- 3<&-'
"""Runs a command that gets SIGTERM when standard input ends: of a dead connection nothing else is heard."""


def read_hosts(path: Path) -> tuple[Host, ...]:
    """The hosts of a file as `probe` and `doctor` take it; slots say nothing here, ranks follow from the layout."""
    if not path.is_file():
        raise InputError("no such file", where=str(path))
    return parse_hosts(read_text(path), str(path))


def commands(one: Order, hosts: Sequence[Host], ssh: Sequence[str] = SSH) -> list[list[str]]:
    """The command for each host. The first host's address, or its name as ssh knows it, is where others find it."""
    first = named_for_port(hosts[0].reached_by)
    made = []
    for number, host in enumerate(hosts):
        train = [*program(), "train", str(one.description)]
        if len(hosts) > 1:
            train += ["--node", f"{number}/{len(hosts)}", "--rendezvous", f"{first}:{PORT}"]
        remote = f"cd {shlex.quote(str(Path.cwd()))} && {shlex.join(['sh', '-c', _WRAPPER, 'bloomery', *train])}"
        made.append([*ssh, host.name, remote])
    return made


def shown(command: Sequence[str]) -> str:
    """A command as one would type it."""
    return shlex.join(command)


def run(commands: Sequence[Sequence[str]], hosts: Sequence[Host]) -> int:
    """Run all until all have ended; when one fails, or this is told to stop, the others save and stop.

    Returns the first failure's code, 0 where there is none. Lines of hosts but the first carry the host's name.
    """
    processes, readers, code = list[subprocess.Popen[bytes]](), list[threading.Thread](), 0
    before = {number: signal.signal(number, _interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        for command, host in zip(commands, hosts, strict=False):
            processes.append(_connected(command))
            prefix = f"{host.name}: " if readers else ""
            readers.append(threading.Thread(target=_relay, args=(processes[-1], prefix), daemon=True))
            readers[-1].start()
        while None in [process.poll() for process in processes]:  # every one is looked at: a code is known once polled
            failed = next((process.returncode for process in processes if process.returncode), 0)
            if failed and not code:
                code = failed
                _stop(processes)
            time.sleep(POLL_S)
    except KeyboardInterrupt:
        code = STOPPED_BY_SIGNAL
        _say("stopping all hosts after saving\n")
        _stop(processes)
        for process in processes:
            process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _stop(processes)
        for reader in [one for one in readers if one.is_alive()]:
            reader.join(timeout=5)
    return code or next((process.returncode for process in processes if process.returncode), 0)


def _connected(command: Sequence[str]) -> subprocess.Popen[bytes]:
    """In a session of its own: a Ctrl-C at this terminal must not end a connection that its host saves behind."""
    return subprocess.Popen(
        list(command),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _relay(process: subprocess.Popen[bytes], prefix: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        _say(prefix + line.decode(errors="replace"))


def _say(text: str) -> None:
    """At the terminal; without one the hosts are listened to all the same, or they would wait for us."""
    with suppress(OSError):
        sys.stderr.write(text)
        sys.stderr.flush()


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Close what they read: each then saves and ends by itself."""
    for process in processes:
        if process.stdin is not None and not process.stdin.closed:
            process.stdin.close()
