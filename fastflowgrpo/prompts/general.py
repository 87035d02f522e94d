"""General prompts for preference rewards such as PickScore: a subject does something in a place, in some style.

They describe motion, so they also suit videos. Published runs use prompts written by people (Pick-a-Pic); if you have
such prompts, give them as a file.
"""

from collections.abc import Sequence

import numpy as np

from fastflowgrpo.prompts.distinct import distinct
from fastflowgrpo.prompts.prompt import Prompt

COUNT = 20_000
EVALUATION = 512

# fmt: off
_SUBJECTS = (
    "a red fox", "a young woman in a yellow raincoat", "an old fisherman", "a small robot", "a knight in silver armor",
    "a tabby cat", "a white horse", "an astronaut", "a street musician", "a golden retriever", "a ballet dancer",
    "a dragon with green scales", "a boy with a paper kite", "a snow leopard", "a chef", "a wizard in a blue cloak",
    "a barn owl", "two children", "a samurai", "a giant tortoise", "a girl with curly hair", "a polar bear",
    "a mechanic in overalls", "a raven", "a grandmother with round glasses", "an elephant calf", "a violinist",
    "a humpback whale", "a cyclist", "a clockwork bird", "a farmer", "a mermaid", "a pirate captain", "a hedgehog",
    "a scientist in a lab coat", "a parrot", "a shepherd", "a skateboarder", "a ghost", "a family of ducks",
)
_ACTIONS = (
    "walking slowly", "running", "dancing", "turning to look back", "resting", "jumping over a puddle", "laughing",
    "gazing at the sky", "searching for something", "waiting", "stretching", "chasing a butterfly", "climbing",
    "balancing on one foot", "following a trail of light", "shaking off drops of water", "drifting through the air",
    "waving", "leaning into the wind", "sleeping", "singing", "carrying a lantern", "spinning around", "sitting still",
)
_PLACES = (
    "on a windy beach", "in a pine forest", "on a neon-lit street", "in a field of lavender", "on a mountain ridge",
    "in an abandoned greenhouse", "at a crowded night market", "on a frozen lake", "in a library full of books",
    "under a stone bridge", "on a rooftop above the city", "in a desert of red sand", "by a waterfall",
    "in a wheat field", "in a cozy kitchen", "at a railway station", "among ruins covered with ivy",
    "in a space station", "on a wooden pier", "in an autumn park", "inside a cathedral", "in a coral reef",
    "in a cobbled alley", "on a cloud", "in a snowy village", "beside a campfire", "in a bamboo grove",
    "on the deck of a ship", "in a bright workshop", "at the edge of a volcano",
)
_LIGHTS = (
    "at golden hour", "under a full moon", "in morning mist", "in soft overcast light", "during a thunderstorm",
    "in harsh midday sun", "by candlelight", "as the first snow falls", "in the rain", "at dawn",
    "under northern lights", "in deep shadow", "with sunbeams breaking through", "at dusk",
)
_STYLES = (
    "cinematic photo", "oil painting", "watercolor", "35mm film photograph", "detailed digital art", "anime style",
    "pencil sketch", "3D render", "children's book illustration", "macro photography", "impressionist painting",
    "concept art", "vintage poster", "studio portrait", "ink drawing", "claymation", "wide-angle shot", "pixel art",
)
# fmt: on


def generate(count: int = COUNT, seed: int = 0, exclude: Sequence[Prompt] = ()) -> list[Prompt]:
    """Training prompts, no two the same.

    Args:
        count: number of prompts.
        seed: seed of the random choice.
        exclude: prompts whose texts must not be in the result.

    Raises:
        ValueError: there are not enough different prompts.
    """
    rng = np.random.default_rng(seed)
    texts = {prompt.text.casefold() for prompt in exclude}

    def draw() -> Prompt:
        subject, action, place, light, style = (
            part[rng.integers(len(part))] for part in (_SUBJECTS, _ACTIONS, _PLACES, _LIGHTS, _STYLES)
        )
        return Prompt(f"{subject} {action} {place} {light}, {style}")

    return distinct(draw, count, lambda prompt: prompt.text.casefold() in texts)


def evaluation(seed: int = 0) -> list[Prompt]:
    """Evaluation prompts, which training must exclude."""
    return generate(EVALUATION, seed)
