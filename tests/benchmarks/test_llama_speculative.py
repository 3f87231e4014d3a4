"""benchmarks/peers/llama_speculative.py: its command, what it reads of llama.cpp's log, and which rounds it compares."""

import sys
from argparse import Namespace
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks" / "peers"))

import llama_speculative
from llama_speculative import Answer, Round, compared, kept_by_position, read

LOG = """\
 the0.00.1 D accepted 2/4 draft tokens, the last target token is: (17)
0.00.2 D clear kv cache from any extra tokens, n_past = 12
0.00.3 D accepted 0/4 draft tokens, the last target token is: (5)
0.00.4 I encoded    7 tokens in    0.004 seconds, speed: 1797.637 t/s
"""


def test_the_command_names_the_heads_by_what_was_exported(tmp_path):
    def words():
        return llama_speculative.command(Path("program"), tmp_path, "the cat", 4, 20, 1)

    (tmp_path / "model.gguf").touch()
    assert words()[words().index("--spec-type") + 1] == "draft-mtp"
    (tmp_path / "draft.gguf").touch()
    assert words()[words().index("--spec-type") + 1] == "draft-eagle3"
    assert words()[words().index("-md") + 1] == str(tmp_path / "draft.gguf")
    assert words()[-2:] == ["-p", "the cat"]


def test_rounds_are_read_from_the_log():
    assert read(LOG, 7, 20) == Answer((Round(2, 17), Round(0, 5)), is_ended=True)
    assert not read(LOG, 7, 4).is_ended
    with pytest.raises(ValueError, match="a prompt of 7 tokens that has 8"):
        read(LOG, 8, 20)


def test_a_cut_log_is_asked_for_again_and_a_failure_is_one_sentence(tmp_path):
    program, count = tmp_path / "program", tmp_path / "count"
    program.write_text(f"#!/bin/sh\necho x >> {count}\n[ $(wc -l < {count}) -gt 2 ] || exit 0\ncat <<'END'\n{LOG}END\n")
    program.chmod(0o755)
    arguments = Namespace(export=tmp_path, max_tokens=10, drafts=4, threads=1)
    assert len(llama_speculative.theirs(program, arguments, "the cat", 7).rounds) == 2
    assert count.read_text().count("x") == 3
    program.write_text("#!/bin/sh\necho no such model >&2; exit 3\n")
    with pytest.raises(ValueError, match="exit status 3: no such model"):
        llama_speculative.theirs(program, arguments, "the cat", 7)


def test_rounds_are_compared_until_they_differ_or_are_shortened():
    one = Answer((Round(2, 1), Round(0, 2), Round(1, 3), Round(0, 4)), is_ended=False)
    assert len([*compared(one, one, 100)]) == 4
    assert len([*compared(one, one, 4)]) == 2  # the third begins after four tokens
    assert len([*compared(one, Answer(one.rounds[:3], is_ended=True), 100)]) == 2  # the last round ended the answer
    other = Answer((Round(2, 1), Round(1, 2), Round(1, 3)), is_ended=False)
    assert [a == b for a, b in compared(one, other, 100)] == [True, False]


def test_acceptance_by_position_counts_whole_chains():
    assert kept_by_position([Round(2, 1), Round(0, 2), Round(3, 3), Round(1, 4)], 4) == [0.75, 0.5, 0.25, 0.0]
