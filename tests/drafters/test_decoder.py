"""A drafter's decoder layers, of any family: the logits of drafting are those of teacher forcing."""

import copy

import pytest
import torch
from heads import Forced
from teacher_forcing import TEXTS
from tiny import tiny
from transformers import PreTrainedModel

from headstart.drafters.mtp import Mtp, MtpConfig
from headstart.drafters.mtp_parallel import ParallelConfig, ParallelMtp
from headstart.drafters.parts import llama_layer
from headstart.drafters.parts.decoder import Memory, block_of, decoder, norm_like, slot_bytes, unrolled
from headstart.drafters.parts.llama_layer import Wide, llama_block, llama_block_of, widened, without_norms
from headstart.drafters.parts.losses import Batch
from headstart.speculation.tree import Kept
from headstart.target.cache import Seating

FAMILIES = ("qwen3", "gemma2", "gemma3", "mistral", "phi3", "glm4", "olmo2", "deepseek_v3", "smollm3", "gpt_neox", "cohere")
# What transformers itself computes in float32, whatever the model's precision: Gemma 2's softmax, DeepSeek's router.
ROUNDING = {"gemma2": 1e-5, "deepseek_v3": 1e-7}
LONG = [list(range(1, 41)), [(7 * i) % 90 + 2 for i in range(33)]]


def random_heads(kind, target):
    """Heads with layers like the target's, with random weights."""
    torch.manual_seed(1)
    config = {"mtp": MtpConfig(num_modules=2, depth=4), "mtp-parallel": ParallelConfig(num_heads=3)}[kind]
    method = {"mtp": Mtp, "mtp-parallel": ParallelMtp}[kind]
    heads = method(method.resolve_config(config, target.model.config), target.embed_head.hidden, target.embed_head.vocab)
    for block in (module for module in heads.modules() if isinstance(module, PreTrainedModel)):
        block.set_experts_implementation("eager")  # there is no grouped product in fp64
    with torch.no_grad():
        for weight in heads.parameters():
            weight.add_(torch.randn_like(weight) * 0.2)
    return heads.to(target.dtype).bind(target.embed_head).eval()


def teacher_forced(heads, text, root_position, features):
    """[depth][vocab] logits after one root, as in training."""
    batch = Batch(torch.tensor([text]), torch.ones(1, len(text), dtype=torch.bool), features[None], features[None])
    return [output.output_head(output.states[:, root_position - 1])[0].detach() for output in heads.states(batch)]


@pytest.mark.parametrize("kind", ["mtp", "mtp-parallel"])
@pytest.mark.parametrize("family", FAMILIES)
def test_drafting_logits_are_the_teacher_forced_ones_in_any_family(family, kind):
    target, root_positions = tiny(family), (36, 29)  # beyond every sliding window
    heads = random_heads(kind, target)
    torch.manual_seed(0)
    features = [torch.randn(len(text), 64, dtype=target.dtype) for text in LONG]
    expected = [teacher_forced(heads, *row) for row in zip(LONG, root_positions, features, strict=True)]
    seating = Seating(2, 128)
    for text in LONG:
        seating.take(len(text) + 8)
    heads.attach(target, seating)
    for cut in (0, 1), (1, 20), (20, 21), (21, 99):
        spans = [(cut[0], min(cut[1], position)) for position in root_positions]
        pieces = tuple(tuple(text[a : b + 1]) for text, (a, b) in zip(LONG, spans, strict=True))
        kept = torch.cat([row[a:b] for row, (a, b) in zip(features, spans, strict=True)])
        heads.extend(Kept((0, 1), pieces, tuple(a for a, _ in spans), (), (), kept, kept.device))
    rows = Forced(LONG, root_positions, (3, 3))
    heads.propose(rows)
    for (row, level), line in rows.logits.items():
        torch.testing.assert_close(line, expected[row][level - 1], rtol=0, atol=ROUNDING.get(family, 1e-10))


def test_a_text_forked_in_the_middle_is_drafted_for_like_one_read_alone():
    target = tiny()
    torch.manual_seed(1)
    heads = Mtp(MtpConfig(depth=3, block=llama_block(64)), 64, 97).to(target.dtype).bind(target.embed_head)
    features = torch.randn(10, 64, dtype=target.dtype)
    text, seating = TEXTS[0], Seating(3, 64)
    for _ in range(3):
        seating.take(16)
    heads.attach(target, seating)
    heads.extend(Kept((0,), (tuple(text[:8]),), (0,), (), (), features[:7], features.device))
    heads.fork(0, 1, 5)
    heads.extend(Kept((1,), (tuple(text[5:8]),), (5,), (), (), features[5:7], features.device))
    heads.extend(Kept((2,), (tuple(text[:8]),), (0,), (), (), features[:7], features.device))
    rows = Forced([text] * 3, (7, 7, 7), (2, 2, 2))
    heads.propose(rows)
    for level in (1, 2):
        torch.testing.assert_close(rows.logits[1, level], rows.logits[2, level], rtol=0, atol=1e-12)


def test_a_decoder_has_its_settings_or_is_refused():
    layer = decoder(llama_block(48), 48)
    assert layer.config.head_dim == 16
    assert slot_bytes(layer) == 2 * 48 * 4
    assert torch.equal(norm_like(layer).weight, torch.ones(48))
    with pytest.raises(ValueError, match="hidden size of 48, the target one of 64"):
        decoder(llama_block(48), 64)
    with pytest.raises(ValueError, match="model_type 'nobody' cannot be made"):
        decoder({"model_type": "nobody"}, 64)


def test_the_block_of_a_model_is_one_layer_like_its_last():
    settings = block_of(tiny("gemma2").model.config)
    assert settings["num_hidden_layers"] == 1
    assert settings["layer_types"] == [tiny("gemma2").model.config.layer_types[-1]]
    assert "vocab_size" not in settings


ROPES = {
    "default": {"rope_type": "default", "rope_theta": 5e5},
    "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32, "rope_theta": 5e5,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1e4},
}  # fmt: skip


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen2", "mistral"])
def test_a_wide_layer_that_ignores_the_embedding_equals_the_layer_of_transformers(family, rope):
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24, "rope_parameters": ROPES[rope]}
    block = {**llama_block(64), **sizes, "model_type": family}
    layer_model = decoder(block, 64).double()
    with torch.no_grad():
        for weight in layer_model.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    wide = widened(copy.deepcopy(layer_model)).double()
    wide_layer, layer = wide.layers[0], layer_model.layers[0]
    assert isinstance(wide_layer, Wide)
    with torch.no_grad():
        for name in ("q_proj", "k_proj", "v_proj"):
            wide_linear, linear = getattr(wide_layer.self_attn, name), getattr(layer.self_attn, name)
            wide_linear.weight.copy_(torch.cat([torch.zeros_like(linear.weight), linear.weight], 1))
            if linear.bias is not None:
                wide_linear.bias.copy_(linear.bias)
    layer_model.norm = torch.nn.Identity()
    states, other = torch.randn(2, 2, 40, 64, dtype=torch.float64)
    positions = torch.arange(40)
    actual = unrolled(wide, torch.cat([other, states], -1), 0, positions, None)
    torch.testing.assert_close(actual, unrolled(layer_model, states, 0, positions, None), rtol=0, atol=1e-12)


def test_a_layer_that_is_not_llama_like_is_refused_by_its_type():
    for family in ("gemma2", "olmo2", "phi3", "cohere"):
        block = block_of(tiny(family).model.config)
        for change in (without_norms, widened):
            with pytest.raises(ValueError, match=f"Llama-like decoder layer .* but its block is of '{family}'"):
                change(decoder(block, 64))


@pytest.mark.parametrize(
    "family", ["llama", "qwen3", "mixtral", "deepseek_v3", "gemma3", "gpt_neox", "glm4", "phi3", "smollm3", "opt"]
)
def test_a_llama_block_can_be_made_for_any_target(family):
    config = tiny(family).model.config
    block = llama_block_of(config)
    wide = widened(decoder(block, 64))
    assert isinstance(wide.layers[0], Wide)
    assert unrolled(wide, torch.randn(1, 5, 128), 0, torch.arange(5), None).shape == (1, 5, 64)
    if family in ("llama", "qwen3"):
        assert [block[name] for name in ("num_key_value_heads", "head_dim")] == [config.num_key_value_heads, config.head_dim]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rope", [{"rope_type": "default"}, {"rope_type": "linear", "factor": 2.0}])
def test_the_angles_of_a_table_have_the_bits_of_those_computed_for_each_forward(dtype, rope, monkeypatch):
    module = decoder({**llama_block(64), "rope_parameters": {"rope_theta": 1e4, **rope}}, 64).rotary_emb
    table, x = llama_layer.RopeTable(module), torch.zeros(1, 1, 64, dtype=dtype)
    for places in ([0], [7, 7, 7], range(500, 530), [3, 2000]):
        positions = torch.tensor([[*places]])
        for kept, computed in zip(table(x, positions), module(x, positions), strict=True):
            assert torch.equal(kept, computed)
    monkeypatch.setattr(llama_layer, "MOST_POSITIONS", 4096)
    assert torch.equal(table(x, torch.tensor([[5000]]))[0], module(x, torch.tensor([[5000]]))[0])
    assert len(table._tables[0]) == 2048


def test_a_decoder_that_is_used_again_keeps_one_table_of_angles():
    model = decoder(llama_block(64), 64)
    for _ in range(3):
        Memory(model, Seating(1, 8), torch.device("cpu"), torch.float32)
    assert sum(isinstance(module, llama_layer.RopeTable) for module in model.modules()) == 1
    positions = torch.arange(5)[None]
    for table, own in zip(
        model.rotary_emb(torch.zeros(1), position_ids=positions), model.rotary_emb.module(torch.zeros(1), positions), strict=True
    ):
        assert torch.equal(table, own)
