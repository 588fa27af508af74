"""What a power cut may leave of a folder: a record of what a program did to it, and the states a disk may be in then.

The model is the weakest that POSIX allows: a file's content is there as of its last fsync, or any later content, whole,
cut short or with a hole of zeros; a folder's names are there as of the folder's last fsync, and of each later change it
is anybody's guess whether it is. A rename is one change. (ext4 keeps more; what survives here survives there.)
"""

from __future__ import annotations

import os
import random
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

Name = tuple[int, str]
"""The folder it is in, by number, and the name."""
RECORDERS: list[Recorder] = []
HOLE = 512


@dataclass(frozen=True)
class Change:
    """One thing done. `kind`: name (the names in `gone` go, `new` means `thing` from now on), content or sync."""

    kind: str
    thing: int = -1
    gone: tuple[Name, ...] = ()
    new: Name | None = None
    content: bytes = b""


@dataclass
class Recorder:
    """Everything done below `root` by this process, in order. Folders and files have numbers; the root is 0."""

    root: Path
    log: list[Change] = field(default_factory=list)
    things: dict[str, int] = field(default_factory=dict)
    folders: set[int] = field(default_factory=set)
    contents: dict[int, bytes] = field(default_factory=dict)
    count: int = 0

    def number(self, path: str, *, folder: bool = False) -> int:
        """The number of what is at a path, a new one where nothing was."""
        if path not in self.things:
            self.things[path] = self.count
            if folder:
                self.folders.add(self.count)
            self.count += 1
        return self.things[path]

    def place(self, path: str) -> Name:
        """A path as a name in a folder."""
        above, name = os.path.split(path)
        return self.things[above], name

    def look(self) -> None:
        """Write down what has changed inside files since the last look."""
        for path, thing in list(self.things.items()):
            if thing in self.folders or not os.path.isfile(path):
                continue
            with open(path, "rb") as stream:
                content = stream.read()
            if content != self.contents.get(thing, b""):
                self.contents[thing] = content
                self.log.append(Change("content", thing, content=content))

    def did(self, event: str, arguments: tuple[object, ...]) -> None:
        """One audited event, before it happens."""
        path = os.fsdecode(arguments[0]) if isinstance(arguments[0], str | bytes | os.PathLike) else ""
        if event == "os.rename":
            self.look()
            self.renamed(path, os.fsdecode(arguments[1]))  # type: ignore[arg-type]
        elif os.path.dirname(path) not in self.things:
            return  # elsewhere, or it will fail: the folder is not there yet
        elif event == "os.mkdir" and path not in self.things:
            self.look()
            place = self.place(path)
            self.log.append(Change("name", self.number(path, folder=True), new=place))
        elif event == "open" and int(arguments[2]) & os.O_CREAT and path not in self.things:  # type: ignore[call-overload]
            self.look()
            place = self.place(path)
            self.log.append(Change("name", self.number(path), new=place))
        elif event in ("os.remove", "os.rmdir") and path in self.things:
            self.look()
            self.log.append(Change("name", gone=(self.place(path),)))
            del self.things[path]

    def renamed(self, old: str, new: str) -> None:
        """A rename, with all that is below."""
        if old not in self.things:
            return
        thing = self.things[old]
        self.log.append(Change("name", thing, gone=(self.place(old),), new=self.place(new)))
        self.things.pop(new, None)
        for path in [path for path in self.things if path == old or path.startswith(old + "/")]:
            self.things[new + path[len(old) :]] = self.things.pop(path)

    def synced(self, descriptor: int) -> None:
        """An fsync."""
        self.look()
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if path in self.things:
            self.log.append(Change("sync", self.things[path]))


def _audit(event: str, arguments: tuple[object, ...]) -> None:
    if RECORDERS and event in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir"):
        recorder = RECORDERS.pop()
        try:
            recorder.did(event, arguments)
        finally:
            RECORDERS.append(recorder)


sys.addaudithook(_audit)


@contextmanager
def recorded(root: Path) -> Iterator[Recorder]:
    """What is done inside below an empty folder."""
    recorder = Recorder(root)
    recorder.number(str(root), folder=True)
    fsync = os.fsync

    def synced(descriptor: int) -> None:
        recorder.synced(descriptor)
        fsync(descriptor)

    RECORDERS.append(recorder)
    os.fsync = synced
    # Names below an open folder would be told without their path.
    safe, shutil._use_fd_functions = shutil._use_fd_functions, False  # type: ignore[attr-defined]
    try:
        yield recorder
        recorder.look()
    finally:
        shutil._use_fd_functions = safe  # type: ignore[attr-defined]
        os.fsync = fsync
        RECORDERS.clear()


def after_a_cut(recorder: Recorder, at: int, draw: random.Random, target: Path) -> None:
    """Lay down what a disk may hold when power fails after `at` changes."""
    log, keep = recorder.log[:at], draw.choice((0.0, 0.2, 0.5, 0.8, 1.0))
    synced = {change.thing: number for number, change in enumerate(log) if change.kind == "sync"}
    names, contents = dict[Name, int](), dict[int, list[bytes]]()
    for number, change in enumerate(log):
        if change.kind == "content":
            kept = contents.setdefault(change.thing, [b""])
            kept[:] = [change.content] if number < synced.get(change.thing, -1) else [*kept, change.content]
        elif change.kind == "name":
            place = change.new or change.gone[0]
            if number < synced.get(place[0], -1) or draw.random() < keep:
                for gone in change.gone:
                    names.pop(gone, None)
                if change.new:
                    names[change.new] = change.thing
    _lay_down(recorder, 0, names, contents, draw, target)


def _lay_down(
    recorder: Recorder,
    folder: int,
    names: dict[Name, int],
    contents: dict[int, list[bytes]],
    draw: random.Random,
    target: Path,
) -> None:
    target.mkdir()
    for (above, name), thing in names.items():
        if above != folder:
            continue
        if thing in recorder.folders:
            _lay_down(recorder, thing, names, contents, draw, target / name)
        else:
            (target / name).write_bytes(_content(contents.get(thing, [b""]), draw))


def _content(kept: list[bytes], draw: random.Random) -> bytes:
    """The synced content, or a later one as far as it got."""
    chosen = draw.choice(kept)
    if chosen == kept[0] or draw.random() < 0.5:
        return chosen
    start = draw.randrange(len(chosen))
    return chosen[:start] if draw.random() < 0.5 else chosen[:start] + bytes(HOLE) + chosen[start + HOLE :]
