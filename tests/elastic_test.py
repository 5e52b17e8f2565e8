"""Workers die, hang, run out of memory, come and go at any moment; the job goes on, and ends with
the very weights of an undisturbed one."""

import json
import os
import signal
import time

from elastic import Job, running
from harness import BUILD, contains, equal, lockstep, main

MOMENTS = ["start", "computed", "sealed", "decided", "updating", "committed"]


def test_a_kill_of_each_rank_at_every_moment_of_a_step(folder):
    job = Job(folder, epochs=20)
    faults = [f"kill rank={rank} step={4 + 5 * (3 * number + rank)} when={when}"
              for number, when in enumerate(MOMENTS) for rank in range(3)]
    report = job.survives(*faults, arguments=["--max-restarts", 100])
    for recovery in report["recoveries"]:
        contains(recovery["cause"], "SIGKILL")
        equal(recovery["source"], "segment")
    redone = [recovery["steps_redone"] for recovery in report["recoveries"]]
    assert 1 in redone and 0 in redone, redone  # before the decision, after it


def test_the_first_and_the_last_step(folder):
    job = Job(folder)
    for when in ("start", "sealed", "committed"):
        job.survives(f"kill rank=1 step=1 when={when}", f"kill rank=0 step={job.steps} when={when}",
                     workers=2)


def test_two_at_once_and_all_at_once(folder):
    job = Job(folder)
    job.survives("kill rank=0 step=7", "kill rank=2 step=7", deaths=2)
    for when in ("sealed", "committed"):
        job.survives(*(f"kill rank={rank} step=9 when={when}" for rank in range(3)), deaths=3)


def test_a_kill_during_recovery(folder):
    job = Job(folder)
    for when in ("sealed", "decided"):  # the step is done again, or forward
        job.survives(f"kill rank=1 step=7 when={when}",
                     *["kill rank=0 step=7 when=recovering"] * 3)


def test_a_kill_during_evaluation_and_checkpoint(folder):
    job = Job(folder)
    job.survives("kill rank=1 step=5 when=evaluating", "kill rank=0 step=10 when=evaluating",
                 "kill rank=0 step=12 when=checkpoint",
                 arguments=["--set", "checkpoint.every_steps=2"])


def test_workers_that_hang(folder):
    job = Job(folder)
    report = job.survives("stop rank=1 step=4", "loop rank=0 step=8 when=decided",
                          "deadlock rank=2 step=12 when=sealed",
                          arguments=["--hang-timeout", 1])
    for recovery in report["recoveries"]:
        assert recovery["seconds"] < 30, recovery


def test_other_ends_of_a_worker(folder):
    job = Job(folder)
    report = job.survives("kill rank=1 step=3 signal=SEGV", "exit rank=0 step=6 code=9",
                          "oom-kill rank=1 step=9", "kill rank=1 step=12 signal=TERM",
                          "out-of-memory rank=2 step=14")
    causes = " ".join(recovery["cause"] for recovery in report["recoveries"])
    contains(causes, "SIGSEGV", "exited with code 9", "SIGKILL", "SIGTERM",
             "out of memory: std::bad_alloc")


def test_a_mismatch_and_a_delay(folder):
    job = Job(folder)
    job.survives("delay rank=1 step=5 seconds=200ms", deaths=0)
    report = job.survives("mismatch rank=1 step=5", deaths=1)
    contains(report["recoveries"][0]["cause"], "injected mismatch")


def test_fewer_and_more_workers(folder):
    job = Job(folder)
    # Nobody is replaced: with what is left it goes on.
    report = job.survives("kill rank=1 step=4", "kill rank=0 step=9", workers="1:3",
                          arguments=["--max-restarts", 0])
    equal([recovery["steps_redone"] <= 1 for recovery in report["recoveries"]], [True, True])
    job.survives("kill rank=0 step=4", "kill rank=2 step=9", workers="1:3")
    job.survives("kill rank=0 step=4", "kill rank=1 step=9", workers=2,
                 arguments=["--standby", 1])


def test_workers_are_added_and_removed_while_it_runs(folder):
    job = Job(folder, epochs=40)
    delays = [word for step in range(4, 200, 4)
              for word in ("--inject", f"delay rank=0 step={step} seconds=200ms")]
    counts = [3, 1, 2, 1]
    with running(job.command("--workers", "1:3", *delays), folder) as program:
        program.wait_for("injected: delay")
        for count in counts[1:]:
            generation = members(job.output)[-1][0]
            lockstep("scale", job.output, count)
            program.wait_for("injected: delay", 1 + sum("injected: delay" in line
                                                        for line in program.lines))
            deadline = time.monotonic() + 60
            while members(job.output)[-1] != (generation + 1, count):
                assert time.monotonic() < deadline, members(job.output)
                time.sleep(0.02)
        program.end(0)
    equal([count for _, count in members(job.output)], counts)
    job.check(job.output)


def members(output):
    """(generation, how many) of each generation so far."""
    with open(f"{output}/events.jsonl") as file:
        events = [json.loads(line) for line in file.read().splitlines()]
    return [(event["generation"], len(event["ranks"])) for event in events
            if event["event"] == "generation"]


def test_too_many_restarts_end_the_job_with_the_reason(folder):
    job = Job(folder)
    faults = [word for step in (3, 5, 7)
              for word in ("--inject", f"kill rank=1 step={step}")]
    done = lockstep(*job.command("--workers", 2, "--max-restarts", 2, *faults)[1:], code=1)
    contains(done.err, "restart", "SIGKILL")
    lockstep("train", "--resume", job.output)
    job.check(job.output)


def test_preemption_saves_and_the_rest_is_exact(folder):
    job = Job(folder)
    command = job.command("--workers", 2, "--inject", "delay rank=1 step=7 seconds=1s")
    with running(command, folder) as program:
        program.wait_for("injected: delay")
        program.kill(signal.SIGTERM)
        program.end(75)
        program.gone_within(1)
    saved = max(os.listdir(f"{job.output}/checkpoints"))
    equal(saved, "step-00000007")
    lockstep("train", "--resume", job.output)
    job.check(job.output)


def agent_killed(folder, fault, victims):
    job = Job(folder)
    command = job.command("--workers", 3, "--set", "checkpoint.every_steps=2", "--inject", fault)
    with running(command, folder) as program:
        program.wait_for("injected: ")
        program.kill(signal.SIGKILL)
        program.gone_within(2)
    done = lockstep("train", "--resume", job.output, "--workers", victims)
    contains(done.out, "going on from step")
    job.check(job.output)


def test_a_killed_agent_leaves_nothing_behind(folder):
    agent_killed(folder, "delay rank=1 step=9 seconds=100s", 3)


def test_a_killed_agent_of_a_stopped_worker(folder):
    agent_killed(folder, "stop rank=0 step=9 when=decided", 1)


def test_a_full_disk_ends_the_job_and_says_so(folder):
    job = Job(folder)
    done = lockstep(*job.command("--workers", 2, "--inject", "full-disk step=6", "--set",
                                 "checkpoint.every_steps=1")[1:], code=1)
    contains(done.err, " not saved, older ones are whole: cannot write ", "File too large")
    lockstep("train", "--resume", job.output)
    job.check(job.output)


def test_a_program_of_ones_own(folder):
    def last_line(*faults):
        words = [word for fault in faults for word in ("--inject", fault)]
        done = lockstep("run", "--nproc-per-node", 3, "--max-restarts", 10, *words,
                        f"{BUILD}/example-elastic", 60)
        line = done.out.strip().split("\n")[-1]
        contains(line, "60 steps on 3 workers")
        return line.split("weights ")[1]
    whole = last_line()
    equal(last_line("kill rank=0 step=1", "kill rank=1 step=20 when=updating",
                    "kill rank=2 step=40 when=decided", "kill rank=1 step=60 when=committed"),
          whole, "weights")
    equal(last_line(*(f"kill rank={rank} step=30 when=sealed" for rank in range(3))), whole,
          "weights after all died at once")


def test_wrong_faults_are_refused(folder):
    for arguments, words in (
            (["--inject", "kil rank=1 step=3"], ["no fault of this name", "did you mean kill?"]),
            (["--inject", "kill rank=1"], ["step is missing", "hint: kill rank= step="]),
            (["--inject-file", f"{folder}/none"], ["--inject-file: cannot read", "hint:"])):
        done = lockstep("train", "linear-regression", "--output", f"{folder}/out", *arguments,
                        code=2)
        contains(done.err, *words)
        assert not os.path.exists(f"{folder}/out/job.toml")
        contains(lockstep("run", *arguments, "true", code=2).err, *words)


if __name__ == "__main__":
    main(globals())
