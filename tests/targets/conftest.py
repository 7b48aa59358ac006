from pathlib import Path

import pytest

from tests.server.fixtures import house, limit, pytest_asyncio_loop_factories
from tests.targets.remote_host import Certificates, RemoteHost, make_certificates

__all__ = ["house", "pytest_asyncio_loop_factories"]


def pytest_collection_modifyitems(items):
    limit(items, Path(__file__).parent)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("tls"))


@pytest.fixture
async def host(certificates: Certificates):
    async with RemoteHost(tls=certificates.context()) as host:
        yield host
