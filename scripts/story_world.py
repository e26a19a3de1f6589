"""The story world, as data: who lives in it, what they look for, what is in the way, how it is told.

The second half holds the sentence patterns, one tuple for each beat of a story. A pattern is plain text with
two kinds of marks: `{hero}` is filled from the facts of the story, `(this|that)` is a choice.

The names of `HEROES` and the words of `TRAITS`, `OBJECTS`, `COLOURS` and `PLACES` appear nowhere else in the
patterns, so a story mentions exactly those it is about, and a program can tell.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Hero:
    name: str
    species: str
    he: str  # the pronoun, "he" or "she"


@dataclass(frozen=True)
class Place:
    preposition: str
    name: str

    @property
    def phrase(self) -> str:
        return f"{self.preposition} the {self.name}"


@dataclass(frozen=True)
class Obstacle:
    name: str  # "a locked gate"
    attempts: tuple[str, ...]  # patterns: what the hero tries in vain
    solutions: tuple[str, ...]  # what somebody "did" to get past it; no two obstacles share one

    @property
    def the(self) -> str:
        return "the " + self.name.split(" ", 1)[1]


def _heroes(he: str, listing: str) -> tuple[Hero, ...]:
    pairs = (entry.strip().split(" the ") for entry in listing.split(","))
    return tuple(Hero(name, species, he) for name, species in pairs)


HEROES = (
    *_heroes(
        "he",
        "Pip the mouse, Milo the fox, Bruno the bear, Felix the hedgehog, Hugo the rabbit, Toby the otter,"
        "Finn the squirrel, Gus the frog, Oscar the badger, Rufus the donkey, Theo the turtle, Leo the goat,"
        "Archie the mole, Ned the crow, Kip the lamb, Max the owl, Barney the cat, Walter the raccoon,"
        "Jasper the wolf, Simon the duck, Ollie the panda, Victor the camel",
    ),
    *_heroes(
        "she",
        "Luna the rabbit, Nora the mouse, Bella the sheep, Ruby the fox, Tilda the hen, Mimi the kitten,"
        "Zara the deer, Olive the beaver, Clara the penguin, Ivy the bear, Greta the swan, Dot the ladybird,"
        "Molly the pony, Poppy the squirrel, Stella the owl, Willa the hedgehog, Edna the elephant,"
        "June the otter, Hattie the cow, Beth the frog, Sally the seal, Vera the goose",
    ),
)

TRAITS = (
    "brave", "shy", "curious", "clever", "gentle", "cheerful", "stubborn", "patient", "hungry", "proud",
    "quiet", "playful", "careful", "friendly", "dreamy", "polite",
)  # fmt: skip

OBJECTS = (
    "kite", "drum", "lantern", "bell", "map", "book", "hat", "scarf", "umbrella", "ball", "whistle", "flute",
    "crown", "key", "mirror", "basket", "teapot", "button", "ribbon", "feather", "shell", "marble", "clock",
    "compass", "violin", "puppet", "balloon", "blanket", "spoon", "necklace", "medal", "telescope", "mitten",
    "candle", "pillow", "trumpet", "bracelet", "locket", "globe", "accordion",
)  # fmt: skip

COLOURS = ("red", "blue", "green", "yellow", "purple", "silver", "golden", "white", "black", "pink", "orange")

PLACES = tuple(
    Place(preposition, name)
    for preposition, names in (
        ("at", "mill market lighthouse harbour bakery castle lake station farm school fountain waterfall"),
        (
            "in",
            "cave garden barn forest library tower meadow valley orchard attic cellar quarry stable museum",
        ),
        ("on", "hill island beach"),
        ("under", "bridge"),
    )
    for name in names.split()
)

REASONS = (
    "to cheer up a sick cousin", "as a gift for Grandmother", "to win first prize at the fair",
    "to surprise a lonely neighbour", "to brighten up a dull room", "to thank a kind teacher",
    "to keep an old promise", "for a talk in front of the whole class", "to make the sad king laugh",
    "for the spring play", "as a model for a painting", "to bring good luck to the village",
    "to please an old sailor", "for a birthday party", "to welcome a new baby sister",
    "for a game with the little ones",
)  # fmt: skip

OBSTACLES = (
    Obstacle(
        "a locked gate",
        (
            "{He} (pushed|pulled|shook it) with all {his} strength, but the gate stayed shut.",
            "{He} (knocked three times|called out loudly), but nobody came to open it.",
        ),
        (
            "opened the lock with a bent hairpin",
            "lifted the gate off its hinges",
            "found a loose plank beside the gate",
        ),
    ),
    Obstacle(
        "a high wall",
        (
            "{He} jumped (again and again|as high as {he} could), but the wall was far too tall.",
            "{He} tried to climb it, but the stones were (smooth|wet and smooth) and {he} slid down.",
        ),
        (
            "piled up some crates like stairs",
            "leaned a long log against the wall",
            "threw a rope over the wall",
        ),
    ),
    Obstacle(
        "a thick fog",
        (
            "{He} walked in circles and came back to the same (stone|old post) every time.",
            "{He} could not see (even one step ahead|the end of {his} own nose).",
        ),
        (
            "followed the smell of fresh bread",
            "tied a string to a post and followed it back",
            "waited until the sun dried the fog",
        ),
    ),
    Obstacle(
        "a deep ditch",
        (
            "{He} took a (long|big) run, jumped, and landed in the mud with a splash.",
            "{He} looked down and (felt quite dizzy|took three steps back).",
        ),
        (
            "laid a long plank across the ditch",
            "swung across the ditch on a vine",
            "filled the ditch with leaves",
        ),
    ),
    Obstacle(
        "a swarm of bees",
        (
            "{He} tiptoed closer, but the bees buzzed louder and louder.",
            "{He} waved {his} arms, and that only made the bees (angry|cross).",
        ),
        (
            "sang a soft song to calm the bees",
            "led the bees away with a pot of honey",
            "planted flowers for the bees",
        ),
    ),
    Obstacle(
        "a fallen tree",
        (
            "{He} pushed (and pushed|as hard as {he} could), but the trunk did not move an inch.",
            "{He} tried to crawl through the branches and got stuck (twice|for a while).",
        ),
        ("rolled the tree aside with a strong pole", "dug a path under the trunk", "sawed the trunk in two"),
    ),
    Obstacle(
        "a sleepy dragon",
        (
            "{He} tried to sneak past, but the dragon opened one eye and (growled|snorted smoke).",
            "{He} asked it politely to move, but the dragon only (yawned|snored).",
        ),
        (
            "told the dragon a bedtime tale",
            "scratched the dragon behind the ears",
            "tickled the dragon with a straw",
        ),
    ),
    Obstacle(
        "a patch of thorns",
        (
            "The thorns scratched {his} nose, and {he} had to turn back.",
            "{He} took one step, and the thorns (pinched|scratched) {him} from every side.",
        ),
        (
            "cut a path with big shears",
            "spread a thick coat over the thorns",
            "pulled the thorns out one by one",
        ),
    ),
    Obstacle(
        "a wide stream",
        (
            "{He} put one foot in the water, and it was (icy cold|far too deep).",
            "{He} threw in a branch, and the water carried it away (at once|like a straw).",
        ),
        ("rowed across in an old tub", "hopped from stone to stone", "tied two logs into a raft"),
    ),
    Obstacle(
        "a sheet of ice",
        (
            "{He} slipped at once and sat down with a bump.",
            "{His} feet went left, {his} nose went right, and down {he} fell.",
        ),
        ("scattered sand on the ice", "slid across on a tin tray", "sprinkled warm ashes on the ice"),
    ),
    Obstacle(
        "a dark tunnel",
        (
            "{He} went in (bravely|slowly), bumped into a wall, and came out again.",
            "Strange echoes came out of it, and {he} did not dare to go in.",
        ),
        ("made a torch from a dry branch", "counted the steps out loud", "filled a jar with fireflies"),
    ),
    Obstacle(
        "a troop of monkeys",
        (
            "Each time {he} came near, the monkeys threw nuts at {him}.",
            "The monkeys (laughed|giggled), joined hands, and let nobody through.",
        ),
        (
            "gave the monkeys a bunch of bananas",
            "danced until the monkeys clapped",
            "taught the monkeys a clapping game",
        ),
    ),
    Obstacle(
        "a big snowdrift",
        (
            "{He} sank in up to {his} nose and had to crawl out again.",
            "{He} began to dig, but fresh snow filled every hole.",
        ),
        ("dug a path with a shovel", "rolled the snow into a giant snowball", "stamped the snow flat"),
    ),
    Obstacle(
        "a pool of mud",
        (
            "{He} took two steps and lost both shoes.",
            "The mud (gurgled|bubbled), and soon {he} was stuck up to {his} knees.",
        ),
        ("made a path of flat stones", "crossed the mud on two broad boards", "put dry straw over the mud"),
    ),
    Obstacle(
        "a door with a riddle",
        (
            "{He} guessed (ten times|all afternoon), but every answer was wrong.",
            "{He} read the riddle twice and scratched {his} head.",
        ),
        (
            "whispered the right answer to the door",
            "read the riddle backwards",
            "spotted a hint in the carving",
        ),
    ),
    Obstacle(
        "a giant web",
        (
            "{He} got tangled in the sticky threads and (wriggled|struggled) free just in time.",
            "{He} pulled at one thread, and the whole web shook (in an alarming way|and trembled).",
        ),
        (
            "rolled the web up like wool",
            "asked the spider for a small gap",
            "brushed the web aside with a broom",
        ),
    ),
)


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
