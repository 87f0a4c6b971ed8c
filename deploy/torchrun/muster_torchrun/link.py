"""An agent's stream to the coordinator, kept up by a thread: what is said goes out, what is heard is remembered."""

import os
import queue
import random
import threading
import time
import uuid

import grpc

from . import api

_OPTIONS = [
    # A coordinator whose machine is gone says nothing; neither does one whose connection a firewall has dropped.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    # The coordinator is in the cluster, where proxies for the world outside do not lead.
    ("grpc.enable_http_proxy", 0),
]
# Seconds between attempts, doubled up to the second.
_BACKOFF = (0.1, 2.0)
# Answers that another attempt will not change.
_FINAL = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.UNIMPLEMENTED,
}


class Link:
    """What the agent knows. Every field is read and written under `changed`."""

    def __init__(self, endpoints, hello):
        self.changed = threading.Condition()
        # The place in the round that runs, as heard.
        self.place = None
        # Why the round is over, if it is.
        self.recall = None
        # The failure that ended the run, or empty words if it has just ended.
        self.closed = None
        # Why there is no round yet, in the coordinator's words or about the connection.
        self.reason = ""
        # The answer that ended all attempts.
        self.refused = None
        self._endpoints = endpoints
        # Here, so that files that cannot be read are an error of whoever starts the agent.
        self._credentials = _credentials() if any(_is_encrypted(endpoint) for endpoint in endpoints) else None
        self._hello = dict(hello, agent_id=uuid.uuid4().hex)
        # Where this agent would serve the store, while it waits for a place.
        self._offer = None
        self._outgoing = None
        self._ending = False
        self._thread = threading.Thread(target=self._keep_up, name="muster-rendezvous", daemon=True)
        self._thread.start()

    def enter(self, address, port):
        """Asks for a place in the next round; the one in this is given up."""
        with self.changed:
            self.place, self.recall, self.reason = None, None, ""
            self._offer = {"address": address, "port": port}
            self._say(enter=self._offer)

    def leave(self, failure, timeout):
        """Ends the run, and the stream. Waits so many seconds for the words to be out."""
        with self.changed:
            self._ending = True
            self._say(leave={"failure": failure})
            self.changed.notify_all()
        self._thread.join(timeout)

    def _say(self, **message):
        if self._outgoing is not None:
            self._outgoing.put(api.Request(**message))

    def _keep_up(self):
        attempt = 0
        while True:
            began = time.monotonic()
            failure = self._stream(self._endpoints[attempt % len(self._endpoints)])
            with self.changed:
                if self._ending or self.closed is not None:
                    return
                if failure is not None:
                    self.reason = f"no coordinator at {self._endpoints[attempt % len(self._endpoints)]}: {failure.details()}"
                    if failure.code() in _FINAL:
                        self.refused = failure.details()
                        self.changed.notify_all()
                        return
                attempt = 0 if time.monotonic() - began > 10 else attempt + 1
                span = min(_BACKOFF[0] * 2 ** min(attempt, 10), _BACKOFF[1])
                self.changed.wait_for(lambda: self._ending, span * random.uniform(0.5, 1))
                if self._ending:
                    return

    def _stream(self, endpoint):
        """One stream, to its end; gives the error that ended it."""
        outgoing = queue.SimpleQueue()
        with self.changed:
            held = {"held": self.place} if self.place is not None else {}
            outgoing.put(api.Request(hello=dict(self._hello, **held)))
            if self._offer is not None:
                outgoing.put(api.Request(enter=self._offer))
            self._outgoing = outgoing
        try:
            with self._channel(endpoint) as channel:
                join = channel.stream_stream(
                    api.METHOD,
                    request_serializer=api.Request.SerializeToString,
                    response_deserializer=api.Response.FromString,
                )
                for response in join(_until_left(outgoing)):
                    self._hear(response)
        except grpc.RpcError as error:
            return error
        finally:
            with self.changed:
                self._outgoing = None
            # Lets go of the thread that waits for more to send.
            outgoing.put(None)
        return None

    def _channel(self, endpoint):
        if _is_encrypted(endpoint):
            return grpc.secure_channel(endpoint.removeprefix("https://"), self._credentials, options=_OPTIONS)
        return grpc.insecure_channel(endpoint, options=_OPTIONS)

    def _hear(self, response):
        what = response.WhichOneof("message")
        with self.changed:
            if what == "place":
                self.place, self.recall, self._offer = response.place, None, None
            elif what == "recall":
                self.recall = response.recall.reason
            elif what == "closed":
                self.closed = response.closed.failure
            elif what == "waiting":
                self.reason = response.waiting.reason
            self.changed.notify_all()


def _is_encrypted(endpoint):
    return endpoint.startswith("https://")


def _credentials():
    """Whom to trust, and the token that says who calls: the same variables as the command line's."""

    def read(variable, what):
        path = os.environ.get(variable)
        if not path:
            raise ValueError(f"a coordinator at https:// needs {variable}, {what}")
        with open(path, "rb") as file:
            return file.read()

    authority = read("MUSTER_CA", "the file with its authority's certificate, ca.crt")
    token = read("MUSTER_TOKEN_FILE", "the file with a token, as `muster token create --role submitter` printed it")
    return grpc.composite_channel_credentials(
        grpc.ssl_channel_credentials(root_certificates=authority),
        grpc.access_token_call_credentials(token.decode("ascii").strip()),
    )


def _until_left(outgoing):
    while (message := outgoing.get()) is not None:
        yield message
        if message.WhichOneof("message") == "leave":
            return
