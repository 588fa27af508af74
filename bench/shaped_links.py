"""Two hosts of two ranks joined by a link of 100 Mbit, 1 Gbit and 5 Gbit: is the plan right, and the choice the best?

Hosts are network namespaces of this machine (needs root, iproute2, tbf, taskset), each with half of its cores. For each
rate the hosts are probed together, a run is planned on what was found, and every layout below is really trained over
the link by the train worker, each predicted before it runs. Prints a table; `--json FILE` for programs.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean, median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "network"))

from namespaces import Network, network, reason_to_skip  # noqa: E402

from bloomery.cluster.hostfile import Hosts, read_hosts  # noqa: E402
from bloomery.cluster.prepare import prepare_pretraining  # noqa: E402
from bloomery.ledger.sinks import read_lines  # noqa: E402
from bloomery.planner.search import plan  # noqa: E402
from bloomery.spec.catalog import read_cluster, read_run  # noqa: E402
from bloomery.spec.cluster import Cluster  # noqa: E402
from bloomery.spec.layout import Layout  # noqa: E402

RATES = {"100mbit": 100e6 / 8, "1gbit": 1e9 / 8, "5gbit": 5e9 / 8}
SLOTS = 2
LAYOUTS = ("tp=4", "tp=2,dp=2", "tp=2,pp=2", "dp=4", "pp=2,dp=2", "pp=4")
MODEL = "{layers: 4, hidden: 192, heads: 4, ffn_hidden: 512, vocab: 8192, max_seq_len: 1024}"
MICRO_BATCH = 2
WARM_UP, STEPS = 2, 6
PORT = 29_617
RUN = """name: {name}
model: {model}
cluster: {cluster}
layout: auto
data: {{folder: {data}, max_bytes: 2000000}}
train: {{seq_len: 128, global_batch: 16, steps: {steps}, dtype: float32, checkpoint_every: 100000, metrics: [],
        compile: false}}
out: {out}
"""


def bloomery(*arguments: object) -> None:
    """Run the console program; its own messages stand when it fails."""
    done = subprocess.run([sys.executable, "-m", "bloomery", *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)


def train(hosts: Hosts, folder: Path) -> tuple[float, dict[str, float]]:
    """Train over the hosts with the train worker; median seconds of a step, mean seconds of its parts."""
    world = [(host, local) for host in hosts.hosts for local in range(host.slots)]
    workers = []
    for rank, (host, local) in enumerate(world):
        environment = {
            "RANK": str(rank),
            "LOCAL_RANK": str(local),
            "WORLD_SIZE": str(len(world)),
            "OMP_NUM_THREADS": "1",
            "PYTHONWARNINGS": "ignore",
            "GLOO_SOCKET_IFNAME": "eth0",
            "BLOOMERY_RENDEZVOUS": f"tcp://{hosts.hosts[0].reached_by}:{PORT}",
        }
        command = [*hosts.command(host, "bloomery.train.worker", environment), str(folder)]
        workers.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True))
    for worker in workers:
        _, said = worker.communicate(timeout=900)
        if worker.returncode:
            sys.exit(f"{folder.name}: a rank failed\n{said}")
    laps = [lap for lap in read_lines(folder / "ledger.jsonl") if lap["step"] > WARM_UP]
    buckets = sorted({bucket for lap in laps for bucket in lap["buckets"]})
    parts = {bucket: mean(lap["buckets"].get(bucket, 0.0) for lap in laps) for bucket in buckets}
    return median(lap["wall_s"] for lap in laps), parts


def one_rate(rate: str, hosts: Network, scratch: Path, model: str, layouts: tuple[str, ...]) -> dict[str, Any]:
    """Probe, plan, and run every layout at one rate."""
    cluster_file = scratch / f"{rate}.yaml"
    shell = hosts.shell(None)
    host_file = hosts.host_file(SLOTS)
    bloomery("probe", "--nodes", host_file, "--shell", shell, "--out", cluster_file)
    cluster = read_cluster(cluster_file)
    between = cluster.tiers[-1].bandwidth_bytes_per_s
    run_file = scratch / f"{rate}-run.yaml"
    rows = list[dict[str, Any]]()
    for text in layouts:
        name = f"{rate}-{text.replace('=', '').replace(',', '-')}"
        values = {"name": name, "model": model, "cluster": cluster_file, "data": scratch / "data", "steps": STEPS}
        run_file.write_text(RUN.format(out=scratch, **values))
        run = read_run(run_file, [])
        layout = Layout.parse(f"{text},micro_batch={MICRO_BATCH}")
        folder, _ = prepare_pretraining(run.model_copy(update={"layout": layout}), world_size=None, fresh=False)
        estimate = json.loads((folder / "plan.json").read_text())["estimate"]
        expected, (measured, parts) = estimate["step_time_s"], train(read_hosts(str(host_file), shell), folder)
        row = {"layout": text, "predicted_s": expected, "measured_s": measured, "error": expected / measured - 1}
        rows.append(row | {"predicted": estimate["components"], "measured": parts})
        print(
            f"{rate:8} {text:10} predicted {expected:7.3f} s  measured {measured:7.3f} s", file=sys.stderr, flush=True
        )
    return {
        "rate": rate,
        "link": between,
        "link_error": between / RATES[rate] - 1,
        "noise": cluster.noise,
        "planned": planned(run_file, cluster),
        "rows": rows,
    }


def planned(run_file: Path, cluster: Cluster) -> str:
    """The planner's own first choice among all layouts, in words."""
    return plan(read_run(run_file, []), world_size=cluster.size, top=1, runnable_only=True).best[0].layout.describe()


def print_table(found: list[dict[str, Any]]) -> None:
    """One block for each rate: every layout, fastest predicted first, and how far its choice is from the best."""
    for one in found:
        rows = sorted(one["rows"], key=lambda row: row["predicted_s"])
        best = min(row["measured_s"] for row in rows)
        print(f"\n{one['rate']}: link found at {one['link'] * 8 / 1e6:,.0f} Mbit/s ({one['link_error']:+.1%})", end="")
        print(f", noise {one['noise']:.0%}; the planner's first of all layouts: {one['planned']}")
        print(f"  {'layout':12}{'predicted':>10}{'measured':>10}{'error':>8}{'beside the best':>17}")
        for i, row in enumerate(rows):
            chosen = "  <- chosen of these" if i == 0 else ""
            times = f"{row['predicted_s']:9.3f}s{row['measured_s']:9.3f}s"
            print(f"  {row['layout']:12}{times}{row['error']:+8.1%}{row['measured_s'] / best - 1:+17.1%}{chosen}")
    errors = sorted(abs(row["error"]) for one in found for row in one["rows"])
    print(f"\nstep time: median error {median(errors):.1%}, largest {errors[-1]:.1%}, of {len(errors)} runs")


def main() -> None:
    """Every rate, then the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=MODEL, help="a name of the catalog or a mapping")
    parser.add_argument("--rates", default=",".join(RATES))
    parser.add_argument("--layouts", default=";".join(LAYOUTS), help="separated by ;")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # hosts are taken down when this is stopped
    reason = reason_to_skip()
    if reason:
        sys.exit(f"no hosts can be made here: {reason}")
    os.environ.setdefault("PYTHONPATH", str(ROOT / "src"))
    found = []
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        data = {"name": "data", "model": options.model, "cluster": "this-machine", "steps": STEPS}
        (scratch / "run.yaml").write_text(RUN.format(out=scratch, data=scratch / "data", **data))
        bloomery("data", "build", scratch / "run.yaml")
        for rate in options.rates.split(","):
            with network(("a", "b"), rate, scratch) as hosts:
                found.append(one_rate(rate, hosts, scratch, options.model, tuple(options.layouts.split(";"))))
    print_table(found)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
