"""benchmarks/peers: names, permutation and numbers of a GGUF file, what llama-bench says, and the ratios; without llama.cpp."""

import json
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from folders import write_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from headstart.bench.loops import first_loop
from headstart.target.target import Target

sys.path.append(str(Path(__file__).parents[2] / "benchmarks" / "peers"))

import answers
import gguf_files
import headline
import llama_bench
import llama_cpp
import llama_cpp_build
import passes
import targets
import worker
from llama_bench import Bench, Pass

# -- gguf_files.py --


def test_every_tensor_of_a_llama_has_a_name_of_its_own():
    config = LlamaConfig(num_hidden_layers=2, hidden_size=32, intermediate_size=64, num_attention_heads=2, vocab_size=50)
    names = [gguf_files.gguf_name(name) for name in LlamaForCausalLM(config).state_dict()]
    assert len({*names}) == len(names) == 2 * 9 + 3
    assert {"token_embd.weight", "output.weight", "blk.1.ffn_down.weight", "blk.0.attn_norm.weight"} <= {*names}
    with pytest.raises(ValueError, match="no tensor of a Llama without biases"):
        gguf_files.gguf_name("model.layers.0.self_attn.q_proj.bias")


def test_interleaved_channels_turned_by_neighbours_give_the_attention_scores_of_transformers():
    heads, head_dim, hidden, length = 3, 8, 16, 5
    query, key = torch.randn(2, heads * head_dim, hidden, dtype=torch.float64)
    inputs = torch.randn(length, hidden, dtype=torch.float64)
    angles = torch.arange(length)[:, None] * 10000.0 ** -(torch.arange(0, head_dim, 2) / head_dim).double()

    def split(weight: torch.Tensor) -> torch.Tensor:  # [heads, length, head_dim]
        return (inputs @ weight.T).unflatten(1, (heads, head_dim)).transpose(0, 1)

    def turned(weight: torch.Tensor) -> torch.Tensor:  # neighbours, as complex numbers
        pairs = torch.view_as_complex(split(gguf_files.interleaved(weight, heads)).unflatten(2, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(2)

    cos, sin = (torch.cat([wave(angles)] * 2, -1)[None] for wave in (torch.cos, torch.sin))
    expected = apply_rotary_pos_emb(split(query)[None], split(key)[None], cos, sin)
    scores = expected[0][0] @ expected[1][0].mT
    torch.testing.assert_close(turned(query) @ turned(key).mT, scores)


def test_tensors_are_those_of_the_folder_with_permuted_queries_and_keys(tmp_path):
    folder = write_model(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    written = dict(gguf_files.tensors(folder, config))
    layer = AutoModelForCausalLM.from_pretrained(folder).model.layers[1]
    assert torch.equal(written["blk.1.ffn_up.weight"], layer.mlp.up_proj.weight)
    assert torch.equal(written["blk.1.attn_k.weight"], gguf_files.interleaved(layer.self_attn.k_proj.weight, 1))
    assert "output.weight" not in written  # tied
    assert gguf_files.metadata(config)["add_head_count_kv"] == 1
    assert gguf_files.metadata(config)["add_rope_dimension_count"] == 16


@pytest.mark.parametrize(
    ("name", "value"), [("model_type", "qwen2"), ("attention_bias", True), ("rope_parameters", {"rope_type": "llama3"})]
)
def test_a_model_that_is_no_plain_llama_is_refused(name, value, tmp_path):
    config = json.loads((write_model(tmp_path) / "config.json").read_text())
    gguf_files.check_config(config)
    with pytest.raises(ValueError, match=f"{name} is .*only plain Llama"):
        gguf_files.check_config(config | {name: value})


# -- llama_bench.py --


def said(nodes: int, ns: list[int], flash: bool, embeddings: bool = False) -> dict:
    counts = {"n_prompt": 0, "n_gen": 4} if nodes == 1 else {"n_prompt": nodes, "n_gen": 0}
    return counts | {
        "n_batch": 2048, "n_ubatch": 512, "flash_attn": int(flash), "embeddings": embeddings, "repack": True, "samples_ns": ns
    }  # fmt: skip


def test_a_pass_of_several_tokens_is_a_sample_and_single_tokens_share_one():
    output = json.dumps([said(8, [8_000_000, 6_000_000, 7_000_000], True), said(1, [8_000_000, 4_000_000], False)])
    times = llama_bench.read(output)
    assert times == {Pass(8, True, False): [8.0, 6.0, 7.0], Pass(1, False, True): [2.0, 1.0]}


@pytest.mark.parametrize("odd", [{"n_gen": 4}, {"n_prompt": 513}])
def test_a_test_that_is_not_one_kind_of_pass_is_refused(odd):
    with pytest.raises(ValueError, match="not one kind of pass"):
        llama_bench.read(json.dumps([said(8, [1], True) | odd]))


def test_the_better_setting_of_flash_attention_is_chosen_by_its_median():
    times = {Pass(8, False, False): [5.0, 9.0, 9.0], Pass(8, True, False): [6.0, 7.0, 8.0], Pass(8, True, True): [1.0]}
    assert llama_bench.best(times, 8, all_logits=False) == (Pass(8, True, False), 7.0, 6.0)
    with pytest.raises(ValueError, match="passes of 16 tokens were not timed"):
        llama_bench.best(times, 16, all_logits=False)


def program(tmp_path: Path, body: str) -> Path:
    path = tmp_path / "llama-bench"
    path.write_text(f"#!{sys.executable}\nimport json, os, signal, sys\n{body}")
    path.chmod(0o755)
    return path


def test_pages_and_threads_reach_llama_bench(tmp_path):
    seen = tmp_path / "seen.jsonl"
    echo = (
        f"print(json.dumps([])); open({str(seen)!r}, 'a').write(json.dumps([sys.argv, os.environ.get('GLIBC_TUNABLES')]) + '\\n')"
    )
    for pages in ("huge", "default"):
        Bench(program(tmp_path, echo), 3, pages, 64).run(Path("a.gguf"), [1, 8])
    lines = [json.loads(line) for line in seen.read_text().splitlines()]
    for (words, tunables), is_huge in zip(lines, (True, True, False, False), strict=True):
        assert (tunables == "glibc.malloc.hugetlb=1", "-lm" in words) == (is_huge, is_huge)
        assert (words[words.index("-t") + 1], words[words.index("-d") + 1], words[words.index("-p") + 1]) == ("3", "64", "8")


def test_an_instruction_that_the_processor_lacks_means_weights_as_they_are(tmp_path):
    result = json.dumps([said(8, [3_000_000], False)])
    body = f"print({result!r}) if '0' == sys.argv[sys.argv.index('--repack') + 1] else os.kill(os.getpid(), signal.SIGILL)"
    assert Bench(program(tmp_path, body), 1).run(Path("a.gguf"), [8]) == {Pass(8, False, False): [3.0]}
    with pytest.raises(ValueError, match="exit status 3: no such file"):
        Bench(program(tmp_path, "print('no such file', file=sys.stderr); sys.exit(3)"), 1).run(Path("a.gguf"), [8])


def test_samples_of_several_rounds_are_joined():
    assert llama_bench.merged([{"1": [1.0]}, {"1": [2.0], "8": [3.0]}]) == {"1": [1.0, 2.0], "8": [3.0]}


# -- llama_cpp_build.py --


def test_a_ready_build_is_used_as_it_is(tmp_path):
    sources = llama_cpp_build.sources_in(tmp_path)
    bin_folder = sources / llama_bench.BIN
    bin_folder.mkdir(parents=True)
    for name in llama_cpp_build.PROGRAMS:
        (bin_folder / name).touch(0o755)
    assert llama_cpp_build.ensure_built(tmp_path, minutes=0) == sources
    assert not (tmp_path / "build.log").exists()


def test_a_build_is_native_static_and_bounded(tmp_path):
    command = llama_cpp_build.configure_command(tmp_path, tmp_path / "build")
    assert {"-DGGML_NATIVE=ON", "-DBUILD_SHARED_LIBS=OFF", "-DCMAKE_BUILD_TYPE=Release"} <= {*command}
    deadline = llama_cpp_build.Deadline(0.05)
    with pytest.raises(ValueError, match="not built within"):
        deadline.run([sys.executable, "-c", "import time; time.sleep(9)"], tmp_path / "log")
    with pytest.raises(ValueError, match="exit status 4"):
        llama_cpp_build.Deadline(60).run([sys.executable, "-c", "import sys; sys.exit(4)"], tmp_path / "log")


# -- llama_cpp.py --


def line(engine: str, **figures: float) -> llama_cpp.Line:
    return llama_cpp.Line("m", "bf16", engine, {name[1:]: llama_cpp.Figure(ms, ms) for name, ms in figures.items()})


def test_ratios_are_to_llama_cpp_and_decoding_to_its_single_token():
    ours, peer = line("ours", _1=12.0, _8=6.0, _decode=15.0), line("llama.cpp", _1=10.0, _8=8.0)
    assert [llama_cpp.ratio(ours, [ours, peer], name) for name in ("1", "8", "decode", "16")] == [1.2, 0.75, 1.5, None]
    assert (llama_cpp.growth(ours, "8"), llama_cpp.growth(ours, "16")) == (0.5, None)
    assert llama_cpp.ratio(ours, [ours], "1") is None


def test_the_better_cache_of_transformers_counts():
    figures = llama_cpp.figures_of({"8 dynamic": [3.0, 4.0, 9.0], "8 static": [5.0, 5.0, 1.0], "decode": [2.0]})
    assert figures == {"8": llama_cpp.Figure(4.0, 3.0, "dynamic"), "decode": llama_cpp.Figure(2.0, 2.0)}


def test_figures_of_an_engine_come_from_all_rounds():
    rounds = [{"ms": {"1": [3.0, 5.0]}, "others": 0.1}, {"ms": {"1": [4.0]}, "others": None}]
    own = llama_cpp.own_line("m", "bf16", "ours", rounds)
    assert (own.figures["1"], own.others) == (llama_cpp.Figure(4.0, 3.0), 0.1)


# -- passes.py, answers.py and targets.py on a tiny model --


def test_our_forest_is_a_root_and_a_tree_behind_the_context(model_folder):
    target = Target.load(model_folder)
    forest = passes.forest_of(target, 6, 20)
    assert forest.positions[:6].tolist() == [20, 21, 21, 22, 22, 23]
    assert len(forest.asked) == 6
    forest.drafts.check()


@pytest.mark.parametrize("engine", ["ours", "transformers"])
def test_a_round_times_every_pass(engine, model_folder):
    jobs = passes.jobs_of(engine, str(model_folder), "float32", [1, 4], 16, "stored")
    times = passes.one_round(jobs, 2)
    names = {"1", "4", "decode"} if engine == "ours" else {"1 dynamic", "1 static", "4 dynamic", "4 static"}
    assert {name: len(samples) for name, samples in times.items()} == {name: 1 if name == "decode" else 2 for name in names}
    assert min(min(samples) for samples in times.values()) > 0


def test_a_worker_measures_in_another_process_with_its_own_pages_and_threads(tmp_path):
    script = tmp_path / "script.py"
    names = ("OMP_NUM_THREADS", "THP_MEM_ALLOC_ENABLE")
    script.write_text(
        f"import os, sys\nsys.path.append({str(Path(worker.__file__).parent)!r})\nfrom worker import serve\n"
        f"assert sys.argv[1] == 'good'\nserve([os.environ.get(name) for name in {names}], lambda: {{'ms': 1.5}})"
    )
    for pages, expected in (("huge", ["3", "1"]), ("default", ["3", None])):
        running = worker.Worker(str(script), ["good"], 3, pages)
        assert running.greeting == expected
        assert [running.round()["ms"] for _ in range(2)] == [1.5, 1.5]
        assert running.close() == 0
    with pytest.raises(ValueError, match=r"script\.py bad ended with exit status 1"):
        worker.Worker(str(script), ["bad"], 1, "huge")


def test_an_engine_is_told_its_weights_and_kernels(monkeypatch):
    monkeypatch.setattr(llama_cpp, "Worker", lambda script, words, *_: words)
    arguments = Namespace(threads=1, pages="default", context=8, repetitions=1, nodes=[1, 2])
    for engine, name, more in (
        ("ours", "ours", set()),
        ("ours, int8", "ours", {"--weights", "int8"}),
        ("ours, torch's kernels", "ours", {"--torch"}),
        ("transformers", "transformers", set()),
    ):
        words = llama_cpp.worker_of(engine, Path("m"), "f32", arguments)
        assert (words[0], words[words.index("--dtype") + 1]) == (name, "float32")
        assert {"--weights", "int8", "--torch"} & set(words) == more


def test_targets_have_the_shape_they_are_named_for(tmp_path):
    assert targets.write_target(tmp_path / "tiny", 2, 128, 96, vocab=64) == pytest.approx(0.213, abs=0.001)
    sizes = {name: targets.config_of(*shape) for name, shape in targets.SHAPES.items()}
    assert sizes["deep"].num_hidden_layers == 32
    assert sizes["430M"].num_attention_heads == 32
    with pytest.raises(ValueError, match="multiple of the 64 channels"):
        targets.config_of(1, 100, 64)


def test_answers_end_where_they_loop_and_all_runs_give_as_many_tokens(model_folder, monkeypatch, capsys):
    served: list = []
    monkeypatch.setattr(answers, "serve", lambda greeting, one_round: served.extend([greeting, one_round()]))
    drafter = "lookup"
    words = [
        "answers",
        str(model_folder),
        "--drafters",
        drafter,
        "--max-tokens",
        "24",
        "--limit",
        "2",
        "--prompts",
        "stories",
        "--temperature",
        "1",
    ]
    monkeypatch.setattr(sys, "argv", [*words, "--dtype", "float32", "--threads", "1"])
    answers.main()
    greeting, one = served
    assert len(greeting["prompt"]) == len(greeting["answer"]) <= 2
    assert {*one["seconds"]} == {"generate", "plain", drafter}
    assert one["tau"]["plain"] == 1
    assert min(one["seconds"].values()) > 0


def test_a_text_loops_where_its_first_ngram_comes_back():
    assert first_loop([1, 2, 3, 4, 1, 2, 9], size=2) == 4
    assert first_loop([1, 2, 3], size=2) == 3
    assert first_loop([5, 5, 5, 5], size=2) == 1


# -- headline.py --


def test_the_headline_is_milliseconds_per_token_and_speed_up():
    one = {"seconds": {"generate": 0.9, "plain": 0.45, "mtp": 0.15}, "tau": {"plain": 1.0, "mtp": 3.0}, "others": 0.0}
    two = {"seconds": {"generate": 0.9, "plain": 0.45, "mtp": 0.21}, "tau": {"plain": 1.0, "mtp": 3.0}, "others": 0.2}
    rows = [headline.Row(headline.PEER, 0.0, 6.0, 5.0), *headline.rows_of(0.0, [one, two], [5, 6])]
    mtp = rows[-1]
    assert (mtp.median, mtp.least, mtp.tau, mtp.others) == (pytest.approx(20.0), pytest.approx(150 / 9), 3.0, 0.2)
    assert headline.speed_up(mtp, rows, "generate") == pytest.approx(5.0)
    assert headline.speed_up(mtp, rows, headline.PEER) == pytest.approx(0.3)
    assert headline.speed_up(mtp, [mtp], "plain") is None


def test_llama_bench_decodes_around_the_middle_of_an_average_answer():
    assert headline.depth_of([20, 40], [100, 60]) == 30 + 40 - 16
    assert headline.depth_of([4], [8]) == 0


def test_every_heads_run_with_every_planner():
    assert headline.specs_of(["a", "b"], ["own", "best:nodes=5"]) == ["a", "a@best:nodes=5", "b", "b@best:nodes=5"]
