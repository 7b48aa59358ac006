from tests.server.fixtures import house

__all__ = ["house"]
