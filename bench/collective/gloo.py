"""The Gloo side of ../collective.py and ../nodes.py: torch.distributed's collectives, timed in the
same way as `lockstep bench collective` does: batches of calls after a barrier, a batch as long as
on the slowest rank, the median over batches. float32, one thread a rank.

  python gloo.py RANKS OPERATION:BYTES:BATCH:BATCHES …     one JSON line for each

Starts all ranks, which talk on the loopback interface, or with --rank R --meeting FILE one of them,
on the interface that GLOO_SOCKET_IFNAME names. --parts N: all_reduce in N parts at once."""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")

import torch
import torch.distributed as dist


def all_reduce_in_parts(data, number):
    for work in [dist.all_reduce(part, async_op=True) for part in data.chunk(number)]:
        work.wait()


def call_of(operation, data, in_parts):
    parts = list(data.chunk(dist.get_world_size()))
    return {"all_reduce": (lambda: dist.all_reduce(data)) if in_parts == 1 else
                          lambda: all_reduce_in_parts(data, in_parts),
            "broadcast": lambda: dist.broadcast(data, 0),
            "all_gather": lambda: dist.all_gather(parts, parts[dist.get_rank()]),
            "barrier": dist.barrier}[operation]


def measure(operation, size, batch, batches, in_parts):
    data = torch.zeros(max(1, size // 4))
    call = call_of(operation, data, in_parts)
    for _ in range(max(batch, 5)):
        call()
    us = torch.zeros(batches, dtype=torch.float64)
    for number in range(batches):
        dist.barrier()
        start = time.perf_counter()
        for _ in range(batch):
            call()
        us[number] = (time.perf_counter() - start) * 1e6 / batch
    dist.all_reduce(us, dist.ReduceOp.MAX)
    if operation == "all_reduce":
        data.fill_(dist.get_rank() + 1)
        call()
        assert (data == dist.get_world_size() * (dist.get_world_size() + 1) / 2).all()
    if dist.get_rank() == 0:
        us = us.tolist()
        print(json.dumps({"operation": operation, "ranks": dist.get_world_size(), "bytes": size,
                          "time_us": statistics.median(us), "min_us": min(us),
                          "max_us": max(us)}), flush=True)


def run_rank(rank, ranks, meeting, cases, in_parts=1):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks)
    for case in cases:
        operation, size, batch, batches = case.split(":")
        measure(operation, int(size), int(batch), int(batches), in_parts)
    dist.destroy_process_group()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("ranks", type=int)
    parser.add_argument("cases", nargs="*")
    parser.add_argument("--rank", type=int)
    parser.add_argument("--meeting")
    parser.add_argument("--parts", type=int, default=1)
    options = parser.parse_intermixed_args()
    if options.rank is not None:
        run_rank(options.rank, options.ranks, options.meeting, options.cases, options.parts)
        return
    with tempfile.TemporaryDirectory(prefix="lockstep-bench-") as folder:
        torch.multiprocessing.spawn(
            run_rank, (options.ranks, f"{folder}/meeting", options.cases, options.parts),
            nprocs=options.ranks)


if __name__ == "__main__":
    main()
