"""lockstep train with replicas: wire formats, local SGD and DiLoCo."""

import json

from harness import contains, equal, lockstep, main, train

SMALL = ["--set", "model.layers=1", "--set", "model.heads=2", "--set", "model.width=32", "--set",
         "model.context=32", "--set", "train.max_steps=60", "--set", "schedule.warmup_steps=0",
         "--set", "optimizer.lr=5e-3"]


def report_of(folder, *settings, workers=2):
    words = [word for setting in settings for word in ("--set", setting)]
    return train("gpt", folder, "--workers", workers, *SMALL, *words)


def test_every_strategy_learns_and_says_the_same_twice(folder):
    losses = {}
    for number, settings in enumerate([
            ["train.strategy=data_parallel"],
            ["train.strategy=data_parallel", "train.wire_format=int8"],
            ["train.strategy=local_sgd", "train.sync_every=5"],
            ["train.strategy=diloco", "train.sync_every=10", "train.wire_format=bf16"]]):
        first = report_of(f"{folder}/{number}", *settings)
        again = report_of(f"{folder}/{number}-again", *settings)
        equal(again["weights_sha256"], first["weights_sha256"], str(settings))
        losses[" ".join(settings)] = first["epochs"][-1]["test_loss"]
    assert all(loss < 3.4 for loss in losses.values()), losses  # untrained: ln 256 = 5.5


def test_alone_and_on_three_workers(folder):
    for workers in (1, 3):
        report_of(f"{folder}/{workers}", "train.strategy=diloco", "train.sync_every=20",
                  "train.max_steps=20", workers=workers)
        with open(f"{folder}/{workers}/metrics.jsonl") as file:
            equal(json.loads(file.read().splitlines()[-1])["step"], 20, "steps")


def test_a_worker_that_is_killed_ends_the_job(folder):
    killed = lockstep("train", "gpt", "--workers", 2, "--output", f"{folder}/run", *SMALL, "--set",
                      "train.strategy=diloco", "--inject", "kill rank=1 step=7", code=1)
    contains(killed.err, "rank 1", "killed by signal 9")


def test_what_it_does_not_do_is_refused(folder):
    arguments = ["train", "gpt", "--workers", 2, "--output", f"{folder}/run"]
    refused = lockstep(*arguments, "--set", "train.strategy=diloco", "--set", "train.accumulate=2",
                       code=2)
    contains(refused.err, "train.accumulate")


if __name__ == "__main__":
    main(globals())
