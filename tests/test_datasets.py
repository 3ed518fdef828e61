"""tests/tools/datasets.py: pixels, bytes, classes and splits of all six data sets, read from tiny
files of torchvision's own layouts; a kill at every step; bad input."""
import importlib.util
import itertools
import os
import pickle
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision import datasets as official

sys.path.insert(0, str(Path(__file__).parent / "tools"))
import datasets as tool  # noqa: E402


def start(*options):
    tool.main(tool.parse_args([str(option) for option in options]))


def tree(root):
    """All files of the two splits, hidden ones too, as {path: bytes}."""
    files = [f for split in ("train", "val") for f in sorted((root / split).rglob("*"))]
    return {f.relative_to(root).as_posix(): f.read_bytes() for f in files if f.is_file()}


def save_pictures(folder, names):
    """Write pictures of random size and content -> {name: bytes}."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        rng = np.random.default_rng(list(name.encode()))
        pixels = rng.integers(0, 256, (*rng.integers(8, 12, 2), 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    return {name: (folder / name).read_bytes() for name in names}


def make_cifar(root, monkeypatch, name):
    """Batches of four and two pictures -> {path: pixels}."""
    data = tool.DATASETS[name][0]
    folder = root / data.base_folder
    folder.mkdir()
    key = "labels" if name == "cifar10" else "fine_labels"
    rng = np.random.default_rng(0)
    expected = {}
    for split, kind, batches in (("train", "train_list", 2), ("val", "test_list", 1)):
        for batch in range(batches):
            pixels = rng.integers(0, 256, (2, 3, 32, 32), dtype=np.uint8)
            entry = {"data": pixels.reshape(2, 3072), key: [1, 0]}
            (folder / f"{split}{batch}").write_bytes(pickle.dumps(entry))
            for i, label in enumerate("BA"):    # the second class, then the first one
                expected[f"{split}/{label}/{2 * batch + i:05}.png"] = pixels[i].transpose(1, 2, 0)
        monkeypatch.setattr(data, kind, [[f"{split}{batch}", None] for batch in range(batches)])
    (folder / data.meta["filename"]).write_bytes(pickle.dumps({data.meta["key"]: ["A", "B"]}))
    monkeypatch.setitem(data.meta, "md5", None)
    return expected


def make_flowers(root, monkeypatch):
    io = pytest.importorskip("scipy.io")
    folder = root / "flowers-102"
    names = [f"image_{i:05d}.jpg" for i in range(1, 7)]
    files = save_pictures(folder / "jpg", names)
    io.savemat(folder / "imagelabels.mat", {"labels": np.array([1, 102, 12, 1, 102, 12])})
    io.savemat(folder / "setid.mat", {"trnid": [1, 2], "valid": [4, 3], "tstid": [6, 5]})
    for key in ("label", "setid"):
        file = official.Flowers102._file_dict[key][0]
        monkeypatch.setitem(official.Flowers102._file_dict, key, (file, None))
    folders = ("train/pink primrose", "train/blackberry lily", "train/colt's foot",
               "train/pink primrose", "val/blackberry lily", "val/colt's foot")
    return {f"{folder}/{name}": files[name] for folder, name in zip(folders, names)}


def make_pets(root, monkeypatch=None):
    folder = root / "oxford-iiit-pet"
    (folder / "annotations").mkdir(parents=True)
    expected = {}
    for split, part, first in (("train", "trainval", 1), ("val", "test", 3)):
        rows = [(f"{breed}_{i}", label) for i in (first, first + 1)
                for label, breed in ((2, "american_bulldog"), (1, "Abyssinian"))]
        files = save_pictures(folder / "images", [f"{stem}.jpg" for stem, _ in rows])
        lines = [f"{stem} {label} 1 1\n" for stem, label in rows]
        (folder / f"annotations/{part}.txt").write_text("".join(lines))
        for stem, label in rows:
            breed = ("Abyssinian", "American Bulldog")[label - 1]
            expected[f"{split}/{breed}/{stem}.jpg"] = files[f"{stem}.jpg"]
    return expected


def make_aircraft(root, monkeypatch=None):
    """Two variants differ by nothing but a slash."""
    folder = root / "fgvc-aircraft-2013b/data"
    folders = {"F/A-18": "F_A-18", "F_A-18": "F_A-18_", "DHC-8-100": "DHC-8-100"}
    expected = {}
    for split, part, first in (("train", "trainval", 10), ("val", "test", 20)):
        files = save_pictures(folder / "images", [f"00{first + i}.jpg" for i in range(3)])
        rows = list(zip(files, folders))
        lines = [f"{name[:-4]} {variant}\n" for name, variant in rows]
        (folder / f"images_variant_{part}.txt").write_text("".join(lines))
        for name, variant in rows:
            expected[f"{split}/{folders[variant]}/{name}"] = files[name]
    (folder / "variants.txt").write_text("".join(f"{variant}\n" for variant in folders))
    return expected


def make_cars(root, monkeypatch):
    io = pytest.importorskip("scipy.io")
    folder = root / "stanford_cars"
    (folder / "devkit").mkdir(parents=True)
    classes = ["Audi R8 Coupe 2012", "Ram C/V Cargo Van Minivan 2012"]
    io.savemat(folder / "devkit/cars_meta.mat", {"class_names": np.array(classes, object)})
    expected = {}
    for split, part, labels, path in (("train", "train", (2, 1), "devkit/cars_train_annos.mat"),
                                      ("val", "test", (1, 2), "cars_test_annos_withlabels.mat")):
        files = save_pictures(folder / f"cars_{part}", ["00001.jpg", "00002.jpg"])
        rows = np.array(list(zip(files, labels)), [("fname", object), ("class", np.uint8)])
        io.savemat(folder / path, {"annotations": rows})
        for name, label in zip(files, labels):
            expected[f"{split}/{classes[label - 1].replace('/', '_')}/{name}"] = files[name]
    return expected


MAKE = {"flowers": make_flowers, "pets": make_pets, "aircraft": make_aircraft, "cars": make_cars}


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_becomes_png_of_the_same_pixels(tmp_path, monkeypatch, name):
    expected = make_cifar(tmp_path, monkeypatch, name)
    out = tmp_path / "out"
    start(name, out, "--source", tmp_path)
    assert tree(out).keys() == expected.keys() and len(expected) == 6
    for file, pixels in expected.items():
        assert np.array_equal(np.asarray(Image.open(out / file)), pixels)


@pytest.mark.parametrize("name", MAKE)
def test_files_are_copied_into_their_class_and_split(tmp_path, monkeypatch, capsys, name):
    expected = MAKE[name](tmp_path, monkeypatch)
    out = tmp_path / "data/out"
    start(name, out, "--source", tmp_path)
    assert tree(out) == expected
    val = sum(file.startswith("val/") for file in expected)
    said = f"{len(expected) - val} training images, {val} test images"
    assert said in capsys.readouterr().out
    shutil.rmtree(tmp_path / tool.DATASETS[name][1])
    start(name, out)    # needs neither the source nor the network
    assert "is complete already" in capsys.readouterr().out and tree(out) == expected


# ---- kill and resume ----
def serve(monkeypatch, archive):
    """Let torchvision download the aircraft from a folder, file by file, into place."""
    def extract(url, root):
        for file in sorted(archive.rglob("*.*")):
            target = Path(root, file.relative_to(archive))
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)

    module = sys.modules[official.FGVCAircraft.__module__]
    monkeypatch.setattr(module, "download_and_extract_archive", extract)


def killed(step, out):
    """Run the tool in a process that kills itself before its access `step` to the file system; if
    a file was just written, only half of it. Return whether the run was killed."""
    child = os.fork()
    if child == 0:
        steps = itertools.count()
        latest = []    # files opened for writing

        def hook(event, values):
            opened = event == "open" and isinstance(values[0], (str, os.PathLike))
            if not opened and event not in ("os.rename", "os.mkdir", "os.rmdir", "os.remove"):
                return
            if next(steps) == step:
                for file in latest[-1:]:
                    if os.path.exists(file):
                        os.truncate(file, os.path.getsize(file) // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            if event == "os.rename":
                latest.clear()
            elif opened and values[1] and "w" in values[1]:
                latest.append(values[0])

        sys.addaudithook(hook)    # of this process alone
        try:
            start("aircraft", out)
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL)
    return status != 0


def test_a_run_killed_at_any_step_resumes_to_the_same_files(tmp_path, monkeypatch):
    expected = make_aircraft(tmp_path / "archive")
    serve(monkeypatch, tmp_path / "archive")
    again = tmp_path / "again"    # killed again and again
    for step in itertools.count():
        out = tmp_path / f"out{step}"
        if not killed(step, out):
            break
        if (out / "train").exists():
            assert tree(out) == expected, "train is there, but not all files are"
        start("aircraft", out)
        assert tree(out) == expected
        assert not (out / ".aircraft/scratch").exists()
        shutil.rmtree(out)
        if step % 3 == 0:
            killed(step % 40, again)
    assert step > 60
    start("aircraft", again)
    assert tree(again) == expected


# ---- bad input ----
def refused(message, *options):
    with pytest.raises(SystemExit) as error:
        start(*options)
    assert message in error.value.code and "\n" not in error.value.code


def test_bad_input_ends_in_one_sentence(tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as error:
        start("imagenet", out)
    assert error.value.code == 2 and "cifar10" in capsys.readouterr().err
    refused("must hold a complete cifar-10-batches-py", "cifar10", out, "--source", tmp_path)
    refused("(Dataset not found):", "pets", out, "--source", tmp_path)
    make_pets(tmp_path)
    (tmp_path / "file").write_text("")
    refused("is a file: give a folder", "pets", tmp_path / "file", "--source", tmp_path)
    (tmp_path / "oxford-iiit-pet/images/Abyssinian_4.jpg").rename(tmp_path / "Abyssinian_4.jpg")
    refused("Abyssinian_4.jpg'", "pets", out, "--source", tmp_path)
    assert not (out / "train").exists() and not (out / "val").exists()
    (tmp_path / "Abyssinian_4.jpg").rename(tmp_path / "oxford-iiit-pet/images/Abyssinian_4.jpg")
    start("pets", out, "--source", tmp_path)
    refused("belongs to pets", "aircraft", out, "--source", tmp_path)
    (tmp_path / "mine/train").mkdir(parents=True)
    refused("was not written by this tool", "pets", tmp_path / "mine", "--source", tmp_path)
    (tmp_path / "oxford-iiit-pet/annotations/test.txt").write_text("Abyssinian_4 1\n")
    refused("pets cannot be read", "pets", tmp_path / "new", "--source", tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refused("pip install scipy", "flowers", out)


def test_what_cannot_be_downloaded_says_where_it_comes_from(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("no route to host\nmore")

    module = sys.modules[official.FGVCAircraft.__module__]
    monkeypatch.setattr(module, "download_and_extract_archive", fail)
    out = tmp_path / "out"
    refused("cannot be downloaded (no route to host)", "aircraft", out)
    assert not list(out.iterdir()), "the folder may be used for another data set"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    refused("pytorch/vision/issues/7545", "cars", out)
