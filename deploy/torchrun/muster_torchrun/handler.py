"""torch's RendezvousHandler on a Link."""

import logging
import re
import socket
import sys
import time
from datetime import timedelta

from torch.distributed import PrefixStore, TCPStore
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousHandler,
    RendezvousInfo,
    RendezvousStateError,
    RendezvousStoreInfo,
    RendezvousTimeoutError,
)

from .address import endpoints, own_address
from .link import Link

log = logging.getLogger(__name__)

# Seconds, torchrun's own defaults.
JOIN_TIMEOUT = 600
LAST_CALL_TIMEOUT = 30
# Seconds without a round after which the user is told why; then again whenever the reason changes.
TELL_AFTER = 5
# Seconds that the end of an agent waits for the coordinator to hear of it.
LEAVE_WITHIN = 5
# What --rdzv-conf may hold for other backends.
FOREIGN = {"close_timeout", "keep_alive_interval", "keep_alive_max_attempt", "read_timeout", "is_host", "store_type"}


class MusterRendezvousHandler(RendezvousHandler):
    """Meets the other agents at a coordinator; each round has a store of its own, served by one of the agents."""

    def __init__(self, parameters):
        self._run_id = parameters.run_id
        self._endpoints = endpoints(parameters.endpoint)
        self._join_timeout = parameters.get_as_int("join_timeout", JOIN_TIMEOUT)
        last_call = parameters.get_as_int("last_call_timeout", LAST_CALL_TIMEOUT)
        # torchrun adds a timeout of its own, which it uses for static rendezvous.
        for name in sorted(set(parameters.config) - {"join_timeout", "last_call_timeout", "timeout"}):
            if name not in FOREIGN:
                raise ValueError(f"--rdzv-conf {name}: the muster backend takes join_timeout and last_call_timeout")
            log.warning("--rdzv-conf %s has no effect with the muster backend", name)
        self._address = own_address(parameters.local_addr, self._endpoints[0])
        self._hello = {
            "run_id": self._run_id,
            "node_name": re.sub(r"[^A-Za-z0-9._-]", "-", socket.gethostname()).lstrip(".")[:253] or "unknown",
            "min_agents": parameters.min_nodes,
            "max_agents": parameters.max_nodes,
            "last_call": {"seconds": last_call if parameters.min_nodes < parameters.max_nodes else 0},
        }
        self._link = None
        self._store = None
        self._was_placed = False

    def get_backend(self):
        return "muster"

    def get_run_id(self):
        return self._run_id

    @property
    def use_agent_store(self):
        return True

    def next_rendezvous(self):
        if self._link is None:
            self._link = Link(self._endpoints, self._hello)
        # Of the round before; agents that still use it are about to do the same.
        self._store = None
        with socket.create_server((self._address, 0), family=_family(self._address), backlog=2048) as listener:
            self._link.enter(self._address, listener.getsockname()[1])
            place = self._wait_for_place()
            self._was_placed = True
            serves = place.rank == place.store_rank
            self._store = TCPStore(
                place.store_address,
                place.store_port,
                None,
                serves,
                timedelta(seconds=self._join_timeout),
                wait_for_workers=False,
                # Bound before it was offered, and only at this address.
                master_listen_fd=listener.detach() if serves else None,
            )
        return RendezvousInfo(
            PrefixStore(f"torchrun/{place.round}", self._store),
            place.rank,
            place.world_size,
            RendezvousStoreInfo(place.store_address, place.store_port),
        )

    def _wait_for_place(self):
        link, began, told = self._link, time.monotonic(), ""
        deadline = began + self._join_timeout
        with link.changed:
            while True:
                if link.place is not None:
                    return link.place
                if link.closed is not None:
                    self._end_of_run(link.closed)
                if link.refused is not None:
                    raise RendezvousStateError(f"run {self._run_id!r}: {link.refused}")
                now = time.monotonic()
                if now >= deadline:
                    reason = link.reason or "the coordinator says nothing"
                    raise RendezvousTimeoutError(
                        f"no round of run {self._run_id!r} within {self._join_timeout} s (join_timeout): {reason}"
                    )
                if now >= began + TELL_AFTER and link.reason not in ("", told):
                    told = link.reason
                    log.warning("waiting for a round of run %r: %s", self._run_id, told)
                # In slices, so that a signal is handled soon.
                link.changed.wait(min(deadline - now, 0.5))

    def _end_of_run(self, failure):
        if failure:
            raise RendezvousClosedError(f"run {self._run_id!r} has failed elsewhere: {failure}")
        if not self._was_placed:
            # RendezvousGracefulExitError is meant for this, but torchrun 2.11 then trips over a result that is not there.
            log.warning("run %r has finished without this node", self._run_id)
            raise SystemExit(0)
        raise RendezvousClosedError(f"run {self._run_id!r} has finished elsewhere")

    def is_closed(self):
        if self._link is None:
            return False
        with self._link.changed:
            return self._link.closed is not None

    def set_closed(self):
        self._leave("")

    def num_nodes_waiting(self):
        # The agent asks this to learn whether the round is over, be it because others have come or because one is gone.
        if self._link is None:
            return 0
        with self._link.changed:
            return int(self._link.recall is not None or bool(self._link.closed))

    def shutdown(self):
        # torchrun does not say here how the agent has ended, but it calls from where the exception passes.
        self._leave(_failure(sys.exc_info()[1]))
        return True

    def _leave(self, failure):
        if self._link is not None:
            self._link.leave(failure, LEAVE_WITHIN)


def _family(address):
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _failure(error):
    """The failure that ends the agent, in words; empty if it ends well."""
    if error is None or (isinstance(error, SystemExit) and not error.code):
        return ""
    try:
        rank, first = error.get_first_failure()
        # Without an error file the message is advice, or repeats the code.
        said = f": {first.message}" if first.error_file != "<N/A>" else ""
        return f"rank {rank} ended with exit code {first.exitcode}{said}"
    except AttributeError:
        return f"{type(error).__name__}: {error}"
