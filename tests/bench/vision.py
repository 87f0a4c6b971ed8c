"""The twin of `muster-trainer vision` in Python: same network, data, batch size, optimizer and schedule.

Started by torchrun. Rank 0 prints a JSON line after the first and after the last step, with Unix times.
"""

import argparse
import gzip
import json
import math
import os
import time

import numpy
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DistributedSampler


class Net(nn.Module):
    def __init__(self, height: int, width: int, classes: int):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(32)
        self.hidden = nn.Linear(32 * (height // 4) * (width // 4), 64)
        self.output = nn.Linear(64, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = nn.functional.max_pool2d(self.norm1(self.conv1(images)), 2).relu()
        x = nn.functional.max_pool2d(self.norm2(self.conv2(x)), 2).relu()
        return self.output(self.hidden(x.flatten(1)).relu())


def read(path: str, header: int) -> numpy.ndarray:
    with gzip.open(path) as file:
        return numpy.frombuffer(file.read(), numpy.uint8, offset=header)


def schedule(step: int, total: int) -> float:
    warm_up = min(max(total / 10.0, 1.0), 200.0)
    if step < warm_up:
        return (step + 1.0) / (warm_up + 1.0)
    progress = (step - warm_up) / max(total - warm_up, 1.0)
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", required=True)
    parser.add_argument("--limit", type=int, default=60000)
    args = parser.parse_args()
    pixels = read(os.path.join(args.data, "train-images-idx3-ubyte.gz"), 16).reshape(-1, 28, 28)
    images = torch.from_numpy(pixels[: args.limit].copy())
    labels = torch.from_numpy(read(os.path.join(args.data, "train-labels-idx1-ubyte.gz"), 8)[: args.limit].astype("int64"))
    read(os.path.join(args.data, "t10k-images-idx3-ubyte.gz"), 16)

    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(1)
    net = DistributedDataParallel(Net(28, 28, 10))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.06, momentum=0.9, weight_decay=1e-4, nesterov=True)
    sampler = DistributedSampler(range(len(images)), world, rank, seed=1)
    batch = 128 // world
    total = math.ceil(len(sampler) / batch)
    indices = torch.tensor(list(sampler))
    first = 0.0
    sums = torch.zeros(2, dtype=torch.float64)
    for step in range(total):
        for group in optimizer.param_groups:
            group["lr"] = 0.06 * schedule(step, total)
        rows = indices[step * batch : (step + 1) * batch]
        x = images[rows].float().div(255.0).unsqueeze(1)
        optimizer.zero_grad(set_to_none=True)
        loss = nn.functional.cross_entropy(net(x), labels[rows])
        loss.backward()
        optimizer.step()
        sums += torch.tensor([loss.item(), len(rows)], dtype=torch.float64)
        if step == 0 or (step + 1) % 10 == 0 or step + 1 == total:
            # The Rust program reduces its report as often.
            dist.all_reduce(sums)
            sums.zero_()
        if step == 0:
            first = time.time()
    if rank == 0:
        print(json.dumps({"first_step": first, "last_step": time.time(), "steps": total}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
