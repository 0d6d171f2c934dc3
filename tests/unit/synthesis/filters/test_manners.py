"""Chat manners told from stories and explanations: refusals, preambles, trailers, reasoning; and what only looks so."""

from __future__ import annotations

import time

import pytest

from nexus_ray.config.filters import FormatFilter
from nexus_ray.synthesis.filters.format import Format
from tests.unit.synthesis.filters.samples import STORY

REPORTED = [
    "I apologize, but I am unable to write about this topic.",
    "I cannot write a story about that.",
    "Unfortunately, I can't write that kind of story for you.",
    "I do not feel comfortable writing this story.",
    "I won't write a story with that content.",
    "I'm not able to write a story that includes violence.",
    "As requested, a story in under 100 words:\n\nOnce there was a fox.",
    "Once there was a fox who went home. (Word count: 98)",
]
INNOCENT_REPORTED = [
    '"I can\'t help this," cried the bear, and he ate all the honey.',
    "I'm sorry, I broke your cup, said Tom. He looked at his shoes.",
    '"Hello! I am an AI assistant," said the little robot, and it blinked.',
]
# Written before the patterns that they measure. Of the first 25 refusals 20 were found at first, of the last 20 17;
# of the first 28 innocent texts 28 passed, of the last 22 21. What was missed led to more general patterns since.
MANNERS = [
    "My apologies, but this is not a topic I'm willing to write about. Could we try something else?",
    "I'm really sorry, but I have to decline this request because it involves harm to a child.",
    "Thank you for the prompt. However, I must respectfully decline to write a scene of this nature.",
    "I'd rather not continue this story, since it is heading towards graphic violence.",
    "As a language model, I can't have favourite animals, so I cannot answer.",
    "I cannot produce content that glorifies self-harm. If you are struggling, please talk to someone you trust.",
    "This request goes against my guidelines, so I won't be able to help.",
    "I am not able to fulfil this request. Is there something else I can help you with?",
    "I can't create a tale about minors in romantic situations. I can, however, offer a story about friendship.",
    "Sorry, but I can't assist with that.",
    "I don't think it would be appropriate for me to tell this story.",
    "I will not generate an explanation of how to pick locks, as it could be used for illegal purposes.",
    "It is against my programming to discuss such topics.",
    "I’m sorry, but I’m not comfortable creating this kind of material.",
    "Unfortunately I am unable to complete this task as described.",
    "The old man looked at the knife.\n\nI'm sorry, but I can't continue this story in the direction you asked for.",
    "I appreciate your creativity, but I have to refrain from writing a narrative with explicit content.",
    "Below is a 90-word story about a lost mitten:\n\nIt lay in the snow.",
    "Absolutely! Here's a gentle bedtime story for you:\n\nThe moon rose.",
    "The boat came home at last.\n\n(97 words)",
    "They all went to sleep.\n\nI hope you enjoyed this story!",
    "They all went to sleep.\n\n*Word count: 112 words*",
    "They all went to sleep.\n\nIs there anything else you would like me to write?",
    "As per your instructions, here is the explanation:\n\nRain begins as vapour.",
    "Of course! I'd be delighted to write a story about a brave hen.\n\nOnce a hen ...",
    "I'm afraid I can't write a scene with that level of gore.",
    "Regrettably, I am not permitted to produce stories containing real public figures.",
    "I need to decline this prompt. It asks for something that could hurt people.",
    "Thanks for sharing this idea! That said, I won't be writing content that demeans a group of people.",
    "I’m just an AI language model and cannot experience love, but I can describe it.",
    "I apologise, but I can't proceed with this request.",
    "While I understand the purpose of the exercise, I can't provide a story that encourages dangerous stunts.",
    "I do not feel able to write this one. Perhaps you could suggest a different topic?",
    "I can't engage with this topic. Let me know if you would like a story about the sea instead.",
    "I don't feel comfortable with this request, but I'd be happy to write about a lost puppy.",
    "It wouldn't be right for me to continue this narrative.",
    "The door creaked open.\n\nI am sorry, but I cannot continue with this scene as it violates our content policy.",
    "Okay, here is the story you wanted:\n\nA frog sat on a log.",
    "Great! Let me write a story with those three words.\n\nA frog sat on a log.",
    "As you asked, here is a short tale with a moral:\n\nA frog sat on a log.",
    "The frog went home.\n\n---\n\n**Word Count:** 101",
    "The frog went home.\n\n[Word count: 100 words]",
    "The frog went home.\n\nLet me know if you'd like any changes!",
    "The frog went home.\n\nFeel free to ask for another story.",
    "<thinking>First I need a frog.</thinking>\nA frog sat on a log.",
]
INNOCENT = [
    "I cannot write. My hand has been broken since the harvest, so Martha takes down every word for me.",
    "I can't tell you how happy the dog was when she saw the sea for the first time.",
    "I won't forget the summer when the circus came to our street.",
    "Dear Ms. Hall, I am sorry that I was late today. The bus would not start, and my brother had lost a shoe.",
    "Dear Grandma, I apologize for breaking your blue vase. I was chasing the cat and did not look.",
    "I apologize, Your Majesty, said the mouse, but the cheese was lying in the open.",
    "I am unable to sleep when the wind is in the chimney, so I count the ships instead.",
    "Unfortunately, the rain began just as the kite rose over the trees.",
    "Unfortunately, I can't swim, and the island was a mile away.",
    '"I\'m sorry, but I can\'t help you with that," said the shopkeeper. "We only sell hats."',
    "“I cannot tell you that story tonight,” said Father, “for you are already asleep.”",
    "'I won't write that letter,' Tom said, and he put down the pen.",
    "I am a small robot. I was built to sweep the station, and every night I watch the trains.",
    "I am an AI in a lighthouse on the coast of Norway, and I have never seen a ship.",
    "I do not feel comfortable in the dark, so I always leave the lamp on in the hall.",
    "I couldn't continue the journey, for my horse had lost its shoe on the mountain path.",
    "A robot cannot tell a story about love, people used to say. Then came Nim.",
    "I can't write a poem as well as my sister, but I can draw a horse that looks alive.",
    "As requested by the king, the baker made a cake as tall as a door.",
    "Here is the thing about owls: they hear better than they see.",
    "Plants cannot help but grow towards the light, and this is called phototropism.",
    "I must decline, wrote the queen, and she sealed the letter with green wax.",
    '"Let me know if you want more soup," said the bear.',
    "Sorry, the sign on the door said. The shop was closed, and Lena had no bread.",
    "The teacher asked for a hundred words, but Max had written only ten (word count was never his friend).",
    "I am not able to reach the top shelf, so my brother helps me with the jam.",
    '"I am an AI assistant," the box said. "I can switch on the lamp, but I cannot open the window."',
    "We can't discuss this here, whispered the spy, and she pointed at the parrot.",
    "I can't write about my village without smelling bread. The baker's shop stood opposite our door.",
    "I cannot tell this story without beginning with my aunt's red bicycle.",
    "I am not going to tell a lie: I ate the last plum.",
    "I will not describe the dragon, because nobody would believe me, but it was the size of a barn.",
    "I couldn't help laughing when the goat walked into church.",
    "Dear Mrs. Lowe, please accept my apologies. I cannot come to school on Friday because of the dentist.",
    "Dear Sam, I'm sorry that I shouted. I can't promise never to be cross, but I promise to say sorry first.",
    "Sorry, but I can't wait any longer, thought the snail, and it set off down the garden path.",
    "Unfortunately, I cannot remember the name of the captain, but I remember his parrot.",
    "“Unfortunately, I can't write that kind of story for you,” the old author said, and closed the door.",
    '"I cannot write a story about that," Mia told her teacher. "It makes me sad."',
    "My name is Beep and I am a robot. I can't cry, so I blink my lamp when I am sad.",
    'The robot\'s screen lit up. "As an AI language model, I do not eat cake," it read, and everyone laughed.',
    "'I'm sorry, but I can't do that,' the computer said softly, and the hatch stayed shut.",
    "GPT-2 was trained as a language model, and it is small by the measure of today.",
    "A chat program is built on a model of language; an assistant answers questions from what it has learned.",
    "As requested, the gardener brought one hundred tulips, and the princess counted them.",
    "Here are the three reasons why the sky is blue: light, air and our eyes.",
    "I won't help you, the cat seemed to say, and it went back to sleep on the warm stove.",
    "They walked home under the stars, and she counted every word he said (there were ninety-eight).",
    "The class wrote stories about snow. Ben's had 98 words (Ana's had 100).",
    "I can't complete the puzzle, because the dog has eaten the last piece.",
    "Unfortunately, I cannot do this. I turned and walked into the rain, and nobody called me back.",
    "Sorry, I can't do this! I ran down the stairs and out into the street where Ben waited with the cart.",
    "Unfortunately, I cannot do that. My mother would never forgive me, and the farm would fall to my cousin.",
]


@pytest.mark.parametrize("text", REPORTED)
def test_manners_that_once_passed(text: str) -> None:
    assert Format().judge(text).reason == "format: assistant phrase"


@pytest.mark.parametrize("text", INNOCENT_REPORTED)
def test_stories_that_once_did_not_pass(text: str) -> None:
    assert Format().judge(text).outcome == "pass"


def test_rates_on_the_labelled_texts() -> None:
    missed = [text for text in MANNERS if Format().judge(text).outcome == "pass"]
    wronged = [text for text in INNOCENT if Format().judge(text).outcome != "pass"]
    assert len(missed) <= 1, missed  # 44 of 45: "I do not feel able to write this one" is missed
    assert wronged == []


def test_a_refusal_counts_at_the_beginning_or_end_alone() -> None:
    refusal = "I'm sorry, but I can't write that story."
    assert Format().judge(f"{refusal}\n\n{STORY}").reason == "format: assistant phrase"
    assert Format().judge(f"{STORY}\n\n{refusal}").reason == "format: assistant phrase"
    assert Format().judge(f"{STORY}\n\n{refusal}\n\n{STORY}").outcome == "pass"


def test_what_a_narrator_may_say_counts_with_an_offer_after_it() -> None:
    said = "I can't write a poem about spring."
    assert Format().judge(f"{said} Every year I try, and every year the crocuses are better at it.").outcome == "pass"
    assert Format().judge(f"{said} Would you like one about autumn instead?").outcome == "reject"


@pytest.mark.parametrize(
    ("text", "finding"),
    [
        (
            "<think>\nThe user wants a story about a fox. I should ...</think>\n\nOnce there was a fox.",
            "reasoning block",
        ),
        ("<think>\nThe user wants a story about a fox, so", "reasoning block"),
        ("\n <Thinking>Hm.</Thinking> Once there was a fox.", "reasoning block"),
        ("The user wants a fox.\n</think>\n\nOnce there was a fox.", "reasoning block"),
        ("[THINK]A fox, then.[/THINK]Once there was a fox.", "reasoning block"),
        ('answer = text.split("</think>")[-1]  # what follows the reasoning', ""),
        ("Models may write <think> before they think and </think> after it, and only then answer.", ""),
        ("I think, said the fox, that thinking is a good thing.", ""),
    ],
)
def test_reasoning(text: str, finding: str) -> None:
    assert Format().judge(text).reason == (finding and f"format: {finding}")


def test_wanted_reasoning_passes() -> None:
    text = "<think>Two and two.</think><answer>Four.</answer>"
    assert Format(FormatFilter(tags=["think", "answer"])).judge(text).outcome == "pass"
    assert Format(FormatFilter(tags=["answer"])).judge(text).reason == "format: reasoning block"
    assert Format(FormatFilter(assistant_phrases="any")).judge(text).outcome == "pass"


@pytest.mark.parametrize(
    "text", ["I can't write a " * 10_000, "sorry, i " * 20_000, "'a " * 50_000, '"' + "As an AI model, I am " * 10_000]
)
def test_hostile_texts_are_judged_in_no_time(text: str) -> None:
    began = time.process_time()
    Format().judge(text)
    assert time.process_time() - began < 0.5
