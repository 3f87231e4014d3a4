"""Train heads on a model's own answers, then draft with them. python examples/train_medusa.py [MODEL]"""

import json
import sys
import tempfile
from pathlib import Path

import headstart
from headstart.bench.suites import load_cases
from headstart.target.loading import embedded
from headstart.training.train import TrainConfig, train

model = sys.argv[1] if len(sys.argv) > 1 else str(embedded("target"))
folder = Path(tempfile.mkdtemp(prefix="heads-"))
settings = {"max_tokens": 64, "temperature": 0.7, "seed": 1}

# Heads predict the model's own answers. `headstart distill` generates them for many prompts.
llm = headstart.load(model, drafter=None, dtype="float32")
prompts = [[{"role": "user", "content": case.prompt}] for case in load_cases("stories", 8)]
answers = llm.generate(prompts, **settings)
with (folder / "answers.jsonl").open("w") as file:
    for prompt, answer in zip(prompts, answers, strict=True):
        file.write(json.dumps({"messages": [*prompt, {"role": "assistant", "content": answer.text}]}) + "\n")

config = TrainConfig(
    method="medusa",
    settings={"num_heads": 3},
    target=model,
    dtype="float32",
    data=[folder / "answers.jsonl"],
    held_out=0,  # with so few texts; hold some out to measure what heads are worth
    out=folder / "heads",
    steps=40,
    learning_rate=5e-3,
)
train(config)

llm = headstart.load(model, drafter=str(folder / "heads"), dtype="float32")
assert [answer.token_ids for answer in llm.generate(prompts, **settings)] == [answer.token_ids for answer in answers]
print(f"{folder / 'heads'}: the same answers with {llm.stats.tau:.2f} tokens per round")
