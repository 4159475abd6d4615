"""Beams in the scheduler: each is a sequence in a slot of its own, and one of them leads the search for all."""

from __future__ import annotations

from lamplighter_agent.engine.beam import BeamRules, BeamSearch, Hypothesis, place_beams
from lamplighter_agent.engine.detokenizer import StopStrings
from lamplighter_agent.engine.events import Choice, Event, FinishReason, TextDelta
from lamplighter_agent.engine.request import Request
from lamplighter_agent.engine.sampling import Sampler
from lamplighter_agent.engine.sequence import Sequence
from lamplighter_agent.engine.truncation import Logits


class BeamSequence(Sequence):
    """One beam. All beams of a request are taken a step further, and end, together.

    Args:
        request: The request.
        sampler: Knows rules and stop tokens.
        vocab_size: Tokens that may occur.
        leader: The beam that computed the prompt, None for that one itself.
    """

    together = True

    def __init__(
        self, request: Request, sampler: Sampler, *, vocab_size: int, leader: BeamSequence | None = None
    ) -> None:
        super().__init__(request, sampler)
        self._vocab_size = vocab_size
        self._leader = self if leader is None else leader
        self._beams: list[BeamSequence] = [self]
        self._search: BeamSearch = self._make_search() if leader is None else leader._search

    def _make_search(self) -> BeamSearch:
        params, sampler = self.request.params, self.sampler
        rules = BeamRules(
            params.num_beams,
            limit=self.request.limit,
            stop_ids=sampler.stop_ids,
            length_penalty=1.0 if params.length_penalty is None else params.length_penalty,
            early_stopping=params.early_stopping or False,
        )
        return BeamSearch(rules, sampler.history, processors=sampler.processors, ends_text=self._ends_text)

    @property
    def width(self) -> int:
        """Slots that the request needs once its prompt is computed."""
        return self.request.params.num_beams

    @property
    def cache_prompt(self) -> bool:
        """True if the prefix cache may serve it: of all beams the first."""
        return super().cache_prompt and self.leads

    @property
    def leads(self) -> bool:
        """True for the one beam that stands for all."""
        return self._leader is self

    def take_beams(
        self, logits: dict[Sequence, Logits], now: float
    ) -> tuple[list[tuple[Sequence, Sequence]], FinishReason | None]:
        """Take all beams of the request a token further; the leader does.

        Args:
            logits: float32 [n] behind the last token of each beam.
            now: Monotonic time.

        Returns:
            Which beams' cache rows must be copied over which others', and "stop" once the search is over.

        Raises:
            EngineError: If logits are not finite.
        """
        search, beams = self._search, self._beams
        parents, tokens = search.step([logits[beam] for beam in beams], self._vocab_size)
        self.request.note_token(now)
        rows, copies = place_beams(list(range(len(beams))), parents)
        moves: list[tuple[Sequence, Sequence]] = [(beams[source], beams[target]) for source, target in copies]
        self._beams = [beams[row] for row in rows]
        for beam, token_id in zip(self._beams, tokens, strict=True):
            beam.last_token = token_id
            beam.generated = search.generated
        return moves, "stop" if search.done else None

    def finish(self, reason: FinishReason, now: float) -> list[Event]:
        """Return the best texts and the closing event."""
        found = self._search.best(self.request.params.n) if self.generated else []
        events: list[Event] = []
        for index, hypothesis in enumerate(found):
            text, tokens = self._text(hypothesis)
            events.append(TextDelta(self.request.id, text, tokens, index=index))
            ended: FinishReason = "stop" if hypothesis.complete else "length" if reason == "stop" else reason
            choice = Choice(
                index=index,
                finish_reason=ended,
                text_tail="",
                generated_tokens=len(hypothesis.tokens),
                score=hypothesis.score,
            )
            events += self.request.close(choice, len(found), now, prefilled=self.prompt_prefilled)
        if not found:
            choice = Choice(index=0, finish_reason=reason, text_tail="", generated_tokens=0)
            events += self.request.close(choice, 1, now, prefilled=self.prompt_prefilled)
        return events

    def _make_branches(self) -> list[Sequence]:
        others = [
            BeamSequence(self.request, self.sampler, vocab_size=self._vocab_size, leader=self)
            for _ in range(1, self.width)
        ]
        self._beams += others
        return list(others)

    def _text(self, hypothesis: Hypothesis) -> tuple[str, tuple[int, ...]]:
        tokens = hypothesis.tokens
        if tokens and tokens[-1] in self.sampler.stop_ids:
            tokens = tokens[:-1]
        stops = StopStrings(self.request.params.stop)
        text, met = stops.push(self.request.decoder.decode(list(tokens)))
        return text if met else text + stops.finish(), tokens

    def _ends_text(self, tokens: list[int]) -> bool:
        params = self.request.params
        if not params.stop or len(tokens) < params.min_tokens:
            return False
        text = self.request.decoder.decode(tokens)
        return any(stop in text for stop in params.stop)
