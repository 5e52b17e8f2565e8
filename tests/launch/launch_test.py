"""Workers under every launcher: lockstep run, torchrun, mpirun, srun's environment, alone."""

import os
import re
import shutil
import subprocess
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from harness import BUILD, ROOT, Result, Skip, contains, equal, lockstep, main, processes, run

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


def under_lockstep(workers, *arguments, code):
    return lockstep("run", "--nproc-per-node", workers, WORKER, *arguments, code=code)


# --- lockstep run ---


def test_lockstep_run(folder):
    for workers, sum_of_ranks in ((1, 0), (2, 1), (4, 6)):
        result = under_lockstep(workers, "sum", code=0)
        equal(sorted(result.out.strip().split("\n")),
              [f"[rank {rank}] rank {rank} of {workers} by lockstep run: sum {sum_of_ranks}"
               for rank in range(workers)])
        equal(result.err, "")


def test_a_crash_is_blamed_on_the_rank_that_crashed(folder):
    result = under_lockstep(3, "crash", 1, code=1)
    last = result.err.strip().split("\n")[-1]
    assert re.fullmatch(r"lockstep: rank 1 \(pid \d+\): killed by signal 9 \(SIGKILL\)", last), last


def test_an_exit_code_and_the_last_words(folder):
    contains(under_lockstep(2, "exit", 1, 7, code=1).err, "lockstep: rank 1 (pid ",
             "): exited with code 7")
    result = lockstep("run", "--nproc-per-node", 2, "sh", "-c",
                      "echo good; echo bad >&2; exit $((RANK * 5))", code=1)
    contains(result.err, "[rank 1] bad", "exited with code 5\n  bad\n")
    contains(result.out, "[rank 1] good")


def test_a_mismatch_quotes_both_calls(folder):
    result = under_lockstep(2, "mismatch", code=1)
    contains(result.err, "failed: ", "all_reduce", "lockstep: rank ", "exited with code 1")


def test_a_rank_that_never_comes_is_named(folder):
    result = under_lockstep(2, "hang", 1, code=1)
    contains(result.err, "failed: ", "rank 1", "ranks", "lockstep: rank 0")


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
