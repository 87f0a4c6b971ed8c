"""Where coordinators are, and at which address other agents reach this one."""

import ipaddress
import re
import socket

DEFAULT_PORT = 7070


def endpoints(text):
    """Each as host:port, or https://host:port where the coordinator speaks TLS."""
    found = []
    for endpoint in (text or "").split(","):
        endpoint = endpoint.strip()
        if "@" in endpoint:
            # Not shown: what follows may be logged.
            raise ValueError("an endpoint names no user and no password; MUSTER_TOKEN_FILE names the file with a token")
        scheme = "https://" if endpoint.startswith("https://") else ""
        endpoint = endpoint.removeprefix(scheme or "http://").rstrip("/")
        if not endpoint:
            raise ValueError("--rdzv-endpoint names the coordinator: host:7070, or several, separated by commas")
        # An IPv6 address without brackets has no room for a port.
        has_port = re.search(r"(^[^:]+|\]):\d+$", endpoint)
        bare_v6 = endpoint.count(":") > 1 and not endpoint.startswith("[")
        if not has_port:
            endpoint = f"[{endpoint}]:{DEFAULT_PORT}" if bare_v6 else f"{endpoint}:{DEFAULT_PORT}"
        found.append(scheme + endpoint)
    return found


def own_address(local_addr, endpoint):
    """The IP address at which other nodes reach this one: what the user says, else what reaches the coordinator."""
    host, port = local_addr, 0
    if not host:
        host, port = endpoint.removeprefix("https://").rsplit(":", 1)
    host = host.strip("[]")
    targets = socket.getaddrinfo(host, int(port), type=socket.SOCK_DGRAM)
    if local_addr:
        found = [target[4][0] for target in targets]
    else:
        found = [source for source in map(_source_towards, targets) if source]
    if not found:
        raise ValueError(f"this machine has no way to {host}")
    own = next((address for address in found if not _is_loopback(address)), found[0])
    if not _is_loopback(own) or host == "localhost" or _is_literal(host):
        return own
    # Many hosts have their own name stand for loopback, where no other finds them. These addresses nobody has (RFC 5737 and
    # 3849): only a default route leads there.
    anywhere = ((socket.AF_INET, ("192.0.2.1", 9)), (socket.AF_INET6, ("2001:db8::1", 9)))
    routes = (_source_towards((family, socket.SOCK_DGRAM, 0, "", target)) for family, target in anywhere)
    return next((route for route in routes if route), own)


def _source_towards(target):
    """The address from which this machine reaches what getaddrinfo has found; none if there is no way."""
    family, kind, protocol, _, address = target
    try:
        with socket.socket(family, kind, protocol) as probe:
            # Of a datagram socket this sends nothing.
            probe.connect(address)
            return probe.getsockname()[0]
    except OSError:
        return None


def _is_literal(host):
    try:
        return bool(ipaddress.ip_address(host))
    except ValueError:
        return False


def _is_loopback(address):
    return ipaddress.ip_address(address.split("%")[0]).is_loopback
