"""Fixtures that several test files share."""

from pathlib import Path

import pytest
from folders import write_model


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with its own tokenizer and chat template: what a user's model folder looks like."""
    return write_model(tmp_path_factory.mktemp("models") / "target")


@pytest.fixture(scope="session")
def draft_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A smaller model with the same tokenizer."""
    return write_model(tmp_path_factory.mktemp("models") / "draft", layers=1)
