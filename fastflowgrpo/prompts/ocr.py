"""Prompts for the OCR reward (arXiv 2505.05470): each asks for a text, which stands between double quotes."""

import zlib
from collections.abc import Sequence

import numpy as np

from fastflowgrpo.prompts.distinct import distinct
from fastflowgrpo.prompts.prompt import Prompt

COUNT = 20_000  # training prompts, about as in the paper
EVALUATION = 1024  # evaluation prompts, about as in the paper
LENGTH = (3, 24)  # range of a text's characters, spaces included

# fmt: off
_ADJECTIVES = (
    "Fresh", "Golden", "Silent", "Little", "Grand", "Happy", "Royal", "Lucky", "Electric", "Hidden", "Crystal", "Wild",
    "Midnight", "Sunny", "Broken", "Velvet", "Copper", "Distant", "Brave", "Frozen", "Ancient", "Modern", "Secret",
    "Open", "Simple", "Rapid", "Gentle", "Northern", "Southern", "Burning", "Floating", "Paper", "Iron", "Silver",
    "Quiet", "Bright", "Lost", "Second", "Final", "Daily", "Urban", "Organic", "Hungry", "Rolling", "Scarlet",
    "Perfect",
)
_NOUNS = (
    "Bakery", "Coffee", "River", "Garden", "Market", "Station", "Harbor", "Library", "Museum", "Bridge", "Theater",
    "Studio", "Mountain", "Forest", "Island", "Lantern", "Compass", "Anchor", "Engine", "Planet", "Rocket", "Signal",
    "Journey", "Summer", "Winter", "Festival", "Kingdom", "Dragon", "Falcon", "Tiger", "Orchid", "Maple", "Thunder",
    "Shadow", "Mirror", "Window", "Castle", "Village", "Academy", "Records", "Pizza", "Noodles", "Books", "Flowers",
    "Bicycle", "Airlines", "Laundry", "Hardware", "Pharmacy", "Tailor", "Barber", "Kitchen", "Cinema", "Circus",
    "Comet", "Horizon", "Voyager", "Meadow", "Pepper", "Honey", "Ocean", "Desert", "Valley", "Castaway", "Puzzle",
    "Violin",
)
_NOTICES = (
    "Open", "Closed", "Exit", "Stop", "Welcome", "Sale", "Danger", "Caution", "Private", "Reserved", "Sold Out", "Push",
    "Pull", "Keep Left", "No Entry", "Do Not Disturb", "Wet Floor", "Mind the Gap", "Thank You", "Happy Birthday",
    "Good Luck", "Congratulations", "Just Married", "Back Soon", "Now Hiring", "For Rent", "Free Wifi", "No Parking",
    "Under Construction", "Out of Order", "Press Start", "Game Over", "Coming Soon", "Best in Show", "Handle With Care",
    "Live Music Tonight", "Made With Love", "Dream Big", "Stay Curious", "Never Give Up", "Read More Books", "Be Kind",
    "Save the Bees", "Follow the Light", "Time to Go", "Hello World", "Good Morning", "Sweet Dreams", "Home Sweet Home",
)
_PLACES = ("Gate", "Platform", "Room", "Exit", "Route", "Level", "Pier", "Track", "Aisle", "Terminal", "Studio", "Lane")
_MONTHS = ("January", "March", "April", "May", "June", "July", "August", "October", "November")
_SYLLABLES = (
    "ba", "be", "bo", "ca", "cor", "da", "del", "do", "fa", "fen", "gar", "go", "ha", "hel", "jo", "ka", "kin", "la",
    "len", "lo", "ma", "mer", "mo", "na", "nel", "no", "or", "pa", "pen", "qui", "ra", "rin", "ro", "sa", "sel", "so",
    "ta", "ten", "to", "va", "vel", "vi", "wan", "xo", "ya", "zen", "zo",
)

# Where the text stands, and the words before it.
_SURFACES = (
    ("a neon sign above a bar", "that reads"), ("a chalkboard outside a cafe", "that reads"),
    ("a wooden signpost at a crossroads", "that says"), ("a street sign on a corner", "that says"),
    ("the cover of a hardback book", "titled"), ("a movie poster in a glass frame", "titled"),
    ("a birthday cake on a table", "with icing that says"), ("a T-shirt on a hanger", "printed with"),
    ("a coffee mug on a desk", "printed with"), ("a storefront window", "lettered with"),
    ("a billboard beside a highway", "advertising"), ("a brick wall with graffiti", "that spells"),
    ("the license plate of a vintage car", "reading"), ("the side of a delivery van", "painted with"),
    ("the hull of a fishing boat", "bearing the name"), ("a spaceship on a launch pad", "marked"),
    ("a newspaper on a park bench", "with the headline"), ("a hand-drawn map", "with the label"),
    ("the label of a wine bottle", "reading"), ("a jar of jam on a shelf", "labeled"),
    ("a laptop screen in a dark room", "displaying"), ("the display board of a train station", "showing"),
    ("the scoreboard of a stadium", "showing"), ("a protest banner in a crowd", "that says"),
    ("a sandy beach", "with letters drawn that spell"), ("a stone arch", "carved with"),
    ("a silver ring in a velvet box", "engraved with"), ("a hot air balloon", "printed with"),
    ("a robot with a chest plate", "stamped"), ("a greeting card on a table", "that says"),
    ("a sticky note on a fridge", "that says"), ("a tattoo on a forearm", "that reads"),
    ("a theater marquee", "announcing"), ("a wooden crate in a warehouse", "stenciled with"),
    ("a runner's race bib", "with the text"), ("a snow-covered windshield", "with a finger-drawn"),
    ("an old typewriter with a sheet of paper", "that reads"), ("a quilt on a bed", "embroidered with"),
    ("the door of an office", "with a brass plate that reads"), ("a dragon holding a scroll", "that reads"),
)
_FONTS = (
    "in bold sans-serif letters", "in elegant cursive", "in hand-painted letters", "in glowing letters",
    "in block capitals", "in a thin modern typeface", "in a gothic typeface", "in playful rounded letters",
    "in a typewriter font", "in chalk lettering", "in gold serif letters", "in a stencil font", "in pixel letters",
    "in tall condensed letters", "in a retro 1970s font", "in white letters", "in red letters", "in black letters",
    "in large letters", "",
)
_SETTINGS = (
    "at night", "on a rainy day", "in warm morning light", "under a clear sky", "in thick fog", "at sunset",
    "in the snow", "in a quiet old town", "in a busy city", "in soft studio light", "in close-up",
    "in a watercolor style", "as a detailed illustration", "as a cinematic photo", "as a 3D render",
    "in black and white", "in a cartoon style", "",
)
# fmt: on


def generate(
    count: int = COUNT, seed: int = 0, exclude: Sequence[Prompt] = (), length: tuple[int, int] = LENGTH
) -> list[Prompt]:
    """Training prompts, all different, each with one text between double quotes.

    Args:
        count: number of prompts.
        seed: seed of the random choice.
        exclude: prompts whose quoted texts must not be in the result, whatever their case and spaces.
        length: minimum and maximum of a text's characters, spaces included.

    Raises:
        ValueError: there are not enough different prompts.
    """
    rng = np.random.default_rng(seed)
    taken = {_target(prompt) for prompt in exclude if prompt.text.count('"') >= 2}
    low, high = length

    def excluded(prompt: Prompt) -> bool:
        return not low <= len(prompt.text.split('"')[1]) <= high or _target(prompt) in taken

    return distinct(lambda: _prompt(rng), count, excluded)


def evaluation(seed: int = 0) -> list[Prompt]:
    """Evaluation prompts, which training must exclude. They use an eighth of all texts; training has the rest."""
    rng = np.random.default_rng(seed)
    return distinct(lambda: _prompt(rng), EVALUATION, lambda prompt: zlib.crc32(_target(prompt).encode()) % 8 > 0)


def _target(prompt: Prompt) -> str:
    """The first quoted text, without spaces and in lower case as the reward compares it."""
    return "".join(prompt.text.split('"')[1].split()).lower()


def _text(rng: np.random.Generator) -> str:
    """A word, a short phrase, a number or a made-up name."""
    kind = rng.choice(7, p=(0.15, 0.25, 0.15, 0.1, 0.1, 0.1, 0.15))
    number = int(rng.integers(1, 100))
    if kind == 0:
        text = _pick(rng, _NOUNS)
    elif kind == 1:
        text = f"{_pick(rng, _ADJECTIVES)} {_pick(rng, _NOUNS)}"
    elif kind == 2:
        text = _pick(rng, _NOTICES)
    elif kind == 3:
        text = f"{_pick(rng, _PLACES)} {number}"
    elif kind == 4:
        text = f"{_pick(rng, _MONTHS)} {number % 30 + 1}" if rng.random() < 0.5 else f"Est. {1850 + number}"
    elif kind == 5:
        text = f"The {_pick(rng, _NOUNS)} of {_pick(rng, _NOUNS)}"
    else:
        text = "".join(_pick(rng, _SYLLABLES) for _ in range(rng.integers(2, 4))).capitalize()
        if rng.random() < 0.4:
            text += f" {_pick(rng, _NOUNS)}"
    case = rng.random()
    return text.upper() if case < 0.3 else text.lower() if case < 0.4 else text


def _prompt(rng: np.random.Generator) -> Prompt:
    """A random prompt: a surface with a text, the letters, the surroundings."""
    surface, reads = _SURFACES[rng.integers(len(_SURFACES))]
    sentence = f'{surface} {reads} "{_text(rng)}" {_pick(rng, _FONTS)}'.rstrip()
    setting = _pick(rng, _SETTINGS)
    return Prompt(sentence[0].upper() + sentence[1:] + (f", {setting}" if setting else ""))


def _pick(rng: np.random.Generator, choices: Sequence[str]) -> str:
    return choices[int(rng.integers(len(choices)))]
