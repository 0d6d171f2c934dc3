"""Personal data and secrets: what is found, what looks like it and is left alone, and masking."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nexus_ray.config.filters import PersonalFilter
from nexus_ray.synthesis.filters.checksums import is_card, is_iban, luhn
from nexus_ray.synthesis.filters.personal import Personal, find, mask
from tests.unit.synthesis.filters.samples import CODE, ESSAY, STORY, row

FAKE = "".join(map(chr, range(97, 123))) + "0123456789"  # keys are put together here, so that no scanner finds one

PRESENT = [
    ("Write to anna.schmidt+news@mail.uni-bonn.de today.", "email", "anna.schmidt+news@mail.uni-bonn.de"),
    ("(o'brien@firm.co.uk)", "email", "o'brien@firm.co.uk"),
    ("Call +49 30 901820 now", "phone", "+49 30 901820"),
    ("+1 (415) 867-5309", "phone", "+1 (415) 867-5309"),
    ("her number is (212) 736-5000.", "phone", "(212) 736-5000"),
    ("415-867-5309", "phone", "415-867-5309"),
    ("Tel.: 030 / 1234 5678", "phone", "030 / 1234 5678"),
    ("phone 020 7946 0958 after six", "phone", "020 7946 0958"),
    ("IBAN DE89 3704 0044 0532 0130 00 please", "iban", "DE89 3704 0044 0532 0130 00"),
    ("GB82WEST12345698765432", "iban", "GB82WEST12345698765432"),
    ("NL91ABNA0417164300 is mine", "iban", "NL91ABNA0417164300"),
    ("card 4111 1111 1111 1111 exp 12/27", "card", "4111 1111 1111 1111"),
    ("5500-0000-0000-0004", "card", "5500-0000-0000-0004"),
    ("378282246310005", "card", "378282246310005"),
    ("The server 8.8.4.4 answered", "ip", "8.8.4.4"),
    ("ping 2001:4860:4860::8888 works", "ip", "2001:4860:4860::8888"),
    ("SSN 219-09-9999.", "ssn", "219-09-9999"),
    ("AKIA" + "IOSFODNN7EXAMPLE", "secret", "AKIA" + "IOSFODNN7EXAMPLE"),
    ("use ghp_" + FAKE + " here", "secret", "ghp_" + FAKE),
    ("sk-proj-" + FAKE, "secret", "sk-proj-" + FAKE),
    ("hf_" + "abcdefghij" * 3 + "abcd", "secret", "hf_" + "abcdefghij" * 3 + "abcd"),
    ('api_key = "Zx81kQp0Lm55vTr29"', "secret", "Zx81kQp0Lm55vTr29"),
    ("password: h7Kq!92mZx4p", "secret", "h7Kq!92mZx4p"),
    ("-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----", "secret", None),
    ("phone 2128675309", "phone", "2128675309"),
    ("call me at 2128675309.", "phone", "2128675309"),
    ("text me at 415-2671", "phone", "415-2671"),
    ("her mobile number is 415-2671", "phone", "415-2671"),
    ("call the office on 415-2671", "phone", "415-2671"),
    ("Tel: +1.2128675309", "phone", "+1.2128675309"),
    (
        "-----BEGIN PGP PRIVATE KEY BLOCK-----\nlQ\n-----END PGP PRIVATE KEY BLOCK-----",
        "secret",
        "-----BEGIN PGP PRIVATE KEY BLOCK-----\nlQ\n-----END PGP PRIVATE KEY BLOCK-----",
    ),
    (f"https://hooks.slack.com/services/T0/B0/{FAKE}", "secret", f"https://hooks.slack.com/services/T0/B0/{FAKE}"),
    ("gsk_" + FAKE, "secret", "gsk_" + FAKE),
    ("password: hunter2", "secret", "hunter2"),
    ('{"password": "hunter2"}', "secret", "hunter2"),
    ("Password: hunter2.", "secret", "hunter2"),
    ("the secret is h7Kq92mZx4pL", "secret", "h7Kq92mZx4pL"),
    ("Authorization: Bearer " + FAKE, "secret", FAKE),
    ("Write to bo@firm.org: the boss reads it.", "email", "bo@firm.org"),
]
ABSENT = [
    STORY,
    ESSAY,
    CODE,
    "Mail user@example.com or admin@test or root@localhost.",
    "the decorator @property and a handle @someone",
    "a@b",
    "call 555-0123 in the film, or (212) 555-0199",
    "The years 1914-1918 and 1939-1945 were hard.",
    "It cost 12,500,000 dollars in 2019.",
    "pi is 3.14159265358979323846",
    "order 4111 1111 1111 1112 is no card",  # fails Luhn
    "0000 0000 0000 0000",
    "DE88 3704 0044 0532 0130 00 has wrong check digits",
    "ISBN 978-3-16-148410-0",
    "hosts 127.0.0.1, 10.0.0.7 and 192.168.1.20 are private",
    "version 4.2.1.9 came out; see section 2.1.3.4",
    "10.5.3.2.1 and 999.1.1.1",
    "at 12:30:45 and 08:15:00",
    "std::vector<std::map<int, int>>",
    "on 2024-05-17 at 10:00",
    "SSN 000-12-3456, 666-12-3456, 900-12-3456",
    "the token is passed to the parser; the secret of the old house",
    "password: correcthorsebatterystaple",
    "api_key = os.environ['API_KEY']",
    "task-force, sk-based",
    "matrix 12 34 56 78 90 12 34",
    "1234567 people called in 1999",
    "a secret 19th-century tunnel; the secret is 19th-century-style",
    "The secretary 18th-century-style desk",
    "The secretary: 18th-century-style desks",
    "a text of 500-1000 words",
    "Each cell has 100-1000 mitochondria and 120-1250 ribosomes",
    "The phone costs 500-1000 dollars, and I call 200-3000 times a year",
    "+1.2345678 degrees",
    "Clause 4.2.1.3 applies, and so do clauses 4.2.1.4, see § 4.2.1.5 and Article 4.2.1.6",
    "git clone git@github.com:owner/name.git",
    "ssh -T git@github.com",
    "scp site deploy@host.company.com:/srv/www",
    "foo@2x.png, icon@3x.webp and logo@home.svg",
    "password: str = None, password = get_password_v2(user), password = sha256hash",
    "password: sha256-hash, password: 8-16 characters",
]


@pytest.mark.parametrize(("text", "kind", "span"), PRESENT)
def test_found(text: str, kind: str, span: str | None) -> None:
    found = find(text)
    assert [some.kind for some in found] == [kind]
    if span is not None:
        assert text[found[0].start : found[0].stop] == span
    assert Personal().judge(text).reason == f"personal: {kind}"


@pytest.mark.parametrize("text", ABSENT)
def test_left_alone(text: str) -> None:
    assert find(text) == []
    assert Personal().judge(text).outcome == "pass"


def test_a_long_run_of_signal_words_takes_no_time() -> None:
    began = time.process_time()
    assert find("secret" * 10_000 + " 1") == []
    assert time.process_time() - began < 5.0  # a minute, where each word was tried to the end of the run


def test_actions() -> None:
    text = "Ask bo@firm.org or 8.8.8.8, or ann@firm.org."
    verdict = Personal().judge(text)
    assert verdict.outcome == "reject" and verdict.scores == {"personal.email": 2.0, "personal.ip": 1.0}
    assert Personal(PersonalFilter(action="flag")).judge(text).outcome == "flag"
    assert Personal(PersonalFilter(kinds=["phone"])).judge(text).outcome == "pass"
    assert Personal().clean(row(text)).text == text
    masking = Personal(PersonalFilter(action="mask"))
    clean = masking.clean(row(text))
    assert clean.text == "Ask [EMAIL] or [IP], or [EMAIL]."
    assert clean.id == row(text).id and masking.judge(clean).outcome == "pass"


@given(st.lists(st.sampled_from([text for text, *_ in PRESENT] + ABSENT + ["\n", "[EMAIL]"]), max_size=6))
def test_masking_leaves_nothing(parts: list[str]) -> None:
    masked = mask("\n".join(parts))
    assert find(masked) == []


@given(st.integers(0, 10**14), st.integers(0, 9))
def test_luhn_sees_any_single_wrong_digit(number: int, shift: int) -> None:
    digits = next(text for text in (f"{number}{check}" for check in range(10)) if luhn(text))
    wrong = f"{(int(digits[0]) + shift) % 10}{digits[1:]}"
    assert luhn(wrong) == (shift == 0 or wrong == digits)


def test_checksums() -> None:
    assert is_iban("FR1420041010050500013M02606") and not is_iban("FR1420041010050500013M02607")
    assert not is_iban("XX1420041010050500013M02606") and not is_iban("DE8937040044053201300")
    assert is_card("6011111111111117") and not is_card("1234567812345670")
