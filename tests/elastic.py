"""What the tests of recovery share: small jobs, the faults that strike them, and what must hold of
every run that survived: the bits of an undisturbed one, each step and sample counted once."""

import contextlib
import json
import os
import re
import signal
import subprocess
import threading
import time

from harness import LOCKSTEP, Result, equal, make_idx_folder, processes, report_of, run, train
from same_result_test import MLP, result

STEPS_PER_EPOCH = 5  # 150 samples in batches of 32


class Job:
    """A job of small steps in a folder, trained without a fault first."""

    def __init__(self, folder, epochs=4, text=MLP):
        self.folder = folder
        self.arguments = [f"{folder}/job.toml", "--data", make_idx_folder(f"{folder}/data"),
                          "--epochs", epochs]
        self.steps = epochs * STEPS_PER_EPOCH
        with open(f"{folder}/job.toml", "w") as file:
            file.write(text)
        self.whole = train(self.arguments[0], f"{folder}/whole", *self.arguments[1:],
                           "--workers", 2)
        self.runs = 0

    def command(self, *arguments, output=None):
        self.runs += 1
        self.output = output or f"{self.folder}/run-{self.runs}"
        return [str(word) for word in
                (LOCKSTEP, "train", *self.arguments, "--output", self.output, *arguments)]

    def survives(self, *faults, workers=3, deaths=None, arguments=()):
        """Trains with faults; the report, checked. Single ones must strike. `deaths`: so many
        recoveries it must tell of; default: one for each that struck."""
        injected = [word for fault in faults for word in ("--inject", fault)]
        done = run(*self.command("--workers", workers, "--max-restarts", 1000, *injected,
                                 *arguments),
                   env={"LOCKSTEP_TEST_MARK": self.output})
        struck = re.findall(r"injected: (.+)", done.out)
        timed = any(fault.startswith("kill every") for fault in faults)
        if not timed and not any(fault.startswith("random") for fault in faults):
            equal(len(struck), len(faults), f"faults that struck: {struck} in\n{done.out}")
        equal(processes(f"LOCKSTEP_TEST_MARK={self.output}"), [], "processes left behind")
        report = self.check(self.output)
        if not timed:
            equal(len(report["recoveries"]), len(struck) if deaths is None else deaths,
                  f"recoveries after {struck}: {report}")
        return report

    def check(self, output):
        report = report_of(output)
        equal(result(report), result(self.whole), "result")
        epochs, steps = metrics(output)
        equal(epochs, metrics(f"{self.folder}/whole")[0], "epochs, their steps and samples")
        equal(steps, sorted(set(steps)), "steps of metrics.jsonl")
        for recovery in report["recoveries"]:
            check_recovery(recovery)
        return report


def metrics(output):
    """What counts in metrics.jsonl: (epoch, step, samples) of each epoch, and the steps told of."""
    with open(f"{output}/metrics.jsonl") as file:
        lines = [json.loads(line) for line in file]
    return ([(line["epoch"], line["step"], line["samples"]) for line in lines
             if line["event"] == "epoch"],
            [line["step"] for line in lines if line["event"] == "step"])


def check_recovery(recovery):
    assert isinstance(recovery["rank"], int), recovery
    assert len(recovery["cause"]) > 5, recovery
    assert 0 < recovery["seconds"] < 60, recovery
    assert recovery["steps_redone"] in (0, 1), recovery
    assert recovery["source"] in ("segment", "peer", "checkpoint", "start"), recovery


class Running:
    """A program in the background whose output can be waited for."""

    def __init__(self, command, mark):
        self.mark = f"LOCKSTEP_TEST_MARK={mark}"
        self.lines, self.changed, self.ended = [], threading.Condition(), False
        self.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, env={**os.environ, "LOCKSTEP_TEST_MARK": mark}, start_new_session=True)
        self.reader = threading.Thread(target=self.read)
        self.reader.start()

    def read(self):
        for line in self.process.stdout:
            with self.changed:
                self.lines.append(line)
                self.changed.notify_all()
        with self.changed:
            self.ended = True
            self.changed.notify_all()

    def wait_for(self, text, count=1, timeout=60):
        """Until `count` lines hold `text`."""
        def seen():
            return sum(text in line for line in self.lines) >= count
        with self.changed:
            self.changed.wait_for(lambda: seen() or self.ended, timeout)
            assert seen(), f"no '{text}' in\n{''.join(self.lines)}"

    def kill(self, number):
        os.kill(self.process.pid, number)

    def end(self, code):
        status = self.process.wait(60)
        self.reader.join(60)
        done = Result(status, "".join(self.lines), "")
        assert status == code, f"expected {code}, {done}"
        return done

    def gone_within(self, seconds):
        deadline = time.monotonic() + seconds
        while left := processes(self.mark):
            assert time.monotonic() < deadline, f"left behind after {seconds} s: {left}"
            time.sleep(0.01)


@contextlib.contextmanager
def running(command, mark):
    program = Running(command, mark)
    try:
        yield program
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(program.process.pid, signal.SIGKILL)
        for pid in processes(program.mark):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        program.process.wait(60)
        program.reader.join(60)
