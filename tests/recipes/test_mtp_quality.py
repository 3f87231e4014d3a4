"""recipes/mtp_quality: its intervals are those of scipy, and its arms are pairs."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from folders import write_tokenizer
from scipy.stats import ttest_rel

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # recipes are no part of the installed package

from recipes.mtp_quality import after, arms, quality
from recipes.mtp_quality.measure import by_document
from recipes.mtp_quality.paired import over_documents, over_seeds
from recipes.mtp_quality.texts import SOURCES, held_out

VOCAB, LENGTH = 320, 33
SHAPE = {
    "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 1,
    "num_key_value_heads": 1, "head_dim": 16, "eos_token_id": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    """Ten sources of a few hundred tokens; each token determines the second token after it."""
    work = tmp_path_factory.mktemp("work")
    write_tokenizer(work / "tokenizer", VOCAB)
    (work / "tokens").mkdir()
    stream = np.where(np.arange(600) % 40 == 39, 0, np.arange(600) % 7 + 10).astype(np.uint16)
    for name in SOURCES:
        np.save(work / "tokens" / f"{name}.train.npy", stream)
        np.save(work / "tokens" / f"{name}.held_out.npy", stream[:120])
    (work / "sources.json").write_text(json.dumps({name: {"share": 0.1, "train_tokens": 600} for name in SOURCES}))
    keys = {"length": LENGTH, "precision": "no", "rows": 4}
    return arms.Experiment(work, work / "out", tokens=256, shape=arms.SHAPE | SHAPE, keys=keys)


def test_the_interval_over_seeds_is_that_of_a_paired_t_test():
    own, plain = [4.31, 4.40, 4.36, 4.29], [4.28, 4.41, 4.31, 4.27]
    interval = over_seeds([a - b for a, b in zip(own, plain, strict=True)])
    expected = ttest_rel(own, plain).confidence_interval(0.95)
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high))
    assert interval.mean == pytest.approx(np.mean(own) - np.mean(plain))


def test_one_seed_gives_no_interval():
    with pytest.raises(ValueError, match="two seeds or more, and there is 1"):
        over_seeds([0.1])


def test_the_bootstrap_agrees_with_the_normal_distribution_for_many_documents():
    generator = np.random.default_rng(1)
    each = generator.normal(0.5, 1.0, size=400)
    interval = over_documents(10 * each, np.full(400, 10))
    assert interval.mean == pytest.approx(each.mean())
    assert (interval.high - interval.low) / 2 == pytest.approx(1.96 * each.std() / 20, rel=0.1)


def test_held_out_documents_end_with_the_end_token_and_come_from_every_source(experiment):
    documents = held_out(experiment.work, tokens=600, end=0)
    assert len(documents) == 2 * len(SOURCES)
    assert all(document[-1] == 0 and (document[:-1] != 0).all() for document in documents)


def test_arms_are_trained_and_measured_and_heads_are_trained_afterwards_on_the_same_blocks(experiment):
    """Two steps of each: only that the parts fit together."""
    documents = held_out(experiment.work, tokens=600, end=0)
    sums = {}
    for arm in arms.ARMS:
        for _ in range(2):  # the second time, the run has ended already
            arms.run(experiment, arm, seed=0)
        sums[arm] = np.stack([quality.measured(experiment, arm, 0, documents)] * 2)
        sums[arm][1] += sums[arm][0, 0, 0] * np.arange(3) / 100  # as if from another seed
    assert len(quality.table(sums)) == 2 + len(arms.ARMS)
    counts = sums[arms.PLAIN][0][:, 2]
    assert counts.tolist() == [len(document) - 1 for document in documents]
    member = after.learned_after(experiment, "medusa", seed=0)
    tokens = [json.loads((folder / "config.json").read_text())["training"]["tokens"] for folder in (member.folder,)]
    assert tokens == [json.loads((experiment.folder(arms.PLAIN, 0) / "training.json").read_text())["tokens"]]
    lines = after.table([member, after.learned_together(experiment, "mtp", 0)], documents, LENGTH, max_tokens=4)
    assert [line.split(" | ")[0] for line in lines[2:4]] == ["| medusa", "| mtp"]


def test_the_sums_of_a_document_do_not_depend_on_the_block_length(experiment):
    arms.run(experiment, arms.PLAIN, seed=0)
    trunk = experiment.trunk(arms.PLAIN, 0)
    documents = held_out(experiment.work, tokens=600, end=0)[:3]
    single, cut = (by_document(trunk, documents, length) for length in (100, 21))
    assert (single[:, 2] == cut[:, 2]).all()
    assert single[:, 0] == pytest.approx(cut[:, 0], rel=0.05)  # the first tokens of a block have less context
