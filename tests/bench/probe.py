"""The rank of the recovery bench: says when it was spawned and when it trains, then trains until it is killed.

Appends lines "Unix-time what pid token world" to $BED/events; ranks of one generation have one token.
"""

import time

SPAWNED = time.time()

import os
import random

EVENTS = os.open(os.path.join(os.environ["BED"], "events"), os.O_WRONLY | os.O_APPEND | os.O_CREAT)


def say(what: str, when: float, token: int = 0) -> None:
    os.write(EVENTS, f"{when:.6f} {what} {os.getpid()} {token} {os.environ['WORLD_SIZE']}\n".encode())


say("spawned", SPAWNED)

import torch
import torch.distributed as dist

dist.init_process_group("gloo")
token = torch.tensor([random.getrandbits(40) if dist.get_rank() == 0 else 0])
dist.all_reduce(token)
say("ready", time.time(), int(token))
gradients = torch.ones(1024)
while True:
    dist.all_reduce(gradients)
    gradients /= dist.get_world_size()
    say("step", time.time(), int(token))
    time.sleep(0.02)
