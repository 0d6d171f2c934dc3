"""What a row must prove before it is accepted: sections of `validators` and the limits of the sandbox."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from nexus_ray.config.methods import Section


class SandboxConfig(Section):
    """Where generated programs run. Limits hold for a program and all that it starts."""

    isolation: Literal["required", "none"] = "required"
    """`required`: own namespaces or no run at all. `none`: generated code runs with the rights of this process and
    with network; only limits of time and memory hold. For machines that are themselves thrown away."""
    wall_seconds: float = Field(10.0, gt=0.0, le=600.0)
    """Seconds until a program is ended."""
    memory_mb: int = Field(512, ge=64, le=65536)
    """MiB of memory, of each process (address space) and of all together (resident)."""
    work_mb: int = Field(16, ge=1, le=4096)
    """MiB of the work folder, and of one file in it."""
    output_kb: int = Field(256, ge=1, le=16384)
    """KiB that a program may print; one that prints more is ended."""
    processes: int = Field(8, ge=1, le=256)
    """Processes and threads at one time, the program's own included."""
    files: int = Field(64, ge=16, le=4096)
    """Open files of each process."""


class GroundedConfig(Section):
    """The answer is supported by the text it was made from (`Prompt.source`)."""

    kind: Literal["grounded"] = "grounded"
    min_words: float = Field(0.6, ge=0.0, le=1.0)
    """Share of a sentence's content words whose stem occurs in the source. Names and numbers count apart."""
    min_sentences: float = Field(1.0, gt=0.0, le=1.0)
    """Share of sentences that must be supported; the others may paraphrase freely, but not with new facts."""
    new_facts: Literal["reject", "flag"] = "reject"
    """What becomes of a row with a number, name or quotation that is not in the source."""


class PythonCodeConfig(Section):
    """The answer's Python code passes its tests in the sandbox."""

    kind: Literal["python_code"] = "python_code"
    tests: str = "tests"
    """Prompt parameter that holds given tests; without it, those in the answer's own code blocks count."""
    without_tests: Literal["reject", "flag", "run"] = "flag"
    """Code that brings no test: reject or flag it unseen, or accept it if it runs to its end."""
    sandbox: SandboxConfig = Field(default_factory=SandboxConfig)


class ArithmeticConfig(Section):
    """Every equation between numbers in the answer holds."""

    kind: Literal["arithmetic"] = "arithmetic"
    answer: str = "answer"
    """Prompt parameter that holds the known final answer, if there is one."""
    require_final: bool = False
    """Whether an answer without a `#### number` line is rejected."""
    min_equations: int = Field(0, ge=0)
    """Fewest equations that must be found."""


class AgreementConfig(Section):
    """Several answers to one prompt agree on the final one (self-consistency, Wang et al. 2022, arXiv:2203.11171)."""

    kind: Literal["agreement"] = "agreement"
    min_share: float = Field(0.5, gt=0.0, le=1.0)
    """Share of all answers, those without a final answer included, that the commonest one must exceed or, at 1, be."""
    min_answers: int = Field(3, ge=2)
    """Fewest answers to vote; with fewer, rows are flagged."""


class JudgeConfig(Section):
    """A model grades the answer, once it has shown on a golden set that it can."""

    kind: Literal["judge"] = "judge"
    rubric: str = "faithful"
    """Name of a rubric that ships with the package, or path of a YAML file (with a slash, or ending in `.yaml`) of
    `question`, `levels`, `accept`, `source` and `examples`."""
    golden: str = "default"
    """`default` (made for `faithful`), or path of a JSON-lines file of `source, question, answer, accept`; without
    `source` if the rubric judges without one."""
    min_precision: float = Field(0.9, gt=0.0, le=1.0)
    """Least share of rightly accepted among accepted golden items; below it the judge is refused."""
    min_precision_low: float = Field(0.65, ge=0.0, lt=1.0)
    """Least lower end of that share's 95 % interval, which a short golden set cannot reach: 2 items, both rightly
    accepted, promise 0.34, 8 promise 0.68, 14 with one wrong 0.69."""
    min_recall: float = Field(0.5, ge=0.0, le=1.0)
    """Least share of the acceptable golden items that are accepted: a judge that rejects all is refused too."""
    max_order_swaps: float = Field(0.2, ge=0.0, le=1.0)
    """Largest share of pairs whose winner changes when the two answers change places."""
    max_length_swaps: float = Field(0.2, ge=0.0, le=1.0)
    """Largest share of golden items whose grade rises when empty words are added."""
    max_unparsed: float = Field(0.1, ge=0.0, le=1.0)
    """Largest share of replies that do not follow the demanded form."""


def is_rubric_path(rubric: str) -> bool:
    """Whether a judge's `rubric` is a file, not the name of one that ships with the package."""
    return "/" in rubric or rubric.endswith((".yaml", ".yml"))


ValidatorConfig = Annotated[
    GroundedConfig | PythonCodeConfig | ArithmeticConfig | AgreementConfig | JudgeConfig, Field(discriminator="kind")
]


class ValidatorsConfig(Section):
    """Validators in order; the first one that does not pass a row decides. Agreement, which needs all answers to a
    prompt at once, comes last."""

    validators: list[ValidatorConfig] = Field(default_factory=list)

    @model_validator(mode="after")
    def _agreement_last(self) -> ValidatorsConfig:
        kinds = [one.kind for one in self.validators]
        if "agreement" in kinds[:-1]:
            raise ValueError("validators: `agreement` needs all answers to a prompt and must be the last one")
        return self
