"""The PyTorch side of the training rows of ../nodes_training.py: the recipe `gpt` with
DistributedDataParallel over Gloo: the same model, text, held-out blocks, order of samples, batches,
optimizer, schedule and clipping as `lockstep train gpt`. One process of each node; prints one JSON
line on rank 0.

  python ddp_gpt.py RANK RANKS MEETING --batch 8 --steps 300 [--ways defaults]

MEETING: a file that does not exist yet. --batch: samples of all ranks. --ways best: gradients as
bucket views, a static graph, a fused optimizer; defaults: DDP's and torch.optim's own."""

import argparse
import json
import math
import os
import statistics
import sys
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "training"))
from ddp import Gpt

# The recipe's (lockstep/job/schema.cc): what a change there must change here.
LAYERS, HEADS, WIDTH, CONTEXT, VOCABULARY = 4, 4, 128, 128, 256
LR, DECAY, WARM_UP, CLIP, HELD_OUT, SPLIT_SEED, SEED = 2e-3, 0.1, 50, 1.0, 0.05, 42, 1
SETTLING_STEPS = 10  # not timed
WORD = (1 << 64) - 1


def mix(*words):  # lockstep/base/hash.h
    state = 0x9e3779b97f4a7c15
    for word in words:
        state = (state + word + 0x9e3779b97f4a7c15) & WORD
        state = ((state ^ state >> 30) * 0xbf58476d1ce4e5b9) & WORD
        state = ((state ^ state >> 27) * 0x94d049bb133111eb) & WORD
        state ^= state >> 31
    return state


class Permutation:  # lockstep/data/ledger.h
    def __init__(self, size, key):
        self.size, self.bits = size, 1
        while self.bits < 32 and 1 << 2 * self.bits < size:
            self.bits += 1
        self.keys = [mix(key, number) for number in range(6)]

    def __call__(self, position):
        mask = (1 << self.bits) - 1
        while True:
            left, right = position >> self.bits, position & mask
            for key in self.keys:
                left, right = right, left ^ mix(key ^ right) & mask
            position = left << self.bits | right
            if position < self.size:
                return position


def text_blocks():
    """The recipe's text, libtorch's headers, in blocks; those to train on, and those held out."""
    include = os.path.join(os.path.dirname(torch.__file__), "include")
    text = b""
    for folder in ("c10", "torch/csrc/api/include"):
        files = [os.path.join(place, name)
                 for place, _, names in os.walk(os.path.join(include, folder)) for name in names]
        for path in sorted(files, key=lambda path: path.split("/")):
            with open(path, "rb") as file:
                text += file.read()
    rows = (len(text) - 1) // CONTEXT
    blocks = torch.frombuffer(bytearray(text), dtype=torch.uint8).unfold(0, CONTEXT + 1, CONTEXT)
    chosen = Permutation(rows, mix(SPLIT_SEED, 0x73706c6974))
    held_out = sorted(chosen(place) for place in range(round(HELD_OUT * rows)))
    rest = torch.ones(rows, dtype=torch.bool)
    rest[held_out] = False
    return blocks[:rows][rest].long(), blocks[held_out].long()


def rate_at(step, steps):
    if step < WARM_UP:
        return LR * (step + 1) / WARM_UP
    course = max(steps - WARM_UP, 1)
    return LR * (1 + math.cos(math.pi * min(step - WARM_UP, course) / course)) / 2


def loss_of(model, blocks, reduction="mean"):
    return F.cross_entropy(model(blocks[:, :-1]).flatten(0, 1), blocks[:, 1:].flatten(),
                           reduction=reduction)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("rank", type=int)
    parser.add_argument("ranks", type=int)
    parser.add_argument("meeting")
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--bucket-mb", type=float, default=25)
    parser.add_argument("--ways", choices=["best", "defaults"], default="best")
    options = parser.parse_args()
    best = options.ways == "best"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{options.meeting}", rank=options.rank,
                            world_size=options.ranks)
    torch.manual_seed(SEED)
    net = Gpt(LAYERS, WIDTH, HEADS, CONTEXT, VOCABULARY)
    extra = {"gradient_as_bucket_view": True, "static_graph": True} if best else {}
    model = DistributedDataParallel(net, bucket_cap_mb=options.bucket_mb, **extra)
    optimizer = torch.optim.AdamW(net.parameters(), lr=LR, weight_decay=DECAY,
                                  **({"fused": True} if best else {}))
    blocks, held_out = text_blocks()
    own = options.batch // options.ranks
    per_epoch = len(blocks) // options.batch
    took = []
    for step in range(options.steps):
        if step == SETTLING_STEPS:
            dist.barrier()
        started = time.perf_counter()
        order = Permutation(len(blocks), mix(SEED, step // per_epoch))
        first = step % per_epoch * options.batch + options.rank * own
        batch = blocks[[order(place) for place in range(first, first + own)]]
        optimizer.param_groups[0]["lr"] = rate_at(step, options.steps)
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), CLIP)
        optimizer.step()
        if step >= SETTLING_STEPS:
            took.append(time.perf_counter() - started)
    slowest = torch.tensor([sum(took), statistics.median(took)])
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    with torch.no_grad():
        mine = held_out[options.rank::options.ranks]
        total = torch.stack([loss_of(net, part, "sum") for part in mine.split(64)]).sum().double()
        dist.all_reduce(total)
    if options.rank == 0:
        print(json.dumps({"step_s": slowest[1].item(),
                          "samples_per_s": len(took) * options.batch / slowest[0].item(),
                          "test_loss": total.item() / held_out[:, 1:].numel()}), flush=True)
    dist.barrier()
    os._exit(0)  # Gloo's threads abort a process that ends while its peer closes connections


if __name__ == "__main__":
    main()
