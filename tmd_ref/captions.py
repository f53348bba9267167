"""Scenes in words: the plain captions that a table is measured on, and captions as people type them.

Text and video of a training sample agree: what a caption leaves out is in its clip as `default` says.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import numpy as np

from tmd_ref.scenes import BACKGROUNDS, COLORS, MOTIONS, SHAPES, Scene

_STEPS = ("left", "right", "up", "down")
_MOTION_WORDS = {
    "left": ("moving left", "moving to the left", "sliding left"),
    "right": ("moving right", "moving to the right", "sliding right"),
    "up": ("moving up", "moving upwards", "rising"),
    "down": ("moving down", "moving downwards", "falling"),
    "growing": ("growing", "getting bigger"),
    "shrinking": ("shrinking", "getting smaller"),
    "spinning": ("spinning", "rotating"),
    "bouncing": ("bouncing", "bouncing up and down"),
}
_SPEED_WORDS = {"slow": ("slowly",), "normal": ("",), "fast": ("quickly", "fast")}
_SENTENCES = (
    "a {size} {color} {shape} {motion} {speed} on a {background} background",
    "{size} {color} {shape} {motion} {speed}, {background} background",
    "on a {background} background, a {size} {color} {shape} is {motion} {speed}",
    "a {background} background with a {size} {color} {shape} {motion} {speed}",
)

# As people type: other words for the values, and what stands around them.
_TYPED: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "color": {
        "red": ("red", "bright red"),
        "green": ("green", "bright green"),
        "blue": ("blue", "bright blue"),
        "yellow": ("yellow", "gold", "golden"),
        "magenta": ("magenta", "pink", "purple", "violet"),
        "cyan": ("cyan", "turquoise", "light blue", "sky blue", "aqua", "teal"),
        "orange": ("orange", "bright orange"),
        "white": ("white",),
    },
    "background": {
        "black": ("black", "dark", "plain black"),
        "gray": ("gray", "grey", "plain gray", "plain grey"),
        "navy": ("navy", "dark blue", "navy blue", "deep blue"),
    },
    "shape": {
        "circle": ("circle", "ball", "disc", "disk", "dot", "round shape"),
        "square": ("square", "box", "block", "cube"),
        "triangle": ("triangle", "pyramid"),
        "star": ("star", "five pointed star"),
    },
    "size": {
        "small": ("small", "little", "tiny"),
        "medium": ("medium", "medium sized"),
        "large": ("large", "big", "huge"),
    },
    "speed": {
        "slow": ("slowly", "slow", "very slowly", "at slow speed"),
        "normal": ("at normal speed",),
        "fast": ("quickly", "fast", "very fast", "rapidly", "at high speed"),
    },
    "motion": {
        "left": ("left", "to the left", "leftwards", "leftward", "from right to left", "toward the left"),
        "right": ("right", "to the right", "rightwards", "rightward", "from left to right", "toward the right"),
        "up": ("up", "upwards", "upward", "to the top", "from bottom to top", "towards the top"),
        "down": ("down", "downwards", "downward", "to the bottom", "from top to bottom", "towards the bottom"),
        "growing": (
            "growing", "grows", "getting bigger", "gets bigger", "getting larger", "gets larger", "becoming bigger",
            "becomes larger", "expanding", "expands", "that grows",
        ),
        "shrinking": (
            "shrinking", "shrinks", "getting smaller", "gets smaller", "becoming smaller", "becomes smaller",
            "that shrinks",
        ),
        "spinning": (
            "spinning", "spins", "rotating", "rotates", "turning", "turns", "turning around", "spinning around",
            "in rotation", "that spins",
        ),
        "bouncing": (
            "bouncing", "bounces", "bouncing up and down", "bounces up and down", "jumping", "jumps",
            "jumping up and down", "jumps up and down", "that bounces",
        ),
    },
}  # fmt: skip
_GOING = ("moving", "moving", "moves", "going", "goes", "sliding", "slides", "flying", "flies", "drifting", "floating",
          "travelling", "that moves")  # fmt: skip
_ALONE = {"up": ("rising", "rises"), "down": ("falling", "falls", "dropping", "drops", "sinking")}
_BEFORE = {
    "growing": ("growing", "expanding"), "shrinking": ("shrinking",), "spinning": ("spinning", "rotating", "turning"),
    "bouncing": ("bouncing", "jumping"), "up": ("rising",), "down": ("falling",),
}  # fmt: skip
_PLACES = (
    "on a {} background", "on {}", "on a {} backdrop", "against a {} background", "over a {} background", "over {}",
    "in front of a {} background", "with a {} background", "{} background", "the background is {}", "background {}",
    "on the {} background", "and a {} background", "against {}",
)  # fmt: skip
_OPENINGS = ("a video of", "a clip of", "an animation of", "animation of", "video of", "show me", "show", "draw",
             "make", "create", "i want", "please draw", "there is", "generate")  # fmt: skip
_ARTICLES = ("a", "a", "a", "one", "the", "")
_NOUNS = ("shape", "thing", "object", "figure", "something")


def default(name: str, motion: str) -> str:
    """What a scene has where its caption is silent about the attribute `name`; a circle that spins looks still."""
    if name == "shape":
        return "star" if motion == "spinning" else "circle"
    return {"color": "white", "background": "black", "motion": "right", "size": "medium", "speed": "normal"}[name]


def caption(scene: Scene, rng: np.random.Generator | None = None) -> str:
    """The scene in words, in one of a few plain phrasings drawn from `rng` (the first one without it)."""

    def pick(options: tuple[str, ...]) -> str:
        return options[0] if rng is None else options[rng.integers(len(options))]

    return _tidy(
        pick(_SENTENCES).format(
            size="" if scene.size == "medium" else scene.size,
            color=scene.color,
            shape=scene.shape,
            background=scene.background,
            motion=pick(_MOTION_WORDS[scene.motion]),
            speed=pick(_SPEED_WORDS[scene.speed]),
        )
    )


def typed_caption(scene: Scene, rng: np.random.Generator) -> str:
    """The scene as somebody might type it: any order, other words, and parts left out where they are the `default`."""

    def pick(options: tuple[str, ...] | list[str]) -> str:
        return options[rng.integers(len(options))]

    def said(name: str) -> str:
        value = getattr(scene, name)
        chance = 0.15 if name in ("size", "speed") else 0.5  # medium and normal go unsaid as a rule
        if value == default(name, scene.motion) and rng.random() > chance:
            return ""
        return value if rng.random() < 0.4 and value in _TYPED[name][value] else pick(_TYPED[name][value])

    size, color, shape, background, speed = (said(name) for name in ("size", "color", "shape", "background", "speed"))
    motion = said("motion")
    if not (size or color or shape or motion):
        shape = pick(_TYPED["shape"][scene.shape])
    before = ""
    if motion and scene.motion in _STEPS:
        motion = pick(_ALONE[scene.motion]) if scene.motion in _ALONE and rng.random() < 0.2 else motion
        motion = motion if motion in _ALONE.get(scene.motion, ()) or rng.random() < 0.1 else f"{pick(_GOING)} {motion}"
    if motion and scene.motion in _BEFORE and rng.random() < 0.25:
        before, motion = pick(_BEFORE[scene.motion]), ""
    if motion and rng.random() < 0.15 and motion.split()[0].endswith("ing"):
        motion = f"is {motion}"
    moves = f"{speed} {motion}" if rng.random() < 0.25 else f"{motion} {speed}"
    place = pick(_PLACES).format(background) if background else ""

    if rng.random() < 0.6:  # a sentence
        words = [size, before, color] if rng.random() < 0.5 else [before, size, color]
        noun = shape or pick(_NOUNS)
        subject = f"{pick(_ARTICLES)} {' '.join(words)} {noun}"
        comma = pick(["", "", ","])
        order = rng.integers(4)
        text = (
            f"{subject} {moves}{comma} {place}" if order < 2
            else f"{place}{pick(['', ','])} {subject} {moves}" if order == 2
            else f"{subject} {place}{comma} {moves}"
        )  # fmt: skip
        if rng.random() < 0.2:
            text = f"{pick(_OPENINGS)} {text}"
    else:  # parts one after the other
        together = rng.random() < 0.6
        parts = [f"{size} {color} {shape}"] if together else [size, color, shape]
        parts += [f"{before} {moves}", place if rng.random() < 0.7 or not background else f"{background} background"]
        rng.shuffle(parts)
        text = pick([", ", " ", ", "]).join(part.strip() for part in parts if part.strip())
    return _tidy(text) + pick(["", "", "", "."])


def _tidy(text: str) -> str:
    text = " ".join(text.split()).replace(" ,", ",").strip(" ,")
    return re.sub(r"\ba (?=orange|expanding|aqua|object)", "an ", text)


def vocabulary() -> list[str]:
    """Every word that a caption can have, in lower case and in alphabetical order."""
    phrases = [*COLORS, *BACKGROUNDS, *SHAPES, *_OPENINGS, *_ARTICLES, *_NOUNS, *_GOING, "an", "is"]
    for ways in (*_MOTION_WORDS.values(), *_SPEED_WORDS.values(), *_ALONE.values(), *_BEFORE.values()):
        phrases += ways
    phrases += [way for values in _TYPED.values() for ways in values.values() for way in ways]
    phrases += [re.sub(r"\{\w*\}|,", " ", sentence) for sentence in (*_SENTENCES, *_PLACES)]
    return sorted({word for phrase in phrases for word in phrase.split()})


def in_words(still: bool = False) -> str:
    """What scenes show, in half a sentence; `still`: what their pictures show."""
    others = [motion for motion in MOTIONS if motion not in _STEPS]
    seen = f"one {_or(SHAPES)} in {_or(COLORS)} on a {_or(BACKGROUNDS)} background"
    return f"stills of {seen}" if still else f"{seen}, moving {_or(_STEPS)}, or {_or(others)}"


def _or(words: Iterable[str]) -> str:
    *before, last = words
    return f"{', '.join(before)} or {last}"
