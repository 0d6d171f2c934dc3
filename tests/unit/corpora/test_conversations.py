"""From records to canonical conversations; a record that is none names itself and the way out."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nexus_ray.config.tree import ChatConfig, DomainConfig, FilesSource
from nexus_ray.corpora.conversations import canonical, contents, conversation_text, messages_of
from nexus_ray.corpora.sources import open_source
from nexus_ray.corpora.sources.records import parse
from nexus_ray.errors import DataError
from nexus_ray.storage import Storage
from tests.chats import talk

TALK = talk("wer?", "der König", system="kurz")
RECORDS: dict[str, Any] = {
    "messages": {"messages": [{**turn, "weight": 1} for turn in TALK], "source": "x"},
    "sharegpt": {
        "conversations": [
            {"from": "system", "value": "kurz"},
            {"from": "human", "value": "wer?"},
            {"from": "gpt", "value": "der König"},
        ]
    },
}


def text_of(record: Any, **chat: Any) -> str:
    return conversation_text(record, ChatConfig(**chat), "a.jsonl, line 3", "domains.helper.source")


@pytest.mark.parametrize("layout", ["messages", "sharegpt"])
def test_layouts_give_the_same_canonical_text(layout: Any) -> None:
    assert text_of(RECORDS[layout], layout=layout) == canonical(TALK)
    assert messages_of(canonical(TALK)) == TALK and "König" in canonical(TALK)
    assert contents(canonical(TALK)) == "### System\nkurz\n\n### User\nwer?\n\n### Assistant\nder König"


def test_pairs_and_other_field_names() -> None:
    assert text_of({"q": "wer?", "a": "ich"}, layout="pair", prompt_field="q", completion_field="a") == canonical(
        talk("wer?", "ich")
    )
    assert text_of({"turns": TALK}, turns_field="turns") == canonical(TALK)


@pytest.mark.parametrize("record", [{"messages": []}, {"messages": None}, {"messages": talk("wer?", " \n")}])
def test_nothing_to_learn_is_an_empty_text(record: dict[str, Any]) -> None:
    assert text_of(record) == ""


MISTAKES: list[tuple[Any, str]] = [
    ([1], "a list is no record"),
    ({"text": "x"}, r"no field 'messages' \(domains.helper.chat, layout messages\); the fields are text"),
    ({"messages": "x"}, "holds a str, not a list of turns"),
    ({"messages": ["x"]}, "turn 0 is no mapping with 'role' and 'content'"),
    ({"messages": [{"role": "user"}]}, "turn 0 is no mapping with 'role' and 'content'"),
    ({"messages": [*TALK, {"role": "tool", "content": "x"}]}, "turn 3 has the role 'tool'; known are system, user"),
    ({"messages": [{"role": ["user"], "content": "x"}]}, r"turn 0 has the role \['user'\]"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "turn 0 holds a list instead of text"),
    ({"messages": talk("wer?")}, "no turn of the assistant"),
    ({"messages": [{**TALK[2], "tool_calls": [1]}]}, "turn 0 has tool_calls"),
]


@pytest.mark.parametrize(("record", "message"), MISTAKES)
def test_mistakes_name_their_record(record: Any, message: str) -> None:
    with pytest.raises(DataError, match=f"a.jsonl, line 3.*{message}"):
        text_of(record)


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_files_of_conversations(tmp_path: Path, kind: str) -> None:
    records = [RECORDS["messages"], {"messages": talk("a", "b"), "source": "y"}]
    records = [
        {**record, "messages": [{k: turn[k] for k in ("role", "content")} for turn in record["messages"]]}
        for record in records
    ]
    file = tmp_path / f"talk.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(records), file)
    else:
        file.write_text("\n".join(map(json.dumps, records)) if kind == "jsonl" else json.dumps(records))
    source = FilesSource(kind="files", paths=[str(file)], where={"source": "y"})
    domain = DomainConfig(source=source, format="chat")
    corpus = open_source("helper", domain, Storage(str(tmp_path)))
    [document] = [document for item in corpus.items() for document in corpus.read(item)]
    assert document.text == canonical(talk("a", "b")) and document.provenance["file"] == str(file)
    plain = open_source("helper", DomainConfig(source=source), Storage(str(tmp_path)))
    assert corpus.settings() == {**plain.settings(), "chat": ChatConfig().model_dump()}
    other = FilesSource(kind="files", paths=[str(file)])
    with pytest.raises(DataError, match=r"talk.* no field 'dialogue' \(domains.helper.chat|no field 'dialogue'"):
        list(
            parse(
                io.BytesIO(file.read_bytes()),
                file.name,
                other,
                "domains.helper.source",
                ChatConfig(turns_field="dialogue"),
            )
        )


def test_a_text_file_is_no_conversation() -> None:
    source = FilesSource(kind="files", paths=["notes.txt"])
    with pytest.raises(DataError, match=r"notes.txt is read as text, which holds no conversations"):
        list(parse(io.BytesIO(b"x"), "notes.txt", source, "domains.helper.source", ChatConfig()))
