"""Runs where vLLM is installed, for `vllm_cpu.py`: answers prompts one at a time, and prints tokens and seconds as JSON."""

import json
import sys
import time
from typing import Any


def measure(job: dict[str, Any]) -> list[dict[str, Any]]:
    """Per prompt the tokens, and the seconds of each repetition. job: as `vllm_cpu.measure` makes it."""
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found,unused-ignore]

    longest = max(map(len, job["prompts"])) + job["max_tokens"]
    llm = LLM(
        job["model"],
        dtype=job["dtype"],
        max_model_len=longest + 16,
        max_num_seqs=1,
        enforce_eager=True,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        speculative_config=job["speculation"],
    )
    params = SamplingParams(temperature=0.0, max_tokens=job["max_tokens"], ignore_eos=True, detokenize=False)

    def answer(prompt: list[int]) -> tuple[list[int], float]:
        began = time.perf_counter()
        (output,) = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
        return list(output.outputs[0].token_ids), time.perf_counter() - began

    answer(job["prompts"][0])
    answers = [[answer(prompt) for prompt in job["prompts"]] for _ in range(job["repeat"])]
    return [{"tokens": some[0][0], "seconds": [seconds for _, seconds in some]} for some in zip(*answers, strict=True)]


if __name__ == "__main__":
    print("\n" + json.dumps(measure(json.loads(sys.argv[1]))))
