"""Four of torch's own clients meet, in threads of one process: its calls do not hold Python's lock. The argument is the
server's port. Prints milliseconds."""

import sys
import threading
import time
from datetime import timedelta

import torch.distributed as dist

SIZE = 4
port = int(sys.argv[1])
start = threading.Barrier(SIZE + 1)


def rank(number):
    start.wait()
    store = dist.TCPStore("127.0.0.1", port, SIZE, False, timedelta(seconds=60))
    store.set(f"address/{number}", bytes(200))
    for other in range(SIZE):
        store.get(f"address/{other}")
    if store.add("barrier", 1) == SIZE:
        store.set("barrier/last", "1")
    store.wait(["barrier/last"])


threads = [threading.Thread(target=rank, args=[number]) for number in range(SIZE)]
for thread in threads:
    thread.start()
start.wait()
began = time.perf_counter()
for thread in threads:
    thread.join()
print((time.perf_counter() - began) * 1000)
