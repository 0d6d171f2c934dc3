"""A text classifier from a folder or the hub, for `filters.safety.classifier`.

Invariant: what a text scores is a function of the texts it is judged with, in their order. Matrix kernels add in
another order when a batch has another shape, so callers pass the rows of one answer together, however answers come in.
Nothing that a model brings along is run (`trust_remote_code` is off), and a head that the checkpoint lacks is an error:
`transformers` would fill it with random numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from nexus_ray.config.filters import SafetyModel
from nexus_ray.config.tree import ModelConfig
from nexus_ray.errors import ConfigError
from nexus_ray.hub import hub_answers
from nexus_ray.models.build import context_length, model_config
from nexus_ray.models.fingerprint import model_fingerprint
from nexus_ray.models.tokenizer import load_tokenizer
from nexus_ray.synthesis.rows import content_id

_FIELD = "filters.safety.classifier"


class TextClassifier:
    """A `Classifier` around a sequence-classification model and its tokenizer; made by `load_classifier`."""

    def __init__(self, model: Any, tokenizer: Any, config: SafetyModel) -> None:
        self._model, self._tokenizer, self._config = model.eval(), tokenizer, config
        self._unsafe = unsafe_places(model.config, config)
        self._alone = model.config.problem_type == "multi_label_classification" or model.config.num_labels == 1
        pad = tokenizer.pad_token_id
        can_pad = pad is not None and pad == model.config.get_text_config().pad_token_id
        self._batch = config.batch_size if can_pad else 1

    def __call__(self, texts: Sequence[str]) -> list[float]:
        """Harmfulness of each text in [0, 1]: that of its worst piece."""
        pieces = [(place, ids) for place, text in enumerate(texts) for ids in self._pieces(text)]
        worst = [0.0] * len(texts)
        for start in range(0, len(pieces), self._batch):
            some = pieces[start : start + self._batch]
            for (place, _), harm in zip(some, self._harm([ids for _, ids in some]), strict=True):
                worst[place] = max(worst[place], harm) if harm == harm else harm
        return worst

    def _pieces(self, text: str) -> list[list[int]]:
        """Token ids of the text in pieces, each with the special tokens that the model expects around a text."""
        settings = {"truncation": True, "max_length": self._config.max_tokens, "return_overflowing_tokens": True}
        pieces: list[list[int]] = self._tokenizer(text, **settings)["input_ids"]
        return [ids for ids in pieces if ids]

    @torch.inference_mode()
    def _harm(self, pieces: list[list[int]]) -> list[float]:
        batch = self._tokenizer.pad({"input_ids": pieces}, padding=self._batch > 1, return_tensors="pt")
        batch = {name: value.to(self._model.device) for name, value in batch.items()}
        logits = self._model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.double()
        if self._alone:
            return logits.sigmoid()[:, self._unsafe].amax(1).tolist()
        return logits.softmax(1)[:, self._unsafe].sum(1).clamp(max=1.0).tolist()


def load_classifier(config: SafetyModel) -> TextClassifier:
    """The classifier of a config section, on its device.

    Raises ConfigError if it cannot be read, has no trained head, lacks a label or has fewer positions than
    `max_tokens`, or if there is no such device.
    """
    from transformers import AutoModelForSequenceClassification

    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"{_FIELD}.device=cuda: this process sees no GPU; set gpus_per_worker of the job, or cpu")
    _check(config)
    source = Path(config.model).expanduser()
    try:
        model, info = AutoModelForSequenceClassification.from_pretrained(
            str(source) if source.is_dir() else config.model,
            revision=config.revision or "main",
            local_files_only=source.is_dir() or not hub_answers(),
            trust_remote_code=False,
            dtype=torch.float32,
            output_loading_info=True,
        )
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"{_FIELD}.model={config.model!r} is no text classifier that can be read ({reason}); name a folder, or a "
            f"Hugging Face id that this machine can reach"
        ) from None
    if missing := sorted(info["missing_keys"]):
        raise ConfigError(
            f"{_FIELD}.model={config.model!r} lacks the weights {', '.join(missing[:3])}: it was not trained as a "
            f"classifier; name one that was"
        )
    return TextClassifier(model.to(config.device), _tokenizer(config), config)


def classifier_fingerprint(config: SafetyModel) -> str:
    """Hash of weights, tokenizer and settings: what its figures depend on. Loads no weights.

    Raises ConfigError as `load_classifier` does for what shows without them.
    """
    _check(config)
    settings = config.model_dump(exclude={"model", "revision"})
    weights = model_fingerprint(_source(config), vocab_size=0, eos_id=0, seed=0)
    return content_id("classifier", [weights, _tokenizer(config).backend_tokenizer.to_str(), settings])


def unsafe_places(shape: Any, config: SafetyModel) -> list[int]:
    """Places of the unsafe labels among the model's outputs. Raises ConfigError naming one that is none of them."""
    places = {str(label): int(place) for place, label in shape.id2label.items()}
    for label in config.unsafe:
        if label not in places:
            raise ConfigError(
                f"{_FIELD}.unsafe={label!r} is no label of {config.model}; its labels are {', '.join(places)}"
            )
    return sorted({places[label] for label in config.unsafe})


def _check(config: SafetyModel) -> None:
    source = _source(config)
    try:
        unsafe_places(model_config(source), config)
        limit = context_length(source)
    except ConfigError as error:
        raise ConfigError(str(error).replace("model.source=", f"{_FIELD}.model=")) from None
    if limit is not None and config.max_tokens > limit:
        raise ConfigError(
            f"{_FIELD}.max_tokens={config.max_tokens} exceeds the {limit} tokens that {config.model} is made for; "
            f"lower it"
        )


def _source(config: SafetyModel) -> ModelConfig:
    return ModelConfig(source=config.model, revision=config.revision)


def _tokenizer(config: SafetyModel) -> Any:
    return load_tokenizer(_source(config), field=f"{_FIELD}.model")
