"""The mission's `SyntheticPipeline`: generate, filter, check, in one process and without a ledger.

    teacher = build_generator(LocalGenerator(kind="local", model="models/teacher"))
    pipeline = SyntheticPipeline(teacher, QualityFilter(min_length=20), FactChecker())
    texts = pipeline.generate_batch(["Write a story about a fox."], num_candidates=5)

For anything that is paid for, or too much to lose, use a job (`nexus-ray synthesize`): the same parts, with a ledger.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from nexus_ray.errors import ConfigError
from nexus_ray.synthesis.generators.protocol import Generator, generate
from nexus_ray.synthesis.rows import Answer, Failure, Prompt, Request, Row, Sampling, Verdict


class RowFilter(Protocol):
    """`QualityFilter`, or anything like it."""

    def judge(self, item: Row) -> Verdict: ...

    def remember(self, item: Row) -> None: ...


class RowValidator(Protocol):
    """`FactChecker`, or any validator."""

    def validate(self, row: Row) -> Verdict: ...


class SyntheticPipeline:
    """Answers of a generator that a filter passes and a validator, if there is one, does not object to."""

    def __init__(self, generator: Generator, filter: RowFilter | None = None, validator: RowValidator | None = None):
        self.generator = generator
        self.filter = filter
        self.validator = validator
        self.failures: list[Failure] = []
        """Requests of the last batch that got no answer."""
        self.rejected: list[tuple[Row, Verdict]] = []
        """Rows of the last batch that did not pass, flagged ones among them."""

    def generate_batch(
        self, prompts: Sequence[str | Prompt], num_candidates: int = 5, *, sampling: Sampling | None = None
    ) -> list[str]:
        """Accepted texts, in the order of prompts and candidates, whatever order the answers came in.

        Raises ConfigError for fewer than one candidate, SynthesisError if the generator cannot go on.
        """
        return [row.text for row in self.generate_rows(prompts, num_candidates, sampling=sampling)]

    def generate_rows(
        self, prompts: Sequence[str | Prompt], num_candidates: int = 5, *, sampling: Sampling | None = None
    ) -> list[Row]:
        """The same, as rows with their prompts."""
        if num_candidates < 1:
            raise ConfigError(f"num_candidates={num_candidates}: each prompt is asked at least once; use 1 or more")
        asked = [prompt if isinstance(prompt, Prompt) else Prompt(prompt) for prompt in prompts]
        times: Counter[str] = Counter()  # a prompt that comes again is asked for further answers
        requests = []
        for one in asked:
            first = times[one.id]
            times[one.id] += num_candidates
            requests += [Request(one, sampling or Sampling(), first + place) for place in range(num_candidates)]
        arrived = {item.request_id: item for item in generate(self.generator, requests)}
        self.failures = [item for item in arrived.values() if isinstance(item, Failure)]
        self.rejected = []
        return list(self._accepted(requests, arrived.get))

    def _accepted(
        self, requests: Sequence[Request], answer_of: Callable[[str], Answer | Failure | None]
    ) -> Iterator[Row]:
        for request in requests:
            answer = answer_of(request.id(self.generator.revision))
            if not isinstance(answer, Answer):
                continue
            row = Row(answer.text.strip(), answer.request_id, 0, request.prompt, answer.finish_reason)
            verdict = self._verdict(row)
            if verdict.outcome != "pass":
                self.rejected.append((row, verdict))
                continue
            if self.filter is not None:
                self.filter.remember(row)
            yield row

    def _verdict(self, row: Row) -> Verdict:
        if self.filter is not None and (verdict := self.filter.judge(row)).outcome != "pass":
            return verdict
        return self.validator.validate(row) if self.validator is not None else Verdict("pass")
