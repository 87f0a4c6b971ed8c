"""Rendezvous at a Muster coordinator, for stock torchrun: `--rdzv-backend=muster --rdzv-endpoint=host:7070`."""


def creator():
    """What torchrun looks for under the entry point: makes a handler from torch's RendezvousParameters."""

    def create(parameters):
        # torch loads every such package whenever it is loaded itself; gRPC is only loaded where it is used.
        from .handler import MusterRendezvousHandler

        return MusterRendezvousHandler(parameters)

    return create
