"""Fixtures of several modules of this folder."""

import pytest
from modules import Publication


@pytest.fixture(scope="module")
def publish(tmp_path_factory):
    """Published models by family and number of modules, several modules in two shards. Tests must not change them."""
    models = {}

    def one(family, modules=1):
        folder = tmp_path_factory.mktemp(family) / family
        if (family, modules) not in models:
            models[family, modules] = Publication(folder, family, modules, shards=modules > 1)
        return models[family, modules]

    return one
