"""Chat templates as released models have them, small tokenizers to go with them, and conversations, for tests."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from tests.corpus import WORDS

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""SmolLM2-135M-Instruct's."""
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
"""Meta-Llama-3-8B-Instruct's."""
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
"""Mistral-7B-Instruct's: no generation prompt of its own, a blank before each answer, no system turns."""
SPECIAL = {
    "chatml": ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    "llama3": ("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"),
    "mistral": ("<s>", "</s>"),
}
TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "mistral": MISTRAL}
BOS = {"llama3": "<|begin_of_text|>", "mistral": "<s>"}
EOS = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "mistral": "</s>"}


def chat_tokenizer(folder: Path, name: str, *, template: str | None = None, metaspace: bool = False) -> Path:
    """A tokenizer of about 400 entries with the template and the special tokens of `name`.

    Byte-level, or in the way of SentencePiece (`metaspace`), which puts a space before every text it is given.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = list(SPECIAL[name])
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    if metaspace:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
        alphabet = [chr(i) for i in range(32, 127)] + ["\n", "▁"]
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([" ".join(WORDS), "user assistant system\n\n[INST] [/INST]"] * 3, trainer)
    if name in BOS:  # what a tokenizer adds to plain text must not be added to a rendering
        bos = BOS[name]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    settings: dict[str, Any] = {"eos_token": EOS[name], "additional_special_tokens": special}
    if name in BOS:
        settings["bos_token"] = BOS[name]
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **settings)
    made.chat_template = TEMPLATES[name] if template is None else template
    made.save_pretrained(folder)
    return folder


def talk(*turns: str, system: str | None = None) -> list[dict[str, str]]:
    """Messages of user and assistant in turn."""
    opening = [] if system is None else [{"role": "system", "content": system}]
    roles = ("user", "assistant")
    return opening + [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]


def conversations(count: int, *, seed: int = 0, turns: int = 2, words: int = 12) -> list[list[dict[str, str]]]:
    """Distinct conversations of one to `turns` questions with answers."""
    chosen = random.Random(seed)

    def text() -> str:
        return " ".join(chosen.choices(WORDS, k=chosen.randint(1, words)))

    made = []
    for number in range(count):
        said = [part for _ in range(chosen.randint(1, turns)) for part in (text() + "?", text() + ".")]
        made.append(talk(f"{number}: {said[0]}", *said[1:]))
    return made


def write_jsonl(file: Path, made: list[list[dict[str, str]]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in made))
    return file
