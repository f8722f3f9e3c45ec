"""Dialogues for training: the ids of a chat template, and which of them are the assistant's.

What is trained on are the ids that a chat has: of every reply, the prompt as `add_generation_prompt` writes it, then
all that the template puts behind it. Where a template writes a reply differently once the talk goes on (Qwen3's leaves
thoughts out), such a reply is an example of its own.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import numpy as np

from miaobi.corpus.template import BREAK, OPEN, REPLY, ROLES, ChatTemplate, Messages, length_of
from miaobi.errors import UserError, brief


@dataclass(frozen=True)
class Rendered:
    """A dialogue in tokens."""

    ids: list[int]
    is_reply: np.ndarray
    """(len(ids),) bool: the assistant's replies, each with the control token that ends it."""
    turns: list[int]
    """Where each message begins in ids, with what the template puts in front of it."""


class TrainingTemplate(ChatTemplate):
    """A chat template that also tells where its replies are."""

    def examples(self, messages: Messages) -> list[Rendered]:
        """A dialogue for training: every reply with weight is marked in one of the examples, behind its own prompt.

        One example usually; more where the template writes a reply differently once the talk goes on.

        Raises UserError when the template refuses the messages, or does not begin a reply as its prompt does.
        """
        learned = {i for i, m in enumerate(messages) if m["role"] == "assistant" and m.get("weight") != 0}
        if self._is_regular and _is_plain(messages):
            return [self.render(messages, learned)]
        examples, open_replies = [], set(learned)
        while open_replies or not examples:
            part = messages if not examples else messages[: max(open_replies) + 1]
            example, agreeing = self._compared(part, open_replies)
            if not agreeing and part[-1]["role"] == "assistant" and len(part) - 1 in open_replies:
                example, agreeing = self._continued(part), {len(part) - 1}
            if agreeing or not open_replies:
                examples.append(example)
                open_replies -= agreeing
            elif not examples and max(open_replies) + 1 < len(messages):
                messages = messages[: max(open_replies) + 1]  # what follows the last reply is not learned anyway
            else:
                raise AssertionError("a reply at the end agrees with itself")  # refused above
        return examples

    def render(self, messages: Messages, learned: set[int] | None = None) -> Rendered:
        """A whole dialogue in which the template copies every message as it is.

        learned: which replies are marked; None for all.

        Raises UserError when the template refuses the messages, or does not copy them.
        """
        marks = [REPLY if m["role"] == "assistant" else OPEN for m in messages]
        marked, opens, closes = self.marked(messages, marks)
        if len(opens) != len(messages) or len(closes) != len(messages):
            raise UserError(
                "the chat template leaves messages out, repeats them or changes their order; it cannot be trained on"
            )
        ids, starts, ends, is_control = self.tokens(marked)
        text = marked.replace(BREAK, "")
        is_reply, turns = np.zeros(len(ids), bool), [0]
        for i, mark in enumerate(marks):
            first = np.searchsorted(ends, opens[i], side="right")  # the token may begin with the template's blank
            after = np.searchsorted(starts, closes[i])
            following = int(np.searchsorted(starts, opens[i + 1])) if i + 1 < len(messages) else len(ids)
            controls = np.flatnonzero(is_control[after:following])
            end = after + int(controls[0]) + 1 if len(controls) else int(after)
            if mark == REPLY and (learned is None or i in learned):
                is_reply[first:end] = True
            if i + 1 < len(messages):
                while end < following and not is_control[end] and text[starts[end] : ends[end]].isspace():
                    end += 1  # ChatML's newline belongs to the turn that it ends
                turns.append(end)
        return Rendered(ids, is_reply, turns)

    def _continued(self, messages: Messages) -> Rendered:
        """A dialogue whose last reply goes on from where its prompt leaves off, though the template leaves that out of
        replies: DeepSeek R1's prompt begins a thought, and its replies have none.

        Raises UserError where the reply does not begin as its prompt ends.
        """
        safe = list(map(self.safe, messages))
        prompt, whole = self.texts([self.call(safe[:-1], True), self.call(safe, False)])
        words = safe[-1]["content"]
        begun = next((n for n in range(len(words), 0, -1) if prompt.endswith(words[:n])), 0)
        marks = ["" if m["role"] == "assistant" else OPEN for m in messages]
        marked, _, closes = self.marked(messages, marks)
        if not begun or marked != whole or len(closes) != len(messages) or messages[-1].get("tool_calls"):
            same = sum(
                1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(prompt, whole, strict=False))
            )
            raise UserError(
                "the chat template begins a reply otherwise than its own prompt for one (add_generation_prompt), with "
                f"{brief(whole[same:].replace(BREAK, ''))} where the prompt has {brief(prompt[same:])}: what is "
                "trained would never be asked. Take another template; or is there a thought and "
                "--enable_thinking=False, or none where the prompt begins one?"
            )
        before = self.tokens(prompt)[0]
        ids, starts, _, is_control = self.tokens(words[begun:] + whole[_place(whole, closes[-1]) :])
        after = int(np.searchsorted(starts, length_of(words[begun:])))
        controls = np.flatnonzero(is_control[after:])
        is_reply = np.zeros(len(before) + len(ids), bool)
        is_reply[len(before) : len(before) + after + int(controls[0]) + 1 if len(controls) else None] = True
        return Rendered([*before, *ids], is_reply, [0])

    @functools.cached_property
    def _is_regular(self) -> bool:
        """Whether every reply of a plain dialogue stands behind its own prompt however the talk goes on, so that
        `render` marks what `_compared` would."""
        if self.is_ours:
            return True
        turns = [{"role": ROLES[1 + i % 2], "content": word} for i, word in enumerate("一二三四五六")]
        with_system = [{"role": "system", "content": "零"}, *turns]
        regular = []
        for messages in (turns, with_system):
            replies = {i for i, m in enumerate(messages) if m["role"] == "assistant"}
            try:
                example, agreeing = self._compared(messages, replies)
                simple = self.render(messages)
            except UserError:
                regular.append(messages is with_system)  # no place for a system message
                continue
            same = example.ids == simple.ids and np.array_equal(example.is_reply, simple.is_reply)
            regular.append(agreeing == replies and same)
        return all(regular)

    def _compared(self, messages: Messages, replies: set[int]) -> tuple[Rendered, set[int]]:
        """The dialogue with those of the `wanted` replies marked that stand in it as in a chat, and which those are.

        Of those, the text up to the reply is the prompt for it, and the reply is written as at the end of a dialogue.
        """
        safe = list(map(self.safe, messages))
        order = sorted(replies)
        calls = [self.call(safe, False)]
        calls += [call for i in order for call in (self.call(safe[:i], True), self.call(safe[: i + 1], False))]
        full, *others = self.texts(calls)
        # Of a reply only the end is marked: it may be split up.
        marks = ["" if m["role"] == "assistant" else OPEN for m in messages]
        marked, opens, closes = self.marked(messages, marks)
        has_places = marked == full and len(closes) == len(messages) and len(opens) == marks.count(OPEN)
        ids, starts, ends, is_control = self.tokens(full)
        is_reply, agreeing, turns = np.zeros(len(ids), bool), set(), [0]
        for i, prompt, until in zip(order, others[::2], others[1::2], strict=True):
            begin, end = length_of(prompt), length_of(until)
            if not (full.startswith(prompt) and until.startswith(prompt)):
                continue
            if not full.startswith(until):
                cut = _place(full, closes[i]) if has_places and not messages[i].get("tool_calls") else None
                if cut is None or full[:cut] != until[:cut]:
                    continue
                end = min((at for at in opens if at >= closes[i]), default=len(full))
            first, behind = int(np.searchsorted(starts, begin)), int(np.searchsorted(starts, end))
            before = self.tokens(prompt)[0]
            if ids[:first] != before:  # a token across the border: a chat has none there
                if i + 1 < len(messages):
                    continue
                rest = self.tokens(full[len(prompt) :])
                ids, first, behind = before + rest[0], len(before), len(before) + len(rest[0])
                is_control = np.concatenate((np.zeros(len(before), bool), rest[3]))
                is_reply, has_places = np.zeros(len(ids), bool), False
            agreeing.add(i)
            after = first
            if has_places and not messages[i].get("tool_calls"):
                after = max(first, int(np.searchsorted(starts, closes[i])))
            controls = np.flatnonzero(is_control[after:behind])
            at = 0 if after > first else -1  # the first behind the words, or where they have no place, the last
            is_reply[first : after + int(controls[at]) + 1 if len(controls) else behind] = True
        if has_places:
            turns += self._user_turns(messages, opens, closes, (starts, ends, is_control), full.replace(BREAK, ""))
        return Rendered(ids, is_reply, turns), agreeing

    def _user_turns(
        self, messages: Messages, opens: list[int], closes: list[int], tokens: tuple, text: str
    ) -> list[int]:
        """Where in the tokens each of the messages but the first begins, behind the end of the one before."""
        starts, ends, is_control = tokens
        openings = iter(opens)
        begins = [next(openings) if m["role"] != "assistant" else closes[i] for i, m in enumerate(messages)]
        turns = []
        for close, begin in zip(closes, begins[1:], strict=False):
            after, following = int(np.searchsorted(starts, close)), int(np.searchsorted(starts, begin))
            controls = np.flatnonzero(is_control[after:following])
            end = after + int(controls[0]) + 1 if len(controls) else after
            while end < following and not is_control[end] and text[starts[end] : ends[end]].isspace():
                end += 1
            turns.append(end)
        return turns


def _is_plain(messages: Messages) -> bool:
    """Roles and words alone, user and assistant in turn, and no thoughts inside the words."""
    turns = messages[1:] if messages[0]["role"] == "system" else messages
    return all(
        m.keys() <= {"role", "content", "weight"} and m["role"] == ROLES[1 + i % 2] and "think>" not in m["content"]
        for i, m in enumerate(turns)
    )


def _place(text: str, at: int) -> int:
    """Where in `text` the character number `at` is, BREAKs not counted."""
    end = at
    while (passed := end - text.count(BREAK, 0, end)) < at:
        end += at - passed
    return end
