"""tests/tools/check.py: toy data is clean, and each fault is found once and with its remedy."""
import json
import multiprocessing
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import here, run
from PIL import Image

import check
import segment
import toy
from models import build_model


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    root = tmp_path_factory.mktemp("clean")
    toy.write_images(root / "images", 80, 80)
    toy.write_segmentation(root / "masks", 32, 16)
    toy.write_videos(root / "videos", 2, 2)
    return root


@pytest.fixture
def copy(clean, tmp_path):
    """Function: a copy of a clean data set."""
    return lambda name: shutil.copytree(clean / name, tmp_path / name)


def tree(root):
    return {str(file): (file.is_file() and file.read_bytes()) for file in root.rglob("*")}


def faults(capsys, *options):
    """What check.py finds -> {fault: number of examples}; all that it prints."""
    workers = ["--workers", 0] * (options[0] != "checkpoint")
    status = here(check, *options, *workers)
    text = capsys.readouterr().out
    found = {name: int(n) for n, name in re.findall(r"^(\d+) x ([^:]+): \w", text, re.M)}
    assert status == bool(found) and found.keys() <= check.FAULTS.keys()
    assert text.endswith(f"stop a run or distort a result: {len(found)}\n")
    return found, text


def save(picture, *files, **options):
    """Write a picture, or that of an array, to files."""
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        picture = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
        picture.save(file, **options)


def noise(seed, size=(40, 60)):
    """A picture that no other one equals, of size (height, width)."""
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def turn(file):
    """Write a picture again as a JPEG of the same pixels that EXIF turns by 90 degrees."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(file).convert("RGB").save(file, "JPEG", exif=exif)


# --------------------------------------------------------------------------------------------------
# Clean data
# --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("options, said", [
    (("pretrain", "--data", "images"), ("training: 80 images, 80 of them readable; PNG RGB: 100 %",
                                        "held out: 80 images")),
    (("finetune", "--data", "images"), ("train: 16 classes: disc_with_bars 5, ", "48 x 48")),
    (("segment", "--data", "masks", "--num-classes", 17, "--zero-is-class"),
     ("training: 17 label numbers, by their share of pixels 0: 5", "validation: 16 images")),
    (("track", "--data", "lasot=videos"),
     ("lasot: 4 sequences, 2 of them of LaSOT's test set; 160 boxes, 0 of them in hidden frames; "
      "160 readable frames, width x height 160 x 120: 100 %",))])
def test_toy_data_has_no_fault_and_nothing_is_written(options, said, clean, capsys, monkeypatch):
    monkeypatch.chdir(clean)
    before = tree(clean)
    found, text = faults(capsys, *options)
    assert not found and all(part in text for part in said), text
    assert tree(clean) == before


@pytest.mark.parametrize("method", ("fork", "forkserver", "spawn"))
def test_every_start_method(method, clean, capsys):
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method(method, force=True)
    try:
        assert here(check, "track", "--data", f"lasot={clean}/videos", "--workers", 1) == 0
    finally:
        multiprocessing.set_start_method(before, force=True)
    assert "160 readable frames" in capsys.readouterr().out


def test_the_command_itself(copy):
    root = copy("images")
    bad = [root / "train/disc_with_bars" / name for name in ("bad 1.png", "bad 2.png")]
    for file in bad:
        file.write_text("none")
    names = root.parent / "names.txt"
    done = run("tests/tools/check.py", "finetune", "--data", root, "--list", names, check=False)
    assert done.returncode == 1 and "2 x unreadable file: replace it" in done.stdout, done.stderr
    assert "Traceback" not in done.stderr and "train:" in done.stderr    # the bar
    assert names.read_text() == "".join(f"{file}\n" for file in bad)


# --------------------------------------------------------------------------------------------------
# Images
# --------------------------------------------------------------------------------------------------
def test_each_fault_of_pre_training_images(tmp_path, capsys):
    for i in range(10):
        save(noise(i), tmp_path / f"train/{i}.png")
    save(noise(0), tmp_path / "train/sub/again.png", tmp_path / "valid/a.png")    # 0 is held out
    save(noise(20, (8, 30)), tmp_path / "train/tiny.png")
    for i in range(7):
        (tmp_path / f"train/broken{i}.jpg").write_text("no image")
    whole = (tmp_path / "train/1.png").read_bytes()
    (tmp_path / "train/cut.png").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "train/notes.txt").write_text("no image")
    found, text = faults(capsys, "pretrain", "--data", tmp_path, "--list", tmp_path / "names")
    assert found == {"unreadable file": 8, "left out by the run": 2, "picture in both sets": 1,
                     "image smaller than a patch of 16 pixels": 1}
    assert "    and 3 more\n" in text and "valid (rename it to val)" in text
    assert "1 files of other types skipped ({'.txt': 1})" in text and "(30 x 8)" in text
    assert f"again.png (as {tmp_path}/train/0.png)" in text
    names = (tmp_path / "names").read_text().split()
    assert len(names) == 8 and f"{tmp_path}/train/cut.png" in names

    (tmp_path / "annotations").mkdir()
    found, text = faults(capsys, "pretrain", "--data", tmp_path)
    assert "annotations beside its images" in text


def test_each_fault_of_classes(tmp_path, capsys):
    for i in range(6):
        save(noise(i), tmp_path / f"train/cat/{i}.png")
        save(noise(10 + i), tmp_path / f"train/dog/{i}.png", tmp_path / f"val/cat/{i}.png")
    save(noise(20), tmp_path / "val/cow/1.png")
    found, text = faults(capsys, "finetune", "--data", tmp_path)
    assert found == {"stops the run at its start": 1, "picture in both sets": 6,
                     "class of fewer than 5 images": 1}
    assert "only one of them has cow, dog" in text and "train: 2 classes: cat 6, dog 6" in text

    (tmp_path / "all").mkdir()
    (tmp_path / "train").rename(tmp_path / "all/train")
    (tmp_path / "all").rename(tmp_path / "train")                           # train/train/cat/0.png
    (tmp_path / "val").rename(tmp_path / "validation")
    (tmp_path / "train/train/cat/0.png").write_text("none")
    found, text = faults(capsys, "finetune", "--data", tmp_path)
    assert found == {"stops the run at its start": 2, "unreadable file": 1}
    assert "has one class, train" in text and "holds train, validation" in text


# --------------------------------------------------------------------------------------------------
# Labels
# --------------------------------------------------------------------------------------------------
def test_each_fault_of_labels(copy, capsys):
    root = copy("masks")
    images, labels = (sorted((root / part / "training").glob("*.png"))
                      for part in ("images", "annotations"))
    labels[0].unlink()
    images[1].unlink()
    pixels = np.asarray(Image.open(labels[2]))
    save(np.stack([pixels] * 3, axis=2), labels[2])                         # colours
    save(pixels, labels[3], format="JPEG")                                  # in a .png
    save(pixels[:40], labels[4])                                            # of another size
    save(noise(5, (48, 30)), images[5])
    save(pixels[:, :30], labels[5])
    turn(images[5])
    high = pixels.copy()
    high[:3] = 200
    save(high, labels[6])
    labels[7].write_bytes(labels[7].read_bytes()[:60])
    images[8].write_text("none")
    save(Image.open(images[9]), root / "images/validation/more.png")
    save(pixels, root / "annotations/validation/more.png")
    options = ("segment", "--data", root, "--zero-is-class", "--num-classes")
    found, text = faults(capsys, *options, 18)
    assert found == {
        "image without labels": 1, "labels without an image": 1, "no file of class numbers": 2,
        "image and labels of different sizes": 2, "number that is no class": 1,
        "unreadable file": 2, "picture in both sets": 1, "class that never occurs": 2}
    for part in (f"{images[0]} (no {labels[0]})", "PNG of mode RGB", "JPEG of mode L",
                 f"{images[4]} (48 x 48, 48 x 40)", f"{labels[6]} (200)",
                 "annotations/training (17)",
                 f"{images[5]} (48 x 30, 30 x 48; EXIF turns the image)"):
        assert part in text, part
    assert faults(capsys, *options, 10)[0]["number that is no class"] > 30


def test_masks_of_0_and_255(tmp_path, capsys):
    mask = np.zeros((40, 60), np.uint8)
    mask[:20] = 255
    for i, split in enumerate(("training", "validation")):
        save(noise(i), tmp_path / f"images/{split}/a.png")
        save(mask, tmp_path / f"annotations/{split}/a.png")
    found, text = faults(capsys, "segment", "--data", tmp_path, "--num-classes", 2,
                         "--zero-is-class")
    assert found == {"labels of fewer than two classes": 2}
    assert "(0, 255 alone)" in text and "write 1 for 255" in text
    assert "2 label numbers, by their share of pixels 0: 50 %, 255: 50 %" in text


# --------------------------------------------------------------------------------------------------
# Boxes
# --------------------------------------------------------------------------------------------------
def rewrite(file, change):
    """Change the rows of a box file, a list of lists of numbers."""
    rows = change(np.loadtxt(file, delimiter=",").tolist())
    file.write_text("".join(",".join(f"{edge:g}" for edge in row) + "\n" for row in rows))


def corners(rows):
    return [[x, y, x + w, y + h] for x, y, w, h in rows]


def test_each_fault_of_videos(copy, capsys):
    root = copy("videos")
    a, b, c, d = sorted(root.iterdir())    # the first two are of the test set
    rewrite(a / "groundtruth.txt", corners)
    odd = [5, 5, 0, 9], [500, 5, 9, 9]
    rewrite(b / "groundtruth.txt", lambda rows: [*rows[:-3], *odd, rows[-1]])
    for name in ("full_occlusion.txt", "out_of_view.txt"):
        (c / name).write_text(",".join("1" * 37 + "0" * 3))
    (d / "img/00000003.jpg").write_text("none")
    (d / "img/00000007.jpg").unlink()
    turn(d / "img/00000009.jpg")
    found, text = faults(capsys, "track", "--data", f"lasot={root}")
    assert found == {
        "boxes are corners x1,y1,x2,y2": 1, "box without a size in a visible frame": 1,
        "box outside its frame": 1, "sequence that is never drawn": 1, "unreadable file": 1,
        "frames and boxes differ in number": 1, "frame turned by EXIF": 1}, text
    for part in (f"{a}/groundtruth.txt\n", f"{b}/groundtruth.txt (1 boxes, the first in line 38)",
                 "00000039.jpg (500,5,9,9)", "(40 frames, 3 with a visible box)",
                 f"39 frames, 40 boxes; there is no {d}/img/00000007.jpg", "37 of them in hidden",
                 "stored 160 x 120, upright 120 x 160"):
        assert part in text, part
    (a / "full_occlusion.txt").unlink()
    (b / "img/00000041.jpg").write_bytes((b / "img/00000040.jpg").read_bytes())
    found, text = faults(capsys, "track", "--data", f"lasot={root},got10k={root}/nothing")
    assert found["unreadable file"] == 2 and "full_occlusion.txt" in text
    assert "41 frames, 40 boxes" in text and "got10k of --data has no annotation file" in text


def test_each_fault_of_coco(tmp_path, capsys):
    for i in range(5):
        save(noise(i), tmp_path / f"train2017/{i}.jpg")
    turn(tmp_path / "train2017/1.jpg")
    boxes = {0: [[5, 5, 20, 20], [50, 5, 58, 20]], 1: [[5, 5, 20, 20]], 2: [[80, 5, 20, 20]],
             3: [[5, 5, 20, 20]], 4: [[30, 20, 55, 38]], 9: [[5, 5, 20, 20]]}
    content = dict(
        images=[dict(id=i, file_name=f"{i}.jpg", width=60, height=40) for i in range(6)],
        annotations=[dict(image_id=i, bbox=box) for i, some in boxes.items() for box in some])
    content["images"][3].update(width=120, height=80)
    content["annotations"] += [dict(image_id=0), dict(image_id=5, bbox=[1, 1, 5, 5])]
    file = tmp_path / "annotations/instances_train2017.json"
    file.parent.mkdir()
    file.write_text(json.dumps(content))
    found, text = faults(capsys, "track", "--data", f"coco={tmp_path}")
    assert found == {"left out by the run": 1, "unreadable file": 1, "frame turned by EXIF": 1,
                     "frame of another size than stated": 1, "box outside its frame": 1,
                     "boxes are corners x1,y1,x2,y2": 1}
    for part in ("2 of 9 annotations skipped", "5.jpg (FileNotFoundError", "2.jpg (80,5,20,20)",
                 "60 x 40, stated 120 x 80", "4.jpg\n", "coco: 6 images; 7 boxes"):
        assert part in text, (part, text)
    file.write_text("{}")
    found, text = faults(capsys, "track", "--data", f"coco={tmp_path}")
    assert found == {"stops the run at its start": 1} and "is no annotation file of COCO" in text


def test_each_fault_of_results(copy, capsys):
    root = copy("videos")
    results = root.parent / "results"
    results.mkdir()
    truths = sorted(root.glob("airplane-*/groundtruth.txt"))
    targets = [results / f"{file.parent.name}.txt" for file in truths]
    options = ("track", "--data", f"lasot={root}", "--results", results)
    for truth, target in zip(truths, targets):
        shutil.copy(truth, target)
    assert not faults(capsys, *options)[0]
    rewrite(targets[0], corners)
    rewrite(targets[1], lambda rows: rows[:-1])
    found, text = faults(capsys, *options)
    assert found == {"result that does not fit": 2}
    assert "convert the boxes; it is as x1,y1,x2,y2" in text and "(39 lines, 40 frames)" in text
    targets[0].unlink()
    assert "is missing: the score will be PARTIAL" in faults(capsys, *options)[1]


# --------------------------------------------------------------------------------------------------
# Checkpoints
# --------------------------------------------------------------------------------------------------
def test_checkpoints(tmp_path, capsys):
    def look(content, *parts):
        torch.save(content, tmp_path / "file.pt")
        found, text = faults(capsys, "checkpoint", tmp_path / "file.pt")
        for part in parts:
            assert part in text, (part, text)
        return found

    model = build_model("vit_pico", num_classes=7, rel_pos_bias=True, img_size=32)
    state = model.state_dict()
    about = dict(arch=model.arch, mean=[0.5] * 3, std=[0.5] * 3)
    assert not look(
        dict(model=state, **about), "kind vit, ", "num_heads 3", "img_size [32, 32]",
        "with relative position bias", "no LayerScale", "dropped: 2 of head\n", "mean [0.5",
        "a classifier over the mean patch token", "--model vit_pico of 3\n",
        "encoder: 162 tensors, 0.3", "loaded 162")
    model = segment.SemanticFPN(build_model("vit_pico"), 5)
    parts = {**model.state_dict(), "teacher.patch_embed.proj.weight": torch.zeros(96, 3, 16, 16)}
    assert not look(dict(model=parts, arch=model.arch), "a model of segment.py", "1 of teacher",
                    "2 of classifier", "15 of pyramid", "encoder: 148 tensors")

    state = build_model("vit_tiny").state_dict()    # as timm names and saves it
    state.update({"head.weight": torch.zeros(7, 192), "head.bias": torch.full((7,), torch.nan),
                  "blocks.0.ls1.gamma": torch.ones(192), "decoder_norm.bias": torch.zeros(9)})
    assert look(
        state, "attention heads: not stored; --model vit_tiny of 12 or deit_tiny of 3",
        "takes ImageNet's", "over the class token", "with LayerScale", "1 of decoder_norm",
        "    head.bias\n"
    ) == {"unknown number of attention heads": 1, "tensor with NaN or infinity": 1}
    state["register_tokens"] = torch.zeros(1, 4, 192)
    assert look(state, "register_tokens is (1, 4, 192) in the file, absent in the model") == {
        "unknown number of attention heads": 1, "tensor with NaN or infinity": 1,
        "stops the run at its start": 1}
    del state["register_tokens"]
    state["pos_embed"] = torch.zeros(1, 11, 192)
    assert "stops the run at its start" in look(state, "also of its image size")
    state["blocks.3.norm1.bias"][0] = torch.inf
    look(state, "blocks.3.norm1.bias is NaN or infinite in the file")
    look({}, "no ViT or Hiera encoder")
