"""The names, types and limits of sampling settings, and the error of each wrong one."""

import math
import subprocess
import sys
import typing
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

import headstart
from headstart.speculation.params import SYNONYMS, SamplingParams, SamplingSettings, read_settings

NAMES = {field.name for field in fields(SamplingParams)}

WRONG_TYPES = [
    ({"temperature": "hot"}, "temperature is 'hot'; it must be a number"),
    ({"temperature": None}, "temperature is None; it must be a number"),
    ({"temperature": True}, "temperature is True; it must be a number"),
    ({"top_p": [0.9]}, r"top_p is \[0.9\]; it must be a number, or None"),
    ({"repetition_penalty": "1.1"}, "repetition_penalty is '1.1'; it must be a number"),
    ({"stop": 5}, "stop is 5; it must be a string or a list of strings"),
    ({"stop": None}, "stop is None; it must be a string or a list of strings"),
    ({"stop": ["end", 5]}, r"stop is \['end', 5\]; it must be a string or a list of strings"),
    ({"stop": b"end"}, "stop is b'end'; it must be a string or a list of strings"),
    ({"stop_token_ids": 3}, "stop_token_ids is 3; it must be a list of token ids"),
    ({"stop_token_ids": "3"}, "stop_token_ids is '3'; it must be a list of token ids"),
    ({"stop_token_ids": [3, "4"]}, "an item of stop_token_ids is '4'; it must be a whole number"),
    ({"max_tokens": 2.5}, "max_tokens is 2.5; it must be a whole number"),
    ({"max_tokens": True}, "max_tokens is True; it must be a whole number"),
    ({"n": "2"}, "n is '2'; it must be a whole number"),
    ({"seed": "x"}, "seed is 'x'; it must be a whole number, or None"),
    ({"top_k": 4.0}, "top_k is 4.0; it must be a whole number, or None"),
    ({"logprobs": "2"}, "logprobs is '2'; it must be a whole number, or None"),
    ({"logit_bias": [3]}, r"logit_bias is \[3\]; it must be a dict of token ids and numbers"),
    ({"logit_bias": {"3": 1.0}}, "a token of logit_bias is '3'; it must be a whole number"),
    ({"logit_bias": {3: "1"}}, "logit_bias of token 3 is '1'; it must be a number"),
    ({"ignore_eos": "no"}, "ignore_eos is 'no'; it must be True or False"),
]


@pytest.mark.parametrize(("settings", "sentence"), WRONG_TYPES, ids=[str(settings) for settings, _ in WRONG_TYPES])
def test_a_setting_of_the_wrong_type_is_refused_in_one_sentence(settings, sentence):
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        SamplingParams(**settings)


def test_every_setting_refuses_an_object():
    for name in NAMES:
        with pytest.raises(ValueError, match=f"^{name} is <object"):
            SamplingParams(**{name: object()})


def test_numbers_of_numpy_and_whole_numbers_for_floats_are_accepted():
    params = SamplingParams(
        max_tokens=np.int64(7),
        temperature=np.float32(0.5),
        top_p=np.float64(0.75),
        seed=np.uint64(2**63),
        logit_bias={np.int32(3): 1},
    )
    assert params == SamplingParams(max_tokens=7, temperature=0.5, top_p=0.75, seed=2**63, logit_bias={3: 1.0})
    assert type(params.max_tokens) is type(params.seed) is int
    assert type(params.temperature) is float
    assert SamplingParams(temperature=1, stop_token_ids={4}).stop_token_ids == (4,)


def test_a_bias_that_changes_later_does_not_change_the_settings():
    biases = {3: 1.0}
    params = SamplingParams(logit_bias=biases)
    biases[3] = 9.0
    assert params.logit_bias == {3: 1.0}


def test_the_typed_settings_are_the_fields_of_sampling_params():
    assert set(typing.get_type_hints(SamplingSettings)) == NAMES
    assert not SamplingSettings.__required_keys__


def test_every_synonym_stands_for_a_setting_and_is_no_setting_itself():
    assert set(SYNONYMS.values()) <= NAMES
    assert not set(SYNONYMS) & NAMES


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("max_token", "max_tokens"),
        ("temprature", "temperature"),
        ("topk", "top_k"),
        ("max_new_tokens", "max_tokens"),
        ("stop_sequences", "stop"),
        ("num_return_sequences", "n"),
        ("do_sample", "temperature"),
        ("random_seed", "seed"),
    ],
)
def test_the_error_of_a_misspelt_setting_names_the_right_one(wrong, right):
    with pytest.raises(ValueError, match=rf"^{wrong} is no sampling setting; did you mean {right}\?$"):
        read_settings(None, {wrong: 1})


def test_the_error_of_an_unknown_setting_lists_all_settings():
    with pytest.raises(ValueError, match=r"^xyzzy is no sampling setting; the settings are max_tokens, temperature"):
        read_settings(None, {"xyzzy": 1})


# -- limits --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ({"max_tokens": 0}, "max_tokens is 0; it must be at least 1"),
        ({"temperature": -0.1}, r"temperature is -0.1; it must be 0 \(greedy\)"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": 1e38}, "at most 1e[+]06"),
        ({"top_k": 0}, "top_k is 0; it must be at least 1, or None for off"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.01}, "top_p is 1.01"),
        ({"top_p": math.nan}, "top_p is nan"),
        ({"min_p": -0.1}, "min_p is -0.1"),
        ({"min_p": 1.1}, "min_p is 1.1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
        ({"repetition_penalty": math.inf}, "repetition_penalty is inf"),
        ({"presence_penalty": math.inf}, "presence_penalty is inf"),
        ({"presence_penalty": 1e300}, "presence_penalty is 1e[+]300"),
        ({"frequency_penalty": math.nan}, "frequency_penalty is nan"),
        ({"logit_bias": {7: math.inf}}, "logit_bias of token 7 is inf"),
        ({"logit_bias": {7: math.nan}}, "logit_bias of token 7 is nan"),
        ({"seed": 2**64}, "seed is 18446744073709551616"),
        ({"seed": -(2**63) - 1}, "seed is -9223372036854775809"),
        ({"n": 0}, "n is 0"),
        ({"stop": ""}, "stop is"),
        ({"stop": ("a", "")}, "stop is"),
        ({"logprobs": -1}, "logprobs is -1"),
    ],
)
def test_a_setting_out_of_bounds_is_refused_in_one_sentence(setting, sentence):
    with pytest.raises(ValueError, match=sentence):
        SamplingParams(**setting)


def test_the_limits_themselves_are_accepted():
    SamplingParams(max_tokens=1, top_k=1, top_p=1.0, min_p=1.0, seed=2**64 - 1, logit_bias={3: -math.inf}, logprobs=0)
    assert SamplingParams(stop="a").stop == ("a",)


# -- type checkers ---------------------------------------------------------------------------------------------------------


SNIPPET = """
import headstart

llm = headstart.load()
llm.generate("x", {name}=5)
llm.stream("x", {name}=5)
llm.chat("x", {name}=5)
llm.chat_stream("x", {name}=5)
"""


@pytest.mark.slow
def test_mypy_reports_a_misspelt_setting_and_one_of_the_wrong_type(tmp_path):
    for name in ("max_tokens", "max_token", "stop"):
        (tmp_path / f"{name}.py").write_text(SNIPPET.format(name=name))
    package = Path(headstart.__file__).parent
    modules = [str(package / f"{module}.py") for module in ("__init__", "engine/llm", "speculation/params")]
    scripts = [str(script) for script in sorted(tmp_path.glob("*.py"))]
    command = [sys.executable, "-m", "mypy", "--follow-imports=skip", "--cache-dir", str(tmp_path / "cache"), *modules, *scripts]
    output = subprocess.run(command, capture_output=True, text=True, check=False, cwd=package.parent).stdout.splitlines()
    errors = {name: [line for line in output if f"/{name}.py:" in line] for name in ("max_tokens", "max_token", "stop")}
    assert errors["max_tokens"] == []
    assert sum('did you mean "max_tokens"?' in line for line in errors["max_token"]) == 4, output
    assert sum('has incompatible type "int"' in line for line in errors["stop"]) == 4, output
