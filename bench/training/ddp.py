"""The peer of lockstep bench training: the same works (lockstep/recipes/works.h) with PyTorch's
DistributedDataParallel over Gloo, started by torchrun; prints one JSON line on rank 0.

Without flags: the settings that serve DDP best here (gradients as bucket views, a static graph, a
fused optimizer). --defaults: DDP's and torch.optim's own. --alone: no DDP, workers that never
communicate."""

import argparse
import contextlib
import json
import math
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

WARM_UP_STEPS, BATCHES, CHUNK_S = 5, 8, 0.5


def mlp(*widths):
    layers = []
    for inputs, outputs in zip(widths, widths[1:]):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def cnn():
    return nn.Sequential(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
                         nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
                         nn.Linear(64 * 49, 128), nn.ReLU(), nn.Linear(128, 10))


class Residual(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.shortcut = None
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False),
                                          nn.BatchNorm2d(outputs))

    def forward(self, x):
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class ResNet18(nn.Module):
    def __init__(self):
        super().__init__()
        blocks, inputs = [], 64
        for outputs in (64, 128, 256, 512):
            for stride in (1 if outputs == 64 else 2, 1):
                blocks.append(Residual(inputs, outputs, stride))
                inputs = outputs
        self.stem = nn.Sequential(nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64),
                                  nn.ReLU())
        self.blocks, self.output = nn.Sequential(*blocks), nn.Linear(512, 10)

    def forward(self, x):
        return self.output(self.blocks(self.stem(x)).mean((2, 3)))


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.joined = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        n, length, width = x.shape
        query, key, value = (part.view(n, length, self.heads, width // self.heads).transpose(1, 2)
                             for part in self.qkv(self.norm1(x)).split(width, 2))
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.joined(mixed.transpose(1, 2).reshape(n, length, width))
        return x + self.narrow(F.gelu(self.wide(self.norm2(x)), approximate="tanh"))


class Gpt(nn.Module):
    def __init__(self, layers=6, width=384, heads=6, context=128, vocabulary=65):
        super().__init__()
        self.tokens, self.positions = (nn.Embedding(vocabulary, width),
                                       nn.Embedding(context, width))
        self.blocks = nn.Sequential(*[Block(width, heads) for _ in range(layers)])
        self.norm = nn.LayerNorm(width)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                residual = name.endswith(("joined.weight", "narrow.weight"))
                nn.init.normal_(parameter, 0, 0.02 / (math.sqrt(2 * layers) if residual else 1))

    def forward(self, tokens):
        x = self.blocks(self.tokens(tokens) + self.positions.weight[:tokens.shape[1]])
        return F.linear(self.norm(x), self.tokens.weight)


# name: model, shape of a sample, outputs, batch, optimizer
WORKS = {
    "W1": (lambda: mlp(784, 1024, 1024, 10), (784,), 10, 64, "adam"),
    "W2": (cnn, (1, 28, 28), 10, 64, "momentum"),
    "W3": (ResNet18, (3, 32, 32), 10, 16, "momentum"),
    "W4": (Gpt, (128,), 65, 4, "adamw"),
    "W5": (lambda: mlp(4096, 4096, 4096, 4096, 10), (4096,), 10, 16, "adam"),
}


def make_optimizer(name, parameters, fused):
    settings = {"fused": True} if fused else {}
    if name == "adam":
        return torch.optim.Adam(parameters, lr=1e-3, **settings)
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=3e-4, weight_decay=0.1, **settings)
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9, **settings)


def make_batches(name, shape, outputs, batch):
    if name == "W4":
        return [(torch.randint(outputs, (batch, *shape)), torch.randint(outputs, (batch, *shape)))
                for _ in range(BATCHES)]
    return [(torch.randn(batch, *shape), torch.randint(outputs, (batch,)))
            for _ in range(BATCHES)]


def largest(value):
    tensor = torch.tensor([value], dtype=torch.float64)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor.item()


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", choices=sorted(WORKS), required=True)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--defaults", action="store_true")
    parser.add_argument("--alone", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    make, shape, outputs, batch, optimizer_name = WORKS[options.work]
    torch.manual_seed(1)
    net = make()
    best = {} if options.defaults else {"gradient_as_bucket_view": True, "static_graph": True}
    model = net if options.alone else DistributedDataParallel(net, **best)
    optimizer = make_optimizer(optimizer_name, model.parameters(), not options.defaults)
    torch.manual_seed(1 + dist.get_rank())
    batches = make_batches(options.work, shape, outputs, batch)
    precision = (torch.autocast("cpu", torch.bfloat16) if options.precision == "bf16"
                 else contextlib.nullcontext())
    done = 0

    def run(steps):
        nonlocal done
        start = time.perf_counter()
        for _ in range(steps):
            inputs, targets = batches[done % BATCHES]
            done += 1
            optimizer.zero_grad()
            with precision:
                loss = F.cross_entropy(model(inputs).flatten(0, -2), targets.flatten())
            loss.backward()
            optimizer.step()
        return time.perf_counter() - start

    # As lockstep bench training: all ranks run equally many steps, in chunks.
    run(WARM_UP_STEPS)
    chunk = int(max(1, CHUNK_S / largest(run(WARM_UP_STEPS) / WARM_UP_STEPS)))
    before, own = done, 0.0
    while True:
        own += run(chunk)
        if largest(own) >= options.seconds:
            break
    rate = torch.tensor([(done - before) * batch / own], dtype=torch.float64)
    dist.all_reduce(rate)
    if dist.get_rank() == 0:
        print(json.dumps({"work": options.work, "samples_per_s": rate.item(),
                          "steps": done - before, "seconds": own,
                          "parameters": sum(p.numel() for p in net.parameters())}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
