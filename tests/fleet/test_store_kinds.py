"""The store in all forms in which it is run, real ones: TLS, users, sentinels, clusters; and what is no store."""

from __future__ import annotations

import asyncio
import contextlib
import re
import shutil
import subprocess
import time

import pytest

from llmux.config.setting_types import parse_store
from llmux.fleet.store import Store, StoreError, Use
from tests.harness.lease.raw import HOST
from tests.harness.ports import free_port
from tests.harness.store_server import SERVER, Server
from tests.harness.waiting import PATIENCE

pytest.importorskip("redis")


async def comes_to(url, check):
    """Call the store until what comes of it is what a test wants, an error's words included; return that."""
    store, until, said = Store(url), time.monotonic() + PATIENCE, ""
    try:
        while time.monotonic() < until:
            try:
                said = await store.register("gpu1", "i", 1, {"url": "u"})
            except StoreError as error:
                said = str(error)
            if check(said):
                return said
            await asyncio.sleep(0.05)
        raise AssertionError(f"last it said: {said}")
    finally:
        await store.close()


def runs(said):
    return not any(words in said for words in ("it takes no connections", "it is starting", "it does not answer"))


async def works(url):
    """See to it that every kind of call works, however slow the machine is."""
    await comes_to(url, lambda said: said in {"ok", "overtaken"})
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("llmux.fleet.store.PATIENCE", PATIENCE)
        patched.setattr("llmux.fleet.store.LONGEST", PATIENCE)
        await _works(Store(url))


async def _works(store):
    try:
        assert await store.hosts() == {"gpu1": {"url": "u"}}
        await store.fly("x", {"one": {"a": 2}})
        assert await store.flights("y") == {"one": {"a": 2}}
        await store._redis.delete("{llmux}:used", "{llmux}:use:budget:0:a")  # of the user before
        assert (await store.claim("a", "one", 60.0)).host == "one"
        assert set(await store.claims()) == {"a"}
        uses = [Use("requests:1:1:a", "rate", 500.0, 0.0, 0), Use("budget:0:a", "budget", 7, 3, 60_000)]
        told = await store.use("x", time.monotonic_ns(), 0.0, uses, {"a": (1, 2)})
        assert told.empty
        assert set(told.values) == {"requests:1:1:a", "budget:0:a"}
        assert told.values["budget:0:a"] == 10
        assert not (await store.use("y", 1, 0.0, (), {})).empty
        await store.deregister("gpu1", "i")
        assert await store.hosts() == {}
    finally:
        await store.close()


@contextlib.contextmanager
def running(*options, **more):
    server = Server(*options, **more)
    try:
        yield server
    finally:
        server.close()


# ---- TLS


def openssl(*words, cwd):
    subprocess.run(["openssl", *words], cwd=cwd, check=True, capture_output=True, timeout=60)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """Two CAs, and a server's certificate of the first for 127.0.0.1."""
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl")
    folder = tmp_path_factory.mktemp("tls")
    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2")
    for name in ("ca", "other"):
        openssl(
            "req",
            "-x509",
            *key,
            "-keyout",
            f"{name}.key",
            "-out",
            f"{name}.pem",
            "-subj",
            f"/CN={name}",
            cwd=folder,
        )
    for name, alt in (("server", "IP:127.0.0.1"), ("elsewhere", "DNS:store.example")):
        openssl("req", *key[:5], "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", "/CN=store", cwd=folder)
        (folder / "alt").write_text(f"subjectAltName={alt}\n")
        openssl(
            "x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial",
            "-days", "2", "-extfile", "alt", "-out", f"{name}.pem", cwd=folder,
        )  # fmt: skip
    return folder


def tls_server(folder, name="server", *options):
    files = "--tls-cert-file", folder / f"{name}.pem", "--tls-key-file", folder / f"{name}.key"
    server = Server(*files, "--tls-ca-cert-file", folder / "ca.pem", *options, tls=True)
    if server.process.poll() is not None:  # before it took a connection
        pytest.skip("this server was built without TLS")
    return server


async def test_tls_with_a_ca_of_ones_own(certificates):
    server = tls_server(certificates, "server", "--tls-auth-clients", "no")
    try:
        url = f"rediss://{HOST}:{server.port}/0"
        await works(f"{url}?ca={certificates / 'ca.pem'}")
        said = await comes_to(url, lambda said: "certificate" in said)
        assert "is not trusted: name the file of its CA, as rediss://host:6379/0?ca=" in said
        said = await comes_to(f"{url}?ca={certificates / 'other.pem'}", lambda said: "certificate" in said)
        assert "is not trusted" in said
        said = await comes_to(server.url, runs)
        assert "does it want TLS (rediss://)?" in said
    finally:
        server.close()


async def test_tls_with_certificates_on_both_sides_and_another_hosts(certificates):
    server = tls_server(certificates, "server")
    other = tls_server(certificates, "elsewhere", "--tls-auth-clients", "no")
    try:
        ca = f"?ca={certificates / 'ca.pem'}"
        own = f"&cert={certificates / 'server.pem'}&cert_key={certificates / 'server.key'}"
        await works(f"rediss://{HOST}:{server.port}/0{ca}{own}")
        said = await comes_to(f"rediss://{HOST}:{server.port}/0{ca}", runs)
        assert "wants a certificate of its clients" in said
        said = await comes_to(f"rediss://{HOST}:{other.port}/0{ca}", runs)
        assert "is another host's" in said
    finally:
        server.close()
        other.close()


async def test_tls_where_there_is_none():
    with running() as server:
        url = server.url.replace("redis://", "rediss://")
        await comes_to(url, lambda said: "it does not answer, or not by TLS" in said)


# ---- users


ACL = "on >s3cret resetkeys ~{llmux}:* resetchannels -@all +@connection +eval +time +type +exists +get +set +del"
ACL += " +pttl +pexpire +hget +hmget +hset +zadd +zrem +zrangebyscore +zremrangebyscore +info"

READER = "on >r ~* -@all +get"


async def test_a_user_with_no_more_rights_than_are_needed():
    with running("--user", "llmux", *ACL.split(), "--user", "reader", *READER.split()) as server:
        await works(server.url.replace("://", "://llmux:s3cret@"))
        said = await comes_to(server.url.replace("://", "://reader:r@"), runs)
        assert "may not do all that is needed: see FLEET.md for the ACL" in said
        said = await comes_to(server.url.replace("://", "://llmux:no@"), runs)
        assert "refuses the password in its address, or the user" in said


# ---- sentinels, clusters, replicas


async def test_sentinels_say_which_server_it_is(tmp_path):
    port = free_port()
    with running() as server, running("--replicaof", HOST, str(server.port)) as replica:
        file = tmp_path / "sentinel.conf"
        file.write_text(
            f"bind {HOST}\nport {port}\nsentinel monitor fleet {HOST} {server.port} 1\n"
            "sentinel down-after-milliseconds fleet 500\nsentinel failover-timeout fleet 3000\n"
        )
        sentinel = subprocess.Popen(  # noqa: ASYNC220 - a server, not waited for
            [SERVER, file, "--sentinel"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, cwd=tmp_path
        )
        try:
            url = f"redis+sentinel://{HOST}:{port},{HOST}:{free_port()}/fleet"
            await works(url)
            said = await comes_to(url.replace("/fleet", "/nonsense"), lambda said: "master" in said)
            assert "no sentinel that answers knows a master of this name" in said
            said = await comes_to(replica.url, runs)
            assert "it is a replica, which cannot be written to" in said

            while str(replica.port) not in file.read_text():  # noqa: ASYNC110 - it tells by its file alone
                await asyncio.sleep(0.1)
            server.process.kill()
            await comes_to(url, lambda said: said == "ok")  # the replica has become the master
        finally:
            sentinel.kill()
            sentinel.wait()


async def test_a_cluster_of_three(tmp_path):
    if shutil.which("redis-cli") is None:
        pytest.skip("there is no redis-cli")
    nodes = []
    user = "--user", "llmux", *ACL.split(), "+cluster|slots", "+command"
    try:
        for name in "abc":
            (tmp_path / name).mkdir()
            bus = free_port()
            nodes.append(
                Server("--cluster-enabled", "yes", "--cluster-port", str(bus), "--dir", tmp_path / name, *user)
            )
        assert all(["its cluster is not whole" in await comes_to(node.url, runs) for node in nodes])
        places = [f"{HOST}:{node.port}" for node in nodes]
        await asyncio.to_thread(
            subprocess.run,
            ["redis-cli", "--cluster", "create", *places, "--cluster-yes"],
            check=True, capture_output=True, timeout=120,
        )  # fmt: skip
        for place in places:
            await works(f"redis+cluster://{place}")
        await works(f"redis+cluster://llmux:s3cret@{places[0]}")
        said = [await comes_to(node.url, lambda said: "not whole" not in said) for node in nodes]
        assert (
            sum("it is a node of a cluster: write the address as redis+cluster://" in each for each in said) == 2
        )
    finally:
        for node in nodes:
            node.close()


async def test_a_server_that_is_no_cluster():
    with running() as server:
        said = await comes_to(f"redis+cluster://{HOST}:{server.port}", runs)
        assert "it is not a node of a cluster: write the address as redis://" in said


# ---- no store


async def test_what_is_no_store_at_all():
    async def web(_reader, writer):
        writer.write(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")
        await writer.drain()
        writer.close()

    async def hang_up(_reader, writer):
        writer.close()

    for behaviour, words in (
        (web, "what answers there is not Valkey or Redis"),
        (hang_up, "it has closed the connection"),
    ):
        listener = await asyncio.start_server(behaviour, HOST, 0)
        async with listener:
            port = listener.sockets[0].getsockname()[1]
            said = await comes_to(f"redis://{HOST}:{port}/0", lambda _: True)
            assert words in said
    said = await comes_to(f"redis://{HOST}:{free_port()}/0", lambda _: True)
    assert "it takes no connections: does it run?" in said
    said = await comes_to("unix:/no/such.sock", lambda _: True)
    assert "there is no such socket" in said


async def test_a_database_that_is_not_there():
    with running() as server:
        said = await comes_to(server.url.removesuffix("0") + "99", runs)
        assert "has no database of that number" in said


# ---- addresses


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("redis://h", "h:6379"),
        ("valkey://:pw@h:1/2", "h:1"),
        ("rediss://user:p%40%3A%2F@h/0", "h:6379"),
        ("redis+sentinel://u:p@a,b:1/main/3?sentinel_password=x", "main of a:26379,b:1"),
        ("redis+cluster://[::1]:7000,b", "::1:7000,b:6379"),
        ("unix:/run/x.sock", "/run/x.sock"),
        ("unix:///run/x.sock", "/run/x.sock"),
        (" embedded ", "embedded"),
    ],
)
def test_addresses(text, shown):
    address = parse_store(text)
    assert str(address) == shown
    assert address.password in {None, "pw", "p@:/", "p"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is not the address of a store; write it as redis://HOST:6379/0"),
        ("http://h", "is not the address of a store"),
        ("redis+cloud://h", "is not the address of a store"),
        ("redis://", "has no HOST:PORT"),
        ("redis://h:x", "has no HOST:PORT"),
        ("redis://h:99999", "has no HOST:PORT"),
        ("redis://a,b", "names several servers"),
        ("redis://h/x", "no number of a database"),
        ("redis://h/123456", "no number of a database"),
        ("redis+cluster://h/3", "a cluster has only number 0"),
        ("redis+sentinel://h", "does not say what sentinels call the server"),
        ("redis://h?x=1", "has an option 'x'; known are ca, "),
        ("redis://h?ca=/etc/passwd", "has `ca`, which takes TLS"),
        ("rediss://h?ca=ca.pem", "must say `ca` as a whole path"),
        ("rediss://h?ca=/no/such/file", "there is no /no/such/file"),
        ("rediss://h?cert=/etc/passwd", "needs both of `cert` and `cert_key`"),
        ("redis://:a/b@h", "write them as %2F, %3F and %40"),
        ("redis://:a#b@h", "write it as %23"),
        ("unix:x.sock", "is not the address of a store"),
        ("unix://x.sock", "names no socket by its whole path"),
    ],
)
def test_addresses_with_mistakes(text, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        parse_store(text)
