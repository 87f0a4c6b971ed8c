"""Torch's own server, on a free port, until its standard input ends. Prints the port.

It looks up the name of each client and serves nobody meanwhile. What it listens on by itself shows it IPv4 clients as
IPv6, whose names it asks the name server for, and it waits 5 s for a reply that is lost; 127.0.0.1 is in /etc/hosts."""

import socket
import sys

import torch.distributed as dist

listener = socket.create_server(("127.0.0.1", 0))
port = listener.getsockname()[1]
store = dist.TCPStore(
    "127.0.0.1", port, None, True, wait_for_workers=False, master_listen_fd=listener.detach(), use_libuv=True
)
print(port, flush=True)
sys.stdin.read()
