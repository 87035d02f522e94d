"""One URL of a reward server, with a circuit breaker: after failures it gets fewer requests, until one succeeds."""

import random
import time
from dataclasses import dataclass

FAILURES_UNTIL_DOWN = 3  # consecutive failures after which an endpoint counts as down
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 15.0  # seconds without requests: after the first failure, and at most


@dataclass
class Endpoint:
    """A URL, the requests in flight to it, and its circuit breaker.

    After a failure the endpoint gets no request until `retry_at`. The pause doubles with each further failure. Then the
    endpoint gets one request at a time, until one succeeds.

    Attributes:
        in_flight: requests that were sent and are not answered.
        seconds: moving average of the duration of a request.
        failures: consecutive failures.
        failed_at, retry_at: when the last failure was noticed, and when the next request may be sent.
        reason: why the last request failed.
        down_since, reported_at: when the endpoint went down, and when the user was last told; `reported_at` is 0 while
            the endpoint is up. All times are those of `time.monotonic`.
    """

    url: str
    in_flight: int = 0
    seconds: float = 0.0
    failures: int = 0
    failed_at: float = 0.0
    retry_at: float = 0.0
    reason: str = ""
    down_since: float = 0.0
    reported_at: float = 0.0

    @property
    def down(self) -> bool:
        """Whether the last FAILURES_UNTIL_DOWN requests failed."""
        return self.failures >= FAILURES_UNTIL_DOWN

    @property
    def expected_seconds(self) -> float:
        """Expected time until a request that is sent now is answered."""
        return (self.in_flight + 1) * self.seconds

    def ready(self, concurrency: int) -> bool:
        """Whether a request may be sent now, where at most `concurrency` may be in flight."""
        return time.monotonic() >= self.retry_at and self.in_flight < (1 if self.failures else concurrency)

    def succeeded(self, seconds: float) -> None:
        """Record that a request was answered after this time."""
        self.failures = 0
        self.seconds += (seconds - self.seconds) * (0.2 if self.seconds else 1.0)

    def failed(self, sent: float, reason: str) -> None:
        """Record that a request failed which was sent at this time (`time.monotonic`)."""
        if sent < self.failed_at:  # requests in flight at the same time fail together and count as one failure
            return
        now = time.monotonic()
        self.failures, self.failed_at, self.reason = self.failures + 1, now, reason
        longest = min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** min(self.failures - 1, 16))
        self.retry_at = now + random.uniform(0.5, 1) * longest
        if self.failures == FAILURES_UNTIL_DOWN:
            self.down_since = now

    def busy(self, seconds: float) -> None:
        """Record that the server asked for a pause of so many seconds; this is no failure."""
        pause = max(0.1, min(seconds, LONGEST_PAUSE))
        self.retry_at = time.monotonic() + pause * random.uniform(1, 1.5)
