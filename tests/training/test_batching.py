"""The order of batches, the learning-rate schedule, and the split into train and held out."""

import random

from headstart.training.batching import BatchOrder, num_batches
from headstart.training.dataset import Text, split
from headstart.training.lr_schedule import lr_schedule


def test_each_epoch_reads_every_text_once_in_its_own_order():
    order = BatchOrder([5, 9, 2, 7, 7, 3, 8], rows=2, seed=1)
    epochs = [[order[epoch * len(order) + index] for index in range(len(order))] for epoch in range(5)]
    assert all(sorted(index for batch in epoch for index in batch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    again = BatchOrder([5, 9, 2, 7, 7, 3, 8], rows=2, seed=1)
    assert [again[position] for position in (17, 3, 9)] == [order[position] for position in (17, 3, 9)]


def test_texts_of_a_batch_are_of_similar_length():
    generator = random.Random(0)
    lengths = [generator.randint(1, 500) for _ in range(640)]
    order = BatchOrder(lengths, rows=8, seed=0)
    padding = [8 * max(lengths[i] for i in order[position]) - order.num_tokens(position) for position in range(len(order))]
    assert sum(padding) < 0.05 * sum(lengths)


def test_a_token_budget_ends_with_the_batch_that_reaches_it():
    order = BatchOrder([10] * 6, rows=2, seed=0)
    paid = {tokens: num_batches(order, tokens=tokens, epochs=None, steps=None, per_step=3) for tokens in (1, 20, 21, 100)}
    assert paid == {1: 1, 20: 1, 21: 2, 100: 5}
    assert num_batches(order, tokens=None, epochs=2, steps=None, per_step=3) == 6
    assert num_batches(order, tokens=None, epochs=None, steps=4, per_step=3) == 12


def test_the_learning_rate_rises_and_falls():
    assert [lr_schedule(step, 10, 0.2, "linear") for step in (0, 1, 2, 6, 9)] == [0.5, 1, 1, 0.5, 0.125]
    assert [round(lr_schedule(step, 10, 0.2, "cosine"), 3) for step in (2, 6, 10)] == [1, 0.5, 0]
    assert lr_schedule(9, 10, 0, "constant") == 1


def test_equal_texts_are_held_out_together():
    class Example:
        def __init__(self, *tokens):
            self.tokens, self.mask = tokens, [1] * len(tokens)

    dataset = split([Example(1, 2, 3), Example(4, 5, 6), Example(1, 2, 3), Example(7, 8, 9), Example(1, 2)], 0.25)
    held_out = {dataset.texts[index] for index in dataset.held_out}
    assert not held_out & {dataset.texts[index] for index in dataset.train}
    assert Text((1, 2), (True, True)) not in dataset.texts  # no position in it has a loss
