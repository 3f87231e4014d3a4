"""The hook for transformers: `model.generate(..., custom_generate=headstart.custom_generate)`."""

import copy
import gc
import os
import pickle
import shutil
import threading
import weakref

import pytest
import torch
import transformers as hf
from tiny import ARCHITECTURES, VOCAB, random_model

import headstart
from headstart.drafters.lookup import Lookup
from headstart.engine import generate_hook, generate_settings
from headstart.speculation.planner import Chain
from headstart.target.loading import embedded
from headstart.target.target import Target

PROMPT = torch.tensor([[5, 9, 3, 5, 9, 3, 5]])


@pytest.fixture(scope="module")
def model():
    return random_model(ARCHITECTURES["llama"]())


def ours(model, ids, **settings):
    """The tokens of `generate` with the hook."""
    return model.generate(ids, custom_generate=headstart.custom_generate, **settings)


@pytest.mark.parametrize("drafter", [None, "lookup", Lookup()], ids=["none", "lookup", "object"])
def test_greedy_tokens_equal_those_of_generate(model, drafter):
    expected = model.generate(PROMPT, max_new_tokens=30)
    assert torch.equal(ours(model, PROMPT, max_new_tokens=30, drafter=drafter), expected)
    assert torch.equal(ours(model, PROMPT, max_length=20, drafter=drafter), expected[:, :20])


def test_a_planner_may_be_given(model):
    expected = model.generate(PROMPT, max_new_tokens=20)
    assert torch.equal(ours(model, PROMPT, max_new_tokens=20, planner=Chain(3)), expected)


def test_the_model_keeps_its_own_attention(model):
    ours(model, PROMPT, max_new_tokens=3)
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(ValueError, match="context of 128 tokens"):
        ours(model, PROMPT, max_new_tokens=400)
    assert model.config._attn_implementation == "sdpa"


def test_a_model_that_an_engine_holds_can_generate_too():
    model = random_model(ARCHITECTURES["llama"]())
    expected = model.generate(PROMPT, max_new_tokens=10)
    target = Target(model)
    assert torch.equal(ours(model, PROMPT, max_new_tokens=10), expected)
    target.check()


@pytest.mark.parametrize("stop", [None, "early"])
def test_a_batch_with_left_padding_gives_each_prompt_the_tokens_that_it_gets_alone(model, stop):
    prompts = [[7, 8, 9], [1, 2, 3, 4, 5, 6], [50]]
    ids = torch.tensor([[0] * (6 - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (6 - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    settings = {"max_new_tokens": 15, "pad_token_id": 0}
    if stop:
        first = model.generate(torch.tensor([prompts[0]]), max_new_tokens=15)[0, 3:].tolist()
        settings["eos_token_id"] = [first[4], first[9]]
    expected = model.generate(ids, attention_mask=mask, **settings)
    assert torch.equal(ours(model, ids, attention_mask=mask, **settings), expected)
    for row, prompt in enumerate(prompts):
        alone = ours(model, torch.tensor([prompt]), **settings)[0, len(prompt) :]
        assert torch.equal(expected[row, 6 : 6 + len(alone)], alone)


def test_a_repetition_penalty_is_honoured(model):
    settings = {"max_new_tokens": 25, "repetition_penalty": 1.5}
    expected = model.generate(PROMPT, **settings)
    assert not torch.equal(expected, model.generate(PROMPT, max_new_tokens=25))
    assert torch.equal(ours(model, PROMPT, **settings), expected)


def test_torchs_seed_repeats_a_sampled_answer(model):
    settings = {"max_new_tokens": 20, "do_sample": True, "temperature": 0.9, "top_k": 20}
    answers = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        answers.append(ours(model, PROMPT, **settings))
    assert torch.equal(answers[0], answers[1])
    assert not torch.equal(answers[0], answers[2])
    torch.manual_seed(1)
    assert torch.equal(ours(model, PROMPT, drafter=None, **settings), answers[0])  # whatever the drafter


def test_samples_of_one_prompt_differ(model):
    torch.manual_seed(0)
    answers = ours(model, PROMPT, max_new_tokens=20, do_sample=True, num_return_sequences=3)
    assert answers.shape == (3, 27)
    assert len({tuple(row) for row in answers.tolist()}) == 3


def test_sampling_follows_the_distribution_of_generate(model):
    """One token, many times: the frequencies are those of the truncated distribution, within five standard errors."""
    settings = {"max_new_tokens": 1, "do_sample": True, "temperature": 0.8, "top_k": 6}
    torch.manual_seed(3)
    count = 400
    tokens = ours(model, PROMPT.repeat(count, 1), **settings)[:, -1]
    with torch.inference_mode():
        best = (model(PROMPT).logits[0, -1] / 0.8).topk(6)
    distribution = torch.zeros(VOCAB, dtype=torch.float64).scatter_(0, best.indices, best.values.softmax(-1))
    frequencies = torch.bincount(tokens, minlength=VOCAB) / count
    assert ((frequencies - distribution).abs() <= 5 * (distribution * (1 - distribution) / count).sqrt() + 1e-12).all()


REFUSED = [
    ({"num_beams": 3}, "num_beams=3"),
    ({"no_repeat_ngram_size": 2}, "no_repeat_ngram_size=2"),
    ({"bad_words_ids": [[3]]}, "bad_words_ids"),
    ({"min_new_tokens": 4}, "min_new_tokens=4"),
    ({"typical_p": 0.9, "do_sample": True}, "typical_p=0.9"),
    ({"return_dict_in_generate": True}, "return_dict_in_generate=True"),
    ({"max_time": 3.0}, "max_time"),
    ({"logits_processor": hf.LogitsProcessorList([hf.NoBadWordsLogitsProcessor([[3]])])}, "NoBadWordsLogitsProcessor"),
    ({"stopping_criteria": hf.StoppingCriteriaList([hf.MaxTimeCriteria(3.0)])}, "MaxTimeCriteria"),
    ({"prefix_allowed_tokens_fn": lambda batch, ids: [1, 2]}, "PrefixConstrainedLogitsProcessor"),
    ({"drafter": "crystal-ball"}, "crystal-ball"),
]


@pytest.mark.parametrize(("settings", "word"), REFUSED, ids=[word for _, word in REFUSED])
@pytest.mark.filterwarnings("ignore")
def test_what_would_change_the_text_is_refused_not_ignored(model, settings, word):
    with pytest.raises(ValueError, match=word):
        ours(model, PROMPT, max_new_tokens=5, **settings)
    assert model.config._attn_implementation == "sdpa"


# -- every setting and argument ---------------------------------------------------------------------------------------------


def test_every_field_of_a_generation_config_is_honoured_or_changes_nothing_or_is_refused():
    """A version of transformers with a new field fails here: add the field to one of the lists."""
    lists = [generate_settings.HONOURED, set(generate_settings.UNCHANGING), set(generate_settings.REFUSED)]
    known = set.union(*map(set, lists))
    assert {name for name in vars(hf.GenerationConfig()) if not name.startswith("_")} <= known
    assert sum(map(len, lists)) == len(known)


def test_a_blank_config_and_one_with_the_defaults_of_generate_pass():
    generate_settings.check_settings(hf.GenerationConfig())
    generate_settings.check_settings(hf.GenerationConfig(**hf.GenerationConfig._get_default_generation_params()))
    generate_settings.check_settings(hf.GenerationConfig(chat_format="chatml"))  # not a field: `generate` does not read it either


@pytest.mark.parametrize("name", sorted(generate_settings.REFUSED))
def test_every_setting_in_the_list_of_refused_ones_is_refused_by_name(name):
    config = hf.GenerationConfig()
    setattr(config, name, 7)
    with pytest.raises(ValueError, match=f"^generation setting {name}=7 is not supported by headstart.custom_generate; "):
        generate_settings.check_settings(config)


def test_an_unknown_field_is_refused_unless_it_has_its_default(model):
    class Later(hf.GenerationConfig):
        def __init__(self, **settings):
            self.foresight = settings.pop("foresight", None)
            super().__init__(**settings)

    generate_settings.check_settings(Later())
    with pytest.raises(ValueError, match="generation setting foresight=3 is not supported"):
        generate_settings.check_settings(Later(foresight=3))


CHANGING_NOTHING = [
    {"use_cache": False},
    {"cache_implementation": "dynamic"},
    {"cache_implementation": "static"},
    {"renormalize_logits": True},
    {"disable_compile": True},
    {"compile_config": hf.CompileConfig()},
    {"length_penalty": 0.5},
    {"early_stopping": True},
    {"prefill_chunk_size": 2},
    {"low_memory": True},
    {"num_assistant_tokens": 3},
    {"max_matching_ngram_size": 3},
    {"synced_gpus": False},
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("settings", CHANGING_NOTHING, ids=[next(iter(settings)) for settings in CHANGING_NOTHING])
def test_what_is_listed_as_changing_nothing_changes_nothing(model, settings):
    expected = model.generate(PROMPT, max_new_tokens=12)
    assert torch.equal(model.generate(PROMPT, max_new_tokens=12, **settings), expected)
    assert torch.equal(ours(model, PROMPT, max_new_tokens=12, **settings), expected)


HONOURED = [
    {"suppress_tokens": [3, 5, 9]},
    {"suppress_tokens": [3, 5, 9], "repetition_penalty": 1.4},
    {"stopping_criteria": hf.StoppingCriteriaList([hf.MaxLengthCriteria(11)])},
    {"stopping_criteria": "eos"},
    {"eos_token_id": "eos"},
    {"renormalize_logits": True, "repetition_penalty": 1.4},
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("settings", HONOURED, ids=["-".join(settings) for settings in HONOURED])
def test_honoured_settings_give_the_tokens_of_generate(model, settings):
    plain = model.generate(PROMPT, max_new_tokens=25)
    if "eos" in settings.values():
        stop = int(plain[0, 15])
        eos = {"stopping_criteria": hf.StoppingCriteriaList([hf.EosTokenCriteria(stop)]), "eos_token_id": stop}
        settings = {name: eos[name] for name in settings} | {"pad_token_id": 0}
    expected = model.generate(PROMPT, max_new_tokens=25, **settings)
    assert not torch.equal(expected, plain)
    assert torch.equal(ours(model, PROMPT, max_new_tokens=25, **settings), expected)


ARGUMENTS = [
    ({"assistant_model": "model"}, "argument assistant_model is not supported.*; pass drafter='model:PATH'"),
    ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens=3 is not supported.*; drafter='lookup' does the same"),
    ({"dola_layers": "low"}, "dola_layers=low"),
    ({"synced_gpus": True}, "argument synced_gpus"),
    ({"negative_prompt_ids": PROMPT}, "argument negative_prompt_ids"),
    ({"negative_prompt_ids": PROMPT, "guidance_scale": 2.0}, "argument negative_prompt_ids"),
    ({"guidance_scale": 2.0}, "guidance_scale=2.0"),
    ({"past_key_values": "cache"}, "argument past_key_values"),
    ({"output_attentions": True}, "argument output_attentions"),
    ({"output_hidden_states": True}, "argument output_hidden_states"),
    ({"output_scores": True}, "output_scores=True"),
    ({"output_logits": True}, "output_logits=True"),
    ({"cache_implementation": "offloaded"}, "cache_implementation=offloaded"),
    ({"remove_invalid_values": True}, "remove_invalid_values=True"),
    ({"watermarking_config": hf.WatermarkingConfig()}, "watermarking_config"),
    ({"is_assistant": True}, "is_assistant=True"),
    ({"top_h": 0.5, "do_sample": True}, "top_h=0.5"),
    ({"encoder_no_repeat_ngram_size": 2}, "encoder_no_repeat_ngram_size=2"),
    ({"position_ids": torch.arange(3, 10)[None]}, "position_ids other than those of the text"),
    ({"attention_mask": torch.tensor([[1, 1, 1, 1, 1, 1, 0]])}, "padding on the right is not supported"),
    ({"logits_processor": hf.LogitsProcessorList([hf.TemperatureLogitsWarper(0.5)])}, "TemperatureLogitsWarper"),
    ({"logits_processor": hf.LogitsProcessorList([hf.RepetitionPenaltyLogitsProcessor(2.0)])}, "give repetition_penalty"),
    ({"stopping_criteria": hf.StoppingCriteriaList([lambda ids, scores: True])}, "stopping criterion function"),
    ({"planner": "chian:5"}, "planner 'chian:5' is unknown"),
    ({"planner": 5}, "planner is 5; it must be a planner, a string such as 'chain:5', or None"),
    ({"planner": "chain:5", "drafter": None}, "drafter None drafts nothing"),
    ({"no_such_argument": 3}, "no_such_argument"),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "sentence"), ARGUMENTS, ids=["-".join(settings) for settings, _ in ARGUMENTS])
@pytest.mark.filterwarnings("ignore")
def test_an_argument_of_generate_that_would_be_ignored_is_refused(model, settings, sentence):
    values = {"model": model, "cache": hf.DynamicCache(config=model.config)}
    arguments = {name: values.get(value, value) if isinstance(value, str) else value for name, value in settings.items()}
    with pytest.raises(ValueError, match=sentence):
        ours(model, PROMPT, max_new_tokens=5, **arguments)
    assert model.config._attn_implementation == "sdpa"


def test_embeddings_instead_of_tokens_are_refused(model):
    with pytest.raises(ValueError, match="argument inputs_embeds"):
        model.generate(
            inputs_embeds=torch.zeros(1, 3, 64, dtype=model.dtype), custom_generate=headstart.custom_generate, max_new_tokens=3
        )


def test_stop_strings_and_healing_are_refused_before_headstart_is_asked(model):
    """transformers does not hand the tokenizer to a callable, and itself refuses what needs one."""
    for settings in ({"stop_strings": "."}, {"token_healing": True}):
        with pytest.raises(ValueError, match="tokenizer"):
            ours(model, PROMPT, max_new_tokens=5, **settings)


def test_a_cache_is_refused_in_a_direct_call_only_if_it_holds_something(model):
    cache, config = hf.DynamicCache(config=model.config), hf.GenerationConfig(max_new_tokens=12)
    actual = headstart.custom_generate(model, PROMPT, generation_config=config, past_key_values=cache)
    assert torch.equal(actual, model.generate(PROMPT, max_new_tokens=12))
    model(PROMPT, past_key_values=cache)
    with pytest.raises(ValueError, match="argument past_key_values"):
        headstart.custom_generate(model, PROMPT, generation_config=config, past_key_values=cache)


def test_a_direct_call_refuses_num_return_sequences(model):
    config = hf.GenerationConfig(max_new_tokens=3, num_return_sequences=2, do_sample=True)
    with pytest.raises(ValueError, match=r"num_return_sequences in a direct call is not supported.*; repeat the rows"):
        headstart.custom_generate(model, PROMPT, generation_config=config)


# -- streamers --------------------------------------------------------------------------------------------------------------


class Recorder:
    def __init__(self):
        self.calls = []

    def put(self, value):
        self.calls.append((value.device.type, value.dtype, value.tolist()))

    def end(self):
        self.calls.append("end")


@pytest.mark.parametrize("settings", [{}, {"eos_token_id": 1}, {"do_sample": True, "top_k": 1}], ids=["greedy", "eos", "sampled"])
def test_a_streamer_gets_what_generate_gives_it(model, settings):
    expected_calls, actual_calls = Recorder(), Recorder()
    settings = {"max_new_tokens": 15} | settings
    if "eos_token_id" in settings:
        settings |= {"eos_token_id": int(model.generate(PROMPT, max_new_tokens=15)[0, 13]), "pad_token_id": 0}
    expected = model.generate(PROMPT, streamer=expected_calls, **settings)
    assert torch.equal(ours(model, PROMPT, streamer=actual_calls, **settings), expected)
    assert actual_calls.calls == expected_calls.calls
    wrapped = Recorder()
    model.generate(PROMPT, streamer=wrapped, **settings, custom_generate=lambda *a, **b: headstart.custom_generate(*a, **b))
    assert wrapped.calls == expected_calls.calls
    direct = Recorder()
    headstart.custom_generate(model, PROMPT, generation_config=hf.GenerationConfig(**settings), streamer=direct)
    assert direct.calls == expected_calls.calls


def test_a_text_iterator_streamer_in_a_thread_yields_the_text(model_folder):
    model = hf.AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float64)
    tokenizer = hf.AutoTokenizer.from_pretrained(model_folder)
    inputs = {"inputs": tokenizer("The cat", return_tensors="pt").input_ids, "max_new_tokens": 20, "pad_token_id": 0}
    texts = []
    for option in ({}, {"custom_generate": headstart.custom_generate}):
        streamer = hf.TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
        thread = threading.Thread(target=model.generate, kwargs={**inputs, **option, "streamer": streamer})
        thread.start()
        texts.append("".join(streamer))
        thread.join()
    assert texts[0] == texts[1] != ""


def test_a_refused_call_ends_its_streamer(model):
    recorder = Recorder()
    with pytest.raises(ValueError, match="output_scores"):
        ours(model, PROMPT, streamer=recorder, max_new_tokens=5, output_scores=True)
    assert recorder.calls[-1] == "end"


def test_a_streamer_of_several_rows_is_refused(model):
    with pytest.raises(ValueError, match="a streamer takes a batch of one, but there are 2 rows"):
        ours(model, PROMPT.repeat(2, 1), streamer=Recorder(), max_new_tokens=5)


# -- drafters that are kept between calls -----------------------------------------------------------------------------------


@pytest.fixture
def loads(monkeypatch):
    """Lists that record every drafter loaded from now on, and every self-check of a model."""
    made, checks = [], []
    original, check = generate_hook.make, Target.check

    def counted(spec, target):
        made.append(spec)
        return original(spec, target)

    monkeypatch.setattr(generate_hook, "make", counted)
    monkeypatch.setattr(Target, "check", lambda target: (checks.append(target.model), check(target))[1])
    return made, checks


def test_a_drafter_given_by_path_is_loaded_once_and_freed_with_its_model(model_folder, draft_folder, tmp_path, loads):
    made, checks = loads
    path = tmp_path / "draft"
    shutil.copytree(draft_folder, path)
    model = hf.AutoModelForCausalLM.from_pretrained(model_folder)
    expected = model.generate(PROMPT, max_new_tokens=12)
    for _ in range(3):
        assert torch.equal(ours(model, PROMPT, max_new_tokens=12, drafter=f"model:{path}"), expected)
    assert made == [f"model:{path}"]
    clone = copy.deepcopy(model)
    assert torch.equal(ours(clone, PROMPT, max_new_tokens=12, drafter=f"model:{path}"), expected)
    assert len(made) == 2  # a copy loads its own
    os.utime(path / "model.safetensors", (1, 1))
    ours(model, PROMPT, max_new_tokens=12, drafter=f"model:{path}")
    assert len(made) == 3  # weights that changed are loaded again
    assert checks.count(model) == checks.count(clone) == 1
    kept = [weakref.ref(drafter) for drafter in model._headstart.idle.values()] + [weakref.ref(model)]
    checks.clear()
    del model
    gc.collect()
    assert [reference() for reference in kept] == [None] * len(kept)


def test_kept_drafters_are_neither_saved_nor_pickled(model_folder, tmp_path):
    model = hf.AutoModelForCausalLM.from_pretrained(model_folder)
    names = set(model.state_dict())
    ours(model, PROMPT, max_new_tokens=3, drafter=f"model:{model_folder}")
    assert set(model.state_dict()) == names
    assert pickle.loads(pickle.dumps(model))._headstart.idle == {}


@pytest.mark.parametrize("planner", ["chain:3", "best:nodes=4,depth=2", "full:2,1"])
def test_a_planner_may_be_named_by_a_string(model, planner):
    expected = model.generate(PROMPT, max_new_tokens=20)
    assert torch.equal(ours(model, PROMPT, max_new_tokens=20, planner=planner), expected)


def test_an_idle_drafter_has_no_kv_cache(model_folder, draft_folder):
    model = hf.AutoModelForCausalLM.from_pretrained(model_folder)
    ours(model, PROMPT, max_new_tokens=12, drafter=f"model:{draft_folder}")
    [drafter] = model._headstart.idle.values()
    assert drafter.cache.seating.num_slots == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["medusa", "eagle3"])
def test_heads_may_be_used_again(name, loads):
    folder = embedded("target").with_name(name)
    model = hf.AutoModelForCausalLM.from_pretrained(embedded("target"), dtype=torch.float32)
    ids = torch.tensor([[50, 60, 70, 80, 50, 60]])
    expected = model.generate(ids, max_new_tokens=20)
    for planner in (None, "chain:2", "tree:8"):
        assert torch.equal(ours(model, ids, max_new_tokens=20, drafter=str(folder), planner=planner), expected)
    assert loads[0] == [str(folder)]
