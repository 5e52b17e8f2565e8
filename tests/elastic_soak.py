"""Kills without end: jobs of small steps, an MLP and a CNN with batch norm in bf16, whose workers,
real processes, are killed with SIGKILL at random, on 2 to 4 workers: half of the jobs at moments of
a step that a seed determines, half at any instant. Each must end with the bits of an undisturbed
run. Prints what it took.

  tests/elastic_soak.py [--kills 1000] [--seed 1]"""

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time

from elastic import Job
from same_result_test import CNN, MLP

KILLS_PER_JOB = 20


def faults_of(seed, workers, steps):
    if seed % 2 == 0:
        return [f"random kills={KILLS_PER_JOB} seed={seed} from=1 to={steps - 1}"]
    return [f"kill every=250ms seed={seed}"]


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    folder = tempfile.mkdtemp(prefix="lockstep-soak-")
    recoveries, jobs, failed = [], 0, []
    started = time.monotonic()
    try:
        kinds = []
        for name, text, epochs in (("mlp", MLP, 100), ("cnn", CNN, 20)):
            os.mkdir(f"{folder}/{name}")
            kinds.append(Job(f"{folder}/{name}", epochs, text))
        while len(recoveries) < options.kills:
            seed, workers, job = options.seed + jobs, 2 + jobs % 3, kinds[jobs // 2 % 2]
            faults = faults_of(seed, workers, job.steps)
            jobs += 1
            try:
                report = job.survives(*faults, workers=workers)
                recoveries += report["recoveries"]
            except Exception as error:
                failed.append(f"{workers} workers, {faults}: {error}")
                print(f"FAILED   {failed[-1]}", flush=True)
                if len(failed) > 5:
                    break
            shutil.rmtree(job.output, ignore_errors=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    seconds = [recovery["seconds"] for recovery in recoveries]
    redone = [recovery["steps_redone"] for recovery in recoveries]
    print(f"{len(recoveries)} kills in {jobs} jobs, {time.monotonic() - started:.0f} s")
    if recoveries:
        print(f"next committed step: median {statistics.median(seconds):.3f} s, "
              f"worst {max(seconds):.3f} s after a death\n"
              f"steps redone: {sum(redone)} in all, at most {max(redone)} a kill")
    print(f"jobs that did not end with the bits of an undisturbed one: {len(failed)}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
