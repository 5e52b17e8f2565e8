"""The peer of fashion_mnist.py: the same training with PyTorch's DistributedDataParallel, with the
settings that serve it best here: data in memory, no loader processes, a fused optimizer, gradients
as views of buckets. Started by torchrun; prints one JSON line on rank 0."""

import gzip
import json
import os
import sys
import time

import numpy
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

FOLDER = "/usr/share/datasets/fashion-mnist"
BATCH = 64  # a worker


def load(prefix):
    with gzip.open(f"{FOLDER}/{prefix}-images-idx3-ubyte.gz") as file:
        images = numpy.frombuffer(file.read(), numpy.uint8, offset=16).reshape(-1, 784)
    with gzip.open(f"{FOLDER}/{prefix}-labels-idx1-ubyte.gz") as file:
        labels = numpy.frombuffer(file.read(), numpy.uint8, offset=8)
    return (torch.from_numpy(images.astype(numpy.float32)),
            torch.from_numpy(labels.astype(numpy.int64)))


def main():
    epochs, started = int(sys.argv[1]), float(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(1)
    images, labels = load("train")
    mean, deviation = images.mean(), images.std()
    images = (images - mean) / deviation
    test_images, test_labels = load("t10k")
    test_images = ((test_images - mean) / deviation)[rank::world]
    test_labels = test_labels[rank::world]

    net = nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(),
                        nn.Linear(64, 10))
    model = DistributedDataParallel(net, gradient_as_bucket_view=True, static_graph=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    loss_of = nn.CrossEntropyLoss()
    first_step = None
    accuracy = 0.0
    for epoch in range(epochs):
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(epoch))
        for batch in order[rank::world].split(BATCH):
            optimizer.zero_grad()
            loss = loss_of(model(images[batch]), labels[batch])
            loss.backward()
            optimizer.step()
            if first_step is None:
                first_step = time.time() - started
        with torch.no_grad():
            right = torch.zeros(1)
            for inputs, targets in zip(test_images.split(1000), test_labels.split(1000)):
                right += (net(inputs).argmax(1) == targets).sum()
            dist.all_reduce(right)
            accuracy = right.item() / 10000
    if rank == 0:
        print(json.dumps({"first_step_s": first_step, "accuracy": accuracy}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
