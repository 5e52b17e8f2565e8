"""Workers on two nodes (network namespaces) under every launcher: mpirun, torchrun, ssh. srun is in
slurm_test.py."""

import os
import re
import shutil
import subprocess
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from harness import BUILD, LOCKSTEP, ROOT, Result, Skip, equal, lockstep, main
from nodes import Nodes
from sshd import Sshd

WORKER = os.path.join(BUILD, "cluster_worker")
TORCHRUN_WORKER = os.path.join(BUILD, "torchrun_worker")
DEVICES = {"GLOO_SOCKET_IFNAME": "eth0", "TP_SOCKET_IFNAME": "eth0"}  # of torchrun's own store


def sums(text):
    return sorted(re.findall(r"rank \d of \d by .*: sum .*", text))


def results_of(processes):
    results = []
    for process in processes:
        out, err = process.communicate(timeout=120)
        results.append(Result(process.returncode, out, err))
    equal([result.code for result in results], [0] * len(results), results)
    return results


def start(nodes, node, command, **environment):
    return nodes.run(node, [str(word) for word in command], env={**os.environ, **environment},
                     stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_mpirun(folder):
    mpirun = shutil.which("mpirun")
    if mpirun is None:
        raise Skip("mpirun is not installed")
    with Nodes(2) as nodes, Sshd(nodes, folder) as ssh:
        for ranks, mode in ((1, "sum"), (1, "fast"), (2, "sum")):
            (result,) = results_of([start(nodes, 0, [
                mpirun, "--allow-run-as-root", "--oversubscribe", "-n", 2 * ranks, "--host",
                ",".join(f"{name}:{ranks}" for name in nodes.names), "--mca", "plm_rsh_agent",
                f"{folder}/bin/ssh", WORKER, mode], TMPDIR=folder, **ssh.environment)])
            total = sum(range(2 * ranks))
            equal(sums(result.out), [f"rank {rank} of {2 * ranks} by mpirun: sum {total}"
                                     for rank in range(2 * ranks)], result)
            chosen = re.search(r"all_reduce: \w+: .* ms expected, then .* us latency, ", result.err)
            equal(chosen is not None, mode == "fast", result)


def test_torchrun(folder):
    torchrun = shutil.which("torchrun", path=f"{ROOT}/.deps/bin:{os.environ['PATH']}")
    if torchrun is None or not os.path.exists(TORCHRUN_WORKER):
        raise Skip("torchrun is not installed")
    with Nodes(2) as nodes:
        results = results_of([start(nodes, node, [
            torchrun, "--nnodes=2", f"--node-rank={node}", "--master-addr=node0",
            "--master-port=29500", "--nproc-per-node=2", "--no-python", TORCHRUN_WORKER, "sum"],
            **DEVICES)
            for node in range(2)])
        equal(sums(results[0].out + results[1].out),
              [f"rank {rank} of 4 by torchrun: sum 6" for rank in range(4)], results)


def test_hostfile(folder):
    with Nodes(2) as nodes, Sshd(nodes, folder) as ssh:
        with open(f"{folder}/hosts", "w") as file:
            file.write("".join(f"{name}\n" for name in nodes.names))
        (result,) = results_of([start(nodes, 0, [
            LOCKSTEP, "run", "--hostfile", f"{folder}/hosts", "--nproc-per-node", 2, WORKER,
            "sum"], **ssh.environment)])
        equal(sums(result.out), [f"rank {rank} of 4 by lockstep run: sum 6" for rank in range(4)],
              result)


def test_an_encrypted_engine(folder):
    lockstep("key", f"{folder}/key")
    with Nodes(2) as nodes:
        results = results_of([start(nodes, node, [
            LOCKSTEP, "run", "--nnodes", 2, "--node-rank", node, "--rdzv-endpoint",
            f"{nodes.names[0]}:29400", "--key-file", f"{folder}/key", "--backend", "zmq", WORKER,
            "sum"]) for node in range(2)])
        equal(sums(results[0].out + results[1].out),
              [f"rank {rank} of 2 by lockstep run: sum 1" for rank in range(2)], results)


if __name__ == "__main__":
    main(globals())
