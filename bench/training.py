"""Training on made-up data, 2 workers of 1 thread on this machine: lockstep against PyTorch's
DistributedDataParallel, at its best (Gloo, fused optimizer, gradients as bucket views) and with
its defaults, in turns in one session. Prints samples a second (the median of the rounds, least and
most) and the medians of the rounds' ratios beside what lockstep is meant to reach.

  ./dev bench training [--works W1,W4] [--rounds 3] [--seconds 10] [--precision bf16]"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
BUILD = os.environ.get("LOCKSTEP_BUILD", os.path.join(os.path.dirname(HERE), "build"))
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
TIMEOUT_S = 600

NAMES = {"W1": "MLP 784-1024-1024-10, Adam, 64", "W2": "CNN 32-64-fc128, momentum, 64",
         "W3": "ResNet-18, momentum, 16", "W4": "GPT 6×384, AdamW, 4",
         "W5": "MLP 4096-4096-4096-4096-10, Adam, 16"}
OURS = ["shared_weights", "data_parallel", "independent"]
PEERS = {"DDP best": [], "DDP defaults": ["--defaults"]}
# (ours, measured against): at least so many times as fast, by work and precision.
INDEPENDENT = {work: 0.95 for work in NAMES}
TARGETS = {
    ("shared_weights", "independent"): {"fp32": INDEPENDENT, "bf16": INDEPENDENT},
    ("shared_weights", "DDP best"): {
        "fp32": {"W1": 2, "W2": 1.1, "W3": 1.2, "W4": 1.3, "W5": 2.5}, "bf16": {"W4": 2.3}},
    ("data_parallel", "DDP defaults"): {
        "fp32": {"W1": 1.8, "W2": 1.1, "W3": 1.15, "W4": 1.2, "W5": 1.5}, "bf16": {}},
}


def lockstep_modes():
    """Those of OURS that this build has: the program's help names them."""
    text = subprocess.run([f"{BUILD}/lockstep", "bench", "training", "--help"], check=True,
                          capture_output=True, text=True).stdout
    return [mode for mode in OURS if mode in text]


def run_lockstep(work, mode, options):
    with tempfile.TemporaryDirectory(prefix="lockstep-bench-") as folder:
        subprocess.run([f"{BUILD}/lockstep", "bench", "training", "--work", work, "--mode", mode,
                        "--workers", "2", "--seconds", str(options.seconds), "--precision",
                        options.precision, "--json", f"{folder}/line"], check=True,
                       env=ENVIRONMENT, stdout=subprocess.DEVNULL, timeout=TIMEOUT_S)
        with open(f"{folder}/line") as file:
            return json.loads(file.read())


def run_ddp(work, arguments, options):
    # The peer's row is of fp32 where ours is of bf16: a target names what a user has today.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
               "2", f"{HERE}/training/ddp.py", "--work", work, "--seconds", str(options.seconds),
               "--precision", options.peer_precision, *arguments]
    for attempt in (1, 2):  # torchrun's rendezvous fails now and then
        done = subprocess.run(command, env=ENVIRONMENT, stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, text=True, timeout=TIMEOUT_S)
        lines = [line for line in done.stdout.split("\n") if line.startswith("{")]
        if lines:  # complete; Gloo sometimes aborts a rank at exit, after that
            return json.loads(lines[-1])
        print(f"{' '.join(command)}: exit code {done.returncode}, attempt {attempt}:\n"
              + "\n".join(done.stderr.strip().split("\n")[-5:]), file=sys.stderr)
    sys.exit(1)


def measure(works, contenders, options):
    """{(work, contender): [a JSON line for each round]}; a round runs every contender once."""
    lines = {(work, name): [] for work in works for name in contenders}
    for number in range(options.rounds):
        for work in works:
            for name in contenders:
                line = (run_ddp(work, PEERS[name], options) if name in PEERS
                        else run_lockstep(work, name, options))
                lines[work, name].append(line)
            print(f"round {number + 1} of {options.rounds}, {work}: " + ", ".join(
                f"{name} {lines[work, name][-1]['samples_per_s']:.1f}" for name in contenders),
                flush=True)
    return lines


def table(works, contenders, lines, precision):
    rows = []
    print(f"\n{'samples/s':<38} {'':<16} {'median':>9} {'least':>9} {'most':>9}")
    for work in works:
        for name in contenders:
            rates = [line["samples_per_s"] for line in lines[work, name]]
            print(f"{work + ' ' + NAMES[work]:<38} {name:<16} {statistics.median(rates):>9.1f} "
                  f"{min(rates):>9.1f} {max(rates):>9.1f}")
    print(f"\n{'ratios of a round':<38} {'against':<16} {'median':>9} {'least':>9} {'most':>9} "
          f"{'target':>8}")
    for (ours, against), targets in TARGETS.items():
        if ours not in contenders or against not in contenders:
            continue
        for work in works:
            ratios = [own["samples_per_s"] / other["samples_per_s"]
                      for own, other in zip(lines[work, ours], lines[work, against])]
            target, median = targets[precision].get(work), statistics.median(ratios)
            rows.append({"work": work, "mode": ours, "against": against, "ratio": median,
                         "least": min(ratios), "most": max(ratios), "target": target})
            verdict = "" if target is None else (
                f"{target:>8.2f}  {'reached' if median >= target else 'NOT REACHED'}")
            print(f"{work + ' ' + ours:<38} {against:<16} {median:>9.2f} {min(ratios):>9.2f} "
                  f"{max(ratios):>9.2f} {verdict}")
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--works", default=",".join(NAMES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--peer-precision", choices=["fp32", "bf16"], default="fp32",
                        help="of PyTorch DDP")
    parser.add_argument("--json", default=os.path.join(BUILD, "bench-training.json"))
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception: children end, too
    works = options.works.split(",")
    contenders = [*lockstep_modes(), *PEERS]
    lines = measure(works, contenders, options)
    rows = table(works, contenders, lines, options.precision)
    with open(options.json, "w") as file:
        json.dump({"rows": rows, "precision": options.precision,
                   "peer_precision": options.peer_precision, "rounds": options.rounds,
                   "lines": [{"work": work, "contender": name, "rounds": found}
                             for (work, name), found in lines.items()]}, file, indent=1)
    print(f"all of it: {options.json}")


if __name__ == "__main__":
    main()
