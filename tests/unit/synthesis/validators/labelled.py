"""Labelled texts for the validators: what must pass, what must not, and what is known to be beyond them."""

from __future__ import annotations

HARBOUR = (
    "The harbour of Vessel Bay was dug in 1874 by 320 workers. Its first master, Hanna Brandt, kept a diary in which "
    'she wrote: "The tide gives us six hours, and the mud takes four of them back." The dredger Pelican was bought in '
    "1881 for 12,500 crowns. It never worked in winter, because its boiler froze. Today the harbour serves fishing "
    "boats and a ferry to Lund, which sails twice a day."
)
MOSS = (
    "Mosses have no roots. They take up water through their leaves, and can dry out completely without dying. When "
    "rain returns, a dried moss turns green again within minutes. In bogs, peat moss makes the water acid, which slows "
    "the decay of dead plants. Over thousands of years the remains become peat."
)

VIOLINS = (
    "The violin maker Josef Aldin opened his workshop in Mirow in 1902 with a loan of 800 marks. He bought his "
    "spruce from a single valley in the Alps and let it dry for eleven years. His instruments were loud rather "
    "than sweet, and soloists liked them for that reason. Aldin trained four apprentices, among them his daughter"
    " Klara, who took over in 1931. The workshop burned down in 1944; only six violins were saved."
)
BEES = (
    "Honeybees keep the brood nest at about 35 degrees Celsius. When it gets too warm, workers fan their wings at"
    " the entrance and carry in water. In winter the bees form a cluster and shiver to produce heat. They do not "
    "hibernate. A colony needs roughly 20 kilograms of honey to survive the cold months."
)
TRIAL = (
    "Marie Curie was not admitted to the French Academy of Sciences, although she had won a Nobel Prize. In the trial "
    "the drug did not lower blood pressure in adults. No one reported any harm."
)
DELTA = (
    "About 3 million people live in the delta, and 2 to 4 million birds winter there. The river is 2,300 km long. A "
    "ticket for the boat costs 12 euros, and it sails every five days at 28 degrees Celsius. It carries £40 of mail "
    "and weighs 7bn grams. One million trees were planted, at $15k a year."
)

GROUNDED = (
    (HARBOUR, "The harbour of Vessel Bay was dug in 1874."),
    (HARBOUR, "It took 320 workers to dig the harbour, and Hanna Brandt was its first master."),
    (HARBOUR, 'Brandt wrote that "the tide gives us six hours". The mud, she added, took back four of them.'),
    (HARBOUR, 'Her diary says: "The tide gives us six hours ... takes four of them back."'),
    (HARBOUR, "The dredger cost 12500 crowns and was bought in 1881."),
    (HARBOUR, "In winter the Pelican never worked, because the boiler froze."),
    (HARBOUR, "- The harbour serves fishing boats.\n- A ferry sails to Lund twice a day."),
    (HARBOUR, "Who was the first master of the harbour? Hanna Brandt."),
    (HARBOUR, "Yes, it does."),
    (MOSS, "Mosses take up water through their leaves, because they have no roots."),
    (MOSS, "A moss that has dried out completely does not die; it turns green within minutes when rain returns."),
    (MOSS, "Peat moss makes bog water acid, and this slows the decay of dead plants."),
    (MOSS, "According to the passage, the remains of plants become peat over thousands of years."),
    (MOSS, "1. Mosses have no roots.\n2. They can dry out without dying."),
    (VIOLINS, "Josef Aldin started his workshop in Mirow in 1902, borrowing 800 marks to do so."),
    (VIOLINS, "Soloists liked Aldin's violins because they were loud."),
    (VIOLINS, "His daughter Klara was one of his four apprentices and took over the workshop in 1931."),
    (VIOLINS, "Only six violins survived when the workshop burned down in 1944."),
    (VIOLINS, "He let the spruce dry for 11 years before using it."),
    (VIOLINS, "Aldin's wood came from one valley in the Alps."),
    (BEES, "Bees do not hibernate in winter; they form a cluster and shiver to make heat."),
    (BEES, "If the nest becomes too warm, workers carry water in and fan their wings at the entrance."),
    (BEES, "The brood nest stays at around 35 degrees."),
    (BEES, "Without about 20 kilograms of honey, a colony does not survive the winter."),
    (BEES, "What temperature does the brood nest have? About 35 degrees Celsius."),
    (BEES, "Instead of hibernating, honeybees cluster together and shiver."),
    (TRIAL, "No, she was not admitted to the French Academy of Sciences."),
    (TRIAL, "No, the drug did not lower blood pressure in adults."),
    (TRIAL, "No - the drug didn't lower blood pressure in adults."),
    (TRIAL, "It is not true that the drug did not lower blood pressure in adults."),  # two negations: unknown
    (DELTA, "About 3,000,000 people live in the delta."),
    (DELTA, "About three million people live there."),
    (DELTA, "Between 2 million and 4 million birds winter there."),
    (DELTA, "The river is 2,300 kilometres long."),
    (DELTA, "The 2,300-kilometre river is long."),
    (DELTA, "The river is 2,300 long."),
    (DELTA, "A ticket for the boat costs €12."),
    (DELTA, "The boat sails every 5 days at 28 °C."),
    (DELTA, "It carries 40 pounds of mail and weighs 7 billion grams."),
    (DELTA, "1 million trees were planted, at 15,000 dollars a year."),
)
UNGROUNDED = (
    (HARBOUR, "The harbour of Vessel Bay was dug in 1847."),
    (HARBOUR, "The harbour was dug by 302 workers."),
    (HARBOUR, "The first master of the harbour was Greta Brandt."),
    (HARBOUR, "The harbour's first master, Hanna Brandt, came from Norway."),
    (HARBOUR, 'Brandt wrote: "The tide gives us ten hours, and the mud takes them all."'),
    (HARBOUR, 'Brandt called the harbour "a gift of the sea to honest people".'),
    (HARBOUR, "The dredger Pelican worked in winter, because its boiler froze."),
    (HARBOUR, "The ferry to Lund sails three times a day."),
    (HARBOUR, "Engineers praised the elegant granite lighthouse beside the market."),
    (HARBOUR, "The harbour serves fishing boats. Wealthy tourists admire painted villas along the promenade."),
    (MOSS, "Mosses take up water through deep roots that reach underground rivers."),
    (MOSS, "Mosses have roots."),
    (MOSS, "A dried moss cannot turn green again when rain returns within minutes."),
    (MOSS, "Peat moss sweetens soil and helps farmers grow tomatoes."),
    (MOSS, "Over 40 thousands of years the remains become peat."),
    (MOSS, "As Linnaeus showed, peat moss makes the water acid."),
    (VIOLINS, "Josef Aldin opened his workshop in Berlin in 1902."),
    (VIOLINS, "Aldin's violins were prized for their sweet tone and fine varnish."),
    (VIOLINS, "The workshop burned down in 1945."),
    (VIOLINS, "Klara Aldin won a prize in Vienna for her cellos."),
    (VIOLINS, "Aldin trained five apprentices."),
    (VIOLINS, "He imported spruce from Canada and maple from Bosnia."),
    (VIOLINS, "Soloists did not like his instruments, which were loud rather than sweet."),
    (BEES, "Honeybees hibernate in winter."),
    (BEES, "A colony needs 30 kilograms of honey."),
    (BEES, "Bees cool the hive by opening small windows in the wax ceiling."),
    (BEES, "Workers never fan their wings at the entrance when it gets too warm."),
    (BEES, "Beekeepers should feed sugar syrup every autumn to prevent starvation."),
    (TRIAL, "No, she was admitted to the French Academy of Sciences."),
    (TRIAL, "Yes, the drug did lower blood pressure in adults."),
    (DELTA, "About 3 thousand people live in the delta."),
    (DELTA, "About 3 billion people live in the delta."),
    (DELTA, "About 3 people live in the delta."),
    (DELTA, "The river is 2,300 miles long."),
    (DELTA, "The 2,300-mile river is long."),
    (DELTA, "A ticket for the boat costs 12 dollars."),
    (DELTA, "A ticket for the boat costs $12."),
    (DELTA, "The boat sails every five weeks."),
    (DELTA, "The boat sails every five days at 28 degrees Fahrenheit."),
    (DELTA, "It carries €40 of mail."),
    (DELTA, "It weighs 7 million grams."),
    (DELTA, "Trees were planted, at $15m a year."),
)
BEYOND_WORDS = (
    (HARBOUR, "The boiler froze because the dredger never worked in winter."),  # cause and effect change places
    (HARBOUR, "The ferry was bought in 1881 for 12,500 crowns."),  # another thing's price
)
"""False positives known and accepted: every word is the source's own. A judge is for these."""

RIGHT_SUMS = (
    "3 + 4 = 7",
    "She has 3 apples + 4 apples = 7 apples left in the basket.",
    "So he pays $5 × 2 = $10, and then $10 + $1.50 = $11.50 in all.",
    "12*3=36 and 36 / 4 = 9",
    "2 + 2 = 3 + 1 = 4",
    "1/2 + 1/4 = 3/4",
    "20% of 50 = 10",
    "5 / 20 = 25%",
    "5/20 * 100 = 25%",
    "10 / 3 = 3.33",
    "10 / 3 ≈ 3",
    "2/3 = 66.7%",
    "<<48/2=24>>24 clips in May",
    "1,000 - 250 = 750",
    "(2 + 3) * 4 = 20 and 2(3 + 4) = 14",
    "-3 + 5 = 2",
    "2^10 = 1024",
    "2.5 million + 5 million = 7.5 million",
    r"\frac{3}{4} \times 8 = 6",
    "3 x 4 = 12 tiles",
    "- 3 + 4 = 7\n2. 5 - 1 = 4",
    "60 km / 2 hours = 30 km/h",
    "1 hour + 30 minutes = 90 minutes",
    "3 m + 4 m = 7 m",
    "0.1 + 0.2 = 0.3",
    "9 - 4 = 5.",
    "Therefore, 2/5 of 60 students = 24 students.",
    "5 hours/day * 7 days = 35 hours",
    "That is 7*6=42 minutes, or 42/60 = 0.7 hours.",
    "After 3 days: 100 - 3*12 = 100 - 36 = 64 pages.",
    "**Step 1:** 14 + 9 = **23**",
    "Area = 5 cm x 4 cm = 20 cm²",
    "Total cost: $12.99 + $7.01 = $20",
    "Area = 5 cm x 4 cm = 20 cm^2",
    "Volume = 2 m x 3 m x 4 m = 24 m^3",
    r"\(5 \text{ cm} \times 4 \text{ cm} = 20 \text{ cm}^{2}\) and 2^{10} = 1024",
    "1 1/2 + 1/2 = 2",
    "2 1/4 + 1 3/4 = 4",
    "3 - 1 1/2 = 1 1/2 = 1.5",
    r"1\frac{1}{2} + \frac{1}{2} = 2 and 2\frac{3}{2} = 3",
    "Step 3 1/2 + 1/4 = 3/4",
    "4 quarters x 25 cents = $1.00",
    "3 x 20 minutes = 1 hour",
    "$80 - 25% = $60",
    "100% - 25% = 75%",
    "-3^2 = -9 and (-3)^2 = 9 and 2^-1 = 0.5",
    "2 * -3^2 = −18",
)
WRONG_SUMS = (
    "3 + 4 = 8",
    "She has 3 apples + 4 apples = 8 apples left.",
    "He pays $5 × 2 = $12.",
    "12 * 3 = 36 = 35 + 2",
    "1/2 + 1/4 = 2/6",
    "20% of 50 = 20",
    "10 / 3 = 3.34",
    "10 / 3 = 3",
    "10 / 3 ≈ 5",
    "<<48/2=25>>25 clips",
    "1,000 - 250 = 650",
    "2 + 3 * 4 = 20",
    "-3 + 5 = 8",
    "2^10 = 1000",
    "2 million + 5 million = 8 million",
    r"\frac{3}{4} \times 8 = 7",
    "3 boxes × 4 apples = 13 apples",
    "0.1 + 0.2 = 0.30000000000000004",
    "5 / 20 = 20%",
    "Then 7 - 2 = 4, so 4 birds are left.",
    "1 1/2 + 1/2 = 1",
    "-3^2 = 9",
    "5 cm x 4 cm = 21 cm^2",
    "3 x 20 minutes = 61 minutes",
    "4 quarters x $2 = $9",
    "4 tickets x 25 = $101",
    "60 km / 2 hours = 31 km/h",
    "100% - 25% = 70%",
    "The rest, 10 / 2 = 4, remains. The remainder is 4.",
)
NO_SUMS = (
    "In 2020 the price was 5.",
    "Let x = 3 + y and 2x + 3 * 4 = 20.",
    "3x + 2 = 14",
    "x + 3 * 4 = 20",
    "sqrt(9 + 16) = 5",
    r"\sqrt{9 + 16} = 5",
    "3 m = 300 cm",
    "3 + 4 = ?",
    "3 + 4 != 8 and 2 + 2 >= 3",
    "```python\nassert 3 + 4 == 7\nx = 3 + 5 = 9\n```",
    "f(2 + 1) = 9",
    "5! + 1 = 121",
    "17 mod 5 = 2",
    "9 + 4 = 1 (mod 12)",
    "10 / 3 = 3 remainder 1",
    "10 ÷ 3 = 3 R1, and 17 / 5 = 3 r 2",
    "In binary, 1011 + 1 = 1100",
    "0x0A + 1 = 11",
    "With floating-point numbers, 0.1 + 0.2 = 0.30000000000000004",
    "9^9^9^9 = 7",
    "1 / 0 = 3",
    "2 + 3 = 5x",
    "Equation 2 1/2 + 1/4 = 3/4",
    "Round 1 1/2 of 8 = 4",
    "Group 3 1/2 x 10 = 5",
    "of the 8 1/2 x 8 = 4",
    "n(n + 1)/2 = 15",
)
"""Texts in which nothing may be found: there is no sum, or it cannot be told what it says."""
