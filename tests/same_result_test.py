"""The same job gives the same weights, bit for bit: on any number of workers, run after run."""

import os

from harness import ROOT, equal, lockstep, main, make_csv, make_idx_folder, train

MLP = """
recipe = "mnist"
[model]
name = "mlp"
widths = [32, 16]
dropout = 0.2
[optimizer]
name = "adamw"
weight_decay = 0.01
[schedule]
name = "cosine"
warmup_steps = 2
[train]
epochs = 2
global_batch_size = 32     # 150 samples: the last batch of an epoch holds 22
virtual_ranks = 4
accumulate = 2
clip_grad_norm = 1.0
seed = 5
"""

CNN = """
recipe = "mnist"
[dataset]
augment = "flip,crop"
[model]
name = "cnn"
batch_norm = true
dropout = 0.25
[optimizer]
name = "nesterov"
lr = 0.01
[train]
epochs = 1
global_batch_size = 32
virtual_ranks = 4
accumulate = 3             # the last batch of an epoch: 5 or 6 samples a virtual rank
clip_grad_norm = 2.0
precision = "bf16"
"""

CSV = """
recipe = "csv"
[dataset]
target = "target"
[model]
widths = [8]
[loss]
name = "huber"
[train]
epochs = 3
global_batch_size = 9      # 48 rows: the last batch leaves one virtual rank without any
virtual_ranks = 4
accumulate = 3             # fewer than that in most: as many pieces as samples
[split]
test = 0.2
"""


RESNET = """
recipe = "mnist"
[model]
name = "resnet18"
[optimizer]
name = "momentum"
lr = 0.01
[train]
max_steps = 2
global_batch_size = 8
virtual_ranks = 2
"""

GPT = """
recipe = "gpt"
[model]
layers = 2
heads = 2
width = 32
context = 32
dropout = 0.1
[train]
max_steps = 6
global_batch_size = 8
virtual_ranks = 4
"""


def result(report):
    """Everything in a report that the job determines."""
    return report["weights_sha256"], [
        {key: epoch.get(key) for key in ("train_loss", "test_loss", "test_accuracy")}
        for epoch in report["epochs"]]


def equal_on(folder, text, data, counts):
    with open(f"{folder}/job.toml", "w") as file:
        file.write(text)
    results = {}
    for number, count in enumerate(counts):
        report = train(f"{folder}/job.toml", f"{folder}/{number}", "--data", data,
                       "--workers", count)
        equal(report["workers"], count, "workers")
        results[number] = result(report)
        equal(results[number], results[0], f"{count} workers against {counts[0]}")
    return results[0]


def test_mlp(folder):
    equal_on(folder, MLP, make_idx_folder(f"{folder}/data"), [1, 2, 2, 3, 4])


def test_cnn_with_batch_norm_dropout_augmentation_and_bf16(folder):
    equal_on(folder, CNN, make_idx_folder(f"{folder}/data"), [1, 2, 2, 3, 4])


def test_cnn_in_fp32(folder):
    equal_on(folder, CNN.replace("bf16", "fp32"), make_idx_folder(f"{folder}/data"), [1, 4])


def test_csv(folder):
    equal_on(folder, CSV, make_csv(f"{folder}/table.csv"), [1, 2, 3, 4])


def test_every_setting_matters(folder):
    """What is held equal above is in use: without it the result is another one."""
    data = make_idx_folder(f"{folder}/data")
    with open(f"{folder}/job.toml", "w") as file:
        file.write(CNN)
    changes = ["train.precision=fp32", "train.accumulate=1", "train.clip_grad_norm=0",
               "dataset.augment=flip", "dataset.augment=crop", "dataset.augment=none",
               "model.dropout=0", "model.batch_norm=false", "train.virtual_ranks=2"]
    found = {train(f"{folder}/job.toml", f"{folder}/{number}", "--data", data, "--set",
                   change)["weights_sha256"] for number, change in enumerate(changes)}
    equal(len(found), len(changes), "different weights")


def test_resnet18(folder):
    equal_on(folder, RESNET, make_idx_folder(f"{folder}/data", train_rows=20, test_rows=4), [1, 2])


def test_gpt_on_text(folder):
    text = equal_on(folder, GPT, os.path.join(ROOT, "lockstep", "base"), [1, 2, 4])
    assert text[1][-1]["test_loss"] < 5.5, text  # log(256) = 5.545 before anything is learned


def test_partitions(folder):
    data = make_csv(f"{folder}/table.csv")
    results = []
    for settings in ('"range"', '"hash"\npartition_key = "a"', '"stratified"\npartition_key = "c"',
                     '"weighted"\npartition_key = "b"'):
        job = CSV.replace('target = "target"', f'target = "target"\npartition = {settings}')
        os.makedirs(f"{folder}/{len(results)}")
        results.append(equal_on(f"{folder}/{len(results)}", job, data, [1, 2, 4])[0])
    equal(len(set(results)), 4, "different orders")


def test_another_seed_gives_another_result(folder):
    data = make_csv(f"{folder}/table.csv")
    with open(f"{folder}/job.toml", "w") as file:
        file.write(CSV)
    reports = [train(f"{folder}/job.toml", f"{folder}/{seed}", "--data", data, "--set",
                     f"train.seed={seed}") for seed in (1, 2)]
    assert reports[0]["weights_sha256"] != reports[1]["weights_sha256"]


def test_the_resolved_job_runs_again(folder):
    data = make_idx_folder(f"{folder}/data", compress=True)
    first = train("mnist", f"{folder}/first", "--data", data, "--workers", 2, "--epochs", 1,
                  "--set", "model.widths=[12]", "--set", "optimizer.name=momentum")
    equal(first["workers"], 2)
    again = train(f"{folder}/first/job.toml", f"{folder}/again")
    equal(result(again), result(first))
    # Fewer workers than at creation: the job, and so its result, stays what it was.
    fewer = train(f"{folder}/first/job.toml", f"{folder}/fewer", "--workers", 1)
    equal(result(fewer), result(first))


def test_predictions_are_equal_on_any_number_of_workers(folder):
    data = make_idx_folder(f"{folder}/data")
    train("mnist", f"{folder}/run", "--data", data, "--epochs", 1)
    files = []
    for count in (1, 2, 3):
        lockstep("predict", f"{folder}/run", "--data", data, "--output", f"{folder}/{count}.csv",
                 "--workers", count)
        with open(f"{folder}/{count}.csv") as file:
            files.append(file.read())
    equal(files[1], files[0], "2 workers against 1")
    equal(files[2], files[0], "3 workers against 1")


if __name__ == "__main__":
    main(globals())
