"""Times passes of one model by one engine, a round at a time, for `llama_cpp.py`, which runs this as a process of its own.

    python benchmarks/peers/passes.py {ours,transformers} FOLDER [--dtype bfloat16] [--threads 2] [--context 256] [--nodes 1 8 16]

For every line that it is sent it times a round of passes and says their milliseconds by name; see `worker.py`. A pass scores n
nodes behind `context` committed tokens and gives the logits of all of them. Ours is a round's forest, a root and a tree of n - 1
drafts; that of transformers is a chain of n tokens. `decode` is whole plain decoding by the engine, per token, host included.
"""

import argparse
import copy
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from llama_bench import DECODED
from transformers import DynamicCache, PreTrainedModel, StaticCache
from worker import serve

from headstart.bench import runner
from headstart.speculation.params import SamplingParams
from headstart.speculation.tree import ROOT, Drafts, Forest, merge
from headstart.target.cache import KVCache, Seating
from headstart.target.kernels.library import SWITCH
from headstart.target.loading import load_model
from headstart.target.target import Target

Jobs = dict[str, Callable[[], float]]  # by name: does one thing and returns its milliseconds


def drafts_of(count: int, vocab: int) -> Drafts:
    """A tree of drafts: pairs of siblings, each below the first of the pair before."""
    parents, depths = [ROOT] * min(count, 2), [1] * min(count, 2)
    for draft in range(2, count):
        parents.append(draft - 2 - draft % 2)
        depths.append(depths[parents[-1]] + 1)
    return Drafts.of([(7 + 13 * draft) % vocab for draft in range(count)], parents, [0] * count, depths, [0.5] * count)


def text_of(length: int, vocab: int) -> list[int]:
    """Random tokens."""
    return torch.randint(0, vocab, (length,), generator=torch.Generator().manual_seed(0)).tolist()


def milliseconds(work: Callable[[], object]) -> float:
    """The time of one call."""
    began = time.perf_counter()
    work()
    return 1000 * (time.perf_counter() - began)


# -- ours -------------------------------------------------------------------------------------------------------------------


def forest_of(target: Target, nodes: int, context: int) -> Forest:
    """A round's forest: the root at position `context`, its drafts, and the dead nodes that exactness needs."""
    drafts = drafts_of(nodes - 1, target.vocab) if nodes > 1 else Drafts.none(target.device)
    return merge([[5 % target.vocab]], [context], [True], drafts, target.min_nodes, target.device)


def filled(target: Target, context: int, room: int) -> tuple[KVCache, int]:
    """A cache whose seat holds `context` tokens and has slots for `room` nodes, and the seat."""
    seating = Seating(1, context + room)
    seat = seating.take(context + room)
    assert seat is not None
    cache = target.new_cache(seating)
    forest = merge([text_of(context, target.vocab)], [0], [True], Drafts.none(target.device), 0, target.device)
    target.score(forest, cache, [seat])
    cache.commit([seat], [context], [[]])
    return cache, seat


def our_jobs(target: Target, nodes: Sequence[int], context: int) -> Jobs:
    """A pass of each size, as the engine does it: the forest is made anew, and nothing is committed."""
    cache, seat = filled(target, context, max(nodes))

    def one_pass(count: int) -> float:
        return milliseconds(lambda: target.score(forest_of(target, count, context), cache, [seat]))

    jobs: Jobs = {str(count): lambda count=count: one_pass(count) for count in nodes}  # type: ignore[misc]
    return jobs | {"decode": decoding(target, context)}


def decoding(target: Target, context: int) -> Callable[[], float]:
    """Milliseconds per token of plain decoding behind `context` tokens, without the prompt."""
    params = SamplingParams(max_tokens=DECODED + 1, ignore_eos=True)
    setup = runner.Setup(target, (runner.Task(tuple(text_of(context, target.vocab))),), params)
    (plain,) = runner.prepare(setup, [])

    def run() -> float:
        sample = runner.answer(setup, plain, 0)
        return 1000 * (sample.seconds - sample.prompt_seconds) / (len(sample.tokens) - 1)

    return run


# -- transformers -----------------------------------------------------------------------------------------------------------


def their_jobs(model: PreTrainedModel, nodes: Sequence[int], context: int) -> Jobs:
    """A pass of each size with either of its own caches; `best_of` picks the faster one."""
    vocab = int(model.config.vocab_size)
    caches = {
        "dynamic": DynamicCache(config=model.config),
        "static": StaticCache(config=model.config, max_cache_len=context + max(nodes)),
    }
    prompt = torch.tensor([text_of(context, vocab)])
    with torch.inference_mode():
        for cache in caches.values():
            model(input_ids=prompt, past_key_values=cache, use_cache=True)

    def one_pass(kind: str, count: int) -> float:
        cache = copy.deepcopy(caches[kind])
        arguments: dict[str, Any] = {
            "input_ids": torch.tensor([text_of(count, vocab)]),
            "position_ids": torch.arange(context, context + count)[None],
            "past_key_values": cache,
            "use_cache": True,
        }
        with torch.inference_mode():
            return milliseconds(lambda: model(**arguments))

    return {
        f"{count} {kind}": lambda kind=kind, count=count: one_pass(kind, count)  # type: ignore[misc]
        for count in nodes
        for kind in caches
    }


# -- rounds -----------------------------------------------------------------------------------------------------------------


def one_round(jobs: Jobs, repetitions: int) -> dict[str, list[float]]:
    """Milliseconds of each job, interleaved; `decode`, which is long, is done once."""
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for repetition in range(repetitions):
        for name, job in jobs.items():
            if name != "decode" or not repetition:
                times[name].append(job())
    return times


def jobs_of(engine: str, folder: str, dtype: str, nodes: Sequence[int], context: int, weights: str) -> Jobs:
    """The jobs of an engine, warmed up."""
    if engine == "ours":
        jobs = our_jobs(Target.load(folder, dtype=dtype, device="cpu", weights=weights), nodes, context)
    else:
        jobs = their_jobs(load_model(folder, dtype, "cpu"), nodes, context)
    one_round(jobs, 2)
    return jobs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=["ours", "transformers"])
    parser.add_argument("folder")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--weights", choices=["stored", "int8"], default="stored")
    parser.add_argument("--torch", action="store_true", help="ours without the compiled kernels")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.torch:
        os.environ[SWITCH] = "torch"
    jobs = jobs_of(arguments.engine, arguments.folder, arguments.dtype, arguments.nodes, arguments.context, arguments.weights)
    serve("ready", lambda: {"ms": one_round(jobs, arguments.repetitions)})


if __name__ == "__main__":
    main()
