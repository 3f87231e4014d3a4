"""Fixtures that several test files share."""

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from folders import TEXT, write_model

from headstart.target.kernels.library import SWITCH, library


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Measured costs are kept in a folder of this session, not in the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def quick_costs(monkeypatch):
    """`tune` measures what rounds cost in a moment."""
    monkeypatch.setattr("headstart.bench.tuning.SECONDS", 0.2)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with its own tokenizer and chat template: what a user's model folder looks like."""
    return write_model(tmp_path_factory.mktemp("models") / "target")


@pytest.fixture(scope="session")
def draft_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A smaller model with the same tokenizer."""
    return write_model(tmp_path_factory.mktemp("models") / "draft", layers=1)


@pytest.fixture
def one_accelerator_at_a_time():
    """accelerate keeps one state per process; every run begins with a new one."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen conversations of different lengths."""
    path = tmp_path_factory.mktemp("data") / "chats.jsonl"
    words, dice = " ".join(TEXT).split(), random.Random(0)
    chats = [(dice.choices(words, k=3), dice.choices(words, k=4 + number)) for number in range(16)]
    roles = [[("user", ask), ("assistant", say)] for ask, say in chats]
    lines = [{"messages": [{"role": role, "content": " ".join(said)} for role, said in turns]} for turns in roles]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def asked(model_folder, data, tmp_path):
    """Keys of a short run; a test changes some."""

    def ask(**keys: object) -> dict:
        base = {"method": "medusa", "target": str(model_folder), "data": [data], "out": tmp_path / "heads", "steps": 9, "rows": 4}
        base |= {"settings": {"num_heads": 2}, "device": "cpu", "threads": 1, "held_out": 0.0, "save_every": 3, "log_every": 1}
        whole = base | keys
        return {name: value for name, value in whole.items() if value is not None}

    return ask


@pytest.fixture
def torch_kernels(monkeypatch):
    """torch's kernels, as on a processor without the compiled ones."""
    monkeypatch.setenv(SWITCH, "torch")
    library.cache_clear()
    yield
    library.cache_clear()
