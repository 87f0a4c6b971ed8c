"""A rank of the bench of init_process_group: leaves when torch was there and when the ranks had met in DIR/<rank>."""

import os
import sys
import time

import torch
import torch.distributed as dist

imported = time.monotonic()
dist.init_process_group("gloo")
ready = time.monotonic()
rank = dist.get_rank()
dist.barrier()
dist.destroy_process_group()
with open(os.path.join(sys.argv[1], str(rank)), "w") as file:
    file.write(f"{imported} {ready}")
