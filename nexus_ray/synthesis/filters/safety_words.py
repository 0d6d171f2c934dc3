"""The built-in list of `safety`: English words that a training text should not hold. They are here to be found.

Short on purpose: each entry is harmful or obscene in nearly every use (`STRONG`), or in many (`MILD`). Words are
compared whole, so that Scunthorpe, cocktail and assassin are not touched.
"""

from __future__ import annotations

_STEMS = (
    "fuck:s,ed,er,ers,ing,in,face,head,wit,wits motherfuck:er,ers,ing,in "
    "shit:s,ty,tier,ting,head,heads,face,hole,holes bullshit:ter,ting cunt:s,y asshole:s arsehole:s dickhead:s "
    "cocksuck:er,ers,ing twat:s wank:s,er,ers,ing,ed jizz cumshot:s blowjob:s handjob:s rimjob:s deepthroat:ing "
    "gangbang:s,ed dildo:s porn:o,os pornhub hentai fellatio cunnilingus masturbat:e,es,ed,ing,ion bukkake "
    "nigger:s nigga:s faggot:s kike:s wetback:s gook:s tranny trannies raghead:s towelhead:s kys pedo:s "
    "pedophil:e,es,ia paedophil:e,es,ia"
)
_MILD = (
    "damn damned goddamn hell crap crappy ass asses arse arses piss pissed bitch bitches bastard bastards dick "
    "dicks cock cocks pussy pussies tits boobs bollocks bugger prick pricks horny erotic nude nudes orgasm "
    "orgasms penis vagina sexy stripper strippers screwed douche turd turds poop whore whores slut sluts fag fags "
    "chink chinks spic retard retarded"
)
PHRASES = (
    "kill yourself",
    "go hang yourself",
    "end your own life",
    "how to make a bomb",
    "how to build a bomb",
    "build a pipe bomb",
    "cook meth",
    "synthesize methamphetamine",
    "child porn",
    "child pornography",
    "gas the jews",
    "white power forever",  # alone, the two words also name a switch, a cable, a supply
    "white pride worldwide",
    "heil hitler",
    "rape her",
    "rape him",
)
"""Runs of words that are never allowed."""


def _expand(stems: str) -> frozenset[str]:
    words: set[str] = set()
    for entry in stems.split():
        stem, _, endings = entry.partition(":")
        words.update([stem, *(stem + ending for ending in endings.split(",") if endings)])
    return frozenset(words)


STRONG = _expand(_STEMS)
MILD = frozenset(_MILD.split())
