"""The nodes that other tests are made of: names, addresses, rates, cuts, and what is left."""

import os
import signal
import socket
import subprocess
import sys

from harness import Skip, contains, equal, main
from nodes import HOSTS, Failed, Nodes, unavailable

HERE = os.path.dirname(os.path.abspath(__file__))
# Sends itself to whoever comes; without an argument: takes it from node0 and prints what came when.
TALK = r"""
import socket, sys, time
if sys.argv[1] == "serve":
    with socket.create_server(("node0", 4711)) as server:
        print("ready", flush=True)
        while True:
            there, who = server.accept()
            there.sendall(who[0].encode() + b" " * int(sys.argv[2]))
            there.close()
with socket.create_connection(("node0", 4711), timeout=float(sys.argv[2])) as here:
    begin, text = time.monotonic(), b""
    while part := here.recv(1 << 20):
        text += part
print(text.decode().strip(), len(text) / (time.monotonic() - begin), socket.gethostname())
"""


def serve(nodes, extra_bytes=0):
    server = nodes.run(0, [sys.executable, "-c", TALK, "serve", extra_bytes],
                       stdout=subprocess.PIPE, text=True)
    equal(server.stdout.readline(), "ready\n", "the server's line")
    return server


def ask(nodes, node, timeout_s=20):
    asker = nodes.run(node, [sys.executable, "-c", TALK, "ask", timeout_s],
                      stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    out, err = asker.communicate(timeout=60)
    return asker.returncode, out.split(), err


def traces(pid):
    return [name for folder in ("/run/netns", HOSTS) if os.path.isdir(folder)
            for name in os.listdir(folder) if name.startswith(f"lockstep-{pid}-")]


def test_names_addresses_and_two_sets_at_once(_):
    with Nodes(3) as nodes, Nodes(2) as others:
        for each in (nodes, others):
            serve(each)
            for node in range(1, each.count):
                code, out, err = ask(each, node)
                equal(code, 0, err)
                equal((out[0], out[2]), (each.addresses[node], f"node{node}"), "who asked")
        there = nodes.run(1, ["ls", "/sys/class/net"], stdout=subprocess.PIPE, text=True)
        equal(there.communicate()[0].split(), ["eth0", "lo"], "interfaces")
        equal(socket.gethostname().startswith("node1"), False, "this machine's own name")
    equal(traces(os.getpid()), [], "left")


def test_rate_is_kept(_):
    with Nodes(2, rate="100mbit") as nodes:
        serve(nodes, 2_000_000)
        code, out, err = ask(nodes, 1)
        equal(code, 0, err)
        assert float(out[1]) < 100e6 / 8 * 1.06, out  # it may be 64 KB ahead


def test_a_cable_pulled_and_put_back(_):
    with Nodes(3) as nodes:
        serve(nodes)
        nodes.cut(1)
        code, _, err = ask(nodes, 1, timeout_s=0.5)
        equal(code, 1, err)
        assert "timed out" in err or "unreachable" in err or "No route" in err, err
        equal(ask(nodes, 2)[0], 0, "the other node")
        nodes.heal(1)
        equal(ask(nodes, 1)[0], 0, "after it was put back")


def test_programs_on_all_nodes_to_their_end(_):
    def failure(*commands, timeout_s=20):
        try:
            nodes.run_all(commands, timeout_s)
        except Failed as error:
            return str(error)
        raise AssertionError(f"{commands} did not fail")

    with Nodes(2) as nodes:
        equal(nodes.run_all([["hostname"], ["hostname"]], 20), "node0\n", "the first one's words")
        contains(failure(["true"], ["sh", "-c", "echo broken >&2; exit 3"]), "[0, 3]", "broken")
        contains(failure(["true"], ["sh", "-c", "sleep 1000 & wait"], timeout_s=0.2), "not done")
        equal(nodes.run_all([["ip", "-o", "link"]] * 2, 20).count("eth0"), 1, "afterwards")


def test_a_node_killed_with_all_its_processes(_):
    with Nodes(2) as nodes:
        first, other = serve(nodes), nodes.run(1, ["sleep", "1000"])
        both = nodes.run(0, ["sh", "-c", "sleep 1000 & echo started; wait"],
                         stdout=subprocess.PIPE, text=True)
        equal(both.stdout.readline(), "started\n", "the line of two processes")
        nodes.kill(0)
        equal([first.wait(20), both.wait(20)], [-signal.SIGKILL] * 2, "ends")
        equal(both.stdout.read(), "", "until the last process there is gone")
        equal(other.poll(), None, "the other node's")
    equal(other.returncode, -signal.SIGKILL, "its end, with the nodes")


def test_what_a_killed_test_left_is_removed_by_the_next(_):
    why = unavailable()
    if why:
        raise Skip(why)
    script = ("import sys, time; sys.path.insert(0, sys.argv[1]); from nodes import Nodes\n"
              "nodes = Nodes(2).__enter__(); nodes.run(1, ['sleep', '1000'])\n"
              "nodes.run(0, ['sh', '-c', 'echo running; exec sleep 1000']); time.sleep(1000)")
    killed = subprocess.Popen([sys.executable, "-c", script, HERE], stdout=subprocess.PIPE,
                              text=True)
    equal(killed.stdout.readline(), "running\n", "the line from a node")
    killed.kill()
    killed.wait()
    assert traces(killed.pid), "nothing was left"
    with Nodes(1):
        equal(traces(killed.pid), [], "left after the next")
    equal(killed.stdout.read(), "", "until the last process of the killed one is gone")


def test_without_the_rights(_):
    asked = subprocess.run([sys.executable, "-c", "import sys; sys.path.insert(0, sys.argv[1])\n"
                            "import os; from nodes import unavailable\n"
                            "os.geteuid() or os.setuid(65534); print(unavailable())", HERE],
                           capture_output=True, text=True)
    contains(asked.stdout + asked.stderr, "only root")


if __name__ == "__main__":
    main(globals())
