"""Check every file of a data set, or a checkpoint, before a long run.

    python tests/tools/check.py pretrain --data data/imagenet
    python tests/tools/check.py finetune --data data/imagenet --list unreadable.txt
    python tests/tools/check.py segment --data my_masks --num-classes 2 --zero-is-class
    python tests/tools/check.py track --data lasot=data/lasot,coco=data/coco
    python tests/tools/check.py track --data lasot=data/lasot --results DIR     # text files alone
    python tests/tools/check.py checkpoint mae_tiny.pth

Prints a summary, then each thing that would stop a run or distort a result, with its remedy and up
to five examples. The exit status is 1 if there is such a thing, else 0. The functions of the
scripts find and read the files. Nothing is written, except the names of unreadable files by --list
FILE.
"""
import argparse
import contextlib
import hashlib
import io
import math
import os
import re
import struct
import sys
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.ops import box_convert, box_iou
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import finetune  # noqa: E402
import pretrain_d2mae  # noqa: E402
import segment  # noqa: E402
import track  # noqa: E402
from models import (MODELS, InputError, Names, build_model, list_images, load_encoder,  # noqa: E402
                    open_image, plain_errors, read_encoder)

FAULTS = {    # what would stop a run or distort a result -> its remedy
    "stops the run at its start": "do as the script's sentence says",
    "left out by the run": "complete or convert it if it is meant, else remove it",
    "unreadable file": "replace it by a good copy or remove it; --list FILE writes all names",
    "image smaller than a patch of 16 pixels": "remove it: it would be enlarged to a blur",
    "picture in both sets": "remove it from one: a score on known pictures is too high",
    "class of fewer than 5 images": "add images, or remove it from both sets",
    "image without labels": "add the label file or remove the image: a run stops there",
    "labels without an image": "add the image: a run does not read them",
    "image and labels of different sizes": "write both in one size; if EXIF is named, label the "
        "upright image or remove its orientation",
    "no file of class numbers": "write grey or palette PNG of class numbers",
    "number that is no class": "give a larger --num-classes, or --zero-is-class where 0 is a "
        "class; write 255 for pixels to ignore",
    "labels of fewer than two classes": "write 1 for 255, and give --zero-is-class where 0 is a "
        "class: 255 is ignored, and so is 0 without that option",
    "class that never occurs": "check --num-classes and --zero-is-class: it cannot be learnt, and "
        "the mean IoU leaves it out",
    "frames and boxes differ in number": "give one line for each frame, in the names of the set",
    "box without a size in a visible frame": "mark the frame as hidden: training skips it, "
        "evaluation counts it as a failure",
    "box outside its frame": "give x,y,w,h in pixels of the upright frame",
    "boxes are corners x1,y1,x2,y2": "write x,y,w,h: they leave the frame as that, not as corners",
    "sequence that is never drawn": "join or remove it: training needs 20 frames, 5 of them with a "
        "visible box",
    "frame turned by EXIF": "write it upright without the orientation: boxes of the stored pixels "
        "miss the target (coco goes by the stated size)",
    "frame of another size than stated": "state its size, and scale its boxes",
    "result that does not fit": "write one x,y,w,h for each frame; the first is the given box",
    "unknown number of attention heads": "give the --model that the encoder was trained as; a run "
        "takes the first",
    "tensor with NaN or infinity": "give an earlier file of that training",
}


class Report:
    """Collects faults and prints them."""

    def __init__(self):
        self.faults = defaultdict(dict)    # key of FAULTS -> {(subject, detail): None}, in order

    def add(self, fault, subject, detail=""):
        """Add an example of a fault: a file, folder, class or sentence, and what is wrong with it.
        """
        self.faults[fault][str(subject), detail] = None

    def ask(self, function, *args):
        """Call a function of a script -> what it returns, None if it raises InputError. What it
        raises or prints is a fault."""
        said = io.StringIO()
        try:
            with contextlib.redirect_stdout(said):
                return function(*args)
        except InputError as error:
            self.add("stops the run at its start", error)
        finally:
            for line in said.getvalue().splitlines():
                self.add("left out by the run", line)

    def print(self):
        for fault in sorted(self.faults, key=list(FAULTS).index):
            examples = list(self.faults[fault])
            print(f"{len(examples)} x {fault}: {FAULTS[fault]}")
            for subject, detail in examples[:5]:
                print(f"    {subject}" + f" ({detail})" * bool(detail))
            if len(examples) > 5:
                print(f"    and {len(examples) - 5} more")
        print(f"kinds of faults that would stop a run or distort a result: {len(self.faults)}")


def sweep(report, title, look, items, args):
    """Compute look(item) -> facts, [(fault, subject, detail)] of all items in loader processes.
    Yields the facts in order; the faults go to the report."""
    loader = DataLoader(items, batch_size=None, collate_fn=look,    # which gets single items
                        num_workers=min(args.workers, len(items)))
    for facts, faults in tqdm(loader, title, leave=False):
        for fault in faults:
            report.add(*fault)
        yield facts


def sentence(error, file):
    """What a script says of a file, without its name and the advice to use this tool."""
    return re.sub("; tests/tools/check.py.*", "", str(error)).replace(f"{file} ", "")


def pixels(size):
    return f"{size[0]} x {size[1]}"


def first_ten(numbers):
    text = ", ".join(map(str, sorted(numbers)[:10]))
    return text + ", ..." * (len(numbers) > 10)


def shares(counts, most=10):
    """Counter -> text: its entries in falling order, each with its share."""
    rows = [f"{key}: {100 * n / counts.total():.3g} %" for key, n in counts.most_common(most)]
    return ", ".join(rows) + f", and {len(counts) - most} more" * (len(counts) > most)


# --------------------------------------------------------------------------------------------------
# Images
# --------------------------------------------------------------------------------------------------
def look_at_image(path):
    """-> size of the upright image, that of the stored one, whether EXIF turns it, its kind and a
    digest of its bytes (dict, empty if it cannot be read); faults."""
    try:
        size = open_image(path).size
    except OSError as error:
        cause = error.__context__    # in Pillow
        text = f"{type(cause).__name__}: {cause}".replace(f" {str(path)!r}", "")
        return {}, [("unreadable file", path, text)]
    turned = False
    with Image.open(path) as image:
        with contextlib.suppress(SyntaxError, struct.error):    # broken EXIF, as in open_image
            turned = image.getexif().get(0x0112, 1) in range(2, 9)
        facts = dict(size=size, stored=image.size, turned=turned,
                     kind=f"{image.format} {image.mode}",
                     digest=hashlib.blake2b(Path(path).read_bytes(), digest_size=8).digest())
    small = [("image smaller than a patch of 16 pixels", path, pixels(size))]
    return facts, small * (min(size) < 16)


def look_at_pair(dataset, index):
    """The same for an image of a SegmentationSet, and numbers: {label number: pixels}."""
    file, label_file = dataset.files[index], dataset.label_file(index)
    facts, faults = look_at_image(file)
    if not label_file.exists():
        return facts, [*faults, ("image without labels", file, f"no {label_file}")]
    try:
        numbers = segment.read_numbers(label_file)
    except OSError as error:
        fault = "unreadable file" if error.__context__ else "no file of class numbers"
        return facts, [*faults, (fault, label_file, sentence(error, label_file))]
    size = numbers.shape[::-1]
    if facts and size != facts["size"]:
        exif = "; EXIF turns the image" * (facts["turned"] and size == facts["stored"])
        faults.append(("image and labels of different sizes", file,
                       f"{pixels(facts['size'])}, {pixels(size)}{exif}"))
    counts = dict(zip(*(part.tolist() for part in np.unique(numbers, return_counts=True))))
    wrong = counts.keys() - {0, segment.IGNORE} - set(class_numbers(dataset))
    if wrong:
        faults.append(("number that is no class", label_file, first_ten(wrong)))
    return {**facts, "numbers": counts}, faults


def class_numbers(dataset):
    """Numbers that are classes in the label files of a SegmentationSet."""
    first = 1 - dataset.zero_is_class
    return range(first, first + dataset.num_classes)


def survey(title, facts):
    """Print what the images of a set are -> digests of their bytes, pixels of label numbers. facts:
    of `look_at_image` or `look_at_pair`."""
    sizes, kinds, numbers, digests = Counter(), Counter(), Counter(), []
    for image in facts:
        digests.append(image.get("digest"))
        numbers.update(image.get("numbers"))
        if "size" in image:
            sizes[image["size"]] += 1
            kinds[image["kind"]] += 1
    text = f"{title}: {len(digests)} images, {sizes.total()} of them readable"
    if sizes:
        small, large = min(sizes, key=math.prod), max(sizes, key=math.prod)
        [(usual, count)] = sizes.most_common(1)
        text += f"; {shares(kinds)}; width x height from {pixels(small)} to {pixels(large)}, " \
                f"{count} of {pixels(usual)}"
    print(text)
    return digests, numbers


def compare_sets(report, sets):
    """Find the pictures whose bytes are in both sets. sets: [(files, digests)]."""
    if len(sets) < 2:
        return
    (train, known), (val, digests) = sets
    places = {digest: i for i, digest in enumerate(digests) if digest}
    for i, digest in enumerate(known):
        if digest in places:
            report.add("picture in both sets", train[i], f"as {val[places[digest]]}")


def look_at_sets(report, sets, args):
    """Look at the images of {title: files}, and compare the sets."""
    seen = []
    for title, files in sets.items():
        files = Names(files)
        digests, _ = survey(title, sweep(report, title, look_at_image, files, args))
        seen.append((files, digests))
    compare_sets(report, seen)


def check_pretrain(args, report):
    root = Path(args.data)
    for name in ("valid", "validation"):
        if (root / "train").is_dir() and (root / name).is_dir():
            report.add("left out by the run", root / name, "rename it to val")
    found = report.ask(pretrain_d2mae.list_data, root, args.out) or ()
    look_at_sets(report, dict(zip(("training", "held out"), found)), args)


def check_finetune(args, report):
    sets, classes = {}, []
    for split in ("train", "val"):
        folder = Path(args.data).resolve() / split
        found = report.ask(finetune.list_split, args.data, split, args.out)
        if found:
            sets[split], labels, names = found
            classes.append(names)
            describe_classes(report, split, dict(zip(names, labels.bincount().tolist())))
        elif folder.is_dir():    # look at its images all the same
            sets[split] = report.ask(list_images, folder, args.out) or []
    if len(classes) == 2:
        report.ask(finetune.list_split, args.data, "val", args.out, classes[0])    # are they equal?
    look_at_sets(report, sets, args)


def describe_classes(report, split, counts):
    """Print how many images each class has: all classes if they are few, else the extremes."""
    order = [f"{name} {counts[name]}" for name in sorted(counts, key=counts.get)]
    shown = order if len(order) <= 20 else [*order[:5], "...", *order[-5:]]
    print(f"{split}: {len(order)} classes: {', '.join(shown)}")
    for name, count in counts.items():
        if count < 5:
            report.add("class of fewer than 5 images", f"{split}/{name}", f"{count}")


def check_segment(args, report):
    sets = []
    for split in ("training", "validation"):
        dataset = report.ask(partial(segment.SegmentationSet, out=args.out), args.data, split,
                             args.num_classes, args.zero_is_class, None)
        if dataset:
            look = partial(look_at_pair, dataset)
            digests, numbers = survey(split, sweep(report, split, look, range(len(dataset)), args))
            sets.append((dataset.files, digests))
            check_numbers(report, dataset, split, numbers)
    compare_sets(report, sets)


def check_numbers(report, dataset, split, numbers):
    """Print the label numbers of a set {number: pixels}; find classes that do not occur, and label
    files without an image."""
    print(f"{split}: {len(numbers)} label numbers, by their share of pixels {shares(numbers)}")
    classes = set(class_numbers(dataset))
    absent = classes - numbers.keys()
    if len(classes - absent) < 2:
        report.add("labels of fewer than two classes", dataset.label_folder,
                   f"{first_ten(numbers) or 'no number'} alone")
    elif absent:
        report.add("class that never occurs", dataset.label_folder, first_ten(absent))
    known = {str(dataset.label_file(i)) for i in range(len(dataset))}
    files = report.ask(list_images, dataset.label_folder) if dataset.label_folder.is_dir() else ()
    for file in files or ():
        if file not in known:
            report.add("labels without an image", file)


# --------------------------------------------------------------------------------------------------
# Frames and boxes
# --------------------------------------------------------------------------------------------------
def look_at_frame(file, boxes, stated=None):
    """Look at a frame and its boxes (N, 4) -> Counter of its size; whether each box leaves the
    frame, and whether it lies in it as corners (N, 2); faults. stated: size that boxes refer to."""
    image, faults = look_at_image(file)
    if not image:
        return Counter(), np.zeros((0, 2)), faults
    size, stored = image["size"], image["stored"]
    if image["turned"]:
        faults.append(("frame turned by EXIF", file,
                       f"stored {pixels(stored)}, upright {pixels(size)}"))
    if stated and min(stated) > 0 and stated not in (size, stored):
        faults.append(("frame of another size than stated", file,
                       f"{pixels(size)}, stated {pixels(stated)}"))
    W, H = stored if stated == stored else size    # as in track.read_frame
    x, y, w, h = boxes.T
    outside = (x >= W) | (y >= H) | (x + w <= 0) | (y + h <= 0)
    for box in boxes[outside]:
        faults.append(("box outside its frame", file, ",".join(f"{edge:g}" for edge in box)))
    leaves = (x + w > W + 1) | (y + h > H + 1)
    corners = (x < w) & (y < h) & (w <= W + 1) & (h <= H + 1)
    return Counter([pixels(size)]), np.stack([leaves, corners], axis=1), faults


def find_corners(file, boxes):
    """The fault of boxes that leave their frame as x,y,w,h, but lie in it as corners: half of them
    and nearly all. boxes: of `look_at_frame`."""
    found = len(boxes) and boxes[:, 0].mean() > 0.5 and boxes[:, 1].mean() > 0.95
    return [("boxes are corners x1,y1,x2,y2", file)] * bool(found)


def look_at_still(read, keys):
    """Look at all objects on one image of COCO -> (Counter of sizes, boxes, hidden boxes), faults.
    """
    objects = [read(key) for key in keys]
    file, boxes = objects[0].frames[0], np.concatenate([one.boxes for one in objects])
    size, seen, faults = look_at_frame(file, boxes, objects[0].size)
    return (size, len(boxes), 0), faults + find_corners(file, seen)


def look_at_video(read, file):
    """The same for a sequence. read: of track.SETS."""
    try:
        frames, boxes, visible, _ = read(file)
    except OSError as error:
        return (Counter(), 0, 0), [("unreadable file", file, sentence(error, file))]
    folder, ending = os.path.dirname(frames[0]), os.path.splitext(frames[0])[1]
    there = [name for name in os.listdir(folder) if name.endswith(ending)] \
        if os.path.isdir(folder) else []
    missing = {frame for frame in frames if not os.path.exists(frame)}
    faults = []
    if missing or len(there) != len(boxes):
        lack = f"; there is no {min(missing)}" if missing else ""
        faults.append(("frames and boxes differ in number", file,
                       f"{len(there)} frames, {len(boxes)} boxes{lack}"))
    has_size = (boxes[:, 2:] > 0).all(axis=1)
    lines = 1 + np.flatnonzero(visible & ~has_size)
    if len(lines):
        faults.append(("box without a size in a visible frame", file,
                       f"{len(lines)} boxes, the first in line {lines[0]}"))
    present = visible & has_size
    trains = Path(file).parent.name not in track.LASOT_TEST
    if trains and track.sample_pair(np.random.default_rng(0), present, 200) is None:
        faults.append(("sequence that is never drawn", file,
                       f"{len(boxes)} frames, {present.sum()} with a visible box"))
    sizes, seen = Counter(), []
    for i, frame in enumerate(frames):
        if frame not in missing:
            size, leaves, found = look_at_frame(frame, boxes[i:i + 1][present[i:i + 1]])
            sizes.update(size)
            seen.append(leaves)
            faults += found
    faults += find_corners(file, np.concatenate(seen or [np.zeros((0, 2))]))
    return (sizes, len(boxes), int((~visible).sum())), faults


def check_track(args, report):
    for name, files in (report.ask(track.find_annotations, args.data) or {}).items():
        if not files:
            report.add("stops the run at its start", f"{name} of --data has no annotation file")
        elif args.results and name == "lasot":
            check_results(args, report, files)
        elif not args.results:
            look, items = what_to_look_at(report, name, files)
            sizes, boxes, hidden = Counter(), 0, 0
            for some, *counts in sweep(report, name, look, items, args):
                sizes.update(some)
                boxes += counts[0]
                hidden += counts[1]
            tests = sum(file.parent.name in track.LASOT_TEST for file in files)
            kind = f"sequences, {tests} of them of LaSOT's test set" if tests else \
                "images" if name == "coco" else "sequences"
            print(f"{name}: {len(items)} {kind}; {boxes} boxes, {hidden} of them in hidden frames; "
                  f"{sizes.total()} readable frames, width x height {shares(sizes, 5)}")


def what_to_look_at(report, name, files):
    """-> `look_at_still` or `look_at_video` with its first argument, and its items."""
    read = track.SETS[name][1]
    if name != "coco":
        return partial(look_at_video, read), Names(files)
    keys = report.ask(track.list_coco, files[-1]) or ()    # as the script chooses
    images = defaultdict(list)
    for key in tqdm(keys, name, leave=False):
        images[read(key).frames[0]].append(key)
    return partial(look_at_still, read), list(images.values())


def likely_format(boxes, truth):
    """Name the notation in which the first box of a result has an IoU of at least 0.5 with the box
    that a tracker is given, if it is not x,y,w,h."""
    if not len(boxes):    # the file could not be read
        return ""
    truth = box_convert(torch.tensor(truth[:1]), "xywh", "xyxy")
    for name, code in (("x1,y1,x2,y2", "xyxy"), ("x,y of the centre,w,h", "cxcywh")):
        if box_iou(box_convert(torch.tensor(boxes[:1]), code, "xyxy"), truth) >= 0.5:
            return f"; it is as {name}"
    return ""


def check_results(args, report, files):
    """Compare the text files of --results with the boxes of LaSOT's test sequences."""
    tests = [file for file in files if file.parent.name in track.LASOT_TEST]
    print(f"{args.results}: of {len(track.LASOT_TEST)} test sequences {len(tests)} are in --data")
    for file in tests:
        path = Path(args.results, f"{file.parent.name}.txt")
        if not path.exists():
            report.add("result that does not fit", path, "is missing: the score will be PARTIAL")
            continue
        truth = boxes = ()
        try:
            truth, boxes = track.read_lasot(file).boxes, track.read_numbers(path)
            if len(boxes) != len(truth):
                report.add("result that does not fit", path,
                           f"{len(boxes)} lines, {len(truth)} frames")
            track.check_format(path, boxes[0], truth[0])
        except OSError as error:
            report.add("result that does not fit", path,
                       sentence(error, path) + likely_format(boxes, truth))


# --------------------------------------------------------------------------------------------------
# Checkpoints
# --------------------------------------------------------------------------------------------------
def check_checkpoint(args, report):
    file = report.ask(read_encoder, args.file)
    if not file:
        return
    arch, state = file.arch, file.state
    bias = any(key.endswith("bias_table") for key in state)
    scale = any(key.endswith(".gamma") for key in state)
    names = [name for name, sizes in MODELS.items() if ("stages" in sizes) == ("stages" in arch)
             and all(arch.get(k, v) == v for k, v in sizes.items() if k != "patch_size")]
    heads = " or ".join(f"{name} of {MODELS[name].get('num_heads', 1)}" for name in names)
    dropped = dropped_parts(file)
    kind = "no classifier"
    if "pyramid" in dropped or "tracker" in arch:
        kind = "a model of segment.py" if "pyramid" in dropped else "a model of track.py"
    elif file.supervised:
        kind = "a classifier over the " + ("mean patch token, which finetune.py --eval scores"
                                           if file.pooled else "class token, which is not read")

    print(f"{args.file}: {kind}; "
          + ", ".join(f"{key} {value}" for key, value in arch.items()
                      if key not in ("tracker", "mean", "std")))
    print(f"encoder: {len(state)} tensors, {sum(map(torch.numel, state.values())) / 1e6:.3g} "
          f"million numbers, {'with' if bias else 'no'} relative position bias, "
          f"{'with' if scale else 'no'} LayerScale")
    print("dropped: " + (", ".join(f"{n} of {part}" for part, n in dropped.items()) or "nothing"))
    print(f"attention heads: {arch.get('num_heads', 'not stored')}; --model {heads or 'unknown'}")
    print(f"pixel statistics: mean {arch['mean']}, std {arch['std']}" if arch.get("mean") else
          "pixel statistics: not stored; a run takes ImageNet's, or --mean and --std")
    if len(names) > 1:
        report.add("unknown number of attention heads", args.file, heads)
    for key, tensor in file.others.items():
        if not tensor.isfinite().all():
            report.add("tensor with NaN or infinity", key)
    try:
        load_encoder(build_model(None, file), file)
    except InputError as error:
        report.add("stops the run at its start", error)


def dropped_parts(file):
    """Parts of a checkpoint that are not of its encoder -> Counter of their tensors."""
    content = file.content
    for key in ("state_dict", "model_state", "model"):
        content = content[key] if isinstance(content.get(key), dict) else content
    parts = Counter(str(key).split(".")[0] for key, value in content.items()
                    if torch.is_tensor(value))
    read = {id(tensor) for tensors in (file.state, file.others) for tensor in tensors.values()}
    for key, value in content.items():
        if id(value) in read:
            parts.pop(str(key).split(".")[0], None)    # holds the encoder, perhaps with others
    return parts + Counter(key.split(".")[0] for key in file.others)


# --------------------------------------------------------------------------------------------------
# Arguments
# --------------------------------------------------------------------------------------------------
CHECKS = {    # command -> its function, the script whose data it is, default of --data
    "pretrain": (check_pretrain, pretrain_d2mae, "data/imagenet"),
    "finetune": (check_finetune, finetune, "data/imagenet"),
    "segment": (check_segment, segment, "data/ADEChallengeData2016"),
    "track": (check_track, track, track.parse_args([]).data),
}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (_, script, data) in CHECKS.items():
        add = commands.add_parser(name, help=f"data of {script.__name__}.py").add_argument
        add("--data", default=data, help="as in the script (default: %(default)s)")
        add("--out", default=script.parse_args([]).out,
            help="folder of the run: nothing below it is data (default: %(default)s)")
        if name == "segment":
            add("--num-classes", type=int, default=150, help="as in the script (default: 150)")
            add("--zero-is-class", action="store_true", help="as in the script")
        if name == "track":
            add("--results", metavar="DIR", help="look at the text files of other trackers in DIR "
                                                 "and at those of the truth, but at no frames")
        add("--list", metavar="FILE", help="write the names of unreadable files, one a line")
        add("--workers", type=int, default=os.cpu_count(), help="processes (default: one a core)")
    command = commands.add_parser("checkpoint", help="encoder, or what a script saved")
    command.add_argument("file", metavar="FILE")
    return parser.parse_args(argv)


def main(args):
    """-> whether there is a fault."""
    report = Report()
    if args.command == "checkpoint":
        check_checkpoint(args, report)
    else:
        CHECKS[args.command][0](args, report)
    report.print()
    if getattr(args, "list", None):
        names = [file for file, _ in report.faults.get("unreadable file", ())]
        Path(args.list).write_text("".join(f"{name}\n" for name in names))
    return bool(report.faults)


if __name__ == "__main__":
    with plain_errors():
        sys.exit(main(parse_args()))
