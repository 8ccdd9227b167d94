"""A Slurm of one node on this machine, in namespaces of its own: its processes, ports and names touch nothing outside.

Ray looks for other Rays among all processes of a machine, and `ray stop` ends all that it finds: within a process
namespace it finds the job's own alone. The namespace's first process is all that has to be ended: the kernel ends the
rest.
"""

import os
import shutil
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

START_SECONDS = 120.0
NODE, ADDRESS = "node1", "10.77.0.1"
PROGRAMS = ("unshare", "nsenter", "ip", "munged", "slurmctld", "slurmd", "sbatch", "scontrol")
NAMESPACES = ("--pid", "--mount", "--net", "--uts")

CONFIG = """
ClusterName=escala
SlurmctldHost={node}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
KillWait=120
SchedulerParameters=sched_interval=2
NodeName={node} CPUs=2 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
"""`cred_expire` is also what a requeued job waits before it starts again: 120 s by default. `KillWait`, what a job has
that is cancelled until SIGKILL, is 30 s by default, which on a busy machine may be too few."""

START = """
set -e
hostname {node}
printf '127.0.0.1 localhost\\n{address} {node}\\n' > {folder}/hosts
mount --bind {folder}/hosts /etc/hosts
ip link set lo up
ip addr add {address}/32 dev lo
munged --foreground --force --socket {folder}/munge/socket --key-file {folder}/munge/key \
  --pid-file {folder}/munge/pid --log-file {folder}/munge/log --seed-file {folder}/munge/seed &
while [ ! -S {folder}/munge/socket ]; do sleep 0.1; done
slurmctld -D -c &
slurmd -D &
wait
"""


@dataclass(frozen=True)
class SlurmBox:
    """A running Slurm: `box("sbatch", ...)` runs a command on its node."""

    folder: Path
    first: int
    """The first process of its namespace, as it is numbered outside."""
    environment: Mapping[str, str]

    def __call__(
        self, *command: object, cwd: Path | None = None, ok: bool = True, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        inside = ["nsenter", f"--target={self.first}", *NAMESPACES, f"--wd={cwd or self.folder}", *map(str, command)]
        ended = subprocess.run(
            inside, env={**self.environment, **environment}, capture_output=True, text=True, timeout=300
        )
        assert not ok or ended.returncode == 0, f"{command}: {ended.stdout}{ended.stderr}"
        return ended


def why_not() -> str | None:
    """Why this machine cannot play a Slurm node, or None where it can."""
    missing = [program for program in PROGRAMS if not _where(program)]
    if missing:
        return f"no {', '.join(missing)} here (Debian: slurm-wlm, munge, iproute2)"
    if os.geteuid() != 0:
        return "Slurm's daemons are started by root here, and these tests do not run as root"
    tried = subprocess.run(["unshare", *NAMESPACES, "--fork", "--mount-proc", "true"], capture_output=True, text=True)
    return f"namespaces are not permitted here: {tried.stderr.strip()}" if tried.returncode else None


def _where(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def start_slurm(folder: Path, environment: Mapping[str, str]) -> "tuple[SlurmBox, subprocess.Popen[bytes]]":
    """Start munged, slurmctld and slurmd in namespaces of their own and wait until the node is idle."""
    for name in ("state", "spool", "munge"):
        (folder / name).mkdir(mode=0o700)
    (folder / "munge" / "key").write_bytes(os.urandom(1024))
    (folder / "munge" / "key").chmod(0o400)
    (folder / "slurm.conf").write_text(CONFIG.format(folder=folder, node=NODE))
    settings = {**environment, "SLURM_CONF": str(folder / "slurm.conf")}
    settings["PATH"] = f"{settings['PATH']}:/usr/sbin:/sbin"
    script = START.format(folder=folder, node=NODE, address=ADDRESS)
    with (folder / "daemons.log").open("wb") as log:
        process = subprocess.Popen(
            ["unshare", *NAMESPACES, "--fork", "--kill-child", "--mount-proc", "bash", "-c", script],
            env=settings,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    deadline, said = time.monotonic() + START_SECONDS, "no process"
    while time.monotonic() < deadline:
        assert process.poll() is None, (folder / "daemons.log").read_text()
        if children := psutil.Process(process.pid).children():
            box = SlurmBox(folder, children[0].pid, settings)
            said = box("sinfo", "--noheader", "--format=%T", ok=False).stdout.strip()
            if said == "idle":
                return box, process
        time.sleep(0.2)
    process.kill()
    raise AssertionError(f"Slurm's node is not idle but {said!r}: {(folder / 'daemons.log').read_text()}")
