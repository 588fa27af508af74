"""What training will ask of a host: what the checks hold its facts against."""

from __future__ import annotations

from bloomery.spec.base import Noun


class Needs(Noun):
    """`gpus`: on each host, 0 for a run on CPUs; `peers`: ranks in the world; `memory_bytes`: of one rank, on its GPU
    where it has one; `disk_bytes`: of the checkpoints to come."""

    ranks: int = 1
    gpus: int = 0
    peers: int = 1
    hosts: int = 1
    memory_bytes: float = 0.0
    disk_bytes: float = 0.0
