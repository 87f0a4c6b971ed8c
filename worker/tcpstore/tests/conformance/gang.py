"""A rank as torchrun starts it: makes process groups and works in them."""

import os
from datetime import timedelta

import torch
import torch.distributed as dist

assert os.environ["TORCHELASTIC_USE_AGENT_STORE"] == "True"
rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def sum_is(expected, group=None):
    value = torch.full((1000,), float(rank))
    dist.all_reduce(value, group=group)
    assert value.eq(expected).all(), value[:3]


dist.init_process_group("gloo", timeout=timedelta(seconds=60))
assert dist.get_rank() == rank and dist.get_world_size() == size
sum_is(sum(range(size)))
dist.barrier()
for _ in range(3):
    pair = dist.new_group([0, 1])
    if rank < 2:
        sum_is(1, pair)
        dist.destroy_process_group(pair)
objects = [None] * size
dist.all_gather_object(objects, {"rank": rank})
assert [each["rank"] for each in objects] == list(range(size))
dist.monitored_barrier()
dist.destroy_process_group()

# The same store again needs a prefix of its own, with torch's agent store too: the addresses of before are still there.
store = dist.TCPStore(
    os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), size, False, timedelta(seconds=60)
)
for turn in range(2):
    prefixed = dist.PrefixStore(f"turn{turn}", store)
    dist.init_process_group("gloo", store=prefixed, rank=rank, world_size=size)
    sum_is(sum(range(size)))
    dist.barrier()
    dist.destroy_process_group()
print("done", rank)
