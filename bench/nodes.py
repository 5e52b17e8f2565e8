"""Collectives between nodes, float32: network namespaces of this machine on a switch, with links as
fast as they are or of a stated rate. lockstep against Gloo, Open MPI and raw TCP (both directions
at once), in turns in one session, each timed in the same way. Prints how many times as long the
peers take (the median of the rounds, least and most) beside what lockstep is meant to reach.

Each peer has several settings; the first part tries them all, and each case is compared with the
two best for it, with the faster in each round. "link" is no program: the time in which a link of
that rate carries the bytes that a rank must send, 2 (p - 1) / p of its data.

  ./dev bench nodes [--rounds 5] [--setups veth,rate] [--engine ucx] [--json FILE]     (as root)"""

import argparse
import itertools
import json
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
BUILD = os.environ.get("LOCKSTEP_BUILD", os.path.join(os.path.dirname(HERE), "build"))
sys.path.insert(0, os.path.join(os.path.dirname(HERE), "tests"))
from harness import Skip
from nodes import Failed, Nodes

OPENMPI = os.path.join(BUILD, "bench-openmpi")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "OMPI_ALLOW_RUN_AS_ROOT": "1",
               "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "GLOO_SOCKET_IFNAME": "eth0"}
TIMEOUT_S, TUNING_TIMEOUT_S = 300, 60  # of one program; slower settings than that are left out
TUNING_SHARE = 5  # of the batches, to find the best settings


class Setup:
    def __init__(self, text, nodes, ranks, gbit_s=None):
        self.text, self.nodes, self.ranks, self.gbit_s = text, nodes, ranks, gbit_s

    def link_us(self, size):
        world = self.nodes * self.ranks
        return 2 * (world - 1) / world * size * 8 / (self.gbit_s * 1e3)


SETUPS = {
    "veth": Setup("2 nodes", 2, 1),
    "rate": Setup("2 nodes at 1 Gbit/s", 2, 1, 1),
    "rate4": Setup("4 nodes at 1 Gbit/s", 4, 1, 1),
    "ranks": Setup("2 nodes x 2 ranks", 2, 2),
}


class Case:
    """targets: by peer, how many times as long it is to take at least; None: just shown."""

    def __init__(self, setup, size, text, memory="arena", **targets):
        self.setup, self.size, self.memory, self.targets = setup, size, memory, targets
        self.name = f"{SETUPS[setup].text}, {text}"

    def spec(self, share=1):
        fast = SETUPS[self.setup].gbit_s is None
        batch = min(100, max(1, (4 << 20) // self.size)) if fast or self.size < 1 << 16 else 1
        return f"all_reduce:{self.size}:{batch}:{(30 if fast else 10) // share}"


MB8, MB16, MB26, MB32 = 8 << 20, 16 << 20, 26214400, 32 << 20
CASES = [
    Case("veth", 4, "4 B", gloo=2, tcp=None),
    Case("veth", 4096, "4 KB", gloo=2, tcp=None),
    Case("veth", MB16, "16 MB", gloo=1.5, tcp=0.85),
    Case("rate", MB8, "8 MB", link=0.9, tcp=None, gloo=None),
    Case("rate", MB32, "32 MB", link=0.9, tcp=None, gloo=None),
    Case("rate4", MB8, "8 MB", link=0.9, gloo=None),
    Case("ranks", MB26, "26 MB, arena", openmpi=1.2, gloo=None),
    Case("ranks", MB26, "26 MB, ordinary memory", memory="ordinary", openmpi=1.2, gloo=None),
]


class Runs:
    """Programs on the nodes of one setup. Each run_X(way, specs) returns {bytes: microseconds}."""

    def __init__(self, setup, nodes, folder, engine):
        self.setup, self.nodes, self.folder, self.engine = setup, nodes, folder, engine
        self.world, self.timeout_s = setup.nodes * setup.ranks, TIMEOUT_S
        self.meetings = itertools.count()

    def times(self, *commands, environment=None):
        """Command i on node i."""
        out = self.nodes.run_all(commands, self.timeout_s,
                                 env={**ENVIRONMENT, **(environment or {})})
        found = [json.loads(line) for line in out.split("\n") if line.startswith("{")]
        return {line["bytes"]: line["time_us"] for line in found}

    def meeting(self):
        path = f"{self.folder}/meeting{next(self.meetings)}"
        os.mkdir(path)
        return path

    def run_lockstep(self, memory, specs):
        meeting = self.meeting()
        return self.times(*([f"{BUILD}/bench_group", node, self.setup.nodes, self.setup.ranks,
                             self.engine, meeting, memory, *specs]
                            for node in range(self.setup.nodes)))

    def run_tcp(self, way, specs):
        return self.times(*([f"{BUILD}/bench_tcp", node, self.nodes.addresses[0], *way, *specs]
                            for node in range(2)))

    def run_gloo(self, way, specs):
        """The ranks of a node are children of one shell."""
        devices, parts = way
        meeting = f"{self.meeting()}/file"
        ranks = [[shlex.join([sys.executable, f"{HERE}/collective/gloo.py", str(self.world),
                              "--rank", str(node * self.setup.ranks + rank), "--meeting", meeting,
                              "--parts", parts, *specs]) for rank in range(self.setup.ranks)]
                 for node in range(self.setup.nodes)]
        return self.times(*(["sh", "-c", " & ".join(commands[::-1]) + " && wait"]
                            for commands in ranks),
                          environment={"GLOO_SOCKET_IFNAME": devices})

    def run_openmpi(self, way, specs):
        agent = f"{self.folder}/agent"
        with open(agent, "w") as file:  # mpirun's way to another node
            file.write("#!/bin/sh\nhost=$1; shift\ncase $host in\n")
            for node, name in enumerate(self.nodes.names):
                file.write(f'{name}) exec {shlex.join(self.nodes.words(node))} sh -c "$*" ;;\n')
            file.write("esac\n")
        os.chmod(agent, 0o700)
        hosts = ",".join(f"{name}:{self.setup.ranks}" for name in self.nodes.names)
        command = ["mpirun", "-n", self.world, "--host", hosts, "--bind-to", "none",
                   "--oversubscribe", "--mca", "plm_rsh_agent", agent,
                   "--mca", "oob_tcp_if_include", "eth0", *way, OPENMPI,
                   *(spec.replace(":", "_apart:", 1) if "coll_han_priority" in way else spec
                     for spec in specs)]
        return self.times(command, environment={"TMPDIR": self.folder})


def openmpi_ways():
    engines = {
        "ob1": {"pml": "ob1", "btl": "tcp,vader,self"},
        "ob1, two links": {"pml": "ob1", "btl": "tcp,vader,self", "btl_tcp_links": "2"},
        "ob1, large fragments": {"pml": "ob1", "btl": "tcp,vader,self",
                                 "btl_tcp_max_send_size": "1048576",
                                 "btl_tcp_rdma_pipeline_send_length": "1048576",
                                 "btl_vader_max_send_size": "524288"},
        "ob1, large socket buffers": {"pml": "ob1", "btl": "tcp,vader,self",
                                      "btl_tcp_sndbuf": "4194304", "btl_tcp_rcvbuf": "4194304"},
    }
    han = {"coll_han_priority": "100"}
    algorithms = {"chosen by size": {}, "component adapt": {"coll_adapt_priority": "100"},
                  "component han": han,
                  "component han, 1 MB": {**han, "coll_han_allreduce_segsize": "1048576"},
                  "component han, simple": {**han, "coll_han_use_simple_allreduce": "1"}}
    for number, name in enumerate(["linear", "nonoverlapping", "recursive doubling", "ring",
                                   "segmented ring", "Rabenseifner"], 1):
        algorithms[name] = {"coll_tuned_use_dynamic_rules": "1",
                            "coll_tuned_allreduce_algorithm": str(number)}
    algorithms["segmented ring, 1 MB"] = {**algorithms["segmented ring"],
                                          "coll_tuned_allreduce_algorithm_segmentsize": "1048576"}
    common = {"btl_tcp_if_include": "eth0", "mpi_yield_when_idle": "1"}
    return {f"{engine}; {algorithm}": [word for key, value in {**common, **engines[engine],
                                                               **algorithms[algorithm]}.items()
                                       for word in ("--mca", key, value)]
            for engine in engines for algorithm in algorithms}


WAYS = {
    "tcp": {f"{way}, {f'buffers of {size >> 10} KB' if size else 'default buffers'}, in pieces of "
            f"{piece >> 10} KB": (way, str(size), str(piece))
            for way in ("spin", "poll", "threads") for size in (0, 4 << 20)
            for piece in (32 << 10, 64 << 10, 128 << 10, 256 << 10, 16 << 20)},
    "gloo": {f"{devices} devices, in {parts} parts": (",".join(["eth0"] * devices), str(parts))
             for devices in (1, 2) for parts in (1, 2, 4)},
    "openmpi": openmpi_ways(),
}


def tune(runs, peer, cases):
    """{bytes: names of the two fastest ways}: by chance the best may come second once."""
    times, run = {}, getattr(runs, f"run_{peer}")
    specs = sorted({case.spec(TUNING_SHARE) for case in cases})
    for name, way in WAYS[peer].items():
        try:
            found = run(way, specs)
        except Failed as error:
            print(f"{peer}, {name}: {error}", file=sys.stderr)
            continue
        print(f"{runs.setup.text}: {peer}: {name}: "
              + ", ".join(f"{size} B {us:.1f} us" for size, us in found.items()), flush=True)
        for size, us in found.items():
            times.setdefault(size, []).append((us, name))
    return {size: [name for _, name in sorted(found)[:2]] for size, found in times.items()}


def measure_peer(runs, peer, best, cases):
    """{bytes: microseconds}, of the faster of both ways."""
    times = {}
    for name in sorted({name for names in best.values() for name in names}):
        specs = sorted({case.spec() for case in cases if name in best[case.size]})
        for size, us in getattr(runs, f"run_{peer}")(WAYS[peer][name], specs).items():
            times[size] = min(us, times.get(size, us))
    return times


def measure_setup(runs, cases, peers, rounds):
    """Rows of the table, and the settings used."""
    runs.timeout_s = TUNING_TIMEOUT_S
    asked = {peer: [case for case in cases if peer in case.targets] for peer in peers}
    best = {peer: tune(runs, peer, some) for peer, some in asked.items() if some}
    runs.timeout_s = TIMEOUT_S
    ours, theirs = [], []
    for number in range(rounds):
        found = {}
        for memory in sorted({case.memory for case in cases}):
            times = runs.run_lockstep(memory, [case.spec() for case in cases
                                               if case.memory == memory])
            found.update({(size, memory): us for size, us in times.items()})
        ours.append(found)
        theirs.append({peer: measure_peer(runs, peer, best[peer], asked[peer]) for peer in best})
        print(f"{runs.setup.text}: round {number + 1} of {rounds}", flush=True)

    def time_of(peer, case, found):
        return runs.setup.link_us(case.size) if peer == "link" else found[peer][case.size]

    rows = [summary(case, peer, [found[case.size, case.memory] for found in ours],
                    [time_of(peer, case, found) for found in theirs])
            for case in cases for peer in case.targets if peer == "link" or peer in best]
    return rows, {f"{runs.setup.text}, {size} B, {peer}": " | ".join(names)
                  for peer, sizes in best.items() for size, names in sizes.items()}


def summary(case, peer, ours, theirs):
    """ours and theirs: the times of the rounds, in microseconds."""
    ratios = [their / our for our, their in zip(ours, theirs)]
    target, ratio = case.targets[peer], statistics.median(ratios)
    return {"case": case.name, "peer": peer, "lockstep_us": statistics.median(ours),
            "peer_us": statistics.median(theirs), "ratio": ratio, "least": min(ratios),
            "most": max(ratios), "target": target,
            "reached": None if target is None else ratio >= target,
            "lockstep_rounds_us": ours, "peer_rounds_us": theirs}


def print_table(rows):
    print(f"\n{'case':<44} {'against':<8} {'lockstep us':>12} {'peer us':>12} {'ratio':>8} "
          f"{'least':>8} {'most':>8} {'target':>8}")
    for row in rows:
        verdict = {None: "", True: f"{row['target'] or 0:>8.2f}  reached",
                   False: f"{row['target'] or 0:>8.2f}  NOT REACHED"}[row["reached"]]
        print(f"{row['case']:<44} {row['peer']:<8} {row['lockstep_us']:>12.1f} "
              f"{row['peer_us']:>12.1f} {row['ratio']:>8.2f} {row['least']:>8.2f} "
              f"{row['most']:>8.2f} {verdict}")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--setups", default=",".join(SETUPS))
    parser.add_argument("--peers", default=",".join(WAYS))
    parser.add_argument("--engine", default="ucx", help="of lockstep: ucx or zmq")
    parser.add_argument("--json", default=os.path.join(BUILD, "bench-nodes.json"))
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception: children end, too
    peers = options.peers.split(",") if options.peers else []
    if "openmpi" in peers:
        if shutil.which("mpicc") and shutil.which("mpirun"):
            subprocess.run(["mpicc", "-O3", "-march=native", f"{HERE}/collective/openmpi.c", "-o",
                            OPENMPI], check=True)
        else:
            print("no Open MPI here: mpicc or mpirun is missing", file=sys.stderr)
            peers.remove("openmpi")
    rows, settings = [], {}
    for name in options.setups.split(","):
        setup = SETUPS[name]
        cases = [case for case in CASES if case.setup == name]
        rate = setup.gbit_s and f"{setup.gbit_s}gbit"
        try:
            with tempfile.TemporaryDirectory(prefix="lockstep-bench-") as folder:
                with Nodes(setup.nodes, rate=rate) as nodes:
                    runs = Runs(setup, nodes, folder, options.engine)
                    found, used = measure_setup(runs, cases, peers, options.rounds)
        except Skip as why:
            sys.exit(f"no nodes to measure on: {why}")
        rows += found
        settings.update(used)
    print_table(rows)
    for case, names in settings.items():
        print(f"best settings: {case}: {names}")
    with open(options.json, "w") as file:
        json.dump({"rows": rows, "settings": settings, "rounds": options.rounds,
                   "cores": len(os.sched_getaffinity(0))}, file, indent=1)
    print(f"all of it: {options.json}")


if __name__ == "__main__":
    main()
