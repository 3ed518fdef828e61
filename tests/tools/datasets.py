"""Write a data set of torchvision as folders of images, train/CLASS/ and val/CLASS/, which
finetune.py and pretrain_d2mae.py read.

    python tests/tools/datasets.py cifar100 data/cifar100                # downloads
    python tests/tools/datasets.py pets data/pets --source downloads     # has oxford-iiit-pet
    torchrun --nproc_per_node=2 finetune.py --recipe cifar --data data/cifar100 --init encoder.pt

CIFAR becomes PNG files, without loss; the files of the other data sets are copied byte for byte.
val holds the test images. train holds all other images, which includes the validation images of
flowers, pets and aircraft. A "/" in the name of a class becomes "_".

The command may be killed at any moment: the same command resumes. It prepares all files in the
hidden folder DIR/.NAME and moves them to DIR/train and DIR/val once they are complete. Flowers and
cars need SciPy. The cars are no longer hosted (github.com/pytorch/vision/issues/7545) and need
--source.
"""
import argparse
import importlib.util
import os
import shutil
from functools import partial
from pathlib import Path

from PIL import Image
from torchvision import datasets
from tqdm import tqdm

# Class of torchvision, the folder that it makes, its parts for train, its parts for val. With
# loader=str an item is the name of a file, which is not read.
DATASETS = {
    "cifar10": (datasets.CIFAR10, "cifar-10-batches-py", [True], [False]),
    "cifar100": (datasets.CIFAR100, "cifar-100-python", [True], [False]),
    "flowers": (partial(datasets.Flowers102, loader=str), "flowers-102",
                ["train", "val"], ["test"]),
    "pets": (datasets.OxfordIIITPet, "oxford-iiit-pet", ["trainval"], ["test"]),
    "aircraft": (partial(datasets.FGVCAircraft, loader=str), "fgvc-aircraft-2013b",
                 ["trainval"], ["test"]),
    "cars": (partial(datasets.StanfordCars, loader=str), "stanford_cars", ["train"], ["test"]),
}


def check(name, root):
    """Exit with a sentence if SciPy is missing, or if `root` belongs to something else."""
    if name in ("flowers", "cars") and importlib.util.find_spec("scipy") is None:
        raise SystemExit(f"{name} needs SciPy: pip install scipy")
    if root.exists() and not root.is_dir():
        raise SystemExit(f"{root} is a file: give a folder")
    for other in DATASETS:
        if other != name and (root / f".{other}").exists():
            raise SystemExit(f"{root} belongs to {other}: give another folder")
    for split in ("train", "val"):
        if (root / split).exists() and not (root / f".{name}").exists():
            raise SystemExit(f"{root / split} was not written by this tool: give another folder")


def reason(error):
    """Return the first line of an error's message, or its type if it has no message."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return line.removesuffix(" You can use download=True to download it").rstrip(".")


def download(name, work):
    """Download into work/source, unless that folder exists, and return it.

    torchvision checks of some data sets only that a folder exists, and takes a half extracted
    archive for a complete one. The download therefore goes to an empty folder of another name.
    """
    source = work / "source"
    if source.is_dir():
        return source
    if name == "cars":
        raise SystemExit("the cars are no longer hosted (github.com/pytorch/vision/issues/7545): "
                         "find a copy and give as --source the folder that holds stanford_cars")
    make, folder, parts, _ = DATASETS[name]
    scratch = work / "download"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        make(scratch, parts[0], download=True)    # downloads all parts
    except Exception as error:    # of the network, the server or the archive
        shutil.rmtree(scratch)
        if not any(work.iterdir()):
            work.rmdir()
        raise SystemExit(f"{name} cannot be downloaded ({reason(error)}): try again later, or give "
                         f"as --source the folder that holds {folder}") from None
    os.replace(scratch, source)
    return source


def read_part(name, source, part):
    """Read one part of a data set. Returns [(file name, path or pixels, label)], class names."""
    data = DATASETS[name][0](source, part)
    if name.startswith("cifar"):
        rows = enumerate(zip(data.data, data.targets))
        return [(f"{i:05d}.png", pixels, label) for i, (pixels, label) in rows], data.classes
    if name == "pets":    # accepts no loader: read its list of files
        folder = Path(source, "oxford-iiit-pet")
        rows = (folder / "annotations" / f"{part}.txt").read_text().splitlines()
        pairs = [(folder / "images" / f"{stem}.jpg", int(label) - 1)
                 for stem, label, _, _ in map(str.split, rows)]
    else:
        pairs = [data[i] for i in range(len(data))]
    return [(Path(path).name, path, label) for path, label in pairs], data.classes


def folder_names(classes):
    """Replace "/", as in "F/A-18", by "_". A class that would get the name of an earlier one gets
    another "_" at its end."""
    names = []
    for name in classes:
        name = name.replace("/", "_")
        while name in names:
            name += "_"
        names.append(name)
    return names


def list_files(name, source):
    """List what to write. Returns {"train": [(CLASS/FILE, path or pixels)], "val": the same}."""
    _, folder, train, val = DATASETS[name]
    files = {"train": [], "val": []}
    try:
        for split, part in [("train", part) for part in train] + [("val", part) for part in val]:
            items, classes = read_part(name, source, part)
            folders = folder_names(classes)
            files[split] += [(f"{folders[label]}/{file}", picture)
                             for file, picture, label in items]
    except Exception as error:    # whatever a damaged file causes in torchvision, SciPy or pickle
        raise SystemExit(f"{name} cannot be read from {source} ({reason(error)}): that folder must "
                         f"hold a complete {folder}") from None
    return files


def write(picture, target, scratch):
    """Write pixels as a PNG file, or copy a file; the target appears once it is complete."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(picture, (str, Path)):
        shutil.copyfile(picture, scratch)
    else:
        Image.fromarray(picture).save(scratch, "PNG")
    os.replace(scratch, target)


def convert(name, root, source):
    """Write root/val and root/train in this order, so that root/train means that both are there."""
    missing = [split for split in ("val", "train") if not (root / split).is_dir()]
    if not missing:
        print(f"{root} is complete already")
        return
    work = root / f".{name}"    # which also shows to whom `root` belongs
    source = source or download(name, work)
    files = list_files(name, source)
    for split in missing:
        for file, picture in tqdm(files[split], f"{name} {split}"):
            target = work / split / file
            if not target.exists():
                write(picture, target, work / "scratch")
    for split in missing:
        os.replace(work / split, root / split)
    print(f"{root}: {len(files['train'])} training images, {len(files['val'])} test images")
    if source == work / "source":
        print(f"{source} is no longer needed")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", metavar="NAME", choices=DATASETS, help=", ".join(DATASETS))
    parser.add_argument("dir", metavar="DIR", type=Path, help="folder for train and val")
    folders = ", ".join(folder for _, folder, _, _ in DATASETS.values())
    parser.add_argument("--source", metavar="FOLDER", type=Path,
                        help="read the files of torchvision from FOLDER, which must hold the "
                             f"folder that torchvision makes ({folders}); without this option "
                             "they are downloaded into DIR/.NAME/source")
    return parser.parse_args(argv)


def main(args):
    try:
        check(args.name, args.dir)
        convert(args.name, args.dir, args.source)
    except OSError as error:
        raise SystemExit(f"{error}: once this is solved, the same command resumes") from None
    except KeyboardInterrupt:
        raise SystemExit("interrupted: the same command resumes") from None


if __name__ == "__main__":
    main(parse_args())
