"""Training across nodes: the recipe `gpt` on 2 network namespaces of this machine with one worker
each, lockstep against PyTorch's DistributedDataParallel over Gloo, in turns in one session.

At 1 Gbit/s, with the batch at which computing takes as long as communicating: a step beside the
longer of computing, and of the forward pass and communicating, each measured alone. At 100 Mbit/s,
with the same batch: gradients in int8, and DiLoCo with a meeting every 50 steps and its changes in
int8, beside DDP with the best of its settings. Test losses, which no link changes, come from as
many steps on links without a limit.

  ./dev bench nodes-training [--rounds 5] [--loss-steps 600] [--json FILE]     (as root)"""

import argparse
import itertools
import json
import os
import signal
import statistics
import sys
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
BUILD = os.environ.get("LOCKSTEP_BUILD", os.path.join(os.path.dirname(HERE), "build"))
sys.path.insert(0, os.path.join(os.path.dirname(HERE), "tests"))
from harness import Skip
from nodes import Nodes

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0"}
TIMEOUT_S = 300
# The first 10 are not timed; DiLoCo's hold two meetings.
STEPS, STEPS_OF_DDP, STEPS_OF_DILOCO = 60, 40, 110
DDP_WAYS = {"best, buckets of 25 MB": ["--ways", "best"],
            "best, buckets of 1 MB": ["--ways", "best", "--bucket-mb", "1"],
            "best, buckets of 0.25 MB": ["--ways", "best", "--bucket-mb", "0.25"],
            "defaults": ["--ways", "defaults"]}
OVERLAP, INT8, INT8_LOSS, DILOCO = 1 / 1.1, 3.5, 1.01, 10  # to reach


class Runs:
    def __init__(self, folder, rate):
        self.nodes, self.folder, self.meetings = Nodes(2, rate=rate), folder, itertools.count()
        self.name = rate or "no limit"

    def __enter__(self):
        self.nodes.__enter__()
        return self

    def __exit__(self, *_):
        self.nodes.close()

    def line(self, command):
        """What command(rank, meeting), run on each node, printed on rank 0."""
        meeting = f"{self.folder}/{self.name}-{next(self.meetings)}"
        out = self.nodes.run_all([command(rank, meeting) for rank in range(2)], TIMEOUT_S,
                                 env=ENVIRONMENT)
        return json.loads(next(line for line in out.split("\n") if line.startswith("{")))

    def lockstep(self, way, batch, steps):
        def command(rank, meeting):
            os.makedirs(meeting, exist_ok=True)
            return ["env", f"RANK={rank}", "WORLD_SIZE=2", "LOCAL_RANK=0", "LOCAL_WORLD_SIZE=1",
                    f"GROUP_RANK={rank}", "GROUP_WORLD_SIZE=2",
                    f"MASTER_ADDR={self.nodes.addresses[0]}", "MASTER_PORT=4713",
                    f"{BUILD}/bench_gpt", way, batch, steps, meeting]
        return self.line(command)

    def ddp(self, way, batch, steps):
        return self.line(lambda rank, meeting: [
            sys.executable, f"{HERE}/nodes/ddp_gpt.py", rank, 2, meeting, "--batch", batch,
            "--steps", steps, *DDP_WAYS[way]])

    def step_ms(self, way, batch):
        return 1e3 * self.lockstep(way, batch, STEPS)["step_s"]


def balanced_batch(runs):
    """The one at which computing takes as long as communicating, as nearly as there is one."""
    communicate = runs.step_ms("communicate", 2)
    compute = {}
    for batch in range(2, 65, 2):
        compute[batch] = runs.step_ms("compute", batch)
        if compute[batch] >= communicate:
            break
    print(f"{runs.name}: communicating {communicate:.1f} ms; computing: " + ", ".join(
        f"{batch} samples {ms:.1f} ms" for batch, ms in compute.items()), flush=True)
    return min(compute, key=lambda batch: abs(compute[batch] - communicate))


def overlap_rows(runs, batch, rounds):
    found = []
    for number in range(rounds):
        ms = {way: runs.step_ms(way, batch) for way in ("compute", "forward", "communicate",
                                                        "fp32")}
        ms["bound"] = max(ms["compute"], ms["forward"] + ms["communicate"])
        found.append(ms)
        print(f"{runs.name}, round {number + 1} of {rounds}: " + ", ".join(
            f"{way} {value:.1f} ms" for way, value in ms.items()), flush=True)
    return [row("1 Gbit/s: a step", found, "fp32", "bound", "ms", OVERLAP, inverse=True)]


def slow_link_rows(runs, batch, rounds):
    tried = {way: 1e3 * runs.ddp(way, batch, STEPS_OF_DDP)["step_s"] for way in DDP_WAYS}
    best = min(tried, key=tried.get)
    print("DDP: " + ", ".join(f"{way} {ms:.1f} ms" for way, ms in tried.items()), flush=True)
    found = []
    for number in range(rounds):
        found.append({
            "ddp": runs.ddp(best, batch, STEPS_OF_DDP),
            "int8": runs.lockstep("int8", batch, STEPS),
            "diloco": runs.lockstep("diloco-int8", batch, STEPS_OF_DILOCO)})
        print(f"{runs.name}, round {number + 1} of {rounds}: " + ", ".join(
            f"{way} {1e3 * one['step_s']:.1f} ms, {one['samples_per_s']:.1f} samples/s"
            for way, one in found[-1].items()),
            flush=True)

    def rates(value):
        return [{way: value(one) for way, one in of_round.items()} for of_round in found]

    return [row("100 Mbit/s: int8", rates(lambda one: 1 / one["step_s"]), "int8", "ddp", "steps/s",
                INT8),
            row("100 Mbit/s: DiLoCo", rates(lambda one: one["samples_per_s"]), "diloco", "ddp",
                "samples/s", DILOCO)]


def loss_rows(runs, batch, steps):
    losses = {way: runs.lockstep(way, batch, steps)["test_loss"]
              for way in ("fp32", "int8", "diloco-int8")}
    losses["ddp"] = runs.ddp("defaults", batch, steps)["test_loss"]
    text = f"test loss, {steps} steps"
    return [row(f"{text}: int8", [losses], "int8", "fp32", "nats/byte", INT8_LOSS, at_most=True),
            row(f"{text}: DiLoCo", [losses], "diloco-int8", "fp32", "nats/byte"),
            row(f"{text}: exact", [losses], "fp32", "ddp", "nats/byte")]


def row(case, rounds, own, against, unit, target=None, at_most=False, inverse=False):
    ratios = [one[against] / one[own] if inverse else one[own] / one[against] for one in rounds]
    ratio = statistics.median(ratios)
    return {"case": case, "against": {"bound": "its longest part", "fp32": "exact",
                                      "ddp": "DDP over Gloo"}[against], "unit": unit,
            "lockstep": statistics.median(one[own] for one in rounds),
            "peer": statistics.median(one[against] for one in rounds), "ratio": ratio,
            "least": min(ratios), "most": max(ratios), "target": target, "at_most": at_most,
            "reached": None if target is None else
            ratio <= target if at_most else ratio >= target}


def print_table(rows):
    print(f"\n{'case':<32} {'against':<17} {'unit':<10} {'lockstep':>9} {'peer':>9} {'ratio':>7} "
          f"{'least':>7} {'most':>7}  to reach")
    for one in rows:
        verdict = "" if one["target"] is None else (
            f"{'<=' if one['at_most'] else '>='} {one['target']:.2f} "
            f"{'reached' if one['reached'] else 'NOT REACHED'}")
        print(f"{one['case']:<32} {one['against']:<17} {one['unit']:<10} {one['lockstep']:>9.3f} "
              f"{one['peer']:>9.3f} {one['ratio']:>7.3f} {one['least']:>7.3f} {one['most']:>7.3f}"
              f"  {verdict}")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--loss-steps", type=int, default=600, help="0: no losses")
    parser.add_argument("--batch", type=int, help="default: where computing takes as long as "
                                                  "communicating at 1 Gbit/s")
    parser.add_argument("--json", default=os.path.join(BUILD, "bench-nodes-training.json"))
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception: children end, too
    try:
        with tempfile.TemporaryDirectory(prefix="lockstep-bench-") as folder:
            with Runs(folder, "1gbit") as runs:
                batch = options.batch or balanced_batch(runs)
                rows = overlap_rows(runs, batch, options.rounds)
            with Runs(folder, "100mbit") as runs:
                rows += slow_link_rows(runs, batch, options.rounds)
            if options.loss_steps:
                with Runs(folder, None) as runs:
                    rows += loss_rows(runs, batch, options.loss_steps)
    except Skip as why:
        sys.exit(f"no nodes to measure on: {why}")
    print_table(rows)
    print(f"batch: {batch} samples of 128 bytes on both nodes together")
    with open(options.json, "w") as file:
        json.dump({"rows": rows, "batch": batch, "rounds": options.rounds,
                   "loss_steps": options.loss_steps, "cores": len(os.sched_getaffinity(0))}, file,
                  indent=1)
    print(f"all of it: {options.json}")


if __name__ == "__main__":
    main()
