"""Speculative decoding without a second model: what came before is proposed again, and verified in one step.

Prompt lookup (github.com/apoorvumang/prompt-lookup-decoding). Greedy text of a small model repeats itself, drawn text
does not, and many streams are bound by arithmetic (docs/lab-notes.md): so it serves one greedy stream at a time.
"""

from __future__ import annotations

LENGTHS = (2, 5, 8)
"""Tokens proposed at once: with the one before, whole groups of the compiled step."""


class PromptLookup:
    """Proposals for one stream; longer ones while they come true, shorter ones while they do not."""

    def __init__(self) -> None:
        self.level = 1  # index into LENGTHS

    def propose(self, ids: list[int], room: int) -> list[int]:
        """What may follow `ids`: at most `room` tokens, none where nothing like the end of `ids` came before."""
        return continued(ids, min(LENGTHS[self.level], room))

    def learn(self, proposed: int, accepted: int) -> None:
        """Take note of how many of the proposed tokens were those that the model writes."""
        if accepted == proposed:
            self.level = min(self.level + 1, len(LENGTHS) - 1)
        elif 2 * accepted < proposed:
            self.level = max(self.level - 1, 0)


def continued(ids: list[int], most: int, longest: int = 3) -> list[int]:
    """What followed the last three or two tokens of `ids` when they occurred before, latest first; `most` tokens."""
    if most > 0:
        for n in range(min(longest, len(ids) - 1), 1, -1):
            end = ids[-n:]
            for at in range(len(ids) - n - 1, -1, -1):
                if ids[at : at + n] == end:
                    return ids[at + n : at + n + most]
    return []
