"""What happened to requests since the agent's start."""

from __future__ import annotations

from lamplighter_agent.engine.events import Timings, Usage
from lamplighter_agent.service.telemetry_message import LatencyRecorder


class Counters:
    """What happened since the agent's start; read by telemetry."""

    def __init__(self) -> None:
        self.accepted = 0
        self.refused = 0
        self.failed = 0
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.generated_tokens = 0
        self.last: Timings | None = None
        self.first_token = LatencyRecorder()
        self.token = LatencyRecorder()
        self.queue_wait = LatencyRecorder()

    def note(self, usage: Usage, timings: Timings) -> None:
        """Count a finished request."""
        self.prompt_tokens += usage.prompt_tokens
        self.cached_tokens += usage.cached_tokens
        self.generated_tokens += usage.generated_tokens
        self.queue_wait.add(timings.queue_s)
        if usage.generated_tokens:
            self.last = timings
            self.first_token.add(timings.first_token_s)
        if usage.generated_tokens > 1:
            self.token.add(timings.decode_s / (usage.generated_tokens - 1))
