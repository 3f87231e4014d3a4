"""Calibration against decoding, and against known distributions."""

import json

import pytest
import torch
from tiny import VOCAB, tiny
from typer.testing import CliRunner

from headstart import formats as checkpoint
from headstart.bench.calibrate import DecodeTrial, calibrate, calibration_error, fit_calibration_temperature
from headstart.bench.observation import BEYOND, Recorder, observe
from headstart.cli import app
from headstart.drafters.eagle import Eagle, EagleConfig
from headstart.drafters.eagle3 import Eagle3, Eagle3Config
from headstart.drafters.hydra import Hydra, HydraConfig, HydraPlus, HydraPlusConfig, PrefixConfig
from headstart.drafters.medusa import Medusa, MedusaConfig
from headstart.engine.drafter_loading import heads_in
from headstart.formats.model_card import with_section
from headstart.speculation.calibration import walk
from headstart.speculation.heads_plan import load_plan
from headstart.speculation.planner import Chain, StaticTree
from headstart.target.target import Target

PROMPTS = ((3, 1, 4, 1, 5), (9, 2, 6), (5, 3, 5, 8, 9, 7, 9))
METHODS = {
    "medusa": (Medusa, MedusaConfig(num_heads=3, projection="shared")),
    "hydra": (Hydra, HydraConfig(num_heads=3, projection="shared")),
    "eagle": (Eagle, EagleConfig(depth=3)),
    "eagle3": (Eagle3, Eagle3Config(depth=3, steps=1, taps=(0, 2), draft_vocab=50)),
    "hydra++": (HydraPlus, HydraPlusConfig(num_heads=2, prefix=PrefixConfig.for_hidden(64))),
}


def heads(name):
    """Heads with random weights, whose first candidates are sometimes right."""
    kind, config = METHODS[name]
    torch.manual_seed(0)
    drafter = kind(config, 64, VOCAB).bind(tiny().embed_head)
    drafter.choose_vocab(torch.arange(VOCAB) % 5, ())
    drafter = drafter.init_from_target().double()
    with torch.no_grad():
        for weight in drafter.parameters():
            weight.add_(0.02 * torch.randn_like(weight))
    return drafter


def trial(max_tokens=24):
    return DecodeTrial(tiny(), PROMPTS, max_tokens=max_tokens, seed=7)


@pytest.mark.parametrize("name", METHODS)
def test_replayed_and_decoded_tau_are_the_same_number(name):
    """In double precision nothing is near a tie: the ranks predict tau of chains and trees exactly, at any temperature."""
    drafter = heads(name)
    plan, results = calibrate(trial(), drafter, [0.0, 1.0], sizes=(4, 12))
    for result in results:
        assert result.chain == pytest.approx(result.chain_measured)
        for tree in plan.trees[result.temperature].values():
            assert trial().decode(drafter, StaticTree(tree.paths), result.temperature).tau == pytest.approx(tree.tau)
    assert max(tree.tau for result in results for tree in result.trees.values()) > 1


def test_an_answer_that_stops_inside_a_kept_path_is_replayed_exactly():
    """Each token of the answer in turn is a stop token, so that some rounds end in the middle of their kept path."""
    drafter, outputs = heads("hydra"), []
    trial().decode(drafter, Chain(3), 0.0, lambda index, request: outputs.append(request.output))
    for stop in list(dict.fromkeys(outputs[0]))[:8]:
        stopped = DecodeTrial(tiny(), PROMPTS[:2], max_tokens=24, seed=7, stop_ids=(stop,))
        _, (result,) = calibrate(stopped, drafter, [0.0], sizes=(12,))
        assert result.chain == pytest.approx(result.chain_measured)
        assert stopped.decode(drafter, StaticTree(result.trees[12].paths), 0.0).tau == pytest.approx(result.trees[12].tau)


def test_observed_ranks_are_those_of_the_proposed_drafts():
    """The ranks of one text, compared with the drafts of every round of a wide tree."""
    drafter, target = heads("medusa"), tiny()
    clone = drafter.clone().bind(target.embed_head).to(target.device, target.dtype)
    proposed = []
    drafter.propose, propose = lambda rows: record(propose(rows), rows), drafter.propose

    def record(drafts, rows):
        proposed.append((rows.root_positions[0], drafts.tokens[drafts.depths == 1].tolist()))
        return drafts

    recorder, observed = Recorder(drafter), []

    def on_answer(index, request):
        observed.append(observe(clone, recorder.batch((*request.prompt, *request.output), 5), 0.7, request.seed, 99).ranks)
        texts.append((*request.prompt, *request.output))

    texts = []
    DecodeTrial(target, PROMPTS[:1], 16).decode(recorder, StaticTree.full(VOCAB - 1), 0.7, on_answer)
    assert len(proposed) > 3
    for root, children in proposed:
        rank = observed[0][root - 5, 0]
        assert rank == VOCAB - 1 or children[rank] == texts[0][root + 1]


def test_past_the_end_of_an_answer_no_rank_is_right():
    drafter, target = heads("hydra"), tiny()
    recorder, observed = Recorder(drafter), []
    clone = drafter.clone().bind(target.embed_head).to(target.device, target.dtype)
    DecodeTrial(target, PROMPTS[:1], 4).decode(
        recorder,
        Chain(2),
        0.0,
        lambda _, request: observed.append(observe(clone, recorder.batch((*request.prompt, *request.output), 5), 0, 0, 9)),
    )
    assert observed[0].ranks.shape == (3, 3)  # roots 0, 1 and 2 of four tokens
    assert (observed[0].ranks == BEYOND).tolist() == [[False, False, False], [False, False, True], [False, True, True]]
    assert walk([observed[0].ranks], [(0,)]) >= 1


# -- the fit ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tau", [0.3, 1.0, 2.5])
def test_the_fit_finds_the_calibration_temperature_that_sampled_the_tokens(tau):
    draw = torch.Generator().manual_seed(3)
    scores = 2 * torch.randn(20_000, 12, generator=draw)
    decided = torch.multinomial(torch.softmax(scores / tau, -1), 1, generator=draw).squeeze(-1)
    assert fit_calibration_temperature(scores, decided) == pytest.approx(tau, rel=0.05)


def test_the_calibration_temperature_stays_within_bounds():
    scores = torch.tensor([[1.0, 0.0]]).expand(10, -1)
    assert fit_calibration_temperature(scores, torch.zeros(10, dtype=torch.int64)) == pytest.approx(0.05, rel=0.01)
    assert fit_calibration_temperature(scores, torch.ones(10, dtype=torch.int64)) == pytest.approx(20, rel=0.01)


def test_fitted_chances_have_a_smaller_calibration_error_than_overconfident_ones():
    draw = torch.Generator().manual_seed(4)
    scores = 2 * torch.randn(5_000, 12, generator=draw)
    decided = torch.multinomial(torch.softmax(scores / 2, -1), 1, generator=draw).squeeze(-1)
    assert calibration_error([scores], [decided], [fit_calibration_temperature(scores, decided)]) < 0.02
    assert calibration_error([scores], [decided], [0.6]) > 0.05


@pytest.mark.parametrize(("temperatures", "prompts", "max_tokens"), [([], PROMPTS, 9), ([1.0], (), 9), ([1.0], PROMPTS, 2)])
def test_calibration_without_data_is_refused(temperatures, prompts, max_tokens):
    with pytest.raises(ValueError, match="give it more"):
        calibrate(DecodeTrial(tiny(), prompts, max_tokens), heads("medusa"), temperatures)


# -- from the command line --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def heads_folder(model_folder, tmp_path_factory):
    """Heads that begin as the target's LM head: sometimes right."""
    target = Target.load(model_folder)
    torch.manual_seed(0)
    drafter = (
        Medusa(MedusaConfig(num_heads=2), target.embed_head.hidden, target.embed_head.vocab)
        .bind(target.embed_head)
        .init_from_target()
    )
    folder = tmp_path_factory.mktemp("heads") / "medusa"
    checkpoint.save(folder, drafter, checkpoint.describe_target(target.model), {})
    return folder


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_tuning_saves_a_plan_that_drafting_uses(model_folder, heads_folder, quick_costs):
    base = ("tune", heads_folder, "--model", model_folder, "--limit", 2, "--max-tokens", 24, "--no-exact", "--no-decode")
    done = run(*base, "--temperature", 0, "--temperature", 1, "--json")
    entries = json.loads(done.stdout)["findings"]
    plan = load_plan(heads_folder)
    assert plan.calibration.temperatures == (0.0, 1.0)
    assert heads_in(heads_folder, Target.load(model_folder)).calibration == plan.calibration
    for one in entries:
        assert one["chain"] == pytest.approx(one["chain_measured"], rel=0.05)
        taus = [tree["tau"] for tree in one["trees"].values()]
        assert taus == sorted(taus)
        assert taus[0] >= 1
    assert "tree of 64" in run(*base, "--temperature", 1).stdout


def test_a_probe_reports_tau_and_acceptance_rates(model_folder, heads_folder):
    result = json.loads(run("inspect", heads_folder, "--model", model_folder, "--probe", "--json").stdout)["probe"]
    assert result["tau"] >= 1
    assert len(result["acceptance"]) == 2
    assert "acceptance rate by depth" in run("inspect", heads_folder, "--model", model_folder, "--probe").stdout


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("tune", "{heads}", "--model", "{model}", "--accept", "typical"), "coupled"),
        (("tune", "{model}", "--model", "{model}"), "heads"),
        (("tune", "{heads}", "--model", "{model}", "--max-tokens", 2), "at least 3 tokens"),
        (("inspect", "{heads}", "--model", "{model}"), "--probe"),
        (("inspect", "{model}", "--probe"), "heads"),
    ],
)
def test_what_a_user_did_wrong_is_one_sentence(arguments, word, model_folder, heads_folder):
    done = run(*(str(part).format(heads=heads_folder, model=model_folder) for part in arguments))
    assert done.exit_code == 2
    assert word in done.stderr
    assert "Traceback" not in done.stderr


def test_the_model_card_has_one_section_of_measurements(model_folder, heads_folder, quick_costs):
    """Measured twice, it has the second table; a deleted card is written anew; its other sections stay."""
    card = heads_folder / "README.md"
    before = card.read_text().split("## Measured")[0].rstrip()
    command = [
        "tune",
        str(heads_folder),
        "--model",
        str(model_folder),
        "--limit",
        "2",
        "--max-tokens",
        "16",
        "--raw",
        "--no-decode",
    ]
    result = CliRunner().invoke(app, [*command, "--temperature", "0.7"])
    assert result.exit_code == 0, result.output
    first = card.read_text()
    result = CliRunner().invoke(app, [*command, "--temperature", "0", "--json"])
    (finding,) = json.loads(result.stdout)["findings"]
    second = card.read_text()
    assert second.startswith(before)
    assert "| 0.7 |" in first
    assert "| 0.7 |" not in second
    assert second.count("## Measured") == 1
    taus = [tree["tau"] for tree in finding["trees"].values()]
    accepted = ", ".join(f"{shares[0]:.0%}" for shares in finding["table"])
    row = " | ".join(["0", accepted, *(f"{tau:.2f}" for tau in (finding["chain_measured"], *taus))])
    assert f"| {row} |" in second
    assert str(heads_folder) not in second
    card.unlink()
    checkpoint.write_card_section(heads_folder, "Measured", "again")
    assert card.read_text() == f"{before}\n\n## Measured\n\nagain\n"


def test_a_section_of_a_card_is_replaced_and_the_others_stay():
    card = "# heads\n\n## Settings\n\n- a: 1\n\n## Measured\n\nold\n\n## Mine\n\nkeep\n"
    assert with_section(card, "Measured", "new") == "# heads\n\n## Settings\n\n- a: 1\n\n## Mine\n\nkeep\n\n## Measured\n\nnew\n"
