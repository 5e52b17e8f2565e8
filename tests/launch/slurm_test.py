"""srun and sbatch, the real ones, on a Slurm that the test starts."""

import glob
import os
import re
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from harness import BUILD, LOCKSTEP, ROOT, Skip, contains, equal, main, report_of
from nodes import Nodes
from slurm import Slurm

WORKER = os.path.join(BUILD, "cluster_worker")


def sums(text):
    return sorted(re.findall(r"rank \d of \d by .*: sum .*", text))


def test_srun_of_an_agent_and_of_the_workers_themselves(folder):
    with Nodes(1) as nodes, Slurm(nodes, folder) as slurm:
        result = slurm.run("srun", "--cpus-per-task=2", LOCKSTEP, "run", "--nproc-per-node=auto",
                           WORKER, "sum")
        equal(sums(result.out), [f"rank {rank} of 2 by lockstep run: sum 1" for rank in (0, 1)])
        equal(result.err, "")
        result = slurm.run("srun", "--ntasks=2", WORKER, "sum")
        equal(sums(result.out), [f"rank {rank} of 2 by srun: sum 1" for rank in (0, 1)])


def test_srun_across_nodes(folder):
    with Nodes(2) as nodes, Slurm(nodes, folder) as slurm:
        key = f"{folder}/key"
        slurm.run(LOCKSTEP, "key", key)
        srun = ("srun", "--nodes=2", "--ntasks-per-node=1", LOCKSTEP)
        result = slurm.run(*srun, "run", "--nproc-per-node=2", "--key-file", key, "sh", "-c",
                           "echo $RANK of $WORLD_SIZE on node $GROUP_RANK of $GROUP_WORLD_SIZE")
        equal(sorted(result.out.splitlines()),
              [f"[rank {rank}] {rank} of 4 on node {rank // 2} of 2" for rank in range(4)])
        result = slurm.run(*srun, "doctor", "--key-file", key)
        contains(result.out, "node 0: node0\n", "node 1: node1, where", "all 2 nodes\n")


def test_the_batch_file_saves_and_goes_on(folder):
    if not os.path.exists(os.path.join(BUILD, "lockstep-worker")):
        raise Skip("lockstep-worker is not built")
    with Nodes(1) as nodes, Slurm(nodes, folder) as slurm:
        key = f"{folder}/key"
        slurm.run(LOCKSTEP, "key", key)
        slurm.environment |= {"LOCKSTEP_KEY_FILE": key, "OMP_NUM_THREADS": "1",
                              "PATH": f"{BUILD}:{os.environ['PATH']}"}
        job = slurm.run("sbatch", "--parsable", f"{ROOT}/deploy/lockstep.sbatch",
                        "linear-regression", "--set", "train.epochs=200000", "--set",
                        "dataset.rows=20000", cwd=folder).out.strip()
        run = f"{folder}/runs/slurm-{job}"
        log = f"{folder}/lockstep-{job}.log"

        def said(text):
            if not os.path.exists(log):
                return False
            with open(log) as file:
                return text in file.read()

        slurm.wait(lambda: glob.glob(f"{run}/checkpoints/*/manifest.json"), "checkpoint")
        slurm.run("scancel", "--signal=TERM", job)
        slurm.wait(lambda: said("stopped as asked, and saved"), "end")
        slurm.wait(lambda: slurm.run("squeue", "--noheader", "--format=%t").out == "PD\n",
                   "job in the queue again")
        # Not in two minutes, nor in the second of its end: Slurm has revoked what it signs then.
        slurm.run("scontrol", "update", f"job={job}", "StartTime=now+3")
        slurm.wait(lambda: said("going on from step"), "second start")
        slurm.run("scancel", job)
        slurm.wait(lambda: slurm.run("squeue", "--noheader").out == "", "empty queue")


if __name__ == "__main__":
    main(globals())
