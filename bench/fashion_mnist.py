"""Seconds for training 784-128-64-10 on Fashion-MNIST with 2 workers, batch 64 each, Adam, one
thread a worker, evaluated after every epoch: lockstep against PyTorch's DistributedDataParallel,
in turns on the same machine. Seconds count from the command to its end.

  ./dev bench fashion-mnist [--rounds 5] [--epochs 10]"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
LOCKSTEP = os.path.join(os.path.dirname(HERE), "build", "lockstep")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def run_lockstep(epochs):
    folder = tempfile.mkdtemp(prefix="lockstep-bench-")
    try:
        started = time.time()
        subprocess.run([LOCKSTEP, "train", "fashion-mnist", "--workers", "2", "--epochs",
                        str(epochs), "--quiet", "--overwrite", "--output", folder,
                        "--set", "model.widths=[128, 64]", "--set", "train.batch_size=64",
                        "--set", "optimizer.name=adam"], check=True, env=ENVIRONMENT)
        taken = time.time() - started
        with open(f"{folder}/report.json") as file:
            report = json.load(file)
        return taken, report["start_to_first_step_s"], report["epochs"][-1]["test_accuracy"]
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run_ddp(epochs):
    started = time.time()
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                           "--nproc-per-node", "2", f"{HERE}/peer_ddp.py", str(epochs),
                           str(started)], check=True, env=ENVIRONMENT, stdout=subprocess.PIPE,
                          text=True)
    taken = time.time() - started
    result = json.loads(done.stdout.strip().split("\n")[-1])
    return taken, result["first_step_s"], result["accuracy"]


def line(name, runs):
    seconds, first, accuracy = zip(*runs)
    return (f"{name:<12} {statistics.median(seconds):8.2f} {min(seconds):8.2f} "
            f"{max(seconds):8.2f} {statistics.median(first):14.2f} "
            f"{statistics.median(accuracy):10.4f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=10)
    options = parser.parse_args()
    ours, theirs = [], []
    for number in range(options.rounds):
        ours.append(run_lockstep(options.epochs))
        theirs.append(run_ddp(options.epochs))
        print(f"round {number + 1}: lockstep {ours[-1][0]:.2f} s, "
              f"PyTorch DDP {theirs[-1][0]:.2f} s", flush=True)
    print(f"\n{f'{options.epochs} epochs':<12} {'median':>8} {'least':>8} {'most':>8} "
          f"{'to first step':>14} {'accuracy':>10}")
    print(line("lockstep", ours))
    print(line("PyTorch DDP", theirs))
    ratios = [peer[0] / own[0] for own, peer in zip(ours, theirs)]
    print(f"PyTorch DDP takes {statistics.median(ratios):.2f} times as long "
          f"({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
