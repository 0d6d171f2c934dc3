"""Filters: documents per second and core, over `datatrove` doing the same checks; and from one process to two.

The same checks with equal thresholds, ours | datatrove's:

- format: no `lorem ipsum`, no `{` | C4QualityFilter, its other rules off
- length: 50 to 100,000 words | GopherQualityFilter, its other rules off
- repetition: Gopher's thirteen limits | GopherRepetitionFilter, its defaults
- contamination: 13 words in a row of held-out text | NGramsDecontFilter; ours looks for light edits and short items too
- exact: case and white space aside | ExactDedup, its three stages
- near: Jaccard similarity 0.7, verified | MinHash, 14 buckets of 8 (0.72), its four stages

Language, personal data and safety are left out on both sides: datatrove's need a download or change the text. Its steps
leave out what an earlier one rejected; ours asks all cheap filters about every row. Documents are scenes of Shakespeare
and Wikipedia articles of all lengths; into some, copies, edited copies, held-out passages and loops are planted, for
which the real ones give little occasion. Whether both reject the same is reported before any rate.

datatrove runs with spaCy's words, its default, and with words by a regular expression. Rates are per second of
processor time, so that they are those of a core that nobody else uses; rates by the clock stand beside them.

Scaling: one process that does everything, against two that judge and a third that remembers, in plan order; by the
clock, which needs two idle cores, and by what the processor time would allow on two cores.
"""

from __future__ import annotations

import importlib.metadata
import multiprocessing
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from nexus_ray.config.filters import FiltersConfig
from nexus_ray.config.load import load_config
from nexus_ray.corpora.sources import open_source
from nexus_ray.storage import Storage
from nexus_ray.synthesis.filters import FilterChain, Text, build_chain
from tests.benchmarks.datatrove_filters import FORBIDDEN, NGRAM, DatatroveFilters
from tests.benchmarks.figures import Bar, Outcome, paired_ratio

ROOT = Path(__file__).resolve().parents[2]
SETTINGS: dict[str, Any] = {
    "documents": 3000,
    "held_out": 200,
    "rounds": 2,
    "scaling_documents": 8000,  # a run of 3,000 takes two processes less than a second, its beginning and end included
    "scaling_rounds": 7,
}
QUICK: dict[str, Any] = {"documents": 60, "held_out": 5, "rounds": 1, "scaling_documents": 120, "scaling_rounds": 1}
PLANTED = {"copy": 0.03, "edited": 0.03, "passage": 0.02, "loop": 0.01}
"""Shares of the documents."""
EDITED_WORDS = 0.03
PASSAGE_WORDS = 40
BATCH = 64
SPEED_LIMIT, SCALING_LIMIT = 1.0, 1.7


def run(
    folder: Path, *, documents: int, held_out: int, rounds: int, scaling_documents: int, scaling_rounds: int
) -> Outcome:
    texts, unseen = material(folder, documents, held_out)
    outcome = Outcome(
        f"filters: {len(texts)} documents, {sum(map(len, texts)) / len(texts):.0f} characters in the mean",
        ("documents/s", "other", "ours", "ours/other", "least"),
    )
    ours = our_rejections(texts, unseen)  # untimed, as the peers' first run below: warms up
    for name, plain_words in (("datatrove", False), ("datatrove, plain words", True)):
        peer = DatatroveFilters(folder / "datatrove", unseen, plain_words=plain_words)
        _agreement(outcome, name, peer.run(texts), ours, len(texts))
        peers, own = _contest(lambda some=peer: some.run(texts), lambda: our_rejections(texts, unseen), rounds)
        for place, what in enumerate(("processor time", "the clock")):
            rates = [[len(texts) / one[place] for one in some] for some in (peers, own)]
            shares = paired_ratio(rates[1], rates[0])
            outcome.rows.append((f"{name}, by {what}", *map(median, rates), median(shares), min(shares)))
            outcome.samples[f"{name}, by {what}"] = {"peer": rates[0], "ours": rates[1]}
            if place == 0:
                outcome.bars.append(Bar(f"documents per second and core over {name}", median(shares), SPEED_LIMIT))
    _scaling(outcome, *material(folder, scaling_documents, held_out), scaling_rounds)
    known = {name: importlib.metadata.version(name) for name in ("datatrove", "spacy", "xxhash", "regex")}
    outcome.notes.append(f"peer: {', '.join(f'{name} {version}' for name, version in known.items())}")
    outcome.samples["peer_versions"] = known
    return outcome


# --- documents ---------------------------------------------------------------------------------------------------


def material(folder: Path, count: int, held_out: int) -> tuple[list[str], list[str]]:
    """Documents with what is planted in them, in mixed order; and held-out texts."""
    config = load_config(ROOT / "configs" / "experiments" / "smollm2" / "run.yaml", [f"storage={folder / 'runs'}"])
    shared = Storage(config.storage).child("_shared")
    texts: list[str] = []
    for domain in ("shakespeare", "general"):
        corpus = open_source(domain, config.domains[domain], shared)
        texts += [document.text for item in corpus.items() for document in corpus.read(item)]
    rng = random.Random(0)
    texts = [text for text in dict.fromkeys(texts) if text.strip()]
    rng.shuffle(texts)
    long = [place for place, text in enumerate(texts) if len(text.split()) >= 2 * PASSAGE_WORDS]
    unseen = [texts[place] for place in long[:held_out]]
    rest = [text for place, text in enumerate(texts) if place not in set(long[:held_out])]
    real = rest[: round(count * (1 - sum(PLANTED.values())))]
    planted = [
        text for kind, share in PLANTED.items() for text in _planted(kind, round(count * share), real, unseen, rng)
    ]
    mixed = real + planted
    rng.shuffle(mixed)
    return mixed, unseen


def _planted(kind: str, count: int, real: Sequence[str], unseen: Sequence[str], rng: random.Random) -> Iterator[str]:
    long = [text for text in real if len(text.split()) >= 100]
    for text in rng.sample(long, min(count, len(long))):
        words = text.split(" ")
        if kind == "copy":
            yield text.upper()
        elif kind == "edited":
            yield " ".join("indeed" if rng.random() < EDITED_WORDS else word for word in words)
        elif kind == "passage":
            source = rng.choice(unseen).split(" ")
            start = rng.randrange(max(len(source) - PASSAGE_WORDS, 1))
            half = len(words) // 2
            yield " ".join([*words[:half], *source[start : start + PASSAGE_WORDS], *words[half:]])
        else:
            yield " ".join(words[:30] * 8)


# --- ours --------------------------------------------------------------------------------------------------------


def our_config() -> FiltersConfig:
    """The checks that datatrove has too; every other filter off."""
    lorem, brace = FORBIDDEN
    return FiltersConfig.model_validate(
        {
            **dict.fromkeys(FiltersConfig.model_fields),
            "format": {"forbidden": [f"(?i){lorem}", rf"\{brace}"], "assistant_phrases": "any"},
            "length": {"min_words": 50, "max_words": 100_000},
            "repetition": {"short_words": 0},
            "contamination": {"ngram": NGRAM},
            "exact": {},
            "near": {"jaccard": 0.7},
        }
    )


def our_chain(unseen: Sequence[str]) -> FilterChain:
    return build_chain(our_config(), held_out=[(str(number), text) for number, text in enumerate(unseen)])


_CHAINS: dict[int, FilterChain] = {}


def our_rejections(texts: Sequence[str], unseen: Sequence[str]) -> dict[int, str]:
    """Which documents are rejected, and by which check, in one process. The held-out index is built once."""
    chain = our_chain(()) if not unseen else _fresh(unseen)
    rejected: dict[int, str] = {}
    for number, raw in enumerate(texts):
        text = Text(raw)
        reason = chain.judge(text).reason or _in_order(chain, text)
        if reason:
            rejected[number] = reason.partition(":")[0]
    return rejected


def _in_order(chain: FilterChain, text: Text) -> str:
    reason = chain.judge_in_order(text).reason
    if not reason:
        chain.remember(text)
    return reason


def _fresh(unseen: Sequence[str]) -> FilterChain:
    """The stateless filters made once (as the peer's), those that remember anew."""
    if id(unseen) not in _CHAINS:
        _CHAINS[id(unseen)] = our_chain(unseen)
    return FilterChain(_CHAINS[id(unseen)].cheap, (), our_chain(()).remembering)


# --- two processes -----------------------------------------------------------------------------------------------


def _start(texts: Sequence[str], unseen: Sequence[str]) -> None:
    global _worker_texts, _worker_chain
    _worker_texts, _worker_chain = texts, our_chain(unseen)


def _judge(start: int) -> tuple[list[str | Text], float]:
    """The reason of each rejected document, or the document with what is known of it; seconds of processor time.
    A worker has its documents, as one of a job has the answers that it asked for."""
    used = time.process_time()
    texts = [Text(raw) for raw in _worker_texts[start : start + BATCH]]
    return [_worker_chain.judge(text).reason or text for text in texts], time.process_time() - used


@dataclass
class Pooled:
    """Stateless filters in worker processes, on arrival; those that remember here, in order: as the engine works."""

    pool: Any
    worker_seconds: float = 0.0
    """Processor time of the workers in the latest run."""

    def rejections(self, texts: Sequence[str]) -> dict[int, str]:
        chain = our_chain(())
        rejected: dict[int, str] = {}
        self.worker_seconds = 0.0
        for number, (found, seconds) in enumerate(self.pool.imap(_judge, range(0, len(texts), BATCH))):
            self.worker_seconds += seconds
            for place, one in enumerate(found):
                reason = _in_order(chain, one) if isinstance(one, Text) else one
                if reason:
                    rejected[number * BATCH + place] = reason.partition(":")[0]
        return rejected


def _scaling(outcome: Outcome, texts: Sequence[str], unseen: Sequence[str], rounds: int) -> None:
    with multiprocessing.get_context("fork").Pool(2, _start, (texts, unseen)) as pool, _prompt_threads():
        pooled = Pooled(pool)
        assert pooled.rejections(texts) == our_rejections(texts, unseen)  # also warms up
        one, two, allowed = [_timed(lambda: our_rejections(texts, unseen))], [], []
        for _ in range(rounds):
            two.append(_timed(lambda: pooled.rejections(texts)))
            here = two[-1][0]
            allowed.append(max((here + pooled.worker_seconds) / 2, here))
            one.append(_timed(lambda: our_rejections(texts, unseen)))
    for what, alone, together in (
        ("the clock", [seconds for _, seconds in one], [seconds for _, seconds in two]),
        ("processor time", [seconds for seconds, _ in one], allowed),
    ):
        rates = [[len(texts) / seconds for seconds in some] for some in (alone, together)]
        shares = paired_ratio(rates[1], rates[0])
        outcome.rows.append(
            (f"{len(texts)} in one and two processes, by {what}", *map(median, rates), median(shares), min(shares))
        )
        outcome.samples[f"processes, by {what}"] = {"one": rates[0], "two": rates[1]}
        if what == "the clock":
            outcome.bars.append(Bar("two processes over one, on two cores", median(shares), SCALING_LIMIT))


@contextmanager
def _prompt_threads() -> Iterator[None]:
    """The pool's own threads get their turn at once: what they wait for is not what is measured."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(0.0005)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


# --- figures -----------------------------------------------------------------------------------------------------


def _contest(
    theirs: Callable[[], Any], ours: Callable[[], Any], rounds: int
) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """The peer `rounds` + 1 times, and ours between them: seconds of each."""
    peers, own = [_timed(theirs)], []
    for _ in range(rounds):
        own.append(_timed(ours))
        peers.append(_timed(theirs))
    return peers, own


def _timed(work: Callable[[], Any]) -> tuple[float, float]:
    """Seconds of processor time of this process, and by the clock."""
    began, used = time.perf_counter(), time.process_time()
    work()
    return time.process_time() - used, time.perf_counter() - began


def _agreement(outcome: Outcome, name: str, theirs: dict[int, str], ours: dict[int, str], count: int) -> None:
    """How far both reject the same documents, for the notes and the record."""
    both, either = theirs.keys() & ours.keys(), theirs.keys() | ours.keys()
    agreed = count - len(either) + len(both)
    differing = Counter(f"{theirs.get(number, 'kept')} | {ours.get(number, 'kept')}" for number in either - both)
    outcome.notes.append(
        f"{name}: agreement on {agreed / count:.2%} of {count} documents; rejected by it {len(theirs)}, by ours "
        f"{len(ours)}, by both {len(both)}; it | ours where they differ: "
        f"{', '.join(f'{what} {number}' for what, number in differing.most_common()) or 'nowhere'}"
    )
    outcome.samples[f"agreement, {name}"] = {
        "documents": count,
        "same": agreed,
        "theirs": dict(Counter(theirs.values())),
        "ours": dict(Counter(ours.values())),
        "differing": dict(differing),
    }
