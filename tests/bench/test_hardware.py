"""Forecasts against arithmetic by hand and against published speeds; shapes against the models themselves; refusals by name."""

import json

import pytest
from heads import heads_for
from tiny import tiny
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig

from headstart.bench.hardware import LM_HEAD_OPERATIONS, OPERATIONS, PRESETS, Hardware, forecast, read_hardware
from headstart.bench.model_shape import DraftShape, ModelShape

SHAPE = ModelShape("bfloat16", 2, parameters=1000, cache_values=16, attention_values=8)
MACHINE = Hardware(name="m", bytes_per_second=1e6, flops_per_second={"bfloat16": 1e7}, source="by hand")
LLAMA2_7B = LlamaConfig(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)


# -- shapes --


def test_the_shape_of_a_configuration_counts_what_the_model_has():
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2
    )
    model, shape = AutoModelForCausalLM.from_config(config), ModelShape.of_config(config, "float32")
    assert shape.parameters == sum(weight.numel() for weight in model.parameters()) - 50 * 16  # all but the input embedding
    assert (shape.cache_values, shape.attention_values, shape.layers) == (3 * 2 * 2 * 4, 3 * 16, 3)


def test_a_tied_embedding_is_read_as_the_lm_head():
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, tie_word_embeddings=True
    )
    model = AutoModelForCausalLM.from_config(config)
    assert ModelShape.of_config(config, "bfloat16").parameters == sum(weight.numel() for weight in model.parameters())


def test_the_shape_of_a_loaded_target_is_that_of_its_configuration():
    target = tiny()
    dtype = str(target.dtype).removeprefix("torch.")
    assert ModelShape.of_target(target) == ModelShape.of_config(target.model.config, dtype)


def test_one_token_reads_its_own_experts_and_many_tokens_read_all():
    config = MixtralConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        num_local_experts=8, num_experts_per_tok=2,
    )  # fmt: skip
    shape = ModelShape.of_config(config, "bfloat16")
    assert shape.expert_parameters == 8 * 3 * 16 * 24
    assert shape.weights_read(1) == pytest.approx(shape.parameters + shape.expert_parameters / 4) == shape.weights_used
    assert shape.weights_read(1000) == pytest.approx(shape.parameters + shape.expert_parameters)


def test_a_level_of_drafting_reads_one_module_and_one_lm_head():
    target = tiny()
    own, shared = heads_for(target, "medusa"), heads_for(target, "medusa, shared")
    head = target.vocab * target.hidden
    assert DraftShape.of_heads(own, "bfloat16").parameters == 2 * (target.hidden**2 + target.hidden) + head
    assert DraftShape.of_heads(shared, "bfloat16").parameters == target.hidden**2 + target.hidden + head
    one, three = (DraftShape.of_heads(heads_for(target, kind), "bfloat16").parameters for kind in ("mtp", "mtp, 3 modules"))
    assert one == three


# -- seconds --


def test_a_small_forward_takes_the_time_of_its_bytes_and_a_large_one_that_of_its_operations():
    assert MACHINE.forward_seconds(SHAPE, 1) == pytest.approx(2000 / 1e6)
    assert MACHINE.forward_seconds(SHAPE, 100) == pytest.approx(100 * 2 * 1000 / 1e7)


def test_each_row_reads_its_own_context_once():
    assert MACHINE.forward_seconds(SHAPE, 1, context=50) == pytest.approx((2000 + 50 * 16 * 2) / 1e6)
    assert MACHINE.forward_seconds(SHAPE, 4, rows=4, context=200) == pytest.approx((2000 + 200 * 16 * 2) / 1e6)
    many = MACHINE.forward_seconds(SHAPE, 100, rows=4, context=200)  # 25 nodes of each row attend to its 50 tokens
    assert many == pytest.approx(100 * (2 * 1000 + 4 * 8 * 50) / 1e7)


def test_overheads_are_per_forward_and_per_operation():
    slow = MACHINE.model_copy(update={"launch_seconds": 0.5, "kernel_seconds": 0.25})
    operations = SHAPE.layers * OPERATIONS + LM_HEAD_OPERATIONS
    assert slow.forward_seconds(SHAPE, 1) == pytest.approx(2000 / 1e6 + 0.5 + operations * 0.25)
    assert slow.level_seconds(DraftShape("bfloat16", 100), 1) == pytest.approx(
        200 / 1e6 + 0.5 + (OPERATIONS + LM_HEAD_OPERATIONS) * 0.25
    )


def test_a_forecast_is_a_cost_of_rounds():
    cost = forecast(MACHINE, SHAPE, DraftShape("bfloat16", 100), (1, 4, 100))
    assert cost.seconds == tuple(MACHINE.forward_seconds(SHAPE, nodes) for nodes in (1, 4, 100))
    assert cost.forward(52) == pytest.approx((cost.seconds[1] + cost.seconds[2]) / 2)
    assert cost.forward(1, context=50) == pytest.approx(MACHINE.forward_seconds(SHAPE, 1, context=50))
    assert cost.drafting(3, 4) == pytest.approx(3 * 200 / 1e6)
    assert forecast(MACHINE, SHAPE, None).draft is None


def test_the_forecast_of_a_groq_lpu_is_the_published_speed_of_llama_2_7b():
    shape = ModelShape.of_config(LLAMA2_7B, "float16")
    assert 1 / PRESETS["lpu"].forward_seconds(shape, 1) == pytest.approx(750, rel=0.02)


@pytest.mark.parametrize("name", ["a100", "l40", "h100", "h200", "desktop"])
def test_a_forecast_of_llama_2_7b_is_a_little_more_than_its_bytes_over_the_bandwidth(name):
    machine, shape = PRESETS[name], ModelShape.of_config(LLAMA2_7B, "bfloat16")
    assert shape.parameters == 6_738_415_616 - 32000 * 4096
    assert 1 < machine.forward_seconds(shape, 1) / (2 * shape.parameters / machine.bytes_per_second) < 1.1
    assert machine.forward_seconds(shape, 64) / machine.forward_seconds(shape, 1) < (1.05 if name != "desktop" else 2)


def test_more_nodes_context_and_weights_never_take_less_time():
    shape = ModelShape.of_config(LLAMA2_7B, "bfloat16")
    for machine in PRESETS.values():
        seconds = [machine.forward_seconds(shape, nodes, context=context) for context in (0, 4096) for nodes in (1, 16, 512)]
        assert seconds == sorted(seconds[:3]) + sorted(seconds[3:])
        assert seconds[0] <= seconds[3]


# -- presets, files and refusals --


def test_a_file_describes_a_machine_and_a_preset_is_named(tmp_path):
    path = tmp_path / "machine.json"
    path.write_text(json.dumps(MACHINE.model_dump()))
    assert read_hardware(str(path)) == MACHINE
    assert read_hardware("h200") is PRESETS["h200"]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"bytes_per_second": "fast"}, "bytes_per_second"),
        ({"bytes_per_second": 0}, "bytes_per_second"),
        ({"flops_per_second": {"bfloat16": -1}}, "flops_per_second.bfloat16"),
        ({"launch_seconds": -1}, "launch_seconds"),
        ({"watts": 700}, "unknown key watts"),
        ({"source": None}, "source"),
    ],
)
def test_a_file_that_is_no_machine_is_refused_by_its_key(tmp_path, change, word):
    path = tmp_path / "machine.json"
    path.write_text(json.dumps(MACHINE.model_dump() | change))
    with pytest.raises(ValueError, match=word):
        read_hardware(str(path))


def test_an_unknown_preset_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="a100, l40, h100, h200, desktop, lpu"):
        read_hardware("abacus")


def test_a_dtype_without_a_figure_and_a_model_too_large_are_refused():
    with pytest.raises(ValueError, match="m has figures for bfloat16"):
        MACHINE.forward_seconds(ModelShape("float32", 2, 1000, 16, 8), 1)
    with pytest.raises(ValueError, match=r"take 0.0 GB, and m has 0.0 GB"):
        MACHINE.model_copy(update={"memory_bytes": 1000.0}).forward_seconds(SHAPE, 1)
    with pytest.raises(ValueError, match="dtype is int4"):
        ModelShape.of_config(LLAMA2_7B, "int4")
