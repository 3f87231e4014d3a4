"""Inside transformers: the same tokens from `model.generate`, in fewer forwards. python examples/inside_transformers.py [MODEL]"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

import headstart
from headstart.target.loading import embedded

path = sys.argv[1] if len(sys.argv) > 1 else embedded("target")
model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
inputs = tokenizer("Once upon a time there was a", return_tensors="pt")
settings = {"max_new_tokens": 64, "do_sample": False}

plain = model.generate(**inputs, **settings)
drafted = model.generate(**inputs, **settings, custom_generate=headstart.custom_generate, drafter="lookup")
print(tokenizer.decode(drafted[0], skip_special_tokens=True))
print("the same tokens" if plain.tolist() == drafted.tolist() else "different tokens: a near tie")
