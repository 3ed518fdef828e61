r"""The paper in miniature: its questions asked of a small ViT on a folder of pictures, on a laptop.

    python tests/miniature.py --data FOLDER                 # FOLDER/CLASS/*.png; two hours, 2 cores
    python tests/miniature.py --data FOLDER --minutes 60    # everything shorter, in proportion
    npm pack emoji-datasource-google && tar xzf emoji-datasource-google-*.tgz
    python tests/miniature.py --data package                # emoji, classes by emoji.json

The networks are a quarter as wide as the paper's, pictures have 48x48 pixels in patches of 8: the
teacher is a ViT-Tiny of 3 heads (192 wide; paper: ViT-Base, 768), the student `vit_pico` (48 wide;
paper: ViT-Tiny, 192). This file only runs the project's commands, one after the other, and collects
what they measure: table.md and figures in --out. A study that was stopped goes on with the same
command. What is asked:

- Does pre-training pay (Table 2)? MAE, D-MAE, D2-MAE, and MAE for as long as D2-MAE takes by the
  clock, from two seeds each; then fine-tuning with 2, 5, 10 and all labels of a class, three seeds
  for each encoder, six from scratch. The rate, one for scratch and one for all encoders, is the
  best of four on a third of the labelled pictures, which that run does not train on.
- Which layers does it teach? Probes of every block, Fig. 3 (CKA), Fig. 4 (blocks kept), Fig. 5
  (attention distance and entropy).
- Where should the decoder read? Taps 4 to 12, one seed.

A third of the pictures of each labelled class is kept out of pre-training and of fine-tuning. What
emoji.json lists as one emoji, or names that differ in skin tone alone, counts as one picture, and a
picture that equals a test picture or its mirror image, but for details that a thumbnail does not
show, is not trained on. (Emoji of a man and of a woman are two pictures.)
"""
import argparse
import contextlib
import csv
import json
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("TQDM_MININTERVAL", "10")    # before its import: bars go to a file here

from tqdm import tqdm                                                                 # noqa: E402

import analyze                                                                        # noqa: E402
import finetune                                                                       # noqa: E402
import pretrain_d2mae                                                                 # noqa: E402
from models import (READ_ERRORS, InputError, list_images, mean_and_error,  # noqa: E402
                    number, open_image, plain_errors, read_log)

FULL_MINUTES = 120    # what the numbers below take at most on 2 cores
SEEN = 96_000         # pictures in one pre-training; the teacher sees a quarter more
STEPS = {"2": 120, "5": 160, "10": 240, "all": 240}    # of fine-tuning, by labels of a class
SEEDS = (0, 1)        # of pre-training
RUNS = 3              # fine-tunings of each encoder, with seeds of their own
TAPS = (4, 6, 8, 10, 12)
KEPT = (0, 4, 8, 12)
RATE = 3e-3                         # of pre-training, batches of 128
TEACHER_RATE = 1.5e-3               # twice of it makes attention logits too large to be imitated
RATES = (2e-3, 4e-3, 8e-3, 16e-3)    # of fine-tuning, batches of 32
RECIPE = "rand_augment=0 mixup=0 smoothing=0.1 min_crop=0.4".split()
METHODS = {"MAE": "mae", "D-MAE": "d-mae", "D2-MAE": "d2-mae"}
LONGER = "MAE, as long as D2-MAE"
STARTS = ("scratch", *METHODS, LONGER)

MIN_PICTURES = 256       # for pre-training
MAX_PICTURES = 20_000
MAX_CLASSES = 32         # the largest ones are labelled
MIN_OF_CLASS = 20        # different pictures of a labelled class
MAX_OF_CLASS = 100
MIN_LEFT = {"val": 6, "train": 2}    # of them that can be read: probes draw 5 of the test pictures
COPY = 1.0               # mean square difference of two thumbnails, in levels of 255

SIZES = "--image-size 48 --patch-size 8".split()


# --------------------------------------------------------------------------------------------------
# Pictures
# --------------------------------------------------------------------------------------------------
TONES = re.compile(r"[-_.: ]+(1f3f[b-f]|fe0f|default|(skin[-_ ])?tone[-_ ]?[1-6]|"
                   r"((medium[-_ ])?(light|dark)|medium)([-_ ]skin[-_ ]tone)?)(?=[-_.: ]|$)")


def identity(file):
    """What variants of one picture have in common: the name without skin tones."""
    return TONES.sub("", Path(file).stem.lower())


def list_pictures(folder):
    """FOLDER/CLASS/... -> {class: [[file, its variants ...], ...]}, the plainest name first."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"--data {folder} is not a folder: give one that holds CLASS/*.png")
    if (folder / "emoji.json").is_file():
        return list_emoji(folder)
    groups = defaultdict(lambda: defaultdict(list))
    for file in map(Path, list_images(folder)):
        parts = file.relative_to(folder).parts
        if len(parts) > 1 and not any(part.startswith(".") for part in parts):
            groups[parts[0]][file.parent, identity(file)].append(file)
    if groups.keys() <= {"train", "val", "valid", "validation", "test"} and groups:
        raise InputError(f"--data {folder} holds parts of a set, not classes: give one of them, "
                         f"{folder / min(groups)} or another")
    return {name: [sorted(files, key=lambda file: (len(file.name), file))
                   for _, files in sorted(found.items())] for name, found in groups.items()}


def list_emoji(package):
    """The same for an npm package emoji-datasource-VENDOR: classes are sub-categories."""
    pictures = list(package.glob("img/*/64"))
    if len(pictures) != 1:
        raise InputError(f"--data {package} has an emoji.json and {len(pictures)} folders "
                         "img/VENDOR/64: unpack a package of one vendor")
    classes = defaultdict(list)
    for emoji in json.loads((package / "emoji.json").read_text(encoding="utf-8")):
        variants = (emoji, *emoji.get("skin_variations", {}).values())
        files = [pictures[0] / variant["image"] for variant in variants]
        files = [file for file in files if file.exists()]
        if files:
            name = f"{emoji['category']}, {emoji.get('subcategory')}".replace("/", "-")
            classes[name].append(files)
    return classes


def on_white(file):
    """Any picture file -> 64x64 RGB, the whole picture on white."""
    image = Image.open(file)
    if "A" not in image.mode and "transparency" not in image.info:
        image = open_image(file)
        image.draft("RGB", (128, 128))    # a JPEG is decoded at reduced size
    image = ImageOps.contain(image.convert("RGBA"), (64, 64), Image.Resampling.BICUBIC)
    paper = Image.new("RGBA", (64, 64), "white")
    paper.alpha_composite(image, ((64 - image.width) // 2, (64 - image.height) // 2))
    return paper.convert("RGB")


def choose(data, limit):
    """Divide the pictures -> [(file, class)] of test, labelled, and all training pictures, the last
    at most `limit`. InputError if there are too few."""
    rng = random.Random(0)
    classes = dict(sorted(list_pictures(data).items()))
    for groups in classes.values():
        rng.shuffle(groups)
    large = [name for name in classes if len(classes[name]) >= MIN_OF_CLASS]
    large = sorted(large, key=lambda name: -len(classes[name]))[:MAX_CLASSES]
    if len(large) < 2:
        raise InputError(f"--data {data} has {len(large)} classes of {MIN_OF_CLASS} different "
                         "pictures or more (CLASS/*.png), and two are needed")
    test = []
    labelled = []
    training = []
    for name, groups in classes.items():
        chosen = groups[:MAX_OF_CLASS] if name in large else []
        held_out = len(chosen) // 3
        test += [(group[0], name) for group in chosen[:held_out]]
        labelled += [(group[0], name) for group in chosen[held_out:]]
        training += [(file, name) for group in groups[held_out:] for file in group]
    rng.shuffle(training)
    if len(training) < MIN_PICTURES:
        raise InputError(f"--data {data} leaves {len(training)} pictures for pre-training, and "
                         f"{MIN_PICTURES} are needed")
    return test, labelled, training[:limit]


def write_pictures(items, folder, known=()):
    """Write [(file, class)] as small PNG into FOLDER/CLASS -> their thumbnails (n, 16, 16, 3), and
    the files left out: those that cannot be read, or whose thumbnail is among `known`."""
    thumbnails = []
    left_out = []
    for k, (file, name) in enumerate(tqdm(items, desc=f"{folder.parent.name}/{folder.name}")):
        try:
            image = on_white(file)
        except READ_ERRORS:
            left_out.append(file)
            continue
        thumbnail = np.asarray(image.resize((16, 16), Image.Resampling.BOX), np.float32)
        if len(known) and np.square(known - thumbnail).mean(axis=(1, 2, 3)).min() < COPY:
            left_out.append(file)
            continue
        thumbnails.append(thumbnail)
        path = folder / name / f"{k:05}-{file.stem[:60]}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    return np.array(thumbnails), left_out


def prepare(data, out, limit=MAX_PICTURES):
    """Write the pictures as small PNG -> {folder: how many}. labelled/{train,val}/CLASS are for
    fine-tuning, pictures/{train,val}/CLASS for pre-training; both val are the test pictures.
    InputError if too few of them can be used."""
    done = out / "prepared.json"
    if done.exists():
        return json.loads(done.read_text())
    test, labelled, training = choose(data, limit)
    for part in ("labelled", "pictures", "tuning"):    # what an interrupted run left
        shutil.rmtree(out / part, ignore_errors=True)

    thumbnails, left_out = write_pictures(test, out / "labelled/val")
    known = np.concatenate([thumbnails, thumbnails[:, :, ::-1]]) if len(thumbnails) else ()
    left_out += write_pictures(labelled, out / "labelled/train", known)[1]
    left_out += write_pictures(training, out / "pictures/train", known)[1]
    if left_out:
        print("left out, unreadable or as good as a test picture: "
              f"{len(set(left_out))} files, {left_out[0]} is one")
    for name in {name for _, name in labelled}:
        folders = {part: out / "labelled" / part / name for part in MIN_LEFT}
        if any(len(list(folders[part].glob("*"))) < MIN_LEFT[part] for part in MIN_LEFT):
            print(f"too few pictures are left of the class {name}")
            for folder in folders.values():
                shutil.rmtree(folder, ignore_errors=True)

    count = {part: len(list(out.glob(f"{part}/*/*.png")))
             for part in ("pictures/train", "labelled/train", "labelled/val")}
    count["classes"] = len(list(out.glob("labelled/train/*")))
    if count["classes"] < 2 or count["pictures/train"] < MIN_PICTURES:
        raise InputError(f"--data {data}: {count['pictures/train']} pictures for pre-training and "
                         f"{count['classes']} classes are left; {MIN_PICTURES} and 2 are needed")
    shutil.copytree(out / "labelled/val", out / "pictures/val")
    done.with_suffix(".tmp").write_text(json.dumps(count))
    done.with_suffix(".tmp").replace(done)
    return count


def prepare_tuning(out):
    """tuning/{train,val}: the labelled training pictures again, a third of them to choose rates on
    -> number for training."""
    folder = out / "tuning"
    if not folder.exists():
        scratch = out / "tuning.tmp"
        shutil.rmtree(scratch, ignore_errors=True)
        for kind in sorted((out / "labelled/train").iterdir()):
            for k, file in enumerate(sorted(kind.iterdir())):
                part = scratch / ("val" if k % 3 == 0 else "train") / kind.name
                part.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, part)
        scratch.rename(folder)
    return len(list(folder.glob("train/*/*.png")))


# --------------------------------------------------------------------------------------------------
# Commands
# --------------------------------------------------------------------------------------------------
class Study:
    """Runs commands of the project that have not been run yet, and keeps what they measured in
    results.json: {command: values}. What they print goes to commands.log."""

    def __init__(self, out, share, count, commit):
        self.out = out
        self.share = share
        self.count = count    # {folder: pictures}
        self.commit = commit
        self.path = out / "results.json"
        self.results = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.diverged = []    # fine-tunings whose loss was not finite

    def run(self, script, words, measure, **defaults):
        """`script` with the options `words` -> what `measure()` reads of its files afterwards.
        `defaults` stand in for settings without an option."""
        words = [str(word) for word in words]
        command = f"python {script.__name__}.py {shlex.join(words)}"
        key = command.replace(str(self.out), "OUT")    # --out may be moved
        if key not in self.results:
            print(time.strftime("%H:%M:%S"), command, flush=True)
            started = time.perf_counter()
            with open(self.out / "commands.log", "a") as log:
                with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
                    script.main(script.parse_args(words, **defaults))
            seconds = time.perf_counter() - started
            self.results[key] = dict(measure(), seconds=seconds, commit=self.commit)
            self.path.with_suffix(".tmp").write_text(json.dumps(self.results, indent=1))
            self.path.with_suffix(".tmp").replace(self.path)
        return self.results[key]

    def pretrain(self, name, method, seed, *words, model="vit_pico", rate=RATE, longer=1.0):
        """-> held-out losses, pictures a second. The encoder is NAME/encoder.pt in --out."""
        pictures = self.count["pictures/train"]
        batch = min(128, pictures)
        per_epoch = pictures // batch * batch
        epochs = max(1, round(longer * self.share * SEEN / per_epoch))
        folder = self.out / name
        if method != "mae":
            words = ["--teacher", self.out / "teacher/encoder.pt", *words]
        command = ["--data", self.out / "pictures/train", *SIZES, "--crop-scale", 0.4, 1,
                   "--model", model, "--method", method, "--epochs", epochs, "--batch-size", 128,
                   "--base-lr", 2 * rate, "--workers", 1, "--seed", seed, "--out", folder, *words]

        def measure():
            log = read_log(folder / "log.jsonl")
            last = [line for line in log if "val_rec" in line][-1]
            speeds = [line["img_s"] for line in log if "img_s" in line]
            seen = epochs * per_epoch
            return dict(last, img_s=float(np.median(speeds)), epochs=epochs, seen=seen)

        return self.run(pretrain_d2mae, command, measure, eval_every=max(10, epochs // 5))

    def pictures(self, shots, data="labelled"):
        """Number of labelled pictures, "all" or so many a class."""
        every = self.count[f"{data}/train"]
        return every if shots == "all" else min(every, int(shots) * self.count["classes"])

    def finetune(self, start, seed, shots, rate, keep=None, data="labelled"):
        """Encoder in the folder `start`, or "scratch" -> top-1 in % after the last epoch."""
        folder = self.out / "finetune" / f"{data}-{start}-{shots}-{seed}-{rate:g}-{keep}"
        pictures = self.pictures(shots, data)
        batch = min(32, pictures)
        epochs = max(1, round(self.share * STEPS[shots] / (pictures // batch)))
        words = ["--data", self.out / data, *SIZES[:2], "--model", "vit_pico", "--epochs", epochs,
                 "--batch-size", 32, "--base-lr", f"{rate * 256 / batch:g}", "--seed", seed,
                 "--workers", 0, "--out", folder, "--recipe", *RECIPE]
        if start != "scratch":
            words += ["--init", self.out / start / "encoder.pt"]
        if shots != "all":
            words += ["--shots", shots]
        if keep is not None:
            words += ["--keep-blocks", keep]

        def measure():
            log = read_log(folder / "log.jsonl")
            shutil.rmtree(folder)    # there are two hundred of them
            return dict(top1=[line["top1"] for line in log if "top1" in line][-1])

        try:
            return self.run(finetune, words, measure, patch_size=8, eval_every=epochs)["top1"]
        except FloatingPointError:
            self.diverged.append(folder.name)
            return 0.0

    def analyze(self, name, models, *words):
        """Command of analyze.py on folders {label: folder}, "random" untrained -> rows of
        NAME.csv."""
        sources = [label if label == "random" else
                   f"{label}={'deit_tiny' if label == 'teacher' else 'vit_pico'}:"
                   f"{self.out / folder / 'encoder.pt'}" for label, folder in models.items()]
        self.run(analyze, [name, *sources, *words, "--data", self.out / "labelled/val", "--images",
                           self.count["labelled/val"], "--out", self.out], dict)
        with open(self.out / f"{name}.csv", newline="") as file:
            return list(csv.DictReader(file))


# --------------------------------------------------------------------------------------------------
# The study
# --------------------------------------------------------------------------------------------------
def pretraining(study):
    """All encoders -> {start: [values of each seed]}, with "teacher"."""
    found = defaultdict(list)
    found["teacher"].append(study.pretrain("teacher", "mae", 0, model="deit_tiny",
                                           rate=TEACHER_RATE, longer=1.25))
    for seed in SEEDS:
        for label, method in METHODS.items():
            found[label].append(study.pretrain(f"{method}-{seed}", method, seed))
        slower = max(1.0, found["MAE"][0]["img_s"] / found["D2-MAE"][0]["img_s"])
        found[LONGER].append(study.pretrain(f"longer-{seed}", "mae", seed, longer=slower))
    return found


def encoders(start):
    """Folders of the encoders of a start; from scratch, each stands for one that is not there."""
    name = {**METHODS, LONGER: "longer", "scratch": "scratch"}[start]
    return [name if start == "scratch" else f"{name}-{seed}" for seed in SEEDS]


def best_rates(study):
    """Rate of fine-tuning from scratch, that from all encoders (best mean of MAE and D2-MAE), and
    {(start, rate): top-1} of the search: 10 labels a class, tuning pictures, a seed of its own."""
    top1 = {}
    for start in ("scratch", "mae-0", "d2-mae-0"):
        for rate in RATES:
            top1[start, rate] = study.finetune(start, 99, "10", rate, data="tuning")
    return (max(RATES, key=lambda rate: top1["scratch", rate]),
            max(RATES, key=lambda rate: top1["mae-0", rate] + top1["d2-mae-0", rate]), top1)


def finetuning(study, scratch_rate, rate):
    """{(start, shots): [top-1 of each run]}, runs in the same order of seeds for all starts."""
    top1 = defaultdict(list)
    for shots in STEPS:
        for start in STARTS:
            for k, folder in enumerate(encoders(start)):
                for seed in range(RUNS * k, RUNS * (k + 1)):
                    top1[start, shots].append(study.finetune(
                        folder, seed, shots, scratch_rate if start == "scratch" else rate))
    return top1


def kept_blocks(study, rate):
    """Fig. 4: {start: {blocks kept: [top-1 of each run]}} with 10 labels a class, first seed."""
    found = {}
    for start in METHODS:
        folder = encoders(start)[0]
        found[start] = {keep: [study.finetune(folder, seed, "10", rate, keep if keep < 12 else None)
                               for seed in range(RUNS)] for keep in KEPT}
    return found


def decoder_taps(study, rate):
    """{tap: (held-out losses, [top-1 of each run])} of D2-MAE with 10 labels a class, one seed."""
    found = {}
    for tap in TAPS:
        folder = "d2-mae-0" if tap == 8 else f"tap{tap}"
        losses = study.pretrain(folder, "d2-mae", 0, *(["--decoder-tap", tap] if tap != 8 else []))
        found[tap] = losses, [study.finetune(folder, seed, "10", rate) for seed in range(RUNS)]
    return found


def probes(study):
    """{(classifier, start): [accuracy of each layer, a row for each seed]}, 5 labels a class."""
    models = {f"{start} {k}": folder for start in STARTS[1:]
              for k, folder in enumerate(encoders(start))}
    models |= {f"tap{tap}": f"tap{tap}" for tap in TAPS if tap != 8}
    models |= {"teacher": "teacher", "random": None}    # random: a copy of the first, a student
    curves = defaultdict(dict)
    for row in study.analyze("probe", models, "--shots", 5):
        if row["label"] != "chance":
            kind = row["quantity"].split()[0]
            curves[kind, row["label"]][int(float(row["layer"]))] = float(row["value"])
    found = defaultdict(list)
    for (kind, label), layers in curves.items():
        found[kind, re.sub(r" \d$", "", label)].append([layers[k] for k in sorted(layers)])
    return found


# --------------------------------------------------------------------------------------------------
# Tables and figures
# --------------------------------------------------------------------------------------------------
def shown(values, digits=1):
    """Mean and standard error over runs."""
    mean, error = mean_and_error(values)
    return f"{mean:.{digits}f} ± {error:.{digits}f}" if len(values) > 1 else f"{mean:.{digits}f}"


def difference(first, second):
    """Paired difference of two lists -> "+1.2 (0.3, 6 runs; by encoder +1.0, +1.4)"."""
    gains = np.subtract(first, second)
    mean, error = mean_and_error(gains)
    if len(gains) == 1:
        return f"{mean:+.1f} (1 run)"
    by_encoder = ""
    if len(gains) == RUNS * len(SEEDS) > len(SEEDS) > 1:
        means = gains.reshape(len(SEEDS), -1).mean(axis=1)
        by_encoder = "; by encoder " + ", ".join(f"{value:+.1f}" for value in means)
    return f"{mean:+.1f} ({error:.1f}, {len(gains)} runs{by_encoder})"


def markdown(head, rows):
    """Lines of a table."""
    return ["", *(f"| {' | '.join(map(str, row))} |" for row in [head, ["---"] * len(head), *rows])]


def starts_table(losses, top1):
    """What each start costs, and what it gives with few labels and many."""
    rows = []
    for start in ("teacher", *STARTS):
        values = losses.get(start)
        cost = ["-", "-"]
        if values:
            cost = [f"{np.mean([v['seen'] / v['img_s'] for v in values]):.0f}",
                    shown([v["val_rec"] for v in values], 3)]
        scores = ["" if start == "teacher" else shown(top1[start, shots]) for shots in STEPS]
        rows.append([start, *cost, *scores])
    return markdown(["start", "training, s", "held-out L_rec",
                     *(f"top-1, {shots} a class" for shots in STEPS)], rows)


def differences(top1):
    """Each start against scratch, and D2-MAE against the others, for each number of labels."""
    lines = ["", "Differences of top-1, paired by seed: mean (standard error over runs, which "
             "share a teacher, a test set and, three by three, an encoder)", ""]
    pairs = [(start, "scratch") for start in STARTS[1:]]
    pairs += [("D2-MAE", "MAE"), ("D2-MAE", "D-MAE"), ("D2-MAE", LONGER)]
    for a, b in pairs:
        parts = (f"{shots} a class {difference(top1[a, shots], top1[b, shots])}" for shots in STEPS)
        lines.append(f"- {a} − {b}: {'; '.join(parts)}")
    return lines


def blocks_table(probe):
    """Does accuracy fall behind block 8, where the decoder of D2-MAE reads?"""
    rows = []
    for start in ("random", "teacher", *STARTS[1:]):
        row = [start]
        for kind in ("5-NN", "ridge"):
            curves = np.array(probe[kind, start])                           # (seeds, layers)
            row += [shown(curves[:, 8]), shown(curves[:, 12]),
                    difference(curves[:, 12], curves[:, 8])]
        rows.append(row)
    lines = markdown(["frozen features", *(f"{kind}, {what}" for kind in ("5-NN", "ridge")
                                           for what in ("block 8", "block 12", "12 − 8"))], rows)
    return lines + ["", "(mean over classes, 5 labels each, of test pictures; runs are "
                    "pre-training seeds; the final norm, through which all blocks are seen, was "
                    "trained where the decoder reads)"]


def kept_table(blocks, scratch):
    """Fig. 4 as a table, with training from scratch beside it."""
    rows = [[start, *(shown(row[keep]) for keep in KEPT)] for start, row in blocks.items()]
    rows.append(["scratch", shown(scratch), *[""] * (len(KEPT) - 1)])
    lines = markdown(["blocks kept, top-1, 10 a class", *KEPT], rows)
    return lines + ["", f"({RUNS} runs of the first encoder, {len(scratch)} of scratch; random "
                    "blocks have the encoder's rate and layer decay, too)"]


def taps_table(taps, probe):
    """What the block that D2-MAE's decoder reads does to losses, probes and fine-tuning."""
    rows = []
    for tap, (values, top1) in taps.items():
        name = f"tap{tap}" if tap != 8 else "D2-MAE"
        rows.append([tap, f"{values['val_rec']:.3f}", f"{values['val_attn']:.3g}",
                     f"{probe['5-NN', name][0][-1]:.1f}", f"{probe['ridge', name][0][-1]:.1f}",
                     shown(top1)])
    return markdown(["decoder reads block", "held-out L_rec", "held-out L_attn", "5-NN, block 12",
                     "ridge, block 12", f"top-1, 10 a class, {RUNS} runs"], rows)


def draw(study, top1, blocks, taps, probe):
    """labels.png, fig4.png, taps.png, probe_blocks.png; those of analyze.py lie beside them."""
    args = argparse.Namespace(out=study.out)
    places = {shots: study.pictures(shots) / study.count["classes"] for shots in STEPS}
    lines = {("top-1 (%)", start): [(places[shots], *mean_and_error(top1[start, shots]))
                                    for shots in STEPS] for start in STARTS}
    analyze.draw_lines(args, "labels", lines, "labelled pictures a class",
                       f"mean and standard error of {RUNS * len(SEEDS)} runs")

    lines = {("top-1 (%), 10 labels a class", start): [(keep, *mean_and_error(values))
                                                       for keep, values in row.items()]
             for start, row in blocks.items()}
    analyze.draw_lines(args, "fig4", lines, "pre-trained blocks kept",
                       f"mean and standard error of {RUNS} runs")

    lines = {}
    for (kind, start), curves in probe.items():
        if not start.startswith("tap"):
            lines[f"{kind} accuracy (%), 5 per class", start] = [
                (layer, *mean_and_error(values)) for layer, values in enumerate(zip(*curves))]
    analyze.draw_lines(args, "probe_blocks", lines, "layer", "frozen features of test pictures; "
                       f"mean and standard error over {len(SEEDS)} pre-training seeds")

    lines = {("top-1 (%), 10 labels a class", "D2-MAE"): [(tap, *mean_and_error(values))
                                                          for tap, (_, values) in taps.items()]}
    for key, name in (("val_rec", "held-out L_rec"), ("val_attn", "held-out L_attn")):
        lines[name, "D2-MAE"] = [(tap, losses[key], 0.0) for tap, (losses, _) in taps.items()]
    analyze.draw_lines(args, "taps", lines, "block that the decoder reads", "one seed")


# --------------------------------------------------------------------------------------------------
# Main
# --------------------------------------------------------------------------------------------------
def open_study(args):
    """Pictures and settings of the study in --out -> Study, what it is in a sentence. InputError
    if another study lies there."""
    if ":" in str(args.out):
        raise InputError(f"--out {args.out}: analyze.py reads MODEL:FILE, so no colon, please")
    args.out.mkdir(parents=True, exist_ok=True)
    settings = args.out / "settings.json"
    now = dict(data=str(Path(args.data).resolve()), minutes=args.minutes)
    if settings.exists() and json.loads(settings.read_text()) != now:
        raise InputError(f"--out {args.out} holds a study of {settings.read_text()}: give its "
                         "--data and --minutes again, or another --out")
    share = args.minutes / FULL_MINUTES
    count = prepare(args.data, args.out, max(1000, round(min(1, share) * MAX_PICTURES)))
    settings.write_text(json.dumps(now))
    count["tuning/train"] = prepare_tuning(args.out)
    commit = subprocess.run("git describe --always --dirty --exclude '*'", shell=True, cwd=ROOT,
                            capture_output=True, text=True).stdout.strip()
    words = (f"{count['pictures/train']} pictures for pre-training, {count['classes']} classes, "
             f"{count['labelled/train']} labelled and {count['labelled/val']} test pictures")
    if share != 1:
        words += f"; all training is {share:.2f} times as long as in the whole study"
    return Study(args.out, share, count, commit), words


def main(args):
    """The whole study, or what is left of it."""
    study, words = open_study(args)
    print(f"{words}\nwhat the commands print: {args.out}/commands.log", flush=True)
    losses = pretraining(study)
    scratch_rate, rate, search = best_rates(study)
    top1 = finetuning(study, scratch_rate, rate)
    blocks = kept_blocks(study, rate)
    taps = decoder_taps(study, rate)
    probe = probes(study)
    models = {start: encoders(start)[0] for start in METHODS}
    study.analyze("cka", {"teacher": "teacher", **models}, "--batch-size",
                  min(128, study.count["labelled/val"]))
    study.analyze("attention", {**models, "teacher": "teacher", "random": None})

    values = study.results.values()
    commits = ", ".join(dict.fromkeys(v["commit"] for v in values))
    tried = ", ".join(f"{name} {r:g}: {score:.1f}" for (name, r), score in search.items())
    lines = [f"# The paper in miniature: {args.data}", "", f"{words}. Commit {commits}; the "
             f"commands took {sum(v['seconds'] for v in values):.0f} s.",
             f"Rate of fine-tuning from scratch {scratch_rate:g}, from encoders {rate:g} (top-1 of "
             f"the search: {tried}).", *starts_table(losses, top1), *differences(top1),
             *blocks_table(probe), *kept_table(blocks, top1["scratch", "10"]),
             *taps_table(taps, probe)]
    if study.diverged:
        lines += ["", f"The loss was not finite, and 0 % right is counted: {study.diverged}"]
    text = "\n".join(lines) + "\n"
    (args.out / "table.md").write_text(text, encoding="utf-8")
    print(text)
    draw(study, top1, blocks, taps, probe)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", required=True, help="folder of CLASS/*.png, or an unpacked npm "
                                                      "package emoji-datasource-VENDOR")
    parser.add_argument("--out", type=Path, default=Path("out/miniature"),
                        help="tables and figures; the same command goes on there (default: "
                             "%(default)s)")
    parser.add_argument("--minutes", type=number(float, "(0, inf)"), default=FULL_MINUTES,
                        help="shorten all training in proportion; below 20 the start of each "
                             "command and one epoch are most of it (default: %(default)s)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    with plain_errors():
        main(parse_args())
