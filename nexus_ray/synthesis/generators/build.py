"""From any generator's config section to the generator, or to its revision alone."""

from __future__ import annotations

from collections.abc import Callable

from nexus_ray.config.generators import AnthropicGenerator, LocalGenerator, OpenAIGenerator, ServedGenerator
from nexus_ray.synthesis.generators.gate import Gate
from nexus_ray.synthesis.generators.protocol import Generator
from nexus_ray.synthesis.generators.remote import remote_revision, remote_teacher

AnyGenerator = OpenAIGenerator | AnthropicGenerator | LocalGenerator | ServedGenerator


def asks_gate(config: AnyGenerator) -> bool:
    """Whether a server answers, at whose gate each call asks for itself."""
    return not isinstance(config, LocalGenerator)


def generator_revision(
    config: AnyGenerator, *, storage: str, gpu: bool = False, progress: Callable[[str], None] = lambda text: None
) -> str:
    """What decides the distribution of answers; a GGUF file is converted first, under `storage`.

    Raises ConfigError if a local model cannot be read.
    """
    if isinstance(config, LocalGenerator):
        from nexus_ray.synthesis.generators.local import local_revision

        return local_revision(config, storage=storage, device="cuda" if gpu else "cpu", progress=progress)
    if isinstance(config, ServedGenerator):
        from nexus_ray.synthesis.generators.served import model_content, served_revision

        return served_revision(config, model_content(config)[1])
    return remote_revision(config)


def build_generator(
    config: AnyGenerator,
    *,
    storage: str,
    gate: Gate | None = None,
    holder: str = "",
    threads: int | None = None,
    gpu: bool = False,
    proven: bool = False,
) -> Generator:
    """The generator, in this process. `gate`, `holder`, `proven`: see `remote_teacher`; `threads`: of a local model.

    Raises ConfigError: the model cannot be read, a package or a key is missing.
    """
    if isinstance(config, LocalGenerator):
        from nexus_ray.synthesis.generators.local import local_teacher

        return local_teacher(config, storage=storage, threads=threads, device="cuda" if gpu else "cpu")
    if isinstance(config, ServedGenerator):
        from nexus_ray.synthesis.generators.served import served_teacher

        return served_teacher(config, gate=gate, holder=holder)
    return remote_teacher(config, gate=gate, holder=holder, proven=proven)
