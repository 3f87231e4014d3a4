"""A streamed answer, and how many rounds it took. python examples/generate.py [MODEL]"""

import sys

import headstart

llm = headstart.load(sys.argv[1] if len(sys.argv) > 1 else None)
for piece in llm.stream("Once upon a time", max_tokens=80, temperature=0.8, seed=7):
    print(piece, end="", flush=True)
print(f"\n\n{llm.stats.tokens} tokens in {llm.stats.rounds} rounds, {llm.stats.tau:.2f} per round")
