"""Checks that tell card and account numbers from other digits: issuer's prefix, length, Luhn, ISO 7064 mod 97."""

from __future__ import annotations

_IBAN_LENGTHS = (
    "AD:24 AE:23 AL:28 AT:20 AZ:28 BA:20 BE:16 BG:22 BH:22 BR:29 BY:28 CH:21 CR:22 CY:28 CZ:24 DE:22 DK:18 DO:28 "
    "EE:20 EG:29 ES:24 FI:18 FO:18 FR:27 GB:22 GE:22 GI:23 GL:18 GR:27 GT:28 HR:21 HU:28 IE:22 IL:23 IQ:23 IS:26 "
    "IT:27 JO:30 KW:30 KZ:20 LB:28 LC:32 LI:21 LT:20 LU:20 LV:21 LY:25 MC:27 MD:24 ME:22 MK:19 MR:27 MT:31 MU:30 "
    "NL:18 NO:15 PK:24 PL:28 PS:29 PT:25 QA:29 RO:24 RS:22 SA:24 SC:31 SE:24 SI:19 SK:24 SM:27 ST:25 SV:28 TL:23 "
    "TN:24 TR:26 UA:29 VA:22 VG:24 XK:20"
)
IBAN_LENGTHS = {pair[:2]: int(pair[3:]) for pair in _IBAN_LENGTHS.split()}
"""Characters of an IBAN by country (SWIFT's IBAN registry)."""


def luhn(digits: str) -> bool:
    """Whether the last digit is the check digit of the others (ISO/IEC 7812-1)."""
    total = 0
    for place, digit in enumerate(reversed(digits)):
        value = int(digit) * (1 + place % 2)
        total += value - 9 if value > 9 else value
    return total % 10 == 0


def is_iban(text: str) -> bool:
    """Whether letters and digits, without spaces, are an IBAN: country, length and check digits (ISO 13616)."""
    if IBAN_LENGTHS.get(text[:2]) != len(text):
        return False
    return int("".join(str(int(char, 36)) for char in text[4:] + text[:4])) % 97 == 1


def is_card(digits: str) -> bool:
    """Whether digits are the number of a payment card: length, issuer's prefix and Luhn; no digit alone repeated."""
    lengths: tuple[int, ...] = ()
    if digits[0] == "4":
        lengths = (13, 16, 19)
    elif digits[:2] in ("34", "37"):
        lengths = (15,)
    elif "51" <= digits[:2] <= "55" or "2221" <= digits[:4] <= "2720":
        lengths = (16,)
    elif digits[:2] in ("36", "38", "39") or "300" <= digits[:3] <= "305":
        lengths = (14,)
    elif digits[:4] == "6011" or digits[:2] == "65" or "644" <= digits[:3] <= "649" or "3528" <= digits[:4] <= "3589":
        lengths = (16, 19)
    return len(digits) in lengths and len(set(digits)) > 1 and luhn(digits)
