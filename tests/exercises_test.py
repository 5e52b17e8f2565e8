"""The exercises in examples/jobs/, shortened. Each job file says what the whole of it gives."""

import json
import os
import re

from harness import ROOT, contains, equal, lockstep, main, report_of

JOBS = os.path.join(ROOT, "examples", "jobs")


def exercise(folder, name, *arguments):
    out = lockstep("train", f"{JOBS}/{name}.toml", "--output", f"{folder}/out", *arguments).out
    return out, report_of(f"{folder}/out")


def learned(report, accuracy):
    last = report["epochs"][-1]
    assert last["test_accuracy"] > accuracy, last


def test_every_job_file_is_run_here(_):
    with open(__file__) as file:
        text = file.read()
    names = sorted(name.removesuffix(".toml") for name in os.listdir(JOBS))
    assert names
    contains(text, *(f'"{name}"' for name in names))


def test_784_128_10_with_adam(folder):
    _, report = exercise(folder, "mlp-128-adam", "--set", "train.max_steps=300")
    learned(report, 0.7)


def test_784_10_10_with_one_hot_targets(folder):
    _, report = exercise(folder, "mlp-10-onehot", "--set", "train.max_steps=400")
    learned(report, 0.6)


def test_784_128_128_10_by_plain_sgd(folder):
    _, report = exercise(folder, "mlp-128-128-sgd", "--epochs", "1")
    learned(report, 0.5)


def test_784_10_prints_its_test_loss(folder):
    out, report = exercise(folder, "softmax-test-loss", "--epochs", "2", "--set",
                           "train.batch_size=250")
    printed = re.findall(r"^Epoch (\d+), Test Loss: ([\d.]+)$", out, re.MULTILINE)
    equal([int(epoch) for epoch, _ in printed], [1, 2], "epochs printed")
    for (_, loss), epoch in zip(printed, report["epochs"], strict=True):
        assert abs(float(loss) - epoch["test_loss"]) < 1e-3, (loss, epoch)
    learned(report, 0.7)


def distance(folder, name):
    out, report = exercise(folder, name)
    equal(report["workers"], 10, "workers")
    contains(out, "known weights found to within")
    # The noise has deviation 0.1, so 0.01 is the smallest mean squared error to expect.
    assert 0.005 < report["epochs"][-1]["test_loss"] < 0.02, report["epochs"][-1]
    lockstep("predict", f"{folder}/out", "--output", f"{folder}/predictions.csv")
    with open(f"{folder}/predictions.csv") as file:
        equal(len(file.readlines()), 201, "a header and the 200 rows held out")
    found = re.search(r'"largest_distance_from_known": ([\d.e-]+)', json.dumps(report))
    return float(found[1])


def test_linear_regression_by_gradient_descent(folder):
    assert distance(folder, "linear-regression-gd") < 0.03


def test_linear_regression_in_closed_form(folder):
    assert distance(folder, "linear-regression-closed-form") < 0.02


def test_linear_support_vector_machine(folder):
    _, report = exercise(folder, "svm", "--epochs", "1")
    learned(report, 0.9)


def test_a_rare_class_is_found_again_by_weighting(folder):
    recall = {}
    for partition in ("none", "weighted"):
        os.makedirs(f"{folder}/{partition}")
        out, report = exercise(f"{folder}/{partition}", "rare-class-weighted", "--set",
                               f"dataset.partition={partition}", "--set", "train.max_steps=250")
        contains(out, "recall by class: 0.")
        recall[partition] = report["solution"]["recall"][6]
    assert recall["weighted"] > recall["none"] + 0.1, recall


def test_resnet18(folder):
    _, report = exercise(folder, "resnet18", "--set", "train.max_steps=2", "--set",
                         "train.batch_size=4", "--set", "split.test=0.0005")
    equal(report["parameters"], 11_172_810, "parameters")


def test_gpt_learns_text_and_writes_more_of_it(folder):
    out, report = exercise(folder, "gpt", "--set", "train.max_steps=40", "--set", "model.layers=1",
                           "--set", "schedule.warmup_steps=5",
                           "--set", "model.width=32", "--set", "split.test=0.01", "--set",
                           "train.batch_size=8")
    contains(out, "nats per byte, perplexity")
    assert report["epochs"][-1]["test_loss"] < 4.5, report["epochs"]
    with open(f"{folder}/prompt.txt", "w") as file:
        file.write("#include <")
    lockstep("predict", f"{folder}/out", "--data", f"{folder}/prompt.txt", "--output",
             f"{folder}/more.txt")
    with open(f"{folder}/more.txt") as file:
        text = file.read()
    assert text.startswith("#include <") and len(text) > 500, text


if __name__ == "__main__":
    main(globals())
