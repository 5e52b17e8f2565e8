"""The conformance suites of transports and groups between nodes (network namespaces): every rank
compares what it has with what one process computes, bit for bit."""

import os
import tempfile

from harness import BUILD, main
from nodes import Nodes

SUITE = "*/Nodes"
NOT_LARGE = f"{SUITE}-Exchange*SeveralChunks/Nodes"  # seconds of computing what is right
FEW = ":".join(f"*.{name}/Nodes" for name in (
    "AllReduce", "AllToAllAndUnevenAllGather", "SubGroups",
    "TreeAllReduceGivesTheSameBitsForEveryNumberOfWorkers", "WrongArgumentsAreRefused"))
LARGE = "*.SeveralChunks/Nodes"


def check(folder, engine, ranks, tests=SUITE, rate=None, program="collective_test"):
    """ranks: of each node."""
    sizes = ",".join(map(str, ranks))
    with Nodes(len(ranks), rate) as nodes:
        place = tempfile.mkdtemp(dir=folder)
        nodes.run_all([["env", f"LOCKSTEP_TEST_NODES={engine} {sizes} {node} {place}",
                        os.path.join(BUILD, program), "--gtest_brief=1",
                        f"--gtest_filter={tests}"] for node in range(len(ranks))], 120)


def test_transports(folder):
    for engine in ("ucx", "zmq"):
        check(folder, engine, (2, 2, 1), program="transport_test")


def test_remote_groups(folder):
    check(folder, "ucx", (1, 1, 1, 1), NOT_LARGE)
    check(folder, "zmq", (1, 1), NOT_LARGE)


def test_hierarchical_groups(folder):
    check(folder, "ucx", (2, 2))
    check(folder, "zmq", (2, 1), NOT_LARGE)


def test_slow_links(folder):
    check(folder, "ucx", (1, 1), LARGE, "1gbit")
    check(folder, "zmq", (2, 2), FEW, "1gbit")
    check(folder, "zmq", (1, 1, 1, 1), FEW, "100mbit")
    check(folder, "ucx", (2, 2), FEW, "100mbit")


if __name__ == "__main__":
    main(globals())
