"""Collectives between processes of this machine, float32: lockstep against Open MPI's shared memory
and Gloo, in turns in one session, each timed in the same way. Prints how many times as long the
peers take (the median of the rounds, least and most) beside what lockstep is meant to reach.

Open MPI has settings that matter more than anything else; the first part tries them all, and each
case is compared with the best for it.

  ./dev bench collective [--rounds 5] [--json FILE]"""

import argparse
import importlib.util
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
BUILD = os.environ.get("LOCKSTEP_BUILD", os.path.join(os.path.dirname(HERE), "build"))
OPENMPI = os.path.join(BUILD, "bench-openmpi")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "OMPI_ALLOW_RUN_AS_ROOT": "1",
               "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
CORES = len(os.sched_getaffinity(0))
BATCHES, TUNING_BATCHES = 50, 8  # lockstep's default; fewer to find Open MPI's best settings
TIMEOUT_S, TUNING_TIMEOUT_S = 600, 60  # of one program; slower settings than that are left out


class Case:
    """targets: by peer, how many times as long it is to take at least."""

    def __init__(self, name, operation, size, ranks, arena, **targets):
        self.name, self.operation, self.size, self.ranks = name, operation, size, ranks
        self.arena, self.targets = arena, targets
        self.key = (operation, size, ranks)  # what a peer is asked; it knows no arenas

    def spec(self, batches):
        batch = 500 if self.size == 0 else min(500, max(1, (4 << 20) // self.size))
        return f"{self.operation}:{self.size}:{batch}:{batches}"


MB26, MB105, NO_SLOWER = 26214400, 104857600, 1.0
CASES = [
    Case("all_reduce 26 MB, arena", "all_reduce", MB26, 2, True, openmpi=3, gloo=12),
    Case("all_reduce 105 MB, arena", "all_reduce", MB105, 2, True, openmpi=3),
    Case("all_reduce 26 MB, ordinary memory", "all_reduce", MB26, 2, False, openmpi=1.2),
    Case("all_reduce 4 B, arena", "all_reduce", 4, 2, True, openmpi=1 / 1.3, gloo=100),
    Case("all_reduce 4 B, ordinary memory", "all_reduce", 4, 2, False, openmpi=1 / 1.3, gloo=100),
    Case("all_reduce 16 KB, arena", "all_reduce", 16384, 2, True, openmpi=3),
    Case("all_reduce 16 KB, ordinary memory", "all_reduce", 16384, 2, False, openmpi=3),
    Case("barrier", "barrier", 0, 2, True, openmpi=NO_SLOWER),
    Case("4 ranks, all_reduce 26 MB, arena", "all_reduce", MB26, 4, True, openmpi=3),
]


def lines_of(command, timeout=TIMEOUT_S):
    done = subprocess.run(command, check=True, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True,
                          timeout=timeout, stdin=subprocess.DEVNULL)
    return [json.loads(line) for line in done.stdout.split("\n") if line.startswith("{")]


def run_lockstep(cases):
    """The JSON line of every case, by its place in `cases`; and the lines of memcpy."""
    found, copies = {}, []
    with tempfile.TemporaryDirectory(prefix="lockstep-bench-") as folder:
        for group in sorted({(case.operation, case.ranks, case.arena) for case in cases}):
            operation, ranks, arena = group
            sizes = [case.size for case in cases
                     if (case.operation, case.ranks, case.arena) == group]
            subprocess.run([f"{BUILD}/lockstep", "bench", "collective", "--operation", operation,
                            "--ranks", str(ranks), "--sizes",
                            ",".join(str(size or 4) for size in sizes),
                            "--json", f"{folder}/lines", *(["--arena"] if arena else [])],
                           check=True, env=ENVIRONMENT, stdout=subprocess.DEVNULL,
                           timeout=TIMEOUT_S)
            with open(f"{folder}/lines") as file:
                for line in map(json.loads, file):
                    if line["operation"] == "memcpy":
                        copies.append(line)
                        continue
                    for number, case in enumerate(cases):
                        if (*case.key, case.arena) == (line["operation"], line["bytes"],
                                                       line["ranks"], arena):
                            found[number] = line
    assert len(found) == len(cases), f"lockstep measured {len(found)} of {len(cases)} cases"
    return found, copies


def openmpi_settings():
    """[(name, arguments)]: ways to move the bytes, and algorithms of all_reduce over each."""
    ways = [("no single copy", {"btl_vader_single_copy_mechanism": "none"}),
            ("CMA", {"btl_vader_single_copy_mechanism": "cma"}),
            ("no single copy, 512 KB fragments", {"btl_vader_single_copy_mechanism": "none",
                                                  "btl_vader_max_send_size": "524288"})]
    algorithms = [("chosen by size", {}), ("component sm", {"coll_sm_priority": "100"})]
    for number, name in enumerate(["linear", "nonoverlapping", "recursive doubling", "ring",
                                   "segmented ring", "Rabenseifner"], 1):
        algorithms.append((name, {"coll_tuned_use_dynamic_rules": "1",
                                  "coll_tuned_allreduce_algorithm": str(number)}))
    found = []
    for way, way_values in ways:
        for algorithm, values in algorithms:
            arguments = ["--mca", "pml", "ob1", "--mca", "btl", "vader,self"]
            for key, value in {**way_values, **values}.items():
                arguments += ["--mca", key, value]
            found.append((f"{way}; {algorithm}", arguments))
    return found


def run_openmpi(settings, keys, batches, timeout=TIMEOUT_S):
    """{key: microseconds} with one of the settings; cases of one number of ranks share a run."""
    found = {}
    for ranks in sorted({key[2] for key in keys}):
        placing = (["--bind-to", "core"] if ranks <= CORES else
                   ["--oversubscribe", "--bind-to", "none", "--mca", "mpi_yield_when_idle", "1"])
        specs = [Case("", *key, False).spec(batches) for key in keys if key[2] == ranks]
        command = ["mpirun", "-n", str(ranks), *placing, *settings, OPENMPI, *specs]
        for line in lines_of(command, timeout):
            found[(line["operation"], line["bytes"], line["ranks"])] = line["time_us"]
    return found


def tune_openmpi(keys):
    """{key: (name, arguments)} of the fastest settings for each."""
    best = {}
    settings = openmpi_settings()
    for number, (name, arguments) in enumerate(settings, 1):
        times = {}
        for ranks in sorted({key[2] for key in keys}):
            asked = [key for key in keys if key[2] == ranks]
            try:
                times.update(run_openmpi(arguments, asked, TUNING_BATCHES, TUNING_TIMEOUT_S))
            except subprocess.SubprocessError as error:
                print(f"Open MPI, {name}: {error}", file=sys.stderr)
        print(f"Open MPI's settings {number}/{len(settings)}: {name}: " + ", ".join(
            f"{size or operation} ({ranks} ranks) {time:.2f} us"
            for (operation, size, ranks), time in times.items()), flush=True)
        for key, time in times.items():
            if key not in best or time < best[key][0]:
                best[key] = (time, name, arguments)
    return {key: (name, arguments) for key, (_, name, arguments) in best.items()}


def prepare_openmpi(cases):
    """A function of no arguments that measures; None where there is no Open MPI."""
    if not shutil.which("mpicc") or not shutil.which("mpirun"):
        print("no Open MPI here: mpicc or mpirun is missing", file=sys.stderr)
        return None, {}
    subprocess.run(["mpicc", "-O3", "-march=native", f"{HERE}/collective/openmpi.c", "-o", OPENMPI],
                   check=True)
    keys = sorted({case.key for case in cases if "openmpi" in case.targets})
    best = tune_openmpi(keys)

    def measure():
        found = {}
        for arguments in {tuple(arguments): arguments for _, arguments in best.values()}.values():
            found.update(run_openmpi(arguments, [key for key in keys if best[key][1] == arguments],
                                     BATCHES))
        return found
    return measure, {key: name for key, (name, _) in best.items()}


def prepare_gloo(cases):
    if not importlib.util.find_spec("torch"):
        print("no Gloo here: there is no Python package torch", file=sys.stderr)
        return None
    keys = sorted({case.key for case in cases if "gloo" in case.targets})

    def measure():
        found = {}
        for ranks in sorted({key[2] for key in keys}):
            specs = [Case("", *key, False).spec(BATCHES) for key in keys if key[2] == ranks]
            for line in lines_of([sys.executable, f"{HERE}/collective/gloo.py", str(ranks),
                                  *specs]):
                found[(line["operation"], line["bytes"], line["ranks"])] = line["time_us"]
        return found
    return measure


def summary(case, peer, ours, theirs):
    """One row: ours and theirs are the times of the rounds, in microseconds."""
    ratios = [their / our for our, their in zip(ours, theirs)]
    ratio, target = statistics.median(ratios), case.targets[peer]
    return {"case": case.name, "peer": peer, "lockstep_us": statistics.median(ours),
            "peer_us": statistics.median(theirs), "ratio": ratio, "least": min(ratios),
            "most": max(ratios), "target": target, "reached": ratio >= target,
            "lockstep_rounds_us": ours, "peer_rounds_us": theirs}


def print_table(rows):
    print(f"\n{'case':<36} {'against':<8} {'lockstep us':>12} {'peer us':>12} {'ratio':>8} "
          f"{'least':>8} {'most':>8} {'target':>8}")
    for row in rows:
        print(f"{row['case']:<36} {row['peer']:<8} {row['lockstep_us']:>12.2f} "
              f"{row['peer_us']:>12.2f} {row['ratio']:>8.2f} {row['least']:>8.2f} "
              f"{row['most']:>8.2f} {row['target']:>8.2f}  "
              f"{'reached' if row['reached'] else 'NOT REACHED'}")


def moved_rows(lines):
    """What the groups counted in all_reduce: 2 x ranks x bytes, where nothing is staged."""
    return [{"case": case.name, "moved_bytes": line["moved_bytes"],
             "ratio": line["moved_bytes"] / (2 * case.ranks * case.size)}
            for case, line in zip(CASES, lines)
            if "moved_bytes" in line and case.arena and case.size >= MB26]


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", default=os.path.join(BUILD, "bench-collective.json"))
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception: children end, too
    openmpi, settings = prepare_openmpi(CASES)
    peers = {"openmpi": openmpi, "gloo": prepare_gloo(CASES)}
    peers = {name: measure for name, measure in peers.items() if measure}
    ours, theirs = [], {name: [] for name in peers}
    for number in range(options.rounds):
        ours.append(run_lockstep(CASES))
        for name, measure in peers.items():
            theirs[name].append(measure())
        print(f"round {number + 1} of {options.rounds}", flush=True)

    rows = [summary(case, peer, [found[place]["time_us"] for found, _ in ours],
                    [found[case.key] for found in theirs[peer]])
            for place, case in enumerate(CASES) for peer in case.targets if peer in peers]
    print_table(rows)
    moved = moved_rows([ours[-1][0][place] for place in range(len(CASES))])
    for row in moved:
        print(f"{row['case']}: {row['moved_bytes']:,.0f} bytes moved, {row['ratio']:.3f} of "
              f"2 x ranks x bytes: {'reached' if abs(row['ratio'] - 1) <= 0.05 else 'NOT REACHED'}")
    for key, name in sorted(settings.items()):
        print(f"Open MPI's best settings for {key[0]} of {key[1]} B, {key[2]} ranks: {name}")
    for copy in sorted(ours[-1][1], key=lambda line: (line["bytes"], line["ranks"])):
        if copy["bytes"] >= MB26 and copy["arena"]:
            print(f"memcpy of {copy['bytes']} B, {copy['ranks']} ranks at once: "
                  f"{copy['algbw_gbps']:.2f} GB/s each")
    with open(options.json, "w") as file:
        json.dump({"rows": rows, "moved": moved, "rounds": options.rounds, "cores": CORES,
                   "memcpy": ours[-1][1],
                   "openmpi_settings": {" ".join(map(str, key)): name
                                        for key, name in settings.items()}}, file, indent=1)
    print(f"all of it: {options.json}")


if __name__ == "__main__":
    main()
