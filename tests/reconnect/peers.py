"""One round of a peer's rendezvous: peers.py torchft|torchft-threads|c10d AGENTS. The last line is the milliseconds from the moment
at which all may enter until the last one has its rank. Agents are forked from one process that has loaded everything, and are
connected before the clock starts where the peer allows it."""

import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

TIMEOUT = 120


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(port):
    end = time.monotonic() + TIMEOUT
    while time.monotonic() < end:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.01)
    raise TimeoutError("the server has not come")


def torchft_agent(port, at, agents):
    from torchft._torchft import LighthouseClient

    client = LighthouseClient(f"http://127.0.0.1:{port}", timedelta(seconds=30))
    name = f"agent-{at:05d}"

    def enter():
        quorum = client.quorum(
            name,
            timedelta(seconds=TIMEOUT),
            address=f"a{at}",
            store_address=f"s{at}",
            step=0,
            world_size=1,
            shrink_only=False,
        )
        return [member.replica_id for member in quorum.participants].index(name)

    return enter


def c10d_agent(port, at, agents):
    from torch.distributed.elastic.rendezvous import RendezvousParameters
    from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

    handler = get_rendezvous_handler(
        RendezvousParameters(
            backend="c10d",
            endpoint=f"127.0.0.1:{port}",
            run_id="bench",
            min_nodes=agents,
            max_nodes=agents,
            local_addr="127.0.0.1",
            is_host=at == 0,
        )
    )

    def enter():
        enter.kept = handler.next_rendezvous()
        return enter.kept.rank

    return enter


def in_threads(make, agents):
    start, ends, ready = threading.Event(), [], threading.Semaphore(0)

    def run(at):
        enter = make(at)
        ready.release()
        start.wait()
        ends.append((enter(), time.monotonic()))

    threads = [threading.Thread(target=run, args=(at,), daemon=True) for at in range(agents)]
    for thread in threads:
        thread.start()
    for _ in threads:
        ready.acquire()
    began = time.monotonic()
    start.set()
    for thread in threads:
        thread.join(TIMEOUT)
    return began, ends


def in_processes(make, agents, port):
    (ready, is_ready), (start, starts), (result, results) = os.pipe(), os.pipe(), os.pipe()
    children = []
    for at in range(agents):
        if at == 1 and port:
            # The first serves the others.
            wait_for(port)
        child = os.fork()
        if child == 0:
            enter = make(at)
            os.write(is_ready, b".")
            os.read(start, 1)
            rank = enter()
            os.write(results, f"{rank} {time.monotonic()}\n".encode())
            signal.pause()
        children.append(child)
    try:
        come = 0
        while come < agents:
            come += len(os.read(ready, 65536))
        began, text, end = time.monotonic(), b"", time.monotonic() + TIMEOUT
        os.write(starts, b"." * agents)
        while text.count(b"\n") < agents and time.monotonic() < end:
            if select.select([result], [], [], 1)[0]:
                text += os.read(result, 65536)
        ends = [line.split() for line in text.decode().splitlines()]
        return began, [(int(rank), float(at)) for rank, at in ends]
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def main(name, agents):
    port, server = free_port(), None
    if name == "c10d":
        import logging

        import torch.distributed.elastic.rendezvous.registry  # noqa: F401, loaded before the fork

        logging.disable(logging.CRITICAL)
        began, ends = in_processes(lambda at: c10d_agent(port, at, agents), agents, port)
    else:
        import torchft._torchft  # noqa: F401

        lighthouse = Path(sys.executable).with_name("torchft_lighthouse")
        flags = ["--min_replicas", str(agents), "--bind", f"127.0.0.1:{port}", "--join_timeout_ms", "60000"]
        server = subprocess.Popen([lighthouse, *flags], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            wait_for(port)
            make = lambda at: torchft_agent(port, at, agents)  # noqa: E731
            began, ends = in_threads(make, agents) if name.endswith("threads") else in_processes(make, agents, None)
        finally:
            server.kill()
            server.wait()
    assert sorted(rank for rank, _ in ends) == list(range(agents)), f"{len(ends)} of {agents} have a rank"
    print((max(end for _, end in ends) - began) * 1000)
    sys.stdout.flush()
    os._exit(0)


main(sys.argv[1], int(sys.argv[2]))
