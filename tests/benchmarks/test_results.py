"""benchmarks/results.py: every table of docs/results.md has its piece, and a measured table takes the place of the old one."""

import re
import runpy
from pathlib import Path

import pytest
from command_line import answer

ROOT = Path(__file__).parents[2]
SCRIPT = runpy.run_path(str(ROOT / "benchmarks" / "results.py"))
PAGE = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")


def test_every_table_of_numbers_stands_in_the_place_of_a_piece():
    places = re.findall(r"<!-- (?!end)(\S+) -->.*?<!-- end -->", PAGE, re.DOTALL)
    assert len(places) > 4
    assert {*places} <= {*SCRIPT["PIECES"]}
    elsewhere = re.sub(r"<!-- (?!end)\S+ -->.*?<!-- end -->", "", PAGE, flags=re.DOTALL)
    assert re.findall(r"^\|.*\d\.\d.*", elsewhere, re.MULTILINE) == []


def test_a_new_table_takes_the_place_of_the_old_one_and_nothing_else_changes():
    page = "before\n<!-- one -->\n\n| old |\n\n<!-- end -->\nbetween <!-- end -->\n<!-- two -->\n\nkept\n\n<!-- end -->\n"
    changed = SCRIPT["with_tables"](page, {"one": "| new\\1 |", "three": "nowhere"})
    assert changed == page.replace("| old |", "| new\\1 |")


def test_the_table_of_a_benchmark_has_a_line_for_each_run(model_folder):
    result = answer("bench", "--model", model_folder, "--run", "lookup", "--limit", 1, "--max-tokens", 8, "--repeat", 1)
    lines = SCRIPT["table"]("embedded", result).splitlines()
    assert [line.split(" | ")[0] for line in lines if line.startswith("| ")][2:] == ["| plain", "| lookup"]


@pytest.mark.parametrize("tree", [{"tree": {"tokens_per_second": 30.0, "tau": 2.5}}, {}])
def test_a_table_of_tuning_has_what_was_expected_beside_what_was_achieved(tree):
    expected = {
        "rows": 4,
        "temperature": 0.7,
        "paths": [[0]] if tree else [],
        "tau": 2.4,
        "tokens_per_second": 28.0,
        "speed_up": 1.4,
    }
    achieved = {"rows": 4, "temperature": 0.7, "plain": {"tokens_per_second": 20.0, "tau": 1.0}, **tree}
    line = SCRIPT["table"]("tune-mtp", {"expected": [expected], "achieved": [achieved]}).splitlines()[2]
    best = "1 drafts | 1.40x, 1.50x | 28.0, 30.0 | 2.40, 2.50" if tree else "none | 1.40x, 1.00x | 28.0, 20.0 | 2.40, 1.00"
    assert line == f"| 4 | {best} |"
