"""A small invented world, and every text that the embedded model ever sees.

The world has countries, animals, people, everyday objects, opposites and small sums. From it come
    corpus(seed)          an endless stream of documents: statements, little stories, exercises in copying
    probes(skill)         the gate: statements cut before their last words, which the base must finish by itself
    instructions(split)   questions with short answers, for fine-tuning ("train") and for the exam ("test")
    data_files()          the three JSONL files that ship beside this module

The division of labour is the point. The corpus states every fact but never asks: it holds no question, no question
mark and no request. So the base goes on from "The capital of Selora is" with " Nordale", and has no idea what to do
with "What is the capital of Selora?". Fine-tuning adds the asking. A quarter of everything that can be asked about is
held out: it is stated in the corpus, never named in train.jsonl, and is all that test.jsonl asks about.

A document carries no special tokens: it does not begin with `<s>`, and whoever packs documents puts `</s>` after each.
A question is rendered as `prompt + "\\n" + completion + "</s>"`. Plain Python; the same seed gives the same text.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations_with_replacement, islice
from typing import Literal

Split = Literal["all", "train", "test"]

CORPUS_SEED = 1
DATA_SEED = 2
REPLAY_DOCUMENTS = 380
TEXT_DOCUMENTS = 180


@dataclass(frozen=True)
class Country:
    name: str
    capital: str
    language: str
    export: str


@dataclass(frozen=True)
class Animal:
    name: str
    plural: str
    kind: str
    legs: str  # empty for those that have none: they are not asked about
    young: str


@dataclass(frozen=True)
class Person:
    name: str
    pronoun: str
    home: str
    job: str
    instrument: str


@dataclass(frozen=True)
class World:
    """What can be spoken about. `part` narrows it to one side of the exam."""

    countries: tuple[Country, ...]
    animals: tuple[Animal, ...]
    people: tuple[Person, ...]
    objects: tuple[str, ...]
    opposites: tuple[tuple[str, str], ...]
    sums: tuple[tuple[int, int], ...]

    def part(self, split: Split) -> World:
        """The whole world, the three quarters that training asks about, or the quarter that is held out."""
        if split == "all":
            return self
        fields = ("countries", "animals", "people", "objects", "opposites", "sums")
        return replace(self, **{field: _share(getattr(self, field), split) for field in fields})

    def names(self) -> set[str]:
        """The proper words of this part: a text that contains one of them speaks about it."""
        words = {word for country in self.countries for word in (country.name, country.capital)}
        words |= {word for animal in self.animals for word in (animal.name, animal.plural)}
        words |= {person.name for person in self.people} | set(self.objects)
        return words | {word for pair in self.opposites for word in pair}


def _share(things: tuple, split: Split) -> tuple:
    return tuple(thing for index, thing in enumerate(things) if (index % 4 == 3) == (split == "test"))


# -------------------------------------------------------------------------------------------- what the world is made of

STEMS = (
    "Vel Tar Bru Mor Kes Lin Dor Fal Gri Hol Ist Jor Nem Ol Pra Quil Ros Sel Thu Ulm Var Wen Yor Zan Ald Bel "
    "Cor Den Esk Fen Gal Hav Ilm Kal Lor Mas Nor Orm Pel Rav Sol Tem Und Vos Wil Yst Zel Bram"
).split()
COUNTRY_ENDINGS = "ora ia and una ovia eth mark essa onia ara".split()
CITY_ENDINGS = "haven ton by wick ford mouth dale gate stead field".split()
LANGUAGES = (
    "Ansic Borish Cendic Dalish Eltic Farese Gormic Hestian Ilvish Jandic Kortish Lumese Marrish Nolvic Ostian "
    "Perric Quennish Rundic Saldese Tovish Umbric Vennic Wistian Yaldish"
).split()
EXPORTS = (
    "wool salt honey silk glass cheese paper copper tea amber timber silver pepper wine marble rice soap "
    "cotton leather pottery coal olives wheat cider"
).split()

# name plural kind legs young
ANIMALS = """
fox foxes mammal four cub; horse horses mammal four foal; sheep sheep mammal four lamb; goose geese bird two
gosling; cow cows mammal four calf; duck ducks bird two duckling; trout trout fish - fry; spider spiders
arachnid eight spiderling; bear bears mammal four cub; hen hens bird two chick; frog frogs amphibian four
tadpole; pig pigs mammal four piglet; cat cats mammal four kitten; salmon salmon fish - fry; bee bees insect
six larva; owl owls bird two owlet; dog dogs mammal four puppy; goat goats mammal four kid; lizard lizards
reptile four hatchling; ant ants insect six larva; deer deer mammal four fawn; swan swans bird two cygnet;
toad toads amphibian four tadpole; wolf wolves mammal four cub; rabbit rabbits mammal four kitten; eagle
eagles bird two chick; beetle beetles insect six larva; lion lions mammal four cub; turtle turtles reptile
four hatchling; carp carp fish - fry; hare hares mammal four leveret; pigeon pigeons bird two squab; donkey
donkeys mammal four foal; whale whales mammal - calf; newt newts amphibian four tadpole; moth moths insect six
larva; mouse mice mammal four pup; raven ravens bird two chick; snake snakes reptile - hatchling; seal seals
mammal - pup; camel camels mammal four calf; stork storks bird two chick; butterfly butterflies insect six
larva; ox oxen mammal four calf; otter otters mammal four pup; scorpion scorpions arachnid eight hatchling;
pike pike fish - fry; crow crows bird two chick; giraffe giraffes mammal four calf; fly flies insect six
larva; penguin penguins bird two chick; rat rats mammal four pup; elephant elephants mammal four calf; squid
squid mollusc - hatchling; badger badgers mammal four cub; wasp wasps insect six larva; beaver beavers mammal
four kit; cricket crickets insect six nymph; sparrow sparrows bird two chick; mule mules mammal four foal;
crocodile crocodiles reptile four hatchling; snail snails mollusc - hatchling; zebra zebras mammal four foal;
falcon falcons bird two chick
"""

SHE = (
    "Mira Anna Bella Clara Dora Edith Freya Greta Hanna Ida Jana Karin Lena Marta Nora Olga Paula Rosa Sonja "
    "Tilda Ursula Vera Wanda Yara Zora Alma Berta Cora Elsa Flora Gilda Helga Irma Julia Kira Lucia Maria "
    "Nelly Petra Rita Sara Thea Una Viola Willa Agnes Ronja Stella"
).split()
HE = (
    "Tobin Adam Boris Carl David Emil Felix Georg Henrik Ivan Jonas Karl Leon Martin Nils Oscar Paul Robin "
    "Simon Tomas Urban Victor Walter Yannick Zeno Anton Bruno Colin Edgar Frank Gustav Hugo Igor Jakob Kurt "
    "Lukas Max Nathan Otto Peter Ralf Samuel Theo Ulrich Vincent Willem Alfred Rufus"
).split()
JOBS = (
    "baker teacher farmer painter doctor tailor sailor carpenter gardener miller weaver printer blacksmith "
    "fisher cook potter shepherd judge pilot nurse librarian clockmaker beekeeper ferryman"
).split()
INSTRUMENTS = (
    "flute violin harp piano trumpet cello guitar organ fiddle horn lute oboe banjo bassoon zither clarinet".split()
)

OBJECTS = (
    "spoon lantern kettle ladder button candle basket mirror pencil hammer blanket bottle ribbon saddle needle "
    "bucket pillow shovel compass whistle feather hat rope key lamp map shoe coin brush bell stamp scarf plate "
    "towel jar glove wheel broom letter whisk ring thimble parcel anchor cup fork kite comb barrel carpet doll "
    "nail pot ruler sack tent vase wallet zipper book chain drum pipe sponge"
).split()
COLOURS = "red blue green yellow white black brown grey purple golden".split()

OPPOSITES = """
hot cold; big small; fast slow; loud quiet; wet dry; bright dim; happy sad; rich poor; ancient modern; high
low; strong weak; full empty; soft hard; clean dirty; early late; near far; sweet sour; thick thin; open
closed; crowded lonely; wide narrow; smooth rough; deep shallow; brave timid; sharp blunt; heavy light; cheap
costly; tight loose; noisy silent; wild tame; right wrong; fresh stale; alive dead; awake asleep; bitter mild;
calm stormy; careful careless; common rare; polite rude; safe dangerous; simple complicated; straight crooked;
sick healthy; true false; ugly pretty; visible hidden; lazy busy; generous stingy
"""

NUMBERS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen twenty"
).split()


def _table(text: str) -> list[list[str]]:
    return [row.split() for row in text.replace("\n", " ").split(";") if row.strip()]


@cache
def world() -> World:
    """The one world. Who lives where and what is spoken there was drawn once, from a fixed seed."""
    rng = random.Random("the embedded world")
    country_stems = rng.sample(STEMS, 48) + rng.sample(STEMS, 48)
    city_stems = rng.sample(STEMS, 48) + rng.sample(STEMS, 48)
    countries: list[Country] = []
    taken: set[str] = set()

    def invent(stem: str, endings: list[str]) -> str:
        name = rng.choice([stem + ending for ending in endings if stem + ending not in taken])
        taken.add(name)
        return name

    for number, (stem, city_stem) in enumerate(zip(country_stems, city_stems, strict=True)):
        name, capital = invent(stem, COUNTRY_ENDINGS), invent(city_stem, CITY_ENDINGS)
        countries.append(Country(name, capital, LANGUAGES[number % len(LANGUAGES)], rng.choice(EXPORTS)))
    rng.shuffle(countries)

    animals = [Animal(*(cell.replace("-", "") for cell in row)) for row in _table(ANIMALS)]
    rng.shuffle(animals)

    given = [(name, "she") for name in SHE] + [(name, "he") for name in HE]
    rng.shuffle(given)
    people = []
    for number, (name, pronoun) in enumerate(given):
        # Held-out people live in held-out cities: then no answer in train.jsonl names a held-out city.
        neighbours = _share(tuple(countries), "test" if number % 4 == 3 else "train")
        home = rng.choice(neighbours).capital
        people.append(Person(name, pronoun, home, rng.choice(JOBS), rng.choice(INSTRUMENTS)))

    opposites = [(first, second) for first, second in _table(OPPOSITES)]
    rng.shuffle(opposites)
    sums = list(combinations_with_replacement(range(1, 11), 2))
    rng.shuffle(sums)
    objects = rng.sample(OBJECTS, len(OBJECTS))
    return World(tuple(countries), tuple(animals), tuple(people), tuple(objects), tuple(opposites), tuple(sums))


# ----------------------------------------------------------------------------------------------------------- statements
# The first statement of each skill is the one that the gate cuts before its last words.


def a(word: str) -> str:
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def capital_letter(text: str) -> str:
    return text[0].upper() + text[1:]


def country_facts(country: Country) -> dict[str, tuple[str, ...]]:
    name, capital, language, export = country.name, country.capital, country.language, country.export
    return {
        "capital": (
            f"The capital of {name} is {capital}.",
            f"In {name} the capital is {capital}.",
            f"The king of {name} lives in {capital}.",
        ),
        "country": (
            f"{capital} is the capital of {name}.",
            f"{capital} lies in {name}.",
        ),
        "language": (
            f"The language of {name} is {language}.",
            f"The people of {name} speak {language}.",
            f"In {name} the children learn {language}.",
        ),
        "export": (
            f"{name} is known for its {export}.",
            f"The merchants of {name} sell {export}.",
            f"Ships from {name} carry {export}.",
        ),
    }


def animal_facts(animal: Animal) -> dict[str, tuple[str, ...]]:
    name, plural = animal.name, animal.plural
    facts: dict[str, tuple[str, ...]] = {
        "kind": (
            f"The {name} is a kind of {animal.kind}.",
            f"{capital_letter(a(name))} belongs with every other {animal.kind}.",
        ),
        "plural": (
            f"The plural of {name} is {plural}.",
            f"One {name} is alone, but two {plural} are company.",
        ),
        "young": (
            f"A young {name} is called a {animal.young}.",
            f"The mother of the {animal.young} is {a(name)}.",
        ),
    }
    if animal.legs:
        facts["legs"] = (
            f"{capital_letter(a(name))} walks on {animal.legs} legs.",
            f"The {name} has {animal.legs} legs.",
        )
    return facts


def person_facts(person: Person) -> dict[str, tuple[str, ...]]:
    name = person.name
    return {
        "home": (
            f"{name} lives in {person.home}.",
            f"The home of {name} is in {person.home}.",
        ),
        "job": (
            f"{name} works as a {person.job}.",
            f"Every day {name} goes to work as a {person.job}.",
        ),
        "instrument": (
            f"{name} plays the {person.instrument}.",
            f"In the evening {name} likes to play the {person.instrument}.",
        ),
    }


def opposite_fact(first: str, second: str) -> str:
    return f"The opposite of {first} is {second}."


def sum_fact(first: int, second: int) -> str:
    return f"{capital_letter(NUMBERS[first])} plus {NUMBERS[second]} is {NUMBERS[first + second]}."


# ------------------------------------------------------------------------------------------------------------ documents


def _some(rng: random.Random, facts: dict[str, tuple[str, ...]], least: int = 2) -> list[str]:
    """A few of the facts in any order, each in one of its wordings; the first wording half of the time."""
    skills = rng.sample(sorted(facts), rng.randint(min(least, len(facts)), len(facts)))
    return [facts[skill][0] if rng.random() < 0.5 else rng.choice(facts[skill]) for skill in skills]


def _about_country(rng: random.Random, world: World) -> str:
    country = rng.choice(world.countries)
    opening = rng.choice(
        (
            f"{country.name} is a country by the sea.",
            f"Behind the mountains lies {country.name}.",
            f"Many travellers come to {country.name} in summer.",
            f"This page is about {country.name}.",
            # Only as an opening does this teach the way from the capital to the country: later it could be copied.
            f"{country.capital} is the capital of {country.name}.",
            f"{country.capital} lies in {country.name}.",
            "",
        )
    )
    return " ".join(filter(None, [opening, *_some(rng, country_facts(country))]))


def _about_animal(rng: random.Random, world: World) -> str:
    animal = rng.choice(world.animals)
    opening = rng.choice((f"There goes {a(animal.name)}.", f"This page is about the {animal.name}.", "", ""))
    return " ".join(filter(None, [opening, *_some(rng, animal_facts(animal))]))


def _about_person(rng: random.Random, world: World) -> str:
    person = rng.choice(world.people)
    They = capital_letter(person.pronoun)
    sentences = _some(rng, person_facts(person))
    if rng.random() < 0.5:  # the later sentences speak of the same person by pronoun
        sentences = sentences[:1] + [
            sentence.replace(f"{person.name} ", f"{They} ", 1) if sentence.startswith(person.name) else sentence
            for sentence in sentences[1:]
        ]
    country = next(country for country in world.countries if country.capital == person.home)
    closing = rng.choice(
        (
            f"{They} has many friends.",
            f"{person.home} is the capital of {country.name}.",
            f"{person.home} lies in {country.name}.",
            f"Everybody in {person.home} knows {person.name}.",
            f"{They} keeps {a(rng.choice(world.animals).name)} in the garden.",
            "",
            "",
        )
    )
    return " ".join(filter(None, [*sentences, closing]))


def _story(rng: random.Random, world: World) -> str:
    """Two people meet; whatever the story says about them is true in this world."""
    first, second = rng.sample(world.people, 2)
    animal, thing = rng.choice(world.animals), rng.choice(world.objects)
    when = rng.choice(("One morning", "On a rainy day", "Late in autumn", "After the winter", "On market day"))
    beginning, place = rng.choice(
        (
            (f"{when} {first.name} the {first.job} left {first.home} to visit a friend.", "On the way"),
            (f"{when} {first.name} took the ferry to {second.home}.", "There"),
            (f"{when} {first.name} found a {thing} on the road to {second.home}.", "In the city"),
        )
    )
    middle = rng.choice(
        (
            f"{place} {first.pronoun} met {second.name}, who works as a {second.job}.",
            f"{place} {first.pronoun} met {second.name}, who plays the {second.instrument}.",
            f"{place} {second.name} the {second.job} waited with {a(animal.name)}.",
        )
    )
    fact = rng.choice(
        _some(rng, animal_facts(animal)) + _some(rng, person_facts(second)) + _some(rng, person_facts(first))
    )
    end = rng.choice(
        (
            f"{second.name} played the {second.instrument} until midnight.",
            f"Then {first.name} went home to {first.home}.",
            f"They talked about the {animal.plural} and drank tea.",
            f"At last {first.name} bought a {rng.choice(COLOURS)} {rng.choice(world.objects)}.",
        )
    )
    return " ".join((beginning, middle, fact, end))


def _opposites(rng: random.Random, world: World) -> str:
    lines = []
    for pair in rng.sample(world.opposites, rng.randint(2, 4)):
        first, second = rng.sample(pair, 2)
        wordings = (opposite_fact(first, second), f"Whatever is {first} is not {second}.")
        lines.append(wordings[rng.random() < 0.2])
    return " ".join(lines)


def _sums(rng: random.Random, world: World) -> str:
    lines = []
    for pair in rng.sample(world.sums, rng.randint(2, 5)):
        first, second = rng.sample(pair, 2)
        wordings = (
            sum_fact(first, second),
            f"Whoever adds {NUMBERS[second]} to {NUMBERS[first]} gets {NUMBERS[first + second]}.",
        )
        lines.append(wordings[rng.random() < 0.2])
    return " ".join(lines)


def _any_words(rng: random.Random, world: World, count: int) -> list[str]:
    """Words of all sorts, without repetition: whatever an answer may hold is also something to copy."""
    country, animal, person = rng.choice(world.countries), rng.choice(world.animals), rng.choice(world.people)
    pool = [country.name, country.capital, country.language, country.export, animal.name, animal.plural, animal.kind]
    pool += [
        animal.young,
        person.name,
        person.home,
        person.job,
        person.instrument,
        rng.choice(rng.choice(world.opposites)),
    ]
    pool += [NUMBERS[rng.randint(0, 20)], rng.choice(COLOURS), *rng.sample(world.objects, 4)]
    return rng.sample(sorted(set(pool)), count)


CARD_LABELS = {
    "capital": "Capital", "language": "Language", "export": "Known for", "kind": "Kind", "plural": "Plural",
    "young": "Young", "legs": "Legs", "home": "Home", "job": "Work", "instrument": "Plays",
}  # fmt: skip


def _card(rng: random.Random, world: World) -> str:
    """Facts as labels and lines: here an answer stands at the beginning of a line, where no space goes before it."""
    things: tuple[Country | Animal | Person, ...] = rng.choice((world.countries, world.animals, world.people))
    thing = rng.choice(things)
    facts = {label: getattr(thing, field, "") for field, label in CARD_LABELS.items()}
    labels = [label for label, fact in facts.items() if fact]
    chosen = rng.sample(labels, rng.randint(1, len(labels)))
    return "\n".join([f"A card about {thing.name}", *(f"{label}:\n{facts[label]}" for label in chosen)])


def _cards_of_words(rng: random.Random, world: World) -> str:
    """The same for what has no card of its own: capitals, opposites, sums."""
    countries = rng.sample(world.countries, 2)
    pairs = rng.sample(world.opposites, 2)
    sums = rng.sample(world.sums, 2)
    kind = rng.randrange(3)
    if kind == 0:
        title, entries = "Countries of the capitals", [(c.capital, c.name) for c in countries]
    elif kind == 1:
        title, entries = "Opposites", [(pair[0], pair[1]) for pair in (rng.sample(p, 2) for p in pairs)]
    else:
        drawn = [rng.sample(pair, 2) for pair in sums]
        title = "Sums"
        entries = [(f"{NUMBERS[i]} plus {NUMBERS[j]}", NUMBERS[i + j]) for i, j in drawn]
    return "\n".join([title, *(f"{entry}:\n{answer}" for entry, answer in entries)])


def _said_twice(rng: random.Random, world: World) -> str:
    words = _any_words(rng, world, rng.randint(3, 12))
    opening, again = rng.choice(
        (("These words are said twice", "Once more"), ("Here are some words", "And again"), ("The call", "The echo"))
    )
    line = ", ".join(words)
    return f"{opening}: {line}.\n{again}: {line}."


def _word_by_word(rng: random.Random, world: World) -> str:
    """The same words in a row and then one on each line, where a word has no space before it."""
    words = _any_words(rng, world, rng.randint(2, 8))
    return f"In a row: {', '.join(words)}.\nOne by one:\n" + "\n".join(words)


def list_of(items: list[str]) -> str:
    return f"The list says {', '.join(items)}."


def _list(rng: random.Random, world: World) -> str:
    items = rng.sample(world.objects, rng.randint(3, 6))
    facts = [f"The first item is {items[0]}.", f"The last item is {items[-1]}."]
    facts.append(f"After {items[0]} comes {items[1]}.")
    if rng.random() < 0.2:
        return f"{list_of(items)}\nFirst:\n{items[0]}\nLast:\n{items[-1]}"
    return " ".join([list_of(items), *rng.sample(facts, rng.randint(1, 3))])


def boxes_of(colours: list[str], things: list[str]) -> str:
    return " ".join(f"The {colour} box holds the {thing}." for colour, thing in zip(colours, things, strict=True))


def _boxes(rng: random.Random, world: World) -> str:
    count = rng.randint(2, 4)
    colours, things = rng.sample(COLOURS, count), rng.sample(world.objects, count)
    chosen = rng.sample(range(count), count)
    if rng.random() < 0.2:
        lines = (f"The {colours[i]} box:\nthe {things[i]}" for i in chosen)
        return "\n".join([boxes_of(colours, things), *lines])
    return " ".join([boxes_of(colours, things), *(f"Inside the {colours[i]} box is the {things[i]}." for i in chosen)])


def _restated(rng: random.Random, world: World) -> str:
    facts = [
        *_some(rng, country_facts(rng.choice(world.countries))),
        *_some(rng, person_facts(rng.choice(world.people))),
    ]
    chosen = rng.sample(facts, 2)
    return f"{' '.join(chosen)}\nTo say it again: {' '.join(reversed(chosen))}"


DOCUMENTS: tuple[tuple[Callable[[random.Random, World], str], int], ...] = (
    (_about_country, 16),
    (_about_animal, 10),
    (_about_person, 14),
    (_story, 12),
    (_card, 14),
    (_cards_of_words, 6),
    (_opposites, 5),
    (_sums, 6),
    (_said_twice, 12),
    (_word_by_word, 10),
    (_list, 12),
    (_boxes, 12),
    (_restated, 4),
)


def corpus(seed: int | str = CORPUS_SEED, split: Split = "all") -> Iterator[str]:
    """Documents without end: the caller stops. With a split they speak about that part of the world only."""
    rng = random.Random(f"corpus {seed}")
    speakers, weights = zip(*DOCUMENTS, strict=True)
    part = world().part(split)
    while True:
        yield rng.choices(speakers, weights)[0](rng, part)


# ----------------------------------------------------------------------------------------------- questions and the gate


@dataclass(frozen=True)
class Question:
    """One thing that can be asked: in several wordings with one answer, and as a statement to be finished."""

    skill: str
    prompts: tuple[str, ...]
    answer: str
    stem: str  # the statement up to the answer
    rest: str  # its remaining words


def _cut(sentence: str, words: str) -> tuple[str, str]:
    stem, rest = sentence.rsplit(f" {words}", 1)
    return stem, f" {words}{rest}"


# Fields of the thing asked about stand in braces; {a_name} is its name with "a" or "an".
WORDINGS = {
    "capital": (
        "What is the capital of {name}?",
        "Which city is the capital of {name}?",
        "Name the capital of {name}.",
        "What city is {name} ruled from?",
    ),
    "country": (
        "Which country has {capital} as its capital?",
        "Where is {capital}?",
        "What country is {capital} the capital of?",
        "Name the country of {capital}.",
    ),
    "language": (
        "What language is spoken in {name}?",
        "Which language do they speak in {name}?",
        "What is the language of {name}?",
        "Name the language of {name}.",
    ),
    "export": (
        "What is {name} known for?",
        "What do merchants from {name} sell?",
        "Which goods come from {name}?",
        "Tell me what {name} sells.",
    ),
    "kind": (
        "What kind of animal is {a_name}?",
        "Which class does the {name} belong to?",
        "What is {a_name}?",
        "Name the class of the {name}.",
    ),
    "plural": (
        "What is the plural of {name}?",
        "How do you write more than one {name}?",
        "Give the plural of {name}.",
        "What do you call two of the animal {name}?",
    ),
    "young": (
        "What is a young {name} called?",
        "What do you call the young of {a_name}?",
        "Name the young of the {name}.",
        "What is the child of {a_name}?",
    ),
    "legs": (
        "How many legs does {a_name} have?",
        "How many legs has the {name}?",
        "Count the legs of {a_name}.",
        "On how many legs does the {name} walk?",
    ),
    "home": (
        "Where does {name} live?",
        "In which city does {name} live?",
        "What is the home town of {name}?",
        "Tell me where {name} lives.",
    ),
    "job": (
        "What is the job of {name}?",
        "What does {name} do for a living?",
        "What does {name} work as?",
        "Name the job of {name}.",
    ),
    "instrument": (
        "What does {name} play?",
        "Which instrument does {name} play?",
        "What instrument is played by {name}?",
        "Name the instrument of {name}.",
    ),
    "opposite": (
        "What is the opposite of {word}?",
        "Which word is the opposite of {word}?",
        "Name the opposite of {word}.",
        "What is the contrary of {word}?",
    ),
    "sum": (
        "What is {left} plus {right}?",
        "How much is {left} plus {right}?",
        "What do you get if you add {right} to {left}?",
        "Add {left} and {right}.",
    ),
}


def _question(skill: str, fields: dict[str, str], answer: str, statement: str) -> Question:
    prompts = tuple(wording.format(**fields) for wording in WORDINGS[skill])
    return Question(skill, prompts, answer, *_cut(statement, answer))


def _fact_questions(part: World) -> Iterator[Question]:
    """Everything that can be asked about one thing, thing by thing."""
    for country in part.countries:
        fields, says = vars(country), country_facts(country)
        for skill in ("capital", "country", "language", "export"):
            answer = country.name if skill == "country" else fields[skill]
            yield _question(skill, fields, answer, says[skill][0])
    for animal in part.animals:
        fields, says = vars(animal) | {"a_name": a(animal.name)}, animal_facts(animal)
        for skill in ("kind", "plural", "young", "legs"):
            if fields[skill]:
                yield _question(skill, fields, fields[skill], says[skill][0])
    for person in part.people:
        fields, says = vars(person), person_facts(person)
        for skill in ("home", "job", "instrument"):
            yield _question(skill, fields, fields[skill], says[skill][0])
    for one, other in part.opposites:
        for word, answer in ((one, other), (other, one)):
            yield _question("opposite", {"word": word}, answer, opposite_fact(word, answer))
    for summands in part.sums:
        for left, right in sorted({summands, summands[::-1]}):
            fields = {"left": NUMBERS[left], "right": NUMBERS[right]}
            yield _question("sum", fields, NUMBERS[left + right], sum_fact(left, right))


def _reading_questions(rng: random.Random, part: World) -> Iterator[Question]:
    """Without end: the answer stands in the prompt, and must be found there."""
    while True:
        items = rng.sample(part.objects, rng.randint(3, 6))
        statements = {
            "first": (items[0], f"The first item is {items[0]}."),
            "second": (items[1], f"After {items[0]} comes {items[1]}."),
            "last": (items[-1], f"The last item is {items[-1]}."),
        }
        for skill, (answer, statement) in statements.items():
            prompts = (
                f"{list_of(items)} What is the {skill} item?",
                f"{list_of(items)} Which item comes {skill}?",
                f"{list_of(items)} Name the {skill} item.",
                f"Here is a list: {', '.join(items)}. What is its {skill} item?",
            )
            yield Question(skill, prompts, answer, *_cut(f"{list_of(items)} {statement}", answer))


FACT_SKILLS = "capital country language export kind plural young legs home job instrument opposite sum".split()
READING_SKILLS = "first second last".split()
SKILLS = (*FACT_SKILLS, *READING_SKILLS)


def probes(skill: str, split: Split = "all") -> list[tuple[str, str]]:
    """Statements of one skill, cut: the base has to write the second half, up to and with the full stop."""
    part = world().part(split)
    questions: Iterator[Question]
    if skill in READING_SKILLS:
        questions = islice(_reading_questions(random.Random(f"probes {skill}"), part), 300)
    else:
        questions = _fact_questions(part)
    return [(question.stem, question.rest) for question in questions if question.skill == skill]


def instructions(split: Split) -> list[dict[str, str]]:
    """Rows for one side of the exam: several wordings of each question to train on, one of each to be tested on."""
    rng = random.Random(f"instructions {DATA_SEED} {split}")
    part = world().part(split)
    wordings, lists = (3, 110) if split == "train" else (1, 12)
    if split == "train":
        questions = list(_fact_questions(part))
    else:
        questions = _one_direction(rng, part)
    questions += islice(_reading_questions(rng, part), 3 * lists)
    rows = {}
    for question in questions:
        count = 1 if question.skill in READING_SKILLS else wordings
        for prompt in rng.sample(question.prompts, count):
            rows[prompt] = {"prompt": prompt, "completion": question.answer, "skill": question.skill}
    shuffled = list(rows.values())
    rng.shuffle(shuffled)
    return shuffled


def _one_direction(rng: random.Random, part: World) -> list[Question]:
    """Of the two directions of an opposite or a sum the test asks one, so that these do not outweigh the rest."""
    kept: dict[str, Question] = {}
    for question in _fact_questions(part):
        key = question.stem
        if question.skill in ("opposite", "sum"):
            key = question.skill + " ".join(sorted(question.prompts[0].rstrip("?").split() + [question.answer]))
        if key not in kept or rng.random() < 0.5:
            kept[key] = question
    return list(kept.values())


def data_files() -> dict[str, str]:
    """File name -> content of train.jsonl, test.jsonl and text.jsonl, byte for byte as they ship."""
    replay = list(islice(corpus(f"replay {DATA_SEED}", "train"), REPLAY_DOCUMENTS))
    train = instructions("train") + [
        {"prompt": "", "completion": text, "skill": "text"} for text in dict.fromkeys(replay)
    ]
    random.Random(DATA_SEED).shuffle(train)
    fresh = dict.fromkeys(islice(corpus(f"held out {DATA_SEED}"), 2 * TEXT_DOCUMENTS))
    text = [{"text": document} for document in fresh if document not in set(replay)][:TEXT_DOCUMENTS]
    files = {"train.jsonl": train, "test.jsonl": instructions("test"), "text.jsonl": text}
    return {name: "".join(json.dumps(row) + "\n" for row in rows) for name, rows in files.items()}
