"""Money in whole millionths; nothing is lost between requests."""

import random

from llmux.accounts.pricing import HOUR, MILLION, Prices, TokenPrice, micros, of_gpu, of_tokens, price_of


def test_amounts_are_exact():
    assert micros(0.90) == 900_000
    assert micros(0.1) * 3 == micros(0.3)
    assert price_of(0.25, 0.025, 2.0) == TokenPrice(250_000, 25_000, 2_000_000)
    assert price_of(0.25, None, 2.0).cached == 250_000


def test_an_hour_of_the_gpu_costs_what_it_says_however_it_is_cut():
    prices = Prices("usd", 900_000, {})
    assert of_gpu(prices, HOUR, 0) == (900_000, 0)
    rng, left, total, rest = random.Random(1), HOUR, 0, 0
    while left:
        piece = min(left, rng.randrange(1, 5_000_000))
        cost, rest = of_gpu(prices, piece, rest)
        total, left = total + cost, left - piece
    assert (total, rest) == (900_000, 0)


def test_tokens_that_came_from_a_cache_have_their_own_price():
    price = price_of(1.0, 0.1, 4.0)
    assert of_tokens(price, (MILLION, 0, 0), 0) == (MILLION, 0)
    assert of_tokens(price, (MILLION, MILLION, 0), 0) == (100_000, 0)
    assert of_tokens(price, (1000, 400, 100), 0) == (600 + 40 + 400, 0)
    total = rest = 0
    for _ in range(1000):
        cost, rest = of_tokens(price_of(0.0005, None, 0.0), (1, 0, 0), rest)
        total += cost
    assert (total, rest) == (0, 500_000)  # half of a millionth


def test_two_prices_are_one_version_if_they_are_equal():
    one = Prices("usd", 1, {"a": TokenPrice(1, 1, 1), "b": TokenPrice(2, 2, 2)})
    two = Prices("usd", 1, {"b": TokenPrice(2, 2, 2), "a": TokenPrice(1, 1, 1)})
    assert one.document == two.document
    assert one.document != Prices("eur", 1, one.models).document
