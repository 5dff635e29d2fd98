"""Whatever a user types or a file holds: a value, or a ValueError that says what is wrong."""

import json
from functools import reduce
from operator import getitem

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from difflt_core.config import PARAMETERS, load_config, parse_parameters, setting_paths, vary
from difflt_core.data.imagenet_lt import parse_lists
from difflt_core.engine.artifacts import Stage, Store
from difflt_core.generation.text2image import read_prompts

QUICK = settings(max_examples=60, deadline=None)
leaf = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
tree = st.dictionaries(st.text(max_size=8), leaf | st.lists(leaf, max_size=3), max_size=5)


def _leaves(config) -> dict:
    """Every setting by its dotted path."""
    tree = config.model_dump()
    return {path: reduce(getitem, path.split("."), tree) for path in setting_paths(tree)}


@QUICK
@given(st.sampled_from(sorted(PARAMETERS)), st.text() | st.integers().map(str))
def test_any_text_for_any_parameter_is_a_value_or_a_value_error(name, text):
    try:
        value = parse_parameters([(name, text)], "smoke")[name]
    except ValueError as error:
        assert str(error)
    else:
        load_config("smoke", **{name: value})


@QUICK
@given(st.floats(0, 100, allow_nan=False))
def test_numbers_survive_the_command_line(tau):
    assert parse_parameters([("tau", repr(tau))], "smoke") == {"tau": tau}


@QUICK
@given(st.text() | st.sampled_from(sorted(_leaves(load_config("smoke")))), leaf)
def test_any_setting_is_changed_or_refused(path, value):
    config = load_config("smoke")
    try:
        changed = vary(config, {path: value})
    except ValueError as error:
        assert str(error)
    else:
        before, after = (_leaves(c) for c in (config, changed))
        assert {name for name in before if before[name] != after[name]} <= {path}
        assert isinstance(value, str) or after.get(path) == value  # text of a number is a number


@QUICK
@given(st.text(), st.text(), st.text())
def test_any_text_as_lists_of_imagenet(train, val, test):
    with pytest.raises(ValueError, match="ImageNet_LT_"):
        parse_lists({"train": train, "val": val, "test": test})


@QUICK
@given(st.lists(st.integers(0, 4), min_size=1, max_size=20))
@pytest.mark.filterwarnings("ignore:.*files are in both")
def test_lists_with_a_gap_are_refused_and_others_read(labels):
    text = "".join(f"train/n{c}/{i}.JPEG {c}\n" for i, c in enumerate(labels))
    if set(labels) == set(range(max(labels) + 1)):
        found = parse_lists({"train": text, "val": text, "test": text})
        assert found.labels["train"].tolist() == labels
    else:
        with pytest.raises(ValueError, match="has no training image"):
            parse_lists({"train": text, "val": text, "test": text})


@QUICK
@given(text=st.text())
def test_any_text_as_prompts(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text(text, encoding="utf-8", newline="")
    try:
        pairs = read_prompts(path)
    except ValueError as error:
        assert "expected 'class: prompt'" in str(error)
    else:
        assert all(name and prompt for name, prompt in pairs)


@QUICK
@given(tree, tree)
def test_keys_follow_the_settings_and_not_their_order(tmp_path_factory, a, b):
    store = Store(tmp_path_factory.mktemp("store"))
    stage = Stage("any", parse_lists)
    key = {name: store.plan(stage, value, {}).key for name, value in (("a", a), ("b", b))}
    backwards = dict(reversed(a.items()))
    assert store.plan(stage, backwards, {}).key == key["a"]
    same = json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)
    assert (key["a"] == key["b"]) is same
