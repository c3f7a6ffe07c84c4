"""Starts a real Slurm of several nodes on one machine: slurmctld, slurmd and munge, without systemd.

Each machine of the cluster, and the controller, is a process with separate network, mount, pid and host name
namespaces. When that process ends (``crash``), or this one does, the system ends its daemons, jobs, mounts and network
with it. Nothing is written outside the state folder, and an existing Slurm is not changed.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "ip", "unshare", "nsenter", "setpriv")
NETWORK = "10.77.0"
ALONE = "10.78.0.1"
"""The address of every node on its second network."""
CPUS, MEMORY_MB, GPUS = 64, 1_000_000, 8
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY", "BOOT_FAIL")

_CONFIGURATION = """\
ClusterName=tests
SlurmctldHost=ctl({network}.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# A requeued job may start again after cred_expire seconds, by default 120.
AuthInfo=socket={state}/munge.socket,cred_expire=5
SlurmctldPidFile={state}/slurmctld.pid
StateSaveLocation={state}/saved
SlurmctldLogFile={state}/slurmctld.log
SlurmdPidFile={state}/%n/slurmd.pid
SlurmdSpoolDir={state}/%n/spool
SlurmdLogFile={state}/%n/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
GresTypes=gpu
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
# CPUs, memory and GPUs need not exist on this machine.
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,sched_min_interval=0,bf_interval=1,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
# Short for tests; real clusters wait 300, 30 and 300 seconds.
SlurmdTimeout=10
KillWait=20
MinJobAge=3600
MessageTimeout=5
TCPTimeout=2
# A job need not end exactly at its time limit.
OverTimeLimit=2
NodeName={nodes} CPUs={cpus} RealMemory={memory} Gres=gpu:h100:{gpus} State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
PartitionName=low Nodes=ALL MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime=90
"""


class Machine:
    """A machine of the cluster: the first process of a pid namespace, with all processes in it."""

    def __init__(self, name: str, hosts: Path) -> None:
        self.name = name
        # It prints "up" when its namespaces exist.
        script = f'hostname {name}; mount --bind "{hosts}" /etc/hosts; echo up; while :; do sleep 3600 & wait; done'
        self._process = subprocess.Popen(
            [
                *("setpriv", "--pdeathsig", "KILL"),  # also if this process is killed
                *("unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"),
                *("bash", "-c", script),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"up\n", f"{name}: no namespaces; see unshare's message"
        (child,) = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        self.init = int(child)

    def inside(self, *command: str) -> list[str]:
        """Return the command line that runs ``command`` in this machine."""
        return ["nsenter", "-t", str(self.init), "-n", "-u", "-m", "-p", "--", *command]

    def kill(self) -> None:
        """End the machine as a power failure would; the first process of a pid namespace ends after all others."""
        os.kill(self.init, signal.SIGKILL)
        self._process.wait()


def run(*command: str, **options: object) -> str:
    """Run a command that must succeed; return its standard output."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, **options)  # pyright: ignore
    assert done.returncode == 0, f"{' '.join(command)}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


def wait_for(what: str, condition: Callable[[], object], seconds: float, log: Callable[[], str] = str) -> None:
    """Wait until ``condition`` is true; after ``seconds`` fail with the output of ``log``."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds:g} s in vain: {what}\n{log()}"
        time.sleep(0.2)


class Cluster:
    """A cluster that runs inside ``with``; ``state`` is a new folder, which keeps the logs."""

    def __init__(self, state: Path, nodes: Sequence[str] = ("n1", "n2")) -> None:
        self.state, self.nodes = state, tuple(nodes)
        self.machines: dict[str, Machine] = {}

    def __enter__(self) -> Cluster:
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for machine in reversed(self.machines.values()):
            machine.kill()
        self.machines.clear()

    def _start(self) -> None:
        self.state.mkdir(parents=True)
        for folder in ("saved", "devices"):
            (self.state / folder).mkdir()
        key = self.state / "munge.key"
        key.touch(0o600)
        key.write_bytes(secrets.token_bytes(128))
        self.hosts = self.state / "hosts"
        addresses = {"ctl": 1} | {name: 11 + index for index, name in enumerate(self.nodes)}
        self.addresses = {name: f"{NETWORK}.{number}" for name, number in addresses.items()}
        names = "".join(f"{address} {name}\n" for name, address in self.addresses.items())
        self.hosts.write_text(f"127.0.0.1 localhost\n{names}")
        (self.state / "slurm.conf").write_text(
            _CONFIGURATION.format(
                network=NETWORK,
                state=self.state,
                nodes=",".join(self.nodes),
                cpus=CPUS,
                memory=MEMORY_MB,
                gpus=GPUS,
            )
        )
        # A GPU of Slurm needs a device file; these are copies of /dev/null.
        for number in range(GPUS):
            run("mknod", "-m", "666", str(self.state / f"devices/gpu{number}"), "c", "1", "3")
        (self.state / "gres.conf").write_text(f"Name=gpu Type=h100 File={self.state}/devices/gpu[0-{GPUS - 1}]\n")
        self.machines["ctl"] = Machine("ctl", self.hosts)
        self._in("ctl", "ip", "link", "set", "lo", "up")
        self._in("ctl", "ip", "link", "add", "br0", "type", "bridge")
        self._in("ctl", "ip", "address", "add", f"{self.addresses['ctl']}/24", "dev", "br0")
        self._in("ctl", "ip", "link", "set", "br0", "up")
        files = [f"--{name}-file={self.state}/munge.{name}" for name in ("key", "pid", "log", "seed")]
        # --force: the state may be in a folder that other users cannot enter.
        self._in("ctl", "munged", "--force", f"--socket={self.state}/munge.socket", *files)
        self.start_controller()
        for name in self.nodes:
            self.boot(name)
        self.wait_until_idle()

    def _in(self, machine: str, *command: str) -> str:
        environment = {**os.environ, "SLURM_CONF": str(self.state / "slurm.conf")}
        environment["PATH"] += ":/usr/sbin:/sbin"
        return run(*self.machines[machine].inside(*command), env=environment)

    # Faults and repairs.

    def boot(self, node: str) -> None:
        """Start a node, with its daemon and a cable to the switch of the controller."""
        machine = self.machines[node] = Machine(node, self.hosts)
        (self.state / node / "spool").mkdir(parents=True, exist_ok=True)
        switch = ["nsenter", "-t", str(self.machines["ctl"].init), "-n", "--"]
        # The cable of a crashed node exists for a moment longer, so names must differ.
        cable = f"{node}.{machine.init}"
        run(*switch, *f"ip link add {cable} type veth peer name eth0 netns {machine.init}".split())
        run(*switch, *f"ip link set {cable} master br0 up".split())
        # On the second network, no node reaches another.
        run(*switch, *f"ip link add {cable}.a type veth peer name admin0 netns {machine.init}".split())
        run(*switch, *f"ip link set {cable}.a up".split())
        for name, address in (("admin0", ALONE), ("eth0", self.addresses[node])):
            self._in(node, "ip", *f"address add {address}/24 dev {name}".split())
            self._in(node, "ip", *f"link set {name} up".split())
        self._in(node, "ip", "link", "set", "lo", "up")
        self._in(node, "slurmd", "-N", node)

    def crash(self, node: str) -> None:
        self.machines.pop(node).kill()

    def plug(self, node: str, state: str) -> None:
        """Set the cable of the node ``up`` or ``down``."""
        cable = f"{node}.{self.machines[node].init}"
        run("nsenter", "-t", str(self.machines["ctl"].init), "-n", "--", "ip", "link", "set", cable, state)

    def start_controller(self) -> None:
        self._in("ctl", "slurmctld")

    def kill_controller(self) -> None:
        pid = int((self.state / "slurmctld.pid").read_text())
        self._in("ctl", "kill", "-9", str(pid))

    def wait_until_idle(self, seconds: float = 60) -> None:
        """Wait until every node is up and has no job."""

        def all_idle() -> bool:
            return self.client("sinfo", "-h", "-N", "-p", "main", "-o", "%T").split() == ["idle"] * len(self.nodes)

        wait_for("all nodes idle", all_idle, seconds)

    # Commands of a user.

    def environment(self, **more: str) -> dict[str, str]:
        """Return the environment of a user's shell, without variables of a job in which this process may run."""
        kept = {name: value for name, value in os.environ.items() if not re.match(r"(SLURM|SBATCH|SRUN)_", name)}
        return kept | {"SLURM_CONF": str(self.state / "slurm.conf")} | more

    def user(self, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run a command of a user who is logged in on the controller."""
        typed = self.machines["ctl"].inside("env", f"--chdir={Path.cwd()}", *command)
        environment = self.environment(**variables)
        return subprocess.run(typed, capture_output=True, text=True, check=False, timeout=120, env=environment)

    def client(self, *command: str, **variables: str) -> str:
        """Run a command that must succeed; return its output. Try again while the controller is starting."""
        for _ in range(20):
            done = self.user(*command, **variables)
            if "Unable to contact slurm controller" not in done.stderr:
                break
            time.sleep(0.5)
        assert done.returncode == 0, f"{' '.join(command)}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, *command: str, **variables: str) -> int:
        """Submit a job with these arguments of sbatch; return its id."""
        return int(self.client("sbatch", "--parsable", *command, **variables).split(";")[0])

    def job(self, job: int | str) -> dict[str, str]:
        """Return the output of ``scontrol show job`` by name."""
        shown = self.client("scontrol", "show", "job", str(job), "-o").splitlines()[0]
        return dict(re.findall(r"(\S+?)=(\S*)", shown))

    def wait(self, job: int, seconds: float = 300) -> dict[str, str]:
        """Wait until the job has ended; return its values."""

        def ended() -> bool:
            return self.job(job)["JobState"] in ENDED

        wait_for(f"end of job {job}", ended, seconds)
        return self.job(job)


def missing_programs() -> list[str]:
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    return [name for name in PROGRAMS if shutil.which(name, path=path) is None]
