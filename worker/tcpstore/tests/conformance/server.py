"""Torch's own server, on a free port, until its standard input ends. Prints the port."""

import sys

import torch.distributed as dist

store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False, use_libuv=True)
print(store.port, flush=True)
sys.stdin.read()
