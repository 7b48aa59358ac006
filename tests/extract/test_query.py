"""The model in a query string."""

import pytest

from llmux.errors import BadRequestError
from llmux.extract import model_in_query


@pytest.mark.parametrize(
    ("query", "name"),
    [
        ("", None),
        ("a=b", None),
        ("model", None),
        ("model=", None),
        ("model=+%20", None),
        ("model=m", "m"),
        ("a=b&model=m&c", "m"),
        ("model=a&model=b", "b"),
        ("model=a&model=", None),
        ("mod%65l=m", "m"),
        ("model=a%2Fb%20c+d%C3%A9", "a/b c d\u00e9"),
        ("model=a=b", "a=b"),
        ("Model=m&models=n", None),
        ("model=100%", "100%"),
    ],
)
def test_the_model_in_the_query(query, name):
    assert model_in_query(query) == name


@pytest.mark.parametrize("query", ["model=a&Model=b", "MODEL=b&model=a", "model=a&%4dodel", "model=&Model=b"])
def test_keys_that_differ_in_case_only(query):
    with pytest.raises(BadRequestError, match="differ in case only"):
        model_in_query(query)


@pytest.mark.parametrize("query", ["model=%FF", "model=" + "x" * 1025])
def test_bad_names(query):
    with pytest.raises(BadRequestError):
        model_in_query(query)
