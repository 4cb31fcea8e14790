"""Questions about a scene with their true answers.

It reads scenes (world.py) and never pixels. A printed character is not a shape: it is neither counted nor
named among the shapes. A question is asked only where a person would have one answer.
"""

import re
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from minivlm.errors import InputError
from minivlm.train.answers import CELLS, box_text, cell
from minivlm.train.outlines import Box
from minivlm.train.styles import COLOURS, SHAPES, pick
from minivlm.train.world import Scene, canvas, compose

KINDS = (
    "shape", "colour", "presence", "count", "count_of", "position", "box", "region", "cell", "text",
    "describe",
)  # fmt: skip
_PHRASES = {
    "shape": (
        "What shape is {c}?", "Which shape is {c}?", "What shape is the {c} one?",
        "What is the {c} shape?", "What shape is the {c} object?", "Name the {c} shape.",
    ),
    "colour": (
        "What colour is the {s}?", "What color is the {s}?", "Which colour is the {s}?",
        "What is the color of the {s}?", "What is the colour of the {s}?", "Tell me the color of the {s}.",
    ),
    "presence": (
        "Is there a {x}?", "Is there a {x} in the picture?", "Is there a {x} in the image?",
        "Do you see a {x}?", "Can you see a {x}?", "Does the picture have a {x}?",
    ),
    "some_text": (
        "Is there any text?", "Is there any text in the picture?", "Is anything written?",
        "Do you see any text in the image?",
    ),
    "count": (
        "How many shapes are there?", "How many shapes are in the picture?", "Count the shapes.",
        "How many shapes do you see?", "How many shapes are in the image?",
        "What is the number of shapes?",
    ),
    "count_of": (
        "How many {x}s are there?", "How many {x}s are in the picture?", "Count the {x}s.",
        "How many {x}s do you see?", "How many {x}s are in the image?",
    ),
    "position": (
        "In which part of the picture is the {x}?", "In which part of the image is the {x}?",
        "Which part of the picture has the {x}?", "Roughly where is the {x}?",
        "Whereabouts in the picture is the {x}?", "What is the position of the {x}?",
    ),
    "box": (
        "Where is the {x}?", "Where is the {x} in the picture?", "Give the box of the {x}.",
        "Locate the {x}.", "What is the bounding box of the {x}?", "Where is the {x} in the image?",
    ),
    "region": (
        "What is at {b}?", "What is in the box {b}?", "What do you see at {b}?", "Name what is at {b}.",
    ),
    "cell": (
        "What is at the {p}?", "What is in the {p} of the picture?", "What do you see at the {p}?",
        "What is at the {p} of the image?",
    ),
    "text": (
        "What is written?", "What does the text say?", "Read the text.", "What is written in the picture?",
        "What does it say?", "What text is in the image?",
    ),
    "describe": (
        "Describe the picture.", "Describe the image.", "What is in the picture?", "What do you see?",
        "What is shown in this image?", "What is in this image?",
    ),
}  # fmt: skip
_MANNERS = (" Answer briefly.", " Answer in a few words.", " Please answer.", " Be short.")


@dataclass(frozen=True)
class QA:
    """One question and its answer; `extra` names the subgroup for a report, such as "3 objects"."""

    kind: str
    question: str
    answer: str
    extra: str


@dataclass(frozen=True)
class Thing:
    """A shape or the string, with every phrase that means it and nothing else in its scene."""

    name: str
    phrases: tuple[str, ...]
    box: Box


def things(scene: Scene) -> list[Thing]:
    """What a scene shows, each with the phrases that mean it and nothing else in the scene."""
    shapes = [item.shape for item in scene.objects]
    colours = [item.colour for item in scene.objects]
    names = [f"{item.colour} {item.shape}" for item in scene.objects]
    found = []
    for item, name in zip(scene.objects, names, strict=True):
        phrases = [name] if names.count(name) == 1 else []
        if shapes.count(item.shape) == 1:
            phrases.append(item.shape)
        if colours.count(item.colour) == 1:
            phrases.append(f"{item.colour} shape")
        found.append(Thing(name, tuple(phrases), item.box))
    if scene.text is not None:
        found.append(Thing(f"text {scene.text.string}", ("text",), scene.text.box))
    return found


def _ask(rng: np.random.Generator, phrase: str, **parts: str) -> str:
    question = pick(rng, _PHRASES[phrase]).format(**parts)
    manner = rng.random()
    if manner < 0.04:
        return question + pick(rng, _MANNERS)
    if manner < 0.07:
        return question[0].lower() + question[1:].rstrip("?.")
    return question


def _objects(scene: Scene) -> str:
    return f"{len(scene.objects)} objects"


def _shape(scene: Scene, rng: np.random.Generator, wanted: str | None) -> QA | None:
    colours = [item.colour for item in scene.objects]
    unique = [item for item in scene.objects if colours.count(item.colour) == 1]
    if not unique:
        return None
    item = pick(rng, unique)
    return QA("shape", _ask(rng, "shape", c=item.colour), item.shape, _objects(scene))


def _colour(scene: Scene, rng: np.random.Generator, wanted: str | None) -> QA | None:
    shapes = [item.shape for item in scene.objects]
    unique = [(item.shape, item.colour) for item in scene.objects if shapes.count(item.shape) == 1]
    if scene.text is not None and wanted is None and rng.random() < 0.5:
        unique = [("text", scene.text.colour)]
    if not unique:
        return None
    name, colour = pick(rng, unique)
    return QA("colour", _ask(rng, "colour", s=name), colour, _objects(scene))


def _presence(scene: Scene, rng: np.random.Generator, wanted: str | None) -> QA | None:
    """Yes or no in equal parts; a no mostly joins the colour of one shape to the form of another."""
    if wanted is None and rng.random() < 0.08:
        return QA("presence", _ask(rng, "some_text"), "no" if scene.text is None else "yes", "text")
    answer = wanted or pick(rng, ("yes", "no"))
    pairs = {(item.colour, item.shape) for item in scene.objects}
    colours, shapes = sorted({c for c, _ in pairs}), sorted({s for _, s in pairs})
    by = rng.random()
    if by < 0.6:
        absent = [(c, s) for c in COLOURS for s in SHAPES if (c, s) not in pairs]
        mixed = [(c, s) for c, s in absent if c in colours and s in shapes]
        near = [(c, s) for c, s in absent if c in colours or s in shapes]
        hard = rng.random()
        absent = mixed if mixed and hard < 0.5 else near if near and hard < 0.9 else absent
        choices = [f"{c} {s}" for c, s in (sorted(pairs) if answer == "yes" else absent)]
    elif by < 0.85:
        choices = shapes if answer == "yes" else [s for s in SHAPES if s not in shapes]
    else:
        choices = [f"{c} shape" for c in (colours if answer == "yes" else [c for c in COLOURS if c not in colours])]
    if not choices:
        return None
    question = _ask(rng, "presence", x=pick(rng, choices))
    return QA("presence", re.sub(r"\b([Aa]) orange", r"\1n orange", question), answer, answer)


def _count(scene: Scene, rng: np.random.Generator, wanted: str | None) -> QA | None:
    answer = str(len(scene.objects))
    if wanted is not None and answer != wanted:
        return None
    return QA("count", _ask(rng, "count"), answer, answer)


def _count_of(scene: Scene, rng: np.random.Generator, wanted: str | None) -> QA | None:
    """Counts by colour, form or both: 0 to 3 as evenly as the scene allows, larger counts left to `count`."""
    groups: dict[str, list[str]] = {}
    for colour in (*COLOURS, ""):
        for shape in (*SHAPES, ""):
            if colour or shape:
                number = sum(
                    (not colour or item.colour == colour) and (not shape or item.shape == shape)
                    for item in scene.objects
                )
                groups.setdefault(str(number), []).append(f"{colour} {shape or 'shape'}".strip())
    several = [n for n in ("2", "3") if n in groups]
    if wanted is None:
        few = [n for n in ("0", "1") if n in groups]
        wanted = several[-1] if several and rng.random() < 0.7 else pick(rng, few)
    if wanted not in groups:
        return None
    # No name has more weight than another form of phrase: "red star" (42 names), "star" (6), "red shape" (7).
    single = [name for name in groups[wanted] if " " not in name or name.endswith("shape")]
    names = single if single and rng.random() < 0.6 else groups[wanted]
    return QA("count_of", _ask(rng, "count_of", x=pick(rng, names)).replace("crosss", "crosses"), wanted, wanted)


def _position(scene: Scene, rng: np.random.Generator, wanted: str | None) -> QA | None:
    choices = [(thing, cell(thing.box, 0.04)) for thing in things(scene) if thing.phrases]
    choices = [(thing, where) for thing, where in choices if where is not None and wanted in (None, where)]
    if not choices:
        return None
    thing, where = pick(rng, choices)
    return QA("position", _ask(rng, "position", x=pick(rng, thing.phrases)), where, where)


def _box(scene: Scene, rng: np.random.Generator, wanted: str | None) -> QA | None:
    choices = [thing for thing in things(scene) if thing.phrases and (wanted is None or thing.phrases != ("text",))]
    if not choices:
        return None
    thing = pick(rng, choices)
    return QA("box", _ask(rng, "box", x=pick(rng, thing.phrases)), box_text(thing.box), _objects(scene))


def _region(scene: Scene, rng: np.random.Generator, wanted: str | None) -> QA | None:
    choices = [thing for thing in things(scene) if wanted is None or thing.phrases != ("text",)]
    if not choices:
        return None
    thing = pick(rng, choices)
    return QA("region", _ask(rng, "region", b=box_text(thing.box)), thing.name, _objects(scene))


def _cell(scene: Scene, rng: np.random.Generator, wanted: str | None) -> QA | None:
    """What is in a named part: asked where just one thing is; of a side, nowhere along it."""
    found = things(scene)
    alone = []
    for thing in found:
        where = cell(thing.box, 0.04)
        others = [cell(other.box, 0.04) for other in found if other is not thing]
        if where is not None and None not in others and not any(where in other for other in others):
            alone.append((thing, where))  # "left" is in "top left": neither may be asked as "the left"
    if not alone:
        return None
    thing, where = pick(rng, alone)
    part = "middle" if where == "center" and rng.random() < 0.5 else where
    return QA("cell", _ask(rng, "cell", p=part), thing.name, _objects(scene))


def _text(scene: Scene, rng: np.random.Generator, wanted: str | None) -> QA | None:
    if scene.text is None:
        return QA("text", _ask(rng, "text"), "nothing", "nothing") if wanted is None else None
    return QA("text", _ask(rng, "text"), scene.text.string, f"{len(scene.text.string)} characters")


def _describe(scene: Scene, rng: np.random.Generator, wanted: str | None) -> QA | None:
    """All things and their parts of the picture, from left to right; not asked where either is doubtful."""
    margin = 0.02 if wanted is None else 0.04
    ordered = sorted(things(scene), key=lambda thing: thing.box[0] + thing.box[2])
    middles = [(thing.box[0] + thing.box[2]) / 2 for thing in ordered]
    parts = [cell(thing.box, margin) for thing in ordered]
    if None in parts or any(b - a < margin for a, b in pairwise(middles)):
        return None
    told = []
    for thing, part in zip(ordered, parts, strict=True):
        article = "the" if thing.phrases == ("text",) else "an" if thing.name.startswith("orange") else "a"
        told.append(f"{article} {thing.name} {'in' if part == 'center' else 'at'} the {part}")
    return QA("describe", _ask(rng, "describe"), ", ".join(told), f"{len(told)} things")


_ASKERS = dict(
    zip(
        KINDS,
        (_shape, _colour, _presence, _count, _count_of, _position, _box, _region, _cell, _text, _describe),
        strict=True,
    )
)


def question_of_kind(scene: Scene, kind: str, rng: np.random.Generator, wanted: str | None = None) -> QA | None:
    """One question of a kind with varied wording, or None where the scene gives no unambiguous one.

    `wanted` is for held-out tables: the answer to ask for (presence, count, count_of, position); for the
    other kinds any string, which keeps to the strict form (shapes alone for boxes, regions and colours).
    """
    if kind not in _ASKERS:
        raise InputError(f"unknown kind of question {kind!r}: expected one of {', '.join(KINDS)}")
    return _ASKERS[kind](scene, rng, wanted)


def questions(scene: Scene, rng: np.random.Generator) -> list[QA]:
    """Six to twelve different questions on one picture, oftener of the hard kinds: colour, box, position, text."""
    n = len(scene.objects)
    if n == 0:
        plan = ["text", "text", "box", "position", "colour", "count", "presence", "describe"]
    else:
        plan = ["shape", "colour", "presence", "presence", "count_of", "position", "box", "region"]
        plan += ["colour", "box", "position"] if n >= 2 else []
        for kind, chance in (("count", 0.7 if n < 4 else 1.0), ("cell", 0.4), ("describe", 0.6)):
            plan += [kind] if rng.random() < chance else []
        if scene.text is not None:
            plan += ["text", "text"]
        elif rng.random() < 0.12:
            plan.append("text")
    rng.shuffle(plan)
    asked: dict[str, QA] = {}
    for kind in plan[:12]:
        qa = question_of_kind(scene, kind, rng)
        if qa is not None:
            asked.setdefault(qa.question, qa)
    while len(asked) < 6:
        qa = question_of_kind(scene, pick(rng, ("presence", "count_of", "box", "region", "count")), rng)
        if qa is not None:
            asked.setdefault(qa.question, qa)
    return list(asked.values())


def heldout(kind: str, index: int, seed: int) -> tuple[Scene, QA]:
    """Held-out picture and question number `index` of a kind, on the test split and in balance.

    presence alternates yes and no; count goes through 0 to 5, count_of 0 to 3, position the nine parts;
    colour and shape have two to four shapes to choose from; text is always there to be read.
    """
    if kind not in KINDS:
        raise InputError(f"unknown kind of question {kind!r}: expected one of {', '.join(KINDS)}")
    turns = {
        "presence": ("yes", "no"),
        "count": tuple("012345"),
        "count_of": tuple("0123"),
        "position": CELLS,
    }.get(kind, ("strict",))
    wanted = turns[index % len(turns)]
    rng = np.random.default_rng([seed, 2, KINDS.index(kind), index])
    while True:
        scene = compose(rng, "test", *canvas(rng))
        if kind in ("colour", "shape") and not 2 <= len(scene.objects) <= 4:
            continue
        if kind == "presence" and not scene.objects:
            continue
        qa = question_of_kind(scene, kind, rng, wanted)
        if qa is not None:
            return scene, qa
