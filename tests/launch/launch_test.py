"""Workers under every launcher: lockstep run, torchrun, mpirun, srun's environment, alone."""

import glob
import os
import re
import shutil
import subprocess
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from harness import (BUILD, LOCKSTEP, ROOT, Result, Skip, check_flight_record, check_trace,
                     contains, equal, lockstep, main, memory_limit, processes, run, sanitized)

WORKER = os.path.join(BUILD, "cluster_worker")
LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_", "OMPI_",
             "PMIX_", "PMI_", "SLURM_", "LOCKSTEP_LAUNCHER", "LOCKSTEP_SEGMENT", "LOCKSTEP_EVENT")


def clean_environment(**variables):
    """This process's environment without what a launcher around the tests may have set."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS)}
    return {**kept, **variables}


def together(*commands):
    """Runs (environment, command) pairs at the same time; their results."""
    started = [subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
               for environment, command in commands]
    results = []
    for process in started:
        out, err = process.communicate(timeout=120)
        results.append(Result(process.returncode, out, err))
    return results


def sums(text):
    return sorted(re.findall(r"rank \d of \d by .*: sum .*", text))


def under_lockstep(folder, workers, *arguments, code, prefix=(), **options):
    return run(*prefix, LOCKSTEP, "run", "--nproc-per-node", workers, WORKER, *arguments, code=code,
               cwd=folder, **options)


def flight_record(folder, ranks):
    (path,) = glob.glob(f"{folder}/flight_recorder-*.json")
    return check_flight_record(path, ranks)


# --- lockstep run ---


def test_lockstep_run(folder):
    for workers, sum_of_ranks in ((1, 0), (2, 1), (4, 6)):
        result = under_lockstep(folder, workers, "sum", code=0)
        equal(sorted(result.out.strip().split("\n")),
              [f"[rank {rank}] rank {rank} of {workers} by lockstep run: sum {sum_of_ranks}"
               for rank in range(workers)])
        equal(result.err, "")
    equal(os.listdir(folder), [], "files that are left")


def test_a_crash_is_blamed_on_the_rank_that_crashed(folder):
    result = under_lockstep(folder, 3, "crash", 1, code=1)
    last = result.err.strip().split("\n")[-1]
    assert re.fullmatch(r"lockstep: rank 1 \(pid \d+\): killed by signal 9 \(SIGKILL\)", last), last
    ended = flight_record(folder, 3)[1]["operations"][-1]
    equal((ended["call"], ended["state"]), ("barrier(tag 'start')", "done"))


def test_a_killed_ranks_last_operations_are_in_the_flight_record(folder):
    result = under_lockstep(folder, 3, "kill", 0, code=1)
    contains(result.err, "): killed by signal 9 (SIGKILL)", "rank 0 (pid ", ", dead): in operation "
             "2 of generation 0, all_reduce(float32 × 8, sum, tag 'ranks'), for ",
             "operations of every rank: flight_recorder-")
    killed, killer, peer = flight_record(folder, 3)
    equal(killed["process"], "dead")
    equal([(operation["operation"], operation["tag"], operation["state"])
           for operation in killed["operations"]],
          [("join", "", "done"), ("barrier", "start", "done"), ("all_reduce", "ranks", "open")])
    last = killed["operations"][-1]
    equal((last["sequence"], last["count"], last["bytes"], last["end_ns"]), (2, 8, 32, None))
    equal([operation["tag"] for operation in killer["operations"]], ["", "start"])
    # The one that waited for both has heard of it, or was ended while it waited.
    assert peer["operations"][-1]["state"] in ("failed", "open"), peer["operations"][-1]


def test_a_trace_has_every_operation_of_every_rank(folder):
    under_lockstep(folder, 3, "sum", code=0, env={"LOCKSTEP_TRACE": "trace.json"})
    for rank, operations in check_trace(f"{folder}/trace.json", 3).items():
        equal([(event["name"], event["args"]["tag"], event["args"]["state"])
               for event in operations],
              [("join", "", "done"), ("barrier", "start", "done"),
               ("all_reduce", "ranks", "done")], f"rank {rank}")


def test_a_trace_is_whole_when_a_rank_is_killed(folder):
    under_lockstep(folder, 3, "kill", 0, code=1, env={"LOCKSTEP_TRACE": "trace.json"})
    killed, killer, peer = check_trace(f"{folder}/trace.json", 3).values()
    equal([(event["name"], event["args"]["state"]) for event in killed],
          [("join", "done"), ("barrier", "done"), ("all_reduce", "open")])
    equal(len(killer), 2)
    assert peer[-1]["args"]["state"] in ("failed", "open"), peer[-1]


def test_an_exit_code_and_the_last_words(folder):
    contains(under_lockstep(folder, 2, "exit", 1, 7, code=1).err, "lockstep: rank 1 (pid ",
             "): exited with code 7")
    result = lockstep("run", "--nproc-per-node", 2, "sh", "-c",
                      "echo good; echo bad >&2; exit $((RANK * 5))", code=1)
    contains(result.err, "[rank 1] bad", "exited with code 5\n  bad\n")
    contains(result.out, "[rank 1] good")


def test_a_mismatch_quotes_both_calls(folder):
    result = under_lockstep(folder, 2, "mismatch", code=1)
    contains(result.err, "failed: ", "lockstep: rank ", "exited with code 1",
             "the ranks' calls differ: rank 0 called all_reduce(float32 × 4, sum, tag 'ranks'), "
             "rank 1 called all_reduce(float32 × 8, sum, tag 'ranks')")
    states = [rank["operations"][-1]["state"] for rank in flight_record(folder, 2)]
    assert set(states) in ({"failed"}, {"failed", "open"}), states  # open: the other ended it


def test_a_rank_that_never_comes_is_named(folder):
    result = under_lockstep(folder, 2, "hang", 1, code=1)
    contains(result.err, "failed: ", "waiting for rank 1, last seen after operation 1, "
             "barrier(tag 'start'), ", ", alive)", "lockstep: rank 0")


def test_a_stopped_rank_is_named_as_stopped(folder):
    result = under_lockstep(folder, 2, "stop", 1, code=1)
    contains(result.err, "failed: ", "waiting for rank 1, last seen after operation 1, "
             "barrier(tag 'start'), ", ", stopped by a signal)", "lockstep: rank 0")


# --- Too little memory ---


def test_limits_of_the_process_are_errors(folder):
    limits = [("--fsize=1000000", "RLIMIT_FSIZE")]
    if not sanitized():  # a sanitizer maps terabytes
        limits.append(("--as=100000000", "RLIMIT_AS"))
    for limit, name in limits:
        result = under_lockstep(folder, 2, "sum", code=1, prefix=("prlimit", limit))
        assert re.fullmatch(r"lockstep: no room for the shared memory segment: [\d.]+ \wiB needed, "
                            rf"[\d.]+ \wiB left of .*\({name}\) of .*; hint: ulimit .*\n",
                            result.err), result.err


def test_more_than_the_machine_has_is_an_error(folder):
    result = under_lockstep(folder, 2, "memory", 1 << 45, code=1)
    contains(result.err, "the test's data", "32.00 TiB needed", "hint: ")


def test_a_memory_limit_is_an_error(folder):
    with memory_limit(256 << 20) as prefix:
        result = under_lockstep(folder, 2, "memory", 1 << 30, code=1, prefix=prefix)
    contains(result.err, "not enough memory for the test's data: 1.00 GiB needed, ", " free "
             "(limited by the memory limit of control group ", "hint: ", "exited with code 1")


# --- Other launchers ---


def test_alone(folder):
    result = run(WORKER, "sum", env=clean_environment())
    equal(result.out, "rank 0 of 1 by no launcher: sum 0\n")


def test_torchrun(folder):
    torchrun = shutil.which("torchrun", path=f"{ROOT}/.deps/bin:{os.environ['PATH']}")
    if torchrun is None:
        raise Skip("torchrun is not installed")
    result = run(torchrun, "--standalone", "--nproc-per-node=2", "--no-python", WORKER, "sum")
    equal(sums(result.out), [f"rank {rank} of 2 by torchrun: sum 1" for rank in (0, 1)])


def mpirun(folder, workers):
    program = shutil.which("mpirun")
    if program is None:
        raise Skip("mpirun is not installed")
    root = ["--allow-run-as-root"] if os.getuid() == 0 else []
    # Two that start at once trip over each other's session folder if they share one.
    own = f"{folder}/{workers}"
    os.mkdir(own)
    return (clean_environment(TMPDIR=own),
            [program, *root, "--oversubscribe", "-n", str(workers), WORKER, "sum"])


def test_mpirun(folder):
    for workers, sum_of_ranks in ((1, 0), (3, 3)):
        (result,) = together(mpirun(folder, workers))
        equal(sums(result.out),
              [f"rank {rank} of {workers} by mpirun: sum {sum_of_ranks}" for rank in
               range(workers)], result)


def test_two_mpiruns_at_once_are_kept_apart(folder):
    first, second = together(mpirun(folder, 2), mpirun(folder, 3))
    equal(sums(first.out), [f"rank {rank} of 2 by mpirun: sum 1" for rank in range(2)], first)
    equal(sums(second.out), [f"rank {rank} of 3 by mpirun: sum 3" for rank in range(3)], second)


def slurm(rank, size, job):
    """What srun sets for one task of a step on one node."""
    return clean_environment(SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank), SLURM_NODEID="0",
                             SLURM_NTASKS=str(size), SLURM_STEP_NUM_TASKS=str(size),
                             SLURM_STEP_TASKS_PER_NODE=str(size), SLURM_JOB_ID=job,
                             SLURM_STEP_ID="0", SLURM_STEP_NUM_NODES="1")


def test_sruns_environment(folder):
    job = f"test-{os.getpid()}"
    results = together(*[(slurm(rank, 2, job), [WORKER, "sum"]) for rank in (0, 1)])
    equal([result.out for result in results],
          [f"rank {rank} of 2 by srun: sum 1\n" for rank in (0, 1)], results)


def test_a_peers_death_is_noticed_without_an_agent(folder):
    job = f"test-crash-{os.getpid()}"
    survivor, victim = together(*[(slurm(rank, 2, job), [WORKER, "crash", "1"])
                                  for rank in (0, 1)])
    equal(victim.code, -9)
    equal(survivor.code, 1, survivor)
    contains(survivor.err, "failed: ", "rank 1")


def test_several_nodes_are_refused(folder):
    (result,) = together(({**slurm(0, 4, "17"), "SLURM_STEP_TASKS_PER_NODE": "2(x2)"},
                          [WORKER, "sum"]))
    equal(result.code, 1)
    contains(result.err, "srun started 4 workers, of which 2 on this node", "hint:")


def test_nothing_is_left_behind(folder):
    mark = f"LOCKSTEP_TEST_MARK={folder}"
    lockstep("run", "--nproc-per-node", 2, "sh", "-c",
             "setsid sh -c 'sleep 1000 & wait' & sleep 1000 & exit 0",
             env={"LOCKSTEP_TEST_MARK": folder})
    equal(processes(mark), [], "processes left behind")


if __name__ == "__main__":
    main(globals())
