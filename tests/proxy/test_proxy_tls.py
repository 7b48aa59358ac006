"""Engines behind TLS."""

from __future__ import annotations

import shutil
import ssl
import subprocess
from pathlib import Path

import pytest
from proxy_harness import EXTRA_BYTES, Body, Engine, Proxy, answering

from llmux.proxy import Forwarder
from llmux.upstream import EngineAddress, EngineRefusedError

OPENSSL = shutil.which("openssl")
pytestmark = pytest.mark.skipif(OPENSSL is None, reason="makes its certificate with openssl")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tls")
    key, cert = folder / "key.pem", folder / "cert.pem"
    subprocess.run(
        f"{OPENSSL} req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2"
        f" -subj /CN=localhost -addext subjectAltName=DNS:localhost -keyout {key} -out {cert}".split(),
        check=True,
        capture_output=True,
    )
    return key, cert


@pytest.fixture
async def engine(proxy: Proxy, certificate: tuple[Path, Path]):
    key, cert = certificate
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    body = b"x" * 3_000_000
    script = answering(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    async with Engine(script, ssl_context=context) as engine:
        proxy.address = EngineAddress("localhost", engine.port, tls=True)
        yield engine
        await proxy.forwarder.close()


async def test_bytes_pass_and_the_connection_is_reused(
    proxy: Proxy, engine: Engine, certificate: tuple[Path, Path]
) -> None:
    proxy.forwarder = Forwarder(ssl_context=ssl.create_default_context(cafile=certificate[1]))
    proxy.options["body"] = Body([b"y" * 200_000] * 10)
    client = await proxy.client()
    for _ in range(2):
        await client.send(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n")
        await client.expect(b"HTTP/1.1 200 OK\r\nContent-Length: 3000000\r\n" + EXTRA_BYTES + b"\r\n")
        await client.expect(b"x" * 3_000_000)
    assert engine.connections == 1
    assert engine.bodies == [b"y" * 2_000_000] * 2


async def test_a_certificate_that_is_not_trusted_means_that_nothing_was_sent(proxy: Proxy, engine: Engine) -> None:
    client = await proxy.client()
    await client.get()
    await client.until(b'"code": "engine_refused"')
    assert isinstance(proxy.outcomes[0], EngineRefusedError)
    assert engine.heads == []
