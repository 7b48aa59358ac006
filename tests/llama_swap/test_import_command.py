"""Commands are split as llama-swap splits them, and a shell makes the same words of what is written."""

import shlex

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmux.llama_swap.engine_command import Word, quote, shell, split
from llmux.llama_swap.source import PID, PORT, mark_environment
from tests.llama_swap.conftest import split_by_sh

SPLIT = {
    "a b": ["a", "b"],
    "  a\t b \n": ["a", "b"],
    "a \\\n  b": ["a", "b"],
    "a \\  \n  b": ["a", "b"],
    "a\n# b\n  # c\nd": ["a", "d"],
    "a # b": ["a", "#", "b"],
    "a 'b c' \"d e\"": ["a", "b c", "d e"],
    "a'b'c\"d\"": ["abcd"],
    "a '' \"\"": ["a", "", ""],
    "a\\ b": ["a b"],
    "a\\": ["a"],
    r"a\'b": ["a'b"],
    r"'a\b'": [r"a\b"],
    r'"a\b" "a\"b" "a\\b" "a\$b"': [r"a\b", 'a"b', r"a\b", "a$b"],
    "a --x='{\"y\": 1}'": ["a", '--x={"y": 1}'],
    "sh -c 'a; b | c > d && e'": ["sh", "-c", "a; b | c > d && e"],
    "a ; b && c | $d `e` *": ["a", ";", "b", "&&", "c", "|", "$d", "`e`", "*"],
}


@pytest.mark.parametrize(("command", "words"), SPLIT.items())
def test_words(command, words):
    assert [word.text for word in split(command)] == words


@pytest.mark.parametrize("command", ["", " \n ", "# only\n  # comments"])
def test_no_words(command):
    assert split(command) == []


@pytest.mark.parametrize("command", ["a 'b", 'a "b c\nd'])
def test_a_quote_that_is_never_closed(command):
    with pytest.raises(ValueError, match=r"opens before 'b.*never closed"):
        split(command)


def test_what_is_known_later_becomes_a_variable_of_the_shell():
    command = mark_environment(f"x --port={PORT} ${{env.HOME}}/a '${{env.A}} b' ${{env.ARGS}} {PID}")
    assert [quote(word) for word in split(command)] == [
        "x",
        '--port="$LLMUX_PORT"',
        '"$HOME"/a',
        "\"$A\"' b'",
        "$ARGS",
        '"$pid"',
    ]


def test_each_option_has_its_line():
    assert shell(split("a run --b c -d e f")) == "a run \\\n  --b c \\\n  -d e f"


WORDS = st.lists(st.text(alphabet="ab -\\'\"$`#;*{}=\n\té~", max_size=12), min_size=1, max_size=4)


@given(words=WORDS)
@settings(max_examples=60)
def test_a_shell_reads_what_was_meant(words):
    assert split_by_sh(shell([Word(word) for word in words]), {}) == words


@given(words=WORDS)
@settings(max_examples=200)
def test_what_is_quoted_for_a_shell_is_split_alike(words):
    words = [
        word.replace("\n", "") for word in words
    ]  # a line that ends in a backslash, or begins with #, is special
    assert [word.text for word in split(" ".join(map(shlex.quote, ["x", *words])))] == ["x", *words]
