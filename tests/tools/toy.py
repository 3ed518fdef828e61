"""The toy world: patterned shapes, drawn on request and written as real data sets, in the layouts
of ImageNet, ADE20K and LaSOT. It stands in for data in the demos and in the tests.

Shape legend: H, W: size of a picture; h, w: size of the window around one object.
"""
import functools
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

LASOT_TEST = Path(__file__).parents[1] / "lasot_test.txt"
VIDEO = dict(size=(120, 160), scale=0.4)    # of the pictures that are frames
FRAMES = 40                                 # of a video, 10 per unit of time
HELD_OUT = 7000                             # index of the first validation picture and test video

# Object coordinates: u to the right, v downwards, both about -1 .. 1. Shapes are positive inside.
SHAPES = {
    "disc": lambda u, v: 0.9 - np.hypot(u, v),
    "square": lambda u, v: 0.8 - np.maximum(abs(u), abs(v)),
    "triangle": lambda u, v: 0.6 - np.maximum(v - 0.1, 0.866 * abs(u) - 0.5 * v),
    "flower": lambda u, v: 0.8 + 0.25 * np.cos(5 * np.arctan2(u, -v)) - np.hypot(u, v),
}
PATTERNS = {
    "stripes": lambda u, v: np.cos(7 * v),
    "bars": lambda u, v: np.cos(7 * u),
    "rings": lambda u, v: np.cos(9 * np.hypot(u, v)),
    "spokes": lambda u, v: np.cos(6 * np.arctan2(u, -v)),
}
CLASSES = tuple(f"{shape} with {pattern}" for pattern in PATTERNS for shape in SHAPES)


# --------------------------------------------------------------------------------------------------
# Pictures
# --------------------------------------------------------------------------------------------------
def picture(index, size=(48, 48), time=0.0, scale=1.0):
    """Draw picture `index` of a synthetic dataset of 16 classes; colour is uninformative.

    The main object lies on two small distractors of random classes.
    size: height and width in pixels.
    time: moves the three objects; steps of 0.1 make a video.
    scale: size of the main object; below 1 the distractors have its size and class as well.

    Returns
        image: (H, W, 3) uint8
        label: class of the main object, index % 16
        labels: (H, W) uint8, the class of every pixel: 0 for the ground, k + 1 for class k
        box: (x, y, width, height) of the main object in pixels
    """
    rng = np.random.default_rng([7, index])
    label = index % len(CLASSES)
    middle = np.array(size) / 2
    image = np.tile(rng.uniform(0.15, 0.85) + rng.uniform(-0.1, 0.1, 3), (*size, 1))    # (H, W, 3)
    labels = np.zeros(size, np.uint8)                                                   # (H, W)
    for main in (False, False, True):
        alike = main or scale < 1
        kind = label if alike else rng.integers(len(CLASSES))
        radius = rng.uniform(0.8, 1.0) * scale * middle.min()
        radius *= 1 if alike else 0.3
        light = rng.uniform(0.65, 0.9) + rng.uniform(-0.1, 0.1, 3)
        dark = rng.uniform(0.1, 0.35) + rng.uniform(-0.1, 0.1, 3)
        centre, angle = pose(rng, middle, radius, time, reach=0.35 if main else 0.5)
        window, coverage, shade = render(CLASSES[kind], size, centre, radius, angle)
        image[window] += coverage * (dark + shade * (light - dark) - image[window])
        labels[window][coverage[..., 0] > 0.5] = kind + 1

    rows, columns = np.nonzero(coverage[..., 0] > 0.5)    # of the main object, drawn last
    top, left = (side.start for side in window)
    box = (left + columns.min(), top + rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1)
    image = (255 * image.clip(0, 1)).round().astype(np.uint8)
    return image, label, labels, tuple(float(edge) for edge in box)


def pose(rng, middle, radius, time, reach):
    """Draw a smooth path around the middle of the picture and evaluate it at `time`. Returns the
    centre (y, x) in pixels and the angle in radians; the object stays in view for reach <= 0.5."""
    room = np.maximum(middle - 0.9 * radius, 0) * reach
    swing = np.sin(rng.uniform(0, 2 * np.pi, 2) + rng.uniform(0.5, 1.5, 2) * time)
    centre = middle + room * (rng.uniform(-1, 1, 2) + swing)
    angle = rng.uniform(-0.15, 0.15) + 0.15 * np.sin(rng.uniform(0.5, 1.5) * time)
    return centre, angle


def render(name, size, centre, radius, angle):
    """Render the object `name` in the window around it, to save time in large pictures.

    Returns the window (two slices into the picture), coverage (h, w, 1) in [0, 1] with a soft edge,
    and shade (h, w, 1), 0 for the dark and 1 for the light colour of the pattern.
    """
    y, x = centre
    top, left = max(0, int(y - 1.2 * radius)), max(0, int(x - 1.2 * radius))
    window = np.s_[top:int(y + 1.2 * radius) + 1, left:int(x + 1.2 * radius) + 1]
    rows, columns = np.mgrid[:size[0], :size[1]][(slice(None), *window)].astype(np.float32)
    rows = (rows + 0.5 - y) / radius                        # (h, w)
    columns = (columns + 0.5 - x) / radius
    u = np.cos(angle) * columns + np.sin(angle) * rows
    v = np.cos(angle) * rows - np.sin(angle) * columns
    shape, pattern = name.split(" with ")
    coverage = (SHAPES[shape](u, v) * radius + 0.5).clip(0, 1)[..., None]
    shade = (0.75 * PATTERNS[pattern](u, v) + 0.5).clip(0, 1)[..., None]
    return window, coverage, shade


# --------------------------------------------------------------------------------------------------
# Data sets
# --------------------------------------------------------------------------------------------------
def written_once(write):
    """Decorate write(root, ...): skip it where the folder `root` exists. It writes into the sibling
    `root.part`, renamed when complete, so an interrupted call leaves no incomplete data set."""
    @functools.wraps(write)
    def write_if_missing(root, *args, **options):
        root = Path(root)
        if root.exists():
            return
        part = root.with_name(f"{root.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        write(part, *args, **options)
        part.rename(root)
    return write_if_missing


def class_folder(label):
    return CLASSES[label].replace(" ", "_")


@written_once
def write_images(root, train=6000, val=800):
    """Write a classification data set, root/{train,val}/CLASS/INDEX.png, of 48x48 pixels. Class ids
    follow the sorted folder names, not CLASSES."""
    for split, first, count in (("train", 0, train), ("val", HELD_OUT, val)):
        for label in range(len(CLASSES)):
            (root / split / class_folder(label)).mkdir(parents=True)
        for index in range(first, first + count):
            image, label, _, _ = picture(index)
            Image.fromarray(image).save(root / split / class_folder(label) / f"{index:06}.png")


@written_once
def write_segmentation(root, train=40, val=100):
    """Write a segmentation data set in ADE20K's layout,
    root/{images,annotations}/{training,validation}/INDEX.png, of 48x48 pixels.

    Label files hold 0 for the ground and 1 .. 16 for CLASSES: train with `--num-classes 17
    --zero-is-class`. objectInfo150.txt holds the 17 names.
    """
    for split, first, count in (("training", 0, train), ("validation", HELD_OUT, val)):
        for part in ("images", "annotations"):
            (root / part / split).mkdir(parents=True)
        for index in range(first, first + count):
            image, _, labels, _ = picture(index)
            Image.fromarray(image).save(root / "images" / split / f"{index:06}.png")
            Image.fromarray(labels).save(root / "annotations" / split / f"{index:06}.png")
    (root / "objectInfo150.txt").write_text("\n".join(("ground", *CLASSES)) + "\n")


@written_once
def write_videos(root, train=60, test=8):
    """Write a tracking data set in LaSOT's layout, root/CLASS-N/{img/*.jpg, groundtruth.txt,
    full_occlusion.txt, out_of_view.txt}. The target is always visible.

    track.py recognises test videos by name, so these carry the first names of LaSOT's test list
    (airplane-1 ...), whatever they show.
    """
    names = {index: f"{class_folder(index % len(CLASSES))}-{index}" for index in range(train)}
    names.update(enumerate(LASOT_TEST.read_text().split()[:test], HELD_OUT))
    for index, name in names.items():
        folder = root / name
        (folder / "img").mkdir(parents=True)
        boxes = []
        for t in range(FRAMES):
            image, _, _, box = picture(index, time=t / 10, **VIDEO)
            Image.fromarray(image).save(folder / "img" / f"{t + 1:08}.jpg", quality=95)
            boxes.append(",".join(f"{edge:.0f}" for edge in box))
        (folder / "groundtruth.txt").write_text("\n".join(boxes) + "\n")
        for file in ("full_occlusion.txt", "out_of_view.txt"):
            (folder / file).write_text(",".join("0" * FRAMES) + "\n")
