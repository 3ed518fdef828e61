"""finetune.py: golden numbers, augmentation, data, published classifiers, and real runs on a few
small pictures."""
import argparse
import math
import os
import re
import shutil
import time
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (check_kill_and_resume, here, rel_error, run, same_weights, seed_weights,
                      seeded, state_of)
from PIL import Image, ImageEnhance, ImageOps
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import functional as official

import finetune
import models
import toy
from models import InputError, build_model, read_log

QUICK = ["--model", "vit_pico", "--image-size", 32, "--device", "cpu", "--workers", 0]
PLAIN = ["--recipe", "improved", "rand_augment=0", "mixup=0", "--batch-size", 8, "--epochs", 2]
SINGLE = (0, 1, torch.device("cpu"), torch.float32)


def resolved(*values):
    """Options of a run with the defaults of its recipe."""
    return finetune.resolve(finetune.parse_args([str(value) for value in values]))


def classifier(*values, classes=5):
    return finetune.build_classifier(resolved(*values), classes)


def items(folder, split="train"):
    """Files and labels of a split."""
    return finetune.list_split(folder, split, None)[:2]


def dataset(folder, seed=0, magnitude=10.0, fill=(124, 116, 104)):
    prepare = partial(finetune.augment, size=(32, 32), min_crop=0.08, magnitude=magnitude,
                      fill=fill)
    return finetune.LabelledImages(*items(folder), prepare, seed)


def cropped(files, labels, size=(32, 32)):
    return finetune.LabelledImages(files, labels, partial(finetune.centre_crop, size=size))


def held_out(folder):
    return cropped(*items(folder, "val"))


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """train/ (6 classes of 4) and val/ (7 images, an odd number) of drawings in several sizes."""
    root = tmp_path_factory.mktemp("pictures")
    for split, number in (("train", 24), ("val", 7)):
        for i in range(number):
            target = root / split / f"class {i % 6}"
            target.mkdir(parents=True, exist_ok=True)
            image = toy.picture(toy.HELD_OUT * (split == "val") + i, size=(30 + i, 40))[0]
            Image.fromarray(image).save(target / f"{i}.png")
    return root


@pytest.fixture(scope="session")
def encoder(tmp_path_factory):
    """A ViT of 48 channels, saved as `pretrain_d2mae.py` saves its encoder, with another mean."""
    torch.manual_seed(0)
    model = build_model("vit_pico", img_size=32, patch_size=8)
    path = tmp_path_factory.mktemp("pretrained") / "encoder.pt"
    torch.save(dict(model=model.state_dict(), arch=model.arch, mean=[0.4, 0.5, 0.6], std=[0.2] * 3),
               path)
    return path


@pytest.fixture(scope="session")
def trained(folder, tmp_path_factory):
    """Folder of a finished run from scratch: two epochs of three steps of 8 images."""
    out = tmp_path_factory.mktemp("trained")
    here(finetune, "--data", folder, "--out", out, *QUICK, *PLAIN)
    return out


@pytest.fixture
def copied(folder, tmp_path):
    """A copy of the folder to break."""
    shutil.copytree(folder, tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture
def copied_run(trained, tmp_path):
    """A copy of the finished run."""
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def refused(words, *values):
    with pytest.raises(InputError, match=words):
        here(finetune, *QUICK, *values)


def evaluations(out):
    return [line for line in read_log(out / "log.jsonl") if "top1" in line]


def test_training_leaves_a_classifier_and_a_log(trained):
    file = state_of(trained / "classifier.pt")
    assert file["classes"] == [f"class {k}" for k in range(6)] and file["epoch"] == 2
    last = state_of(trained / "last.pt")
    assert all(torch.equal(file["model"][k], last["model"][k]) for k in last["model"])
    assert "optimizer" not in file and not (trained / "best.pt").exists()
    lines = evaluations(trained)
    assert [(line["epoch"], line["step"]) for line in lines] == [(1, 3), (2, 6)]
    first = read_log(trained / "log.jsonl")[0]
    assert first["train_images"] == 24 and first["classes"] == file["classes"]
    assert first["args"]["data_fraction"] == 1 and first["args"]["seed"] == 0


class Frozen(argparse.Namespace):
    def __setattr__(self, name, value):
        raise AssertionError(f"args.{name} is written to")


def test_nobody_writes_to_args(folder, encoder, tmp_path, monkeypatch):
    resolve = finetune.resolve

    def frozen(args):
        result = Frozen()
        vars(result).update(vars(args))
        return result

    monkeypatch.setattr(finetune, "resolve", lambda args: frozen(resolve(args)))
    here(finetune, "--data", folder, "--out", tmp_path, "--init", encoder, *QUICK[2:], *PLAIN)
    job = ["--out", tmp_path, "--eval", "--predict", folder / "val", *QUICK[4:]]
    finetune.main(frozen(finetune.parse_args([str(value) for value in job])))


# ---- golden numbers ----
CLASSIFIERS = {"vit_tiny": [], "vit_tiny_rpe": ["--rpe"], "hiera_tiny": ["--model", "hiera_tiny"]}


@pytest.mark.parametrize("key", CLASSIFIERS)
def test_classifiers_match_the_reference(golden, key):
    model = seed_weights(classifier(*CLASSIFIERS[key], classes=1000))
    with torch.no_grad():
        logits = model(seeded((2, 3, 224, 224), "images"))
    assert rel_error(logits[:, :32], golden[f"{key}/logits"]) < 1e-4
    assert sum(p.numel() for p in model.parameters()) == golden[f"{key}/params"]


def test_relative_positions_match_the_reference(golden):
    model = classifier("--rpe")
    key = "vit_tiny_rpe"
    index = model.blocks[3].attn.index
    assert np.array_equal(index[:20, :20], golden[f"{key}/index_corner"])
    assert index.sum() == golden[f"{key}/index_sum"]
    tables = [block.attn.relative_position_bias_table for block in model.blocks]
    assert all(len(table) == golden[f"{key}/table_rows"] for table in tables)


def test_schedule_matches_the_reference(golden):
    steps = golden["finetune/lr_steps"].tolist()
    rates = [finetune.lr_at(step, 3000, 50, 4e-3, 1e-6) for step in steps]
    assert np.allclose(rates, golden["finetune/lr"], rtol=1e-6, atol=0)


def layers_of(optimizer):
    """-> layer of each parameter: the learning rate grows from layer to layer."""
    scales = sorted({group["lr_scale"] for group in optimizer.param_groups})
    return {id(p): scales.index(group["lr_scale"]) for group in optimizer.param_groups
            for p in group["params"]}


def test_layer_decay_matches_the_reference(golden):
    args = resolved()
    optimizer = finetune.build_optimizer(build_model(num_classes=10), args, 1e-3)
    scales = sorted({group["lr_scale"] for group in optimizer.param_groups})
    assert np.allclose(scales, golden["finetune/layer_scale_vit_tiny_0.85"], rtol=1e-6)


def test_every_parameter_is_in_the_group_of_its_layer():
    model = build_model(num_classes=10)
    layer_of = layers_of(finetune.build_optimizer(model, resolved(), 1e-3))
    names = {name: layer_of[id(p)] for name, p in model.named_parameters()}
    assert len(layer_of) == len(names)
    assert names["pos_embed"] == names["cls_token"] == names["patch_embed.proj.weight"] == 0
    assert names["blocks.0.norm1.weight"] == 1
    assert names["blocks.11.mlp.fc2.bias"] == 12
    assert names["head.weight"] == names["fc_norm.bias"] == 13


def test_sgd_is_nesterov_s_as_the_authors_build_it():
    model = build_model("vit_pico", img_size=32, num_classes=5)
    optimizer = finetune.build_optimizer(model, resolved("--recipe", "cifar"), 0.1)
    assert isinstance(optimizer, torch.optim.SGD)
    assert optimizer.defaults["nesterov"] and optimizer.defaults["momentum"] == 0.9


@pytest.mark.parametrize("keep", [None, 6])
def test_models_with_relative_positions_start_as_those_of_beit(encoder, keep):
    """All of a model from scratch, and the blocks that --keep-blocks leaves out."""
    torch.manual_seed(0)
    start = ["--init", encoder, "--keep-blocks", keep] if keep else ["--model", "vit_pico"]
    model = classifier("--rpe", "--image-size", 32, *start).requires_grad_(False)
    for k, block in enumerate(model.blocks, start=1):
        if k <= (keep or 0):
            source = state_of(encoder)["model"][f"blocks.{k - 1}.mlp.fc2.weight"]
            assert torch.equal(block.mlp.fc2.weight, source)
            continue
        assert block.attn.qkv.weight.std() == pytest.approx(0.02, rel=0.2)
        for branch_end in (block.attn.proj, block.mlp.fc2):
            assert branch_end.weight.std() == pytest.approx(0.02 / math.sqrt(2 * k), rel=0.2)
    assert model.head.weight.std() < 1e-4


# ---- augmentation ----
def textured_image():
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(20, 220, (12, 10, 3), dtype=np.uint8))
    return image.resize((40, 48), Image.Resampling.BICUBIC)


def expected_operations(x, m, fill):
    """Each operation of RandAugment at a signed level m, in Pillow's own words."""
    bicubic = dict(resample=Image.Resampling.BICUBIC, fillcolor=fill)
    factor = {0: 1.0, 5: 1.45, 10: 1.9, -5: 0.55, -10: 0.1}[m]
    bits = {0: 4, 5: 2, 10: 0}[abs(m)]
    threshold = {0: 256, 5: 128, 10: 0}[abs(m)]
    added = {0: 0, 5: 55, 10: 110}[abs(m)]
    pixels = np.array(x, dtype=int)
    brighter = np.where(pixels < 128, np.minimum(255, pixels + added), pixels)
    shear = {0: 0, 5: 0.15, 10: 0.3, -5: -0.15, -10: -0.3}[m]
    shift = {0: 0, 5: 0.225, 10: 0.45, -5: -0.225, -10: -0.45}[m]

    def affine(*coefficients):
        return x.transform(x.size, Image.Transform.AFFINE, coefficients, **bicubic)

    return {
        "AutoContrast": ImageOps.autocontrast(x), "Equalize": ImageOps.equalize(x),
        "Invert": ImageOps.invert(x), "Rotate": x.rotate(3 * m, **bicubic),
        "Posterize": Image.fromarray((pixels & (256 - 2 ** (8 - bits))).astype(np.uint8)),
        "Solarize": ImageOps.solarize(x, threshold),
        "SolarizeAdd": Image.fromarray(brighter.astype(np.uint8)),
        "Color": ImageEnhance.Color(x).enhance(factor),
        "Contrast": ImageEnhance.Contrast(x).enhance(factor),
        "Brightness": ImageEnhance.Brightness(x).enhance(factor),
        "Sharpness": ImageEnhance.Sharpness(x).enhance(factor),
        "ShearX": affine(1, shear, 0, 0, 1, 0), "ShearY": affine(1, 0, 0, shear, 1, 0),
        "TranslateX": affine(1, 0, shift * 40, 0, 1, 0),
        "TranslateY": affine(1, 0, 0, 0, 1, shift * 48)}


@pytest.mark.parametrize("level", [0, 5, 10, -5, -10])
def test_rand_augment_is_timm_s_on_pillow_images(level):
    image = textured_image()
    expected = expected_operations(image, level, (9, 8, 7))
    assert set(expected) == set(finetune.RAND_AUGMENT) and len(expected) == 15
    for name, operation in finetune.RAND_AUGMENT.items():
        got = np.array(operation(image, level, (9, 8, 7)), dtype=int)
        assert abs(got - np.array(expected[name], dtype=int)).max() <= 1, name
        assert level == 0 or (got != np.array(image)).any(), name


@pytest.mark.parametrize("name, level, value", [("Solarize", 9.9, 3), ("Posterize", 9.9, 1)])
def test_rand_augment_rounds_down(name, level, value):
    image = textured_image()
    exact = {"Solarize": ImageOps.solarize, "Posterize": ImageOps.posterize}[name](image, value)
    got = finetune.RAND_AUGMENT[name](image, level, (0, 0, 0))
    assert np.array_equal(np.array(got), np.array(exact))


def test_rand_augment_draws(monkeypatch):
    levels = []

    def note(image, level, fill):
        levels.append(level)
        return image

    monkeypatch.setattr(finetune, "RAND_AUGMENT", {"note": note})
    torch.manual_seed(0)
    for _ in range(1000):
        finetune.rand_augment(textured_image(), 9, (0, 0, 0))
    levels = np.array(levels)
    assert 930 < len(levels) < 1070    # two operations, each with probability 1/2
    size = abs(levels)
    assert size.max() <= 10 and abs(np.median(size) - 9) < 0.06 and 0.4 < size.std() < 0.55
    assert 0.45 < (levels > 0).mean() < 0.55


def test_training_images_are_rand_augmented_with_the_mean_as_fill(monkeypatch, folder):
    monkeypatch.setattr(finetune, "RAND_AUGMENT",
                        {"fill": lambda x, m, fill: Image.new("RGB", x.size, fill)})
    args = resolved("--data", folder, "--batch-size", 8, "--workers", 0)
    model = SimpleNamespace(mean=(0.2, 0.4, 0.6), img_size=(32, 32))
    data = finetune.build_loaders(args, model, items(folder), None, SINGLE)[0].dataset
    pixels = {tuple(data[0, i][0][:, 0, 0].tolist()) for i in range(20)}
    assert (51, 102, 153) in pixels and len(pixels) > 1
    plain = dataset(folder, fill=(51, 102, 153), magnitude=0)
    for data in (plain, held_out(folder)):
        assert (51, 102, 153) not in {tuple(data[0, i][0][:, 0, 0].tolist()) for i in range(7)}


def test_random_erasing():
    torch.manual_seed(0)
    images = torch.full((400, 3, 32, 24), 7.0)
    finetune.random_erasing(images, 0.25)
    erased = (images != 7).all(dim=1)
    hit = erased.flatten(1).any(dim=1)
    assert 0.18 < hit.float().mean() < 0.32
    for mask in erased[hit]:
        rows, columns = mask.any(dim=1), mask.any(dim=0)
        assert mask.sum() == rows.sum() * columns.sum()    # a full rectangle
        assert 0.01 < mask.float().mean() < 0.4
    noise = images.permute(0, 2, 3, 1)[erased]
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02


@pytest.mark.parametrize("batch", [1, 3, 4])
@pytest.mark.parametrize("mixup, cutmix", [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_mixing_and_its_loss(batch, mixup, cutmix):
    """Pixels and targets are mixed in the same share, and the loss is the written-out one."""
    torch.manual_seed(batch)
    args = resolved("--recipe", "mae", f"mixup={mixup}", f"cutmix={cutmix}")
    mixing = finetune.build_mixing(args.mixup, args.cutmix, 5)
    labels = torch.arange(batch)
    images = labels.float()[:, None, None, None].expand(batch, 3, 8, 8).contiguous()
    mixed, targets = mixing(images, labels)
    assert torch.allclose(targets.sum(dim=1), torch.ones(batch))
    mean_label = (targets * torch.arange(5)).sum(dim=1)
    assert torch.allclose(mixed.mean(dim=(1, 2, 3)), mean_label, atol=1e-5)
    logits = torch.randn(batch, 5)
    expected = 0.0
    for i in range(batch):
        norm = math.log(sum(math.exp(v) for v in logits[i].tolist()))
        for k in range(5):
            target = 0.9 * targets[i, k].item() + 0.1 / 5
            expected -= target * (logits[i, k].item() - norm) / batch
    loss = F.cross_entropy(logits, targets, label_smoothing=args.smoothing)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_posterize_keeps_no_bit_at_the_strongest_level():
    assert np.array(finetune.RAND_AUGMENT["Posterize"](textured_image(), 10, (0, 0, 0))).max() == 0


def test_without_mixing_labels_stay_labels():
    mixing = finetune.build_mixing(0, 0, 5)
    images, labels = mixing(torch.randn(3, 3, 8, 8), torch.arange(3))
    assert labels.tolist() == [0, 1, 2]


def first_gradient(folder, out, *changes):
    """Gradient norm of one training step on all 24 images by the improved recipe with changes."""
    here(finetune, "--data", folder, "--out", out, *QUICK, "--epochs", 1, "--batch-size", 24,
         "--recipe", "improved", "rand_augment=0", "mixup=0", *changes)
    return read_log(out / "log.jsonl")[1]["grad_norm"]


def test_each_part_of_a_recipe_reaches_the_training_step(folder, tmp_path):
    parts = ("erasing=1", "mixup=0.8", "cutmix=1", "rand_augment=9", "smoothing=0.1", "min_crop=1")
    found = {part: first_gradient(folder, tmp_path / part, part) for part in parts}
    plain = [first_gradient(folder, tmp_path / name) for name in "ab"]
    assert len({*found.values(), *plain}) == len(parts) + 1 and plain[0] == plain[1]


# ---- data ----
def test_less_data_is_a_part_of_more():
    labels = torch.arange(60) % 3
    two, five, half, everything = (set(finetune.select(labels, share, shots, 1).tolist())
                                   for share, shots in ((1, 2), (1, 5), (0.5, None), (1, None)))
    assert two < five < half < everything == set(range(60))
    assert [sum(i % 3 == k for i in five) for k in range(3)] == [5, 5, 5]
    kept = finetune.select(labels, 1, 5, 2).tolist()
    assert set(kept) != five and kept == sorted(kept)
    assert finetune.select(labels, 0.5, None, 7).tolist()[:9] == [1, 2, 3, 6, 11, 12, 13, 18, 19]


def test_hidden_files_are_no_data_and_all_types_of_images_count(copied):
    image = Image.new("RGB", (9, 9), "red")
    for name in ("a.gif", "b.jfif", "c.webp", "._d.png"):
        image.save(copied / "train/class 0" / name, format="GIF" if name == "a.gif" else "PNG")
    (copied / "train/class 0/notes.txt").write_text("no image")
    for split in ("train", "val"):
        (copied / split / ".ipynb_checkpoints").mkdir()
        image.save(copied / split / ".ipynb_checkpoints" / "x.png")
    files, labels, classes = finetune.list_split(copied, "train", None)
    assert len(files) == 27 and classes == [f"class {k}" for k in range(6)]
    assert labels.bincount().tolist() == [7, 4, 4, 4, 4, 4]
    assert all(f"/class {label}/" in file for file, label in zip(files, labels))
    data = dataset(copied)
    assert data[0, 0][0].shape == (3, 32, 32)
    assert isinstance(data.files, models.Names) and torch.is_tensor(data.labels)    # shared


def test_what_a_run_writes_is_no_data_and_classes_are_the_first_folders(copied):
    out = copied / "train/out"
    deep = copied / "train/class 1/deep"
    for place in (out, deep):
        place.mkdir()
        Image.new("RGB", (9, 9)).save(place / "picture.png")
    files, labels, classes = finetune.list_split(copied, "train", out)
    assert classes == [f"class {k}" for k in range(6)]
    assert labels[list(files).index(str(deep / "picture.png"))] == 1


def test_wrong_folders_end_in_a_sentence(copied, tmp_path, monkeypatch):
    out = ["--out", tmp_path]
    refused("no folder train: it must hold train/CLASS/.*holds nothing", "--data", "none")
    refused("no folder train: it must hold train/CLASS/.* and holds class 0, class 1", "--data",
            copied / "train", *out)
    monkeypatch.chdir(copied / "val")
    refused(f"--data {copied}/val has no folder train", "--data", ".", *out)
    (copied / "val" / "class 3").rename(copied / "val" / "other")
    refused("not the same: only one of them has class 3, other", "--data", copied, *out)
    (copied / "val" / "other").rename(copied / "val" / "class 3")
    shutil.copy(copied / "train/class 0/0.png", copied / "val")
    refused("val holds images outside of class folders.*valprep.sh", "--data", copied,
            *out)
    (copied / "val").rename(copied / "valid")
    refused("no folder val: .* holds train, valid", "--data", copied, *out)


def test_one_class_names_the_folder_that_was_meant(copied, tmp_path):
    for split in ("train", "val"):
        (copied / split).rename(copied / "images")
        (copied / split).mkdir()
        (copied / "images").rename(copied / split / "images")
    refused(f"train has one class, images: .* those of {copied}/train/images are meant", "--data",
            copied, "--out", tmp_path)


def test_items_depend_on_seed_epoch_and_index_alone(folder):
    keys = [[(0, 3), (0, 4)], [(1, 3), (0, 3)]]
    data = dataset(folder)
    (a, _), (b, labels) = DataLoader(data, batch_sampler=keys, num_workers=1)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    assert torch.equal(a[0], data[0, 3][0]) and torch.equal(a[0], b[1])
    assert torch.equal(before, torch.get_rng_state())    # the process's generator is left alone
    assert not torch.equal(a[0], b[0]) and labels.dtype == torch.int64
    assert not torch.equal(a[0], dataset(folder, seed=1)[0, 3][0])


@pytest.mark.parametrize("size, shorter", [(224, 256), (384, 438)])
def test_test_images_are_the_authors(size, shorter):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (450, 600, 3), dtype=np.uint8))
    resized = image.resize((int(shorter * 600 / 450), shorter), Image.Resampling.BICUBIC)
    top = round((shorter - size) / 2)
    left = round((resized.width - size) / 2)
    expected = resized.crop((left, top, left + size, top + size))
    got = finetune.centre_crop(image, (size, size))
    assert torch.equal(got, official.pil_to_tensor(expected))
    turned = image.rotate(90, expand=True)
    for picture in (image, turned):    # bit for bit what torchvision gives
        resized = official.resize(picture, [shorter], finetune.BICUBIC)
        expected = official.pil_to_tensor(official.center_crop(resized, [size, size]))
        assert torch.equal(finetune.centre_crop(picture, (size, size)), expected)


@pytest.mark.parametrize("size", [(128, 256), (256, 128), (96, 64)])
def test_a_picture_of_the_crop_s_shape_is_tested_on_49_64ths_of_its_area(size):
    h, w = size
    y, x = np.mgrid[:2 * h, :2 * w]
    pixels = np.stack([255 * y / (2 * h), 255 * x / (2 * w), 0 * x], axis=2)
    image = Image.fromarray(pixels.astype(np.uint8))
    crop = finetune.centre_crop(image, size).int().numpy()
    assert crop.shape == (3, h, w)
    for axis in (0, 1):
        shown = np.ptp(crop[axis]) / 255
        assert shown == pytest.approx(224 / 256, abs=0.03)
    torch.manual_seed(0)    # training sees as much: a crop of all of the area is the whole picture
    crop = models.random_crop(image, size, (0.99, 1)).int().numpy()
    assert crop.shape == (3, h, w) and all(np.ptp(crop[axis]) > 215 for axis in (0, 1))


# ---- options ----
@pytest.mark.parametrize("key", ["epochs", "warmup_epochs", "batch_size", "base_lr", "min_lr",
                                 "weight_decay", "layer_decay", "clip_grad", "drop_path",
                                 "smoothing", "rand_augment", "mixup", "cutmix", "erasing"])
def test_recipes_are_those_of_the_paper(key):
    paper = dict(epochs=(300, 100, 50), warmup_epochs=(5, 5, 10), batch_size=(1024, 1024, 512),
                 base_lr=(1e-3, 1e-3, 0.05), min_lr=(1e-6,) * 3, weight_decay=(0.05, 0.05, 0),
                 layer_decay=(0.85, 0.85, 0.75), clip_grad=(0, 0, 1), drop_path=(0, 0.1, 0),
                 smoothing=(0, 0.1, 0), rand_augment=(10, 9, 0), mixup=(0.2, 0.8, 0),
                 cutmix=(0, 1, 0), erasing=(0, 0.25, 0))
    recipes = ("improved", "mae", "cifar")
    runs = [resolved("--recipe", name) for name in recipes]
    assert tuple(getattr(args, key) for args in runs) == paper[key]


def test_an_option_or_a_change_overrides_the_recipe_zero_included():
    args = resolved("--recipe", "mae", "mixup=0", "--epochs", 7)
    assert (args.epochs, args.mixup, args.cutmix, args.recipe) == (7, 0, 1, "mae")
    args = resolved("--recipe", "mae", "epochs=3", "batch_size=64", "optimizer=sgd", "clip_grad=2",
                    "warmup_epochs=0.5", "--clip-grad", 0)
    assert (args.epochs, args.batch_size, args.optimizer) == (3, 64, "sgd")
    assert (args.clip_grad, args.warmup_epochs) == (0, 0.5)


def test_small_data_sets_have_recipes():
    args = resolved("--recipe", "flowers")
    assert (args.epochs, args.warmup_epochs, args.base_lr) == (150, 30, 0.015)
    args = resolved("--recipe", "small")
    assert (args.epochs, args.warmup_epochs, args.base_lr, args.optimizer) == (100, 20, 0.015,
                                                                               "sgd")


def test_warmup_not_given_shrinks_with_the_run():
    assert resolved("--recipe", "cifar", "--epochs", 10).warmup_epochs == 2
    assert resolved("--recipe", "cifar", "epochs=10").warmup_epochs == 2
    assert resolved("--rpe", "--epochs", 1000).warmup_epochs == 5
    assert [finetune.lr_at(step, 100, 0.3, 1, 0) for step in (0, 100)] == [0, 0]    # below a step


BAD_OPTIONS = [
    ("fewer than --epochs 5", ["--warmup-epochs", 5, "--epochs", 5]),
    ("not a multiple of 16", ["--image-size", 40]),
    ("does not exist", ["--init", "none.pt"]),
    ("--keep-blocks 0 keeps blocks of a pre-trained encoder: give --init", ["--keep-blocks", 0]),
    ("defined for ViT", ["--model", "hiera_tiny", "--rpe", "--image-size", 32]),
    ("no effect on hiera_tiny", ["--model", "hiera_tiny", "--patch-size", 8]),
    ("multiple of .* = 20", ["--accum-steps", 20, "--batch-size", 30])]


@pytest.mark.parametrize("words, values", BAD_OPTIONS)
def test_options_that_make_no_sense_are_told_before_the_work(folder, tmp_path, words, values):
    refused(words, "--data", folder, "--out", tmp_path, *values)


def test_an_encoder_of_fewer_blocks_than_are_to_be_kept_is_refused(encoder):
    with pytest.raises(InputError, match="give --init FILE, of 13 blocks or more"):
        classifier("--init", encoder, "--keep-blocks", 13)


@pytest.mark.parametrize("words, values", [
    ("takes one recipe, not cifar and mae", ["--recipe", "cifar", "mae"]),
    ("[0, 10]", ["--recipe", "improved", "rand_augment=15"]),
    ("[0, 1]", ["--recipe", "improved", "smoothing=1.5"]),
    ("height and width", ["--image-size", "32", "32", "32"]),
    ("[1, inf]", ["--recipe", "improved", "epochs=0"]),
    ("adamw or sgd", ["--recipe", "improved", "optimizer=adam"]),
    ("neither a recipe", ["--recipe", "best"]),
    ("[0, 4294967295]", ["--seed", "5000000000"]),
    ("[0, 1]", ["--data-fraction", "1.5"])])
def test_values_out_of_range_end_in_a_sentence(capsys, words, values):
    with pytest.raises(SystemExit):
        finetune.parse_args(values)
    assert words in capsys.readouterr().err


# ---- hand-over ----
def test_size_model_and_colours_come_from_the_encoder(encoder):
    model = classifier("--init", encoder)
    assert (model.embed_dim, model.img_size, model.patch_size) == (48, (32, 32), 8)
    assert model.mean == (0.4, 0.5, 0.6) and model.arch["num_heads"] == 3
    assert classifier("--init", encoder, "--mean", 0.1, 0.2, 0.3).mean == (0.1, 0.2, 0.3)


@pytest.mark.parametrize("keep", [None, 0, 5, 12])
def test_pretrained_weights_arrive_whole_or_by_blocks(encoder, keep):
    torch.manual_seed(1)
    blocks = [] if keep is None else ["--keep-blocks", keep]
    model = classifier("--init", encoder, *blocks).state_dict()
    source = state_of(encoder)["model"]
    for k in range(12):
        name = f"blocks.{k}.mlp.fc1.weight"
        assert torch.equal(model[name], source[name]) == (keep is None or k < keep)
    assert torch.equal(model["patch_embed.proj.weight"], source["patch_embed.proj.weight"])


def test_the_final_norm_is_that_of_supervised_files_alone(encoder, trained, tmp_path):
    file = state_of(encoder)
    file["model"]["norm.weight"] += 1
    torch.save(file, tmp_path / "encoder.pt")
    assert (classifier("--init", tmp_path / "encoder.pt").fc_norm.weight == 1).all()
    file["model"]["head.weight"] = torch.zeros(9, 48)    # a classifier with a class token
    torch.save(file, tmp_path / "deit.pt")
    assert (classifier("--init", tmp_path / "deit.pt").fc_norm.weight == 2).all()
    norm = state_of(trained / "classifier.pt")["model"]["fc_norm.weight"]
    assert torch.equal(classifier("--init", trained / "classifier.pt").fc_norm.weight, norm)


def test_an_encoder_that_does_not_fit_is_refused(encoder, folder, tmp_path):
    file = state_of(encoder)
    file["arch"]["num_heads"] = 1
    torch.save(file, tmp_path / "one.pt")
    refused("num_heads is 1 in the file", "--init", tmp_path / "one.pt", "--data", folder, "--out",
            tmp_path)
    refused("--out .* would overwrite .*, its own start", "--init", encoder, "--data", folder,
            "--out", encoder.parent)


def load(file, *values):
    """-> the classifier in a file."""
    return finetune.load_classifier(models.read_encoder(file), *values)[0]


# ---- classifiers of other publishers ----
@torch.no_grad()
def random_weights(model, seed=0):
    """Give a model weights that show in its logits, and a spread of biases and scales."""
    torch.manual_seed(seed)
    for name, p in model.named_parameters():
        p.copy_(0.15 * torch.randn_like(p) + (p.dim() == 1 and name.endswith("weight")))
    return model.eval()


def timm_vit(**options):
    timm = pytest.importorskip("timm")
    sizes = dict(img_size=32, patch_size=8, embed_dim=192, depth=12, num_heads=12, num_classes=6,
                 global_pool="avg")
    return random_weights(timm.models.VisionTransformer(**{**sizes, **options}))


def timm_beit(**options):
    """BEiT with an absolute position table: the layout of the authors' models with --rpe."""
    beit = pytest.importorskip("timm.models.beit")
    sizes = dict(img_size=32, patch_size=8, embed_dim=192, depth=12, num_heads=12, num_classes=6,
                 global_pool="avg", use_abs_pos_emb=True, init_values=None)
    return random_weights(beit.Beit(**{**sizes, **options}))


def authors(state):
    return {"model": {f"module.model.{k}": v for k, v in state.items()}, "start_epoch": 1000}


def mae(state):
    """The training file of FAIR's MAE."""
    return {"model": state, "args": argparse.Namespace(data_path="x"), "epoch": 99}


def whole_bias(state):
    """The layout of the authors' D2-MAE with --rpe: one bias for q, k and v."""
    state = dict(state)
    for key in [k for k in state if k.endswith("q_bias")]:
        q, v = state.pop(key), state.pop(key.replace("q_", "v_"))
        state[key.replace("q_bias", "qkv.bias")] = torch.cat([q, torch.zeros_like(q), v])
    return state


PUBLISHED = {
    "timm": (timm_vit, dict(), lambda state: state),
    "mae": (timm_vit, dict(), mae),
    "authors": (timm_vit, dict(), authors),
    "layer scale": (timm_vit, dict(init_values=0.5), lambda state: state),
    "authors, rpe": (timm_beit, dict(use_rel_pos_bias=True), authors),
    "authors, d2, rpe": (timm_beit, dict(use_rel_pos_bias=True), lambda s: authors(whole_bias(s)))}


def check_published(peer, file, folder, capsys, *options, size=32):
    """--eval and --predict of a file agree with the model that wrote it."""
    own = load(file, *options[1:])
    assert own.img_size == (size, size)
    torch.manual_seed(1)
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        assert rel_error(own(images), peer(images)) < 1e-5
    here(finetune, "--eval", "--init", file, "--data", folder, "--device", "cpu", "--workers", 0,
         *options)
    test_set = cropped(*items(folder, "val"), (size, size))
    pixels, labels = zip(*(test_set[0, i] for i in range(len(test_set))))
    with torch.no_grad():
        right = peer(models.normalize(torch.stack(pixels))).argmax(dim=1) == torch.tensor(labels)
    assert f"top-1 {100 * right.float().mean():.2f}," in capsys.readouterr().out


@pytest.mark.parametrize("kind", PUBLISHED)
def test_published_classifiers_are_scored_as_their_own_code_scores_them(kind, folder, tmp_path,
                                                                        capsys):
    make, options, wrap = PUBLISHED[kind]
    peer = make(**options)
    torch.save(wrap(peer.state_dict()), tmp_path / "published.pth")
    check_published(peer, tmp_path / "published.pth", folder, capsys)


def test_classifiers_of_hiera(folder, tmp_path, capsys):
    """Those of timm and, under other names of head and norm, of FAIR."""
    hiera = pytest.importorskip("timm.models.hiera")
    peer = random_weights(hiera.Hiera(img_size=(64, 64), embed_dim=46, stages=(1, 2, 7, 2),
                                      num_classes=6))
    state = peer.state_dict()
    torch.save(state, tmp_path / "timm.pth")
    names = {"head.fc": "head.projection", "head.norm": "norm"}
    fair = {re.sub("|".join(names), lambda match: names[match[0]], k): v for k, v in state.items()}
    torch.save({"model_state": fair}, tmp_path / "fair.pth")
    for name in ("timm.pth", "fair.pth"):
        check_published(peer, tmp_path / name, folder, capsys, size=64)


def test_a_classifier_of_timm_that_hugging_face_has_saved(folder, tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("timm")
    config = transformers.TimmWrapperConfig(
        architecture="vit_tiny_patch16_224", num_labels=6, do_pooling=True,
        model_args=dict(global_pool="avg", img_size=32, patch_size=8, num_heads=3))
    peer = random_weights(transformers.TimmWrapperForImageClassification(config))
    peer.save_pretrained(tmp_path)
    check_published(peer.timm_model, tmp_path / "model.safetensors", folder, capsys, "--model",
                    "deit_tiny")


def test_heads_over_the_class_token_are_refused(tmp_path):
    torch.save(timm_vit(global_pool="token").state_dict(), tmp_path / "deit.pth")
    with pytest.raises(InputError, match="deit.pth holds no head over the mean patch"):
        load(tmp_path / "deit.pth")
    transformers = pytest.importorskip("transformers")
    sizes = dict(image_size=32, patch_size=8, hidden_size=48, num_hidden_layers=12,
                 intermediate_size=192, num_attention_heads=3, num_labels=6)
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**sizes))
    model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="without fc_norm, a head reads the class token"):
        load(tmp_path / "model.safetensors")
    model.vit.layernorm.weight.data.fill_(3)
    model.save_pretrained(tmp_path)
    started = classifier("--init", tmp_path / "model.safetensors")
    assert (started.fc_norm.weight == 3).all()    # a supervised file


def test_published_files_need_the_right_number_of_classes_and_predict_numbers_or_names(
        folder, copied, tmp_path, capsys):
    torch.save(mae(timm_vit(num_classes=7).state_dict()), tmp_path / "seven.pth")
    torch.save(mae(timm_vit().state_dict()), tmp_path / "six.pth")
    job = ["--device", "cpu", "--init"]
    with pytest.raises(InputError, match="seven.pth has 7 classes, but .* has 6 folders in val"):
        here(finetune, "--eval", *job, tmp_path / "seven.pth", "--data", folder)
    image = next((folder / "val").rglob("*.png"))
    capsys.readouterr()
    here(finetune, "--predict", image, *job, tmp_path / "seven.pth")
    here(finetune, "--predict", image, *job, tmp_path / "six.pth", "--data", folder)
    numbers, names = [line for line in capsys.readouterr().out.splitlines() if "%" in line]
    assert re.search(r": class [0-6] [\d.]+%", numbers)
    for name in "abcdef":
        (copied / "val" / f"class {'abcdef'.index(name)}").rename(copied / "val" / name)
    here(finetune, "--predict", image, *job, tmp_path / "six.pth", "--data", copied)
    again = capsys.readouterr().out.splitlines()[-1]
    words = names.split(": ")[1]
    assert again.split(": ")[1] == re.sub(r"class (\d)", lambda m: "abcdef"[int(m[1])], words)


def test_a_file_that_lacks_a_part_of_its_classifier_is_refused(tmp_path):
    state = timm_vit().state_dict()
    del state["head.bias"]
    torch.save(state, tmp_path / "broken.pth")
    with pytest.raises(InputError, match="incomplete classifier: it lacks head.bias"):
        load(tmp_path / "broken.pth")


@torch.no_grad()
def test_nothing_of_other_pre_trained_encoders_is_dropped(tmp_path):
    """The pre-training files of the authors' benchmark: BEiT and BootMAE (LayerScale, q and v
    biases), MaskFeat (plain), MoCo-v3 (two encoders)."""
    images = torch.randn(2, 3, 32, 32)
    beit, plain = timm_beit(init_values=0.1), timm_vit()
    extra = {"mask_token": torch.randn(1, 1, 192), "lm_head.weight": torch.randn(9, 192)}
    moco = {f"module.base_encoder.{k}": v for k, v in plain.state_dict().items()}
    moco.update({k.replace("base", "momentum"): 0 * v for k, v in moco.items()})
    moco["module.base_encoder.head.0.weight"] = torch.randn(9, 192)
    files = {"beit": (beit, {"model": {**beit.state_dict(), **extra}}),
             "maskfeat": (plain, {"model": {**plain.state_dict(), **extra}}),
             "moco": (plain, {"state_dict": moco})}
    for name, (peer, content) in files.items():
        for part in (content.get("model"), content.get("state_dict")):
            for key in [k for k in part or () if re.search(r"head\.(weight|bias)|fc_norm", k)]:
                if not key.startswith("lm"):
                    del part[key]
        torch.save(content, tmp_path / f"{name}.pth")
        model = classifier("--init", tmp_path / f"{name}.pth").eval()
        tokens = peer.forward_features(images)    # of timm: without a norm before the pooling
        assert rel_error(model.forward_features(images, [12])[12], tokens) < 1e-5, name


def test_names_are_those_of_timm(trained):
    timm = pytest.importorskip("timm")
    own = load(trained / "classifier.pt")
    model = timm.create_model("vit_tiny_patch16_224", num_heads=own.arch["num_heads"], embed_dim=48,
                              num_classes=6, global_pool="avg", img_size=32).eval()
    model.load_state_dict(own.state_dict(), strict=True)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert rel_error(own(x), model(x)) < 1e-4


# ---- evaluation ----
def score(model, test_set, classes=6):
    return finetune.evaluate(model, models.eval_loader(test_set, 4, 0, SINGLE), classes, SINGLE)


def test_accuracies_match_a_loop(folder, trained):
    model = load(trained / "classifier.pt")
    test_set = held_out(folder)
    values = score(model, test_set)
    right, of_class, losses = [], [[] for _ in range(6)], []
    for i in range(len(test_set)):
        image, label = test_set[0, i]
        with torch.no_grad():
            logits = model(models.normalize(image[None]))[0]
        order = logits.argsort(descending=True).tolist()
        right.append(order.index(label))
        of_class[label].append(order[0] == label)
        losses.append((logits.logsumexp(0) - logits[label]).item())
    assert values["top1"] == pytest.approx(100 * np.mean([r == 0 for r in right]), abs=1e-3)
    assert values["top5"] == pytest.approx(100 * np.mean([r < 5 for r in right]), abs=1e-3)
    mean_class = 100 * np.mean([np.mean(hits) for hits in of_class])
    assert values["mean_class"] == pytest.approx(mean_class, abs=1e-3)
    assert values["val_loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    assert values["test_images"] == 7


def test_classes_without_test_images_are_not_in_their_mean(folder, trained):
    test_set = held_out(folder)
    one = cropped([test_set.files[0]], test_set.labels[:1])
    values = score(load(trained / "classifier.pt"), one)
    assert values["test_images"] == 1 and values["mean_class"] == values["top1"] in (0, 100)


def test_evaluation_is_in_float32(folder, tmp_path, capsys):
    """The same weights give the same numbers whatever the training's --dtype."""
    here(finetune, "--data", folder, "--out", tmp_path, *QUICK, *PLAIN, "--dtype", "bf16")
    line = evaluations(tmp_path)[-1]
    here(finetune, "--init", tmp_path / "last.pt", "--eval", "--workers", 0, "--device", "cpu")
    words = (f"top-1 {line['top1']:.2f}, top-5 {line['top5']:.2f}, mean over classes "
             f"{line['mean_class']:.2f}, loss {line['val_loss']:.4f} on 7 images of (32, 32), float32")
    assert capsys.readouterr().out.count(words) >= 2    # of the last epoch, and of --eval
    assert "Infinity" not in (tmp_path / "log.jsonl").read_text()


def test_eval_reads_its_options_and_refuses_others(folder, trained, capsys, monkeypatch, tmp_path):
    job = ["--eval", "--out", trained, "--device", "cpu", "--workers", 0]
    here(finetune, *job, "--image-size", 96)
    assert "on 7 images of (96, 96), float32" in capsys.readouterr().out
    with pytest.raises(InputError, match="embed_dim is 48 in the file"):
        here(finetune, *job, "--model", "vit_nano")
    with pytest.raises(SystemExit):
        here(finetune, *job, "--rpe")
    assert "a trained classifier does not read --rpe: leave it out" in capsys.readouterr().err


def test_eval_refuses_data_of_other_classes(copied, trained):
    for split in ("train", "val"):
        (copied / split / "class 5").rename(copied / split / "zebra")
    with pytest.raises(InputError, match="only one of them has class 5, zebra"):
        here(finetune, "--eval", "--out", trained, "--data", copied)


@pytest.mark.parametrize("job", [["--eval"], ["--predict", "a.png"]])
def test_an_encoder_is_no_classifier(encoder, job):
    with pytest.raises(InputError, match="holds no head .*: fine-tune it to get one$"):
        here(finetune, "--init", encoder, *job)


def test_files_of_older_versions_are_classifiers(folder, trained, tmp_path, capsys):
    """best.pt held the names of classes and the data among its options."""
    file = state_of(trained / "classifier.pt")
    file["args"].update(classes=file.pop("classes"), dataset="folder", rpe=False)
    file["arch"]["layer_scale"] = None
    torch.save(dict(file, top1=50.0), tmp_path / "best.pt")
    job = ["--eval", "--device", "cpu", "--workers", 0]
    here(finetune, *job, "--init", tmp_path / "best.pt")
    here(finetune, *job, "--out", trained)
    here(finetune, *job, "--init", trained / "last.pt")
    scores = [line for line in capsys.readouterr().out.splitlines() if "top-1" in line]
    assert len(scores) == 3 and len(set(scores)) == 1


def test_predict_names_the_likeliest_classes(folder, trained, capsys):
    image = next((folder / "val").rglob("*.png"))
    here(finetune, "--predict", image, folder / "val/class 0", "--out", trained, "--device", "cpu")
    first, *others = capsys.readouterr().out.strip().splitlines()[1:]
    words = first.removeprefix(f"{image}: ").split(", ")
    shares = [float(word.split()[-1].rstrip("%")) for word in words]
    assert len(words) == 5 and shares == sorted(shares, reverse=True) and 50 < sum(shares) < 100.5
    assert [line.split(": ")[0] for line in others] == [
        str(folder / "val/class 0" / name) for name in ("0.png", "6.png")]


def test_predict_stops_at_a_broken_or_missing_image_and_names_it(folder, trained, capsys, tmp_path):
    image = next((folder / "val").rglob("*.png"))
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no image")
    missing = tmp_path / "missing.png"
    for path, words in ((bad, f"^cannot read image {bad} "),
                        (missing, f"^cannot read image {missing} .*No such file.*put a good copy there")):
        with pytest.raises(OSError, match=words):
            here(finetune, "--predict", image, path, "--out", trained, "--device", "cpu")
        assert f"{image}: " in capsys.readouterr().out


def test_predict_and_eval_read_with_given_statistics(folder, trained, capsys):
    job = ["--predict", next((folder / "val").rglob("*.png")), "--eval", "--out", trained,
           "--device", "cpu", "--workers", 0]
    for statistics in ([], ["--mean", 0.9, 0.9, 0.9], ["--std", 0.01, 0.01, 0.01]):
        here(finetune, *job, *statistics)
    lines = capsys.readouterr().out.splitlines()
    for word in ("top-1", "%"):
        assert len({line for line in lines if word in line}) == 3


def test_predict_turns_a_photo_upright(trained, tmp_path, capsys):
    upright = textured_image()
    exif = Image.Exif()
    exif[0x0112] = 6    # the camera was turned: show it rotated by 270 degrees
    upright.save(tmp_path / "upright.png")
    upright.rotate(90, expand=True).save(tmp_path / "turned.png", exif=exif)
    here(finetune, "--predict", tmp_path / "upright.png", tmp_path / "turned.png", "--out", trained,
         "--device", "cpu")
    first, second = (line.split(": ")[1]
                     for line in capsys.readouterr().out.strip().splitlines()[1:])
    assert first == second


# ---- real runs ----
def test_two_processes_equal_one(folder, trained, tmp_path):
    run("finetune.py", "--data", folder, "--out", tmp_path, *QUICK, *PLAIN, torchrun=2)
    assert same_weights(tmp_path, trained, tolerance=1e-5)
    for one, two in zip(evaluations(trained), evaluations(tmp_path)):
        assert two.pop("val_loss") == pytest.approx(one.pop("val_loss"), rel=1e-4)
        assert one == two and two["test_images"] == 7


def test_accumulation_equals_one_batch(folder, trained, tmp_path):
    here(finetune, "--data", folder, "--out", tmp_path, *QUICK, *PLAIN, "--accum-steps", 2)
    assert same_weights(tmp_path, trained, tolerance=1e-5)
    one, two = (read_log(out / "log.jsonl")[1]["loss"] for out in (trained, tmp_path))
    assert two == pytest.approx(one, rel=1e-6)    # of the whole batch


def test_killed_run_resumes_bit_for_bit(folder, tmp_path):
    options = ["--data", folder, *QUICK, "--recipe", "mae", "--batch-size", 2, "--epochs", 3,
               "--log-every", 2]
    straight = check_kill_and_resume(finetune, options, tmp_path,
                                     lambda line: line["epoch"] == 2 and line.get("lr"))
    own, killed = (state_of(folder / "classifier.pt") for folder in (straight, tmp_path / "killed"))
    assert all(torch.equal(own["model"][k], killed["model"][k]) for k in own["model"])


def test_a_finished_run_says_so_logs_nothing_and_writes_a_lost_classifier(folder, copied_run,
                                                                          capsys, monkeypatch):
    log = (copied_run / "log.jsonl").read_text()
    (copied_run / "classifier.pt").unlink()
    monkeypatch.setattr(finetune, "evaluate", None)
    here(finetune, "--data", folder, "--out", copied_run, *QUICK, *PLAIN)
    assert re.search(r"(\d+) of \1 epochs are finished", capsys.readouterr().out)
    assert (copied_run / "log.jsonl").read_text() == log
    assert state_of(copied_run / "classifier.pt")["epoch"] == 2


def test_the_evaluation_loader_is_made_once(folder, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(finetune, "eval_loader",
                        lambda *values: made.append(models.eval_loader(*values)) or made[-1])
    here(finetune, "--data", folder, "--out", tmp_path, *QUICK, *PLAIN)
    assert len(made) == 1 and len(evaluations(tmp_path)) == 2


def test_resume_takes_remedies_and_moved_folders(copied, copied_run, capsys):
    here(finetune, "--data", copied, "--out", f"{copied_run}/", *QUICK, *PLAIN, "--clip-grad", 1,
         "--dtype", "fp16", "--base-lr", 1e-4, "--accum-steps", 2)
    out = capsys.readouterr().out
    assert "base_lr is now 0.0001" in out and "of at most 256 items" in out


def test_resume_refuses_another_run(folder, copied, trained, encoder):
    refused("epochs is now 3, was 2", "--data", folder, "--out", trained, *PLAIN, "--epochs", 3)
    with pytest.raises(InputError, match="arch is now {.*'patch_size': 16"):
        here(finetune, "--data", folder, "--init", encoder, "--out", trained, *PLAIN)
    next((copied / "train").rglob("*.png")).unlink()
    refused("train_images is now 23, was 24", "--data", copied, "--out", trained, *PLAIN)
    for split in ("train", "val"):    # other data of as many classes and images
        (copied / split / "class 5").rename(copied / split / "zebra")
    refused("classes is now .*'zebra'., was .*'class 5'", "--data", copied, "--out", trained, *PLAIN)


@pytest.mark.parametrize("split", ["train", "val"])
def test_an_unreadable_image_stops_the_run(copied, tmp_path, split):
    bad = sorted((copied / split).rglob("*.png"))[3]
    bad.write_bytes(b"no image")
    with pytest.raises(OSError, match=f"cannot read image {re.escape(str(bad))} .*check.py"):
        here(finetune, "--data", copied, "--out", tmp_path / "out", *QUICK, *PLAIN)


def test_an_unreadable_image_ends_both_processes(copied, tmp_path):
    bad = sorted((copied / "train").rglob("*.png"))[5]
    bad.write_bytes(b"no image")
    start = time.time()
    done = run("finetune.py", "--data", copied, "--out", tmp_path / "out", *QUICK, *PLAIN,
               torchrun=2, check=False)
    assert done.returncode != 0 and done.stderr.count("error: cannot read image") == 1
    assert f"error: cannot read image {bad}" in done.stderr and time.time() - start < 30


def test_a_loss_that_turns_nan_ends_in_one_sentence_and_last_pt_stays_good(folder, tmp_path):
    job = ["--data", folder, "--out", tmp_path, *QUICK, *PLAIN]
    here(finetune, *job, "--epochs", 1, "--warmup-epochs", 0)
    file = state_of(tmp_path / "last.pt")
    file["args"]["epochs"] = 2
    torch.save(file, tmp_path / "last.pt")
    with pytest.raises(FloatingPointError, match="is not finite"):
        here(finetune, *job, "--warmup-epochs", 0, "--base-lr", 1e30)
    assert all(w.isfinite().all() for w in state_of(tmp_path / "last.pt")["model"].values())


@pytest.mark.parametrize("batch, accum", [(4, 2), (6, 2), (2, 2)])
def test_odd_batches_with_mixing_and_accumulation_train(folder, tmp_path, batch, accum):
    here(finetune, "--data", folder, "--shots", 2, "--out", tmp_path, *QUICK, "--epochs", 1,
         "--recipe", "mae", "--batch-size", batch, "--accum-steps", accum)
    assert state_of(tmp_path / "last.pt")["model"]["head.bias"].abs().sum() > 0


def test_hiera_trains(folder, tmp_path):
    here(finetune, "--data", folder, "--out", tmp_path, *QUICK, *PLAIN, "--model", "hiera_tiny")
    assert read_log(tmp_path / "log.jsonl")[-1]["test_images"] == 7


@pytest.mark.skipif(not os.environ.get("SLOW"), reason="a minute of compiling: set SLOW=1")
def test_compiled_training_equals_eager(folder, trained, tmp_path):
    here(finetune, "--data", folder, "--out", tmp_path, *QUICK, *PLAIN, "--compile")
    assert same_weights(tmp_path, trained, tolerance=1e-4)


def test_few_labels_of_the_encoder_as_the_demo_trains(encoder, tmp_path):
    """The options of tests/tools/demo.py, on the folders that tests/tools/toy.py writes."""
    toy.write_images(tmp_path / "data", train=32, val=16)
    here(finetune, "--data", tmp_path / "data", "--init", encoder, "--model", "vit_pico",
         "--image-size", 48, "--patch-size", 8, "--shots", 1, "--recipe", "improved",
         "rand_augment=0", "mixup=0", "smoothing=0.1", "min_crop=0.7", "--epochs", 1,
         "--batch-size", 16, "--base-lr", 6.4e-2, "--eval-every", 30, "--seed", 3, "--keep-blocks",
         6, "--data-fraction", 0.5, "--workers", 0, "--device", "cpu", "--out", tmp_path / "out")
    first, *_, last = read_log(tmp_path / "out/log.jsonl")
    assert first["train_images"] == 16 and last["test_images"] == 16
    assert (first["args"]["keep_blocks"], first["args"]["seed"]) == (6, 3) and "top1" in last
