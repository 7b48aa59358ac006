"""Macros: global and of a model, one in another, and those that llama-swap knows itself."""

import pytest


def test_macros_of_the_file_and_of_a_model(load):
    result = load("""
        macros: {size: 1, server: "srv --port ${PORT} ${size}", unused: "${nobody}"}
        models:
          a: {cmd: "${server} ${own}", macros: {own: "x ${MODEL_ID}", size: 1.5}}
          b: {cmd: "${server} ${late}", macros: {first: yes, late: "${first}"}}
    """)
    assert result.words("a") == ["srv", "--port", "5800", "1.5", "x", "a"]
    assert result.words("b") == ["srv", "--port", "5801", "1", "yes"]


def test_ports_go_by_the_models_names_not_by_their_order(load):
    result = load("""
        startPort: 9000
        models: {b: {cmd: "x ${PORT}"}, c: {cmd: x, proxy: "http://localhost:7000"}, a: {cmd: "x ${PORT}"}}
    """)
    assert {name: model.address.port for name, model in result.config.models.items()} == {
        "a": 9000,
        "b": 9001,
        "c": 7000,
    }


def test_a_port_in_other_settings(load):
    result = load("""
        macros: {host: 127.0.0.1}
        models:
          a:
            cmd: x --port ${PORT}
            proxy: http://${host}:${PORT}
            checkEndpoint: /v1/${MODEL_ID}/${PORT}
            env: ["URL_OF_IT=http://localhost:${PORT}"]
            cmdStop: end ${PORT} ${PID} "${PID}"
            aliases: ["${MODEL_ID}:${PORT}"]
    """)
    model = result.config.models["a"]
    assert (model.port, model.aliases) == (5800, ("a:5800",))
    assert model.env["HEALTH_PATH"] == "/v1/a/5800"
    assert model.env["URL_OF_IT"] == "http://localhost:5800"
    assert result.words("a", "STOP_COMMAND") == ["end", "5800", "4711", "4711"]


def test_the_command_follows_llmuxs_port_and_not_another(load):
    result = load("""
        models:
          follows: {cmd: "x --port ${PORT}"}
          other: {cmd: "x --port ${PORT} --web 9001", proxy: "http://localhost:9001"}
    """)
    assert '"$LLMUX_PORT"' in result.config.models["follows"].env["COMMAND"]
    assert result.words("follows", LLMUX_PORT="7777") == ["x", "--port", "7777"]
    assert result.words("other", LLMUX_PORT="7777") == ["x", "--port", "5801", "--web", "9001"]


def test_a_comment_does_not_become_a_command(load):
    result = load("""
        macros: {two: "a\\nb --port 9"}
        models: {m: {cmd: "# ${two} ${nobody}\\nx --port ${PORT}"}}
    """)
    assert result.words("m") == ["x", "--port", "5800"]


def test_variables_are_left_to_the_shell_and_to_llmux(load):
    environ = {"HOME": "/home/me", "ARGS": "--fast  --loud", "TOKEN": "s3 cret", "HOST": "localhost", "TTL": "90"}
    result = load(
        """
        # ${env.NOT_EVEN_READ}
        apiKeys: ["${env.KEY}", plain]
        models:
          m:
            cmd: x --port ${PORT} "${env.HOME}/a b" ${env.ARGS} --token ${env.TOKEN}x
            proxy: http://${env.HOST}:${PORT}
            ttl: ${env.TTL}
            env: ["T=${env.TOKEN}", "ONE=1.10"]
        """,
        environ | {"KEY": "k"},
    )
    assert "s3 cret" not in result.text
    assert result.translation.variables == ["HOME", "ARGS", "TOKEN", "KEY"]
    assert result.words("m")[3:] == ["/home/me/a b", "--fast", "--loud", "--token", "s3 cretx"]
    model = result.config.models["m"]
    assert (model.idle_sleep, model.env["T"], model.env["ONE"]) == (90, "s3 cret", "1.10")
    assert [entry.key.get_secret_value() for entry in result.config.api_keys] == ["k", "plain"]


def test_a_variable_within_brackets(load):
    result = load("apiKeys: [${env.KEY}]\nmodels: {m: {cmd: 'x ${PORT}'}}", {"KEY": "k"})
    assert [entry.key.get_secret_value() for entry in result.config.api_keys] == ["k"]


def test_what_llmux_or_the_shell_would_fill_in_stays_as_it_is(load):
    result = load(
        """
        models:
          m:
            cmd: x --port ${PORT} '$HOME' '$${a' "{{ b }}" --tmpl '{% if x %}'
            env: ['A=$HOME', 'B=$${C}']
            aliases: ['$${X}', "$HOME"]
            useModelName: '$${Y}'
    """.replace("$${", "${ ")
    )
    assert result.words("m")[3:] == ["$HOME", "${ a", "{{ b }}", "--tmpl", "{% if x %}"]
    model = result.config.models["m"]
    assert (model.env["A"], model.env["B"]) == ("$HOME", "${ C}")
    assert (model.aliases, model.upstream_model) == (("${ X}", "$HOME"), "${ Y}")


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("models: {m: {cmd: 'x ${PORT} ${mdir}'}}\nmacros: {m_dir: a}", 1, r"did you mean ${m_dir}?"),
        ("models:\n  m:\n    cmd: 'x ${PORT} ${zzz}'", 3, "declare it under `macros`"),
        (
            "models: {m: {cmd: '${a}'}}\nmacros: {a: '${b}', b: x}",
            1,
            "${b}, which is declared after a macro that uses it",
        ),
        ("models: {m: {cmd: x, cmdStop: 'y ${PORT}'}}", 1, "where the model's `cmd` uses it too"),
        ("models: {m: {cmd: 'x ${PORT} ${PID}'}}", 1, "only known in `cmdStop`"),
        (
            "models: {m: {cmd: x}}\nmacros:\n  a: 1\n  PORT: 2",
            4,
            "macros.PORT: is a name that llama-swap fills in",
        ),
        ("models: {m: {cmd: x}}\nmacros: {'a b': 2}", 2, "is not a name for a macro"),
        ("models: {m: {cmd: x}}\nmacros: {a: [1]}", 2, "macros.a: must be text, a number, true or false"),
        ("models: {m: {cmd: x}}\nmacros: {a: 'x${a}'}", 2, "macros.a: uses itself"),
        ("models: {m: {cmd: x}}\nmacros: [a]", 2, "macros: must be a mapping"),
        ("models:\n  m:\n    cmd: x\n    macros: {'': 2}", 4, "models.m.macros.: is not a name"),
        ("models: {m: {cmd: 'x ${PORT}', aliases: ['${env.NOBODY}']}}", 1, "the variable NOBODY is not set"),
        ("models: {m: {cmd: 'x ${PORT}'}}\nstartPort: many", 2, "startPort: must be a port"),
        ("models: {m: {cmd: 'x ${PORT}'}}\nstartPort: 0", 2, "startPort: must be a port"),
        ("models: {m: {cmd: 'x ${PORT}'}}\nlogLevel: ${nope}", 2, "logLevel: uses ${nope}"),
    ],
)
def test_what_is_wrong_is_said_with_its_line(problems, text, line, said):
    assert any(found[0] == line and said in found[1] for found in problems(text)), problems(text)


def test_what_is_of_no_use_need_not_be_right(load):
    load("""
        x-defs: {a: "${nobody}"}
        peers: {p: {proxy: "http://x", models: [y], apiKey: "${env.NOBODY}"}}
        models: {m: {cmd: "x ${PORT}", metadata: {a: "${nobody}", b: "${env.NOBODY}"}}}
    """)
