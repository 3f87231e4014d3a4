"""Model folders as users have them: a tiny random Llama with a byte-pair tokenizer trained on a few lines."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEXT = [
    "Once upon a time there was a little cat who lived near the sea and the sea was blue and the cat was grey.",
    "The cat said to the sea: give me a fish. The sea said to the cat: take the fish and give me a song.",
    "Was für ein schöner Tag, sagte die Katze. 猫は魚が好きです。",
]
END, USER, ASSISTANT, SYSTEM = "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"
TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def write_tokenizer(folder: Path, vocab: int = 320, template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """Write the tokenizer's files to a folder, and return it. template: of chats; None: no chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = [END, USER, ASSISTANT, SYSTEM]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab, special_tokens=specials, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXT, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)
    fast.chat_template = template
    fast.save_pretrained(folder)
    return fast


def write_model(folder: Path, vocab: int = 320, layers: int = 2, context: int = 256, template: str | None = TEMPLATE) -> Path:
    """Write a folder with config, weights and tokenizer, the same bytes every time. context: longest text, in tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder, vocab, template)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
        initializer_range=0.2,
    )
    torch.manual_seed(layers)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
