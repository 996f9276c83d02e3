"""Templates that try to break out, to run for ever, or to fill the memory."""

from __future__ import annotations

import time

import pytest
from jinja2.exceptions import SecurityError, TemplateError

from seedbed.text import sandbox as module
from seedbed.text.sandbox import Sandbox

FOR_EVER = [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% macro f() %}{{ f() if 0 }}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    "{% endmacro %}{{ f() }}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% for i in range(99999) %}{% set x = range(99999)|list|sort|reverse|list %}{% endfor %}",
    "{% for x in [[1]] recursive %}{{ loop([x]) }}{% endfor %}",
]
TOO_LONG = [
    "{{ 'a' * 10 ** 9 }}",
    "{{ 10 ** 9 * 'a' }}",
    "{{ 2 ** (10 ** 8) }}",
    "{{ 'a'.ljust(10 ** 9) }}",
    "{{ 'a'|center(10 ** 9) }}",
    "{{ '%999999999d' % 1 }}",
    "{{ '{:999999999}'.format(1) }}",
    "{{ '{:{}}'.format(1, 10 ** 9) }}",
    "{{ '%999999999d'|format(1) }}",
    "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x|length }}",
    "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x|length }}",
    "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x|length }}",
    "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x.replace('a', n.x + n.x) %}{% endfor %}",
    "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x|replace('a', n.x ~ 'a') %}{% endfor %}",
    "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x.join([n.x, n.x, n.x]) %}{% endfor %}",
    "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = [n.x, n.x]|join(n.x) %}{% endfor %}",
    "{% for i in range(99999) %}{{ 'a' * 99999 }}{% endfor %}",
    "{{ ('a\\n' * 1000000)|indent(1000000) }}",
    "{{ ('a\\n' * 1000000)|indent(width='a' * 1000000) }}",
    "{{ ('a' * 10000000).translate({97: 'b' * 1000}) }}",
    "{{ ('\\t' * 1000).expandtabs(10 ** 7) }}",
    "{{ '{:>9999999999}'.format(1)|length }}",
    "{{ ('{0:>9999999}' * 1000).format(1)|length }}",
    "{{ ('{0:{1}}' * 1000).format(1, 9999999)|length }}",
    "{{ ('{0}' * 9999).format('a' * 99999)|length }}",
    "{{ ('%9999999d' * 3) % (1, 2, 3) }}",
    "{{ '{0:>9999999999}'.format_map({}) }}",
    "{{ ('a' * 999).encode('utf-16') }}",
]
WAYS_OUT = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('true') }}",
    "{{ lipsum.__globals__['os'].popen('true').read() }}",
    "{{ messages.append(1) }}",
    "{{ self._TemplateReference__context.environment.call }}{{ raise_exception.__globals__ }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ (messages|attr('__class__')).__mro__ }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "{{ joiner.__init__.__builtins__.open('/etc/passwd').read() }}",
]


def render(source: str) -> str:
    sandbox = Sandbox()
    return sandbox.write(sandbox.compiled(source), {"messages": [{"role": "user", "content": "Hello"}]})


@pytest.mark.parametrize("source", FOR_EVER)
def test_what_runs_for_ever_is_ended(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SECONDS", 0.2)
    began = time.monotonic()
    with pytest.raises((SecurityError, RecursionError)):
        render(source)
    assert time.monotonic() - began < 3


@pytest.mark.parametrize("source", TOO_LONG)
def test_what_would_fill_the_memory_is_refused(source: str) -> None:
    with pytest.raises(SecurityError):
        render(source)


@pytest.mark.parametrize("source", WAYS_OUT)
def test_there_is_no_way_out(source: str) -> None:
    with pytest.raises((SecurityError, TemplateError, TypeError)):
        assert not render(source).strip()
        raise SecurityError("it came to nothing")


@pytest.mark.parametrize(
    ("source", "text"),
    [
        (
            "{% for m in messages %}{{ m.role }}: {{ m['content'] }}{{ loop.index }}/{{ loop.length }}{% endfor %}",
            "user: Hello1/1",
        ),
        ("{{ [1, 2, 3]|map('string')|join(', ') }}", "1, 2, 3"),
        (
            "{{ 'a' ~ 1 ~ none }}|{{ 'ab'.upper() * 2 }}|{{ 'x'.join(['a', 'b']) }}|{{ '%s-%03d' % ('a', 7) }}",
            "a1None|ABAB|axb|a-007",
        ),
        ("{% for k, v in {'a': 1}.items() %}{{ k }}={{ v }}{{ ';' if not loop.last }}{% endfor %}", "a=1"),
        ("{% for x in [] %}{% else %}none{% endfor %}", "none"),
        ("{% for x in [1, 2, 3] if x != 2 %}{{ x }}{{ loop.revindex }}{% endfor %}", "1231"),
        ("{% for x in [[1, [2]]] recursive %}{{ loop(x[1:]) if x is iterable else x }}{% endfor %}", ""),
        ("{{ messages|length }}{{ messages[0]|tojson }}", '1{"content": "Hello", "role": "user"}'),
        ("{{ 3 + 4 }}{{ 3 * 4 }}{{ 3 ** 4 }}{{ 7 % 4 }}{{ ' a '|trim }}{{ 'abc'|replace('b', 'xx') }}", "712813aaxxc"),
        (
            "{% macro f(x) %}<{{ x }}>{% endmacro %}{{ f(1) }}{% set n = namespace(i=0) %}{% set n.i = 5 %}{{ n.i }}",
            "<1>5",
        ),
    ],
)
def test_what_templates_do_they_still_do(source: str, text: str) -> None:
    assert render(source) == text
