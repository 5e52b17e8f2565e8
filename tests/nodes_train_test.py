"""lockstep train on several nodes (network namespaces): the same bits as on one, also where a node
is killed or cut off."""

import contextlib
import os
import signal
import subprocess
import threading

from elastic import Job
from harness import LOCKSTEP, contains, equal, lockstep, main, report_of
from nodes import Nodes

PORT = 29400


class Node:
    """lockstep train on one node; its output can be waited for."""

    def __init__(self, nodes, rank, command):
        self.command, self.lines, self.changed = command, [], threading.Condition()
        self.process = nodes.run(rank, command, env={**os.environ, "OMP_NUM_THREADS": "1"},
                                 stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.reader = threading.Thread(target=self.read)
        self.reader.start()

    def read(self):
        for line in self.process.stdout:
            with self.changed:
                self.lines.append(line)
                self.changed.notify_all()

    def wait_for(self, text):
        with self.changed:
            seen = self.changed.wait_for(lambda: any(text in line for line in self.lines), 60)
            assert seen, f"no '{text}' in\n{''.join(self.lines)}"

    def end(self, code=0):
        status = self.process.wait(90)
        self.reader.join(60)
        assert code is None or status == code, f"exit code {status}\n{''.join(self.lines)}"
        return "".join(self.lines)


@contextlib.contextmanager
def training(folder, job, number, count, *arguments, output=None, late=0):
    """The nodes, and what runs on each but the last `late` ones."""
    key = f"{folder}/key"
    if not os.path.exists(key):
        lockstep("key", key)
    with Nodes(number) as nodes:
        command = job.command("--nnodes", count, "--rdzv-endpoint", f"{nodes.names[0]}:{PORT}",
                              "--key-file", key, *arguments, output=output)
        assert command[0] == LOCKSTEP
        yield nodes, [Node(nodes, rank, [*command, "--node-rank", str(rank)])
                      for rank in range(number - late)]


def test_the_bits_of_one_node(folder):
    job = Job(folder)
    for workers in (1, 2):
        with training(folder, job, 2, 2, "--workers", workers) as (_, running):
            for node in running:
                node.end()
        equal(job.check(job.output)["recoveries"], [])


def delays(first, last):
    return [word for step in range(first, last)
            for word in ("--inject", f"delay rank=0 step={step} seconds=150ms")]


def test_gradients_in_fewer_bytes(folder):
    job = Job(folder)
    found = []
    for _ in range(2):
        with training(folder, job, 2, 2, "--workers", 1, "--set", "train.wire_format=int8",
                      "--set", "train.max_steps=15") as (_, running):
            out = [node.end() for node in running][0]
        contains(out, "gradients travel between nodes as int8", "hidden")
        report = report_of(job.output)
        found.append(report["weights_sha256"])
        for rank in report["ranks"]:
            assert rank["exposed_s"] > 0 and rank["hidden_s"] >= 0, rank
    equal(found[0], found[1], "the bits of two runs")
    assert found[0] != job.whole["weights_sha256"], "nothing was rounded"


def test_a_node_that_is_killed(folder):
    job = Job(folder, epochs=20)
    with training(folder, job, 2, "1:2", "--workers", 1, "--inject",
                  "delay rank=0 step=30 seconds=1s") as (nodes, running):
        running[0].wait_for("injected: delay")
        nodes.kill(1)
        out = running[0].end()
        running[1].end(None)
    contains(out, "lost: ", "node 1")
    report = job.check(job.output)
    equal(len(report["recoveries"]), 1)
    assert report["recoveries"][0]["seconds"] < 3, report["recoveries"]


def test_a_node_that_is_killed_and_returns(folder):
    job = Job(folder, epochs=20)
    with training(folder, job, 2, "1:2", "--workers", 1, "--auto-resume",
                  *delays(30, 90)) as (nodes, running):
        running[0].wait_for("injected: delay")
        nodes.kill(1)
        running[0].wait_for("going on with 1 worker")
        running.append(Node(nodes, 1, running[1].command))
        running[0].wait_for("joins at the end of a step: going on with 2 workers")
        for node, code in zip(running, (0, None, 0)):
            node.end(code)
    report = job.check(job.output)
    assert report["recoveries"][0]["seconds"] < 3, report["recoveries"]


def test_a_node_that_comes_late(folder):
    job = Job(folder, epochs=20)
    with training(folder, job, 2, "1:2", "--workers", 1, *delays(10, 100), late=1) as (nodes,
                                                                                      running):
        running[0].wait_for("injected: delay")
        running.append(Node(nodes, 1, [*running[0].command[:-1], "1"]))
        running[0].wait_for("joins at the end of a step: going on with 2 workers")
        for node in running:
            node.end()
    job.check(job.output)


def test_a_node_that_is_cut_off_and_returns(folder):
    job = Job(folder, epochs=20)
    slow = delays(30, 100)  # or it would be over before the node is back
    with training(folder, job, 2, "1:2", "--workers", 1, *slow) as (nodes, running):
        running[0].wait_for("injected: delay")
        nodes.cut(1)
        running[0].wait_for("is silent for 1.5 s: going on with 1 worker")
        running[1].wait_for("no word from node 0")
        nodes.heal(1)
        running[0].wait_for("joins at the end of a step: going on with 2 workers")
        for node in running:
            node.end()
    report = job.check(job.output)
    assert report["recoveries"][0]["seconds"] < 5, report["recoveries"]


def test_a_fault_strikes_once_whichever_node_its_rank_is_on(folder):
    job = Job(folder, epochs=20)
    with training(folder, job, 2, "1:2", "--workers", 1, "--inject", "kill rank=0 step=30",
                  "--inject", "kill rank=0 step=60") as (_, running):
        out = running[0].end()
        running[1].end()
    equal(out.count("injected: kill rank=0 step=30"), 1, out)
    equal(out.count("injected: kill rank=0 step=60"), 1, out)
    equal(len(job.check(job.output)["recoveries"]), 2)


def test_a_signal_to_another_node(folder):
    job = Job(folder)
    for number, args, codes, words in (
            (signal.SIGTERM, (), (75, 75), "node 1 was sent SIGTERM: all nodes finish the step"),
            (signal.SIGINT, (), (1, 130), "node 1 was ended by SIGINT: the job ends, which needs"),
            (signal.SIGTERM, [word for setting in ("strategy=data_parallel", "accumulate=1",
                                                   "virtual_ranks=2")
                              for word in ("--set", "train." + setting)], (1, 143),
             "node 1 was ended by SIGTERM: the job ends, which needs")):
        with training(folder, job, 2, 2, "--workers", 1, "--epochs", 1000, *args) as (_, running):
            running[0].wait_for("samples")
            running[1].process.send_signal(number)
            for node, code in zip(running, codes):
                contains(node.end(code), words)


def test_nodes_that_are_all_killed_and_started_again(folder):
    """As Kubernetes starts pods again: by the command lines of the first time."""
    job, run = Job(folder, epochs=20), f"{folder}/run"
    words = ("--workers", 1, "--set", "checkpoint.every_epochs=1", "--auto-resume")
    with training(folder, job, 2, 2, *words, "--inject", "delay rank=0 step=42 seconds=60s",
                  output=run) as (nodes, running):
        running[0].wait_for("injected: delay")
        for node in range(2):
            nodes.kill(node)
        for node in running:
            node.end(None)
    with training(folder, job, 2, 2, *words, output=run) as (_, running):
        running[0].wait_for("going on from step ")
        for node in running:
            node.end()
    assert job.check(run)["resumed_step"] > 0
    with training(folder, job, 2, 2, *words, output=run) as (_, running):
        for node in running:
            contains(node.end(), "is finished: 20 epochs")


if __name__ == "__main__":
    main(globals())
