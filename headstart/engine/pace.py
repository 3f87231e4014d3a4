"""A limit for the time of a round, so that the tokens of running requests do not come too late."""

from __future__ import annotations

from headstart.speculation.cost import CostModel

LEAST = 8  # prompt tokens that every round scores, whatever the limit


class Pace:
    """Says how many prompt tokens a round may score beside running requests.

    cost: of rounds without drafting; refined by every round.
    seconds: that a round may take.
    Raises ValueError for a limit below the time of a round of plain decoding.
    """

    def __init__(self, cost: CostModel, seconds: float) -> None:
        if seconds < cost.plain():
            raise ValueError(
                f"rounds may take {1000 * seconds:g} ms, but one token of plain decoding takes {1000 * cost.plain():.3g} ms here; "
                "allow more"
            )
        self.cost = cost
        self.seconds = seconds

    def most_nodes(self, num_rows: int, context: int) -> int:
        """The largest forest that such a round can score in time; at least one node per row."""
        low, high = num_rows, 2 * self.cost.nodes[-1]
        while low < high:
            middle = (low + high + 1) // 2
            seconds = self.cost.forward(middle, num_rows, context) + self.cost.host(middle, num_rows)
            low, high = (middle, high) if seconds <= self.seconds else (low, middle - 1)
        return low

    def chunk(self, num_decoding: int, context: int) -> int:
        """Prompt tokens that fit beside so many rows that decode, whose contexts have so many tokens in all."""
        return max(LEAST, self.most_nodes(num_decoding, context) - num_decoding)

    def learn(self, nodes: int, num_rows: int, context: int, seconds: float) -> None:
        """Take notice of a timed forward."""
        self.cost = self.cost.refined(nodes, num_rows, context, seconds)
