"""Recipes are no part of the installed package, so their tests name the folder they are found in."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
