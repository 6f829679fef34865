"""The tiny world: 64x64 pictures with captions, edits, and an oracle that reads pictures back.

A picture shows one shape, several equal shapes, two shapes in a relation, a face or a letter, on white or
black. Everything is drawn procedurally, so the truth is known: `draw` and `caption` turn a `Scene` into
picture and text, `parse` and `read` turn text and picture back into a `Scene`, and `alignment` compares the
two. Only numpy and Pillow are needed.

    python tests/tiny/world.py sheet.png      # contact sheet, and a table of how well the oracle does
"""

import itertools
import math
import sys
import time
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SIZE = 64  # pixels a side
SUPERSAMPLING = 4
COLORS = {
    "red": (220, 25, 40),
    "green": (20, 160, 80),
    "blue": (30, 80, 225),
    "yellow": (255, 225, 40),
    "orange": (245, 125, 20),
    "purple": (160, 40, 170),
}
BACKGROUNDS = {"white": (255, 255, 255), "black": (0, 0, 0)}
EYES = {  # face colours, and the eye colours that stand out on each
    "yellow": ("red", "green", "blue", "purple"),
    "orange": ("green", "blue", "purple"),
    "green": ("red", "blue", "purple"),
    "purple": ("red", "green", "blue"),
}
MOODS = ("smiling", "sad")
SHAPES = ("circle", "square", "triangle")
COUNTS = {2: "two", 3: "three"}
RELATIONS = ("above", "below", "left of", "right of")
KINDS = ("single", "count", "relation", "face", "letter")
EDIT_KINDS = ("background", "color", "shape", "letter", "mood", "eyes", "remove")
CATEGORIES = {"single": "general", "count": "counting", "relation": "relation", "face": "portrait",
              "letter": "typography"}
LETTERS = {  # strokes as polylines; x and y in [-1, 1], y downwards. O is drawn as a ring.
    "E": [[(1, -1), (-1, -1), (-1, 1), (1, 1)], [(-1, 0), (0.7, 0)]],
    "H": [[(-1, -1), (-1, 1)], [(1, -1), (1, 1)], [(-1, 0), (1, 0)]],
    "L": [[(-1, -1), (-1, 1), (1, 1)]],
    "O": [[(math.sin(a * math.pi / 16), -math.cos(a * math.pi / 16)) for a in range(33)]],
    "T": [[(-1, -1), (1, -1)], [(0, -1), (0, 1)]],
    "V": [[(-1, -1), (0, 1), (1, -1)]],
    "X": [[(-1, -1), (1, 1)], [(1, -1), (-1, 1)]],
    "Z": [[(-1, -1), (1, -1), (-1, 1), (1, 1)]],
}
PALETTE_NAMES = (*COLORS, *BACKGROUNDS)
PALETTE = np.array([*COLORS.values(), *BACKGROUNDS.values()], np.float32)  # [8, 3] in 0..255


# Scenes and captions


@dataclass(frozen=True)
class Item:
    """One object. `form` is a shape, "face" or a letter; centre (x, y) and half height r are in pixels,
    `aspect` is width over height as read from a picture.

    What was parsed from a caption has no layout (zeros); what was read from a picture has "" where it is
    unclear.
    """

    form: str
    color: str
    x: float = 0.0
    y: float = 0.0
    r: float = 0.0
    aspect: float = 1.0


@dataclass(frozen=True)
class Scene:
    """All that `draw` needs. `relation` is how items[0] stands to items[1]; `mood` and `eyes` belong to a
    face.
    """

    kind: str
    items: tuple[Item, ...]
    background: str
    relation: str = ""
    mood: str = ""
    eyes: str = ""


def sample_scene(rng: np.random.Generator, kind: str | None = None) -> Scene:
    kind = kind or str(rng.choice(KINDS))
    background, color = str(rng.choice(list(BACKGROUNDS))), str(rng.choice(list(COLORS)))

    def anywhere(form: str, color: str, smallest: float, largest: float) -> Item:
        r = rng.uniform(smallest, largest)
        x, y = rng.uniform(r + 3, SIZE - 3 - r, size=2)
        return Item(form, color, x, y, r)

    if kind == "single":
        return Scene(kind, (anywhere(str(rng.choice(SHAPES)), color, 10, 20),), background)
    if kind == "letter":
        return Scene(kind, (anywhere(str(rng.choice(list(LETTERS))), color, 15, 22),), background)
    if kind == "face":
        face = anywhere("face", str(rng.choice(list(EYES))), 21, 27)
        return Scene(kind, (face,), background, mood=str(rng.choice(MOODS)),
                     eyes=str(rng.choice(EYES[face.color])))
    if kind == "count":
        shape, r = str(rng.choice(SHAPES)), rng.uniform(8, 10)
        corners = rng.permutation([(17, 17), (47, 17), (17, 47), (47, 47)])[: rng.choice(list(COUNTS))]
        return Scene(kind,
                     tuple(Item(shape, color, *(corner + rng.uniform(-3, 3, 2)), r) for corner in corners),
                     background)
    if kind == "relation":
        looks = list(itertools.product(SHAPES, COLORS))
        chosen = [looks[i] for i in rng.choice(len(looks), 2, replace=False)]
        relation = str(rng.choice(RELATIONS))
        along = (17, 47) if relation in ("above", "left of") else (47, 17)
        places = [(a + rng.uniform(-2.5, 2.5), 32 + rng.uniform(-6, 6)) for a in along]
        if relation in ("above", "below"):
            places = [(x, y) for y, x in places]
        items = tuple(Item(*look, *place, rng.uniform(8, 10.5))
                      for look, place in zip(chosen, places, strict=True))
        return Scene(kind, items, background, relation=relation)
    raise ValueError(f"unknown kind {kind!r}; one of {KINDS}")


def _article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def caption(scene: Scene) -> str:
    first = scene.items[0]
    if scene.kind == "single":
        subject = _article(f"{first.color} {first.form}")
    elif scene.kind == "count":
        subject = f"{COUNTS[len(scene.items)]} {first.color} {first.form}s"
    elif scene.kind == "relation":
        subject = f" {scene.relation} ".join(_article(f"{item.color} {item.form}") for item in scene.items)
    elif scene.kind == "face":
        subject = f"a {scene.mood} {first.color} face with {scene.eyes} eyes"
    else:
        subject = f"the letter {first.form} in {first.color}"
    return f"{subject} on a {scene.background} background"


def describe(scene: Scene) -> str:
    """What `read` saw, in the words of the captions; "unclear" where it is."""
    look = [f"{item.color or 'unclear'} {item.form or 'unclear'}" for item in scene.items]
    if scene.kind == "face" and len(scene.items) == 1:
        subject = f"{_article(scene.mood or 'unclear')} {look[0]} with {scene.eyes or 'unclear'} eyes"
    elif scene.kind == "letter" and len(scene.items) == 1:
        subject = f"the letter {scene.items[0].form} in {scene.items[0].color or 'unclear'}"
    elif len(look) in COUNTS and len(set(look)) == 1:
        subject = f"{COUNTS[len(look)]} {look[0]}s"
    else:
        joint = f" {scene.relation} " if scene.relation else " and "
        subject = joint.join(_article(words) for words in look[:4]) or "nothing"
    return f"{subject} on {_article(scene.background or 'unclear')} background"


def _all_specs() -> list[Scene]:
    """Every scene without its layout"""
    things = [Item(shape, color) for shape in SHAPES for color in COLORS]
    specs = []
    for ground in BACKGROUNDS:
        specs += [Scene("single", (thing,), ground) for thing in things]
        specs += [Scene("count", (thing,) * n, ground) for thing in things for n in COUNTS]
        specs += [Scene("relation", pair, ground, name) for pair in itertools.permutations(things, 2)
                  for name in RELATIONS]
        specs += [Scene("face", (Item("face", color),), ground, "", mood, eyes) for color in EYES
                  for mood in MOODS for eyes in EYES[color]]
        specs += [Scene("letter", (Item(letter, color),), ground) for letter in LETTERS for color in COLORS]
    return specs


SPECS = {caption(spec): spec for spec in _all_specs()}


def parse(prompt: str) -> Scene:
    """The scene that a caption asks for, without layout"""
    if prompt not in SPECS:
        raise ValueError(f"not a caption of the tiny world: {prompt!r}")
    return SPECS[prompt]


def all_captions() -> list[str]:
    """Every caption that `sample_scene` can lead to"""
    return list(SPECS)


def category(prompt: str) -> str:
    return CATEGORIES[parse(prompt).kind]


def canonical(scene: Scene) -> Scene:
    """The same for all ways to say the same: what is below or right of another comes second."""
    if scene.relation not in ("below", "right of"):
        return scene
    return replace(scene, items=scene.items[::-1],
                   relation={"below": "above", "right of": "left of"}[scene.relation])


# Pictures


def draw(scene: Scene) -> Image.Image:
    """RGB picture of SIZE x SIZE; the same scene always gives the same pixels."""
    side = SIZE * SUPERSAMPLING
    image = Image.new("RGB", (side, side), BACKGROUNDS[scene.background])
    pen = ImageDraw.Draw(image)

    for item in scene.items:
        x, y, r = (SUPERSAMPLING * value for value in (item.x, item.y, item.r))
        color = COLORS[item.color]

        def disc(dx: float, dy: float, radius: float, fill, x=x, y=y, r=r):
            cx, cy = x + dx * r, y + dy * r
            pen.ellipse((cx - radius * r, cy - radius * r, cx + radius * r, cy + radius * r), fill=fill)

        if item.form == "circle":
            disc(0, 0, 1, color)
        elif item.form == "square":
            pen.rectangle((x - 0.9 * r, y - 0.9 * r, x + 0.9 * r, y + 0.9 * r), fill=color)
        elif item.form == "triangle":
            pen.polygon([(x, y - r), (x - r, y + 0.85 * r), (x + r, y + 0.85 * r)], fill=color)
        elif item.form == "face":
            disc(0, 0, 1, color)
            for side_sign in (-1, 1):
                disc(0.36 * side_sign, -0.25, 0.19, COLORS[scene.eyes])
            for t in np.linspace(-1, 1, 33):  # the mouth: a parabola of black dots, ends up for a smile
                bend = t * t if scene.mood == "sad" else 1 - t * t
                disc(0.45 * t, 0.3 + 0.26 * bend, 0.075, BACKGROUNDS["black"])
        else:
            for stroke in LETTERS[item.form]:
                points = [(x + 0.62 * r * px, y + 0.82 * r * py) for px, py in stroke]
                pen.line(points, fill=color, width=round(0.36 * r))
                for px, py in stroke:
                    disc(0.62 * px, 0.82 * py, 0.18, color)
    return image.resize((SIZE, SIZE), Image.Resampling.BOX)


FLAWS = ("blur", "tint", "wash", "fog", "ghost")


def degrade(image: Image.Image, rng: np.random.Generator) -> tuple[Image.Image, float]:
    """An uglier picture of the same content, and how much uglier in [0, 1]: blurred, tinted, washed out,
    fogged from one side, with a ghost of itself beside it, or two of these.
    """
    severity = float(rng.uniform(0.2, 1))
    flaws = rng.choice(FLAWS, size=rng.choice((1, 2), p=(0.6, 0.4)), replace=False)
    strength = severity if len(flaws) == 1 else 0.7 * severity
    for flaw in flaws:
        if flaw == "blur":
            image = image.filter(ImageFilter.GaussianBlur(0.3 + 1.7 * strength))
        elif flaw == "tint":
            cast = tuple(int(value) for value in rng.permutation((230, int(rng.integers(20, 230)), 20)))
            image = Image.blend(image, Image.new("RGB", image.size, cast), 0.35 * strength)
        elif flaw == "wash":
            image = Image.blend(image, _grey(image, rng), 0.5 * strength)
        elif flaw == "fog":
            ramp = np.linspace(0, 255 * 0.75 * strength, SIZE)[:: rng.choice((-1, 1))]
            mask = np.tile(ramp, (SIZE, 1)) if rng.random() < 0.5 else np.tile(ramp[:, None], (1, SIZE))
            image = Image.composite(_grey(image, rng), image, Image.fromarray(mask.astype(np.uint8)))
        else:
            angle, distance = rng.uniform(0, 2 * math.pi), rng.uniform(4, 8)
            shift = (1, 0, distance * math.cos(angle), 0, 1, distance * math.sin(angle))
            beside = image.transform(image.size, Image.Transform.AFFINE, shift, Image.Resampling.BILINEAR,
                                     fillcolor=image.getpixel((0, 0)))
            image = Image.blend(image, beside, 0.45 * strength)
    return image, severity


def _grey(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    return Image.new("RGB", image.size, (int(rng.integers(110, 200)),) * 3)


def disfigure(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """A face with one thing wrong: an eye missing or of another colour, no mouth, or squeezed"""
    image, face, way = draw(scene), scene.items[0], rng.integers(4)
    pen, skin, (x, y, r) = ImageDraw.Draw(image), COLORS[face.color], (face.x, face.y, face.r)
    if way == 0:
        side = rng.choice((-1, 1))
        pen.ellipse([x + (0.36 * side - 0.25) * r, y - 0.5 * r, x + (0.36 * side + 0.25) * r, y], fill=skin)
    elif way == 1:
        other = str(rng.choice([color for color in EYES[face.color] if color != scene.eyes]))
        pen.ellipse([x + 0.17 * r, y - 0.44 * r, x + 0.55 * r, y - 0.06 * r], fill=COLORS[other])
    elif way == 2:
        pen.rectangle([x - 0.6 * r, y + 0.15 * r, x + 0.6 * r, y + 0.68 * r], fill=skin)
    else:
        width = int(rng.integers(36, 50))
        squeezed = Image.new("RGB", image.size, BACKGROUNDS[scene.background])
        squeezed.paste(image.resize((width, SIZE), Image.Resampling.BOX), ((SIZE - width) // 2, 0))
        image = squeezed
    return image


# Edits


def edits(scene: Scene) -> list[dict[str, Scene]]:
    """All edits of a scene as {instruction: scene afterwards}, one dict for each way to edit. Layout stays as
    it was.
    """
    if not scene.items:
        return []
    ways = [{f"change the background to {ground}": replace(scene, background=ground)
             for ground in BACKGROUNDS}]
    if scene.kind == "face":
        face = scene.items[0]
        ways.append({f"make the face {mood}": replace(scene, mood=mood) for mood in MOODS})
        ways.append({f"make the eyes {eyes}": replace(scene, eyes=eyes) for eyes in EYES.get(face.color, ())})
        ways.append({f"make the face {color}": replace(scene, items=(replace(face, color=color),))
                     for color in EYES if scene.eyes in EYES[color]})
    elif scene.kind == "relation":
        for item, other in (scene.items, scene.items[::-1]):

            def swap(item=item, **changes) -> Scene:
                return replace(scene,
                               items=tuple(replace(i, **changes) if i is item else i for i in scene.items))

            name = f"{item.color} {item.form}"
            ways.append({f"make the {name} {color}": swap(color=color) for color in COLORS})
            ways.append({f"turn the {name} into {_article(shape)}": swap(form=shape) for shape in SHAPES})
            ways.append({f"remove the {name}": Scene("single", (other,), scene.background)})
    else:

        def change(**changes) -> Scene:
            return replace(scene, items=tuple(replace(item, **changes) for item in scene.items))

        form, plural = scene.items[0].form, scene.kind == "count"
        name = "letter" if scene.kind == "letter" else f"{form}s" if plural else form
        ways.append({f"make the {name} {color}": change(color=color) for color in COLORS})
        if scene.kind == "letter":
            ways.append({f"change the letter to {letter}": change(form=letter) for letter in LETTERS})
        else:
            ways.append({f"turn the {name} into {f'{s}s' if plural else _article(s)}": change(form=s)
                         for s in SHAPES})

    def possible(target: Scene) -> bool:
        """Something changes, and the two objects of a relation do not become alike, which no caption
        describes
        """
        looks = {(item.form, item.color) for item in target.items}
        return target != scene and (target.kind != "relation" or len(looks) == 2)

    return [{text: target for text, target in way.items() if possible(target)} for way in ways]


def edited(scene: Scene, instruction: str) -> Scene:
    """The scene after an instruction"""
    for way in edits(scene):
        if instruction in way:
            return way[instruction]
    raise ValueError(f"not an edit of the picture: {instruction!r} for {scene}")


def edit_kind(instruction: str) -> str:
    """One of EDIT_KINDS"""
    words = instruction.split()
    if words[0] == "change":
        return words[2]
    if words[0] == "make":
        return "mood" if words[-1] in MOODS else "eyes" if words[2] == "eyes" else "color"
    return {"turn": "shape", "remove": "remove"}[words[0]]


def sample_edit(rng: np.random.Generator, kind: str | None = None) -> tuple[Scene, str, Scene]:
    """(source, instruction, target) with equal layout; the source is of the given kind of scene"""
    source = sample_scene(rng, kind)
    ways = edits(source)
    way = ways[rng.integers(len(ways))]
    instruction = str(rng.choice(list(way)))
    return source, instruction, way[instruction]


# Oracle: reading a picture


def _pixels(image: Image.Image) -> np.ndarray:
    """[SIZE, SIZE, 3] in 0..255"""
    image = image.convert("RGB")
    return np.asarray(image if image.size == (SIZE, SIZE)
                      else image.resize((SIZE, SIZE), Image.Resampling.BOX), np.float32)


def _nearest(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[..., 3] -> (index of the nearest palette colour, distance to it in 0..441), both [...]"""
    squared = np.square(pixels).sum(-1, keepdims=True) - 2 * pixels @ PALETTE.T + np.square(PALETTE).sum(-1)
    return squared.argmin(-1), np.sqrt(np.maximum(squared.min(-1), 0))


def _components(mask: np.ndarray, smallest: int) -> list[np.ndarray]:
    """4-connected components of a [H, W] mask with at least `smallest` pixels, as masks, largest first.

    Union-find over the horizontal runs of each row: two runs belong together where they overlap in
    neighbouring rows.
    """
    edges = np.diff(np.pad(mask, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    runs = list(zip(*np.nonzero(edges == 1), np.nonzero(edges == -1)[1], strict=True))     # (row, start, end)
    parent = list(range(len(runs)))

    def root(i: int) -> int:
        while parent[i] != i:
            i = parent[i]
        return i

    above = 0
    for i, (row, start, end) in enumerate(runs):
        while runs[above][0] < row - 1:
            above += 1
        for j in range(above, i):
            if runs[j][0] == row:
                break
            if runs[j][1] < end and start < runs[j][2]:
                parent[root(j)] = root(i)

    found = {}
    for i, (row, start, end) in enumerate(runs):
        found.setdefault(root(i), np.zeros_like(mask))[row, start:end] = True
    return sorted((part for part in found.values() if part.sum() >= smallest), key=np.sum, reverse=True)


def _box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """(top, bottom, left, right), the ends exclusive"""
    rows, columns = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
    return rows[0], rows[-1] + 1, columns[0], columns[-1] + 1


def _outline(mask: np.ndarray) -> np.ndarray:
    """The mask sampled at [48, 48] over 3 standard deviations around its centre: a bump on a side hardly
    moves these
    """
    padded = np.pad(mask, SIZE)
    y, x = np.nonzero(padded)
    steps = np.linspace(-3, 3, 48)
    rows, columns = (np.rint(v.mean() + steps * max(v.std(), 1)).clip(0, 3 * SIZE - 1).astype(int)
                     for v in (y, x))
    return padded[np.ix_(rows, columns)]


def _template(form: str) -> np.ndarray:
    pixels = _pixels(draw(Scene("single", (Item(form, "red", 32, 32, 26),), "white")))
    return _outline(pixels[..., 1] < 140)


FORMS = (*SHAPES, *LETTERS)
TEMPLATES = np.stack([_template(form) for form in FORMS])  # [11, 48, 48]


def _read_form(mask: np.ndarray) -> str:
    top, bottom, left, right = _box(mask)
    outline = _outline(mask)
    overlap = (TEMPLATES & outline).sum((1, 2)) / (TEMPLATES | outline).sum((1, 2))
    form = FORMS[overlap.argmax()]
    good = overlap.max() > (0.7 if form in SHAPES else 0.55)
    fits = max(right - left, bottom - top) < 0.9 * SIZE  # what fills the picture is no object
    return form if good and fits and 0.5 < (right - left) / (bottom - top) < 2 else ""


def _read_face(pixels: np.ndarray, labels: np.ndarray, mask: np.ndarray, skin: str) -> tuple[str, str] | None:
    """(mood, eye colour) of a component of that colour, "" where unclear; None if it has no face"""
    top, bottom, left, right = _box(mask)
    disc = TEMPLATES[FORMS.index("circle")]
    if min(bottom - top,
           right - left) < 24 or (disc & _outline(mask)).sum() < 0.75 * (disc | _outline(mask)).sum():
        return None
    v, u = np.mgrid[:SIZE, :SIZE]  # the face's own coordinates in [-1, 1]
    u, v = (2 * u + 1 - left - right) / (right - left), (2 * v + 1 - top - bottom) / (bottom - top)

    contrast = np.linalg.norm(pixels - COLORS[skin], axis=-1)
    eyes = []
    for side in (-1, 1):
        socket = (abs(u - 0.36 * side) < 0.26) & (abs(v + 0.25) < 0.26)
        if contrast[socket].max() < 110:
            return None
        core = socket & (contrast > 0.8 * contrast[socket].max())
        eyes.append(PALETTE_NAMES[_nearest(pixels[core].mean(0))[0]])

    below = (abs(u) < 0.62) & (v > 0.15) & (v < 0.75) & (u * u + v * v < 0.72)
    mouth = (labels == PALETTE_NAMES.index("black")) & below
    if mouth.sum() < 8:
        return None
    # v grows downwards: negative is a smile
    bend = np.polyfit(u[mouth], v[mouth], 2)[0] if np.ptp(u[mouth]) > 0.3 else 0
    mood = "smiling" if bend < -0.3 else "sad" if bend > 0.3 else ""
    return mood, eyes[0] if eyes[0] == eyes[1] and eyes[0] in EYES[skin] else ""


def _stands(relation: str, a: Item, b: Item) -> bool:
    """Whether a is above / below / left of / right of b: clearly so, and more than it is beside it"""
    dx, dy = b.x - a.x, b.y - a.y
    along, across = {"above": (dy, dx), "below": (-dy, dx), "left of": (dx, dy),
                     "right of": (-dx, dy)}[relation]
    return along > 8 and along > abs(across)


def read(image: Image.Image) -> Scene:
    """What a picture shows, with "" for whatever is unclear. Components under 24 pixels do not count as
    objects.
    """
    pixels = _pixels(image)
    labels, _ = _nearest(pixels)
    rim = np.concatenate([labels[:2].ravel(), labels[-2:].ravel(), labels[:, :2].ravel(),
                          labels[:, -2:].ravel()])
    shares = np.bincount(rim, minlength=len(PALETTE)) / len(rim)
    ground = int(shares.argmax())
    plain = shares[ground] > 0.9 and PALETTE_NAMES[ground] in BACKGROUNDS
    background = PALETTE_NAMES[ground] if plain else ""

    items, mood, eyes = [], "", ""
    for mask in _components(labels != ground, smallest=24):
        inside = mask.copy()  # without its antialiased rim
        inside[1:] &= mask[:-1]
        inside[:-1] &= mask[1:]
        inside[:, 1:] &= mask[:, :-1]
        inside[:, :-1] &= mask[:, 1:]
        counts = np.bincount(labels[inside if inside.sum() >= 12 else mask], minlength=len(PALETTE))
        most = PALETTE_NAMES[counts.argmax()]
        color = most if counts.max() > 0.7 * counts.sum() else ""
        form, top, bottom, left, right = _read_form(mask), *_box(mask)
        if form in SHAPES and _components(inside & (labels != counts.argmax()), smallest=16):
            form = ""  # something else within, as in a face that is not whole
        if most in EYES and (face := _read_face(pixels, labels, mask, most)):
            form, color, (mood, eyes) = "face", most, face
        items.append(Item(form, color, (left + right) / 2, (top + bottom) / 2, (bottom - top) / 2,
                          (right - left) / (bottom - top)))

    kind, relation = "count", ""
    if len(items) == 1:
        kind = "face" if items[0].form == "face" else "letter" if items[0].form in LETTERS else "single"
    elif len(items) == 2 and (items[0].form, items[0].color) != (items[1].form, items[1].color):
        kind, relation = "relation", next((name for name in RELATIONS if _stands(name, *items)), "")
    return Scene(kind, tuple(items), background, relation, mood, eyes)


# Oracle: scores


def _match(seen: Scene, asked: Scene) -> tuple[bool, bool, float]:
    """(everything right, objects right, share of the requirements met in [0, 1]). The objects are right when
    their number and forms are; the other requirements are colours, background, relation, mood and eyes.
    """

    def judge(order: tuple[Item, ...]) -> tuple[bool, float]:
        forms, colors = (sum(getattr(a, what) == getattr(b, what)
                             for a, b in zip(order, asked.items, strict=False)) / wanted
                         for what in ("form", "color"))
        met = [*common, forms, colors]
        if asked.relation:
            met.append(float(len(order) == 2 and _stands(asked.relation, *order)))
        return len(seen.items) == wanted and forms == 1, sum(met) / len(met)

    wanted = len(asked.items)
    common = [float(seen.background == asked.background),
              max(0.0, 1 - abs(len(seen.items) - wanted) / wanted)]
    if asked.kind == "face":
        common += [float(seen.mood == asked.mood), float(seen.eyes == asked.eyes)]
    orders = itertools.permutations(seen.items[:6], min(wanted, len(seen.items)))
    objects, share = max(map(judge, orders))  # the order that makes most of the objects, then of the rest
    return share == 1, objects, share


def _capped(objects: bool, share: float) -> float:
    """Priority hierarchy of Sec. 3.1: with a wrong or missing object the score is at most 2 of 5."""
    return share if objects else share / 4


def alignment(image: Image.Image, prompt: str, source: Image.Image | None = None) -> tuple[bool, float]:
    """(everything right, score in [0, 1]): the share of the requirements met, a quarter of it where an object
    is wrong or missing.

    The prompt is a caption or, with a source picture, an edit instruction for what is read from the source.
    """
    try:
        asked = parse(prompt)
    except ValueError:
        if source is None:
            raise
        asked = edited(read(source), prompt)
    strict, objects, share = _match(read(image), asked)
    return strict, _capped(objects, share)


def aesthetic(image: Image.Image) -> float:
    """How clean a picture is, in [0, 1], whatever it shows: sharpness of its edges times purity of its areas.

    Sharpness is the share of an edge's contrast (over 7 pixels) that it covers within 3 pixels, averaged over
    all edges. Purity falls with the rms distance to the palette away from edges, averaged over background and
    objects separately. Neither depends on how large or how many the objects are. Without edges, or with next
    to nothing else, there is nothing in the picture: 0.
    """
    pixels = _pixels(image)
    labels, distance = _nearest(pixels)
    edge = np.zeros((SIZE, SIZE), bool)
    for axis in (0, 1):
        differs = np.diff(labels, axis=axis) != 0
        edge |= np.pad(differs, [(0, 1) if a == axis else (0, 0) for a in (0, 1)])
        edge |= np.pad(differs, [(1, 0) if a == axis else (0, 0) for a in (0, 1)])
    flat = ~_spread(edge, 1)
    if not edge.any() or flat.mean() < 0.2:
        return 0.0

    padded = np.pad(pixels, ((3, 3), (3, 3), (0, 0)), mode="edge")
    rows, columns = np.nonzero(_spread(edge, 1))
    contrast = []  # at distances 1, 2, 3: largest colour difference between opposite neighbours
    for d in (1, 2, 3):
        differences = [
            padded[rows + 3 + d * dy, columns + 3 + d * dx] - padded[rows + 3 - d * dy, columns + 3 - d * dx]
            for dy, dx in ((0, 1), (1, 0), (1, 1), (1, -1))
        ]
        contrast.append(np.sqrt(np.square(differences).sum(-1)).max(0))
    steepness = np.zeros((SIZE, SIZE), np.float32)
    steepness[rows, columns] = contrast[0] / np.maximum(np.max(contrast, axis=0), 1)
    sharpness = _spread(steepness, 1)[edge].mean()

    ground = labels == np.bincount(labels.ravel()).argmax()
    impurity = np.mean([np.sqrt(np.square(distance[area & flat if (area & flat).any() else area]).mean())
                        for area in (ground, ~ground)])
    something = min(1.0, edge.sum() / 40)  # a few stray pixels are no picture
    return float(something * sharpness**4 * np.exp(-impurity / 60))


def palette(image: Image.Image) -> float:
    """A naive measure of the same, in [0, 1]: how near all pixels are to the palette. Small objects have less
    of an edge, and drawing nothing is best of all.
    """
    return float(np.exp(-_nearest(_pixels(image))[1].mean() / 20))


def _spread(values: np.ndarray, distance: int) -> np.ndarray:
    """Maximum over the square of that many pixels around each pixel, [H, W] -> [H, W]"""
    for axis in (0, 1):
        padded = np.pad(values, [(distance, distance) if a == axis else (0, 0) for a in (0, 1)])
        length = values.shape[axis]
        values = np.max([padded.take(range(i, i + length), axis) for i in range(2 * distance + 1)], axis=0)
    return values


def consistency(source_image: Image.Image, output_image: Image.Image, source: Scene, target: Scene) -> float:
    """1 - 2 RMSE (pixels in 0..1), at least 0, outside the region that the edit touches and 3 pixels around
    it (1 where it touches the background, or nothing would be left of a letter)
    """
    changed = np.abs(_pixels(draw(source)) - _pixels(draw(target))).max(-1) > 8
    touched = _spread(changed, 1 if source.background != target.background else 3)
    difference = (_pixels(source_image) - _pixels(output_image))[~touched] / 255
    return max(0.0, 1 - 2 * float(np.sqrt(np.square(difference).mean()))) if len(difference) else 1.0


def portrait(image: Image.Image) -> float:
    """How good a face the picture shows, in [0, 1]: it is one round face with a clear mood and two alike
    eyes, and cleanly drawn
    """
    seen = read(image)
    if seen.kind != "face":
        return 0.0
    aspect = seen.items[0].aspect
    roundness = min(1.0, max(0.0, 2.5 * min(aspect, 1 / aspect) - 1.25))  # 1 from .9 on, 0 at .5
    return (1 + bool(seen.mood) + bool(seen.eyes)) / 3 * roundness * (0.3 + 0.7 * aesthetic(image))


def instruction(image: Image.Image, prompt: str, source: Image.Image) -> float:
    """How well the edit was carried out, in [0, 1]: the share of the target's requirements met, a quarter of
    it where an object is wrong or the picture is no closer to the target than to the source, so that the core
    is not met"""
    before, seen = read(source), read(image)
    _, objects, share = _match(seen, edited(before, prompt))
    return _capped(objects and share > _match(seen, before)[2], share)


def preserved(image: Image.Image, prompt: str, source: Image.Image) -> float:
    """`consistency` with what is read in the source"""
    before = read(source)
    return consistency(source, image, before, edited(before, prompt))


def embed_faces(image: Image.Image) -> list[np.ndarray]:
    """One vector per face, for the identity reward. Who somebody is shows in the eyes; mood, place and size
    do not matter.
    """
    pixels, vectors = _pixels(image), []
    for item in read(image).items:
        if item.form != "face":
            continue
        rows, columns = (np.arange(SIZE) + 0.5 - centre for centre in (item.y, item.x))
        v, u = rows[:, None] / item.r, columns[None] / item.r
        eyes = [(np.hypot(u - 0.36 * side, v + 0.25) < 0.16)[..., None] for side in (-1, 1)]
        colors = np.concatenate([(pixels * eye).sum((0, 1)) / max(eye.sum(), 1) for eye in eyes]) / 255
        closeness = [np.exp(-np.square(colors[i:i + 3] - PALETTE / 255).sum(-1) / 0.1) for i in (0, 3)]
        vectors.append(np.concatenate(closeness))
    return vectors


# Reward sources for the training scripts: one value per image, on a scale of 1 to 5 (strict: 0 or 1)

Images = list[Image.Image]


def aesthetic_reward(images: Images, prompts: list[str], sources: list[Images] | None = None) -> list[float]:
    return [1 + 4 * aesthetic(image) for image in images]


def palette_reward(images: Images, prompts: list[str], sources: list[Images] | None = None) -> list[float]:
    return [1 + 4 * palette(image) for image in images]


def portrait_reward(images: Images, prompts: list[str], sources: list[Images] | None = None) -> list[float]:
    return [1 + 4 * portrait(image) for image in images]


def alignment_reward(images: Images, prompts: list[str], sources: list[Images] | None = None) -> list[float]:
    return [1 + 4 * soft for _, soft in _alignments(images, prompts, sources)]


def strict_reward(images: Images, prompts: list[str], sources: list[Images] | None = None) -> list[float]:
    return [float(strict) for strict, _ in _alignments(images, prompts, sources)]


def instruction_reward(images: Images, prompts: list[str], sources: list[Images]) -> list[float]:
    return [1 + 4 * instruction(image, prompt, before[0])
            for image, prompt, before in zip(images, prompts, sources, strict=True)]


def consistency_reward(images: Images, prompts: list[str], sources: list[Images]) -> list[float]:
    return [1 + 4 * preserved(image, prompt, before[0])
            for image, prompt, before in zip(images, prompts, sources, strict=True)]


for _reward in (aesthetic_reward, palette_reward, portrait_reward, alignment_reward, instruction_reward,
                consistency_reward):
    _reward.range = 1, 5
strict_reward.range = 0, 1


def _alignments(images: Images, prompts: list[str], sources: list[Images] | None) -> list[tuple[bool, float]]:
    firsts = [source[0] if source else None for source in sources] if sources else [None] * len(images)
    return [alignment(*args) for args in zip(images, prompts, firsts, strict=True)]


# Self-test


def _contact_sheet(path: str, rng: np.random.Generator) -> None:
    """Rows: scenes of each kind, each followed by its degraded version; then edits as pairs of source and
    target
    """
    tiles = []
    for kind in KINDS:
        for _ in range(8):
            scene = sample_scene(rng, kind)
            ugly, severity = degrade(draw(scene), rng)
            tiles += [(draw(scene), caption(scene)), (ugly, f"{severity:.2f} aes {aesthetic(ugly):.2f}")]
    for _ in range(24):
        source, instruction, target = sample_edit(rng)
        tiles += [(draw(source), instruction), (draw(target), caption(target))]

    columns, width, height = 8, 2 * SIZE + 4, 2 * SIZE + 26
    sheet = Image.new("RGB", (columns * width, math.ceil(len(tiles) / columns) * height), (128, 128, 128))
    pen = ImageDraw.Draw(sheet)
    for i, (image, text) in enumerate(tiles):
        x, y = i % columns * width, i // columns * height
        sheet.paste(image.resize((2 * SIZE, 2 * SIZE), Image.Resampling.NEAREST), (x, y))
        pen.text((x, y + 2 * SIZE), text[:22] + "\n" + text[22:44], fill=(255, 255, 255), font_size=10)
    sheet.save(path)


def _self_test(rng: np.random.Generator, per_kind: int = 300) -> None:
    def mean_aesthetic(scenes, damage=lambda image: image) -> float:
        return float(np.mean([aesthetic(damage(draw(scene))) for scene in scenes]))

    def strict_soft(images, scenes) -> list[float]:
        return [np.mean(v)
                for v in zip(*(alignment(i, caption(s)) for i, s in zip(images, scenes, strict=True)),
                             strict=True)]

    def blend(color, share: float):
        return lambda image: Image.blend(image, Image.new("RGB", image.size, color), share)

    def blur(radius: float):
        return lambda image: image.filter(ImageFilter.GaussianBlur(radius))

    print("          clean         wrong prompt  degraded      aesthetic of clean, blurred .5px, degraded by "
          "severity tercile")
    for kind in KINDS:
        scenes = [sample_scene(rng, kind) for _ in range(per_kind)]
        images = [draw(scene) for scene in scenes]
        # less those that happen to describe the same picture
        others = [sample_scene(rng, kind) for _ in scenes]
        pairs = [(i, other)
                 for i, s, other in zip(images, scenes, others, strict=True) if not _match(s, other)[0]]
        ugly, severity = zip(*(degrade(image, rng) for image in images), strict=True)
        values = [*strict_soft(images, scenes), *strict_soft(*zip(*pairs, strict=True)),
                  *strict_soft(ugly, scenes)]
        values += [mean_aesthetic(scenes), mean_aesthetic(scenes, blur(0.5))]
        by_severity = np.array([aesthetic(image) for image in ugly])[np.argsort(severity)]
        values += [tercile.mean() for tercile in np.array_split(by_severity, 3)]
        print(f"{kind:10s}" + "  ".join(f"{value:.3f}" for value in values))

    print("\naesthetic of shapes with r = 8, 22; of one circle, four circles")
    looks = list(itertools.product(SHAPES, COLORS, BACKGROUNDS))
    small, large = ([Scene("single", (Item(s, c, 32.3, 31.8, r),), b) for s, c, b in looks] for r in (8, 22))
    corners = list(itertools.product((17, 47), (17, 47)))
    one, four = ([Scene("count", tuple(Item("circle", c, x, y, 9) for x, y in corners[:n]), "white")
                  for c in COLORS] for n in (1, 4))
    damages = {"clean": blend("red", 0), "blur 1": blur(1), "tint": blend((230, 120, 20), 0.15),
               "wash": blend((150, 150, 150), 0.25)}
    for name, damage in damages.items():
        print(f"{name:10s}"
              + "  ".join(f"{mean_aesthetic(group, damage):.3f}" for group in (small, large, one, four)))
    print("empty     "
          + "  ".join(f"{aesthetic(Image.new('RGB', (SIZE, SIZE), color)):.3f}" for color in BACKGROUNDS))

    scored = []
    for source, instruction, target in (sample_edit(rng) for _ in range(2 * per_kind)):
        before, after, other = draw(source), draw(target), draw(sample_scene(rng))
        scores = [alignment(image, instruction, before)[0] for image in (after, before)]
        scored.append(scores
                      + [consistency(before, image, source, target)
                         for image in (after, blur(0.5)(after), other)])
    print("\nedits: strict {:.3f}, of the unedited source {:.3f}; ".format(*np.mean(scored, 0)[:2]), end="")
    print("consistency {:.3f}, blurred .5px {:.3f}, another picture {:.3f}".format(*np.mean(scored, 0)[2:]))
    texts = [*SPECS, *(sample_edit(rng)[1] for _ in range(3000))]
    print(f"{len(SPECS)} captions, {len(set(' '.join(texts).split()))} words with those of the edits")

    scenes = [sample_scene(rng) for _ in range(200)]
    images = [draw(scene) for scene in scenes]
    for name, call in {
        "draw": lambda: [draw(scene) for scene in scenes],
        "alignment": lambda: strict_soft(images, scenes),
        "aesthetic": lambda: [aesthetic(image) for image in images],
    }.items():
        start = time.process_time()
        call()
        print(f"{name} {(time.process_time() - start) / len(scenes) * 1000:.2f} ms")


if __name__ == "__main__":
    _contact_sheet(sys.argv[1], np.random.default_rng(0))
    _self_test(np.random.default_rng(1))
