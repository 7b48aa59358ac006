"""How the store is reached in each form in which it is run, and what is wrong when it is not."""

from __future__ import annotations

import importlib
import ssl
from collections.abc import Iterator, Sequence
from typing import Any

from llmux.config.store_address import StoreAddress

PATIENCE = 1.0  # seconds that one step of a call may take


def clients_of(address: StoreAddress) -> tuple[Any, Sequence[Any]]:
    """Return the library's client, and those of the sentinels which that asks. Nothing is connected yet."""
    asynchronous = importlib.import_module("redis.asyncio")
    retry = importlib.import_module("redis.asyncio.retry").Retry
    backoff = importlib.import_module("redis.backoff").NoBackoff
    common: dict[str, Any] = {
        "socket_timeout": PATIENCE,
        "socket_connect_timeout": PATIENCE,
        "retry": retry(backoff(), 0),
    }
    if address.tls:
        common |= {
            "ssl": True,
            "ssl_ca_certs": address.ca,
            "ssl_certfile": address.cert,
            "ssl_keyfile": address.cert_key,
        }
        if address.ca is not None:  # as for remotes: their own CA is verified alike with every Python
            common["ssl_exclude_verify_flags"] = [ssl.VERIFY_X509_STRICT]
    login = {"username": address.user, "password": address.password, "decode_responses": True}
    if address.kind == "cluster":
        node = importlib.import_module("redis.asyncio.cluster").ClusterNode
        nodes = [node(host, port) for host, port in address.nodes]
        return asynchronous.RedisCluster(startup_nodes=nodes, **common, **login), ()
    if address.kind == "sentinel":
        asked = common | {"username": address.sentinel_user, "password": address.sentinel_password}
        sentinel = importlib.import_module("redis.asyncio.sentinel").Sentinel
        known = sentinel(address.nodes, sentinel_kwargs=asked, **common, **login)
        return known.master_for(address.master, db=address.db), known.sentinels
    if address.socket:
        where: dict[str, Any] = {"unix_socket_path": address.socket}
    else:
        where = dict(zip(("host", "port"), address.nodes[0], strict=True))
    return asynchronous.Redis(db=address.db, **where, **common, **login), ()


_CERTIFICATE = "wants a certificate of its clients: name yours, as rediss://host:6379/0?cert=FILE&cert_key=FILE"
_SAID: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("NOAUTH", "Authentication required", "already authenticated", "HELLO must be called with"),
        "it wants a password: write the address as redis://:PASSWORD@host:6379/0",
    ),
    (
        ("WRONGPASS", "invalid password", "invalid username-password"),
        "it refuses the password in its address, or the user",
    ),
    (
        ("CERTIFICATE_VERIFY_FAILED",),
        "its certificate is not trusted: name the file of its CA, as rediss://host:6379/0?ca=/etc/llmux/ca.pem",
    ),
    (
        ("CERTIFICATE_REQUIRED", "certificate required"),
        f"it {_CERTIFICATE}",
    ),
    (
        ("WRONG_VERSION_NUMBER", "record layer failure"),
        "it does not speak TLS: write redis:// for a port without",
    ),
    (
        ("READONLY", "read only replica"),
        "it is a replica, which cannot be written to: give the address of its master, or redis+sentinel://",
    ),
    (
        ("MovedError", "AskError"),
        "it is a node of a cluster: write the address as redis+cluster://host:6379",
    ),
    (
        ("cluster mode is not enabled", "cluster support disabled"),
        "it is no node of a cluster: write the address as redis://host:6379/0",
    ),
    (("CLUSTERDOWN", "Hash slot not served"), "its cluster is not whole: see `redis-cli cluster info`"),
    (
        ("No master found", "No such master"),
        "no sentinel that answers knows a master of this name",
    ),
    (("NOPERM", "has no permissions"), "its user may not do all that is needed: see FLEET.md for the ACL"),
    (("DB index is out of range", "invalid DB index"), "it has no database of that number"),
    (("OOM command",), "its memory is full: raise its `maxmemory`"),
    (("LOADING", "loading the dataset"), "it is starting"),
    (("Connect call failed", "Connection refused"), "it takes no connections: does it run?"),
    (("No such file or directory",), "there is no such socket: does it run?"),
    (("Protocol Error", "Invalid response", "unknown command"), "what answers there is no Valkey or Redis"),
)


def words_of(error: Exception, address: StoreAddress) -> str:
    """Say what is wrong, and what to do."""
    text = " ".join(f"{type(each).__name__}: {each}" for each in _chain(error))
    if "certificate is not valid for" in text or "IP address mismatch" in text or "Hostname mismatch" in text:
        return f"the certificate of {address} is another host's: call it as its certificate does"
    for signs, words in _SAID:
        if any(sign.lower() in text.lower() for sign in signs):
            return f"{address}: {words}"
    if isinstance(error, TimeoutError) or "Timeout" in text:
        return f"{address}: it does not answer{', or not by TLS' if address.tls else ''}"
    if "Connection closed by server" in text or "reset by peer" in text or "Connection lost" in text:
        more = "" if address.tls or address.socket else ": is it one, and does it want TLS (rediss://)?"
        if address.tls and address.cert is None:  # what it said of that may be lost with the connection
            more = f"; perhaps it {_CERTIFICATE}"
        return f"{address}: it has closed the connection{more}"
    return f"{address}: {error}" if str(error) else f"{address}: {type(error).__name__}"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
