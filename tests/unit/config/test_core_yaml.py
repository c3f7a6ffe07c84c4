import math

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from moh_megatron.config.core_yaml import dump, parse
from moh_megatron.io.errors import UserError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e11", 2e11),
        ("6e-5", 6e-5),
        ("1E5", 1e5),
        ("+.5", 0.5),
        ("-1.", -1.0),
        ("1e+3", 1e3),
        ("6.0e-05", 6e-5),
        (".inf", math.inf),
        ("-.Inf", -math.inf),
        ("12", 12),
        ("-7", -7),
        ("010", 10),
        ("0x10", 16),
        ("0o10", 8),
        ("true", True),
        ("FALSE", False),
        ("", None),
        ("null", None),
        ("~", None),
        ("[1, 2e3, a]", [1, 2000.0, "a"]),
        ("'2e11'", "2e11"),
        ("!!str 12", "12"),
        # What YAML 1.1 takes for something else is text.
        *(
            (text, text)
            for text in ("yes", "on", "No", "2024-01-01", "12:30", "1_000", "1e", "e5", ".", "+", "=", "<<")
        ),
    ],
)
def test_scalars_follow_the_core_schema(text, value):
    parsed, _ = parse(text)
    assert parsed == value
    assert type(parsed) is type(value)


def test_nan_is_read():
    assert math.isnan(parse(".nan")[0])


def test_keys_are_text_and_duplicates_are_reported():
    assert parse("1: a\ntrue: b\n") == ({"1": "a", "true": "b"}, [])
    value, duplicates = parse("a:\n  b: 1\n  c: 2\n  b: 3\n")
    assert value == {"a": {"b": 3, "c": 2}}
    assert duplicates == ["line 4: duplicate key 'b', first given in line 2."]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "line 1, column 6: not valid YAML: expected ',' or ']'"),
        ("a: 1\n b: 2", "line 2, column 3: not valid YAML: mapping values are not allowed here."),
        ("a: 1\nb: \x07", "line 2: not valid YAML: character"),
        ("[a]: 1", "line 1, column 1: not valid YAML: a key must be plain text."),
        ("!!int abc", "line 1, column 1: not valid YAML: not an integer."),
        ("!!int [1]", "line 1, column 1: not valid YAML: not an integer."),
        ("!!seq a", "line 1, column 1: not valid YAML: not a list."),
        ("!!map a", "line 1, column 1: not valid YAML: not a mapping."),
        ("!!python/name:os.system x", "line 1, column 1: not valid YAML: could not determine a constructor"),
        ("!!timestamp 2024-01-01", "line 1, column 1: not valid YAML: could not determine a constructor"),
        ("a: &x [*x]", "line 1, column 4: not valid YAML: found unconstructable recursive node."),
        ("a\n---\nb", "line 2, column 1: not valid YAML: but found another document."),
        ("9" * 5000, "line 1, column 1: not valid YAML: not an integer that can be read"),
        ("[" * 10000, "not valid YAML: nested too deeply."),
    ],
)
def test_invalid_yaml_is_reported_with_its_position(text, message):
    with pytest.raises(UserError) as caught:
        parse(text)
    assert str(caught.value).startswith(message)


def test_aliases_that_multiply_are_refused_before_they_are_expanded():
    levels = "\n".join(f"  k{n}: &k{n} {{a: *k{n - 1}, b: *k{n - 1}, c: *k{n - 1}}}" for n in range(1, 31))
    with pytest.raises(UserError) as caught:
        parse(f"deepspeed:\n  k0: &k0 {{a: 1}}\n{levels}\n")
    assert str(caught.value) == "not valid YAML: expected at most 100,000 values, aliases expanded. Got more."


def test_values_below_an_alias_count_at_each_alias():
    # 49,996 numbers, their list, and the same again by the alias; the outer mapping with its two keys.
    text = "a: &a [" + "1, " * 49_996 + "]\nb: *a"
    assert len(parse(text)[0]["b"]) == 49_996
    with pytest.raises(UserError, match="at most 100,000 values"):
        parse(text.replace("[", "[1, 1, "))


def test_document_may_have_64_levels():
    assert parse("[" * 63 + "1" + "]" * 63)[1] == []
    for text in ("[" * 64 + "1" + "]" * 64, "{a: " * 400 + "1" + "}" * 400):
        with pytest.raises(UserError, match=r"^not valid YAML: nested too deeply\. Expected at most 64 levels"):
            parse(text)


_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None)
@given(st.dictionaries(st.text(), _values, max_size=5))
def test_dumped_yaml_is_read_back(value):
    assert parse(dump(value)) == (value, [])


@settings(deadline=None)
@given(st.sampled_from(["2e11", "6e-5", "yes", "010", "0o7", "null", "", "1:30", "2024-01-01", "true", "<<", "=", "~"]))
def test_ambiguous_text_is_quoted_for_every_reader(text):
    dumped = dump({"key": text})
    assert parse(dumped)[0] == {"key": text}
    assert yaml.safe_load(dumped) == {"key": text}


def test_pyyaml_itself_is_unchanged():
    assert yaml.safe_load("[2e11, on, 010]") == ["2e11", True, 8]
