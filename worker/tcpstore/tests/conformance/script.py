"""Everything that a client of a store can do, in one script. Prints a line of JSON for each step: its name, and what
came of it. Run against two servers, the lines are to be the same. The argument is the server's port."""

import json
import sys
import threading
import time
from datetime import timedelta

import torch.distributed as dist

PORT = int(sys.argv[1])
PATIENCE = timedelta(seconds=20)
SHORT = timedelta(milliseconds=100)


def client(timeout=PATIENCE):
    return dist.TCPStore("127.0.0.1", PORT, None, False, timeout, wait_for_workers=False)


def hasty():
    """A client that soon has enough, but takes its time to connect."""
    hasty = client()
    hasty.set_timeout(SHORT)
    return hasty


def plain(value):
    if isinstance(value, bytes):
        return value.decode("latin-1") if len(value) < 100 else [len(value), hash_of(value)]
    if isinstance(value, list):
        return [plain(item) for item in value]
    return value


def hash_of(value):
    import hashlib

    return hashlib.sha256(value).hexdigest()


def step(name, act):
    try:
        result = plain(act())
    except Exception as error:  # What kind of error it is belongs to the answer; its words hold addresses.
        result = type(error).__name__
    print(json.dumps([name, result]), flush=True)


def in_background(act):
    result = []
    thread = threading.Thread(target=lambda: result.append(act()))
    thread.start()
    time.sleep(0.2)
    return lambda: (thread.join(), result[0])[1]


a, b = client(), client()


def put(key, value):
    a.set(key, value)
    # A set has no answer. What another connection asks next may come first, unless this one has heard something since.
    a.get(key)


step("set", lambda: a.set("key", "value"))
step("get", lambda: b.get("key"))
step("overwrite", lambda: (put("key", "other"), b.get("key"))[1])
step("empty value", lambda: (put("empty", ""), b.get("empty"))[1])
step("empty key", lambda: (put("", "x"), b.get(""))[1])
step("odd key", lambda: (put("\u043a\0\n/\x7f", "x"), b.get("\u043a\0\n/\x7f"))[1])
step("all bytes", lambda: (put("bytes", bytes(range(256))), b.get("bytes"))[1])
step("long key", lambda: (put("k" * 8191, "x"), b.get("k" * 8191))[1])
step("longest value of torch", lambda: (put("big", bytes(8 << 20)), b.get("big"))[1])
step("add", lambda: [a.add("n", 5), b.add("n", -7), a.add("n", 0), b.get("n")])
step("add to what was set", lambda: (put("n2", "41"), b.add("n2", 1))[1])
step("add to what begins as a number", lambda: (put("n3", " 12x"), b.add("n3", 1))[1])
step("add the most", lambda: [a.add("n4", 2**63 - 1), a.add("n5", -(2**63))])
step("check", lambda: [a.check(["key"]), a.check(["key", "n"]), a.check(["key", "none"])])
step("compare_set, new", lambda: a.compare_set("c", "", "first"))
step("compare_set, same", lambda: a.compare_set("c", "first", "second"))
step("compare_set, other", lambda: [a.compare_set("c", "first", "third"), b.get("c")])
step("compare_set, none", lambda: [a.compare_set("c2", "first", "third"), b.check(["c2"])])
step("compare_set, empty", lambda: [a.compare_set("c3", "", ""), b.check(["c3"])])
step("append", lambda: [a.append("ap", "x"), a.get("ap"), b.append("ap", "yz"), b.get("ap"), a.get("ap")])
step("append nothing", lambda: [a.append("ap2", ""), a.check(["ap2"]), b.check(["ap2"])])
step("multi_set", lambda: a.multi_set(["m1", "m2"], ["x", ""]))
step("multi_get", lambda: b.multi_get(["m2", "m1", "key"]))
many = [f"many/{n}" for n in range(2000)]
step("multi_set many", lambda: a.multi_set(many, [str(n) for n in range(2000)]))
step("multi_get many", lambda: b.multi_get(many) == [str(n).encode() for n in range(2000)])
step("check many", lambda: [b.check(many), b.check([*many, "none"])])
step("delete_key", lambda: [a.delete_key("m1"), a.delete_key("m1"), b.check(["m1"])])
step("num_keys", lambda: b.num_keys())
if hasattr(a, "list_keys"):
    step("list_keys", lambda: sorted(b.list_keys(), key=str)[-7:])

step("wait", lambda: [a.wait(["key", "n"]), a.wait([]), a.wait(["key"], PATIENCE)])
step("wait, late", lambda: a.wait(["never"], SHORT))
step("get, late", lambda: hasty().get("never"))
step("after a cancelled wait", lambda: [a.get("key"), a.check(["never"])])
woken = in_background(lambda: b.wait(["w1", "w2", "w1"]))
step("wake", lambda: [a.set("w1", "1"), a.add("w2", 1), woken()])
woken = in_background(lambda: b.get("w3"))
step("wake a get", lambda: [a.append("w3", "abc"), woken()])
woken = in_background(lambda: b.multi_get(["w4", "w5"]))
step("wake a multi_get", lambda: [a.multi_set(["w4", "w5"], ["4", "5"]), woken()])
woken = in_background(lambda: b.get("w6"))
step("wake by compare_set", lambda: [a.compare_set("w6", "", "6"), woken()])
others = [client() for _ in range(8)]
woken = [in_background(lambda c=c: c.get("w7")) for c in others]
step("wake many", lambda: [a.set("w7", "7"), *[each() for each in woken]])

if hasattr(a, "queue_push"):
    step("queue", lambda: [a.queue_push("q", "1"), a.queue_push("q", "22"), b.queue_len("q"), a.queue_len("none")])
    step("queue and keys", lambda: [a.check(["q"]), a.wait(["q"]), a.num_keys() == b.num_keys()])
    step("queue_pop", lambda: [b.queue_pop("q"), a.queue_pop("q"), a.queue_len("q")])
    step("queue_pop, empty", lambda: b.queue_pop("q", False))
    step("queue_pop, late", lambda: hasty().queue_pop("q"))
    popped = in_background(lambda: b.queue_pop("q2"))
    step("queue_pop waits", lambda: [a.queue_push("q2", "v"), popped(), a.queue_len("q2")])
    pops = [in_background(lambda c=c: c.queue_pop("q3")) for c in others[:5]]
    pushed = [a.queue_push("q3", f"v{n}") for n in range(5)]
    step("queue_pop by several", lambda: sorted(each() for each in pops))

p = dist.PrefixStore("outer", dist.PrefixStore("inner", a))
step("prefix", lambda: [p.set("x", "1"), p.get("x"), b.get("inner/outer/x"), b.check(["outer/inner/x"])])
step("prefix, all", lambda: [p.add("n", 2), p.check(["n"]), p.compare_set("c", "", "1"), p.delete_key("c")])
step("prefix, many", lambda: [p.multi_set(["1", "2"], ["x", "y"]), p.multi_get(["2", "1"]), p.append("1", "z")])
step("prefix, keys", lambda: p.num_keys() == a.num_keys())
step("prefix, wait", lambda: p.wait(["none"], SHORT))
if hasattr(p, "list_keys"):
    step("prefix, list_keys", lambda: sorted(p.list_keys()))
    step("prefix, queue", lambda: [p.queue_push("q", "1"), b.queue_len("inner/outer/q"), p.queue_pop("q")])
if hasattr(a, "clone"):
    step("clone", lambda: [a.clone().get("key"), a.clone().add("cl", 1), a.get("cl")])
if hasattr(a, "barrier"):
    passed = in_background(lambda: b.barrier("bar", 2))
    step("barrier", lambda: [a.barrier("bar", 2), passed()])
    step("barrier, late", lambda: a.barrier("bar2", 2, SHORT))
step("joined", lambda: dist.TCPStore("127.0.0.1", PORT, 1, False, PATIENCE) is not None)
step("number added to text", lambda: (b.set("text", "hello"), b.add("text", 1))[1])
step("after that", lambda: b.get("key"))
step("others after that", lambda: a.get("key"))
step("too long a key", lambda: (lambda c: [c.set("k" * 8192, "x"), c.get("key")])(client()))
