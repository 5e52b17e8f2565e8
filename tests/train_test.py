"""`lockstep train` from end to end: the files it writes, what it prints, and prediction."""

import glob
import json
import math
import os
import pty
import re
import struct
import subprocess

import numpy
import tensorboard
from safetensors.numpy import load_file

from harness import (LOCKSTEP, contains, equal, lockstep, main, make_csv, make_idx_folder,
                     report_of, train)

SHARES = {"data", "forward", "backward", "communication", "waiting", "optimizer"}


def run_mnist(folder, *arguments):
    data = make_idx_folder(f"{folder}/data")
    lockstep("train", "mnist", "--data", data, "--output", f"{folder}/out", "--workers", "2",
             "--epochs", "3", "--set", "model.widths=[16]", *arguments)
    return f"{folder}/out"


def read_rows(path):
    with open(path) as file:
        header, *rows = [line.split(",") for line in file.read().split("\n")[:-1]]
    return header, rows


# --- Files ---


def test_report(folder):
    out = run_mnist(folder, "--report", f"{folder}/copy.json")
    report = report_of(out)
    with open(f"{folder}/copy.json") as file:
        equal(json.load(file), report, "--report")
    equal(report["workers"], 2)
    equal(len(report["epochs"]), 3)
    for epoch in report["epochs"]:
        assert 0 < epoch["train_loss"] < 5 and 0 < epoch["test_loss"] < 5, epoch
        assert 0 <= epoch["test_accuracy"] <= 1, epoch
    assert report["epochs"][-1]["train_loss"] < report["epochs"][0]["train_loss"]
    assert report["samples_per_s"] > 0 and report["start_to_first_step_s"] > 0, report
    equal(len(report["ranks"]), 2)
    for rank in report["ranks"]:
        shares = rank["share"]
        assert SHARES <= set(shares), shares
        assert all(0 <= share <= 1 for share in shares.values()), shares
        assert math.isclose(sum(shares.values()), 1, abs_tol=0.02), shares
        assert rank["cpu_s"] > 0 and rank["peak_memory_bytes"] > 1_000_000, rank


def test_weights_are_what_the_report_says(folder):
    import hashlib
    out = run_mnist(folder)
    with open(f"{out}/model.safetensors", "rb") as file:
        content = file.read()
    equal(hashlib.sha256(content).hexdigest(), report_of(out)["weights_sha256"])


def test_metrics(folder):
    out = run_mnist(folder)
    with open(f"{out}/metrics.jsonl") as file:
        text = file.read()
    assert text.endswith("\n")
    lines = [json.loads(line) for line in text.split("\n")[:-1]]
    epochs = [line for line in lines if "test_loss" in line]
    equal([line["epoch"] for line in epochs], [1, 2, 3], "epochs")
    for line, epoch in zip(epochs, report_of(out)["epochs"], strict=True):
        equal(line["train_loss"], epoch["train_loss"])


def test_tensorboard(folder):
    out = run_mnist(folder)
    (path,) = glob.glob(f"{out}/**/events.out.tfevents.*", recursive=True)
    found = tensorboard.scalars(path)
    losses = [value for tag, _, value in found if tag in ("loss/test", "test_loss", "test/loss")]
    equal(len(losses), 3, f"test losses in {found}")
    for value, epoch in zip(losses, report_of(out)["epochs"], strict=True):
        assert math.isclose(value, epoch["test_loss"], rel_tol=1e-6), (value, epoch)


def test_predictions_follow_from_the_saved_weights(folder):
    """Python reads the weights and computes the network by hand."""
    out = run_mnist(folder)
    lockstep("predict", out, "--data", f"{folder}/data", "--output", f"{folder}/p.csv",
             "--workers", "2")
    header, rows = read_rows(f"{folder}/p.csv")
    equal(header, ["row", "prediction", "probability"])
    equal([int(row[0]) for row in rows], list(range(45)), "rows")

    tensors = load_file(f"{out}/model.safetensors")
    with open(f"{folder}/data/t10k-images-idx3-ubyte", "rb") as file:
        file.read(16)
        images = numpy.frombuffer(file.read(), numpy.uint8).reshape(45, 784).astype(numpy.float64)
    hidden = (images - tensors["input.mean"]) / tensors["input.deviation"]
    hidden = hidden @ tensors["layer1.weight"].T + tensors["layer1.bias"]
    scores = numpy.maximum(hidden, 0) @ tensors["layer2.weight"].T + tensors["layer2.bias"]
    scores = numpy.exp(scores - scores.max(axis=1, keepdims=True))
    probabilities = scores / scores.sum(axis=1, keepdims=True)
    for row, expected in zip(rows, probabilities, strict=True):
        assert abs(float(row[2]) - expected.max()) < 1e-4, (row, expected)
        equal(int(row[1]), int(expected.argmax()), "prediction")

    with open(f"{folder}/data/t10k-labels-idx1-ubyte", "rb") as file:
        labels = file.read()[8:]
    right = sum(int(row[1]) == label for row, label in zip(rows, labels, strict=True))
    assert math.isclose(right / 45, report_of(out)["epochs"][-1]["test_accuracy"], abs_tol=1e-6)


def test_images_without_a_test_set_of_their_own(folder):
    data = make_idx_folder(f"{folder}/data")
    for part in ("images-idx3", "labels-idx1"):
        os.remove(f"{data}/t10k-{part}-ubyte")
    report = train("mnist", f"{folder}/run", "--data", data, "--epochs", 5, "--workers", 2,
                   "--set", "split={test=0.2,seed=42}")
    assert report["epochs"][-1]["test_accuracy"] > 0.8, report["epochs"][-1]


def test_table_with_gaps_in_its_target_column(folder):
    table = make_csv(f"{folder}/table.csv", classes=3)
    train("csv", f"{folder}/run", "--data", table, "--epochs", 1, "--set", "dataset.target=target",
          "--set", "dataset.task=classification")
    with open(f"{folder}/gaps.csv", "w") as file:
        file.write("a,b,target,c\n1,2,0,3\n1,2,,3\n")
    result = lockstep("predict", f"{folder}/run", "--data", f"{folder}/gaps.csv", "--output",
                      f"{folder}/p.csv")
    equal(len(read_rows(f"{folder}/p.csv")[1]), 2)
    assert "accuracy" not in result.out + result.err, result


def test_table_of_ones_own(folder):
    table = make_csv(f"{folder}/table.csv", rows=200)
    report = train("csv", f"{folder}/run", "--data", table, "--workers", 2, "--epochs", 60,
                   "--set", "dataset.target=target", "--set", "split.test=0.2", "--set",
                   "model.widths=[]", "--set", "optimizer.lr=0.05")
    assert report["epochs"][-1]["test_loss"] < 0.01, report["epochs"][-1]
    lockstep("predict", f"{folder}/run", "--data", table, "--output", f"{folder}/p.csv")
    _, predicted = read_rows(f"{folder}/p.csv")
    _, rows = read_rows(table)
    for row, known in zip(predicted, rows, strict=True):
        assert abs(float(row[1]) - float(known[2])) < 0.3, (row, known)


def test_classes_in_a_table(folder):
    table = make_csv(f"{folder}/table.csv", rows=200, classes=3)
    report = train("csv", f"{folder}/run", "--data", table, "--workers", 2, "--epochs", 30,
                   "--set", "dataset.target=target", "--set", "dataset.task=classification",
                   "--set", "loss.name=cross_entropy", "--set", "split.test=0.2",
                   "--set", "optimizer.lr=0.02")
    assert report["epochs"][-1]["test_accuracy"] > 0.8, report["epochs"][-1]


def test_runs_are_numbered_where_no_output_is_named(folder):
    for _ in range(2):
        lockstep("train", "linear-regression", "--epochs", 1, "--quiet", cwd=folder)
    equal(sorted(os.listdir(f"{folder}/runs")), ["linear-regression-1", "linear-regression-2"])


# --- What a person sees ---


def test_plain_lines_where_there_is_no_terminal(folder):
    data = make_idx_folder(f"{folder}/data")
    result = lockstep("train", "mnist", "--data", data, "--output", f"{folder}/out", "--epochs", 2)
    assert "\r" not in result.out and "\x1b" not in result.out, repr(result.out)
    equal(len(re.findall(r"(?i)^epoch +\d", result.out, re.MULTILINE)), 2, result.out)
    contains(result.out, "model.safetensors", "report.json", "metrics.jsonl")
    equal(result.err, "")


def test_quiet_prints_nothing(folder):
    result = lockstep("train", "linear-regression", "--output", f"{folder}/out", "--quiet")
    equal(result.out + result.err, "")


def test_progress_bar_on_a_terminal(folder):
    main_end, terminal = pty.openpty()
    process = subprocess.Popen(
        [LOCKSTEP, "train", "linear-regression", "--workers", "2", "--epochs", "5", "--set",
         "dataset.rows=40000", "--output", f"{folder}/out"],
        stdin=subprocess.DEVNULL, stdout=terminal, stderr=terminal, close_fds=True,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "100"})
    os.close(terminal)
    text = b""
    while True:
        try:
            chunk = os.read(main_end, 65536)
        except OSError:  # the other end is closed
            break
        if not chunk:
            break
        text += chunk
    os.close(main_end)
    equal(process.wait(timeout=60), 0, text.decode())
    text = text.decode()
    contains(text, "\r", "samples/s", "loss", "report.json")
    equal(len(re.findall(r"(?i)epoch +\d", text)) >= 5, True, text)


def test_safetensors_of_every_kind_of_tensor(folder):
    data = make_idx_folder(f"{folder}/data")
    train("mnist", f"{folder}/out", "--data", data, "--epochs", 1, "--set", "model.name=cnn",
          "--set", "model.batch_norm=true", "--set", "train.max_steps=1")
    tensors = load_file(f"{folder}/out/model.safetensors")
    kinds = {(str(tensor.dtype), tensor.ndim) for tensor in tensors.values()}
    assert {("float32", 1), ("float32", 2), ("float32", 4)} <= kinds, kinds
    with open(f"{folder}/out/model.safetensors", "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        equal((8 + length) % 64, 0, "where the data begins")
        header = json.loads(file.read(length))
    assert any("running_mean" in name for name in header), sorted(header)


if __name__ == "__main__":
    main(globals())
