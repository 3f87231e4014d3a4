"""Recipes are not part of the installed package, so their tests add the repository to the path."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
