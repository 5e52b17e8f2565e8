"""Several nodes: agents that find each other through node 0, here all of them on this machine."""

import os
import re
import signal
import socket
import subprocess
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import nodes as network
from harness import BUILD, LOCKSTEP, contains, equal, lockstep, main, processes

TIMEOUT_S = 60

# Says what an elastic program says, and then what it reads from its node's pipe.
ELASTIC = r"""say() { printf "\\$(printf %03o ${#1})\0\0\0%s" "$1" > /dev/fd/$LOCKSTEP_EVENT_FD; }
say '{"event":"elastic"}'; say '{"event":"join"}'; echo up
exec 3<> FOLDER/pipe$GROUP_RANK
while read -r line <&3; do [ "$line" = end ] && exit 0; say "$line"; done"""


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


class Nodes:
    """`lockstep COMMAND` on each of several nodes; killed at the end."""

    def __init__(self, folder, nodes="2"):
        self.folder, self.nodes, self.port = folder, nodes, free_port()
        self.started = []
        if not os.path.exists(f"{folder}/key"):
            lockstep("key", f"{folder}/key")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for one in self.started:
            one.kill()
            one.communicate()

    def start(self, rank, *words, command="run", env=None):
        flags = ["--nnodes", self.nodes, "--node-rank", rank, "--rdzv-endpoint",
                 f"127.0.0.1:{self.port}", "--key-file", f"{self.folder}/key"]
        one = subprocess.Popen(
            [str(word) for word in (LOCKSTEP, command, *(flags if command == "run" else ()),
                                    *words)],
            text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL,
            env={**os.environ, **(env or {})})
        self.started.append(one)
        return one

    def run(self, *words, code=0):
        """The same on two nodes; their outputs."""
        both = [self.start(rank, *words) for rank in (0, 1)]
        return [end(one, code) for one in both]


def end(one, code=0):
    out, err = one.communicate(timeout=TIMEOUT_S)
    assert one.returncode == code, f"expected {code}, exit code {one.returncode}\n{out}\n{err}"
    return out, err


def read_until(stream, text):
    seen = ""
    for line in stream:
        seen += line
        if text in line:
            return line
    raise AssertionError(f"'{text}' never came:\n{seen}")


def test_torchruns_environment(folder):
    script = ("echo $RANK $WORLD_SIZE $LOCAL_RANK $LOCAL_WORLD_SIZE $GROUP_RANK $GROUP_WORLD_SIZE "
              "$MASTER_ADDR $TORCHELASTIC_RUN_ID port $MASTER_PORT")
    with Nodes(folder) as nodes:
        words = ("--rdzv-id", "seven", "--nproc-per-node")
        one = nodes.start(0, *words, 3, "sh", "-c", script)
        other = nodes.start(1, *words, 1, "sh", "-c", script)
        lines = (end(one)[0] + end(other)[0]).splitlines()
    ports = {line.split("port ")[1] for line in lines}
    equal(len(ports), 1, ports)
    equal(sorted(line.split(" port")[0] for line in lines),
          [f"[rank {rank}] {rank} 4 {local} {size} {group} 2 127.0.0.1 seven"
           for rank, local, size, group in
           ((0, 0, 3, 0), (1, 1, 3, 0), (2, 2, 3, 0), (3, 0, 1, 1))])


def test_groups_span_nodes(folder):
    worker = os.path.join(BUILD, "cluster_worker")
    with Nodes(folder) as nodes:
        one = nodes.start(0, "--nproc-per-node", 2, worker, "sum")
        other = nodes.start(1, "--nproc-per-node", 1, worker, "sum")
        lines = (end(one)[0] + end(other)[0]).splitlines()
    equal(sorted(lines), [f"[rank {rank}] rank {rank} of 3 by lockstep run: sum 3"
                          for rank in range(3)])


def test_a_failure_anywhere_ends_all_nodes(folder):
    with Nodes(folder) as nodes:
        script = "[ $RANK = 2 ] && { echo no good >&2; exit 3; }; exec sleep 1000"
        (_, here), (_, there) = nodes.run("--nproc-per-node", 2, "sh", "-c", script, code=1)
    assert re.search(r"rank 2 \(pid \d+ on node 1\): exited with code 3\n  no good", here), here
    contains(there, "exited with code 3", "no good")


def test_all_are_started_again(folder):
    with Nodes(folder) as nodes:
        script = ("[ $RANK$TORCHELASTIC_RESTART_COUNT = 10 ] && exit 3; "
                  "[ $TORCHELASTIC_RESTART_COUNT = 1 ] || exec sleep 1000")
        (_, here), _ = nodes.run("--max-restarts", 1, "sh", "-c", script)
    contains(here, "on node 1): exited with code 3; all workers are started again (1 of 1)")


def test_what_must_be_the_same_is_compared(folder):
    with Nodes(folder) as nodes:
        one = nodes.start(0, "sh", "-c", "echo one")
        out, err = end(nodes.start(1, "sh", "-c", "echo two"), 2)
        contains(err, "another program than node 0: sh -c echo two there, sh -c echo one here")
        contains(read_until(one.stderr, "another program"), "node 1")
        end(nodes.start(1, "sh", "-c", "echo one"))
        end(one)


def test_another_key_is_refused(folder):
    with Nodes(folder) as nodes:
        nodes.start(0, "true")
        lockstep("key", f"{folder}/other")
        nodes.folder = folder
        os.rename(f"{folder}/other", f"{folder}/key")
        contains(end(nodes.start(1, "true"), 1)[1], "another job's")


def test_the_end_of_node_0_ends_the_others(folder):
    mark = f"{folder}/mark"
    with Nodes(folder) as nodes:
        script = "echo here; exec sleep 1000"
        one = nodes.start(0, "sh", "-c", script)
        other = nodes.start(1, "sh", "-c", script, env={"LOCKSTEP_TEST_MARK": mark})
        read_until(one.stdout, "here")
        read_until(other.stdout, "here")
        one.send_signal(signal.SIGKILL)
        contains(end(other, 1)[1], "no word from node 0", "nobody listens at tcp://127.0.0.1")
    equal(processes(f"LOCKSTEP_TEST_MARK={mark}"), [], "processes left behind")


def test_a_killed_node_ends_a_program_that_cannot_go_on(folder):
    with Nodes(folder) as nodes:
        script = "echo here; exec sleep 1000"
        one, other = (nodes.start(rank, "sh", "-c", script) for rank in (0, 1))
        read_until(other.stdout, "here")
        other.send_signal(signal.SIGKILL)
        contains(end(one, 1)[1], "lost: the connection to node 1 (", "has ended")


def test_a_signal_to_any_node_ends_the_job(folder):
    for rank in (0, 1):
        with Nodes(folder) as nodes:
            both = [nodes.start(each, "sh", "-c", "echo here; exec sleep 1000") for each in (0, 1)]
            for one in both:
                read_until(one.stdout, "here")
            both[rank].send_signal(signal.SIGINT)
            end(both[rank], 128 + signal.SIGINT)
            end(both[1 - rank], 1)


class Elastic:
    """Two nodes with a worker each, of which one is enough; node 1 may be lost and come back."""

    def __init__(self, folder, start):
        self.folder, self.start_node = folder, start
        for rank in (0, 1):
            os.mkfifo(f"{folder}/pipe{rank}")
        self.one, self.other = (self.start(rank) for rank in (0, 1))
        for one in (self.one, self.other):
            read_until(one.stdout, "up")
        deadline = time.monotonic() + TIMEOUT_S
        while "2 workers begin" not in self.status():
            assert time.monotonic() < deadline, self.status()
        self.say(0, '{"event":"first_step","rank":0,"clock":1}')

    def start(self, rank):
        return self.start_node(rank, "--max-restarts", 3, "--hang-timeout", 0, "sh", "-c",
                               ELASTIC.replace("FOLDER", self.folder))

    def status(self):
        asked = self.start_node(0, f"run-{self.one.pid}", command="status")
        return asked.communicate(timeout=TIMEOUT_S)[0]

    def say(self, rank, text):
        with open(f"{self.folder}/pipe{rank}", "w") as pipe:
            pipe.write(text + "\n")

    def recovered(self, generation):
        self.say(0, '{"event":"recovered","generation":%d,"step":%d,"steps_redone":1,'
                    '"source":"peer","clock":1}' % (generation, generation + 1))

    def end(self):
        contains(read_until(self.one.stderr, "joins"),
                 "1 worker joins at the end of a step: going on with 2 workers")
        self.recovered(2)
        for rank in (0, 1):
            self.say(rank, "end")
        end(self.one)
        return end(self.other)[1]


def test_a_killed_node_is_gone_on_without_and_comes_back(folder):
    with Nodes(folder, "1:2") as nodes:
        job = Elastic(folder, nodes.start)
        job.other.send_signal(signal.SIGKILL)
        contains(read_until(job.one.stderr, "going on with 1 worker"),
                 "lost: the connection to node 1 (")
        job.recovered(1)
        job.other = job.start(1)
        job.end()


def test_a_node_that_is_cut_off_ends_its_workers_and_comes_back(folder):
    with network.Nodes(2) as machines:
        lockstep("key", f"{folder}/key")

        def start(rank, *words, command="run"):
            flags = ["--nnodes", "1:2", "--node-rank", rank, "--rdzv-endpoint",
                     f"{machines.addresses[0]}:29400", "--key-file", f"{folder}/key"]
            return machines.run(
                rank, [LOCKSTEP, command, *(flags if command == "run" else ()), *words], text=True,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        job = Elastic(folder, start)
        machines.cut(1)
        contains(read_until(job.one.stderr, "going on with 1 worker"),
                 "lost: node 1 (node1) is silent for 1.5 s")
        read_until(job.other.stderr, "no word from node 0: this node's workers are ended")
        job.recovered(1)
        machines.heal(1)
        job.end()


def test_hosts_are_reached_over_ssh(folder):
    with open(f"{folder}/hosts", "w") as file:
        file.write("127.0.0.1 slots=1\n# the same\n\n127.0.0.1\n")
    with open(f"{folder}/ssh", "w") as file:
        file.write(f'#!/bin/sh\necho "$1 $2" >> {folder}/log\nexec sh -c "$2"\n')
    os.chmod(f"{folder}/ssh", 0o700)
    flags = ("--hostfile", f"{folder}/hosts", f"--ssh={folder}/ssh", "--rdzv-endpoint")
    result = lockstep("run", *flags, f"127.0.0.1:{free_port()}", "sh", "-c",
                      "echo it\\'s $RANK of $WORLD_SIZE")
    equal(sorted(result.out.splitlines()), [f"[rank {rank}] it's {rank} of 2" for rank in (0, 1)])
    with open(f"{folder}/log") as file:
        text = file.read()
    contains(text, "--key-file=-", "--node-rank=1")
    assert "secret" not in text, text
    result = lockstep("run", *flags, f"127.0.0.1:{free_port()}",
                      "sh", "-c", "exit $((RANK * 3))", code=1)
    contains(result.err, "rank 1", "exited with code 3")


def test_bad_flags(folder):
    del folder
    for words, says in (
            (["--nnodes", "0"], ["--nnodes 0"]),
            (["--nnodes", "2"], ["--nnodes 2 needs --node-rank"]),
            (["--nnodes", "2", "--node-rank", "2"], ["--node-rank 2", "0 to 1"]),
            (["--node-rank", "1"], ["--node-rank 1", "one node"]),
            (["--nnodes", "2", "--node-rank", "1"], ["needs --rdzv-endpoint"]),
            (["--nnodes", "2", "--node-rank", "0", "--rdzv-endpoint", "x:1"],
             ["needs --key-file"])):
        contains(lockstep("run", *words, "true", code=2).err, *says)


if __name__ == "__main__":
    main(globals())
