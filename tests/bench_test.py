"""lockstep bench: what it prints and writes, and what it refuses."""

import json

from harness import contains, equal, lockstep, main

KEYS = {"operation", "ranks", "bytes", "dtype", "arena", "time_us", "min_us", "p90_us", "max_us",
        "algbw_gbps", "busbw_gbps", "iterations"}


def bench(folder, *arguments):
    """The lines of the JSON file; each is also a row of the table."""
    result = lockstep("bench", "collective", "--json", f"{folder}/lines.json", *arguments)
    with open(f"{folder}/lines.json") as file:
        lines = [json.loads(line) for line in file]
    rows = result.out.strip().split("\n")[1:]
    equal([row.split()[0] for row in rows], [line["operation"] for line in lines], "rows")
    for line in lines:
        assert set(line) - {"moved_bytes"} == KEYS, line
        assert 0 < line["min_us"] <= line["time_us"] <= line["p90_us"] <= line["max_us"], line
    return lines


def test_all_reduce_in_the_arena_and_elsewhere(folder):
    for arena in ([], ["--arena"]):
        lines = bench(folder, "--operation", "all_reduce", "--ranks", "2", "--sizes", "4,1M",
                      "--dtype", "float32", "--iterations", "20", "--warmup", "2", *arena)
        equal([(line["operation"], line["ranks"], line["bytes"]) for line in lines],
              [("all_reduce", 2, 4), ("all_reduce", 2, 1 << 20)] +
              [("memcpy", ranks, size) for size in (4, 1 << 20) for ranks in (1, 2)], "lines")
        for line in lines:
            equal((line["arena"], line["dtype"]), (bool(arena), "float32"))
            gbps = line["bytes"] / line["time_us"] / 1000
            assert abs(line["algbw_gbps"] - gbps) < 1e-6 * gbps, line
            equal(line["busbw_gbps"], line["algbw_gbps"], "a factor of 1 for 2 ranks")
        assert lines[1]["iterations"] >= 20, lines[1]
        if arena:  # every rank's data is read once and written once
            assert abs(lines[1]["moved_bytes"] / (2 * 2 * (1 << 20)) - 1) <= 0.05, lines[1]


def test_every_operation_with_several_dtypes_and_more_ranks_than_cores(folder):
    hint = lockstep("bench", "collective", "--operation", "?", code=2).err
    names = hint.strip().split("one of ")[1].split(", ")
    assert {"all_reduce", "broadcast", "all_gather", "barrier"} <= set(names), hint
    for dtype, reduction in (("float32", "sum"), ("bfloat16", "mean"), ("int8", "max")):
        lines = bench(folder, "--operation", ",".join(names), "--ranks", "3", "--sizes", "1000",
                      "--dtype", dtype, "--reduction", reduction, "--iterations", "2",
                      "--warmup", "1")
        equal([line["operation"] for line in lines if line["operation"] != "memcpy"], names, dtype)


def test_training(folder):
    lockstep("bench", "training", "--work", "W1,W2", "--mode",
             "shared_weights,data_parallel,independent", "--workers", "2", "--seconds",
             "0.1", "--json", f"{folder}/lines.json")
    with open(f"{folder}/lines.json") as file:
        lines = [json.loads(line) for line in file]
    equal([(line["work"], line["mode"]) for line in lines],
          [(work, mode) for work in ("W1", "W2") for mode in ("shared_weights", "data_parallel",
                                                               "independent")])
    for line in lines:
        rate = line["steps"] * 2 * line["batch_size"] / line["seconds"]
        assert rate * 0.9 <= line["samples_per_s"], line
        equal((line["workers"], line["precision"]), (2, "fp32"))
        assert line["peak_memory_bytes"] > 1e7 and line["page_faults_per_step"] >= 0, line


def test_training_in_bf16_alone(folder):
    lockstep("bench", "training", "--precision", "bf16", "--workers", "1", "--seconds", "0.1",
             "--json", f"{folder}/line.json")
    with open(f"{folder}/line.json") as file:
        equal(json.load(file)["precision"], "bf16")


def test_refusals_of_training(_):
    def refused(*arguments, says):
        contains(lockstep("bench", "training", *arguments, code=2).err, *says)

    refused("--work", "W9", says=("W9", "W1"))
    refused("--mode", "magic", says=("magic", "data_parallel"))
    refused("--precision", "fp16", says=("fp16", "bf16"))
    refused("--seconds", "0", says=("--seconds",))
    refused("--workers", "0", says=("--workers",))


def test_refusals(folder):
    def refused(*arguments, says):
        result = lockstep("bench", "collective", *arguments, code=2)
        contains(result.err, *says)
        equal(len(result.err.strip().split("\n")), 1, result.err)

    refused("--operation", "allreduce", says=("allreduce", "did you mean all_reduce?"))
    refused("--sizes", "4,16k", says=("'16k'", "hint:"))
    refused("--sizes", "3", says=("3 bytes", "hint:"))
    refused("--dtype", "float31", says=("float31", "float32"))
    refused("--reduction", "avg", says=("avg", "mean"))
    refused("--ranks", "0", says=("--ranks 0",))
    refused("--json", f"{folder}/none/x", says=("--json", "no folder"))
    contains(lockstep("bench", "model", code=2).err, "model", "lockstep bench collective")
    contains(lockstep("bench", "collective", "--size", "4", code=2).err, "--sizes")


if __name__ == "__main__":
    main(globals())
