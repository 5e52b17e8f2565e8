"""What failures cost a training: kill -9, a replacement, and on with the same bits.

Part 1: one of 2 workers is killed, steps of about 20 ms, again and again: seconds from its death to
the next committed step, and to the first one that the replaced worker took part in.
Part 2: a random one of 4 workers is killed every 5 seconds; the throughput beside that of the same
job undisturbed, in turns.

  ./dev bench elastic [--kills 50] [--minutes 5] [--rounds 1] [--parts 1,2]"""

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
    with open(options.json, "w") as file:
        json.dump(found, file, indent=1)
    print(f"all of it: {options.json}")


if __name__ == "__main__":
    main()
