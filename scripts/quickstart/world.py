"""The story world, as data: who lives in it, what they look for, what is in the way; `patterns.py` tells it."""

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
