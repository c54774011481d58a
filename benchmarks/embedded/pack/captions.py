"""Captions of a named picture, with the wider ideas that its name is an example of."""

from __future__ import annotations

import re

# Heads of names that tell a picture's broad category, in the words of the clip art task.
CATEGORY_WORDS = {
    "building": (
        "house home castle church hotel hospital school bank office-building factory tower "
        "building mosque temple synagogue skyscraper warehouse barn cottage hut stadium "
        "museum lighthouse windmill tent igloo fort pagoda palace mill shop store chapel "
        "monastery"
    ),
    "musical instrument": (
        "guitar violin drum drums trumpet piano saxophone accordion banjo flute harp "
        "harmonica cello tuba trombone clarinet horn xylophone maracas bagpipes lyre "
        "ocarina tambourine bongo keyboard-musical french-horn bell gong lute pan-flute "
        "kora"
    ),
    "office item": (
        "pen pencil paperclip envelope folder scissors clipboard notebook printer stapler "
        "calculator calendar telephone desk ruler pushpin fountain-pen file-cabinet "
        "file-folder memo briefcase book books eraser letter mail card-index wastebasket "
        "computer laptop fax phone"
    ),
    "tool": (
        "hammer wrench screwdriver saw axe pickaxe pliers shovel spade rake drill chisel "
        "anvil nail screw tool tools hoe scythe sickle trowel knife sword bow gun pistol "
        "toolbox ladder broom paint-brush paintbrush key spanner crowbar hand-saw mallet "
        "clamp brush chainsaw"
    ),
    "vehicle": (
        "car bus truck taxi train tram bicycle bike motorcycle scooter airplane plane "
        "helicopter ship boat ferry sailboat rocket ambulance fire-engine tractor van "
        "automobile locomotive canoe submarine trolleybus minibus yacht limousine jeep tank "
        "lorry police-car pickup-truck speedboat hot-air-balloon sleigh tanker bulldozer "
        "racing-car"
    ),
    "road sign": (
        "stop-sign no-entry no-bicycles no-pedestrians children-crossing road-sign "
        "traffic-light traffic-lights prohibited sign yield road-closed no-parking warning "
        "one-way roundabout crossing speed-limit"
    ),
    "plant": (
        "tree flower rose tulip sunflower cactus leaf seedling herb palm-tree "
        "deciduous-tree evergreen-tree hibiscus blossom bouquet shamrock clover "
        "four-leaf-clover plant bush fern vine pine oak maple-leaf fallen-leaf "
        "cherry-blossom daisy lily lotus bamboo potted-plant acorn mushroom pine-tree "
        "orchid wheat sheaf-of-rice ivy"
    ),
    "food": (
        "apple bread cake pizza hamburger cheese egg banana orange lemon strawberry cherry "
        "cherries grapes pear peach tomato potato carrot corn pie cookie sandwich soup "
        "ice-cream candy chocolate doughnut fries salad steak meat bacon coffee tea beer "
        "wine milk juice hot-dog watermelon pineapple onion pepper broccoli rice noodles "
        "spaghetti sushi taco croissant pretzel butter pancakes chicken-leg drumstick "
        "lollipop popcorn pumpkin honey mango coconut avocado"
    ),
    "person": (
        "man woman boy girl baby person people child dancer singer farmer cook teacher "
        "judge police-officer firefighter astronaut doctor nurse king queen prince princess "
        "soldier guard pilot scientist student worker mechanic artist clown runner family "
        "couple mother father ninja wizard witch pirate swimmer surfer cowboy knight monk "
        "businessman bride fairy vampire"
    ),
    "animal": (
        "dog cat horse cow sheep pig goat bird eagle owl duck chicken rooster penguin fish "
        "shark whale dolphin octopus crab lobster snail butterfly bee ant beetle spider "
        "scorpion bear panda koala lion tiger leopard elephant giraffe zebra hippopotamus "
        "rhinoceros camel deer monkey gorilla rabbit mouse rat hamster squirrel hedgehog "
        "bat wolf fox raccoon crocodile turtle lizard snake frog dinosaur kangaroo otter "
        "sloth skunk badger swan flamingo peacock parrot turkey dodo ram ewe ox llama bison "
        "mammoth beaver seal mosquito fly worm ladybug cricket dove pony donkey mole moose "
        "hen goose pigeon crow sparrow salmon squid jellyfish starfish shrimp antelope "
        "walrus"
    ),
}
CATEGORY_OF = {word: name for name, words in CATEGORY_WORDS.items() for word in words.split()}

# What counts as a picture of one of the ten animals, by the last word of the name.
ANIMAL_WORDS = {
    "bear": ("bear grizzly"),
    "bird": (
        "bird crow sparrow pigeon dove eagle blackbird robin raven hawk falcon seagull gull "
        "magpie parrot jay swallow finch canary cardinal shrike kingfisher bluebird "
        "woodpecker hummingbird heron stork"
    ),
    "cat": ("cat kitten kitty"),
    "cow": ("cow bull ox calf cattle"),
    "dog": (
        "dog puppy poodle hound pug terrier retriever beagle collie dalmatian chihuahua "
        "bulldog labrador"
    ),
    "elephant": ("elephant"),
    "giraffe": ("giraffe"),
    "horse": ("horse pony foal mare stallion"),
    "sheep": ("sheep ewe lamb"),
    "zebra": ("zebra"),
}
ANIMAL_OF = {word: name for name, words in ANIMAL_WORDS.items() for word in words.split()}
# Names that end or begin like an animal's and are none, or do not show one.
NOT_THE_ANIMAL = re.compile(
    r"hot dog|teddy|house|food|bowl|fish|shelter|carousel|trojan|toy|crossing|balloon|"
    r"racing|riding|jumping over|twitter|rocking|seahorse|sea |claw|mask|cage|arrow|shield|"
    r"chess|off$|"
    r"(smiling|grinning|crying|kissing|weary|pouting|tears|wry|hearts).*cat|cat (with|face with)|"
    r"german shepherd dog sign|scepter|feather|egyptian|schrodinger"
)


def plain_words(name: str) -> str:
    """``Red_racing-car`` as ``red racing car``."""
    return re.sub(r"\s+", " ", re.sub(r"[-_]+", " ", name)).strip().lower()


def _category(name: str) -> str | None:
    """``red racing car`` has its last word's category, ``house with garden`` its first word's."""
    hyphened = name.replace(" ", "-")
    if hyphened in CATEGORY_OF:
        return CATEGORY_OF[hyphened]
    words = re.split(r" with | in | on | of | and |,", name)[0].split()
    for take in (2, 1):
        tail = "-".join(words[-take:])
        if tail in CATEGORY_OF:
            return CATEGORY_OF[tail]
    last = words[-1] if words else ""
    return CATEGORY_OF.get(last.rstrip("s"))


def animal_of(name: str) -> str | None:
    """Which of the ten animals a picture of this name shows, if any."""
    if NOT_THE_ANIMAL.search(name):
        return None
    for word in (*reversed(name.split()),):
        if word in ANIMAL_OF:
            return ANIMAL_OF[word]
    return None


def _article(name: str) -> str:
    return f"an {name}" if name[:1] in "aeiou" else f"a {name}"


def captions(name: str, kind: str, group: str | None = None, category: str | None = None):
    """Captions of a named picture: what it shows, then the wider ideas it is an example of."""
    texts = [
        (name, name),
        (f"{kind} of {_article(name)}", name),
        (f"a picture of {_article(name)}", name),
    ]
    animal = animal_of(name)
    if animal:
        texts += [(f"{kind} of a {animal}", animal), (f"a picture of a {animal}", animal)]
    category = category or _category(name) or ("animal" if animal else None)
    if category:
        wider = f"category {category}"
        texts += [
            (f"a clip art drawing of {_article(category)}", wider),
            (f"a cartoon of {_article(category)}", wider),
            (f"a picture of {_article(category)}", wider), (category, wider),
        ]  # fmt: skip
    if group:
        wider = f"group {group}"
        texts += [
            (f"an emoji of the kind {group}", wider), (f"an emoji: {group}", wider),
            (f"a small picture of the category {group}", wider), (group, wider),
        ]  # fmt: skip
    return texts
