"""Templates that would take all time or memory end soon; the others write what Jinja writes."""

from __future__ import annotations

import resource
import sys
import time

import jinja2.sandbox
import pytest

from lowbitq.models.chat import render_chat

MESSAGES = [{"role": "user", "content": "one two"}, {"role": "assistant", "content": "three"}]
DOUBLE = (
    "{%% set n = namespace(s=%s) %%}{%% for i in range(60) %%}{%% set n.s = %s %%}{%% endfor %%}"
)
LONG = "{% set x = 'a b' * 10 ** 7 %}"

BOMBS = {
    "repetition": "{{ 'a' * 10 ** 10 }}",
    "repetition of a list": "{{ [LONG] * 10 ** 9 }}",
    "a number": "{{ 10 ** (10 ** 10) }}",
    "squares": DOUBLE % ("3", "n.s * n.s") + "{{ n.s }}",
    "sums": DOUBLE % ("'ab'", "n.s + n.s") + "{{ n.s }}",
    "concatenation": DOUBLE % ("'ab'", "n.s ~ n.s") + "{{ n.s }}",
    "lists in lists": DOUBLE % ("[1]", "[n.s, n.s]") + "{{ n.s }}",
    "lists that are compared": DOUBLE % ("[[1], [1]]", "[[n.s[0], n.s[0]], [n.s[1], n.s[1]]]")
    + "{{ n.s[0] == n.s[1] }}",
    "mappings": DOUBLE % ("{}", "{1: n.s, 2: n.s}") + "{{ n.s | tojson }}",
    "arguments": DOUBLE % ("'ab'", "dict(a=n.s, b=n.s)") + "{{ n.s | string }}",
    "replacement": DOUBLE % ("'aa'", "n.s | replace('a', n.s)") + "{{ n.s }}",
    "replacement by method": DOUBLE % ("'aa'", "n.s.replace('a', n.s)") + "{{ n.s }}",
    "joining": DOUBLE % ("'aa'", "(n.s | list) | join(n.s)") + "{{ n.s }}",
    "joining by method": DOUBLE % ("'aa'", "n.s.join(n.s)") + "{{ n.s }}",
    "joining one string": "{% set x = 'a' * 10 ** 7 %}{{ [x] * 10 ** 6 | join }}",
    "block": DOUBLE % ("'aa'", "n.s") + "{% set x %}" + LONG + "{{ x }}" * 9 + "{% endset %}",
    "output": LONG + "{{ x }}" * 99,
    "replacement by keywords": LONG + "{{ x | replace(new=x, old='a') }}",
    "namespaces": DOUBLE % ("1", "namespace(a=n.s, b=n.s)") + "{{ n.s }}" + "{{ 'a' * 10 ** 9 }}",
    "joining attributes": LONG
    + "{% set n = namespace(s=x) %}{{ [n] * 9999 | join(attribute='s') }}",
    "joining what is made": LONG + "{{ x.join([1] * 9999 | map('string')) }}",
    "joining what is the same": LONG
    + "{{ ''.join([namespace(s=x)] * 9999 | map(attribute='s')) }}",
    "separators": "{{ [1] * 10 ** 5 | tojson(separators=('a' * 10 ** 6, 'b')) }}",
    "width in a mapping": "{{ '{:{w}}'.format_map({'a': 1, 'w': 2000000000}) }}",
    "width in an argument": "{{ '{:{a[w]}}'.format(1, a={'w': 2000000000}) }}",
    "macro": LONG + "{% macro f() %}{{ x }}{{ x }}{{ x }}{% endmacro %}{{ f() }}{{ f() }}",
    "a long concatenation": LONG + "{{ (x " + "~ x" * 999 + ") | length }}",
    "width": "{{ '%2000000000d' % 1 }}",
    "width of a value": "{{ '%*d' % (2000000000, 1) }}",
    "width of format": "{{ '{:2000000000}'.format(1) }}",
    "width by format": "{{ '{:{w}}'.format(1, w=2000000000) }}",
    "many placeholders": LONG + "{{ '" + "%(x)s" * 999 + "' % {'x': x} }}",
    "many fields": LONG + "{{ '" + "{0}" * 999 + "'.format(x) }}",
    "a filter's format": LONG + "{{ '" + "%(x)s" * 999 + "' | format(x=x) }}",
    "center": "{{ 'a' | center(4000000000) }}",
    "center by method": "{{ 'a'.center(4000000000) }}",
    "zeros": "{{ 'a'.zfill(4000000000) }}",
    "bytes": "{{ (1).to_bytes(4000000000, 'big') }}",
    "tabs": "{{ ('\t' * 10 ** 6).expandtabs(10 ** 6) }}",
    "translation": "{{ ('a' * 10 ** 6).translate({97: 'b' * 10 ** 6}) }}",
    "indentation": "{{ ('a\n' * 10 ** 5) | indent(10 ** 5) }}",
    "indentation of JSON": "{{ messages | tojson(indent=3000000000) }}",
    "JSON": "{{ ([[[[1]]]] * 10 ** 4) | tojson(indent=10 ** 5) }}",
    "filling": "{{ [1] | batch(4000000000, 2) | list }}",
    "slices": "{{ [1] | slice(4000000000) | list }}",
    "nested loops": "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3,
    "a loop that is looked at": "{% for a in range(99999) %}{% for b in range(99999) %}"
    "{{ loop.length }}{% endfor %}{% endfor %}",
    "loops with a condition": "{% for a in range(99999) %}"
    "{% for b in range(99999) if b < 0 %}{% endfor %}{% endfor %}",
    "a recursive loop": "{% for a in range(99999) recursive %}{% if loop.depth < 4 %}"
    "{{ loop(range(99999)) }}{% endif %}{% endfor %}",
    "lazy filters": "{% for a in range(99999) %}{{ range(99999) | map('string') | length }}"
    "{{ range(99999) | sum }}{% endfor %}",
    "lists": "{% for a in range(99999) %}{% if range(99999) | list %}{% endif %}{% endfor %}",
    "searches": LONG + "{% for a in range(99999) %}{% if 'c' in x %}{% endif %}{% endfor %}",
    "many searches": LONG + "{% if " + "'c' in x or " * 3000 + "1 %}{% endif %}",
    "tests": LONG + "{% for a in range(99999) %}{% if x is upper %}{% endif %}{% endfor %}",
    "a filter that finds nothing": LONG + "{{ range(99999) | map('string') | select('in', x) }}"
    "{{ range(99999) | map('string') | map('upper') | select('in', x) | list }}",
    "slices of a text": LONG + "{% for a in range(99999) %}{% if x[1:] %}{% endif %}{% endfor %}",
    "two calls": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
    "{{ f(60) }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "comments": "{{ ('<!---->' * 10 ** 6) | striptags }}",
    "a sum of lists": "{{ ([[1]] * 10 ** 6) | sum(start=[]) }}",
    "a slow codec": "{{ ('\u00e9' * 10 ** 6).encode('punycode') }}",
    "a date": "{{ strftime_now('%Y' * 10 ** 7) }}",
    "prose": "{{ lipsum(n=100000) }}",
    "depth of blocks": "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "depth of brackets": "{{ " + "[" * 9000 + "]" * 9000 + " }}",
    "a long sum": "{{ 1" + " + 1" * 9000 + " }}",
    "a huge template": "{# comment #}" * 10**6,
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_end_soon(name):
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    with pytest.raises(ValueError, match="chat template: ") as refusal:
        render_chat(BOMBS[name], MESSAGES)
    assert "MemoryError" not in str(refusal.value)
    assert time.process_time() - started < 3
    if sys.platform == "linux":  # in kilobytes
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - used < 1 << 20


HARMLESS = [
    "{{ '-' * 40 }}{{ '**%s** %d%%' % ('b', 5) }}{{ '%5.2f|%s' % (1.5, 'a') }}"
    "{{ '{:>5}{}'.format(1, 10 ** 12) }}",
    "{% for m in messages if m.role == 'user' %}{{ loop.index }}/{{ loop.length }}{{ loop.last }}"
    "{% else %}none{% endfor %}{% for a, b in {'x': 1}.items() %}{{ a }}{{ b }}{% endfor %}",
    "{% for m in messages recursive %}{{ m.role or m }}{% if loop.depth < 3 %}"
    "{{ loop([1, 2]) }}{% endif %}{% endfor %}",
    "{{ messages | map(attribute='role') | join(', ') }}{{ messages[1:] | length }}"
    "{{ messages | join(d=', ', attribute='role') }}"
    "{{ '-'.join(messages | map(attribute='role')) }}"
    "{{ messages | selectattr('role', 'equalto', 'user') | list }}{{ [3, 1] | sort | first }}",
    "{{ [1, [2, {'a': (3, none)}]] }}{{ messages | tojson(indent=2) }}{{ 'a\nb' | indent(4) }}",
    "{% macro f(x, y=2) %}({{ x }}{{ y }}{{ caller() if caller }}){% endmacro %}{{ f(1) ~ f(2) }}"
    "{% call f(5) %}inside{% endcall %}{% filter upper %}up{% endfilter %}",
    "{{ missing is defined }}{{ missing | default(5000000) }}{{ messages is iterable }}"
    "{{ [1, 2, 3] | select('in', [2]) | list }}{{ 8 is divisibleby 2 }}"
    "{{ 7 is odd and 5 not in [1, 2] and 3 > 2 >= 1 }}{{ missing }}{{ 'b' if false }}",
    "{% set n = namespace(a='') %}{% for m in messages %}{% set n.a = n.a + m.content %}"
    "{% endfor %}{{ n.a.split(' ')[-1].strip().title() | replace('e', '') }}{{ 2 ** 64 // 3 % 7 }}",
]


@pytest.mark.parametrize("template", HARMLESS)
def test_other_templates_are_what_jinja_makes_of_them(template):
    plain = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    if "tojson" in template:
        plain.policies["json.dumps_kwargs"] = {"sort_keys": False}
    expected = plain.from_string(template).render(messages=MESSAGES)
    assert render_chat(template, MESSAGES) == expected.replace("&#34;", '"')


def test_a_long_conversation_is_within_the_budget():
    messages = [{"role": "user", "content": "word " * 500}] * 3000
    template = (
        "{% for m in messages %}{% if m.role == 'user' and loop.index0 % 2 == 0 %}"
        "{{ '<|im_start|>' + m.role + '\n' + m.content | trim ~ '<|im_end|>' }}"
        "{% endif %}{% endfor %}"
    )
    assert len(render_chat(template, messages)) > 3_000_000
