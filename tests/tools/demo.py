"""Run the scripts' real commands on toy data, which it writes as real folders; neither a download
nor a GPU is needed.

    python tests/tools/demo.py                 # D2-MAE pre-training with its teacher
    python tests/tools/demo.py finetune        # few labels: pre-trained encoder against scratch
    python tests/tools/demo.py all            # also segmentation, tracking and the paper's analyses

Each command is printed before it runs. Data go to DIR/data, outputs to DIR/pretrain, DIR/finetune,
DIR/segment, DIR/track and DIR/analyze. Rerun the same command to resume an interrupted demo.
"""
import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np

import toy

ROOT = Path(__file__).resolve().parents[2]

# Options of the runs, for two CPU cores: five minutes of pre-training, four of any other demo.
SETTINGS = dict(
    pretrain="--image-size 48 --patch-size 8 --crop-scale 1 1 --batch-size 64 --eval-every 4 "
             "--workers 1",
    # a higher rate makes the teacher's attention logits too large to be imitated
    teacher="--method mae --model vit_nano --epochs 12 --base-lr 6e-3",
    student="--model vit_pico --epochs 14 --base-lr 1.2e-2",
    # needed from scratch; equal to what encoder.pt stores
    encoder="--model vit_pico --image-size 48 --patch-size 8",
    # the best of four rates, both for scratch and for the encoder, on other seeds
    finetune="--shots 5 --epochs 30 --batch-size 16 --base-lr 6.4e-2 --eval-every 30 --workers 0 "
             "--recipe improved rand_augment=0 mixup=0 smoothing=0.1 min_crop=0.7",
    # the best of three rates for scratch; evaluated at the end only
    segment="--num-classes 17 --zero-is-class --iters 150 --batch-size 8 --lr 8e-3 --drop-path 0 "
            "--eval-every 1000 --log-every 10 --workers 0",
    track="--template-size 40 --search-size 64 --head-channels 64 --keep-rate 0.8 --drop-path 0 "
          "--epochs 7 --pairs 1200 --batch-size 8 --lr 1e-3 --encoder-lr 0.5 --workers 1",
)
FINETUNE_SEEDS = range(8)
SEGMENT_SEEDS = range(6)


# --------------------------------------------------------------------------------------------------
# Demos: each takes the output folder
# --------------------------------------------------------------------------------------------------
def pretrain(out):
    """Train a teacher of width 96 by MAE, then its student of width 48 by D2-MAE."""
    data = data_folder(out, "images", toy.write_images)
    teacher = out / "pretrain" / "teacher"
    run("pretrain_d2mae.py", "--data", data, *settings("teacher", "pretrain"), "--out", teacher)
    run("pretrain_d2mae.py", "--data", data, "--teacher", teacher / "encoder.pt",
        *settings("student", "pretrain"), "--out", out / "pretrain")


def finetune(out):
    """Compare fine-tuning a pre-trained encoder with random weights on few labelled pictures."""
    data = data_folder(out, "images", toy.write_images)
    command = ("finetune.py", "--data", data, *settings("encoder", "finetune"))
    scores = scratch_and_pretrained(out, command, FINETUNE_SEEDS, "top1")
    print(f"\ntop-1 in % from 5 drawings a class, {len(FINETUNE_SEEDS)} seeds, mean and standard "
          "error")
    print_comparison(*scores)


def segment(out):
    """Compare the same two starts in segmentation."""
    data = data_folder(out, "segmentation", toy.write_segmentation)
    command = ("segment.py", "--data", data, *settings("encoder", "segment"))
    scores = scratch_and_pretrained(out, command, SEGMENT_SEEDS, "miou")
    print(f"\nmIoU from 40 labelled pictures, {len(SEGMENT_SEEDS)} seeds, mean and standard error")
    print_comparison(*scores)


def track(out):
    """Train a tracker, evaluate it on the test videos, and follow the target of one of them."""
    data = data_folder(out, "videos", toy.write_videos)
    video = data / toy.LASOT_TEST.read_text().split()[0]
    box = (video / "groundtruth.txt").read_text().split()[0].split(",")
    folder = out / "track"
    run("track.py", "--data", f"lasot={short(data)}", "--init", out / "pretrain" / "encoder.pt",
        *settings("track"), "--out", folder)
    run("track.py", "--eval", "--data", f"lasot={short(data)}", "--out", folder)
    run("track.py", "--frames", video / "img", "--box", *box, "--out", folder)


def analyze(out):
    """Run all analyses but fig4 on the teacher, its student and random weights."""
    data = data_folder(out, "images", toy.write_images) / "val"
    runs = {"teacher": out / "pretrain" / "teacher", "D2-MAE": out / "pretrain"}
    models = [f"{name}={short(folder / 'encoder.pt')}" for name, folder in runs.items()]
    models.append("random")
    logs = [f"{name}={short(folder / 'log.jsonl')}" for name, folder in runs.items()]
    points = ROOT / "tests" / "assets" / "fig1.csv"
    for script, *command in (
            ("analyze.py", "cka", *models, "--data", data, "--batch-size", 128),
            ("analyze.py", "attention", *models, "--data", data, "--images", 256),
            ("analyze.py", "cost", "vit_tiny", "vit_tiny+rpe", "hiera_tiny", "--points", points,
             "--seconds", 1),
            ("analyze.py", "curves", *logs),
            ("tests/tools/miniature.py", "probe", *models, "--data", data)):
        run(script, *command, "--out", out / "analyze")


DEMOS = {demo.__name__: demo for demo in (pretrain, finetune, segment, track, analyze)}


# --------------------------------------------------------------------------------------------------
# Commands and scores
# --------------------------------------------------------------------------------------------------
def short(path):
    """Path relative to the current folder where that is shorter, as a user would type it."""
    return min(os.path.relpath(path), str(path), key=len)


def data_folder(out, name, write):
    """Write a data set to out/data/name unless it exists. Returns its folder."""
    folder = out / "data" / name
    if not folder.exists():
        print(f"writing {short(folder)}", flush=True)
        write(folder)
    return folder


def settings(*names):
    """Words of the named entries of SETTINGS."""
    return " ".join(SETTINGS[name] for name in names).split()


def run(script, *options):
    """Print and run a command. Exit with its status if it fails; it has printed why."""
    words = [short(word) if isinstance(word, Path) else str(word)
             for word in (ROOT / script, *options)]
    print(f"\n$ python {shlex.join(words)}", flush=True)
    status = subprocess.run([sys.executable, *words]).returncode
    if status < 0:
        sys.exit(f"error: {script} was ended by {signal.Signals(-status).name}")
    if status:
        sys.exit(status)


def scratch_and_pretrained(out, command, seeds, metric):
    """Run a training command with every seed from random weights and from the encoder of the
    pre-training demo. Returns two lists, the final `metric` of each run."""
    folder = out / Path(command[0]).stem
    starts = {"scratch": (), "pre-trained": ("--init", out / "pretrain" / "encoder.pt")}
    scores = {name: [] for name in starts}
    for seed in seeds:
        for name, init in starts.items():
            target = folder / f"{name}-{seed}"
            run(*command, *init, "--seed", seed, "--out", target)
            scores[name].append(last_logged(target / "log.jsonl", metric))
    return scores.values()


def last_logged(log, metric):
    """Last value of `metric` in a log.jsonl."""
    lines = map(json.loads, log.read_text().splitlines())
    return [line[metric] for line in lines if metric in line][-1]


def mean_and_error(values):
    """Mean and its standard error (0 for a single value)."""
    n = len(values)
    return np.mean(values), np.std(values, ddof=min(1, n - 1)) / n ** 0.5


def print_comparison(scratch, pretrained):
    """Print mean scores, one score per seed, and the mean paired difference, with their errors."""
    rows = {"scratch": scratch, "pre-trained": pretrained,
            "difference": np.subtract(pretrained, scratch)}
    for name, values in rows.items():
        print("{:12s} {:5.1f} +- {:.1f}".format(name, *mean_and_error(values)))


def list_pictures(folder):
    """Print the pictures that a demo has drawn; of repeated runs, those with seed 0."""
    for part in (folder, *sorted(folder.glob("*-0"))):
        for file in sorted((*part.glob("*.png"), *part.glob("*.gif"))):
            print(f"picture: {short(file)}")


# --------------------------------------------------------------------------------------------------
# Main
# --------------------------------------------------------------------------------------------------
def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", nargs="?", choices=(*DEMOS, "all"), default="pretrain",
                        help="all but pretrain start from its encoder and run it first where that "
                             "is missing; default: pretrain")
    parser.add_argument("--out", type=Path, default=Path("out/demo"), metavar="DIR",
                        help="folder for data and outputs; default: out/demo")
    return parser.parse_args(argv)


def main(args):
    names = list(DEMOS) if args.demo == "all" else [args.demo]
    encoder = args.out / "pretrain" / "encoder.pt"
    if "pretrain" not in names and not encoder.exists():
        names.insert(0, "pretrain")
    for name in names:
        DEMOS[name](args.out)
        list_pictures(args.out / name)


if __name__ == "__main__":
    try:
        main(parse_args())
    except KeyboardInterrupt:
        print("\ninterrupted: rerun the same command to resume", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        sys.exit(f"error: {error}")
