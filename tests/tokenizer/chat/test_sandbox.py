"""Templates that mean harm end in one error, soon and without much memory."""

from __future__ import annotations

import threading
import time
import tracemalloc
from collections.abc import Callable

import pytest

from mlx_mixtral.errors import ChatTemplateError
from mlx_mixtral.tokenizer import Tokenizer
from mlx_mixtral.tokenizer.chat.limits import Budget

MakeChatml = Callable[..., Tokenizer]
MESSAGES = [{"role": "user", "content": "hello"}]

REACHES_OUT = [
    "{{ ''.__class__.__mro__ }}",
    "{{ ''['__class__']['x'] }}",
    "{{ messages.__class__.__base__.__subclasses__() }}",
    "{{ raise_exception.__globals__.x }}",
    "{{ strftime_now.__globals__['datetime'] }}",
    "{{ self.__init__.__globals__ }}",
    "{{ self._TemplateReference__context.environment }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ (messages|map(attribute='__class__')|first).__mro__ }}",
    "{{ ''|attr('__class__') }}",
    "{{ '{0.__class__.__mro__}'.format('') }}",
    "{{ range.__self__ }}{{ range.__func__.x }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update(role='x') }}",
    "{% include 'x' %}",
    "{% import 'os' as os %}",
    "{% extends 'x' %}",
]
NEVER_ENDS = [
    "{% for i in range(10**12) %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% set r = range(9999) %}{% for i in r %}{% for j in r %}{% for k in r %}{% endfor %}{% endfor %}{% endfor %}",
    "{% for x in [1] recursive %}{% if loop.depth < 40 %}{{ loop([1, 1]) }}{% endif %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% for k in range(99999) %}x{% endfor %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% block a %}{{ self.a() }}{% endblock %}",
    "{% for x in [1] recursive %}{{ loop([1, 1]) }}{% endfor %}",
    "{{ range(99999)|map('string')|map('length')|select('in', range(99999)|list)|list }}",
    "{% for i in range(3000) %}{% if [messages]|string == 'x' %}{% endif %}{{ range(9999)|sum }}{% endfor %}",
    "{% for i in range(90000) %}{% set x = range(99999)|list|sort|first %}{% endfor %}",
]
BLOWS_UP = [
    "{{ 'a' * 10**10 }}",
    "{{ ('a' * 10**6) * 10**6 }}",
    "{{ [0] * 10**10 }}",
    "{{ 10 ** (10 ** 10) }}",
    "{{ (10 ** 1000) * (10 ** 1000) }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '%*d' % (1000000000, 1) }}",
    "{{ '{:>1000000000}'.format(1) }}",
    "{{ 'a'.ljust(10**10) }}{{ 'a'.zfill(10**10) }}{{ 'a'|center(10**10) }}",
    "{{ (1).to_bytes(10**10, 'big') }}",
    "{{ lipsum(n=10**9) }}",
    "{{ ('a' * 10**6).replace('a', 'b' * 10**6) }}",
    "{{ ('a' * 10**6)|replace('a', 'b' * 10**6) }}",
    "{{ ('a' * 10**6).replace('', 'b' * 10**6) }}",
    "{{ ('a' * 10**6).join(range(99999)|map('string')) }}",
    "{{ range(99999)|join('a' * 10**6) }}",
    "{{ [1]|tojson(indent=10**9) }}",
    "{{ 'a\nb'|indent(10**9) }}",
    "{% set x = 'aaaaaaaaaa' %}" + "{% set x = x ~ x %}" * 60 + "{{ x }}",
    "{% set x = 'aaaaaaaaaa' %}" + "{% set x = x + x %}" * 60 + "{{ x }}",
    "{% set x = 'aaaaaaaaaa' %}" + "{% set x %}{{ x }}{{ x }}{% endset %}" * 60 + "{{ x }}",
    "{% set x = [1] %}" + "{% set x = [x, x] %}" * 60 + "{{ x }}",
    "{% set x = [1] %}" + "{% set x = (x, x) %}" * 60 + "{{ x|tojson }}",
    "{% set x = [1] %}" + "{% set x = dict(a=x, b=x) %}" * 60 + "{{ x == 1 }}{{ x|string }}",
    "{% set x = {} %}" + "{% set x = {'a': x, 'b': x} %}" * 60 + "{{ x|length }}",
    "".join(f"{{% set n{i} = namespace() %}}{{% set l{i} = [n{i}, n{i}] %}}" for i in range(40))
    + "{% set d = {'a': n0} %}"
    + "".join(f"{{% set n{i}.a = l{i + 1} %}}" for i in range(39))
    + "{{ d.items() }}",
    "{% for i in range(99999) %}" + "x" * 100_000 + "{% endfor %}",
    "{% set y %}{% for i in range(99999) %}" + "x" * 100_000 + "{% endfor %}{% endset %}",
    "{% macro f() %}"
    + "x" * 100_000
    + "{% endmacro %}{% set y %}{% for i in range(99999) %}{{ f() }}{% endfor %}{% endset %}",
    "{{ range(99999)|map(attribute='x', default='a' * 10**6)|join }}",
    "{{ messages|batch(10**10, 'x')|list }}",
    "{{ strftime_now('%1000000000d') }}",
    "x" * 300_000,
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "{{ " + "-" * 20000 + "1 }}",
    "{% if 1 %}" * 500 + "{% endif %}" * 500,
    "{{",
]
# These use up all they may before they are stopped, slowly while every allocation is traced: they get a part of it.
USE_IT_UP = {14, 21, 22, 23, 24, 25, 29}


def _a_share(share: int) -> Callable[[Budget, int], None]:
    real = Budget.__init__

    def less(self: Budget, input_size: int) -> None:
        real(self, input_size)
        self._left //= share
        self._largest //= share

    return less


@pytest.mark.parametrize("template", REACHES_OUT, ids=range(len(REACHES_OUT)))
def test_attributes_and_other_files_are_out_of_reach(chatml: MakeChatml, template: str) -> None:
    tokenizer = chatml(template + "<|x|>")  # not one of Mistral's
    with pytest.raises(ChatTemplateError) as caught:
        tokenizer.encode_chat(MESSAGES)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("template", NEVER_ENDS, ids=range(len(NEVER_ENDS)))
def test_a_template_that_never_ends_is_ended(
    chatml: MakeChatml, template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlx_mixtral.tokenizer.chat.limits.MAX_SECONDS", 0.3)
    tokenizer = chatml(template)
    start = time.monotonic()
    with pytest.raises(ChatTemplateError):
        tokenizer.encode_chat(MESSAGES)
    assert time.monotonic() - start < 10  # a bound on running away, not a measurement


@pytest.mark.parametrize("index", range(len(BLOWS_UP)))
def test_a_template_that_blows_up_is_stopped_before_it_does(
    chatml: MakeChatml, index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = chatml(BLOWS_UP[index])
    share = 20 if index in USE_IT_UP else 1
    if share > 1:
        monkeypatch.setattr("mlx_mixtral.tokenizer.chat.limits.Budget.__init__", _a_share(share))
    tracemalloc.start()
    try:
        with pytest.raises(ChatTemplateError) as caught:
            tokenizer.encode_chat(MESSAGES)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 300e6 / share
    assert "MemoryError" not in str(caught.value)  # stopped by us, not by the machine's size
    assert len(str(caught.value)) < 1000


def test_bounds_hold_on_any_thread(chatml: MakeChatml, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlx_mixtral.tokenizer.chat.limits.MAX_SECONDS", 0.3)
    tokenizer = chatml(NEVER_ENDS[1])
    caught: list[Exception] = []

    def work() -> None:
        try:
            tokenizer.encode_chat(MESSAGES)
        except ChatTemplateError as error:
            caught.append(error)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert ["out of bounds" in str(error) for error in caught] == [True, True]


def test_ordinary_jinja_is_left_alone(chatml: MakeChatml) -> None:
    source = (
        "{%- set ns = namespace(n=0, names=[]) -%}{%- macro show(x, y='d') -%}<{{ x }}/{{ y }}>{%- endmacro -%}"
        "{%- for k, v in {'a': 1, 'b': [2, 3]}.items() -%}{%- set ns.n = ns.n + 1 -%}{%- set ns.names = ns.names + [k] -%}"
        "{{ loop.index }}{{ loop.first }}{{ loop.last }}{{ show(k, v) }}{%- endfor -%}|{{ ns.n }}{{ ns.names|join(',') }}|"
        "{{ messages[0].content.upper()[:2] ~ 1 ~ none }}|{{ '%s-%03d' % ('x', 7) }}|{{ ', '.join(['p', 'q']) }}|"
        "{{ 'a-b'.split('-')[1] }}|{{ [3, 1, 2]|sort|list }}|{{ messages|map(attribute='role')|unique|join }}|"
        "{{ (1 < 2 <= 2) and 'el' in 'hello' }}|{{ undefined_name|default('dflt') }}|{{ 'x' if messages is defined }}|"
        "{{ 7 // 2 }}{{ 7 % 4 }}{{ 2 ** 5 }}{{ 'ab' * 2 }}|{%- filter upper -%}f{%- endfilter -%}|{{ range(3)|list }}|"
        "{{ {'x': [1, {'y': none}]}|tojson(indent=1)|replace('\n', '') }}|{{ 'a\nb'|indent(2) }}|{{ [1, 2][-1:]|first }}"
    )
    expected = (
        "1TrueFalse<a/1>2FalseTrue<b/[2, 3]>|2a,b|HE1None|x-007|p, q|b|[1, 2, 3]|user|True|dflt|x|3332abab|F|[0, 1, 2]|"
        '{ "x": [  1,  {   "y": null  } ]}|a\n  b|2'
    )
    tokenizer = chatml(source)
    assert tokenizer.decode(tokenizer.encode_chat(MESSAGES)) == expected
