r"""The paper in miniature: its questions, asked of a small ViT on a folder of pictures.

    python tests/tools/miniature.py --data FOLDER        # FOLDER/CLASS/*.png; two hours on 2 cores
    python tests/tools/miniature.py --data FOLDER --minutes 60    # shortens all training
    npm pack emoji-datasource-google && tar xzf emoji-datasource-google-*.tgz
    python tests/tools/miniature.py --data package                # emoji, classes by emoji.json
    python tests/tools/miniature.py probe random MAE=mae.pt D2-MAE=encoder.pt --data FOLDER

The networks are a quarter as wide as the paper's: the teacher is a ViT-Tiny of 3 heads (192 wide;
paper: ViT-Base, 768), the student `vit_pico` (48 wide; paper: ViT-Tiny, 192). Pictures have 48x48
pixels in patches of 8. This file runs the project's commands one after the other, in the folder
--out, and collects what they measure in table.md and in figures there. Rerun the command to resume
a study that was stopped; the pre-training in which it was stopped starts again, because its time is
measured. The study asks:

- Does pre-training pay (Table 2)? It compares MAE, D-MAE, D2-MAE, and MAE trained for as long as
  D2-MAE by the clock, from two seeds each. They are fine-tuned with 2, 5, 10 and all labels of a
  class: three seeds for each encoder, six from scratch. Scratch has one learning rate and all
  encoders have one; each is the best of four on a third of the labelled pictures, which the runs of
  this search do not train on.
- Which layers does it teach? Probes of every block, Fig. 3 (CKA), Fig. 4 (blocks kept) and Fig. 5
  (attention distance and entropy).
- Which block should the decoder read? Taps 4 to 12, one seed.

A third of the pictures of each labelled class are test pictures, kept out of pre-training and of
fine-tuning. Variants of one entry of emoji.json, or names that differ in skin tone alone, count as
one picture. A picture that equals a test picture or its mirror image, except for details that a
thumbnail does not show, is not trained on. (Emoji of a man and of a woman are two pictures.)

`probe` alone asks what the frozen features of any checkpoints know, layer by layer. Its inputs are
those of analyze.py.
"""
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
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import analyze                                                                        # noqa: E402
import toy                                                                            # noqa: E402
from analyze import draw_lines, mean_and_error                                        # noqa: E402
from models import InputError, Parser, list_images, open_image, plain_errors, read_log  # noqa: E402

FULL_MINUTES = 130      # duration of the whole study on 2 cores
SEEN = 96_000           # pictures in one pre-training; the teacher sees a quarter more
STEPS = {"2": 120, "5": 160, "10": 240, "all": 240}    # of fine-tuning, by labels of a class
SEEDS = (0, 1)          # of pre-training
RUNS = 3                # fine-tunings of each encoder, each with its own seed
TAPS = (4, 6, 8, 10, 12)
KEPT = (0, 4, 8, 12)
RATE = 3e-3             # of pre-training, batches of 128
TEACHER_RATE = 1.5e-3   # twice of it makes attention logits too large to be imitated
RATES = (2e-3, 4e-3, 8e-3, 16e-3)    # of fine-tuning, batches of 32
SIZES = "--image-size 48 --patch-size 8".split()
RECIPE = "--recipe improved rand_augment=0 mixup=0 smoothing=0.1 min_crop=0.4".split()
METHODS = {"MAE": "mae", "D-MAE": "d-mae", "D2-MAE": "d2-mae"}
LONGER = "MAE, as long as D2-MAE"
ENCODERS = {**METHODS, LONGER: "longer"}    # label: first part of the folders' names
STARTS = {"scratch": "scratch", **ENCODERS}

MIN_PICTURES = 256      # for pre-training
MAX_PICTURES = 20_000
MAX_CLASSES = 32        # only the largest classes are labelled
MIN_OF_CLASS = 20       # different pictures of a labelled class
MAX_OF_CLASS = 100
MIN_LEFT = {"val": 6, "train": 2}    # readable pictures of a class: probes draw 5 test pictures
DRAWS = 20              # random choices of a probe's training images, the same for all models
COPY = 1.0              # mean square difference of two thumbnails, in levels of 255


# --------------------------------------------------------------------------------------------------
# Pictures
# --------------------------------------------------------------------------------------------------
TONES = re.compile(r"[-_.: ]+(1f3f[b-f]|fe0f|default|(skin[-_ ])?tone[-_ ]?[1-6]|"
                   r"((medium[-_ ])?(light|dark)|medium)([-_ ]skin[-_ ]tone)?)(?=[-_.: ]|$)")


def identity(file):
    """Return the part of a file's name that all variants of the picture share: no skin tones."""
    return TONES.sub("", Path(file).stem.lower())


def list_pictures(folder, out=None):
    """FOLDER/CLASS/... -> {class: [[file, its variants ...], ...]}, the plainest name first.
    Nothing below `out` is a picture of it."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"--data {folder} is not a folder: give one that holds CLASS/*.png")
    if (folder / "emoji.json").is_file():
        return list_emoji(folder)
    groups = defaultdict(lambda: defaultdict(list))
    for file in map(Path, list_images(folder, out)):
        name, *inner = file.relative_to(folder).parts
        if inner:
            groups[name][file.parent, identity(file)].append(file)
    check_classes(folder, groups.keys())
    return {name: [sorted(files, key=lambda file: (len(file.name), file))
                   for _, files in sorted(found.items())] for name, found in groups.items()}


def check_classes(folder, names):
    """Raise InputError if the folders `names` are the parts of a data set."""
    if names and names <= {"train", "val", "valid", "validation", "test"}:
        raise InputError(f"--data {folder} holds parts of a set, not classes: give one of them, "
                         f"{Path(folder, min(names))} or another")


def list_emoji(package):
    """The same for an npm package emoji-datasource-VENDOR: classes are sub-categories."""
    folders = list(package.glob("img/*/64"))
    if len(folders) != 1:
        raise InputError(f"--data {package} has an emoji.json and {len(folders)} folders "
                         "img/VENDOR/64: unpack a package of one vendor")
    classes = defaultdict(list)
    for emoji in json.loads((package / "emoji.json").read_text(encoding="utf-8")):
        variants = (emoji, *emoji.get("skin_variations", {}).values())
        files = [folders[0] / variant["image"] for variant in variants]
        files = [file for file in files if file.exists()]
        if files:
            name = f"{emoji['category']}, {emoji.get('subcategory')}".replace("/", "-")
            classes[name].append(files)
    return classes


def on_white(file):
    """Read any picture file -> 64x64 RGB, the whole picture on white. Raises OSError."""
    image = open_image(file)
    original = Image.open(file)
    if "A" in original.mode or "transparency" in original.info:    # open_image drops it
        image = original
    image = ImageOps.contain(image.convert("RGBA"), (64, 64), Image.Resampling.BICUBIC)
    paper = Image.new("RGBA", (64, 64), "white")
    paper.alpha_composite(image, ((64 - image.width) // 2, (64 - image.height) // 2))
    return paper.convert("RGB")


def choose(data, limit, out=None):
    """Divide the pictures -> [(file, class)] of test pictures, of labelled pictures, and of all
    training pictures, at most `limit`. Raises InputError if there are too few."""
    rng = random.Random(0)
    classes = dict(sorted(list_pictures(data, out).items()))
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
    return test, labelled, training[:limit]


def write_pictures(items, folder, known=()):
    """Write [(file, class)] as small PNG files FOLDER/CLASS/*.png -> their thumbnails (n, 16, 16,
    3), and the files left out: unreadable ones, and those whose thumbnail is among `known`."""
    thumbnails = []
    left_out = []
    for k, (file, name) in enumerate(tqdm(items, desc=f"{folder.parent.name}/{folder.name}")):
        try:
            image = on_white(file)
        except OSError:
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
    return np.reshape(thumbnails, (-1, 16, 16, 3)), left_out


@toy.written_once
def prepare(root, data, limit=MAX_PICTURES):
    """Write the pictures of `data` as small PNG files:

        root/labelled/{train,val}/CLASS    for fine-tuning; val: test pictures
        root/pictures/{train,val}/CLASS    for pre-training; val: the same test pictures
        root/tuning/{train,val}/CLASS      copies of labelled/train; val: every third of them

    Raises InputError if too few can be used.
    """
    test, labelled, training = choose(data, limit, root.parent)
    thumbnails, left_out = write_pictures(test, root / "labelled/val")
    known = np.concatenate([thumbnails, thumbnails[:, :, ::-1]])    # mirror images, too
    left_out += write_pictures(labelled, root / "labelled/train", known)[1]
    left_out += write_pictures(training, root / "pictures/train", known)[1]
    if left_out:
        print("left out, unreadable or almost equal to a test picture: "
              f"{len(set(left_out))} files, {left_out[0]} is one")

    for name in sorted({name for _, name in labelled}):
        folders = {part: root / "labelled" / part / name for part in MIN_LEFT}
        if any(len(list(folders[part].glob("*"))) < MIN_LEFT[part] for part in MIN_LEFT):
            print(f"too few pictures are left of the class {name}")
            for folder in folders.values():
                shutil.rmtree(folder, ignore_errors=True)
    count = count_pictures(root)
    if count["classes"] < 2 or count["pictures/train"] < MIN_PICTURES:
        raise InputError(f"--data {data}: {count['pictures/train']} pictures for pre-training and "
                         f"{count['classes']} classes are left; {MIN_PICTURES} and 2 are needed")

    shutil.copytree(root / "labelled/val", root / "pictures/val")
    for kind in (root / "labelled/train").iterdir():
        for k, file in enumerate(sorted(kind.iterdir())):
            folder = root / "tuning" / ("train" if k % 3 else "val") / kind.name
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, folder)


def count_pictures(root):
    """Count what `prepare` has written -> {folder: pictures}, with "classes"."""
    folders = ("pictures/train", "labelled/train", "labelled/val", "tuning/train")
    count = {folder: len(list(root.glob(f"{folder}/*/*.png"))) for folder in folders}
    return {**count, "classes": len(list(root.glob("labelled/train/*")))}


# --------------------------------------------------------------------------------------------------
# Few-shot probes of every layer. Shapes: D width, t training and s test images, C classes
# --------------------------------------------------------------------------------------------------
def knn_scores(train, onehot, test, neighbours=5, temperature=0.07):
    """k nearest neighbours by cosine similarity, each voting with weight exp(similarity /
    temperature). train (t, D), onehot (t, C), test (s, D) -> (s, C)."""
    similarity = F.normalize(test, dim=1) @ F.normalize(train, dim=1).T
    nearest, ids = similarity.topk(min(neighbours, len(train)), dim=1)
    return torch.einsum("sk,skc->sc", (nearest / temperature).exp(), onehot[ids])


def ridge_scores(train, onehot, test, strength=0.01):
    """Ridge regression onto one-hot labels, in its dual form: the features outnumber the images.

    W = argmin |X W - Y|^2 + lambda |W|^2 gives X* W = X* X' (X X' + lambda I)^-1 Y; lambda =
    strength * mean |x|^2, so that it does not depend on the scale of the features. train (t, D),
    onehot (t, C), test (s, D) -> (s, C).
    """
    gram = train @ train.T
    gram.diagonal().add_((strength * gram.diagonal().mean()).clamp(min=1e-12))
    return test @ train.T @ torch.linalg.solve(gram, onehot)


def draw_shots(labels, shots, seed):
    """One random choice of `shots` training images per class, labels (n,) int -> their indices,
    and those of all other images."""
    order = np.random.default_rng(seed).permutation(len(labels))
    train = [order[labels[order] == kind][:shots] for kind in np.unique(labels)]
    return np.concatenate(train), np.setdiff1d(order, train)


def probe_accuracy(features, labels, classifier, shots, draws, seed):
    """Accuracy in % on the images that are not drawn for training -> a list over draws.

    features (n, D), centred by the mean of the training images; labels (n,) int; classifier:
    `knn_scores` or `ridge_scores`. Accuracy is averaged over classes, so that uninformative
    features score 100 / C whatever the sizes of the classes.
    """
    features = features.double()
    onehot = F.one_hot(torch.from_numpy(labels)).double()
    accuracies = []
    for draw in range(draws):
        train, test = draw_shots(labels, shots, [seed, shots, draw])
        mean = features[train].mean(dim=0)
        scores = classifier(features[train] - mean, onehot[train], features[test] - mean)
        truth = onehot[test]
        correct = scores.argmax(dim=1) == truth.argmax(dim=1)
        share = truth[correct].sum(dim=0) / truth.sum(dim=0)                # of each class
        accuracies.append(100 * float(share.mean()))
    return accuracies

def probe(args):
    """Few-shot probes: compares the accuracy of the frozen features of every layer of all inputs,
    by nearest neighbours and by ridge regression. --data holds one folder per class."""
    files = analyze.draw_files(args.data, args.images, args.seed, args.out)
    classes = [Path(file).relative_to(args.data).parts[0] for file in files]
    check_classes(args.data, set(classes))
    names, labels, sizes = np.unique(classes, return_inverse=True, return_counts=True)
    if len(names) < 2 or sizes.min() <= max(args.shots):
        raise InputError(f"--data {args.data}: probe needs one folder per class, two or more, and "
                         "in each more images than --shots; raise --images, or lower --shots")
    models = analyze.load_models(args)
    features = defaultdict(list)                                # (label, layer): [(B, D), ...]
    for batch in analyze.batches(models, files, args.batch_size):
        for label, model, images in batch:
            for layer, tokens in enumerate(analyze.representations(model, images)):
                features[label, layer].append(tokens.mean(dim=1).cpu())
    lines = defaultdict(list)
    for name, classifier in (("5-NN", knn_scores), ("ridge", ridge_scores)):
        for shots in args.shots:
            quantity = f"{name} accuracy (%), {shots} per class"
            for (label, layer), parts in features.items():
                accuracies = probe_accuracy(torch.cat(parts), labels, classifier, shots, DRAWS,
                                            args.seed)
                lines[quantity, label].append((layer, *mean_and_error(accuracies)))
    draw_lines(args.out, "probe", lines, "layer",
               f"{len(files)} images; mean and standard error over {DRAWS} choices of the shots; "
               f"chance: {100 / len(names):.3g}%")


# --------------------------------------------------------------------------------------------------
# Commands
# --------------------------------------------------------------------------------------------------
def launch(words, folder):
    """Run `python WORDS` in `folder`, whose commands.log receives the output. Returns the error
    message, None if it succeeds."""
    script, *options = words
    path = folder / "commands.log"
    with open(path, "a") as log:
        done = subprocess.run([sys.executable, ROOT / script, *options], cwd=folder, stdout=log,
                              stderr=log, env={**os.environ, "TQDM_MININTERVAL": "10"})
    if done.returncode:
        return f"{path.read_text().splitlines()[-1]} (exit status {done.returncode})"


class Study:
    """Runs each command once, in the folder `out`, and keeps what it measured in results.json:
    {command: values}. share: length of all training relative to the whole study."""

    def __init__(self, out, share):
        self.out = out
        self.share = share
        self.count = count_pictures(out / "data")
        self.path = out / "results.json"
        self.results = json.loads(self.path.read_text()) if self.path.exists() else {}

    def run(self, *words, folder=None):
        """Run a command unless results.json holds it -> its seconds and, of a training run into
        `folder`, the last line of its log and the commit. Raises InputError if it fails."""
        words = [str(word) for word in words]
        command = f"python {shlex.join(words)}"
        if command in self.results:
            return self.results[command]
        print(time.strftime("%H:%M:%S"), command, flush=True)
        started = time.perf_counter()
        error = launch(words, self.out)
        if error:
            raise InputError(f"{command}: {error}")
        values = {"seconds": time.perf_counter() - started}
        if folder:
            first, *_, last = read_log(self.out / folder / "log.jsonl")
            values.update(last, commit=first["commit"])
        self.results[command] = values
        self.path.with_suffix(".tmp").write_text(json.dumps(self.results, indent=1))
        self.path.with_suffix(".tmp").replace(self.path)
        return values

    def pretrain(self, folder, method, seed, *words, model="vit_pico", rate=RATE, longer=1.0):
        """Pre-train FOLDER/encoder.pt -> held-out losses, seconds."""
        per_epoch = max(1, self.count["pictures/train"] // 128) * 128
        epochs = max(1, round(longer * self.share * SEEN / per_epoch))
        if method != "mae":
            words = ["--teacher", "teacher/encoder.pt", *words]
        return self.run("pretrain_d2mae.py", "--data", "data/pictures", "--method", method,
                        "--model", model, *SIZES, "--crop-scale", 0.4, 1, *words, "--epochs",
                        epochs, "--batch-size", 128, "--base-lr", 2 * rate, "--eval-every", epochs,
                        "--workers", 1, "--seed", seed, "--no-resume", "--out", folder,
                        folder=folder)

    def pictures(self, shots, data="labelled"):
        """Number of labelled pictures for `shots` a class, or "all"."""
        every = self.count[f"{data}/train"]
        return every if shots == "all" else min(every, int(shots) * self.count["classes"])

    def finetune(self, start, seed, shots, rate, keep=12, data="labelled"):
        """Fine-tune the first `keep` blocks of START/encoder.pt, or from "scratch" -> top-1 in %
        after the last epoch."""
        folder = f"finetune/{data}-{shots}/{start}/{keep}-{seed}-{rate:g}"
        pictures = self.pictures(shots, data)
        batch = min(32, pictures)
        epochs = max(1, round(self.share * STEPS[shots] / (pictures // batch)))
        words = ["--data", f"data/{data}", "--model", "vit_pico", *SIZES, *RECIPE]
        if start != "scratch":
            words += ["--init", f"{start}/encoder.pt", "--keep-blocks", keep]
        if shots != "all":
            words += ["--shots", shots]
        words += ["--epochs", epochs, "--batch-size", 32, "--base-lr", f"{rate * 256 / batch:g}",
                  "--eval-every", epochs, "--workers", 0, "--seed", seed, "--out", folder]
        top1 = self.run("finetune.py", *words, folder=folder)["top1"]
        for checkpoint in (self.out / folder).glob("*.pt"):    # of two hundred runs
            checkpoint.unlink()
        return top1

    def analyze(self, name, inputs, *words):
        """Run a command of analyze.py, or `probe`, on {label: file or folder}; random: None. It
        draws NAME.png -> rows of NAME.csv."""
        inputs = [label if path is None else f"{label}={path}" for label, path in inputs.items()]
        script = "tests/tools/miniature.py" if name == "probe" else "analyze.py"
        self.run(script, name, *inputs, *words, "--out", ".")
        with open(self.out / f"{name}.csv", newline="") as file:
            return list(csv.DictReader(file))


# --------------------------------------------------------------------------------------------------
# The study
# --------------------------------------------------------------------------------------------------
def encoders(start):
    """Folders of the encoders of a start, one for each seed; "scratch" stands for none."""
    return [start if start == "scratch" else f"{STARTS[start]}-{seed}" for seed in SEEDS]


def pretraining(study):
    """Train all encoders -> {start: [values for each seed]}, with "teacher"."""
    found = defaultdict(list)
    found["teacher"] = [study.pretrain("teacher", "mae", 0, model="deit_tiny", rate=TEACHER_RATE,
                                       longer=1.25)]
    for seed in SEEDS:
        for label, method in METHODS.items():
            found[label].append(study.pretrain(f"{method}-{seed}", method, seed))
        slower = max(1.0, found["D2-MAE"][0]["seconds"] / found["MAE"][0]["seconds"])
        found[LONGER].append(study.pretrain(f"longer-{seed}", "mae", seed, longer=slower))
    return found


def best_rates(study):
    """Search the rates of fine-tuning with 10 labels a class, tuning pictures and a seed of its own
    -> rate from scratch, rate for encoders (best mean of MAE and D2-MAE), {(start, rate): top-1}.
    """
    top1 = {(start, rate): study.finetune(start, 99, "10", rate, data="tuning")
            for start in ("scratch", "mae-0", "d2-mae-0") for rate in RATES}
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
    """Fig. 4 with 10 labels a class, first encoders -> {(start, blocks kept): [top-1 of each run]}.
    """
    top1 = {(start, keep): [study.finetune(encoders(start)[0], seed, "10", rate, keep)
                            for seed in range(RUNS)] for start in METHODS for keep in KEPT}
    runs = {start: f"finetune/labelled-10/{encoders(start)[0]}" for start in METHODS}
    study.analyze("fig4", runs)
    return top1


def decoder_taps(study, rate):
    """{tap: (held-out losses, [top-1 of each run])} of D2-MAE with 10 labels a class, one seed."""
    found = {}
    for tap in TAPS:
        folder, words = ("d2-mae-0", []) if tap == 8 else (f"tap{tap}", ["--decoder-tap", tap])
        losses = study.pretrain(folder, "d2-mae", 0, *words)
        found[tap] = losses, [study.finetune(folder, seed, "10", rate) for seed in range(RUNS)]
    return found


def frozen_features(study):
    """Draw Figs. 3 and 5 of the first encoders, and probe all encoders with 5 labels a class
    -> {(classifier, start): [accuracies of all layers, a row for each seed]}."""
    pictures = study.count["labelled/val"]
    images = ["--data", "data/labelled/val", "--images", pictures]
    teacher = {"teacher": "teacher/encoder.pt"}
    first = {start: f"{encoders(start)[0]}/encoder.pt" for start in METHODS}
    study.analyze("cka", {**teacher, **first}, *images, "--batch-size", min(128, pictures))
    study.analyze("attention", {**first, **teacher, "random": None}, *images)

    models = {f"{start} {k}": f"{folder}/encoder.pt" for start in ENCODERS
              for k, folder in enumerate(encoders(start))}
    models.update({f"tap{tap}": f"tap{tap}/encoder.pt" for tap in TAPS if tap != 8})
    models.update({**teacher, "random": None})    # random: a copy of the first, a student
    found = defaultdict(list)
    for row in study.analyze("probe", models, *images, "--shots", 5):
        if row["label"] == "chance":
            continue
        curves = found[row["quantity"].split()[0], re.sub(r" \d$", "", row["label"])]
        if float(row["layer"]) == 0:    # the first of a model
            curves.append([])
        curves[-1].append(float(row["value"]))
    return found


# --------------------------------------------------------------------------------------------------
# Tables and figures
# --------------------------------------------------------------------------------------------------
def shown(values, digits=1):
    """Format the mean and, of several runs, its standard error."""
    mean, error = mean_and_error(values)
    return f"{mean:.{digits}f} ± {error:.{digits}f}" if len(values) > 1 else f"{mean:.{digits}f}"


def difference(first, second):
    """Format the paired difference of two lists: "+1.2 (0.3, 6 runs; by encoder +1.0, +1.4)"."""
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
    """What each start costs, and its accuracy for each number of labels."""
    rows = [["scratch", "-", "-", *(shown(top1["scratch", shots]) for shots in STEPS)]]
    for start, values in losses.items():
        seconds = np.mean([v["seconds"] for v in values])
        scores = [shown(top1[start, shots]) if start in ENCODERS else "" for shots in STEPS]
        rows.append([start, f"{seconds:.0f}", shown([v["val_rec"] for v in values], 3), *scores])
    return markdown(["start", "pre-training, s", "held-out L_rec",
                     *(f"top-1, {shots} a class" for shots in STEPS)], rows)


def differences(top1):
    """Each start against scratch, and D2-MAE against the others, for each number of labels."""
    lines = ["", "Differences of top-1, paired by seed: mean (standard error over runs, which "
             "share a teacher, a test set and, three by three, an encoder)", ""]
    pairs = [(start, "scratch") for start in ENCODERS]
    pairs += [("D2-MAE", other) for other in ("MAE", "D-MAE", LONGER)]
    for a, b in pairs:
        parts = (f"{shots} a class {difference(top1[a, shots], top1[b, shots])}" for shots in STEPS)
        lines.append(f"- {a} − {b}: {'; '.join(parts)}")
    return lines


def blocks_table(probe):
    """Does accuracy fall above block 8, where the decoder of D2-MAE reads?"""
    rows = []
    for start in ("random", "teacher", *ENCODERS):
        row = [start]
        for kind in ("5-NN", "ridge"):
            curves = np.array(probe[kind, start])                           # (seeds, layers)
            row += [shown(curves[:, 8]), shown(curves[:, 12]),
                    difference(curves[:, 12], curves[:, 8])]
        rows.append(row)
    lines = markdown(["frozen features", *(f"{kind}, {what}" for kind in ("5-NN", "ridge")
                                           for what in ("block 8", "block 12", "12 − 8"))], rows)
    return lines + ["", "(accuracy on test pictures, mean over classes, 5 labels each; runs are "
                    "pre-training seeds; the final norm, applied to block 12, was trained on the "
                    "block that the decoder reads)"]


def kept_table(blocks, scratch):
    """Fig. 4 as a table, with training from scratch beside it."""
    rows = [[start, *(shown(blocks[start, keep]) for keep in KEPT)] for start in METHODS]
    rows.append(["scratch", shown(scratch), *[""] * (len(KEPT) - 1)])
    lines = markdown(["blocks kept, top-1, 10 a class", *KEPT], rows)
    return lines + ["", f"({RUNS} runs of the first encoder, {len(scratch)} from scratch; random "
                    "blocks have the encoder's rate and layer decay, too)"]


def taps_table(taps, probe):
    """How the block that D2-MAE's decoder reads changes losses, probes and fine-tuning."""
    rows = []
    for tap, (values, top1) in taps.items():
        name = f"tap{tap}" if tap != 8 else "D2-MAE"
        rows.append([tap, f"{values['val_rec']:.3f}", f"{values['val_attn']:.3g}",
                     f"{probe['5-NN', name][0][-1]:.1f}", f"{probe['ridge', name][0][-1]:.1f}",
                     shown(top1)])
    return markdown(["decoder reads block", "held-out L_rec", "held-out L_attn", "5-NN, block 12",
                     "ridge, block 12", f"top-1, 10 a class, {RUNS} runs"], rows)


def draw(args, study, top1, probe):
    """Draw labels.png and probe_blocks.png. The commands have drawn cka, attention, fig4, probe."""
    places = {shots: study.pictures(shots) / study.count["classes"] for shots in STEPS}
    lines = {("top-1 (%)", start): [(places[shots], *mean_and_error(top1[start, shots]))
                                    for shots in STEPS] for start in STARTS}
    draw_lines(args.out, "labels", lines, "labelled pictures a class",
               f"mean and standard error of {RUNS * len(SEEDS)} runs")

    lines = {(f"{kind} accuracy (%), 5 per class", start):
             [(layer, *mean_and_error(values)) for layer, values in enumerate(zip(*curves))]
             for (kind, start), curves in probe.items() if not start.startswith("tap")}
    draw_lines(args.out, "probe_blocks", lines, "layer", "frozen features of test pictures; mean "
               f"and standard error over {len(SEEDS)} pre-training seeds")


# --------------------------------------------------------------------------------------------------
# Main
# --------------------------------------------------------------------------------------------------
def parse_args(argv=None):
    """Options of the study or, if the first word is `probe`, of that command."""
    words = sys.argv[1:] if argv is None else argv
    if words[:1] == ["probe"]:
        parser = Parser(probe.__doc__, prog="miniature.py probe [LABEL=]SOURCE ...")
        add = parser.group("inputs and outputs")
        add("inputs", nargs="+", help="checkpoints and other models: see `analyze.py --help`")
        add("--out", default="out/analyze", help="folder for picture and table")
        analyze.model_options(parser, add)
        analyze.image_options(add)
        add("--shots", low=1, nargs="+", default=[2, 5, 10], help="training images per class")
        parser.set_defaults(command=probe)
        return parser.parse_args(words[1:])
    parser = Parser(__doc__)
    parser.set_defaults(command=run_study)
    add = parser.group("study")
    add("--data", required=True, help="folder of CLASS/*.png, or an unpacked npm package "
                                      "emoji-datasource-VENDOR")
    add("--out", type=Path, default=Path("out/miniature"),
        help="folder for data, runs, tables and figures; rerun the command to resume")
    add("--minutes", type=float, low=1, default=FULL_MINUTES,
        help="shortens all training in proportion; starting two hundred commands takes 15 minutes "
             "in any case")
    return parser.parse_args(words)


def open_study(args):
    """The study in --out, its pictures prepared. Raises InputError if --out holds another one."""
    settings = args.out / "settings.json"
    now = dict(data=str(Path(args.data).resolve()), minutes=args.minutes)
    if settings.exists() and json.loads(settings.read_text()) != now:
        raise InputError(f"--out {args.out} holds a study of {settings.read_text()}: give its "
                         "--data and --minutes again, or another --out")
    share = args.minutes / FULL_MINUTES
    prepare(args.out / "data", args.data, max(1000, round(min(1, share) * MAX_PICTURES)))
    settings.write_text(json.dumps(now))
    return Study(args.out, share)


def main(args):
    args.command(args)


def run_study(args):
    """Run the whole study, or what is left of it."""
    study = open_study(args)
    count = study.count
    about = (f"{count['pictures/train']} pictures for pre-training, {count['classes']} classes, "
             f"{count['labelled/train']} labelled and {count['labelled/val']} test pictures")
    if study.share != 1:
        about += f"; all training is {study.share:.2f} times as long as in the whole study"
    print(f"{about}\nin {args.out}, which receives the output in commands.log:", flush=True)

    losses = pretraining(study)
    scratch_rate, rate, search = best_rates(study)
    top1 = finetuning(study, scratch_rate, rate)
    blocks = kept_blocks(study, rate)
    taps = decoder_taps(study, rate)
    probe = frozen_features(study)

    values = study.results.values()
    commits = ", ".join(dict.fromkeys(v["commit"] for v in values if "commit" in v))
    tried = ", ".join(f"{name} {r:g}: {score:.1f}" for (name, r), score in search.items())
    seconds = sum(v["seconds"] for v in values)
    lines = [f"# The paper in miniature: {args.data}", "",
             f"{about}. Commit {commits}; the commands took {seconds:.0f} s.",
             f"Rate of fine-tuning from scratch {scratch_rate:g}, from encoders {rate:g} "
             f"(top-1 of the search: {tried}).",
             *starts_table(losses, top1), *differences(top1), *blocks_table(probe),
             *kept_table(blocks, top1["scratch", "10"]), *taps_table(taps, probe)]
    text = "\n".join(lines) + "\n"
    (args.out / "table.md").write_text(text, encoding="utf-8")
    print(text)
    draw(args, study, top1, probe)


if __name__ == "__main__":
    with plain_errors():
        main(parse_args())
