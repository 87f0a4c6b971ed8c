"""A first job for a new cluster: all-reduce among all ranks, checked and timed.

    muster submit --nnodes 2 --nproc-per-node 8 --gpus-per-proc 1 --follow -- python3 nccl_check.py

Runs over NCCL where each rank has a GPU, else over Gloo. Rank 0 prints, for each size, the time of one all-reduce and the
bus bandwidth as nccl-tests define it (2 (n - 1) / n of the bytes over the time): the number to compare with the rate of the
rails. It is shown by `muster plot ID --key busbw_gbytes` as well. Ends with 1 if a sum is wrong, or if the bandwidth of the
largest size is below --min-gbytes.
"""

import argparse
import datetime
import json
import os
import socket
import sys
import time

import torch
import torch.distributed as dist

# The smallest shows latency, the largest bandwidth.
FIRST_BYTES = 1 << 10
# Each size is four times the last: twelve lines to a gigabyte.
GROWTH = 4
WARM_UP = 3


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--max-bytes", type=int, default=None, help="largest all-reduce (1 GiB over NCCL, 16 MiB over Gloo)")
    parser.add_argument("--repeat", type=int, default=20, help="all-reduces of each size that are timed together")
    parser.add_argument("--min-gbytes", type=float, default=0.0, help="bus bandwidth of the largest size that is enough, GB/s")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds after which an all-reduce that hangs is an error")
    return parser.parse_args()


def report(step: int, busbw: float) -> None:
    """Sends a point to Muster, if it runs under it."""
    path = os.environ.get("MUSTER_TELEMETRY")
    if path:
        with socket.socket(socket.AF_UNIX) as stream:
            stream.connect(path)
            stream.sendall(json.dumps({"step": step, "values": {"busbw_gbytes": busbw}}).encode() + b"\n")


def all_reduce_seconds(tensor: torch.Tensor, repeat: int, wait) -> float:
    for _ in range(WARM_UP):
        dist.all_reduce(tensor)
    wait()
    dist.barrier()
    began = time.perf_counter()
    for _ in range(repeat):
        dist.all_reduce(tensor)
    wait()
    return (time.perf_counter() - began) / repeat


def main() -> int:
    args = arguments()
    local_rank = int(os.environ["LOCAL_RANK"])
    # A rank that Muster gives one GPU sees that one alone, as number 0; under torchrun it sees all of the node's.
    visible = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if visible:
        device = torch.device("cuda", local_rank % visible)
        torch.cuda.set_device(device)
        backend, wait = "nccl", torch.cuda.synchronize
    else:
        device, backend, wait = torch.device("cpu"), "gloo", lambda: None
    dist.init_process_group(backend, timeout=datetime.timedelta(seconds=args.timeout))
    rank, size = dist.get_rank(), dist.get_world_size()
    hosts = [None] * size
    dist.all_gather_object(hosts, (socket.gethostname(), str(device)))
    if rank == 0:
        version = ".".join(map(str, torch.cuda.nccl.version())) if backend == "nccl" else ""
        print(f"{size} ranks over {backend} {version}", flush=True)
        for host in sorted({host for host, _ in hosts}):
            print(f"  {host}: {', '.join(device for name, device in hosts if name == host)}", flush=True)
        print(f"{'bytes':>12} {'ms':>10} {'GB/s on the bus':>16}", flush=True)

    largest = args.max_bytes or (1 << 30 if backend == "nccl" else 16 << 20)
    count, step, busbw = FIRST_BYTES, 0, 0.0
    while count <= largest:
        tensor = torch.full((count // 4,), float(rank + 1), device=device)
        dist.all_reduce(tensor)
        expected = size * (size + 1) / 2
        wrong = torch.tensor([float((tensor != expected).any())], device=device)
        dist.all_reduce(wrong)
        if wrong.item():
            print(f"rank {rank}: the sum of {count} bytes is wrong on {int(wrong.item())} ranks", file=sys.stderr, flush=True)
            return 1
        seconds = all_reduce_seconds(torch.zeros_like(tensor), args.repeat, wait)
        busbw = count / seconds * 2 * (size - 1) / size / 1e9
        step += 1
        if rank == 0:
            print(f"{count:>12} {seconds * 1e3:>10.3f} {busbw:>16.3f}", flush=True)
            report(step, busbw)
        count *= GROWTH
    # What rank 0 has measured counts for all, so that all end the same way.
    measured = torch.tensor([busbw], device=device)
    dist.broadcast(measured, 0)
    dist.destroy_process_group()
    if measured.item() < args.min_gbytes:
        print(f"{measured.item():.3f} GB/s are less than --min-gbytes {args.min_gbytes}", file=sys.stderr, flush=True)
        return 1
    if rank == 0:
        print("every sum is right", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
