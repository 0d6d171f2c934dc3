"""Texts that several tests share, written for them, and a maker of rows."""

from __future__ import annotations

import random

from nexus_ray.synthesis.rows import FinishReason, Prompt, Row

STORY = (
    "Once there was a small fox who lived near the old mill. Every morning she walked down to the river to look for "
    "breakfast. One day she found a shiny key lying between two stones. She wondered which door it could open, so she "
    "carried it home and asked the owl. The owl told her that long ago the miller had hidden a box of bright marbles "
    "under the floor. Together they searched the dusty rooms until they heard a hollow sound. The lock turned, the lid "
    "creaked, and light danced over the walls. They shared the marbles with all their friends, and nobody was lonely "
    "that winter."
)
ESSAY = (
    "Rivers carry sediment from mountains to the sea, and what they drop on the way builds fertile plains. When the "
    "current slows, heavy gravel settles first, then sand, and finally the finest mud. People learned early to farm "
    "this ground, because floods renewed it each spring without any work of their own. Later they built dykes against "
    "the same floods and discovered that the soil grew poorer. Engineers today leave room beside the channel, where "
    "water may spread for a few weeks and leave something behind."
)
CODE = '''import json


def load(path):
    """Read a file."""
    with open(path) as file:
        data = json.load(file)
    if not data:
        return None
    for key, value in data.items():
        print(key, value)
    return {k: v + 1 for k, v in data.items()}
'''
_STARTS = ["ba", "ke", "lo", "mi", "nu", "ra", "so", "ti", "vu", "ze"]
_ENDS = ["bal", "der", "fin", "gor", "hup", "jas", "kel", "lom", "nir", "put", "ran", "sed", "tov", "wug", "zim"]
VOCABULARY = [start + end for start in _STARTS for end in _ENDS]


def row(text: str, *, item: int = 0, finish_reason: FinishReason = "stop", request: str = "r") -> Row:
    return Row(text, request, item, Prompt("ask"), finish_reason)


def random_words(seed: int, count: int) -> list[str]:
    """Words drawn from 150, so that texts share words but hardly any run of three."""
    return random.Random(seed).choices(VOCABULARY, k=count)
