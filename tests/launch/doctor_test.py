"""lockstep doctor: what it says of this machine, and of the limits that it is started with."""

import json
import os
import subprocess
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from harness import (LOCKSTEP, Result, Skip, contains, equal, lockstep, main, run,
                     sanitized)
from nodes import Nodes


def findings(*words, code=0, **options):
    """{subject: finding} of `lockstep doctor --json`, started by `words`."""
    report = json.loads(run(*words, LOCKSTEP, "doctor", "--json", code=code, **options).out)
    found = {one["subject"]: one for one in report["nodes"][0]["findings"]}
    for one in found.values():
        assert one["text"] and (one["hint"] or one["verdict"] == "ok"), one
    return found


def test_this_machine(folder):
    found = findings(code=None)
    contains(found["versions"]["text"], lockstep("--version").out.strip())
    cores = len(os.sched_getaffinity(0))
    contains(found["processor"]["text"], f" {cores} of {os.cpu_count()} cores")
    result = lockstep("doctor", code=None)
    for subject, one in found.items():
        contains(result.out, f"{one['verdict']:<8} {subject:<14} ")


def test_limits_are_findings(folder):
    found = findings("sh", "-c", 'ulimit -n 64; exec "$@"', "sh", code=None)
    equal(found["open files"], {"verdict": "warning", "subject": "open files", "text": "64",
                                "hint": "ulimit -n 4096"})
    contains(findings(code=None, env={"MKL_CBWR": "AVX2"})["exactness"]["text"], "MKL_CBWR=AVX2")
    if not sanitized():  # which need more address space
        found = findings("sh", "-c", 'ulimit -v 400000; exec "$@"', "sh", code=1)
        equal(found["shared memory"]["verdict"], "error")
        contains(found["shared memory"]["text"], "cannot be made", "RLIMIT_AS")


def across(nodes, folder, *flags, keys=None, environments=({}, {})):
    """`lockstep doctor` on two nodes; their results."""
    key = f"{folder}/key"
    if not os.path.exists(key):
        lockstep("key", key)
    started = [nodes.run(node, [LOCKSTEP, "doctor", "--nnodes", 2, "--node-rank", node,
                                "--rdzv-endpoint", "node0:29400", "--key-file",
                                keys[node] if keys else key, *flags],
                         env={**os.environ, **environments[node]}, stdout=subprocess.PIPE,
                         stderr=subprocess.PIPE, text=True) for node in range(2)]
    results = []
    for process in started:
        out, err = process.communicate(timeout=120)
        results.append(Result(process.returncode, out, err))
    return results


def test_two_nodes_and_the_slow_link_between_them(folder):
    here = findings(code=None)
    backends = [engine for engine in ("ucx", "zmq") if here[engine]["text"] == "found"]
    if not backends:
        raise Skip("this build has no engine")
    with Nodes(2, rate="100mbit") as nodes:
        for backend in backends:
            first, second = across(nodes, folder, "--json", "--backend", backend)
            equal((first.code, second.code, second.out), (0, 0, ""), (first, second))
            report = json.loads(first.out)
            equal([node["host"] for node in report["nodes"]], ["node0", "node1"])
            equal([node["engine"] for node in report["nodes"]], [backend, backend])
            (link,) = report["links"]
            equal((link["from"], link["to"], link["failure"]), (0, 1, ""))
            for name in ("there_bytes_per_s", "back_bytes_per_s"):
                assert 0 < link[name] < 15e6, link  # 100 Mbit/s are 12.5 MB/s
            assert link["latency_s"] > 0, link
            found = {one["subject"]: one for one in report["findings"]}
            equal({subject: one["verdict"] for subject, one in found.items()},
                  {"exactness": "ok", "clock skew": "ok", "links": "warning"})
        first = across(nodes, folder)[0]
        contains(first.out, "node 0: node0\n", "node 1: node1, where", "all 2 nodes\n",
                 "latency, µs", "bandwidth, MB/s", f"eth0 {nodes.addresses[1]}",
                 f"engine         {backends[0]}: ")


def test_nodes_that_cannot_work_together(folder):
    with Nodes(2) as nodes:
        for result in across(nodes, folder, environments=({}, {"MKL_CBWR": "AVX2"})):
            equal(result.code, 1, result)
        lockstep("key", f"{folder}/other")
        results = across(nodes, folder, "--timeout", 2, keys=(f"{folder}/key", f"{folder}/other"))
        equal([result.code for result in results], [1, 1], results)
        contains(results[0].err, "node 1 did not come to node0:29400 within 2 s")
        nodes.cut(1)
        contains(across(nodes, folder, "--timeout", 1)[1].err, "node0:29400 in time")


def test_bad_flags(folder):
    contains(lockstep("doctor", "--nnodes", 2, code=2).err, "--nnodes 2 needs --node-rank")
    contains(lockstep("doctor", "--node-rank", 1, code=2).err, "this job has one node")
    contains(lockstep("doctor", "--jso", code=2).err, "unknown flag --jso; hint: did you mean")
    contains(lockstep("doctor", "here", code=2).err, "unexpected argument here")


if __name__ == "__main__":
    main(globals())
