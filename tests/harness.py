"""What the tests that run the programs share: where the programs are, small data, a runner.

A test file defines functions test_*; main() runs them in order of the file and says which failed.
Everything a test writes goes to a folder of its own that is removed afterwards."""

import contextlib
import gzip
import json
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import traceback

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
BUILD = os.environ.get("LOCKSTEP_BUILD", os.path.join(ROOT, "build"))
LOCKSTEP = os.path.join(BUILD, "lockstep")
TIMEOUT_S = 120  # of one program; far beyond what any takes, so that a hang is a failure


class Skip(Exception):
    """Raised by a test that this machine cannot run; the text says why."""


class Result:
    def __init__(self, code, out, err):
        self.code, self.out, self.err = code, out, err

    def __repr__(self):
        return f"exit code {self.code}\n--- stdout\n{self.out}\n--- stderr\n{self.err}"


def run(*command, code=0, env=None, timeout=TIMEOUT_S, **options):
    """Runs a program to its end and checks its exit code (None: any)."""
    command = [str(word) for word in command]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout,
                          stdin=subprocess.DEVNULL, env={**os.environ, **(env or {})}, **options)
    result = Result(done.returncode, done.stdout, done.stderr)
    assert code is None or result.code == code, f"{' '.join(command)}: expected {code}, {result}"
    return result


def lockstep(*arguments, **options):
    return run(LOCKSTEP, *arguments, **options)


def train(name, output, *arguments, **options):
    """lockstep train; returns its report."""
    lockstep("train", name, "--output", output, "--quiet", *arguments, **options)
    return report_of(output)


def report_of(output):
    with open(os.path.join(output, "report.json")) as file:
        return json.load(file)


def sanitized():
    with open(os.path.join(BUILD, "CMakeCache.txt")) as file:
        return re.search(r"^LOCKSTEP_SANITIZE:.*=.", file.read(), re.MULTILINE) is not None


def contains(text, *parts):
    for part in parts:
        assert part in text, f"'{part}' is not in:\n{text}"


def equal(left, right, what=""):
    assert left == right, f"{what}: {left!r} != {right!r}"


# --- Small data ---


def write_idx(path, shape, content, magic=None, compress=False):
    header = struct.pack(">HBB", 0, 8, len(shape)) if magic is None else struct.pack(">I", magic)
    header += struct.pack(f">{len(shape)}I", *shape)
    with (gzip.open if compress else open)(path, "wb") as file:
        file.write(header + bytes(content))


def make_idx_folder(folder, train_rows=150, test_rows=45, classes=10, compress=False):
    """A data set in the format of MNIST: 28 x 28 images, each class a bright band and noise."""
    os.makedirs(folder, exist_ok=True)
    generator = random.Random(7)
    for prefix, rows in (("train", train_rows), ("t10k", test_rows)):
        labels = [generator.randrange(classes) for _ in range(rows)]
        images = bytearray()
        for label in labels:
            image = bytearray(generator.randbytes(28 * 28))
            for i in range(28 * 28):
                image[i] = image[i] % 64 + (190 if i // 28 in (2 * label, 2 * label + 1) else 0)
            images += image
        end = ".gz" if compress else ""
        write_idx(f"{folder}/{prefix}-images-idx3-ubyte{end}", (rows, 28, 28), images,
                  compress=compress)
        write_idx(f"{folder}/{prefix}-labels-idx1-ubyte{end}", (rows,), labels, compress=compress)
    return folder


def make_csv(path, rows=60, classes=0):
    """Columns a, b, c and a target: a - 2 b + 0.5, or which of `classes` thirds a is in."""
    generator = random.Random(3)
    with open(path, "w") as file:
        file.write("a,b,target,c\n")
        for _ in range(rows):
            a, b, c = (generator.uniform(-1, 1) for _ in range(3))
            target = int((a + 1) / 2 * classes) if classes else a - 2 * b + 0.5
            file.write(f"{a:.6f},{b:.6f},{target:.6f},{c:.6f}\n" if not classes
                       else f"{a:.6f},{b:.6f},{target},{c:.6f}\n")
    return path


# --- Processes ---


def processes(text):
    """Ids of the processes whose environment or command line holds `text`."""
    found = []
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) == os.getpid():
            continue
        try:
            with open(f"/proc/{name}/cmdline", "rb") as file:
                content = file.read()
            with open(f"/proc/{name}/environ", "rb") as file:
                content += b"\0" + file.read()
            with open(f"/proc/{name}/stat") as file:
                state = file.read().rsplit(")", 1)[1].split()[0]
        except OSError:
            continue
        if text.encode() in content and state != "Z":
            found.append(int(name))
    return found


def name_of(pid):
    try:
        with open(f"/proc/{pid}/comm") as file:
            return file.read().strip()
    except OSError:
        return None


@contextlib.contextmanager
def memory_limit(limit_bytes):
    """A control group (version 2) with a memory limit, as the words to start a command in it with.
    Skips the test where none can be made."""
    with open("/proc/self/cgroup") as file:
        own = [line.strip()[3:] for line in file if line.startswith("0::/")]
    parent = "/sys/fs/cgroup" + (own[0] if own else "/")
    while True:  # only a group without processes of its own can have one with a limit below it
        group = f"{parent}/lockstep-test-{os.getpid()}"
        try:
            with open(f"{parent}/cgroup.subtree_control") as file:
                found = "memory" in file.read().split()
            if found:
                os.mkdir(group)
                break
        except OSError:
            pass
        if parent == "/sys/fs/cgroup":
            raise Skip("no control group (version 2) with a memory limit can be made here")
        parent = os.path.dirname(parent)
    try:
        for name, value in (("memory.max", limit_bytes), ("memory.swap.max", 0)):
            if name == "memory.max" or os.path.exists(f"{group}/{name}"):
                with open(f"{group}/{name}", "w") as file:
                    file.write(str(value))
        yield ["sh", "-c", f'echo $$ > "{group}/cgroup.procs" && exec "$@"', "sh"]
    finally:
        os.rmdir(group)


# --- What a job leaves behind ---


def check_trace(path, ranks):
    """A Chrome trace with a named process a rank; {rank: its operations in order}. Each rank's have
    all the sequence numbers from 0 on, once, in the order of time."""
    with open(path) as file:
        events = json.load(file)["traceEvents"]
    names = {event["pid"]: event["args"]["name"] for event in events
             if event["name"] == "process_name"}
    equal(names, {rank: f"rank {rank}" for rank in range(ranks)}, "processes of the trace")
    found = {rank: [] for rank in range(ranks)}
    for event in events:
        assert event["ph"] in "XM", event
        if event["ph"] == "X":
            assert event["ts"] >= 0 and event["dur"] >= 0, event
            assert {"call", "tag", "dtype", "bytes", "state"} <= set(event["args"]), event
            found[event["pid"]].append(event)
    for rank, operations in found.items():
        operations.sort(key=lambda event: event["args"]["sequence"])
        equal([event["args"]["sequence"] for event in operations], list(range(len(operations))),
              f"sequence numbers of rank {rank}")
        times = [event["ts"] for event in operations]
        equal(times, sorted(times), f"times of rank {rank}")
    left = [name for name in os.listdir(os.path.dirname(path))
            if name.startswith(os.path.basename(path)) and name != os.path.basename(path)]
    equal(left, [], "parts of the trace that are left")
    return found


def check_flight_record(path, ranks):
    """The dump of a failed job; its ranks. Each has its newest operations, with nothing missing but
    one that a killed rank had only begun to write."""
    with open(path) as file:
        found = json.load(file)["ranks"]
    equal([rank["rank"] for rank in found], list(range(ranks)), "ranks of the flight record")
    for rank in found:
        begun = rank["operations_begun"]
        wanted = list(range(max(1, begun - 1023), begun + 1))
        serials = [operation["serial"] for operation in rank["operations"]]
        assert serials in (wanted, wanted[:-1]), f"rank {rank['rank']}: {serials}, {begun} begun"
        for operation in rank["operations"][:-1]:
            equal(operation["state"], "done", f"an operation before the last: {operation}")
    return found


# --- Running ---


def main(tests):
    """Runs the functions named test_* (or those named on the command line), each in a folder. Ends
    with 0, with 1 if any failed, with 77 if this machine could run none of them."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    assert os.path.exists(LOCKSTEP), f"there is no {LOCKSTEP}: build first, or set LOCKSTEP_BUILD"
    chosen = sys.argv[1:]
    unknown = [name for name in chosen if name not in tests]
    assert not unknown, f"there is no {unknown}"
    ran, failed, skipped = 0, [], 0
    for name, test in list(tests.items()):
        if not name.startswith("test_") or (chosen and name not in chosen):
            continue
        ran += 1
        folder = tempfile.mkdtemp(prefix="lockstep-test-")
        try:
            test(folder)
            print(f"ok       {name}", flush=True)
        except Skip as reason:
            skipped += 1
            print(f"skipped  {name}: {reason}", flush=True)
        except Exception:
            failed.append(name)
            print(f"FAILED   {name}\n{traceback.format_exc(limit=-3)}", flush=True)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    print(f"{len(failed)} failed{': ' + ', '.join(failed) if failed else ''}, {skipped} skipped")
    sys.exit(1 if failed else 77 if skipped == ran else 0)
