"""How a story of the world is told: sentence patterns, one tuple for each beat.

A pattern is plain text with two kinds of marks: `{hero}` is filled from the facts of the story, `(this|that)` is a
choice. No word of the world's names, traits, objects, colours and places stands in a pattern, so a story mentions
exactly those it is about, and a program can tell.
"""

from __future__ import annotations

OPENINGS = (
    "(Once upon a time|Long ago|Once), there was a {trait} {species} called {hero}.",
    "{hero} the {species} was (very|rather|always) {trait}.",
    "In a (warm little house|little village|crooked house|tall old house) lived {hero}, a {trait} {species}.",
    "Everybody (knew|liked) {hero}, the {trait} {species}.",
    "This is (the story of|a tale about) {hero}, a {trait} {species}.",
    "One (sunny|rainy|windy|cold|bright) morning, {hero} the {species} woke up early. {He} was {trait}.",
    "There (once lived|was once) a {species} named {hero}, and {he} was {trait}.",
    "{hero} was a {species}. (All {his} friends|People|Even the postman) said that {he} was {trait}.",
)

WANTS = (
    "(More than anything|Above all), {he} wanted a {colour} {object} {reason}.",
    "{He} (was looking for|dreamed of|wished for) a {colour} {object} {reason}.",
    "One day {he} (lost|could not find) {his} {colour} {object}, and {he} needed it {reason}.",
    "A (crow|magpie|gust of wind) had carried off {his} {colour} {object}. {He} wanted it back {reason}.",
    "All week {he} had been thinking of a {colour} {object}. {He} needed it {reason}.",
    '"I need a {colour} {object}," {he} (said|told everyone). {He} wanted it {reason}.',
    "(Every night|For weeks), {he} thought about one thing: a {colour} {object}. {He} wanted it {reason}.",
)

HABITS = (
    "{He} liked (honey|jam|pancakes|apples|cheese) and (long walks|loud songs|warm socks|good jokes).",
    "{He} lived (alone|with an aunt|with six brothers) and (slept in a hammock|kept a diary).",
    "{His} house was (small but tidy|full of old pots|painted with stars), and {his} door was always open.",
    "{He} could (juggle|hop on one leg|count to a hundred|stand on {his} head) better than anyone.",
)

WRONG_TURNS = (
    "First {he} looked {at_wrong_place}, but there was only (dust|an old sock|a puzzled worm).",
    "{He} searched {at_wrong_place} and found nothing (at all|but crumbs).",
    "{He} spent a whole (hour|day|afternoon) {at_wrong_place}, but found (nothing|only pebbles).",
    "It was not {at_wrong_place}, although {he} looked (twice|under every stone|very carefully) there.",
)

CLUES = (
    "(Then a|A) (letter|note|postcard) came. It said that the {object} was {at_place}.",
    "(An old snail|A passing sparrow|The postman|A busy beetle) had seen the {object} {at_place}.",
    "Then {he} heard that the {object} was {at_place}.",
    '"Look {at_place}," (said the wise toad|whispered a moth|sang a blackbird|said the baker).',
    "(Somebody|A traveller) had left the {object} {at_place}, so {he} (packed some bread and left|set off).",
    "{He} asked (everyone|the moon) and learned that the {object} was {at_place}.",
)

OBSTACLE_SCENES = (
    "But on the way there was {obstacle}.",
    "(Soon|After a while|Half way there), {hero} came to {obstacle}.",
    "But (what a surprise|oh dear)! {Obstacle} was in the way.",
    "{hero} (hurried|walked|ran) along, until {obstacle} stopped {him}.",
    "There was (just one problem|only one trouble): {obstacle} was in the way.",
    "The path was (long|steep|narrow), and at the end of it was {obstacle}.",
)

FEELINGS = (
    '"(Oh no|Oh dear|Bother)," said {hero}. "(What now?|What shall I do?|I will never get there!)"',
    "{hero} sat down on a stone and (sighed|almost cried|thought hard).",
    "{hero} did not (know what to do|want to give up).",
    '"There must be a way," (said|whispered|muttered) {hero}.',
    "{hero} felt (small and sad|tired|a little afraid), but {he} did not go home.",
)

HELPS = (
    "(Just then|At that moment), {helper} the {helper_species} came by. {helper} {solution}.",
    'Along came {helper} the {helper_species}. "(Let me|I can) help," {helper} said. {helper} {solution}.',
    "{hero} called {helper} the {helper_species}. {helper} came (running|at once) and {solution}.",
    "{helper} the {helper_species} (heard it|saw it) and had (an idea|a plan). {helper} {solution}.",
    '"(Do you need help|Why so sad)?" asked {helper} the {helper_species}. Then {helper} {solution}.',
)

IDEAS = (
    "Then {hero} had (an idea|a wild idea|a bright idea). {hero} {solution}.",
    '"(I know|Wait|Aha)!" {he} said (at last|suddenly). {hero} {solution}.',
    "{hero} (rested|thought) for a while. Then, with a smile, {hero} {solution}.",
    "(Nobody was there to help|{He} was all alone), so {hero} had to think. In the end {hero} {solution}.",
)

FINDS = (
    "And there {at_place} was the {object}, (safe and sound|shining in the sun|waiting on a stone).",
    "Soon {hero} was {at_place}, and there lay the {object}.",
    "A (minute|moment) later {hero} found the {object} {at_place}.",
    "{hero} looked (high and low|everywhere) {at_place} and found the {object} (at last|in a box).",
    "At last {hero} held the {object} in {his} arms.",
    '"(Here it is|I have found it|Look)!" cried {hero}, and held up the {object}.',
)

THANKS = (
    '"Thank you, {helper}," said {hero}. They (hugged|shook hands|laughed) and (walked home|shared a cake).',
    "{hero} thanked {helper}, and from that day on they were (good|best|the best of) friends.",
    "{hero} and {helper} (danced|sang|skipped) all the way home.",
    '"(We did it|What a team)!" said {helper}, and {hero} (laughed|smiled|agreed).',
    "{hero} gave {helper} (a big hug|half of a sandwich|a warm smile), and they went home (happy|together).",
)

ENDINGS = (
    "Now {he} had a {colour} {object} {reason}.",
    "The {colour} {object} was just right {reason}.",
    "{hero} went home (with a happy heart|smiling|singing) and slept (well|like a stone).",
    "That night {hero} (smiled|was happy) and (dreamed of|thought about) new adventures.",
    "And {hero} was the happiest {species} (in the world|of all|for miles around).",
    "{hero} (never forgot|often told the tale of) that day.",
    "(It had been a long day|What a day it had been), but {hero} (was happy|would not have missed it).",
    "Everyone (cheered|clapped) when {hero} came home.",
)

MORALS = (
    "(A good friend|A little help) is worth more than gold.",
    "(So it is|And so we see): those who do not give up find a way.",
    "Sometimes a small idea solves a big problem.",
    "(From then on|After that), {hero} was never afraid to try.",
    "And that is the end of the story.",
)
