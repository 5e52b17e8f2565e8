"""What failures cost a training: kill -9, a replacement, and on with the same bits.

Part 1: one of 2 workers is killed, steps of about 20 ms, again and again: seconds from its death to
the next committed step, and to the first one that the replaced worker took part in.
Part 2: a random one of 4 workers is killed every 5 seconds; the throughput beside that of the same
job undisturbed, in turns.
Part 3 (as root: network namespaces): one of two nodes is killed, comes back and takes 50 million
weights with the state of Adam from the other one.

  ./dev bench elastic [--kills 50] [--minutes 5] [--rounds 1] [--parts 1,2,3]"""

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
BUILD = os.environ.get("LOCKSTEP_BUILD", os.path.join(os.path.dirname(HERE), "build"))
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
JOB = ["fashion-mnist", "--set", "model.widths=[1024, 1024]", "--set", "optimizer.name=adam",
       "--set", "train.global_batch_size=384", "--set", "train.virtual_ranks=4",
       "--set", "train.epochs=100000", "--max-restarts", "100000", "--quiet"]
MEDIAN_S, WORST_S, THROUGHPUT = 0.3, 0.6, 0.9  # to reach


def train(workers, steps, *faults):
    """A job of so many steps; its report, and the seconds from its first step to its end."""
    folder = tempfile.mkdtemp(prefix="lockstep-bench-")
    try:
        subprocess.run([f"{BUILD}/lockstep", "train", *JOB, "--workers", str(workers), "--set",
                        f"train.max_steps={steps}", "--output", folder, "--overwrite",
                        *(word for fault in faults for word in ("--inject", fault))],
                       check=True, env=ENVIRONMENT, timeout=7200)
        with open(f"{folder}/report.json") as file:
            report = json.load(file)
        return report, report["total_s"] - report["start_to_first_step_s"]
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def step_seconds(workers):
    return train(workers, 200)[1] / 200


def same_bits(one, other):
    same = one["weights_sha256"] == other["weights_sha256"]
    print("final weights: " + ("the bits of the undisturbed run" if same else "OTHER BITS"))
    return same


def line(name, values, target, reached):
    print(f"{name:<52} {statistics.median(values):>8.3f} {max(values):>8.3f}  "
          f"{target:<22} {'reached' if reached else 'NOT REACHED'}")


def kill_one_of_two(kills):
    step_s = step_seconds(2)
    apart = max(1, round(1 / step_s))  # a second
    faults = [f"kill rank={index % 2} step={apart * (index + 1)}" for index in range(kills)]
    steps = apart * (kills + 1)
    print(f"part 1: {kills} times kill -9 of one of 2 workers, steps of {1000 * step_s:.1f} ms")
    whole, _ = train(2, steps)
    report, _ = train(2, steps, *faults)
    recoveries = report["recoveries"]
    assert len(recoveries) == kills, f"{len(recoveries)} recoveries of {kills}"
    seconds = [recovery["seconds"] for recovery in recoveries]
    rejoined = [recovery["rejoined_seconds"] for recovery in recoveries]
    redone = [recovery["steps_redone"] for recovery in recoveries]
    print(f"{'seconds from a death to':<52} {'median':>8} {'worst':>8}")
    line("  the next committed step", seconds, "", True)
    reached = statistics.median(rejoined) <= MEDIAN_S and max(rejoined) <= WORST_S
    line("  the first with the replaced worker taking part", rejoined,
         f"at most {MEDIAN_S}, {WORST_S}", reached)
    line("steps redone a kill", redone, "at most 1", max(redone) <= 1)
    return {"step_s": step_s, "recoveries": recoveries, "same_bits": same_bits(report, whole)}


def a_kill_every_5_s(minutes, rounds):
    steps = round(60 * minutes / step_seconds(4))
    print(f"part 2: a kill every 5 s for {minutes:g} minutes, 4 workers, {steps} steps")
    rows = []
    for number in range(rounds):
        whole, undisturbed_s = train(4, steps)
        report, disturbed_s = train(4, steps, f"kill every=5s seed={number + 1}")
        kills = len(report["recoveries"])
        ratio = undisturbed_s / disturbed_s
        print(f"{steps / undisturbed_s:.1f} steps/s undisturbed, {steps / disturbed_s:.1f} with "
              f"{kills} kills: {100 * ratio:.1f} %, to reach {100 * THROUGHPUT:.0f} %: "
              f"{'reached' if ratio >= THROUGHPUT else 'NOT REACHED'}")
        rows.append({"undisturbed_s": undisturbed_s, "disturbed_s": disturbed_s, "kills": kills,
                     "ratio": ratio, "same_bits": same_bits(report, whole)})
    return {"steps": steps, "rounds": rows}


LARGE = ["linear-regression", "--set", "model.widths=[6200, 7200]", "--set", "optimizer.name=adam",
         "--set", "dataset.features=784", "--set", "dataset.rows=4000", "--set",
         "train.global_batch_size=32", "--set", "train.virtual_ranks=4", "--epochs", "1000",
         "--set", "checkpoint.every_epochs=0"]


def events_of(folder, kind):
    with open(f"{folder}/events.jsonl") as file:
        found = [json.loads(line) for line in file]
    return [event for event in found if event["event"] == kind]


def from_a_peer(rounds):
    """Seconds from the generation with the node that has come back: to all weights, to a step."""
    sys.path.insert(0, os.path.join(os.path.dirname(HERE), "tests"))
    from nodes import Nodes  # pylint: disable=import-outside-toplevel
    found = []
    for _ in range(rounds):
        folder = tempfile.mkdtemp(prefix="lockstep-bench-")
        try:
            with Nodes(2) as nodes:
                found.append(one_return(nodes, folder))
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    print(f"part 3: a node takes 49.5 M weights and their Adam state (594 MB), {rounds} times")
    line("seconds to all of them, SHA-256 included", [one["weights_s"] for one in found], "", True)
    line("seconds to the next committed step", [one["step_s"] for one in found], "", True)
    return found


def one_return(nodes, folder):
    subprocess.run([f"{BUILD}/lockstep", "key", f"{folder}/key"], check=True)

    def start(node):
        return nodes.run(node, [
            f"{BUILD}/lockstep", "train", *LARGE, "--nnodes", "1:2", "--rdzv-endpoint",
            f"{nodes.names[0]}:29400", "--key-file", f"{folder}/key", "--workers", "1", "--quiet",
            "--node-rank", str(node), "--output", f"{folder}/{node}", "--overwrite"],
            env=ENVIRONMENT)

    def wait_for(kind, condition):
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            if os.path.exists(f"{folder}/0/events.jsonl"):
                for event in events_of(f"{folder}/0", kind):
                    if condition(event):
                        return event
            time.sleep(0.1)
        raise TimeoutError(kind)

    agents = [start(0), start(1)]
    wait_for("first_step", lambda event: True)
    nodes.kill(1)
    agents[1].wait()
    agents[1] = start(1)
    recovered = wait_for("recovered", lambda event: event["source"] == "peer")
    number = recovered["generation"]
    generation = wait_for("generation", lambda event: event["generation"] == number)
    entered = wait_for("entered", lambda event: event["generation"] == number)
    for agent in agents:
        agent.terminate()
    for agent in agents:
        agent.wait()
    return {"weights_s": entered["time"] - generation["time"],
            "step_s": recovered["clock"] - generation["clock"]}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--parts", default="1,2")
    parser.add_argument("--json", default=os.path.join(BUILD, "bench-elastic.json"))
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception: children end, too
    parts = options.parts.split(",")
    found = {"when": time.strftime("%Y-%m-%d")}
    if "1" in parts:
        found["one_of_two"] = kill_one_of_two(options.kills)
    if "2" in parts:
        found["every_5_s"] = a_kill_every_5_s(options.minutes, options.rounds)
    if "3" in parts:
        found["from_a_peer"] = from_a_peer(options.rounds)
    with open(options.json, "w") as file:
        json.dump(found, file, indent=1)
    print(f"all of it: {options.json}")


if __name__ == "__main__":
    main()
