"""Greedy answers of a package, to be compared with what its checkpoint would have written.

The checkpoint need not generate: given a prompt and the package's answer, one run tells what it would have chosen at
each place. Up to the first difference that is exactly its own greedy answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from tokenizers import Tokenizer

from lamplighter_agent.package.chat_format import ChatFormat, ChatMessage
from lamplighter_agent.package.fidelity import GenerationFidelity
from lamplighter_builder.progress import Progress
from lamplighter_builder.runner import Runner

PROMPTS: Final = (
    "Explain in a few sentences why ships need lighthouses.",
    "List five things to check before starting an old engine.",
    "Write a Python function that returns the largest number of a list.",
    "Translate into German: The pump stopped at noon because the filter was full.",
    "A train leaves at 9:40 and arrives at 11:05. How long does it travel?",
    "Tell a short story about a cat that lives in a harbour.",
    "Was bedeutet es, wenn die Kontrollleuchte rot blinkt?",
    "Summarise: Sensors report once a minute; alarms are sent at once; every night the log is compressed and stored.",
)
"""Answered by every package that is compared; none is among the calibration texts."""

_ANSWER_TOKENS: Final = 64
_LONGEST_PERIOD: Final = 16
_LOOP_TOKENS: Final = 20
"""Tokens of an answer's end that repeat what came one period before, for it to count as a loop."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A prompt and the greedy tokens behind it."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]


def encode_prompt(prompt: str, tokenizer: Tokenizer, chat_format: ChatFormat | None) -> list[int]:
    """Return a user's prompt in tokens, in the model's chat format if it has one."""
    if chat_format is None:
        return list(tokenizer.encode(prompt).ids)
    text = "".join(segment.text for segment in chat_format.render([ChatMessage("user", prompt)]))
    return list(tokenizer.encode(text, add_special_tokens=False).ids)


def generate_answers(
    runner: Runner, prompts: Sequence[Sequence[int]], eos: frozenset[int], context: int, progress: Progress
) -> list[Answer]:
    """Let a package answer prompts, greedily and with a bound on length.

    Prompts are cut to half of ``context``, the model's ``max_position_embeddings``, and answers end with it.
    """
    progress.stage("fidelity: answers", len(prompts))
    answers = []
    for whole in prompts:
        prompt = whole[: context // 2]
        greedy = runner.greedy(list(prompt), min(_ANSWER_TOKENS, context - len(prompt)), eos)
        answers.append(Answer(tuple(prompt), tuple(chosen.token for chosen in greedy)))
        progress.advance(1)
    return answers


def loop_begin(tokens: Sequence[int]) -> int | None:
    """Return where the tokens begin to repeat themselves until their end, or None if they do not.

    It is the index of the first token that repeats another, with the shortest period.
    """
    for period in range(1, _LONGEST_PERIOD + 1):
        begin = len(tokens)
        while begin > period and tokens[begin - 1] == tokens[begin - 1 - period]:
            begin -= 1
        if len(tokens) - begin >= _LOOP_TOKENS:
            return begin
    return None


def compare_answers(answers: Sequence[Answer], expected: Sequence[Sequence[int]]) -> GenerationFidelity:
    """Compare answers with what the reference would choose at each place.

    Args:
        answers: At least one, each of at least one token.
        expected: For each answer the reference's choices, given the prompt and the answer so far.
    """
    tokens = agreed = identical = loops = before = 0
    for answer, choices in zip(answers, expected, strict=True):
        same = [found == wanted for found, wanted in zip(answer.tokens, choices, strict=True)]
        tokens += len(same)
        agreed += sum(same)
        identical += all(same)
        before += same.index(False) if False in same else len(same)
        begin = loop_begin(answer.tokens)
        # Where the reference, put into the loop, would stay in it as well, it is no fault of the package's.
        loops += begin is not None and not all(same[begin:])
    return GenerationFidelity(
        prompts=len(answers),
        tokens=tokens,
        agreement=agreed / tokens,
        identical_answers=identical,
        tokens_until_difference=before / len(answers),
        endless_loops=loops,
    )
