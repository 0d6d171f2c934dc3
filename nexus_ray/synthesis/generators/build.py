"""From any generator's config section to the generator, or to its revision alone."""

from __future__ import annotations

from nexus_ray.config.generators import (
    AnthropicGenerator,
    LocalGenerator,
    OpenAIGenerator,
    VllmGenerator,
)
from nexus_ray.errors import ConfigError
from nexus_ray.synthesis.generators.gate import Gate
from nexus_ray.synthesis.generators.protocol import Generator
from nexus_ray.synthesis.generators.remote import remote_revision, remote_teacher

AnyGenerator = OpenAIGenerator | AnthropicGenerator | LocalGenerator | VllmGenerator


def is_remote(config: AnyGenerator) -> bool:
    """Whether a server answers, at whose door each call asks for itself."""
    return isinstance(config, OpenAIGenerator | AnthropicGenerator)


def generator_revision(config: AnyGenerator, *, gpu: bool = False) -> str:
    """What decides the distribution of answers. Raises ConfigError if a local model cannot be read."""
    if isinstance(config, OpenAIGenerator | AnthropicGenerator):
        return remote_revision(config)
    if isinstance(config, LocalGenerator):
        from nexus_ray.synthesis.generators.local import local_revision

        return local_revision(config, device="cuda" if gpu else "cpu")
    raise _unknown(config)


def build_generator(
    config: AnyGenerator, *, gate: Gate | None = None, holder: str = "", threads: int | None = None, gpu: bool = False
) -> Generator:
    """The generator, in this process. `gate` and `holder`: see `remote_teacher`; `threads`: of a local model.

    Raises ConfigError: the model cannot be read, a package or a key is missing.
    """
    if isinstance(config, OpenAIGenerator | AnthropicGenerator):
        return remote_teacher(config, gate=gate, holder=holder)
    if isinstance(config, LocalGenerator):
        from nexus_ray.synthesis.generators.local import local_teacher

        return local_teacher(config, threads=threads, device="cuda" if gpu else "cpu")
    raise _unknown(config)


def _unknown(config: AnyGenerator) -> ConfigError:
    return ConfigError(f"generator.kind={config.kind} cannot be built here; use local, openai or anthropic")
