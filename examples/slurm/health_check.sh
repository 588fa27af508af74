#!/bin/sh
# Slurm's HealthCheckProgram: drains a node on which `bloomery doctor` finds a fault. In slurm.conf:
#   HealthCheckProgram=/etc/slurm/health_check.sh
#   HealthCheckInterval=300
#   HealthCheckNodeState=IDLE
# What others compute there and GPUs that others use are no faults of the node: whoever else has a job on it does that.
# As a Prolog the same program keeps a job from a bad node: set DOCTOR_EXIT=1, and a fault ends it with exit code 1
# (Slurm then drains the node and requeues the job).
bloomery=${BLOOMERY:-bloomery}
node=${SLURMD_NODENAME:-$(hostname -s)}

report=$(timeout 50 "$bloomery" doctor --json 2>/dev/null)
[ $? -eq 1 ] || exit 0 # 0: fit; anything else is no fault of the node

reason=$(printf '%s' "$report" | python3 -c '
import json, sys
of_others = ("other work", "GPU use")
faults = [f for f in json.load(sys.stdin)["findings"] if f["verdict"] == "fault" and f["check"] not in of_others]
if not faults: sys.exit(1)
print("; ".join(f["check"] + ": " + f["found"] for f in faults)[:200])') || exit 0
scontrol update NodeName="$node" State=DRAIN Reason="doctor: $reason"
exit "${DOCTOR_EXIT:-0}"
