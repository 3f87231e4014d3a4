"""What lies beside exported heads: the launch command, chain lengths, the acceptance to expect, and conformance.json."""

import hashlib
import json
import shlex

import pytest
from folders import write_model
from safetensors import safe_open
from saved_heads import save_heads

from headstart import formats
from headstart.formats.exporting import export_heads
from headstart.formats.exports.chain_plan import DEFAULT, plan_chains
from headstart.formats.exports.launch import launch_command
from headstart.speculation.calibration import Calibration
from headstart.speculation.cost import CostModel, DraftCost
from headstart.speculation.heads_plan import HeadsPlan, MachineCost, save_plan

SGLANG = ["python", "-m", "sglang.launch_server", "--model-path", "MODEL", "--speculative-algorithm"]
RANKS = ((0.8, 0.1), (0.5, 0.2), (0.25, 0.1))
CALIBRATION = Calibration((0.0, 1.0), ((0.5,), (0.6,)), (RANKS, ((0.1,),)))
NODES = (1, 2, 4, 8, 16, 32, 64, 128)


def cost(per_node=0.0, draft=0.001):
    """One second a forward, and so much more for each node behind the first."""
    return CostModel(NODES, tuple(1 + per_node * (nodes - 1) for nodes in NODES), draft=DraftCost(draft, (1,), (draft,)))


def planned(folder, *costs):
    machine = {"device": "a processor", "dtype": "float32", "threads": 2}
    save_plan(
        folder, HeadsPlan(CALIBRATION, {}, tuple(MachineCost(machine | {"cores": index}, each) for index, each in enumerate(costs)))
    )
    return folder


def test_without_a_plan_the_length_is_a_default_and_the_command_that_measures_is_named(tmp_path):
    plan = plan_chains(tmp_path, 5, "headstart tune HEADS")
    assert (plan.length, plan.by_batch, plan.acceptance) == (DEFAULT, (), None)
    assert "headstart tune HEADS" in plan.source
    assert "headstart tune HEADS" in plan.acceptance_source
    assert plan_chains(tmp_path, 2, "").length == 2  # no deeper than the heads draft


def test_the_acceptance_by_position_is_the_product_of_the_rates_of_the_first_rank(tmp_path):
    plan = plan_chains(planned(tmp_path), 5, "headstart tune HEADS")
    assert plan.acceptance == pytest.approx((0.8, 0.4, 0.1))
    assert plan.length == DEFAULT
    assert plan_chains(tmp_path, 2, "").acceptance == pytest.approx((0.8, 0.4))


def test_free_drafts_give_the_longest_chain_and_dear_ones_shorter_chains_for_larger_batches(tmp_path):
    free = plan_chains(planned(tmp_path, cost()), 5, "")
    assert (free.length, free.by_batch) == (3, ())
    assert "a processor, float32, 2 threads" in free.source
    dear = plan_chains(planned(tmp_path, cost(), cost(per_node=0.05)), 5, "")  # the machine measured last counts
    lengths = [length for _, _, length in dear.by_batch]
    assert dear.length == lengths[0] == max(lengths)
    assert lengths == sorted(lengths, reverse=True)
    assert len({*lengths}) > 1
    assert [first for first, _, _ in dear.by_batch[1:]] == [last + 1 for _, last, _ in dear.by_batch[:-1]]


def test_where_no_chain_pays_the_shortest_is_written_and_said(tmp_path):
    plan = plan_chains(planned(tmp_path, cost(per_node=10)), 5, "")
    assert (plan.length, plan.by_batch) == (1, ())
    assert "no chain pays" in plan.source


@pytest.mark.parametrize(
    ("engine", "method", "words"),
    [
        ("vllm", "eagle", ["vllm", "serve", "MODEL", "--speculative-config"]),
        ("speculators", "eagle3", ["vllm", "serve", "MODEL", "--speculative-config"]),
        ("sglang", "eagle3", [*SGLANG, "EAGLE3"]),
        ("sglang", "eagle", [*SGLANG, "EAGLE"]),
        ("tgi", "medusa", ["text-generation-launcher", "--model-id", "FOLDER", "--speculate", "4"]),
    ],
)  # fmt: skip
def test_the_launch_command_is_in_the_words_of_the_engine(engine, method, words):
    command = launch_command(engine, {"method": method, "chain": 4}, "MODEL", "FOLDER")
    assert command[: len(words)] == words
    assert all(isinstance(word, str) for word in command)


def test_vllms_configuration_has_the_chains_by_batch_size_but_not_for_medusa():
    content = {"method": "eagle3", "chain": 4, "chain_by_batch": [[1, 4, 4], [5, 32, 0]]}
    config = json.loads(launch_command("vllm", content, "MODEL", "FOLDER")[-1])
    assert config == {
        "method": "eagle3", "model": "FOLDER", "num_speculative_tokens": 4,
        "num_speculative_tokens_per_batch_size": [[1, 4, 4], [5, 32, 0]],
    }  # fmt: skip
    config = json.loads(launch_command("vllm", content | {"method": "medusa"}, "MODEL", "FOLDER")[-1])
    assert config == {"method": "medusa", "model": "FOLDER", "num_speculative_tokens": 4}


def test_sglang_verifies_one_token_more_than_it_drafts():
    command = launch_command("sglang", {"method": "eagle3", "chain": 4}, "MODEL", "FOLDER")
    options = dict(zip(command[3::2], command[4::2], strict=True))
    assert options["--speculative-num-steps"] == options["--speculative-num-draft-tokens"].replace("5", "4") == "4"
    assert (options["--speculative-eagle-topk"], options["--speculative-draft-model-path"]) == ("1", "FOLDER")


def test_an_engine_without_a_command_is_refused():
    with pytest.raises(ValueError, match="no command that starts triton"):
        launch_command("triton", {"method": "eagle", "chain": 3}, "MODEL", "FOLDER")


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    """The target, heads with a plan, their export and its report."""
    folder = tmp_path_factory.mktemp("reports")
    target = write_model(folder / "talker", layers=8)
    heads = planned(save_heads(folder / "heads", target, "eagle3", draft_vocab=60), cost(per_node=0.05))
    summary = export_heads(heads, str(target), "speculators", folder / "export")
    return target, heads, folder / "export", json.loads((folder / "export" / "conformance.json").read_text()), summary


def test_the_report_names_engine_reader_heads_target_chain_and_commands(export):
    target, _, out, report, _ = export
    assert (report["engine"], report["method"], report["target"]) == ("speculators", "eagle3", "talker")
    assert "0.9.0" in report["reader"]
    assert report["digest"] == formats.describe(out.parent / "heads").target.digest
    assert report["acceptance"] == [0.8, 0.4, 0.1]
    config = json.loads((out / "config.json").read_text())
    assert report["chain"] == config["speculators_config"]["proposal_methods"][0]["speculative_tokens"]
    assert shlex.split(report["launch"]) == launch_command("speculators", report, str(target), str(out))
    assert shlex.split(report["check"]) == ["headstart", "verify-export", str(out), "--model", str(target)]


def test_the_report_has_every_tensor_of_the_file_with_the_hash_of_its_bytes(export):
    _, heads, out, report, _ = export
    with safe_open(out / "model.safetensors", framework="pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    entries = {entry["theirs"]: entry for entry in report["tensors"]}
    assert entries.keys() == stored.keys()
    for name, tensor in stored.items():
        entry = entries[name]
        assert entry["sha256"] == hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
        assert (entry["file"], entry["shape"], f"torch.{entry['dtype']}") == (
            "model.safetensors",
            [*tensor.shape],
            str(tensor.dtype),
        )
    assert {entry["ours"] for entry in report["tensors"]} == {*formats.load(heads).state_dict(), None}
    assert entries["t2d"]["ours"] is None
    assert {entry["how"].partition(":")[0] for entry in report["tensors"]} == {"as it is", "renamed", "derived"}


def test_the_readme_and_the_summary_say_how_to_launch_and_to_check(export):
    _, _, out, report, summary = export
    text = (out / "README.md").read_text()
    for words in (report["launch"], report["check"], "0.800, 0.400, 0.100", "| 1 to ", "fc_norms.0.weight | fc_norm.0.weight"):
        assert words in text
    assert (summary["launch"], summary["check"]) == (report["launch"], report["check"])
    assert summary["files"] == ["README.md", "config.json", "model.safetensors", "conformance.json"]


def test_what_no_version_of_an_engine_after_one_has_is_noted(tmp_path, export):
    target, *_ = export
    heads = save_heads(tmp_path / "heads", target, "medusa")
    export_heads(heads, str(target), "vllm", tmp_path / "export")
    assert "VLLM has Medusa up to version 0.32" not in (text := (tmp_path / "export" / "README.md").read_text())
    assert "vLLM has Medusa up to version 0.32" in text
