"""A run that was killed goes on as if nothing had happened: the same bits, on any number of
workers."""

import glob
import json
import os
import random
import shutil
import signal
import subprocess
import time

import tensorboard
from harness import (LOCKSTEP, contains, equal, lockstep, main, make_idx_folder, processes,
                     report_of, train)
from same_result_test import CNN, MLP, result


def checkpoints(output):
    """Steps of the checkpoints in a run's folder, in order."""
    return sorted(int(path[-8:]) for path in glob.glob(f"{output}/checkpoints/step-????????"))


def write_job(folder, text, *more):
    data = make_idx_folder(f"{folder}/data")
    with open(f"{folder}/job.toml", "w") as file:
        file.write(text)
    # A run without interruption, then the arguments that make the same run step by step.
    whole = train(f"{folder}/job.toml", f"{folder}/whole", "--data", data, *more)
    return whole, [LOCKSTEP, "train", f"{folder}/job.toml", "--data", data, "--output",
                   f"{folder}/out", "--set", "checkpoint.every_steps=1", "--set",
                   "checkpoint.keep=3", *more]


def kill_at(command, output, step, mark):
    """Starts a training and kills all of it, agent and workers, once the checkpoint of a step is
    there. Whether that came before its end."""
    process = subprocess.Popen(list(map(str, command)), stdin=subprocess.DEVNULL,
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                               env={**os.environ, "LOCKSTEP_TEST_MARK": mark})
    deadline = time.monotonic() + 100
    while max(checkpoints(output), default=0) < step and process.poll() is None:
        assert time.monotonic() < deadline, f"no step {step}: {checkpoints(output)}"
        time.sleep(0.002)
    mark = f"LOCKSTEP_TEST_MARK={mark}"
    while found := processes(mark):
        for pid in [process.pid] + found:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
    _, errors = process.communicate(timeout=60)
    assert process.returncode in (0, -signal.SIGKILL), errors
    return process.returncode != 0


def killed_and_resumed(folder, text, counts):
    whole, command = write_job(folder, text)
    steps = whole["epochs"][-1]["epoch"] * 5  # 150 samples in batches of 32
    out = f"{folder}/out"
    step, killed = 0, []
    for number, count in enumerate(counts):
        step = random.randrange(step + 1, max(steps * (number + 1) // len(counts), step + 2))
        killed.append(kill_at([*command, "--workers", count], out, step, f"{folder}/{number}"))
        step = max(checkpoints(out))
        command = [LOCKSTEP, "train", "--resume", out]
    assert any(killed), "every kill came too late"
    lockstep("train", "--resume", out)  # on as many workers as it was created with
    report = report_of(out)
    equal(result(report), result(whole), f"killed at steps before {steps}")
    equal([epoch["epoch"] for epoch in report["epochs"]],
          [epoch["epoch"] for epoch in whole["epochs"]])
    return out, report


def test_mlp_killed_and_resumed_on_other_numbers_of_workers(folder):
    out, report = killed_and_resumed(folder, MLP, [2, 1, 3])
    lines = [json.loads(line) for line in open(f"{out}/metrics.jsonl")]
    steps = [line["step"] for line in lines]
    equal(steps, sorted(steps), "steps of metrics.jsonl")
    epochs = [line for line in lines if line["event"] == "epoch"]
    equal([line["train_loss"] for line in epochs],
          [epoch["train_loss"] for epoch in report["epochs"]])
    boards = sorted(glob.glob(f"{out}/events.out.tfevents.*"))
    assert boards and all(list(tensorboard.records(board)) for board in boards)
    finished = lockstep("train", "--resume", out)
    contains(finished.out, f"the run in {out} is finished: 2 epochs")


def test_cnn_killed_and_resumed(folder):
    killed_and_resumed(folder, CNN, [4, 2])


def test_a_broken_checkpoint_is_skipped(folder):
    whole, command = write_job(folder, MLP, "--workers", "2")
    out = f"{folder}/out"
    kill_at(command, out, 4, folder)
    newest = max(checkpoints(out))
    shard = f"{out}/checkpoints/step-{newest:08}/shard-00000.safetensors"
    with open(shard, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    resumed = lockstep("train", "--resume", out)
    contains(resumed.out, f"skipped: {shard}", "changed since it was written",
             f"going on from step {newest - 1}, ")
    equal(result(report_of(out)), result(whole))


def test_a_run_without_a_checkpoint_starts_again(folder):
    whole, command = write_job(folder, MLP)
    out = f"{folder}/out"
    kill_at(command, out, 2, folder)
    shutil.rmtree(f"{out}/checkpoints")
    contains(lockstep("train", "--resume", out).out,
             "there is no whole checkpoint: training starts from the beginning")
    equal(result(report_of(out)), result(whole))


def test_another_job_is_refused(folder):
    _, command = write_job(folder, MLP, "--workers", "2")
    out = f"{folder}/out"
    kill_at(command, out, 2, folder)
    before = checkpoints(out)
    refused = lockstep("train", "--resume", out, "--set", "optimizer.lr=0.5", code=2)
    contains(refused.err, f"step-{max(before):08} is of another job: optimizer.lr is 0.5, "
             "in the checkpoint 0.001", "hint:")
    equal(checkpoints(out), before)
    contains(lockstep("train", "mnist", "--resume", out, code=2).err,
             "does not go with --resume", "hint:")
    contains(lockstep("train", "--resume", f"{folder}/data", code=2).err, "there is no run in",
             "hint:")


def test_the_last_and_the_best_are_kept(folder):
    data = make_idx_folder(f"{folder}/data")
    report = train("mnist", f"{folder}/out", "--data", data, "--epochs", 6, "--set",
                   "model.widths=[64]", "--set", "optimizer.lr=0.03")
    losses = [epoch["test_loss"] for epoch in report["epochs"]]
    best = losses.index(min(losses)) + 1
    equal(checkpoints(f"{folder}/out"), sorted({3 * best, 18}), f"of {losses}")
    train("mnist", f"{folder}/none", "--data", data, "--epochs", 1, "--set",
          "checkpoint.every_epochs=0")
    equal(os.path.exists(f"{folder}/none/checkpoints"), False)


def test_early_stopping(folder):
    data = make_idx_folder(f"{folder}/data")
    report = train("mnist", f"{folder}/out", "--data", data, "--epochs", 60, "--set",
                   "train.patience=2", "--set", "train.min_delta=0.5", "--set",
                   "model.widths=[8]")
    epochs = len(report["epochs"])
    assert 3 <= epochs < 60, report
    contains(report["stopped_because"], "the test loss did not become better in 2 epochs")
    accuracy = train("mnist", f"{folder}/accuracy", "--data", data, "--epochs", 60, "--set",
                     "train.patience=3", "--set", "train.monitor=test_accuracy")
    contains(accuracy["stopped_because"], "the test accuracy did not become better in 3 epochs")
    refused = lockstep("train", "mnist", "--data", data, "--output", f"{folder}/refused", "--set",
                       "split.test=0.5", "--set", "train.patience=-1", code=2)
    contains(refused.err, "train.patience")


if __name__ == "__main__":
    main(globals())
