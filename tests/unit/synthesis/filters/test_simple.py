"""Length, finish reason, format, characters, language and repetition, each on texts labelled for it."""

from __future__ import annotations

import pytest

from nexus_ray.config.filters import (
    CharsetFilter,
    FinishFilter,
    FormatFilter,
    LanguageFilter,
    LengthFilter,
    RepetitionFilter,
)
from nexus_ray.synthesis.filters.charset import Charset
from nexus_ray.synthesis.filters.finish import Finish
from nexus_ray.synthesis.filters.format import Format
from nexus_ray.synthesis.filters.language import Language, identify
from nexus_ray.synthesis.filters.length import Length
from nexus_ray.synthesis.filters.repetition import Repetition, measure
from nexus_ray.synthesis.filters.text import Text
from tests.unit.synthesis.filters.samples import CODE, ESSAY, STORY, row

# --- length and finish -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "finding"),
    [
        ("one two three", "too few words"),
        ("one two three four", ""),
        ("one two three four five six seven", "too many words"),
        ("a b c d", "too few characters"),
        ("aaaaaaaaaaaa bbbbbbbbbbbbb cccccccccc dddddd", "too many characters"),
        ("", "too few words"),
        ("...", "too few words"),
    ],
)
def test_length(text: str, finding: str) -> None:
    verdict = Length(LengthFilter(min_words=4, max_words=6, min_chars=8, max_chars=40)).judge(text)
    assert verdict.reason == (finding and f"length: {finding}")
    assert (verdict.outcome == "reject") == bool(finding)
    assert verdict.scores["length.chars"] == len(text)


def test_words_of_unspaced_scripts_are_characters() -> None:
    assert len(Text("今日は天気").words) == 5
    assert Text("Él comió 3 croûtes, naïf!").words == ["él", "comió", "3", "croûtes", "naïf"]


def test_finish() -> None:
    assert Finish().judge(row("a", finish_reason="stop")).outcome == "pass"
    assert Finish().judge(row("a", finish_reason="length")).reason == "finish: length"
    assert Finish(FinishFilter(allow=["stop", "length"])).judge(row("a", finish_reason="length")).outcome == "pass"
    assert Finish().judge("plain text has no reason").outcome == "pass"


# --- format ------------------------------------------------------------------------------------------------------

FORMATS = [
    ({"required": [r"Answer: \d+"]}, "Answer: 42", ""),
    ({"required": [r"Answer: \d+"]}, "The answer is 42", "required[0] not found"),
    ({"forbidden": ["(?i)lorem", r"\bTODO\b"]}, "still TODO here", "forbidden[1] found"),
    ({"json_text": "required"}, '{"a": [1, 2]}', ""),
    ({"json_text": "required"}, '```json\n{"a": 1}\n```', ""),
    ({"json_text": "required"}, 'Here it is: {"a": 1}', "no JSON"),
    ({"json_text": "required"}, '{"a": 1', "no JSON"),
    ({"json_text": "required", "json_keys": ["q", "a"]}, '{"q": 1}', "JSON without a"),
    ({"json_text": "required", "json_keys": ["q"]}, "[1]", "JSON, but no object"),
    ({"json_text": "forbidden"}, '{"a": 1}', "JSON"),
    ({"json_text": "forbidden"}, "42", ""),
    ({"tags": ["q", "a"]}, "<q>why</q> <a>so</a>", ""),
    ({"tags": ["q", "a"]}, "<q>why</q> <a>so", "tag a not exactly once"),
    ({"tags": ["q"]}, "<q>why</q><q>again</q>", "tag q not exactly once"),
    ({"tags": ["q"]}, "</q>why<q>", "tag q not exactly once"),
    ({"tags": ["q"]}, "<q> </q>", "tag q empty"),
    ({"stray_tags": "forbidden"}, "a <b>bold</b> word", "stray tags"),
    ({"stray_tags": "forbidden", "tags": ["q"]}, "<q>x < y and y > z</q>", ""),
    ({"markdown": "forbidden"}, "# Title\n\ntext", "markdown"),
    ({"markdown": "forbidden"}, "- one\n- two\n", "markdown"),
    ({"markdown": "forbidden"}, "so **very** much", "markdown"),
    ({"markdown": "forbidden"}, "see [this](https://x.org)", "markdown"),
    ({"markdown": "forbidden"}, "2 * 3 * 4 - 1, a_b_c, #1 and\n- Hello, he said.", ""),
    ({"markdown": "required"}, "```python\nx\n```", ""),
    ({"markdown": "required"}, "plain", "no markdown"),
    ({}, "Sure! Here is a story about a fox.\n\nOnce ...", "assistant phrase"),
    ({}, "Certainly, here's your poem:\nRoses", "assistant phrase"),
    ({}, "Here is a short story for you:\n\nOnce", "assistant phrase"),
    ({}, "I'm sorry, but I can't write that.", "assistant phrase"),
    ({}, "As an AI language model, I have no feelings.", "assistant phrase"),
    ({}, "The end. I hope this helps! Let me know if you have questions.", "assistant phrase"),
    ({"assistant_phrases": "any"}, "As an AI language model, I have no feelings.", ""),
    ({}, "Sure enough, the fox came back. Here is where she slept.", ""),
    ({}, '"I cannot help you carry that," said the owl, "I am too small."', ""),
    ({}, "Here is the river, said Tom. He sat down.", ""),
    ({}, "Here are some tips to stay well:\n- sleep\n- walk", ""),
    ({}, "The model trains on data; an assistant helps the teacher.", ""),
    ({}, STORY, ""),
]


@pytest.mark.parametrize(("config", "text", "finding"), FORMATS)
def test_format(config: dict[str, object], text: str, finding: str) -> None:
    assert Format(FormatFilter.model_validate(config)).judge(text).reason == (finding and f"format: {finding}")


# --- characters --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "finding"),
    [
        (ESSAY, ""),
        ("Größe, façade, naïveté, Łódź – “quoted” … €5 🙂", ""),
        ("The angle α of the triangle is given by this formula here.", ""),
        ("Это предложение написано по-русски.", "foreign script"),
        ("Half of this sentence наполовину русский", "foreign script"),
        ("これは日本語の文です。", "foreign script"),
        ("A lost \ufffd character", "broken characters"),
        ("The word cafÃ© came out wrong", "broken characters"),
        ("It isnâ€™t right", "broken characters"),
        ("A bell\x07 rings", "broken characters"),
        ("tabs\tand\nlines\r\nare fine", ""),
        ("NÃO É ASSIM", ""),
        ("12 + 30 = 42", ""),
        ("", ""),
    ],
)
def test_charset(text: str, finding: str) -> None:
    assert Charset().judge(text).reason == (finding and f"charset: {finding}")


def test_charset_of_other_scripts() -> None:
    russian = Charset(CharsetFilter(scripts=["cyrillic"]))
    assert russian.judge("Это предложение по-русски.").outcome == "pass"
    assert russian.judge("This is English.").outcome == "reject"


# --- language ----------------------------------------------------------------------------------------------------

LANGUAGES = {
    "en": [
        STORY,
        ESSAY,
        "Tim saw a big red ball in the park. He ran to it and gave it a kick.",
        "Photosynthesis converts light energy into chemical energy that is stored by the plant as sugar.",
        "Plan a weekly lunch menu for a school. Write down a main dish, a vegetable and a dessert for each day.",
        "KING. Now is the winter of our discontent made glorious summer by this sun of York.",
    ],
    "fr": [
        "Le petit renard habitait près du vieux moulin et descendait chaque matin à la rivière.",
        "La photosynthèse transforme l'énergie lumineuse en énergie chimique que la plante garde sous forme de sucre.",
        "Demain nous prendrons le train pour Lyon, puis nous irons dîner chez mes parents.",
    ],
    "es": [
        "El pequeño zorro vivía cerca del viejo molino y cada mañana bajaba hasta el río.",
        "La fotosíntesis transforma la energía de la luz en energía química que la planta guarda como azúcar.",
        "Mañana tomaremos el tren a Sevilla y después cenaremos en casa de mis padres.",
    ],
    "de": [
        "Der kleine Fuchs wohnte bei der alten Mühle und lief jeden Morgen hinunter an den Fluss.",
        "Die Photosynthese wandelt Lichtenergie in chemische Energie um, welche die Pflanze als Zucker speichert.",
        "Morgen fahren wir mit dem Zug nach Hamburg und essen dann bei meinen Eltern zu Abend.",
    ],
    "it": [
        "La piccola volpe viveva vicino al vecchio mulino e ogni mattina scendeva fino al fiume.",
        "La fotosintesi trasforma l'energia della luce in energia chimica che la pianta conserva come zucchero.",
        "Domani prenderemo il treno per Torino e poi ceneremo a casa dei miei genitori.",
    ],
    "pt": [
        "A pequena raposa vivia perto do velho moinho e todas as manhãs descia até ao rio.",
        "A fotossíntese transforma a energia da luz em energia química que a planta guarda como açúcar.",
        "Amanhã vamos apanhar o comboio para o Porto e depois jantamos em casa dos meus pais.",
    ],
    "nl": [
        "De kleine vos woonde bij de oude molen en liep elke ochtend naar de rivier.",
        "Fotosynthese zet lichtenergie om in chemische energie die de plant als suiker bewaart.",
        "Morgen nemen we de trein naar Utrecht en daarna eten we bij mijn ouders.",
    ],
    "code": [
        CODE,
        '#include <stdio.h>\n\nint main(void) {\n    printf("hello\\n");\n    return 0;\n}\n',
        "const total = items.reduce((sum, x) => sum + x.price, 0);\nif (total > 10) {\n  console.log(total);\n}\n",
        "class Point:\n    x = 0\n\n    def move(self, dx):\n        self.x += dx\n        return self\n",
    ],
}
OTHERS = [
    "Jutro pojedziemy pociągiem do Warszawy i odwiedzimy naszych starych przyjaciół z liceum.",
    "Imorgon åker vi tåg till Stockholm och hälsar på våra gamla vänner från skolan.",
    "Holnap vonattal megyünk Budapestre és meglátogatjuk a régi barátainkat az iskolából.",
    "Besok kami akan pergi ke pantai bersama teman teman lama kami dari Jakarta.",
    "asdf qwer zxcv poiu lkjh mnbv fghj rtyu qazw sxed crfv tgby",
]
LABELLED = [(text, name) for name, texts in LANGUAGES.items() for text in texts]


@pytest.mark.parametrize(("text", "name"), LABELLED)
def test_languages_are_told_apart(text: str, name: str) -> None:
    shares = identify(text)
    assert max(shares, key=lambda key: shares[key]) == name
    assert shares[name] >= 0.65 and sum(shares.values()) <= 1.0 + 1e-9


@pytest.mark.parametrize(("text", "name"), LABELLED + [(text, "?") for text in OTHERS])
def test_english_alone_passes(text: str, name: str) -> None:
    verdict = Language(LanguageFilter(min_words=1)).judge(text)
    assert (verdict.outcome == "pass") == (name == "en"), verdict


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Bibliothèque nationale: nouvelles règles, horaires prolongés, visites guidées", "fr"),
        ("Stadtwerke kündigen höhere Preise, Verbraucherschützer fordern schnelle Entlastung", "de"),
        ("Ministerie verwacht strengere regels, boeren vrezen grote gevolgen", "nl"),
        ("Regione approva nuovi investimenti, cittadini chiedono trasporti migliori", "it"),
        ("Knowledge thrives whenever thoughtful teachers share everything worthwhile", "en"),
    ],
)
def test_letter_triples_tell_headlines_without_function_words(text: str, name: str) -> None:
    shares = identify(text)
    assert max(shares, key=lambda key: shares[key]) == name


def test_language_is_named_and_short_texts_pass() -> None:
    assert Language().judge(LANGUAGES["de"][0]).reason == "language: de"
    assert Language().judge(OTHERS[0]).reason == "language: another language"
    assert Language().judge("Guten Morgen, liebe Freunde!").outcome == "pass"
    assert Language(LanguageFilter(allow=["de", "code"])).judge(CODE).outcome == "pass"


def test_prose_with_a_little_code_stays_prose() -> None:
    text = f"{ESSAY}\n\nIn Python this is written as follows.\n\nx = f(1)\n\n{STORY}"
    assert identify(text)["en"] > 0.65


# --- repetition --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "finding"),
    [
        (STORY, ""),
        (ESSAY, ""),
        (CODE, ""),
        ("What is the capital of France? The name of the capital of France is Paris.", ""),
        (
            "You are given a program and must say if there is an error in it: print true if there is one, and print "
            "false in every case in which nothing is wrong, if there is any.",
            "",
        ),
        ("Row, row, row your boat, gently down the stream.", ""),
        ("ha " * 30, "top_2gram"),
        ("The cat sat on the mat today. " * 2, "duplicate_7gram"),
        (f"{STORY} {STORY}", "duplicate_5gram"),
        ("\n".join(["A line that is said again and again."] * 3 + STORY.split(". ")[:3]), "lines"),
        ("\n\n".join([ESSAY[:110], ESSAY[:110], STORY.replace(". ", ".\n")]), "paragraphs"),
        (" ".join(f"I like {word} very much indeed." for word in STORY.split()[:40]), "top_2gram"),
        ("", ""),
    ],
)
def test_repetition(text: str, finding: str) -> None:
    verdict = Repetition().judge(text)
    assert verdict.reason == (finding and f"repetition: {finding}"), verdict.scores


def test_repetition_figures() -> None:
    """By hand: 12 words, of which the runs `b c d e f` and `b c d e f g`, ... come twice."""
    text = "a b c d e f x b c d e f"
    scores = measure(Text(text))
    assert scores["repetition.duplicate_5gram"] == pytest.approx(5 / len(text))
    assert scores["repetition.duplicate_6gram"] == 0.0
    assert scores["repetition.top_2gram"] == 0.0  # twice is not often
    assert measure(Text("x y x y x y"))["repetition.top_2gram"] == pytest.approx(9 / 11)
    lines = measure(Text("one\ntwo\none\n}\n}\n"))
    assert lines["repetition.lines"] == pytest.approx(1 / 3)
    assert lines["repetition.line_chars"] == pytest.approx(3 / 16)


def test_code_may_repeat_brackets() -> None:
    text = "void f() {\n  a = 1;\n}\nvoid g() {\n  b = 2;\n}\nvoid h() {\n  c = 3;\n}\n}\n}\n"
    assert measure(Text(text))["repetition.lines"] == 0.0
    assert Repetition(RepetitionFilter()).judge(text).outcome == "pass"
