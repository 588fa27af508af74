"""What is handed to a scheduler is what it accepts, and says of hosts and ranks what the layout does."""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from bloomery.cluster.hostfile import Host
from bloomery.cluster.sites import kubernetes, skypilot, slurm, ssh
from bloomery.cluster.sites.order import Order, order, with_absolute_folders
from bloomery.spec.catalog import read_run
from bloomery.spec.errors import InputError
from bloomery.spec.launch import Slurm, time_limit_s

ROOT = Path(__file__).parents[3]
SCHEMAS = Path(__file__).parent / "schemas"


def ordered(*assignments: str, nodes: int | None = None) -> Order:
    """Llama 3 8B on two hosts of 8 H100."""
    fixed = ["cluster.nodes=2", "layout={tp: 8, dp: 2}"]
    return order(read_run(ROOT / "examples" / "llama3-8b.yaml", [*fixed, *assignments]), nodes)


def problems(value: Any, schema: Any, where: str = "") -> list[str]:
    """Where a value breaks a structural schema; keys that it does not know are pruned by an API server, so an error."""
    if schema is True:
        return []
    types = {"object": dict, "array": list, "string": str, "boolean": bool, "integer": int}
    wanted = types.get(schema.get("type", ""))
    if wanted is not None and (not isinstance(value, wanted) or (wanted is int and isinstance(value, bool))):
        return [f"{where}: {value!r} is no {schema['type']}"]
    found = [f"{where}: {value!r} not in {schema['enum']}" for _ in [0] if value not in schema.get("enum", [value])]
    if isinstance(value, dict):
        known, more = schema.get("properties", {}), schema.get("additionalProperties")
        found += [f"{where}.{key}: missing" for key in schema.get("required", []) if key not in value]
        for key, item in value.items():
            if key in known or more:
                found += problems(item, known.get(key, more), f"{where}.{key}")
            elif known or "properties" in schema:
                found.append(f"{where}.{key}: unknown")
    if isinstance(value, list):
        found += [p for i, item in enumerate(value) for p in problems(item, schema.get("items", True), f"{where}[{i}]")]
        limit = schema.get("maxItems", len(value))
        found += [f"{where}: more than {limit}"] if len(value) > limit else []
    if isinstance(value, str):
        limits = schema.get("minLength", 0), schema.get("maxLength", len(value))
        found += [] if limits[0] <= len(value) <= limits[1] else [f"{where}: {value!r} is too short or long"]
        found += [] if re.search(schema.get("pattern", ""), value) else [f"{where}: {value!r} breaks the pattern"]
    if isinstance(value, int) and value < schema.get("minimum", value):
        found.append(f"{where}: {value} is too small")
    return found


@pytest.mark.parametrize("kind", ["jobset", "trainjob"])
def test_kubernetes_accepts_the_manifest(kind: str) -> None:
    site = ["queue=team", "topology=rack", "namespace=me"]
    one = ordered(f"launch.kubernetes.kind={kind}", *(f"launch.kubernetes.{word}" for word in site))
    described, job = yaml.safe_load_all(kubernetes.text(one))
    schema = json.loads((SCHEMAS / f"{kind}.json").read_text())
    schema["properties"]["metadata"] = {
        "type": "object",
        "properties": {"name": {"type": "string"}, "namespace": {"type": "string"}, "labels": True},
    }
    assert problems(job, schema) == []
    assert read_run_of(described["data"]["run.yaml"]).layout == one.run.layout
    assert job["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "team"}
    everything = json.dumps(job)
    for part in ('--node \\"$JOB_COMPLETION_INDEX/2\\"', "llama3-8b-node-0-0.llama3-8b:29400", '"nvidia.com/gpu": 8'):
        assert part in everything, part
    assert '"terminationGracePeriodSeconds": 120' in everything
    assert "metadata.annotations['jobset.sigs.k8s.io/restart-attempt']" in everything
    assert "podset-preferred-topology" in everything
    assert '"claimName": "bloomery"' in everything


def read_run_of(text: str) -> Any:
    """A description from its text."""
    from bloomery.spec.files import parse_yaml
    from bloomery.spec.run import Run

    return Run.checked(parse_yaml(text, "run.yaml"))


@pytest.mark.parametrize("kind", ["jobset", "trainjob"])
def test_what_else_pods_need_is_laid_over_their_spec(kind: str) -> None:
    name = {"jobset": "bloomery", "trainjob": "node"}[kind]
    more = "nodeSelector: {gpu: h100}, tolerations: [{key: gpu, operator: Exists}], volumes: [{name: x, emptyDir: {}}]"
    inner = f"containers: [{{name: {name}, securityContext: {{privileged: true}}}}]"
    one = ordered(f"launch.kubernetes.kind={kind}", f"launch.kubernetes.pod={{{more}, {inner}}}")
    job = kubernetes.manifests(one)[1]
    assert problems({**job, "metadata": {}}, json.loads((SCHEMAS / f"{kind}.json").read_text())) == []
    jobs = job["spec"]
    if kind == "trainjob":
        jobs = jobs["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]
    spec = jobs["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert spec["nodeSelector"] == {"gpu": "h100"} and spec["tolerations"] == [{"key": "gpu", "operator": "Exists"}]
    assert [volume["name"] for volume in spec["volumes"]] == ["work", "run", "shm", "x"]
    (container,) = spec["containers"]
    assert container["securityContext"] == {"privileged": True} and len(container["volumeMounts"]) == 3


@pytest.mark.parametrize(
    ("kind", "pod", "said"),
    [
        ("jobset", "{containers: [{resources: {}}]}", r"pod\.containers\[0\]\.name: .* accepted: bloomery$"),
        ("trainjob", "{containers: [{resources: {}}]}", r"pod\.containers\[0\]\.name: .* accepted: node$"),
        ("jobset", "{containers: {name: bloomery}}", r"pod\.containers: a list is expected"),
        ("jobset", "{volumes: [{emptyDir: {}}]}", r"pod\.volumes\[0\]\.name: .* accepted: work, run, shm"),
        ("jobset", "{containers: [{name: bloomery, env: [A]}]}", r"pod\.containers\.bloomery\.env\[0\]\.name"),
        ("jobset", "{containers: [{name: blomery}]}", r"containers\[0\]\.name: .* 'blomery'.* did you mean 'bloomery'"),
        ("jobset", "{containers: [{name: node}]}", r"containers\[0\]\.name: no container of this name"),
        ("trainjob", "{containers: [{name: nodes}]}", r"containers\[0\]\.name: .* did you mean 'node'"),
    ],
)
def test_what_would_take_our_containers_place_or_not_start_is_refused(kind: str, pod: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        kubernetes.text(ordered(f"launch.kubernetes.kind={kind}", f"launch.kubernetes.pod={pod}"))


def test_containers_beside_ours_are_the_sites_own() -> None:
    pod = "{containers: [{name: logs, image: fluent-bit}]}"
    assert "image: fluent-bit" in kubernetes.text(ordered(f"launch.kubernetes.pod={pod}"))
    of_its_runtime = "{containers: [{name: istio, resources: {}}]}"
    told = ["launch.kubernetes.kind=trainjob", f"launch.kubernetes.pod={of_its_runtime}"]
    assert "name: istio" in kubernetes.text(ordered(*told))


def test_how_often_a_train_job_starts_again_is_its_runtimes_to_say() -> None:
    assert ordered("launch.kubernetes.restarts=3").run.launch.kubernetes.restarts == 3
    with pytest.raises(InputError, match=r"launch\.kubernetes: restarts 3 with kind trainjob"):
        ordered("launch.kubernetes.kind=trainjob", "launch.kubernetes.restarts=3")


def test_extra_resources_stand_beside_the_accelerators() -> None:
    pod = "{containers: [{name: bloomery, resources: {limits: {rdma/hca: 1}}}]}"
    text = kubernetes.text(ordered(f"launch.kubernetes.pod={pod}"))
    assert "nvidia.com/gpu: 8" in text and "rdma/hca: 1" in text


def test_the_checker_of_schemas_finds_what_an_api_server_would() -> None:
    schema = json.loads((SCHEMAS / "jobset.json").read_text())
    job = kubernetes.manifests(ordered())[1]
    assert problems({**job, "metadata": {}}, schema) == []
    pod = job["spec"]["replicatedJobs"][0]["template"]["spec"]
    for broken, word in (
        ({**job["spec"], "replicas": 1}, "unknown"),
        ({**job["spec"], "failurePolicy": {"maxRestarts": "many"}}, "no integer"),
        ({**job["spec"], "replicatedJobs": [{"template": {"spec": pod}}]}, "missing"),
        ({**job["spec"], "startupPolicy": {"startupPolicyOrder": "Never"}}, "not in"),
    ):
        assert any(word in problem for problem in problems({**job, "metadata": {}, "spec": broken}, schema)), word


def test_a_container_is_alive_while_its_supervisor_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bloomery.cluster.world import ALIVE_VARIABLE, pause

    container = kubernetes.manifests(ordered())[1]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    alive = tmp_path / "alive"
    command = [
        part.replace(kubernetes.ALIVE_FILE, str(alive))
        for part in container["containers"][0]["livenessProbe"]["exec"]["command"]
    ]
    assert subprocess.run(command, stderr=subprocess.DEVNULL).returncode != 0
    monkeypatch.setenv(ALIVE_VARIABLE, str(alive))
    pause()
    assert subprocess.run(command).returncode == 0
    os.utime(alive, (time.time() - 2 * kubernetes.ALIVE_WITHIN_S,) * 2)
    assert subprocess.run(command).returncode != 0


FAKE_KUBECTL = """#!/bin/sh
echo "$@" >> "$0.said"
case "$1" in get) [ ! -e "$0.job" ] || echo jobset.jobset.x-k8s.io/llama3-8b ;; apply) touch "$0.job" ;; esac
"""


def test_a_second_job_of_a_name_is_refused_and_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kubectl = tmp_path / "kubectl"
    kubectl.write_text(FAKE_KUBECTL)
    kubectl.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    site = [f"out={tmp_path}", f"launch.kubernetes.mount={tmp_path}", "launch.kubernetes.namespace=me"]
    one = ordered(*site)
    manifest = kubernetes.submit(one)
    before = manifest.read_text()
    with pytest.raises(InputError, match="`kubectl delete jobset llama3-8b -n me` ends it"):
        kubernetes.submit(ordered(*site, "train.global_batch=64"))
    said = (tmp_path / "kubectl.said").read_text()
    assert said.count("apply") == 1 and "get jobset llama3-8b -n me --ignore-not-found" in said
    assert manifest.read_text() == before


def test_what_a_job_reads_when_it_restarts_is_named_by_its_content_and_cannot_change() -> None:
    first, job = kubernetes.manifests(ordered())
    other, _ = kubernetes.manifests(ordered("train.global_batch=64"))
    assert first["immutable"] is True and first["metadata"]["name"] != other["metadata"]["name"]
    assert first["metadata"]["name"] in json.dumps(job)


def test_a_name_kubernetes_does_not_take_is_refused() -> None:
    with pytest.raises(InputError, match="small letters"):
        kubernetes.text(ordered("name=My_Run"))


def test_skypilot_is_told_hosts_accelerators_and_what_to_recover_from() -> None:
    task = yaml.safe_load(skypilot.text(ordered()))
    assert (task["num_nodes"], task["resources"]["accelerators"]) == (2, "H100:8")
    assert task["resources"]["job_recovery"] == {"recover_on_exit_codes": [75]}
    environment = {"SKYPILOT_NODE_RANK": "1", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2"}
    run = task["run"].replace("exec bloomery", "exec echo").replace("cd /work", "true")
    done = subprocess.run(["sh", "-c", run], env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.stdout.split() == ["train", skypilot.DESCRIBED, "--node", "1/2", "--rendezvous", "10.0.0.1:29400"]
    with pytest.raises(InputError, match="SkyPilot has no name"):
        skypilot.text(ordered("cluster=h800-deepseek-like", "layout={tp: 8, dp: 2}"))


def test_without_a_volume_skypilot_is_told_of_none() -> None:
    assert "volumes" not in skypilot.task(ordered("launch.skypilot.volume=''", "launch.skypilot.infra=aws"))


def test_the_batch_script_says_what_the_layout_needs(tmp_path: Path) -> None:
    site = ["partition=gpu", "account=lab", "qos=high", "time=24:00:00", "notice_s=90", "options=[--constraint=h100]"]
    one = ordered("name=a run", *(f"launch.slurm.{word}" for word in site))
    text = slurm.script([one], tmp_path / "%j.log")
    options = [line.partition(" ")[2] for line in text.splitlines() if line.startswith("#SBATCH")]
    for expected in (
        "'--job-name=a run'", "--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=8", "--exclusive", "--requeue",
        "--partition=gpu", "--account=lab", "--qos=high", "--time=24:00:00", "--signal=USR1@90", "--open-mode=append",
        "--constraint=h100",
    ):  # fmt: skip
        assert expected in options, expected
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0


def test_on_a_part_of_a_host_every_rank_has_a_core(tmp_path: Path) -> None:
    part = ["cluster.nodes=1", "layout={tp: 4, dp: 1}"]
    assert "#SBATCH --cpus-per-task=4\n" in slurm.script([ordered(*part)], tmp_path / "log")
    told = ordered(*part, "launch.slurm.options=[--cpus-per-gpu=12]")
    assert "cpus-per-task=4" not in slurm.script([told], tmp_path / "log")
    assert "#SBATCH --cpus-per-task" not in slurm.script([ordered()], tmp_path / "log")


def test_several_runs_are_one_array_and_must_be_alike(tmp_path: Path) -> None:
    one, two = ordered("name=one"), ordered("name=two")
    text = slurm.script([one, two], tmp_path / "%A_%a.log")
    assert "#SBATCH --array=0-1" in text
    assert f"runs=({one.description} {two.description})" in text
    with pytest.raises(InputError, match="same hosts"):
        slurm.script([one, ordered(nodes=1)], tmp_path / "log")


@pytest.mark.parametrize(
    "wrong",
    ["options=['--x; rm -rf']", "options=['--a=$(id)']", 'options=["--a\\n#"]', "partition=a b", "time=soon", "time=1"],
)
def test_what_would_be_a_command_in_the_script_is_refused(wrong: str) -> None:
    with pytest.raises(InputError, match=r"launch\.slurm"):
        ordered(f"launch.slurm.{wrong}")


@pytest.mark.parametrize(
    ("text", "seconds"), [("30", 1800), ("1:30", 90), ("24:00:00", 86400), ("2-12", 216000), ("1-0:30", 88200)]
)
def test_times_are_read_as_slurm_does(text: str, seconds: int) -> None:
    assert time_limit_s(text) == seconds
    assert Slurm(time=text, notice_s=10).time == text


def test_no_limit_and_alternatives_are_slurms_too() -> None:
    site = Slurm(time="UNLIMITED", options=("--constraint=a100|h100",))
    text = slurm.script([ordered("launch.slurm.options=['--constraint=a100|h100']")], Path("log"))
    assert site.time == "UNLIMITED" and "#SBATCH '--constraint=a100|h100'" in text


@pytest.mark.parametrize(
    ("text", "state", "code"),
    [
        ("JobId=1 JobState=PENDING Reason=Priority ExitCode=0:0", "PENDING", None),
        ("JobId=1 JobState=RUNNING Reason=None ExitCode=0:0", "RUNNING", None),
        ("JobId=1 JobState=COMPLETED Reason=None ExitCode=0:0", "COMPLETED", 0),
        ("JobId=1 JobState=FAILED Reason=NonZeroExitCode ExitCode=2:0", "FAILED", 2),
        ("JobId=1 JobState=CANCELLED Reason=None ExitCode=0:15", "CANCELLED", 143),
        ("JobId=1 JobState=TIMEOUT Reason=TimeLimit ExitCode=0:0", "TIMEOUT", 1),
    ],
)
def test_a_jobs_end_is_read_from_slurm(text: str, state: str, code: int | None) -> None:
    found = slurm.read_status(text)
    assert (found.state, found.code) == (state, code)


def test_ranks_that_hosts_cannot_share_evenly_are_refused() -> None:
    with pytest.raises(InputError, match="accepted: 1, 2, 4, 8, 16"):
        ordered(nodes=3)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no host in it"),
        ("a b", "unknown setting"),
        ("a\na", "named before"),
        ("-oProxyCommand=x", "name comes first"),
        ("\udcff", "not UTF-8 text"),
    ],
)
def test_a_wrong_host_file_is_one_line(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "hosts"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(InputError, match=words):
        ssh.read_hosts(path)


def test_a_host_file_of_the_probe_serves_ssh_too(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("me@h1 slots=2 address=10.0.0.1\nh2 slots=2\n")
    first, second = ssh.commands(ordered(), ssh.read_hosts(path))
    assert (first[-2], second[-2]) == ("me@h1", "h2")
    assert "--rendezvous 10.0.0.1:29400" in first[-1] and "--node 1/2" in second[-1]


FAKE_SSH = """#!/bin/sh
# As sshd does: the last argument to a shell, standard input from the connection.
while [ "$1" = -o ]; do shift 2; done
export HOST="$1"; shift
exec sh -c "$*"
"""
REMOTE = """
import os, signal, sys, time
def stop(*_): print("saved", flush=True); sys.exit(75)
signal.signal(signal.SIGTERM, stop)
print("here", os.environ["HOST"], *sys.argv[1:], flush=True)
if os.environ["HOST"] == "bad": time.sleep(1); sys.exit(7)
time.sleep(60)
"""


@pytest.fixture
def fake_ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """An ssh that stays here, and a program in place of Bloomery."""
    path, program = tmp_path / "ssh", tmp_path / "remote.py"
    path.write_text(FAKE_SSH)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    program.write_text(REMOTE)
    monkeypatch.setattr(ssh, "program", lambda: [sys.executable, str(program)])
    return (str(path), *ssh.SSH[1:])


def test_one_host_that_fails_stops_all_after_saving(
    fake_ssh: tuple[str, ...], capfd: pytest.CaptureFixture[str]
) -> None:
    hosts = [Host("me@good"), Host("bad")]
    assert ssh.run(ssh.commands(ordered(), hosts, fake_ssh), hosts) == 7
    said = capfd.readouterr().err
    assert "here me@good train" in said and "--node 0/2 --rendezvous good:29400" in said
    assert "bad: here bad train" in said and "--node 1/2" in said
    assert "saved" in said


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_all_at_the_terminal_reaches_no_connection_and_waits_for_the_hosts(
    fake_ssh: tuple[str, ...], number: signal.Signals
) -> None:
    commands = ssh.commands(ordered(), [Host("one"), Host("two")], fake_ssh)
    text = (
        "import json, signal, sys\nfrom bloomery.cluster.hostfile import Host\nfrom bloomery.cluster.sites import ssh\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background job is deaf to Ctrl-C
        'sys.exit(ssh.run(json.loads(sys.argv[1]), [Host("one"), Host("two")]))'
    )
    program = [sys.executable, "-c", text, json.dumps(commands)]
    with subprocess.Popen(program, stderr=subprocess.PIPE, text=True, start_new_session=True) as run:
        assert run.stderr is not None
        said = [run.stderr.readline() for _ in commands]  # both are there
        os.killpg(run.pid, number)
        said += run.stderr.readlines()
    assert run.returncode == 75
    assert "".join(said).count("saved") == 2, said


def test_text_in_the_users_own_folder_is_the_same_text_when_launched() -> None:
    run = with_absolute_folders(ordered("data.text=[~/corpus]").run)
    assert run.data.text == (str(Path("~/corpus").expanduser()),)


def test_host_keys_are_checked_as_the_user_has_it() -> None:
    text = " ".join(ssh.commands(ordered(), [Host("a"), Host("b")])[0])
    assert "StrictHostKeyChecking" not in text and "UserKnownHostsFile" not in text and "BatchMode=yes" in text
