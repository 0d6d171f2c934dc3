"""Templates fill words into text and can do nothing else: no files, no attributes, no growth, no chance."""

from __future__ import annotations

import pytest

from nexus_ray.errors import ConfigError
from nexus_ray.synthesis.template import Template

SIZES = {"noun": None, "features": 2, "count": None, "source": None}
VALUES = {"noun": "fox", "features": ("a twist", "a talk"), "count": "3", "source": "Text."}


def render(text: str, limit: int = 1000) -> str:
    return Template(text, where="text", sizes=SIZES).render(VALUES, limit=limit)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A {{ noun }}.", "A fox."),
        ("{{ noun | upper }} {{ noun ~ 's' }}", "FOX foxs"),
        ("{{ features | join(' and ') }}, {{ features[1] }}, {{ features | length }}", "a twist and a talk, a talk, 2"),
        ("{% for f in features %}{{ loop.index }}. {{ f | title }}\n{% endfor %}", "1. A Twist\n2. A Talk\n"),
        ("{% if 'a talk' in features and noun != 'owl' %}yes{% else %}no{% endif %}", "yes"),
        ("{{ 'one' if count == '1' else 'many' }}", "many"),
        ("{{ source }}\n", "Text.\n"),
        ("{# a remark #}{% raw %}{{ noun }}{% endraw %}", "{{ noun }}"),
    ],
)
def test_words_conditions_and_loops(text: str, expected: str) -> None:
    assert render(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "{% include '/etc/passwd' %}",
        "{% import 'x' as x %}",
        "{% extends 'x' %}",
        "{% macro f() %}{% endmacro %}",
        "{% set x = noun %}",
        "{{ noun.__class__.__mro__ }}",
        "{{ noun['__class__'] }}",
        "{{ features[2] }}",
        "{{ features[-1] }}",
        "{{ noun | attr('__class__') }}",
        "{{ ''.join(features) }}",
        "{{ range(10) }}",
        "{{ lipsum() }}",
        "{{ cycler }}",
        "{{ noun * 1000000000 }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ 9 ** 999999999 }}",
        "{{ features | random }}",
        "{{ noun | random }}",
        "{{ noun | center(1000000000) }}",
        "{{ noun | replace('o', source) }}",
        "{{ features | join(source) }}",
        "{{ features }}",
        "{{ 'x' ~ features }}",
        "{{ features | upper }}",
        "{{ 'x' if noun }}",
        "{% for c in source %}{{ c }}{% endfor %}",
        "{% for f in features recursive %}{% endfor %}",
        "{% for a in features %}{% for b in features %}{% for c in features %}{% endfor %}{% endfor %}{% endfor %}",
        "{{ loop.index }}",
        "{% for f in features %}{{ loop.cycle }}{% endfor %}",
        "{{ noun is defined }}",
        "{{ nuon }}",
        "{{ noun ",
        "{{ " + "(" * 20_000 + "noun" + ")" * 20_000 + " }}",
        "x" * 100_001,
    ],
)
def test_everything_else_is_refused_when_the_template_is_read(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^text"):
        Template(text, where="text", sizes=SIZES)


def test_values_are_data_and_never_templates() -> None:
    values = {**VALUES, "noun": "{{ source }}{% include '/etc/passwd' %}<b>"}
    assert Template("{{ noun }}", where="text", sizes=SIZES).render(values, limit=99) == values["noun"]


def test_length_is_limited_while_rendering() -> None:
    loops = "{% for a in features %}{% for b in features %}xxxxxxxxxx{% endfor %}{% endfor %}"
    assert len(render(loops, limit=40)) == 40
    with pytest.raises(ConfigError, match="more than 39 characters; raise max_characters"):
        render(loops, limit=39)


def test_an_expression_that_fails_names_the_template_and_no_value() -> None:
    with pytest.raises(ConfigError, match=r"text cannot be rendered \(TypeError\)") as caught:
        render("{{ 'x' if features in noun else 'y' }}")
    assert "fox" not in str(caught.value)
