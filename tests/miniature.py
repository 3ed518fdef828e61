r"""The paper in miniature: its questions asked of a small ViT on a folder of pictures, on a laptop.

    python tests/miniature.py --data FOLDER                 # FOLDER/CLASS/*.png; two hours, 2 cores
    python tests/miniature.py --data FOLDER --minutes 30    # everything shorter, in proportion
    npm pack emoji-datasource-google && tar xzf emoji-datasource-google-*.tgz
    python tests/miniature.py --data package                # emoji, classes by emoji.json

Everything of the paper at a quarter of its width, pictures of 48x48 pixels in patches of 8: the
teacher is a ViT-Tiny of 3 heads (192 wide; paper: ViT-Base, 768), the student `vit_pico` (48 wide;
paper: ViT-Tiny, 192). This file only runs the project's commands, one after the other, and collects
what they measure: table.md and figures in --out. A run that was stopped goes on with the same
command. What is asked:

- Does pre-training pay (Table 2)? MAE, D-MAE, D2-MAE, and MAE for as long as D2-MAE takes by the
  clock, from two seeds each; then fine-tuning with 2, 5, 10 and all labels of a class, three seeds
  for each encoder, six from scratch. Scratch and pre-trained each get the best of four rates, found
  with 10 labels on another seed.
- Which layers does it teach? Probes of every block, Fig. 3 (CKA), Fig. 4 (blocks kept), Fig. 5
  (attention distance and entropy).
- Where should the decoder read? Taps 4 to 12, one seed.

Pictures are told apart by identity: files of a class whose names differ in skin tone alone are one.
A third of the identities of each labelled class is kept out of pre-training and of fine-tuning.
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
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("TQDM_MININTERVAL", "10")    # bars go to a file here

import analyze                                                                        # noqa: E402
import finetune                                                                       # noqa: E402
import pretrain_d2mae                                                                 # noqa: E402
from models import (IMAGE_TYPES, InputError, mean_and_error, number,       # noqa: E402
                    plain_errors, read_log)

FULL_MINUTES = 120    # what the numbers below take at most on 2 cores
SEEN = 96_000         # pictures in one pre-training; the teacher sees a quarter more
SHOTS = {"2": 2_000, "5": 5_000, "10": 8_000, "all": 8_000}    # labels of a class: pictures seen
SEEDS = (0, 1)        # of pre-training
RUNS = 3              # fine-tunings of each encoder, with seeds of their own
TAPS = (4, 6, 8, 10, 12)
KEPT = (0, 4, 8, 12)
RATE = 3e-3                         # of pre-training, batches of 128
TEACHER_RATE = 1.5e-3               # twice of it makes attention logits too large to be imitated
RATES = (1e-3, 2e-3, 4e-3, 8e-3)    # of fine-tuning, batches of 32
RECIPE = "rand_augment=0 mixup=0 smoothing=0.1 min_crop=0.4".split()
METHODS = {"MAE": "mae", "D-MAE": "d-mae", "D2-MAE": "d2-mae"}
LONGER = "MAE, time of D2"
STARTS = ("scratch", *METHODS, LONGER)

MAX_PICTURES = 20_000    # of pre-training
MAX_CLASSES = 32         # the largest ones are labelled
MIN_IDENTITIES = 20      # of a labelled class
MAX_IDENTITIES = 100

SIZES = "--image-size 48 --patch-size 8".split()


# --------------------------------------------------------------------------------------------------
# Pictures
# --------------------------------------------------------------------------------------------------
def list_classes(folder):
    """FOLDER/CLASS/* or an unpacked emoji-datasource package -> {class: [file, ...]}; InputError
    if there are not two classes that can be labelled."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"--data {folder} is not a folder: give one that holds CLASS/*.png")
    if (folder / "emoji.json").is_file():
        return list_emoji(folder)
    classes = defaultdict(list)
    for file in sorted(folder.glob("*/*")):
        if file.suffix.lower() in IMAGE_TYPES:
            classes[file.parent.name].append(file)
    return classes


def list_emoji(package):
    """Pictures of an npm package emoji-datasource-VENDOR by category and sub-category."""
    pictures = sorted(package.glob("img/*/64"))
    if not pictures:
        raise InputError(f"--data {package} has an emoji.json but no img/VENDOR/64: unpack the "
                         "whole package")
    classes = defaultdict(list)
    for emoji in json.loads((package / "emoji.json").read_text()):
        name = f"{emoji['category']}, {emoji['subcategory']}".replace("/", "-")
        for variant in (emoji, *emoji.get("skin_variations", {}).values()):
            file = pictures[0] / variant["image"]
            if file.exists():
                classes[name].append(file)
    return classes


def identity(file):
    """What variants of one picture have in common: the name without skin tones."""
    return re.sub(r"[-_](1f3f[b-f]|fe0f)", "", file.stem.lower())


def on_white(file):
    """Any picture file -> 64x64 RGB, the whole picture on white."""
    image = ImageOps.exif_transpose(Image.open(file)).convert("RGBA")
    image.thumbnail((64, 64), Image.Resampling.BICUBIC)
    paper = Image.new("RGBA", (64, 64), "white")
    paper.alpha_composite(image, ((64 - image.width) // 2, (64 - image.height) // 2))
    return paper.convert("RGB")


def prepare(data, out):
    """Write out/pictures/{train,val} for pre-training and out/labelled/{train,val}/CLASS; a third
    of the identities of a labelled class is in both folders val, and nowhere else."""
    if (out / "prepared.json").exists():
        return json.loads((out / "prepared.json").read_text())
    rng = random.Random(0)
    classes = {}
    for name, files in sorted(list_classes(data).items()):
        groups = defaultdict(list)
        for file in files:
            groups[identity(file)].append(file)
        classes[name] = sorted(groups.values())
        rng.shuffle(classes[name])
    large = [name for name in classes if len(classes[name]) >= MIN_IDENTITIES]
    large = sorted(large, key=lambda name: -len(classes[name]))[:MAX_CLASSES]
    if len(large) < 2:
        raise InputError(f"--data {data} has {len(large)} classes of {MIN_IDENTITIES} different "
                         "pictures or more (CLASS/*.png), and two are needed")

    unlabelled = []    # (file, class)
    for name, groups in tqdm(classes.items(), desc="pictures"):
        labelled = groups[:MAX_IDENTITIES] if name in large else []
        test = labelled[:len(labelled) // 3]
        for part, some in (("val", test), ("train", labelled[len(test):])):
            for group in some:
                write(group[0], out / "labelled" / part / name)
                if part == "val":
                    write(group[0], out / "pictures/val" / name)
        unlabelled += [(file, name) for group in groups[len(test):] for file in group]
    rng.shuffle(unlabelled)
    for file, name in tqdm(unlabelled[:MAX_PICTURES], desc="for pre-training"):
        write(file, out / "pictures/train" / name)

    count = {part: len(list(out.glob(f"{part}/*/*.png")))
             for part in ("pictures/train", "labelled/train", "labelled/val")}
    count["classes"] = len(large)
    (out / "prepared.json").write_text(json.dumps(count))
    return count


def write(file, folder):
    folder.mkdir(parents=True, exist_ok=True)
    try:
        on_white(file).save(folder / f"{file.stem}.png")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{file} cannot be read as a picture ({type(error).__name__}): remove it "
                         "from --data") from None


# --------------------------------------------------------------------------------------------------
# Commands
# --------------------------------------------------------------------------------------------------
class Study:
    """Runs commands of the project that have not been run yet, and keeps what they measured in
    results.json: {command: values}. What they print goes to commands.log."""

    def __init__(self, out, share, count):
        self.out = out
        self.share = share
        self.count = count
        self.path = out / "results.json"
        self.results = json.loads(self.path.read_text()) if self.path.exists() else {}

    def run(self, script, words, measure, **defaults):
        """`script` with the options `words` -> what `measure()` reads of its files afterwards.
        `defaults` stand in for settings without an option."""
        words = [str(word) for word in words]
        command = f"python {script.__name__}.py {shlex.join(words)}"
        if command not in self.results:
            print(time.strftime("%H:%M:%S"), command, flush=True)
            started = time.perf_counter()
            with open(self.out / "commands.log", "a") as log:
                with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
                    script.main(script.parse_args(words, **defaults))
            values = dict(measure(), seconds=time.perf_counter() - started)
            self.results[command] = values
            scratch = self.path.with_suffix(".tmp")
            scratch.write_text(json.dumps(self.results, indent=1))
            scratch.replace(self.path)
        return self.results[command]

    def pretrain(self, name, method, seed, *words, model="vit_pico", rate=RATE, longer=1.0):
        """-> held-out losses and pictures a second. The encoder is NAME/encoder.pt in --out."""
        epochs = max(1, round(longer * self.share * SEEN / self.count["pictures/train"]))
        folder = self.out / name
        if method != "mae":
            words = ["--teacher", self.out / "teacher/encoder.pt", *words]
        command = ["--data", self.out / "pictures/train", *SIZES, "--crop-scale", 0.4, 1,
                   "--model", model, "--method", method, "--epochs", epochs, "--batch-size", 128,
                   "--base-lr", 2 * rate, "--workers", 1, "--seed", seed, "--out", folder,
                   *words]

        def measure():
            log = read_log(folder / "log.jsonl")
            last = [line for line in log if "val_rec" in line][-1]
            speeds = [line["img_s"] for line in log if "img_s" in line]
            seen = epochs * self.count["pictures/train"]
            return dict(last, img_s=float(np.median(speeds)), epochs=epochs, seen=seen)

        return self.run(pretrain_d2mae, command, measure)

    def pictures(self, shots):
        """Number of labelled pictures, "all" or so many a class."""
        every = self.count["labelled/train"]
        return every if shots == "all" else min(every, int(shots) * self.count["classes"])

    def finetune(self, start, seed, shots, rate, keep=None):
        """Encoder in the folder `start`, or "scratch" -> top-1 in % after the last epoch."""
        folder = self.out / "finetune" / f"{start}-{shots}-{seed}-{rate:g}-{keep}"
        epochs = max(1, round(self.share * SHOTS[shots] / self.pictures(shots)))
        words = ["--data", self.out / "labelled", *SIZES[:2], "--model", "vit_pico",
                 "--epochs", epochs, "--batch-size", 32, "--base-lr", 8 * rate, "--seed", seed,
                 "--workers", 0, "--out", folder, "--recipe", *RECIPE]
        if start == "scratch":
            words += ["layer_decay=1"]    # random layers all learn alike
        else:
            words += ["--init", self.out / start / "encoder.pt"]
        if shots != "all":
            words += ["--shots", shots]
        if keep is not None:
            words += ["--keep-blocks", keep]

        def measure():
            log = read_log(folder / "log.jsonl")
            shutil.rmtree(folder)    # hundreds of them
            return dict(top1=[line["top1"] for line in log if "top1" in line][-1])

        return self.run(finetune, words, measure, patch_size=8, eval_every=epochs)["top1"]

    def analyze(self, name, models, *words):
        """Command of analyze.py on folders {label: folder} -> rows of NAME.csv."""
        sources = [f"{label}={'deit_tiny' if label == 'teacher' else 'vit_pico'}:"
                   f"{self.out / folder / 'encoder.pt'}" for label, folder in models.items()]
        self.run(analyze, [name, *sources, "random", *words, "--data", self.out / "labelled/val",
                           "--out", self.out], dict)
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
        slower = found["MAE"][0]["img_s"] / found["D2-MAE"][0]["img_s"]
        found[LONGER].append(study.pretrain(f"longer-{seed}", "mae", seed, longer=slower))
    return found


def encoders(start):
    """Folders of the encoders of a start; "scratch" is one for each seed."""
    name = {**METHODS, LONGER: "longer", "scratch": "scratch"}[start]
    return [name if start == "scratch" else f"{name}-{seed}" for seed in SEEDS]


def best_rate(study, start):
    """Rate with the best accuracy from 10 labels a class, on a seed that is not used again."""
    top1 = {rate: study.finetune(start, 99, "10", rate) for rate in RATES}
    return max(top1, key=top1.get)


def finetuning(study, rates):
    """{(start, shots): [top-1 of each run]}, runs in the same order of seeds for all starts."""
    top1 = defaultdict(list)
    for shots in SHOTS:
        for start in STARTS:
            for k, folder in enumerate(encoders(start)):
                for seed in range(RUNS * k, RUNS * (k + 1)):
                    top1[start, shots].append(
                        study.finetune(folder, seed, shots, rates[start != "scratch"]))
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
    """{(classifier, start): [accuracy of each block, a row for each seed]}, 5 labels a class."""
    models = {"teacher": "teacher"}
    models |= {f"{start} {k}": folder for start in STARTS[1:]
               for k, folder in enumerate(encoders(start))}
    models |= {f"tap{tap}": f"tap{tap}" for tap in TAPS if tap != 8}
    curves = defaultdict(lambda: defaultdict(list))
    for row in study.analyze("probe", models, "--shots", 5):
        kind = row["quantity"].split()[0]
        if row["label"] != "chance":
            curves[kind, row["label"]][int(float(row["layer"]))] = float(row["value"])
    found = defaultdict(list)
    for (kind, label), blocks in curves.items():
        found[kind, re.sub(r" \d$", "", label)].append([blocks[k] for k in sorted(blocks)])
    return found


# --------------------------------------------------------------------------------------------------
# Tables and figures
# --------------------------------------------------------------------------------------------------
def shown(values, digits=1):
    mean, error = mean_and_error(values)
    return f"{mean:.{digits}f} ± {error:.{digits}f}" if len(values) > 1 else f"{mean:.{digits}f}"


def difference(first, second):
    """Paired difference of two lists -> "+1.2 (0.3, 6 runs)"."""
    mean, error = mean_and_error(np.subtract(first, second))
    return f"{mean:+.1f} ({error:.1f}, {len(first)} runs)"


def markdown(head, rows):
    """Lines of a table."""
    return ["", *(f"| {' | '.join(map(str, row))} |" for row in [head, ["---"] * len(head), *rows])]


def best_block(curves):
    """Block with the best mean accuracy, (seeds, layers) -> its number."""
    return int(curves.mean(axis=0)[1:].argmax()) + 1


def starts_table(losses, top1):
    """What each start costs, and what it gives with few labels and many."""
    rows = []
    for start in STARTS:
        cost = ["-", "-"]
        if start in losses:
            cost = [f"{np.mean([v['seen'] / v['img_s'] for v in losses[start]]):.0f}",
                    shown([v["val_rec"] for v in losses[start]], 3)]
        rows.append([start, *cost, *(shown(top1[start, shots]) for shots in SHOTS)])
    return markdown(["start", "training, s", "held-out L_rec",
                     *(f"top-1, {shots} a class" for shots in SHOTS)], rows)


def differences(top1):
    lines = ["", "Differences of top-1, paired by seed: mean (standard error, runs)", ""]
    pairs = [(start, "scratch") for start in STARTS[1:]]
    pairs += [("D2-MAE", "MAE"), ("D2-MAE", "D-MAE"), ("D2-MAE", LONGER)]
    for a, b in pairs:
        parts = (f"{shots} a class {difference(top1[a, shots], top1[b, shots])}" for shots in SHOTS)
        lines.append(f"- {a} − {b}: {'; '.join(parts)}")
    return lines


def blocks_table(probe):
    """Does accuracy fall towards the last block?"""
    rows = []
    for start in ("random", "teacher", *STARTS[1:]):
        row = [start]
        for kind in ("5-NN", "ridge"):
            curves = np.array(probe[kind, start])                           # (seeds, layers)
            best = best_block(curves)
            row += [f"{shown(curves[:, best])} ({best})", shown(curves[:, -1]),
                    difference(curves[:, -1], curves[:, best])]
        rows.append(row)
    return markdown(["frozen features", "5-NN, best block", "5-NN, block 12", "difference",
                     "ridge, best block", "ridge, block 12", "difference"], rows)


def kept_table(blocks):
    rows = [[start, *(shown(row[keep]) for keep in KEPT)] for start, row in blocks.items()]
    return markdown(["blocks kept, top-1, 10 a class", *KEPT], rows)


def taps_table(taps, probe):
    rows = []
    for tap, (values, top1) in taps.items():
        name = f"tap{tap}" if tap != 8 else "D2-MAE"
        rows.append([tap, f"{values['val_rec']:.3f}", f"{values['val_attn']:.3g}",
                     f"{probe['5-NN', name][0][-1]:.1f}", f"{probe['ridge', name][0][-1]:.1f}",
                     shown(top1)])
    return markdown(["decoder reads block", "held-out L_rec", "held-out L_attn", "5-NN, block 12",
                     "ridge, block 12", "top-1, 10 a class"], rows)


def draw(study, top1, blocks, taps, probe):
    """labels.png, fig4.png, taps.png, probe_blocks.png; those of analyze.py lie beside them."""
    args = argparse.Namespace(out=study.out)
    places = {shots: study.pictures(shots) / study.count["classes"] for shots in SHOTS}
    lines = {("top-1 (%)", start): [(places[shots], *mean_and_error(top1[start, shots]))
                                    for shots in SHOTS] for start in STARTS}
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
def start(args):
    """Pictures and settings of the study in --out -> Study, what it is in a sentence. InputError
    if another study lies there."""
    args.out.mkdir(parents=True, exist_ok=True)
    settings = args.out / "settings.json"
    now = dict(data=str(Path(args.data).resolve()), minutes=args.minutes)
    if settings.exists() and json.loads(settings.read_text()) != now:
        raise InputError(f"--out {args.out} holds a study of {settings.read_text()}: give its "
                         "--data and --minutes again, or another --out")
    count = prepare(args.data, args.out)
    settings.write_text(json.dumps(now))
    commit = subprocess.run("git rev-parse --short HEAD", shell=True, cwd=ROOT,
                            capture_output=True, text=True).stdout.strip()
    words = (f"{count['pictures/train']} pictures for pre-training, {count['classes']} classes, "
             f"{count['labelled/train']} labelled and {count['labelled/val']} test pictures; "
             f"commit {commit}")
    share = args.minutes / FULL_MINUTES
    if share != 1:
        words += f"; all training is {share:.2f} times as long as in the whole study"
    return Study(args.out, share, count), words


def main(args):
    """The whole study, or what is left of it."""
    study, words = start(args)
    print(f"{words}\nwhat the commands print: {args.out}/commands.log")
    losses = pretraining(study)
    rates = [best_rate(study, name) for name in ("scratch", "mae-0")]
    top1 = finetuning(study, rates)
    blocks = kept_blocks(study, rates[1])
    taps = decoder_taps(study, rates[1])
    probe = probes(study)
    models = {"teacher": "teacher", **{name: encoders(name)[0] for name in METHODS}}
    study.analyze("cka", models, "--batch-size", 128)
    study.analyze("attention", models)

    seconds = sum(values["seconds"] for values in study.results.values())
    lines = [f"# The paper in miniature: {args.data}", "", f"{words}.",
             f"The commands took {seconds:.0f} s. Rate of fine-tuning from scratch {rates[0]:g}, "
             f"pre-trained {rates[1]:g}.", *starts_table(losses, top1), *differences(top1),
             *blocks_table(probe), *kept_table(blocks), *taps_table(taps, probe)]
    text = "\n".join(lines) + "\n"
    (args.out / "table.md").write_text(text)
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
                        help="shorten everything in proportion (default: %(default)s)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    with plain_errors():
        main(parse_args())
