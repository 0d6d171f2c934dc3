"""Chat domains and fine-tuning stages in a config: what goes together, and clear faults for the rest."""

from __future__ import annotations

import pytest

from nexus_ray.config import Hardware, fingerprint, load_config, resolve, to_yaml
from nexus_ray.errors import ConfigError
from tests.configs import two_stages

CHAT = """
name: chat
domains:
  letters: {source: {kind: files, paths: [letters.txt]}}
  helper: {format: chat, source: {kind: files, paths: [chat.jsonl]}}
stages:
  - {name: letters, domains: {letters: 1}}
  - {name: helper, kind: sft, domains: {helper: 1}, replay: {letters: 1}}
"""


def fault(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        two_stages(*overrides, text=CHAT)
    return str(caught.value)


def test_a_chat_domain_and_a_fine_tuning_stage() -> None:
    config = two_stages(text=CHAT)
    assert [stage.kind for stage in config.stages] == ["cpt", "sft"]
    assert config.domains["helper"].chat is None and config.domains["letters"].format == "text"
    pair = two_stages("domains.helper.chat={layout: pair, prompt_field: q}", text=CHAT)
    assert pair.domains["helper"].chat is not None and pair.domains["helper"].chat.fields == ("q", "completion")
    assert fingerprint(pair) != fingerprint(config)
    anchored = two_stages(
        "anchors=[spare]", "domains.spare={format: chat, source: {kind: hub, dataset: a/b}}", text=CHAT
    )
    assert anchored.domains["spare"].source.kind == "hub"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["stages.1.kind=cpt"], "stages.1.kind='cpt' learns domains of format 'text', and domains.helper.format is "
         "'chat'; set kind: sft here, or format: text there"),
        (["stages.0.kind=sft"], "stages.0.kind='sft' learns domains of format 'chat', and domains.letters.format is "
         "'text'; set kind: cpt here, or format: chat there"),
        (["stages.1.kind=stf"], "stages.1.kind='stf': must be one of cpt, dap, sft; did you mean 'sft'?"),
        (["domains.helper.source={kind: stdlib}"], "domains.helper.format='chat' needs records, and source.kind: "
         "stdlib has none"),
        (["domains.helper.source.split_on=x"], "domains.helper.source.split_on='x': a conversation is never cut"),
        (["domains.helper.source.text_field=m"], "domains.helper.source.text_field='m' is not read by format: chat; "
         "name the fields of a conversation in domains.helper.chat"),
        (["domains.helper.source.format=text"], "domains.helper.source.format='text' holds no conversations"),
        (["domains.letters.chat={layout: pair}"], "domains.letters.chat is used only by format: chat"),
        (["domains.helper.chat={layout: pair, turns_field: x}"], "domains.helper.chat.turns_field='x' is not read by "
         "layout: pair"),
        (["domains.helper.chat={turn_field: x}"], "turn_field='x': unknown key; did you mean "
         "domains.helper.chat.turns_field?"),
        (["domains.helper.format=chats"], "domains.helper.format='chats': must be one of text, chat"),
    ],
)  # fmt: skip
def test_what_does_not_go_together(overrides: list[str], expected: str) -> None:
    found = fault(*overrides)
    assert expected in found and found.startswith("two.yaml: 1 fault\n"), found


def test_it_resolves_and_loads_again(tmp_path) -> None:
    config = two_stages("model.tokenizer.chat_template=own.jinja", text=CHAT)
    resolved = resolve(config, Hardware(cpus=2, amx_bf16=False))
    assert str(resolved.model.tokenizer.chat_template).startswith("/")
    file = tmp_path / "run.yaml"
    file.write_text(to_yaml(resolved))
    assert load_config(file) == resolved
    plain = resolve(two_stages("model.tokenizer.chat_template=default", text=CHAT), Hardware(cpus=2, amx_bf16=False))
    assert plain.model.tokenizer.chat_template == "default"
