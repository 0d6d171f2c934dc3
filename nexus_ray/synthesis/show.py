"""What `synthesize` shows: the plan before it is paid for, and the funnel, cost and diversity after it."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from nexus_ray.config.tree import RunConfig
from nexus_ray.corpora.prepare import prepare_documents
from nexus_ray.synthesis.budget import price_units
from nexus_ray.synthesis.generators.dispatch import prompt_bound
from nexus_ray.synthesis.job import JobOutcome
from nexus_ray.synthesis.plan import shard_count
from nexus_ray.synthesis.rows import Message, Request, Sampling
from nexus_ray.synthesis.setup import needed_domains, open_job

SHOWN = 2
SAMPLED = 50


def show_plan(config: RunConfig, domain: str, console: Console | None = None) -> None:
    """Print what a job would ask, its upper bounds, and its first prompts; asks nothing."""
    console = console or Console()
    spec = open_job(config, domain, prepare_documents(config, needed_domains(config, domain)))
    section, prompts = spec.config, spec.prompts()
    requests = prompts.size * section.num_candidates
    sampling = Sampling(section.sampling.max_tokens)
    step = max(1, prompts.size // SAMPLED)
    sampled = [prompt_bound(Request(prompts[place], sampling, 0)) for place in range(0, prompts.size, step)]
    asked = round(sum(bound.prompt for bound in sampled) / len(sampled) * requests)
    answered = requests * section.sampling.max_tokens
    shards = shard_count(section.shard_requests, requests)
    console.print(
        f"{domain}: {prompts.size:,} prompts x {section.num_candidates} = {requests:,} requests, {shards} shards"
    )
    console.print(f"generator {spec.job.revision}, {section.workers} workers; ledger {spec.ledger.uri}")
    console.print(f"at most {asked:,} prompt tokens (about) and {answered:,} answered ones")
    price = section.budget.prices.get(section.generator.model)
    if price is not None:
        console.print(
            f"at most {price_units(price, asked, answered) / 10**12:,.2f} of money, at the prices of the budget"
        )
    for place in range(min(SHOWN, prompts.size)):
        content = prompts[place].content
        turns = (Message("user", content),) if isinstance(content, str) else content
        console.print(f"\nprompt {place}:", style="bold")
        for turn in turns:
            console.print(f"  {turn.role}: {turn.content}", markup=False, highlight=False)


def show_outcome(domain: str, outcome: JobOutcome, console: Console | None = None) -> None:
    """Print the funnel, what an accepted row cost, diversity beside the anchor, and unseen text that came in."""
    console = console or Console()
    stats = outcome.stats
    table = Table(title=f"{domain}: what became of it", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for column in ("", "count"):
        table.add_column(column, justify="left" if not column else "right")
    rows = [("requests planned", stats.planned), ("answered", stats.answered), ("failed", stats.failed)]
    rows += [("sent again after a crash", stats.traffic.resent)] if stats.traffic.resent else []
    rows += [("taken over from other ledgers", stats.traffic.borrowed)] if stats.traffic.borrowed else []
    rows += [("rows that wait for shards before them", stats.uncommitted)] if stats.uncommitted else []
    rows += [("rows accepted", stats.accepted), ("rows flagged for review", stats.flagged)]
    rows += [("rows rejected", stats.rejected)]
    rows += [(f"  by {name}", count) for name, count in sorted(stats.rejected_by.items(), key=lambda item: -item[1])]
    for name, count in rows:
        table.add_row(name, f"{count:,}")
    console.print(table)
    if outcome.cost is not None:
        per = ", ".join(f"{value:,.3g} {name}" for name, value in outcome.cost.items())
        console.print(f"per accepted row: {per}")
    for title, lines in (("diversity", outcome.diversity), ("unseen text in accepted rows", outcome.overlap)):
        if lines:
            measured = Table(*lines[0], title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
            for line in lines:
                measured.add_row(*map(_cell, line.values()))
            console.print(measured)
    if outcome.stopped:
        console.print(f"stopped: {outcome.stopped}", highlight=False)
    if stats.flagged > stats.decided:
        console.print(f"{stats.flagged - stats.decided} rows wait for a person: `nexus-ray review CONFIG`")


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
