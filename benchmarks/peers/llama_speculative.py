"""Speculative decoding of llama.cpp with exported heads beside ours: drafts kept in every round, from the same prompts, in fp32.

    headstart export HEADS --model TARGET --to gguf --dtype float32 --out EXPORT
    python benchmarks/peers/llama_speculative.py EXPORT --heads HEADS --model TARGET --work WORK

Builds llama.cpp's `llama-speculative-simple` in WORK where it is not there. Both draft chains greedily, with KV caches in fp32.
That program drafts before it has scored a prompt's last token, and we draft after it; so it is given the prompt and our first
token. Its prompt is a text: prompts whose text with that token gives other tokens are left out. Rounds that --max-tokens or
the end of an answer shortens are not compared. EXPORT holds `draft.gguf` and `model.gguf` (EAGLE-3), or `model.gguf` (with MTP
modules).
"""

import argparse
import json
import os
import re
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from llama_cpp_build import ensure_built, programs_in

PROGRAM = "llama-speculative-simple"
TRIES = 20  # of an answer whose log is cut
_ROUND = re.compile(r"accepted (\d+)/(\d+) draft tokens, the last target token is: \((\d+)\)")
_ENCODED = re.compile(r"encoded +(\d+) tokens")
_FP32 = [word for cache in ("-ctk", "-ctv", "-ctkd", "-ctvd") for word in (cache, "f32")]


@dataclass(frozen=True)
class Round:
    """One round of speculative decoding.

    kept: drafts that were kept.
    last: the token that the target decided after them.
    """

    kept: int
    last: int


@dataclass(frozen=True)
class Answer:
    """The rounds of one answer after its first token. is_ended: whether the last of them ended the answer."""

    rounds: tuple[Round, ...]
    is_ended: bool


def command(program: Path, export: Path, prompt: str, drafts: int, tokens: int, threads: int) -> list[str]:
    """The command for one answer. tokens: the most that it generates."""
    draft = export / "draft.gguf"
    heads = ["-md", str(draft), "--spec-type", "draft-eagle3"] if draft.is_file() else ["--spec-type", "draft-mtp"]
    chain = ["--spec-draft-n-max", str(drafts), "--spec-draft-n-min", "0", "--spec-draft-p-min", "0"]
    decoding = ["--temp", "0", "-n", str(tokens), "-t", str(threads), "-fa", "off", *_FP32, "-lv", "5"]  # -lv 5: prints every round
    return [str(program), "-m", str(export / "model.gguf"), *heads, *chain, *decoding, "--no-escape", "-p", prompt]


def read(output: str, num_prompt: int, tokens: int) -> Answer:
    """The rounds of what the program printed.

    num_prompt: tokens of the prompt; tokens: the most that it generates.
    Raises ValueError where it read other tokens than these.
    """
    encoded = _ENCODED.search(output)
    if encoded is None or int(encoded[1]) != num_prompt:
        raise ValueError(f"llama.cpp read a prompt of {encoded[1] if encoded else 'no'} tokens that has {num_prompt}")
    rounds = tuple(Round(int(kept), int(last)) for kept, _, last in _ROUND.findall(output))
    return Answer(rounds, sum(each.kept + 1 for each in rounds) < tokens)


def theirs(program: Path, arguments: argparse.Namespace, prompt: str, num_prompt: int) -> Answer:
    """llama.cpp's answer. Raises ValueError, with the last line of what it printed, where it fails.

    It sometimes exits before its log is written to the end, and is then run again.
    """
    tokens = arguments.max_tokens + arguments.drafts + 1
    words = command(program, arguments.export, prompt, arguments.drafts, tokens, arguments.threads)
    output = ""
    for _ in range(TRIES):
        done = subprocess.run(words, capture_output=True, text=True, errors="replace", timeout=600)
        output = done.stdout + done.stderr
        if done.returncode:
            last = (output.strip().splitlines() or ["it said nothing"])[-1]
            raise ValueError(f"{PROGRAM} ended with exit status {done.returncode}: {last}")
        if _ENCODED.search(output):
            break
    return read(output, num_prompt, tokens)


def ours(llm: Any, prompt: Sequence[int], tokens: int) -> tuple[list[int], Answer]:
    """What the first round of our answer emits, and the rounds after that, without those that only read a part of the prompt."""
    from headstart.speculation.params import SamplingParams

    request = llm.engine.add(list(prompt), SamplingParams(max_tokens=tokens + 1), stop_ids=llm.stop_ids)
    emitted: list[list[int]] = []
    while request.finish_reason is None:
        emitted.append([token for event in llm.engine.step() for token in event.tokens])
    first, *rounds = [each for each in emitted if each]
    return first, Answer(tuple(Round(len(each) - 1, each[-1]) for each in rounds), request.finish_reason != "length")


def compared(one: Answer, other: Answer, tokens: int) -> Iterator[tuple[Round, Round]]:
    """The rounds that neither --max-tokens nor the end of an answer shortens, until the two differ."""
    whole = [answer.rounds[:-1] if answer.is_ended else answer.rounds for answer in (one, other)]
    starts = accumulate((each.kept + 1 for each in whole[0]), initial=0)
    for start, pair in zip(starts, zip(*whole, strict=False), strict=False):
        if start >= tokens:
            return
        yield pair
        if pair[0] != pair[1]:
            return


def kept_by_position(rounds: Sequence[Round], drafts: int) -> list[float]:
    """The share of rounds in which the draft at each position and all before it were kept."""
    return [round(sum(each.kept > position for each in rounds) / max(1, len(rounds)), 3) for position in range(drafts)]


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Both engines' kept drafts, and in how many rounds they are the same."""
    import torch

    import headstart
    from headstart.bench.tasks import encode_prompt_sets, read_prompt_sets

    torch.set_num_threads(arguments.threads)
    program = programs_in(ensure_built(arguments.work, arguments.minutes, programs=(PROGRAM,)), (PROGRAM,))[PROGRAM]
    sets = read_prompt_sets([arguments.prompts], arguments.limit)
    tokens = arguments.max_tokens + arguments.drafts + 1
    pairs: list[tuple[Round, Round]] = []
    equal = left_out = 0
    options = {"drafter": str(arguments.heads), "planner": f"chain:{arguments.drafts}", "dtype": "float32", "device": "cpu"}
    with headstart.load(arguments.model, max_rows=1, **options) as llm:
        tasks, _ = encode_prompt_sets(llm, sets, arguments.max_tokens)
        tokenizer = llm.tokenizer
        for task in tasks:
            first, own = ours(llm, task.prompt, tokens)
            ids = [*task.prompt, *first]
            text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            if tokenizer.encode(text, add_special_tokens=False) != ids:
                left_out += 1
                continue
            other = theirs(program, arguments, text, len(ids))
            found = list(compared(own, other, arguments.max_tokens))
            pairs += found
            equal += all(a == b for a, b in found)
    return {
        "prompts": len(tasks) - left_out,
        "left_out": left_out,
        "equal_answers": equal,
        "rounds": len(pairs),
        "equal_rounds": sum(a == b for a, b in pairs),
        "kept_by_position_ours": kept_by_position([a for a, _ in pairs], arguments.drafts),
        "kept_by_position_theirs": kept_by_position([b for _, b in pairs], arguments.drafts),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("export", type=Path)
    parser.add_argument("--heads", type=Path, required=True, help="the native heads that were exported")
    parser.add_argument("--model", required=True, help="their target, a Hugging Face folder")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--prompts", default="questions")
    parser.add_argument("--limit", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--drafts", type=int, default=4)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--minutes", type=float, default=60, help="for the build")
    arguments = parser.parse_args()
    try:
        result = measure(arguments)
    except ValueError as error:
        parser.error(str(error))
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
