"""What a caller may write for a sampling setting: names, types, and what a wrong one is told."""

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


def test_every_setting_refuses_a_type_that_none_of_them_takes():
    for name in NAMES:
        with pytest.raises(ValueError, match=f"^{name} is <object"):
            SamplingParams(**{name: object()})


def test_numbers_of_numpy_and_whole_numbers_for_real_ones_are_taken():
    found = SamplingParams(
        max_tokens=np.int64(7),
        temperature=np.float32(0.5),
        top_p=np.float64(0.75),
        seed=np.uint64(2**63),
        logit_bias={np.int32(3): 1},
    )
    assert found == SamplingParams(max_tokens=7, temperature=0.5, top_p=0.75, seed=2**63, logit_bias={3: 1.0})
    assert type(found.max_tokens) is type(found.seed) is int
    assert type(found.temperature) is float
    assert SamplingParams(temperature=1, stop_token_ids={4}).stop_token_ids == (4,)


def test_a_bias_that_changes_later_does_not_change_the_settings():
    biases = {3: 1.0}
    params = SamplingParams(logit_bias=biases)
    biases[3] = 9.0
    assert params.logit_bias == {3: 1.0}


def test_the_typed_settings_are_the_fields_of_sampling_params():
    assert set(typing.get_type_hints(SamplingSettings)) == NAMES
    assert not SamplingSettings.__required_keys__


def test_every_synonym_names_a_setting_and_is_none_itself():
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
def test_a_misspelt_setting_is_told_the_right_name(wrong, right):
    with pytest.raises(ValueError, match=rf"^{wrong} is no sampling setting; did you mean {right}\?$"):
        read_settings(None, {wrong: 1})


def test_a_setting_like_no_other_is_told_all_of_them():
    with pytest.raises(ValueError, match=r"^xyzzy is no sampling setting; the settings are max_tokens, temperature"):
        read_settings(None, {"xyzzy": 1})


SNIPPET = """
import headstart

llm = headstart.load()
llm.generate("x", {name}=5)
llm.stream("x", {name}=5)
llm.chat("x", {name}=5)
llm.chat_stream("x", {name}=5)
"""


@pytest.mark.slow
def test_mypy_flags_a_misspelt_setting_and_one_of_the_wrong_type(tmp_path):
    for name in ("max_tokens", "max_token", "stop"):
        (tmp_path / f"{name}.py").write_text(SNIPPET.format(name=name))
    package = Path(headstart.__file__).parent
    rooms = [str(package / f"{room}.py") for room in ("__init__", "llm", "sampling")]
    scripts = [str(script) for script in sorted(tmp_path.glob("*.py"))]
    command = [sys.executable, "-m", "mypy", "--follow-imports=skip", "--cache-dir", str(tmp_path / "cache"), *rooms, *scripts]
    said = subprocess.run(command, capture_output=True, text=True, check=False, cwd=package.parent).stdout.splitlines()
    found = {name: [line for line in said if f"/{name}.py:" in line] for name in ("max_tokens", "max_token", "stop")}
    assert found["max_tokens"] == []
    assert sum('did you mean "max_tokens"?' in line for line in found["max_token"]) == 4, said
    assert sum('has incompatible type "int"' in line for line in found["stop"]) == 4, said
