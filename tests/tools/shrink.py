"""Copy a folder of images once, each reduced to a short side of 256 pixels. Training then reads it
two to three times as fast.

    python tests/tools/shrink.py data/imagenet data/imagenet_256            # JPEG of quality 90
    python tests/tools/shrink.py data/imagenet data/imagenet_256 --raw      # PPM, larger and faster
    torchrun --nproc_per_node=8 pretrain_d2mae.py --data data/imagenet_256 --teacher mae_base.pt

Folders and names stay, endings become .jpg or .ppm (of a.png and a.jpg: a.png.jpg and a.jpg.jpg).
pretrain_d2mae.py and finetune.py read the copy as they read the original. No image is enlarged. A
file that cannot be read is reported and not copied. Rerun a command that was killed: it writes what
is missing. The copy does not serve segmentation and tracking, whose labels and boxes belong to the
original pixels.
"""
import argparse
import collections
import io
import json
import os
import shutil
import sys
from pathlib import Path

from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from models import InputError, Names, list_images, open_image, plain_errors  # noqa: E402


class Shrink(Dataset):
    """Item -> None once the file is written, or why its source cannot be read. pairs: [(source,
    target)]; side, raw: see `shrink`."""

    def __init__(self, pairs, side, raw):
        self.sources = Names(source for source, _ in pairs)
        self.targets = Names(target for _, target in pairs)
        self.side = side
        self.raw = raw

    def __len__(self):
        return len(self.sources)

    def __getitem__(self, index):
        try:
            data = shrink(self.sources[index], self.side, self.raw)
        except OSError as error:
            return str(error)
        target = Path(self.targets[index])
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = target.with_name(f".{target.name}.tmp")    # hidden: never taken for an image
        try:
            scratch.write_bytes(data)
            os.replace(scratch, target)    # whole, or not there
        except OSError as error:
            scratch.unlink(missing_ok=True)
            raise OSError(f"cannot write {target} ({error}): rerun the command to resume") from None


def shrink(source, side, raw):
    """Image file -> bytes of a JPEG file, or of a PPM file if raw, whose short side is at most
    `side`. Raises OSError."""
    image = open_image(source)
    factor = side / min(image.size)
    if factor < 1:
        image = image.resize([max(side, round(n * factor)) for n in image.size],
                             Image.Resampling.BICUBIC)
    file = io.BytesIO()
    if raw:
        image.save(file, "PPM")
    else:
        image.save(file, "JPEG", quality=90)
    return file.getvalue()


def list_pairs(src, dst, ending):
    """-> [(source, target)]. A source keeps its ending below the new one, a.png.jpg, where its
    target would be that of another."""
    sources = list_images(src)
    uses = collections.Counter(os.path.splitext(file)[0] for file in sources)
    uses.update(sources)
    pairs = []
    for file in sources:
        stem = os.path.splitext(file)[0]
        name = stem if uses[stem] == 1 else file
        pairs.append((file, os.path.join(dst, os.path.relpath(name, src)) + ending))
    return pairs


def check(args):
    """Raise InputError unless the two folders fit together; note the options in DST."""
    src, dst = args.src.resolve(), args.dst.resolve()
    if src == dst or src in dst.parents or dst in src.parents:
        raise InputError(f"DST {args.dst} and SRC {args.src} are nested: give a DST beside SRC")
    if (args.src / "annotations").is_dir():
        raise InputError(f"{args.src} holds annotations, which belong to the original pixels: "
                         "segmentation and tracking read the originals")
    if args.dst.exists() and not args.dst.is_dir():
        raise InputError(f"DST {args.dst} is a file: give a folder")
    note = args.dst / ".shrink.json"
    options = dict(src=str(src), side=args.side, raw=args.raw)
    if note.exists() and json.loads(note.read_text()) != options:
        raise InputError(f"{args.dst} was begun with {note.read_text()}: give the same SRC, --side "
                         "and --raw to resume, or another DST")
    args.dst.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps(options))


def estimate(pairs, args, count=100):
    """Bytes of all targets, from `count` of the sources, spread over the whole; 0 if none can be
    read."""
    sizes = []
    for source, _ in pairs[::max(1, len(pairs) // count)]:
        try:
            sizes.append(len(shrink(source, args.side, args.raw)))
        except OSError:
            pass    # reported when its turn comes
    return sum(sizes) * len(pairs) / max(1, len(sizes))


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("src", type=Path, help="folder of images, flat or nested")
    parser.add_argument("dst", type=Path, help="folder for the copy")
    parser.add_argument("--side", type=int, default=256,
                        help="short side in pixels (default: %(default)s, for crops of 224)")
    parser.add_argument("--raw", action="store_true",
                        help="write PPM, about eight times the size of JPEG")
    parser.add_argument("--workers", type=int, default=os.cpu_count(),
                        help="processes (default: one a core)")
    args = parser.parse_args(argv)
    if args.side < 1 or args.workers < 0:
        parser.error("--side must be at least 1, --workers at least 0")
    return args


def main(args):
    pairs = list_pairs(args.src, args.dst, ".ppm" if args.raw else ".jpg")
    check(args)
    left = [(source, target) for source, target in pairs if not os.path.exists(target)]
    needed, free = estimate(left, args), shutil.disk_usage(args.dst).free
    print(f"{len(pairs)} images, {len(left)} of them to write: about {needed / 1e9:.2g} GB in "
          f"{args.dst}, where {free / 1e9:.3g} GB are free", flush=True)
    if needed > free:
        raise InputError(f"{args.dst} has too little space: give another DST"
                         + ", or leave out --raw" * args.raw)
    dataset = Shrink(left, args.side, args.raw)
    loader = DataLoader(dataset, batch_size=None, num_workers=args.workers)
    unreadable = 0
    for error in tqdm(loader):
        if error:
            unreadable += 1
            tqdm.write(f"not copied: {error}", sys.stderr)
    if unreadable == len(pairs):
        raise InputError(f"no image of {args.src} can be read")
    print(f"{args.dst}: {len(pairs) - unreadable} images, {unreadable} unreadable")


if __name__ == "__main__":
    with plain_errors():
        main(parse_args())
