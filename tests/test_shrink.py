"""tests/tools/shrink.py: sizes, names, both formats, bad files, a kill."""
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT, here
from PIL import Image

import pretrain_d2mae
import shrink
from models import InputError, list_images, open_image, read_log


@pytest.fixture
def source(tmp_path):
    """Pictures of two classes: wide, tall, small, grey, three of one stem, and a broken one."""
    folder = tmp_path / "source"
    coarse = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    picture = Image.fromarray(coarse).resize((300, 200), Image.Resampling.BICUBIC)
    for name, size in (("train/cat/wide.png", (300, 200)), ("train/cat/tall.JPEG", (90, 400)),
                       ("train/dog/small.bmp", (40, 30)), ("train/dog/a.b.jpg", (64, 64)),
                       ("val/dog/same.jpg", (128, 96)), ("val/dog/same.png", (96, 128)),
                       ("val/dog/same.jpg.bmp", (50, 50))):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture.resize(size).save(folder / name)
    Image.fromarray(np.full((100, 100), 40000, np.uint16)).save(folder / "val/dog/deep.png")
    (folder / "train/cat/broken.jpg").write_text("no image")
    return folder


def tree(folder):
    return {os.path.relpath(f, folder): open_image(f).size for f in list_images(folder)}


@pytest.mark.parametrize("raw", (False, True))
def test_images_keep_their_folder_and_name_and_are_never_enlarged(source, tmp_path, capsys, raw):
    end = "ppm" if raw else "jpg"
    options = [source, tmp_path / "copy", "--side", 64, "--workers", 1, *["--raw"] * raw]
    here(shrink, *options)
    sizes = {"train/cat/wide": (96, 64), "train/cat/tall": (64, 284), "train/dog/small": (40, 30),
             "train/dog/a.b": (64, 64), "val/dog/same.jpg": (85, 64), "val/dog/same.png": (64, 85),
             "val/dog/same.jpg.bmp": (50, 50), "val/dog/deep": (64, 64)}
    assert tree(tmp_path / "copy") == {f"{name}.{end}": size for name, size in sizes.items()}
    said = capsys.readouterr()
    assert "9 images, 9 of them to write: about" in said.out
    assert "8 images, 1 unreadable" in said.out
    assert said.err.count("not copied: cannot read image") == 1 and "broken.jpg" in said.err
    wide = open_image(source / "train/cat/wide.png").resize((96, 64), Image.Resampling.BICUBIC)
    error = np.asarray(open_image(tmp_path / f"copy/train/cat/wide.{end}"), float) - wide
    assert np.abs(error).mean() < (0.01 if raw else 3)
    assert np.asarray(open_image(tmp_path / f"copy/val/dog/deep.{end}")).mean() == pytest.approx(156)

    here(shrink, *options)    # the same command: nothing but the broken file is tried again
    assert "9 images, 1 of them to write" in capsys.readouterr().out
    with pytest.raises(InputError, match="was begun with .*give the same SRC"):
        here(shrink, *options[:3], 32)


def test_pre_training_reads_the_copy(source, tmp_path):
    here(shrink, source, tmp_path / "copy", "--side", 48, "--workers", 0, "--raw")
    here(pretrain_d2mae, "--data", tmp_path / "copy", "--image-size", 32, "--method", "mae",
         "--model", "vit_pico", "--epochs", 1, "--workers", 0, "--out", tmp_path / "run")
    assert read_log(tmp_path / "run/log.jsonl")[0]["train_images"] == 4
    assert read_log(tmp_path / "run/log.jsonl")[-1]["val_images"] == 4


def test_folders_that_do_not_fit_are_refused(source, tmp_path):
    for target in (source, source / "inside", tmp_path):
        with pytest.raises(InputError, match="are nested"):
            here(shrink, source, target)
    (source / "annotations").mkdir()
    with pytest.raises(InputError, match="belong to the original pixels"):
        here(shrink, source, tmp_path / "copy")


def test_a_killed_copy_holds_whole_images_and_is_completed(tmp_path):
    (tmp_path / "source").mkdir()
    noise = np.random.default_rng(0)
    for i in range(60):
        pixels = noise.integers(0, 256, (300, 300, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"source/{i}.bmp")
    options = [str(tmp_path / "source"), str(tmp_path / "copy"), "--side", "250", "--workers", "1"]
    process = subprocess.Popen([sys.executable, ROOT / "tests/tools/shrink.py", *options],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               start_new_session=True)
    while process.poll() is None and len(list(tmp_path.glob("copy/*.jpg"))) < 5:
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait(timeout=60) == -signal.SIGKILL, "it ended before it could be killed"
    written = {f: f.read_bytes() for f in tmp_path.glob("copy/*.jpg")}
    assert 5 <= len(written) < 60
    assert set(tree(tmp_path / "copy").values()) == {(250, 250)}
    here(shrink, *options)
    assert len(tree(tmp_path / "copy")) == 60
    assert all(f.read_bytes() == data for f, data in written.items())    # not made again
    assert not list(tmp_path.glob("copy/.*.tmp"))
