"""lockstep run's and lockstep train's own side: flags, signals, folders, and what becomes of what
workers report. lockstep-worker is played by a script here, so that it can do what the real one
never does."""

import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import textwrap
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from harness import LOCKSTEP, contains, equal, lockstep, main, processes, run

# --- lockstep run ---


def test_torchruns_flags_in_both_spellings(folder):
    script = "echo $RANK $WORLD_SIZE $MASTER_ADDR $MASTER_PORT $TORCHELASTIC_RUN_ID $ROLE_NAME $1"
    for dash in "-_":
        flags = [flag.replace("-", dash) for flag in (
            "nproc-per-node=1", "nnodes=1:1", "node-rank=0", "max-restarts=0",
            "master-addr=10.0.0.1", "master-port=1234", "rdzv-id=seven", "rdzv-backend=c10d",
            "rdzv-endpoint=localhost:0", "rdzv-conf=", "monitor-interval=5", "start-method=spawn",
            "role=trainer", "local-addr=localhost", "event-log-handler=null",
            "shutdown-timeout=30", "standalone", "no-python")]
        result = lockstep("run", *[f"--{flag}" for flag in flags], "sh", "-c", script, "sh",
                          "--rank")
        equal(result.out, "[rank 0] 0 1 10.0.0.1 1234 seven trainer --rank\n")


def test_bad_flags(folder):
    for words, says in (
            (["--nproc-per-node", "0", "true"], ["--nproc-per-node 0", "hint:"]),
            (["--nproc-per-node", "many", "true"], ["--nproc-per-node many", "auto"]),
            (["--max-restarts", "-1", "true"], ["--max-restarts"]),
            (["--nproc-per-node", "3:2", "true"], ["--nproc-per-node 3:2", "MIN"]),
            (["--nproc-per-nod", "2", "true"], ["--nproc-per-nod", "--nproc-per-node"]),
            (["--log-dir", "logs", "true"], ["--log-dir", "hint:"]),
            (["--redirects", "3", "true"], ["--redirects", "log files", "hint:"]),
            (["-r", "3", "true"], ["--redirects", "hint:"]),
            (["--tee=3", "true"], ["--tee", "hint:"]),
            (["-t", "3", "true"], ["--tee", "hint:"]),
            (["--logs-specs", "x", "true"], ["--logs-specs", "hint:"]),
            (["--duplicate-stdout-filters", "x", "true"], ["--duplicate-stdout-filters", "hint:"]),
            (["--local_ranks_filter", "0", "true"], ["--local-ranks-filter", "hint:"]),
            (["--module", "package.module"], ["--module", "Python", "name the program"]),
            (["-m", "package.module"], ["--module", "name the program"]),
            (["--run-path", "/script.py"], ["--run-path", "name the program"]),
            (["--virtual-local-rank", "true"], ["--virtual-local-rank", "hint:"]),
            (["--signals-to-handle", "SIGTERM", "true"], ["--signals-to-handle", "hint:"]),
            (["--numa-binding", "node", "true"], ["--numa-binding", "hint:"]),
            (["--nproc-per-node", "gpu", "true"], ["no GPU in this version", "hint:"]),
            (["--role", "", "true"], ["--role", "empty"]),
            (["--shutdown-timeout", "-1", "true"], ["--shutdown-timeout -1"]),
            (["--master-port", "65536", "true"], ["65536"]),
            (["--master-port", "x", "true"], ["master-port"]),
            ([], ["no program", "hint:"]),
            (["./nowhere"], ["could not start ./nowhere", "No such file"])):
        result = lockstep("run", *words, code=2)
        contains(result.err, "lockstep: ", *says)
        equal(result.err.count("\n"), 1, result.err)


def test_help_and_version(folder):
    for words in ([], ["help"], ["--help"]):
        contains(lockstep(*words).out, "train", "predict", "run", "lockstep COMMAND --help")
    for command in ("run", "train", "predict"):
        contains(lockstep(command, "--help").out, f"Usage: lockstep {command}")
        equal(lockstep("help", command).out, lockstep(command, "--help").out)
    assert re.fullmatch(r"lockstep \d+\.\d+\.\d+\n", lockstep("--version").out)
    contains(lockstep("rnu", code=2).err, "unknown command rnu; hint: did you mean run?")


def test_each_worker_a_core(folder):
    result = lockstep("run", "--nproc-per-node", "auto", "sh", "-c", "echo $WORLD_SIZE")
    equal(result.out.count("\n"), len(os.sched_getaffinity(0)))


def test_signals_end_the_job_with_their_number(folder):
    mark = f"LOCKSTEP_TEST_MARK={folder}"
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        process = subprocess.Popen(
            [LOCKSTEP, "run", "--nproc-per-node", "2", "sh", "-c", "echo up; exec sleep 1000"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "LOCKSTEP_TEST_MARK": folder})
        for _ in range(2):
            contains(process.stdout.readline(), "up")
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
        equal(process.returncode, 128 + number, err)
        equal(err, f"lockstep: ended by signal {int(number)} ({number.name})\n")
        equal(processes(mark), [], "processes left behind")


def test_a_reader_that_goes_away_ends_the_job(folder):
    process = subprocess.Popen([LOCKSTEP, "run", "sh", "-c", "while echo more; do :; done"],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    err = process.stderr.read().decode()
    equal(process.wait(timeout=60), 1)
    contains(err, "cannot write to standard output: Broken pipe")


def wait_until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "not within 60 s"
        time.sleep(0.01)


def is_full(pipe):
    return not select.select([], [pipe], [], 0)[1]


def ended_with_a_full_pipe(command, folder):
    """SIGTERM ends the agent and its workers while nobody reads what they print."""
    reading, writing = os.pipe()
    try:
        process = subprocess.Popen(command, stdout=writing, stderr=writing,
                                   env={**os.environ, "LOCKSTEP_TEST_MARK": folder})
        wait_until(lambda: is_full(writing))
        process.send_signal(signal.SIGTERM)
        equal(process.wait(timeout=60), 128 + signal.SIGTERM)
        equal(processes(f"LOCKSTEP_TEST_MARK={folder}"), [], "processes left behind")
    finally:
        os.close(reading)
        os.close(writing)


def test_a_reader_that_never_reads_holds_up_no_signal(folder):
    ended_with_a_full_pipe([LOCKSTEP, "run", "--nproc-per-node", "2", "yes"], folder)


def test_a_second_signal_does_not_wait(folder):
    # The workers ignore SIGTERM, and the time between it and SIGKILL is longer than the test's.
    process = subprocess.Popen(
        [LOCKSTEP, "run", "--shutdown-timeout", "1000", "sh", "-c",
         "trap 'echo asked' TERM; echo up; while :; do sleep 0.01; done"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "LOCKSTEP_TEST_MARK": folder})
    for says in ("up", "asked"):
        contains(process.stdout.readline(), says)
        process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    equal(process.returncode, 128 + signal.SIGTERM)
    equal(processes(f"LOCKSTEP_TEST_MARK={folder}"), [], "processes left behind")


def test_a_stopped_worker_hears_of_the_end(folder):
    process = subprocess.Popen(
        [LOCKSTEP, "run", "--shutdown-timeout", "1000", "sh", "-c", "echo $$; kill -STOP $$"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    worker = process.stdout.readline().split()[-1]

    def stopped():
        with open(f"/proc/{worker}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] == "T"
    wait_until(stopped)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    equal(process.returncode, 128 + signal.SIGTERM)


def test_more_than_is_kept_comes_whole(folder):
    process = subprocess.Popen(
        [LOCKSTEP, "run", "sh", "-c", "seq 300000"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    out, err = process.communicate(timeout=60)
    equal(process.returncode, 0, err)
    equal(out, "".join(f"[rank 0] {i}\n" for i in range(1, 300001)))


# --- lockstep train, with a worker of our own ---

WORKER = textwrap.dedent("""\
    #!/usr/bin/env python3
    import array, json, os, signal, socket, struct, sys
    zygote = socket.socket(fileno=int(os.environ["LOCKSTEP_ZYGOTE_FD"]))
    while True:  # forks workers
        data, ancillary, _, _ = zygote.recvmsg(1 << 16, socket.CMSG_SPACE(16))
        if not data:
            sys.exit(0)
        fds = array.array("i", ancillary[0][2])
        between = os.fork()
        if between:
            os.waitpid(between, 0)
            for fd in fds:
                os.close(fd)
            continue
        worker = os.fork()
        if worker:
            os.setpgid(worker, worker)
            zygote.send(struct.pack("<i", worker))
            os._exit(0)
        zygote.close()
        os.dup2(fds[0], 1)
        os.dup2(fds[1], 2)
        os.environ.update(each.split("=", 1) for each in data.decode().split("\\0")[:-1])
        os.environ["LOCKSTEP_EVENT_FD"] = str(fds[2])
        break
    RANK = int(os.environ["RANK"])
    def send(event, **members):
        data = json.dumps({"event": event, **members}).encode()
        os.write(int(os.environ["LOCKSTEP_EVENT_FD"]), struct.pack("<I", len(data)) + data)
    def ready():
        send("ready", rank=RANK, train_samples=8, test_samples=0, parameters=3, steps_per_epoch=2,
             epochs=2)
    def epoch(number):
        if RANK == 0:
            send("first_step", rank=0, clock=0.0)
            send("epoch", epoch=number, step=2 * number, train_loss=0.5, grad_norm=1.0, lr=0.1,
                 samples=8 * number, seconds=1.0, eval_seconds=0.0)
    def snapshot(**members):
        send("snapshot", **{"epoch": 1, "sequence": 2, "sequence_offset": 0, "tensors": [],
                            **members})
    """)


def play(folder, script, *arguments, code):
    """lockstep train with workers that run `script`, writing to FOLDER/out."""
    programs = f"{folder}/programs"
    os.makedirs(programs, exist_ok=True)
    if not os.path.exists(f"{programs}/lockstep"):
        shutil.copy(LOCKSTEP, programs)
    with open(f"{programs}/lockstep-worker", "w") as file:
        file.write(WORKER + textwrap.dedent(script))
    os.chmod(f"{programs}/lockstep-worker", 0o755)
    return run(f"{programs}/lockstep", "train", "linear-regression", "--workers", "2",
               "--max-restarts", "0", "--output", f"{folder}/out", *arguments, code=code)


def test_the_users_mistake_is_told_once_and_leaves_nothing(folder):
    result = play(folder, """
        send("error", rank=RANK, kind="config", message="data.csv: no rows")
        sys.exit(2)""", "--output", f"{folder}/new/deep/out", code=2)
    equal(result.err, "lockstep: data.csv: no rows\n")
    assert not os.path.exists(f"{folder}/new"), "folders were left behind"


def test_a_death_before_the_start_leaves_nothing(folder):
    result = play(folder, """
        if RANK == 1: os.kill(os.getpid(), 9)
        signal.pause()""", code=1)
    contains(result.err, "rank 1 (pid ", "killed by signal 9 (SIGKILL)")
    assert not os.path.exists(f"{folder}/out"), "a folder was left behind"


def test_a_death_in_training_keeps_what_was_reached(folder):
    result = play(folder, """
        ready(); epoch(1)
        print("last words", file=sys.stderr, flush=True)
        os._exit(3)""", "--workers", "1", code=1)
    contains(result.err, "lockstep: rank 0 (pid ", "exited with code 3\n  last words\n")
    with open(f"{folder}/out/report.json") as file:
        report = json.load(file)
    contains(report["failed"], "rank 0 (pid ", "exited with code 3")
    equal(len(report["epochs"]), 1)
    equal(report["weights_sha256"], None)
    with open(f"{folder}/out/metrics.jsonl") as file:
        equal(json.loads(file.read())["epoch"], 1)


def test_a_failed_run_tells_its_own_error(folder):
    result = play(folder, """
        kind, text = ("run", "step 7: the loss is not finite") if RANK == 1 else (
            "comm", "rank 1 died")
        send("error", rank=RANK, kind=kind, message=text)
        sys.exit(1) if RANK == 1 else signal.pause()""", code=1)
    equal(result.err, "lockstep: step 7: the loss is not finite\n")


def test_what_workers_report_is_not_trusted(folder):
    for script, says in (  # one worker: what it says comes in order
            ("os.write(int(os.environ['LOCKSTEP_EVENT_FD']), b'\\xff' * 8)", "broken event"),
            ("epoch(1)", "before the workers were ready"),
            ("send('ready')", "broken event"),
            ("ready(); send('step', clock='late')", "broken event"),
            ("ready(); snapshot(sequence_offset=1 << 60)", "outside its arena"),
            ("ready(); snapshot(sequence_offset=-1)", "outside its arena"),
            ("ready(); snapshot(sequence='x')", "type must be number"),
            ("ready(); snapshot(); send('x')", "outside its arena"),
            ("ready()", "without a model")):
        result = play(folder, f"{script}\n", "--workers", "1", code=1)
        contains(result.err, "lockstep: ", says)
        equal(result.err.count("\n"), 1, result.err)
        shutil.rmtree(f"{folder}/out", ignore_errors=True)


def test_steps_that_are_read_before_another_ranks_ready(folder):
    os.mkfifo(f"{folder}/fifo")
    # More than a pipe holds: once it is sent, the agent has read what came before it.
    result = play(folder, f"""
        if RANK == 0:
            ready(); epoch(1); send("message", text="x" * 200000)
            open("{folder}/fifo", "w").close()
        else:
            open("{folder}/fifo").close()
            ready()""", code=1)
    contains(result.err, "without a model")
    with open(f"{folder}/out/metrics.jsonl") as file:
        equal(json.loads(file.read())["epoch"], 1)


def test_a_training_whose_output_nobody_reads_can_be_ended(folder):
    ready = 'ready(); sys.stdout.flush()\nwhile True: print("more", flush=True)\n'
    play(folder, "sys.exit(2)", code=1)
    with open(f"{folder}/programs/lockstep-worker", "w") as file:
        file.write(WORKER + ready)
    ended_with_a_full_pipe([f"{folder}/programs/lockstep", "train", "linear-regression",
                            "--workers", "2", "--output", f"{folder}/out"], folder)


def test_lines_and_messages_are_shown(folder):
    result = play(folder, """
        print("a line"); ready(); sys.stdout.flush()
        if RANK == 0: send("message", text="a message")
        os._exit(0)""", code=1)
    contains(result.out, "[rank 0] a line\n", "[rank 1] a line\n", "\na message\n")


# --- Output folders ---


def test_folders_that_are_refused(folder):
    os.mkdir(f"{folder}/out")
    with open(f"{folder}/out/notes.txt", "w") as file:
        file.write("mine")
    for arguments, says in (((), "--overwrite"), (("--overwrite",), "no earlier run")):
        result = play(folder, "", *arguments, code=2)
        contains(result.err, f"{folder}/out", says)
    contains(play(folder, "", "--output", f"{folder}/out/notes.txt", code=2).err, "notes.txt")
    contains(play(folder, "", "--output", f"{folder}/out/notes.txt/deeper", code=2).err,
             "notes.txt", "Not a directory")
    contains(play(folder, "", "--output", f"{folder}/other", "--report", f"{folder}/no/r.json",
                  code=2).err, "--report", f"{folder}/no")
    for name in ("model.safetensors", "job.toml", "metrics.jsonl"):
        contains(play(folder, "", "--output", f"{folder}/other", "--report",
                      f"{folder}/other/../other/{name}", code=2).err, "--report", name)
    for flag in ("--report", "--data", "--workers", "--output"):
        contains(play(folder, "", "--output", f"{folder}/other", flag, "", code=2).err,
                 flag, "empty value")
    assert not os.path.exists(f"{folder}/other"), "a folder was left behind"
    equal(os.listdir(f"{folder}/out"), ["notes.txt"])


def test_overwriting_keeps_the_old_run_until_the_new_one_starts(folder):
    out = f"{folder}/out"
    os.mkdir(out)
    old = ("job.toml", "report.json", "model.safetensors", "metrics.jsonl",
           "events.out.tfevents.1.old.1", "notes.txt")
    for name in old:
        with open(f"{out}/{name}", "w") as file:
            file.write("old")
    play(folder, "sys.exit(2)", "--overwrite", code=1)
    equal(sorted(os.listdir(out)), sorted(old))
    play(folder, "ready(); sys.exit(2)", "--overwrite", "--workers", "1", code=1)
    names = os.listdir(out)
    assert "model.safetensors" not in names and "events.out.tfevents.1.old.1" not in names, names
    assert "notes.txt" in names, "somebody else's file was removed"
    with open(f"{out}/job.toml") as file:
        contains(file.read(), 'recipe = "linear-regression"')


if __name__ == "__main__":
    main(globals())
