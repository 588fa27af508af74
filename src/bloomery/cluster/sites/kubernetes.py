"""Kubernetes: a JobSet (jobset.x-k8s.io/v1alpha2) or a Kubeflow TrainJob (trainer.kubeflow.org/v1alpha1), as YAML.

Either way one pod a host, numbered by its job's completion index, the first one found by its DNS name. The run as
launched travels in a ConfigMap; data, checkpoints and ledger are on the volume that all pods share. A pod that is told
to go saves within its grace period; the set then starts again as a whole and goes on. Wrong input is not tried again.
"""

from __future__ import annotations

import hashlib
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

from bloomery.cluster.place import PORT
from bloomery.cluster.sites.order import Order, require_program, require_shared
from bloomery.cluster.world import ALIVE_VARIABLE
from bloomery.spec.errors import BloomeryError, InputError, nearest_match
from bloomery.spec.files import to_yaml, write_atomically
from bloomery.spec.run import Run

HOPELESS = [1, 2, 3]
"""Exit codes after which another start would end the same way."""
DESCRIBED = "/etc/bloomery"
ALIVE_FILE = "/tmp/bloomery-alive"
ALIVE_WITHIN_S = 60
_AMD = re.compile(r"\b(amd|mi\d)", re.IGNORECASE)
"""In a name of the catalog's (`mi300x`) as in the driver's own, which a probed cluster has (`AMD Instinct MI300X`)."""
_NAME = re.compile(r"[a-z]([a-z0-9-]{0,40}[a-z0-9])?")

Manifest = dict[str, Any]


def manifests(one: Order) -> list[Manifest]:
    """The ConfigMap and the job. Raises InputError for a name Kubernetes does not take or a folder off the volume."""
    name, site = one.run.name, one.run.launch.kubernetes
    if not _NAME.fullmatch(name):
        accepted = "small letters, digits and dashes, a letter first, at most 42"
        raise InputError("Kubernetes does not take this name", where="name", found=name, accepted=accepted)
    job = _job_set(one) if site.kind == "jobset" else _train_job(one)
    require_shared(one.run, _shared_mounts(one))
    described = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": _metadata(one, _described(one)),
        "immutable": True,
        "data": {"run.yaml": one.description_text()},
    }
    return [described, job]


def _described(one: Order) -> str:
    """The ConfigMap's name, its content's hash in it: no later launch changes what a job reads that starts again."""
    return f"{one.run.name}-run-{hashlib.sha256(one.description_text().encode()).hexdigest()[:10]}"


def text(one: Order) -> str:
    """All of it as YAML."""
    return to_yaml(*manifests(one))


def submit(one: Order) -> Path:
    """Write the manifest and apply it. Returns its path.

    Raises InputError where a job of this name is there, BloomeryError with what kubectl says.
    """
    kubectl = require_program("kubectl", "Kubernetes")
    job = f"{one.run.launch.kubernetes.kind} {one.run.name}{_space(one.run)}"
    if _kubectl([kubectl, "get", *job.split(), "--ignore-not-found", "--output=name"]).strip():
        again = f"`{how_to_follow(one.run)}` follows it, `kubectl delete {job}` ends it"
        raise InputError(f"a job of this name is there; {again}", where="name", found=one.run.name)
    path = one.folder / "launch" / "kubernetes.yaml"
    write_atomically(path, text(one))
    _kubectl([kubectl, "apply", "-f", str(path)])
    return path


def _kubectl(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise BloomeryError(f"kubectl: {(done.stderr.strip() or 'failed').splitlines()[-1]}")
    return done.stdout


def how_to_follow(run: Run) -> str:
    """The command that shows the first pod's log, the live line in it."""
    return (
        f"kubectl logs{_space(run)} -f -l jobset.sigs.k8s.io/jobset-name={run.name},"
        "batch.kubernetes.io/job-completion-index=0"
    )


def _space(run: Run) -> str:
    return f" -n {run.launch.kubernetes.namespace}" if run.launch.kubernetes.namespace else ""


def _metadata(one: Order, name: str) -> Manifest:
    site = one.run.launch.kubernetes
    return {"name": name, **({"namespace": site.namespace} if site.namespace else {})}


def _labelled(one: Order) -> Manifest:
    """The job's metadata, with Kueue's queue."""
    queue = one.run.launch.kubernetes.queue
    labels = {"labels": {"kueue.x-k8s.io/queue-name": queue}} if queue else {}
    return {**_metadata(one, one.run.name), **labels}


def _annotations(one: Order) -> Manifest:
    """Kueue's hint to keep all pods within one value of a node label."""
    topology = one.run.launch.kubernetes.topology
    return {"annotations": {"kueue.x-k8s.io/podset-preferred-topology": topology}} if topology else {}


def _command(one: Order) -> list[str]:
    """What a pod runs, as its process 1, so that it gets the signals. The pod's number is set by an Indexed job."""
    first = f"{one.run.name}-node-0-0.{one.run.name}"
    train = ["bloomery", "train", f"{DESCRIBED}/run.yaml", "--rendezvous", f"{first}:{PORT}"]
    mount = shlex.quote(one.run.launch.kubernetes.mount)
    return ["sh", "-c", f'cd {mount} && exec {shlex.join(train)} --node "$JOB_COMPLETION_INDEX/{one.nodes}"']


def _environment(one: Order) -> list[Manifest]:
    values = {
        "BLOOMERY_LAUNCHER": "kubernetes",
        "BLOOMERY_JOB": one.run.name,
        "BLOOMERY_SUBMITTED": f"{one.submitted:.0f}",
        ALIVE_VARIABLE: ALIVE_FILE,
    }
    attempt = {"fieldRef": {"fieldPath": "metadata.annotations['jobset.sigs.k8s.io/restart-attempt']"}}
    again = {"name": "BLOOMERY_REQUEUES", "valueFrom": attempt}
    return [*({"name": name, "value": value} for name, value in values.items()), again]


def _probes() -> Manifest:
    """Alive is a supervisor that looks after its ranks; it itself finds ranks that hang, and sooner."""
    look = f"test $(( $(date +%s) - $(stat -c %Y {ALIVE_FILE}) )) -lt {ALIVE_WITHIN_S}"
    probe = {"exec": {"command": ["sh", "-c", look]}, "timeoutSeconds": 10}
    return {
        "startupProbe": {**probe, "periodSeconds": 10, "failureThreshold": 60},
        "livenessProbe": {**probe, "periodSeconds": 30, "failureThreshold": 3},
    }


def _resources(one: Order) -> Manifest:
    if not one.gpus:
        return {}
    resource = "amd.com/gpu" if _AMD.search(one.run.cluster.accelerator.name) else "nvidia.com/gpu"
    return {"limits": {resource: one.gpus}, "requests": {resource: one.gpus}}


def _mounts(one: Order) -> list[Manifest]:
    return [
        {"name": "work", "mountPath": one.run.launch.kubernetes.mount},
        {"name": "run", "mountPath": DESCRIBED, "readOnly": True},
        {"name": "shm", "mountPath": "/dev/shm"},
    ]


def _shared_mounts(one: Order) -> list[str]:
    """Where our container has volumes: the claim's, then those the site lays over the pod as shared ones."""
    site = one.run.launch.kubernetes
    ours = "bloomery" if site.kind == "jobset" else "node"
    laid = [item for item in site.pod.get("containers", []) if item.get("name") == ours]
    more = [mount.get("mountPath", "") for item in laid for mount in item.get("volumeMounts", [])]
    return [site.mount, *filter(None, more)]


def _volumes(one: Order) -> list[Manifest]:
    return [
        {"name": "work", "persistentVolumeClaim": {"claimName": one.run.launch.kubernetes.claim}},
        {"name": "run", "configMap": {"name": _described(one)}},
        {"name": "shm", "emptyDir": {"medium": "Memory"}},
    ]


def _with_pod(spec: Manifest, one: Order, *, whole: bool) -> Any:
    """A pod's spec with what the site wants laid over it. Raises InputError for a container that would not start.

    `whole`: `spec` has all containers there are; else a runtime has others, and a name may be one of theirs.
    """
    where, pod = "launch.kubernetes.pod", one.run.launch.kubernetes.pod
    found = _laid_over(spec, pod, where)
    (ours,) = (container["name"] for container in spec["containers"])
    for number, container in enumerate(pod.get("containers", [])):
        name = str(container["name"])
        near = nearest_match(name, [ours])
        if name != ours and "image" not in container and (whole or near):
            accepted = f"{ours}, or a container with an image"
            raise InputError(
                "no container of this name",
                where=f"{where}.containers[{number}].name", found=name, accepted=accepted, nearest=near,
            )  # fmt: skip
    return found


def _laid_over(below: Any, above: Any, where: str) -> Any:
    """`above` over `below` as Kubernetes patches a pod: mapping by mapping, items of a list by their name.

    Raises InputError where items have none: they would take the place of all that is there.
    """
    if isinstance(below, dict) and isinstance(above, dict):
        return {**below, **{key: _laid_over(below.get(key), value, f"{where}.{key}") for key, value in above.items()}}
    if not isinstance(below, list) or not all(_has_name(item) for item in below):
        return above
    there = {item["name"]: item for item in below}
    if not isinstance(above, list):
        raise InputError("a list is expected", where=where, found=above)
    for number, item in enumerate(above):
        if not _has_name(item):
            raise InputError("an item is laid over by its name", where=f"{where}[{number}].name", accepted=there)
    named = ((item["name"], item) for item in above)
    return list(
        {**there, **{name: _laid_over(there.get(name), item, f"{where}.{name}") for name, item in named}}.values()
    )


def _has_name(item: Any) -> bool:
    return isinstance(item, dict) and "name" in item


def _job_set(one: Order) -> Manifest:
    site = one.run.launch.kubernetes
    resources = _resources(one)
    container = {
        "name": "bloomery",
        "image": site.image,
        "command": _command(one),
        "env": _environment(one),
        "ports": [{"containerPort": PORT}],
        **({"resources": resources} if resources else {}),
        **_probes(),
        "volumeMounts": _mounts(one),
    }
    pod = {
        "metadata": _annotations(one),
        "spec": {
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": site.grace_s,
            "containers": [container],
            "volumes": _volumes(one),
        },
    }
    pod["spec"] = _with_pod(pod["spec"], one, whole=True)
    hopeless = {"containerName": "bloomery", "operator": "In", "values": HOPELESS}
    job = {
        "parallelism": one.nodes,
        "completions": one.nodes,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": [{"action": "FailJob", "onExitCodes": hopeless}]},
        "template": pod,
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": _labelled(one),
        "spec": {
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "failurePolicy": {
                "maxRestarts": site.restarts,
                "rules": [{"name": "hopeless", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
            },
            "replicatedJobs": [{"name": "node", "replicas": 1, "template": {"spec": job}}],
        },
    }


def _train_job(one: Order) -> Manifest:
    """Kubeflow's runtime `torch-distributed` calls its job and container `node` and numbers pods as a JobSet does.

    Its patches take no probes: those belong in the site's own runtime.
    """
    site = one.run.launch.kubernetes
    resources = _resources(one)
    pod = {
        "metadata": _annotations(one),
        "spec": {
            "terminationGracePeriodSeconds": site.grace_s,
            "containers": [{"name": "node", "volumeMounts": _mounts(one)}],
            "volumes": _volumes(one),
        },
    }
    pod["spec"] = _with_pod(pod["spec"], one, whole=False)
    jobs = [{"name": "node", "template": {"spec": {"template": pod}}}]
    return {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": _labelled(one),
        "spec": {
            "runtimeRef": {"name": site.runtime},
            "trainer": {
                "image": site.image,
                "command": _command(one),
                "numNodes": one.nodes,
                "env": _environment(one),
                **({"resourcesPerNode": resources} if resources else {}),
            },
            "runtimePatches": [
                {
                    "manager": "bloomery.io/launch",
                    "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": jobs}}},
                }
            ],
        },
    }
