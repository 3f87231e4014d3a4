"""The library: its threads, its instructions, how it is found and built, and the memory of packed weights."""

import linecache
import os
import sys
import threading

import pytest
import torch

from headstart.target.kernels import library as library_module
from headstart.target.kernels.compiled import CompiledPack
from headstart.target.kernels.cpp import build
from headstart.target.kernels.library import SWITCH, library
from headstart.target.kernels.memory import huge_pages

LIBRARY = library()
pytestmark = pytest.mark.skipif(LIBRARY is None, reason="there are no compiled kernels for this processor, or no compiler")


def test_threads_that_call_at_once_do_not_disturb_each_other():
    LIBRARY._set_threads(3)
    pack, inputs = CompiledPack([torch.randn(640, 320)], [None]), [torch.randn(n, 320) for n in (1, 3, 16, 40)]
    expected, wrong = [pack(x) for x in inputs], []

    def work(x, y):
        wrong.extend(1 for _ in range(200) if not torch.equal(pack(x), y))

    threads = [threading.Thread(target=work, args=pair) for pair in zip(inputs, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_smaller_or_larger_number_of_threads_changes_nothing():
    pack, x = CompiledPack([torch.randn(640, 320)], [None]), torch.randn(4, 320)
    expected = pack(x)
    for threads in (4, 1, 3, -1, 2):
        LIBRARY._set_threads(threads)
        assert torch.equal(pack(x), expected), threads


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_multiplies_too():
    LIBRARY._set_threads(2)
    pack, x = CompiledPack([torch.randn(640, 320)], [None]), torch.randn(4, 320)
    expected = pack(x)
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(pack(x), expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_torch_has_one_thread_while_the_library_works():
    before = torch.get_num_threads()
    with LIBRARY.working():
        assert torch.get_num_threads() == 1
        with LIBRARY.working():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before
    with pytest.raises(KeyError), LIBRARY.working():
        raise KeyError
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("statement", range(50))
def test_an_interruption_at_any_statement_gives_torch_its_threads_back(statement):
    before, num_lines = torch.get_num_threads(), 0

    def trace(frame, event, _):
        nonlocal num_lines
        if frame.f_code.co_filename != library_module.__file__:
            return None
        is_statement = event == "line" and "with self._lock" not in linecache.getline(library_module.__file__, frame.f_lineno)
        num_lines += is_statement
        if is_statement and num_lines == statement + 1:
            sys.settrace(None)
            raise KeyboardInterrupt
        return trace

    torch.set_num_threads(3)
    try:
        sys.settrace(trace)
        with LIBRARY.working(), LIBRARY.working():
            pass
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(None)
    threads, working = torch.get_num_threads(), LIBRARY._working
    torch.set_num_threads(before)
    assert (threads, working) == (3, set())


def test_threads_that_work_at_once_all_get_torchs_threads_back():
    """The second one begins while the first one works, when torch has one thread, and ends after it."""
    before, turns, seen = torch.get_num_threads(), [threading.Event() for _ in range(3)], []

    def first():
        with LIBRARY.working():
            turns[0].set()
            turns[1].wait()
        seen.append(torch.get_num_threads())
        turns[2].set()

    def second():
        turns[0].wait()
        with LIBRARY.working():
            turns[1].set()
            turns[2].wait()
            seen.append(torch.get_num_threads())
        seen.append(torch.get_num_threads())

    torch.set_num_threads(3)
    threads = [threading.Thread(target=work) for work in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.set_num_threads(before)
    assert seen == [3, 1, 3]


def test_threads_that_ask_for_memory_at_once_get_different_memory():
    taken = []
    threads = [threading.Thread(target=lambda: taken.extend(huge_pages(5, torch.int64) for _ in range(300))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({block.data_ptr() for block in taken}) == 1200


def test_memory_of_huge_pages_is_zero_and_not_shared():
    blocks = [huge_pages(count, torch.float32) for count in (5, 1000, 2**23, 7)]
    for number, block in enumerate(blocks):
        assert not block.any()
        block.fill_(number + 1)
    assert all(bool((block == number + 1).all()) for number, block in enumerate(blocks))


def test_the_library_belongs_to_its_sources(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "HERE", tmp_path)
    (tmp_path / "level.cpp").write_text("one")
    name = build.file_name()
    (tmp_path / "level.cpp").write_text("other")
    assert build.file_name() != name


def test_a_missing_compiler_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "find_compiler", lambda: None)
    with pytest.raises(OSError, match="no C\\+\\+ compiler; install one, or name it in the environment variable CXX"):
        build.build(tmp_path)


def test_a_failed_build_is_a_warning(tmp_path, monkeypatch):
    def fail(folder):
        raise OSError("the compiler says: no space left")

    monkeypatch.setattr(library_module, "file_name", lambda: "not-built.so")
    monkeypatch.setattr(library_module, "build", fail)
    library.cache_clear()
    with pytest.warns(UserWarning, match="cannot be built, so torch's are used: the compiler says: no space left"):
        assert library() is None
    library.cache_clear()


def test_a_level_that_does_not_exist_is_refused(monkeypatch):
    monkeypatch.setenv(SWITCH, "mmx")
    library.cache_clear()
    with pytest.raises(ValueError, match="HEADSTART_KERNELS is 'mmx', but this processor does not have mmx"):
        library()
    monkeypatch.delenv(SWITCH)
    library.cache_clear()


def test_the_switch_leaves_the_library_out(monkeypatch):
    monkeypatch.setenv(SWITCH, "torch")
    library.cache_clear()
    assert library() is None
    monkeypatch.delenv(SWITCH)
    library.cache_clear()
