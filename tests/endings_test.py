"""How a run can end before its time, leaving behind no process and no half-written file."""

import json
import os
import signal
import subprocess
import time

from harness import (LOCKSTEP, Result, Skip, check_flight_record, check_trace, contains, equal,
                     lockstep, main, make_idx_folder, memory_limit, name_of, processes, report_of,
                     run, train)

ENDLESS = ["--workers", "2", "--set", "train.epochs=200000", "--set", "dataset.rows=20000"]


class Running:
    """A training without end, started in the background and known to have begun."""

    def __init__(self, folder, *arguments, env=None):
        self.output = f"{folder}/out"
        self.mark = f"LOCKSTEP_TEST_MARK={folder}"
        self.process = subprocess.Popen(
            [LOCKSTEP, "train", "linear-regression", "--output", self.output, *ENDLESS, *arguments],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "LOCKSTEP_TEST_MARK": folder, **(env or {})}, start_new_session=True)
        self.wait_for(lambda: self.metrics(), "a line of metrics")

    def wait_for(self, condition, what):
        deadline = time.monotonic() + 60
        while not condition():
            assert self.process.poll() is None, f"ended early: {self.end(None)}"
            assert time.monotonic() < deadline, f"no {what} after 60 s"
            time.sleep(0.01)

    def metrics(self):
        for folder in (self.output, *temporary_folders(self.output)):
            try:
                with open(f"{folder}/metrics.jsonl") as file:
                    return file.readlines()
            except OSError:
                continue
        return []

    def workers(self):
        """The processes that train."""
        return sorted(pid for pid in processes(self.mark) if name_of(pid) == "lockstep-worker")

    def end(self, code):
        out, err = self.process.communicate(timeout=60)
        result = Result(self.process.returncode, out, err)
        assert code is None or result.code in code, f"expected {code}: {result}"
        left = processes(self.mark)
        assert not left, f"processes left behind: {left}"
        return result


def temporary_folders(output):
    parent = os.path.dirname(output)
    return [f"{parent}/{name}" for name in os.listdir(parent) if os.path.basename(output) in name]


def whole_lines(path):
    with open(path) as file:
        text = file.read()
    assert text.endswith("\n") or not text, "a line was cut"
    return [json.loads(line) for line in text.split("\n")[:-1]]


def ended_by(folder, number, code):
    running = Running(folder)
    os.kill(running.process.pid, number)
    result = running.end([code])
    assert "Traceback" not in result.err and "terminate called" not in result.err, result
    assert whole_lines(f"{running.output}/metrics.jsonl")


def test_interrupt_ends_every_worker(folder):
    ended_by(folder, signal.SIGINT, 128 + signal.SIGINT)


def test_terminate_stops_after_the_step_and_saves(folder):
    ended_by(folder, signal.SIGTERM, 75)
    assert os.listdir(f"{folder}/out/checkpoints")


def test_interrupt_of_the_whole_process_group(folder):  # what Ctrl-C in a terminal sends
    running = Running(folder)
    os.killpg(running.process.pid, signal.SIGINT)
    running.end([128 + signal.SIGINT, -signal.SIGINT, 1])


def test_a_killed_agent_takes_its_workers_along(folder):
    running = Running(folder)
    running.process.kill()
    running.process.communicate(timeout=60)
    deadline = time.monotonic() + 60
    while processes(running.mark):
        assert time.monotonic() < deadline, f"left behind: {processes(running.mark)}"
        time.sleep(0.01)


def test_a_killed_worker_ends_the_job_with_its_rank_and_signal(folder):
    running = Running(folder, "--max-restarts", "0")
    victim = running.workers()[-1]
    os.kill(victim, signal.SIGKILL)
    result = running.end([1])
    contains(result.err, "rank ", f"pid {victim}", "signal 9",
             f"operations of every rank: {running.output}/flight_recorder.json")
    assert whole_lines(f"{running.output}/metrics.jsonl")
    ranks = check_flight_record(f"{running.output}/flight_recorder.json", 2)
    (killed,) = [rank for rank in ranks if rank["pid"] == victim]
    equal(killed["process"], "dead")
    contains(result.err, f"rank {killed['rank']} (pid {victim}, dead): ",
             killed["operations"][-1]["call"])
    for rank in ranks:  # both were in the same step, or one apart
        last = rank["operations"][-1]
        assert last["state"] in ("done", "open", "failed") and last["sequence"] > 0, last
    sequences = [rank["operations"][-1]["sequence"] for rank in ranks]
    assert abs(sequences[0] - sequences[1]) <= 1, sequences


def test_a_trace_of_a_training(folder):
    trace = f"{folder}/trace.json"
    train("linear-regression", f"{folder}/out", "--workers", 2, "--epochs", 2,
          env={"LOCKSTEP_TRACE": trace})
    rank_0, rank_1 = check_trace(trace, 2).values()
    assert rank_0, "no operation"
    for mine, theirs in zip(rank_0, rank_1, strict=True):
        equal(mine["args"]["state"], "done")
        equal((mine["name"], mine["args"]["call"]), (theirs["name"], theirs["args"]["call"]))


def test_a_trace_when_a_worker_is_killed(folder):
    trace = f"{folder}/trace.json"
    running = Running(folder, "--max-restarts", "0", env={"LOCKSTEP_TRACE": trace})
    os.kill(running.workers()[-1], signal.SIGKILL)
    running.end([1])
    lengths = [len(operations) for operations in check_trace(trace, 2).values()]
    # The other may be one ahead; and a call is announced, and answered, before it is recorded.
    assert min(lengths) > 0 and abs(lengths[0] - lengths[1]) <= 2, lengths


def test_a_stopped_worker_is_missed_after_the_timeout(folder):
    running = Running(folder, "--set", "workers.timeout_s=1", "--max-restarts", "0")
    victim = running.workers()[0]
    os.kill(victim, signal.SIGSTOP)
    try:
        result = running.end([1])
    finally:
        try:
            os.kill(victim, signal.SIGKILL)
        except ProcessLookupError:
            pass
    # Found by the other, whose wait is over, or by the agent.
    contains(result.err, "rank ", f"pid {victim}", "stopped by ")
    assert "gave up after 1." in result.err or "no progress for 1." in result.err, result


def test_a_killed_zygote_is_started_again(folder):
    running = Running(folder)

    def zygotes():
        return [pid for pid in processes(running.mark) if name_of(pid) == "lockstep-zygote"]
    (victim,) = zygotes()
    os.kill(victim, signal.SIGKILL)
    running.wait_for(lambda: zygotes() not in ([], [victim]), "another zygote")
    victim = running.workers()[0]  # and its workers are as good as the first one's
    os.kill(victim, signal.SIGKILL)
    running.wait_for(lambda: victim not in running.workers() and len(running.workers()) == 2,
                     "replacement")
    os.kill(running.process.pid, signal.SIGTERM)
    contains(running.end([75]).out, "recovered: rank ")


def test_limits_of_the_process_are_errors(folder):
    for limit, name in (("--as=100000000", "RLIMIT_AS"), ("--fsize=1000000", "RLIMIT_FSIZE")):
        result = run("prlimit", limit, LOCKSTEP, "train", "linear-regression", "--output",
                     f"{folder}/out", code=1)
        contains(result.err, "no room for the shared memory segment: ", " needed, ", " left of ",
                 name, "; hint: ulimit ")
        assert not os.path.exists(f"{folder}/out/job.toml"), "a run that never began left files"


def test_a_memory_limit_is_an_error(folder):
    # The snapshots of the weights (784 x 100,000, twice 300 MB) do not fit.
    data = make_idx_folder(f"{folder}/data", train_rows=40, test_rows=10)
    with memory_limit(1 << 30) as prefix:
        result = run(*prefix, LOCKSTEP, "train", "mnist", "--data", data, "--workers", 2, "--set",
                     "model.widths=[100000]", "--output", f"{folder}/out", code=1)
    assert ("not enough memory for " in result.err and " needed, " in result.err
            and "the memory limit of control group " in result.err and "hint: " in result.err
            or "perhaps out of memory" in result.err), result


def test_non_finite_loss_stops_and_keeps_the_last_good_weights(folder):
    table = f"{folder}/table.csv"
    with open(table, "w") as file:
        file.write("a,y\n" + "".join(f"{i % 7},{i % 5}\n" for i in range(40)))
    result = lockstep("train", "csv", "--data", table, "--set", "dataset.target=y", "--set",
                      "optimizer.name=sgd", "--set", "optimizer.lr=1e30", "--set",
                      "model.widths=[]", "--workers", 2, "--set", "train.batch_size=5",
                      "--output", f"{folder}/out", code=1)
    contains(result.err, "step 2", "rank ", "is inf", "hint:")
    # The weights that were kept are finite and can be used.
    lockstep("predict", f"{folder}/out", "--data", table, "--output", f"{folder}/p.csv")
    with open(f"{folder}/p.csv") as file:
        text = file.read()
    assert "nan" not in text and "inf" not in text, text
    equal(text.count("\n"), 41, "lines of predictions")


def on_a_full_disk(folder, kilobytes, script):
    """Runs a shell script with a small file system mounted at FOLDER/disk."""
    os.mkdir(f"{folder}/disk")
    mount = f"mount -t tmpfs -o size={kilobytes}k none {folder}/disk"
    inside = ["unshare", "--mount", "--map-root-user", "sh", "-c"]
    if run(*inside, mount, code=None).code != 0:
        raise Skip("a file system cannot be mounted in a namespace of one's own here")
    return run(*inside, f"{mount} && {script}", code=None)


def test_full_disk(folder):
    # The weights (784 x 512, 1.6 MB) do not fit.
    data = make_idx_folder(f"{folder}/data", train_rows=40, test_rows=10)
    result = on_a_full_disk(folder, 600, (
        f"{LOCKSTEP} train mnist --data {data} --epochs 1 --set 'model.widths=[512]' "
        f"--output {folder}/disk/out; echo code $?; ls -A {folder}/disk/out"))
    contains(result.out, "code 1")
    contains(result.err, "No space left on device", f"{folder}/disk/out")
    listed = result.out.split("code 1\n")[1].split("\n")
    assert "model.safetensors" not in listed, f"half-written weights: {listed}"
    assert not [name for name in listed if "tmp" in name], f"temporary files: {listed}"


def test_full_disk_for_the_metrics(folder):
    result = on_a_full_disk(folder, 64, (
        f"{LOCKSTEP} train linear-regression --workers 1 --set train.epochs=200000 "
        f"--output {folder}/disk/out; echo code $?; cat {folder}/disk/out/metrics.jsonl"))
    contains(result.err, "No space left on device", f"{folder}/disk/out")
    for line in result.out.split("code 1\n")[1].strip().split("\n"):
        json.loads(line)


def test_full_disk_for_a_report_and_for_predictions(folder):
    result = on_a_full_disk(folder, 8, (
        f"cat /dev/zero > {folder}/disk/zeros 2> {folder}/ignored; {LOCKSTEP} train "
        f"linear-regression --quiet --epochs 1 --output {folder}/out "
        f"--report {folder}/disk/r.json; echo code $?; {LOCKSTEP} predict {folder}/out "
        f"--output {folder}/disk/p.csv; echo code $?; ls -A {folder}/disk"))
    contains(result.out, "code 1\n", "code 1\nzeros\n")
    for name in ("r.json", "p.csv"):
        contains(result.err, f"cannot write {folder}/disk/{name}: No space left on device")
    assert ".tmp" not in result.err, result


def test_stop_by_steps_and_tolerance(folder):
    steps = train("linear-regression", f"{folder}/steps", "--set", "train.max_steps=3")
    equal(len(steps["epochs"]), 1)
    calm = train("linear-regression", f"{folder}/calm", "--set", "train.epochs=500", "--set",
                 "train.tolerance=0.01")
    assert 1 < len(calm["epochs"]) < 500, len(calm["epochs"])
    equal(report_of(f"{folder}/calm"), calm)


if __name__ == "__main__":
    main(globals())
