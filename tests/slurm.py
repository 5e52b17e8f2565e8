"""A Slurm to test with: Debian's slurmctld, slurmd and munged on nodes of nodes.py.

  with Nodes(2) as nodes, Slurm(nodes, folder) as slurm:
      result = slurm.run("srun", "--nodes", 2, "hostname")

It ends with its nodes; all it writes is in `folder`."""

import os
import shutil
import subprocess
import time

from harness import Result, Skip

PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sbatch")
CORES = 2  # of a node, as far as Slurm knows


def find(program):
    path = shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    if path is None:
        raise Skip(f"{program} is not installed")
    return path


class Slurm:
    def __init__(self, nodes, folder):
        self.programs = {name: find(name) for name in PROGRAMS}
        self.nodes, self.folder, self.daemons = nodes, folder, []
        self.environment = {**{name: value for name, value in os.environ.items()
                               if not name.startswith(("SLURM_", "SBATCH_"))},
                            "SLURM_CONF": f"{folder}/slurm.conf"}

    def __enter__(self):
        os.chmod(self.folder, 0o755)  # munged asks that of every folder above its socket
        os.mkdir(f"{self.folder}/state")
        with open(f"{self.folder}/munge.key", "wb", opener=lambda path, flags: os.open(
                path, flags, 0o600)) as file:
            file.write(os.urandom(128))
        with open(f"{self.folder}/slurm.conf", "w") as file:
            file.write(self._configuration())
        with open(f"{self.folder}/cgroup.conf", "w") as file:
            file.write("CgroupPlugin=cgroup/v1\n")  # not looked for: a test's node mounts none
        self._start(0, "munged", "--foreground", "--force", *(
            f"--{what}-{kind}={self.folder}/munge.{what}" for what, kind in
            (("key", "file"), ("pid", "file"), ("seed", "file"), ("log", "file"))),
            f"--socket={self.folder}/munge.socket")
        self.wait(lambda: os.path.exists(f"{self.folder}/munge.socket"), "munged")
        self._start(0, "slurmctld", "-D")
        for node, name in enumerate(self.nodes.names):
            os.mkdir(f"{self.folder}/spool-{name}")
            self._start(node, "slurmd", "-D", "-N", name)
        self.wait(lambda: self.run("sinfo", "--noheader", "--format=%D %t", code=None).out ==
                   f"{self.nodes.count} idle\n", "nodes that are idle")
        return self

    def __exit__(self, *_):
        pass

    def _configuration(self):
        nodes = "".join(f"NodeName={name} NodeAddr={address} CPUs={CORES}\n" for name, address in
                        zip(self.nodes.names, self.nodes.addresses))
        return f"""ClusterName=lockstep
SlurmctldHost={self.nodes.names[0]}
SlurmUser=root
AuthInfo=socket={self.folder}/munge.socket
StateSaveLocation={self.folder}/state
SlurmdSpoolDir={self.folder}/spool-%n
SlurmctldPidFile={self.folder}/slurmctld.pid
SlurmdPidFile={self.folder}/slurmd-%n.pid
SlurmctldLogFile={self.folder}/slurmctld.log
SlurmdLogFile={self.folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
ReturnToService=2
SchedulerParameters=batch_sched_delay=0,sched_interval=1
{nodes}PartitionName=all Nodes=ALL Default=YES
"""

    def _start(self, node, program, *words):
        with open(f"{self.folder}/{program}-{node}.out", "w") as output:
            self.daemons.append(self.nodes.run(node, [self.programs[program], *words],
                                               env=self.environment, stdout=output, stderr=output))

    def wait(self, condition, what):
        deadline = time.monotonic() + 60
        while not condition():
            ended = [daemon.args for daemon in self.daemons if daemon.poll() is not None]
            if ended or time.monotonic() > deadline:
                raise AssertionError(f"no {what}; ended: {ended}\n{self.logs()}")
            time.sleep(0.05)

    def logs(self):
        text = ""
        for name in sorted(os.listdir(self.folder)):
            if name.endswith((".out", ".log")):
                with open(f"{self.folder}/{name}", errors="replace") as file:
                    text += f"--- {name}\n{file.read()[-3000:]}\n"
        return text

    def run(self, *command, code=0, timeout=120, **options):
        """Runs a command on node 0 and checks its exit code (None: any)."""
        process = self.nodes.run(0, command, env=self.environment, stdout=subprocess.PIPE,
                                 stderr=subprocess.PIPE, text=True, **options)
        out, err = process.communicate(timeout=timeout)
        result = Result(process.returncode, out, err)
        assert code is None or result.code == code, f"{command}: {result}\n{self.logs()}"
        return result
