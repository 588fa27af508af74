"""One training process: the supervisor forks it and calls `main`, with the stage's folder as its argument."""

from __future__ import annotations

import faulthandler
import json
import os
import platform
import re
import signal
import sys
import traceback
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError

from bloomery.ledger.clock import Clock
from bloomery.ledger.heartbeat import BESIDE_A_DEVICE, Heartbeat, beat_file, stack_file
from bloomery.parallel import mesh as meshes
from bloomery.spec.errors import BloomeryError, InputError
from bloomery.spec.files import write_atomically
from bloomery.spec.job import CORRUPTED, GAVE_UP, Job, read_job
from bloomery.train.gpu import Gpu
from bloomery.train.loop import run
from bloomery.train.reexecution import repeat_bits
from bloomery.train.session import CorruptionError

PEER_LOST = re.compile(
    r"gloo/transport/\S*\] (.* by peer)"
    r"|remote process exited or there was a network error|NCCL communicator was aborted"
    r"|Connection was likely closed"
)
"""What gloo, NCCL and the store where ranks meet say where the other end of a connection is gone."""


def main() -> int:
    """Join the world, train, leave. Returns the exit code."""
    folder = Path(sys.argv[1])
    job = read_job(folder)
    heartbeat = _signs_of_life()
    clock = Clock(entered=heartbeat.enter, gets_on=heartbeat.gets_on) if heartbeat else Clock()
    clock.count("startup", since=float(os.environ.get("BLOOMERY_FORKED", "inf")))
    try:
        device = device_of(job, int(os.environ.get("LOCAL_RANK", "0")))
        if job.guard.recompute_every:
            repeat_bits(device.type)
        if device.type == "cuda":
            torch.cuda.set_device(device)
            clock.device = Gpu(device)
            if heartbeat is not None:
                heartbeat.phase_of = BESIDE_A_DEVICE
        else:
            torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
            _remark_on_cpus(job)
        with clock.bucket("startup"):
            mesh = meshes.start(job.layout, device, os.environ.get("BLOOMERY_RENDEZVOUS"))
        code = run(job, folder, mesh, clock, heartbeat)
        meshes.stop(mesh)
    except CorruptionError as error:
        print(f"warning: {error}", file=sys.stderr, flush=True)
        return CORRUPTED
    except BloomeryError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return GAVE_UP if error.exit_code == 1 else error.exit_code
    except (OSError, SafetensorError) as error:
        # A disk that filled up, most often. What was half-written has no commit and is never read.
        print(f"error: {folder}: {error}", file=sys.stderr, flush=True)
        return GAVE_UP
    except torch.OutOfMemoryError:
        problem, own = _out_of_memory()
        print(f"error: {problem}", file=sys.stderr, flush=True)
        return GAVE_UP if own else 1
    except RuntimeError as error:
        lost = PEER_LOST.search(str(error))
        if lost is None:
            raise
        return _without_peers(folder, lost[lost.lastindex or 0])
    return code


def _remark_on_cpus(job: Job) -> None:
    """Say once for all ranks where the CPU is not what was planned, or not all there is."""
    if os.environ.get("RANK", "0") != "0":
        return
    if job.device == "gpu":
        print(f"{job.name}: planned for GPUs, none here: on CPUs; see bloomery doctor", file=sys.stderr, flush=True)
    elif torch.cuda.is_available():
        print(f"{job.name}: planned for CPUs, the GPUs here stay idle; see bloomery probe", file=sys.stderr, flush=True)


OWN_SHARE = 0.8
"""Of a device's memory: a rank that had that much for itself would run out of it in every start of this layout."""


def _out_of_memory() -> tuple[str, bool]:
    """What a device holds that has no room for what was asked, and whether every start of this layout would end there:
    not where somebody else had the memory."""
    device = torch.cuda.current_device()
    reserved, total = torch.cuda.memory_reserved(device), torch.cuda.get_device_properties(device).total_memory
    own = reserved > OWN_SHARE * total
    advice = "smaller micro-batches, recomputation or more GPUs help" if own else "who else is on it? bloomery doctor"
    return (
        f"rank {os.environ.get('RANK', '0')} on cuda:{device} of host {platform.node()}: out of memory, "
        f"{reserved:,} of {total:,} bytes are this process's; {advice}"
    ), own


def _without_peers(folder: Path, what: str) -> int:
    """Another rank has ended: the supervisor names it. Where this one noticed is kept, and is not what went wrong."""
    rank = int(os.environ.get("RANK", "0"))
    kept = folder / "hangs" / f"lost_peers_rank_{rank:05d}.txt"
    with suppress(OSError):
        write_atomically(kept, traceback.format_exc())
    print(f"rank {rank} lost its peers: {what}; see {kept}", file=sys.stderr, flush=True)
    return 1


def device_of(job: Job, local_rank: int) -> torch.device:
    """The GPU of that number where there are any and the run is not planned for CPUs. Raises InputError where there are
    too few: every start would end the same way."""
    if job.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    there = torch.cuda.device_count()
    if local_rank >= there:
        raise InputError(
            f"more ranks than GPUs on host {platform.node()}: cluster and layout must describe what is there",
            where="LOCAL_RANK", found=local_rank, accepted=f"0..{there - 1}",
        )  # fmt: skip
    return torch.device("cuda", local_rank)


def _signs_of_life() -> Heartbeat | None:
    """The heartbeat, and stacks of all threads on SIGUSR2, where a supervisor has said where to put them."""
    scratch = os.environ.get("BLOOMERY_SCRATCH")
    if scratch is None:
        return None
    rank = int(os.environ["RANK"])
    faulthandler.register(signal.SIGUSR2, file=stack_file(Path(scratch), rank).open("w"), all_threads=True)
    return Heartbeat(beat_file(Path(scratch), rank), json.loads(os.environ.get("BLOOMERY_USUAL", "[]")))


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # as a forked rank ends: a thread of gloo's that is still there would abort the interpreter's end
