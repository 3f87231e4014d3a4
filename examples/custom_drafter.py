"""A custom drafter: the token that followed each token last. python examples/custom_drafter.py [MODEL]"""

import sys
from itertools import pairwise

import headstart
from headstart.speculation.planner import Chain
from headstart.speculation.tree import Drafts


class Bigrams:
    name, taps, slot_bytes, planner = "bigrams", (), 0, Chain(4)

    def attach(self, target, seating):
        self.after = {}  # per seat (a row's place in the KV cache): token -> the token that followed it last

    def extend(self, kept):
        for seat, text in zip(kept.seats, kept.texts, strict=True):
            self.after.setdefault(seat, {}).update(pairwise(text))

    def propose(self, rows):
        drafts = []  # token, parent, row, depth, chance (acceptance probability)
        for row, (seat, token) in enumerate(zip(rows.seats, rows.roots, strict=True)):
            for depth in range(1, rows.depths[row] + 1):
                if (token := self.after[seat].get(token)) is None:
                    break
                drafts.append((token, -1 if depth == 1 else len(drafts) - 1, row, depth, 0.5**depth))
        return Drafts.of(*zip(*drafts, strict=True)) if drafts else Drafts.none()

    def fork(self, source, seat, length):
        self.after[seat] = dict(self.after[source])

    def free(self, seat):
        self.after.pop(seat, None)


llm = headstart.load(sys.argv[1] if len(sys.argv) > 1 else None, drafter=Bigrams())
answer = llm.generate("The sun and the moon and the", max_tokens=60, temperature=0.5, seed=3)[0]
print(f"{answer.text}\n\ntau {answer.stats.tau:.2f}, {sum(answer.guessed)} of {len(answer.token_ids)} tokens were drafts")
