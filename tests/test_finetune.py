"""finetune.py: golden numbers, augmentation, data, and real runs on a few small pictures."""
import math
import os
import re
import shutil
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (check_kill_and_resume, here, rel_error, run, same_weights, seed_weights,
                      seeded, state_of)
from PIL import Image, ImageEnhance, ImageOps
from torch.utils.data import DataLoader
from torchvision import datasets

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
    args = resolved(*values)
    args.classes = [f"class {k}" for k in range(classes)]
    return finetune.build_classifier(args)


def dataset(items, *values, train=True):
    args = resolved("--image-size", 32, 32, *values)
    args.mean = args.mean or models.IMAGENET_MEAN
    return finetune.LabelledImages(items, args, train)


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
    best = state_of(trained / "best.pt")
    assert best["args"]["classes"] == [f"class {k}" for k in range(6)]
    lines = evaluations(trained)
    assert [(line["epoch"], line["step"]) for line in lines] == [(1, 3), (2, 6)]
    assert best["top1"] == max(line["top1"] for line in lines)
    assert best["epoch"] == next(line["epoch"] for line in lines if line["top1"] == best["top1"])
    first = read_log(trained / "log.jsonl")[0]["args"]
    assert first["train_images"] == 24 and first["test_images"] == 7
    assert first["data_fraction"] == 1 and first["keep_blocks"] is None and first["seed"] == 0


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
    assert np.array_equal(model.rel_pos_index[:20, :20], golden[f"{key}/index_corner"])
    assert model.rel_pos_index.sum() == golden[f"{key}/index_sum"]
    tables = [block.attn.relative_position_bias_table for block in model.blocks]
    assert all(len(table) == golden[f"{key}/table_rows"] for table in tables)


def test_schedule_matches_the_reference(golden):
    steps = golden["finetune/lr_steps"].tolist()
    rates = [finetune.lr_at(step, 3000, 50, 4e-3, 1e-6) for step in steps]
    assert np.allclose(rates, golden["finetune/lr"], rtol=1e-6, atol=0)


def layers_of(optimizer):
    return {id(p): group["layer"] for group in optimizer.param_groups for p in group["params"]}


def test_layer_decay_matches_the_reference(golden):
    args = resolved()
    optimizer = finetune.build_optimizer(build_model(num_classes=10), args, 1e-3)
    scales = {group["layer"]: group["lr_scale"] for group in optimizer.param_groups}
    reference = golden["finetune/layer_scale_vit_tiny_0.85"]
    assert np.allclose([scales[i] for i in range(14)], reference, rtol=1e-6)


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
    optimizer = finetune.build_optimizer(model, resolved("--recipe", "transfer"), 0.1)
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
    items = finetune.list_folder(folder, "train")[0]
    data = dataset(items, "--mean", 0.2, 0.4, 0.6)
    pixels = {tuple(data[0, i][0][:, 0, 0].tolist()) for i in range(20)}
    assert (51, 102, 153) in pixels and len(pixels) > 1
    assert (51, 102, 153) not in {tuple(dataset(items, train=False)[0, i][0][:, 0, 0])
                                  for i in range(5)}


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
    args.classes = range(5)
    mixing = finetune.build_mixing(args)
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
    mixing = finetune.build_mixing(SimpleNamespace(mixup=0, cutmix=0, classes=range(5)))
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
    items = [(i, i % 3) for i in range(60)]
    two, five, half, everything = (finetune.select(items, share, shots, 1)
                                   for share, shots in ((1, 2), (1, 5), (0.5, None), (1, None)))
    assert set(two) < set(five) < set(half) < set(everything) == set(items)
    assert [sum(label == k for _, label in five) for k in range(3)] == [5, 5, 5]
    assert finetune.select(items, 1, 5, 2) != five


def test_hidden_files_are_no_data_and_all_types_of_images_count(copied):
    image = Image.new("RGB", (9, 9), "red")
    for name in ("a.gif", "b.jfif", "c.webp", "._d.png"):
        image.save(copied / "train/class 0" / name, format="GIF" if name == "a.gif" else "PNG")
    (copied / "train/class 0/notes.txt").write_text("no image")
    for split in ("train", "val"):
        (copied / split / ".ipynb_checkpoints").mkdir()
        image.save(copied / split / ".ipynb_checkpoints" / "x.png")
    items, classes = finetune.list_folder(copied, "train")
    assert len(items) == 27 and classes == [f"class {k}" for k in range(6)]
    assert dataset(items)[0, 0][0].shape == (3, 32, 32)


def test_wrong_folders_end_in_a_sentence(copied, tmp_path, monkeypatch):
    refused("no folders of classes in train: it must hold train/CLASS/", "--data", "none")
    refused(f"give the folder above, {copied}$", "--data", copied / "train", "--out", tmp_path)
    monkeypatch.chdir(copied / "val")
    refused(f"give the folder above, {copied}$", "--data", ".", "--out", tmp_path)
    (copied / "train" / "zebra").mkdir()
    refused("zebra holds no image", "--data", copied, "--out", tmp_path)
    (copied / "train" / "zebra").rmdir()
    (copied / "val" / "class 3").rename(copied / "val" / "other")
    refused("not the same: only one of them has class 3, other", "--data", copied, "--out",
            tmp_path)
    shutil.rmtree(copied / "val")
    (copied / "val").mkdir()
    shutil.copy(copied / "train/class 0/0.png", copied / "val")
    refused("no folders of classes in val.* valprep.sh", "--data", copied, "--out", tmp_path)


def test_items_depend_on_seed_epoch_and_index_alone(folder):
    items = finetune.list_folder(folder, "train")[0]
    keys = [[(0, 3), (0, 4)], [(1, 3), (0, 3)]]
    data = dataset(items)
    (a, _), (b, _) = DataLoader(data, batch_sampler=keys, num_workers=1)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    assert torch.equal(a[0], data[0, 3][0]) and torch.equal(a[0], b[1])
    assert torch.equal(before, torch.get_rng_state())    # the process's generator is left alone
    assert not torch.equal(a[0], b[0])
    assert not torch.equal(a[0], dataset(items, "--seed", 1)[0, 3][0])


@pytest.mark.parametrize("size, shorter", [(224, 256), (384, 438)])
def test_test_images_are_the_authors(size, shorter):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (450, 600, 3), dtype=np.uint8))
    resized = image.resize((int(shorter * 600 / 450), shorter), Image.Resampling.BICUBIC)
    top = round((shorter - size) / 2)
    left = round((resized.width - size) / 2)
    expected = resized.crop((left, top, left + size, top + size))
    got = finetune.centre_crop(image, [size, size])
    assert np.array_equal(np.array(got), np.array(expected))


# ---- data sets of torchvision, from tiny files of the real layout ----
def splits_of(name, root):
    args = resolved("--dataset", name, "--data", root, *QUICK)
    train, test = finetune.make_data(args, 0, 1)
    args.image_size = (32, 32)
    args.mean = models.IMAGENET_MEAN
    assert train[0, 1][0].shape == test[0, 1][0].shape == (3, 32, 32)
    if name != "cifar10":    # an unreadable file is named by its path
        assert train.pictures[0].startswith(str(root))
    return args.classes, list(train.labels), list(test.labels)


def save_pictures(folder, names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.new("RGB", (20, 24), "red").save(folder / name)


def test_pets_and_aircraft(tmp_path, capfd):
    pets, planes = tmp_path / "oxford-iiit-pet", tmp_path / "fgvc-aircraft-2013b/data"
    (pets / "annotations").mkdir(parents=True)
    for split in ("trainval", "test"):
        names = [f"{breed}_{split}{i}" for breed in ("Abyssinian", "beagle") for i in range(2)]
        lines = [f"{n} {1 + n.startswith('b')} 1 1\n" for n in names]
        (pets / f"annotations/{split}.txt").write_text("".join(lines))
        save_pictures(pets / "images", [f"{n}.jpg" for n in names])
        save_pictures(planes / "images", [f"{n}.jpg" for n in names])
        lines = [f"{n} {n.split('_')[0]}\n" for n in names]
        (planes / f"images_variant_{split}.txt").write_text("".join(lines))
    (planes / "variants.txt").write_text("Abyssinian\nbeagle\n")
    assert splits_of("pets", tmp_path) == (["Abyssinian", "Beagle"], [0, 0, 1, 1], [0, 0, 1, 1])
    assert splits_of("aircraft", tmp_path) == (["Abyssinian", "beagle"], [0, 0, 1, 1], [0, 0, 1, 1])
    bad = pets / "images/beagle_trainval0.jpg"
    bad.write_bytes(b"no image")
    with pytest.raises(OSError, match=f"cannot read image {bad} .*: replace it"):
        here(finetune, "--dataset", "pets", "--data", tmp_path, "--out", tmp_path / "out", *QUICK,
             *PLAIN, "--batch-size", 4)


def test_cifar(tmp_path, monkeypatch):
    pickle = __import__("pickle")
    root = tmp_path / "cifar-10-batches-py"
    root.mkdir()
    pixels = np.arange(2 * 3072, dtype=np.uint8).reshape(2, 3072)
    for kind, files in (("train_list", ["data_batch_1"]), ("test_list", ["test_batch"])):
        for name in files:
            entry = {"data": pixels, "labels": [3, 9]}
            (root / name).write_bytes(pickle.dumps(entry))
        monkeypatch.setattr(datasets.CIFAR10, kind, [[name, None] for name in files])
    (root / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"c{k}" for k in range(10)]}))
    monkeypatch.setitem(datasets.CIFAR10.meta, "md5", None)
    classes, train, test = splits_of("cifar10", tmp_path)
    assert classes == [f"c{k}" for k in range(10)] and train == test == [3, 9]


def test_flowers_of_both_training_splits(tmp_path, monkeypatch):
    scipy = pytest.importorskip("scipy.io")
    root = tmp_path / "flowers-102"
    save_pictures(root / "jpg", [f"image_{i:05d}.jpg" for i in range(1, 7)])
    scipy.savemat(root / "imagelabels.mat", {"labels": np.array([1, 102, 5, 7, 9, 11])})
    scipy.savemat(root / "setid.mat", {"trnid": [1, 2], "valid": [3, 4], "tstid": [5, 6]})
    for key in ("label", "setid"):
        name = datasets.Flowers102._file_dict[key][0]
        monkeypatch.setitem(datasets.Flowers102._file_dict, key, (name, None))
    classes, train, test = splits_of("flowers", tmp_path)
    assert len(classes) == 102 and train == [0, 101, 4, 6] and test == [8, 10]


def test_cars(tmp_path):
    scipy = pytest.importorskip("scipy.io")
    root = tmp_path / "stanford_cars"
    (root / "devkit").mkdir(parents=True)
    scipy.savemat(root / "devkit/cars_meta.mat", {"class_names": np.array(["Audi", "BMW"], object)})
    kind = [("fname", object), ("class", int)]
    for split, path in (("train", "devkit/cars_train_annos.mat"),
                        ("test", "cars_test_annos_withlabels.mat")):
        save_pictures(root / f"cars_{split}", ["1.jpg", "2.jpg"])
        rows = np.array([("1.jpg", 2), ("2.jpg", 1)], kind)
        scipy.savemat(root / path, {"annotations": rows})
    assert splits_of("cars", tmp_path) == (["Audi", "BMW"], [1, 0], [1, 0])


def test_a_missing_data_set_says_where_it_comes_from(tmp_path):
    refused("add --download", "--dataset", "cifar10", "--data", tmp_path, "--out", tmp_path)
    refused("vision/issues/7545", "--dataset", "cars", "--download", "--data", tmp_path, "--out",
            tmp_path)


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
    recipes = ("improved", "mae", "transfer")
    runs = [resolved("--recipe", name, "--dataset", "cifar100") for name in recipes]
    assert tuple(getattr(args, key) for args in runs) == paper[key]


def test_an_option_or_a_change_overrides_the_recipe_zero_included():
    args = resolved("--recipe", "mae", "mixup=0", "--epochs", 7)
    assert (args.epochs, args.mixup, args.cutmix, args.recipe) == (7, 0, 1, "mae")


def test_data_sets_have_entries_of_the_transfer_recipe():
    args = resolved("--recipe", "transfer", "--dataset", "flowers")
    assert (args.epochs, args.warmup_epochs, args.base_lr) == (150, 30, 0.015)
    assert resolved("--dataset", "flowers").epochs == 300


def test_warmup_not_given_shrinks_with_the_run():
    args = resolved("--recipe", "transfer", "--dataset", "cifar100", "--epochs", 10)
    assert args.warmup_epochs == 2
    assert resolved("--rpe", "--epochs", 1000).warmup_epochs == 5


BAD_OPTIONS = [
    ("fewer than --epochs 5", ["--warmup-epochs", 5, "--epochs", 5]),
    ("height and width", ["--image-size", 32, 32, 32]),
    ("not a multiple of 16", ["--image-size", 40]),
    ("does not exist", ["--init", "none.pt"]),
    ("give --init", ["--keep-blocks", 3]),
    ("defined for ViT", ["--model", "hiera_tiny", "--rpe", "--image-size", 32]),
    ("no effect on hiera_tiny", ["--model", "hiera_tiny", "--patch-size", 8]),
    ("no effect on folders", ["--download"]),
    ("multiple of .* = 20", ["--accum-steps", 20, "--batch-size", 30])]


@pytest.mark.parametrize("words, values", BAD_OPTIONS)
def test_options_that_make_no_sense_are_told_before_the_work(folder, tmp_path, words, values):
    refused(words, "--data", folder, "--out", tmp_path, *values)


@pytest.mark.parametrize("words, values", [
    ("[0, 10]", ["--recipe", "improved", "rand_augment=15"]),
    ("neither a recipe", ["--recipe", "best"]),
    ("[0, 4294967295]", ["--seed", "5000000000"]),
    ("[0, 1]", ["--data-fraction", "1.5"]),
    ("--base-lr", ["--lr", "0.1"])])
def test_values_out_of_range_end_in_a_sentence(capsys, words, values):
    with pytest.raises(SystemExit):
        finetune.parse_args(values)
    assert words in capsys.readouterr().err


# ---- hand-over ----
def test_size_model_and_colours_come_from_the_encoder(encoder):
    args = resolved("--init", encoder)
    args.classes = range(5)
    model = finetune.build_classifier(args)
    assert (model.embed_dim, args.image_size, model.patch_size) == (48, (32, 32), 8)
    assert args.mean == [0.4, 0.5, 0.6] and args.arch["num_heads"] == 3


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
    norm = state_of(trained / "best.pt")["model"]["fc_norm.weight"]
    assert torch.equal(classifier("--init", trained / "best.pt").fc_norm.weight, norm)


def test_an_encoder_that_does_not_fit_is_refused(encoder, folder, tmp_path):
    refused("has 12 blocks", "--init", encoder, "--keep-blocks", 13, "--data", folder, "--out",
            tmp_path)
    file = state_of(encoder)
    file["arch"]["num_heads"] = 1
    torch.save(file, tmp_path / "one.pt")
    refused("num_heads is 1 in the file", "--init", tmp_path / "one.pt", "--data", folder, "--out",
            tmp_path)
    refused("--out .* would overwrite .*, its own start", "--init", encoder, "--data", folder, "--out", encoder.parent)


def test_names_are_those_of_timm(trained):
    timm = pytest.importorskip("timm")
    own = load(trained)[0]
    model = timm.create_model("vit_tiny_patch16_224", num_heads=own.arch["num_heads"], embed_dim=48,
                              num_classes=6, global_pool="avg", img_size=32).eval()
    model.load_state_dict(own.state_dict(), strict=True)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert rel_error(own(x), model(x)) < 1e-4


# ---- evaluation ----
def load(out, *values):
    """-> the classifier in a folder, and its options."""
    args = finetune.parse_args(["--out", str(out), *map(str, values), "--workers", "0"])
    return finetune.load_classifier(args), args


def test_accuracies_match_a_loop(folder, trained):
    model, args = load(trained)
    test_set = finetune.LabelledImages(finetune.list_folder(folder, "val")[0], args, train=False)
    values = finetune.evaluate(args, SINGLE, model, test_set)
    right, of_class, losses = [], [[] for _ in args.classes], []
    for i in range(len(test_set)):
        image, label = test_set[0, i]
        with torch.no_grad():
            logits = model(models.normalize(image[None]))[0]
        order = logits.argsort(descending=True).tolist()
        right.append(order.index(label))
        of_class[label].append(order[0] == label)
        losses.append((logits.logsumexp(0) - logits[label]).item())
    assert len(args.classes) == 6    # so that top-5 is no triviality
    assert values["top1"] == pytest.approx(100 * np.mean([r == 0 for r in right]), abs=1e-3)
    assert values["top5"] == pytest.approx(100 * np.mean([r < 5 for r in right]), abs=1e-3)
    mean_class = 100 * np.mean([np.mean(hits) for hits in of_class])
    assert values["mean_class"] == pytest.approx(mean_class, abs=1e-3)
    assert values["val_loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    assert values["test_images"] == 7


def test_classes_without_test_images_are_not_in_their_mean(folder, trained):
    model, args = load(trained)
    items = finetune.list_folder(folder, "val")[0][:1]
    values = finetune.evaluate(args, SINGLE, model, finetune.LabelledImages(items, args, False))
    assert values["test_images"] == 1 and values["mean_class"] == values["top1"] in (0, 100)


def test_evaluation_is_in_float32(folder, tmp_path, capsys):
    """The same weights give the same numbers whatever the training's --dtype."""
    here(finetune, "--data", folder, "--out", tmp_path, *QUICK, *PLAIN, "--dtype", "bf16")
    line = evaluations(tmp_path)[-1]
    here(finetune, "--init", tmp_path / "last.pt", "--eval", "--workers", 0, "--device", "cpu")
    words = (f"top-1 {line['top1']:.2f}, top-5 {line['top5']:.2f}, mean over classes "
             f"{line['mean_class']:.2f}, loss {line['val_loss']:.4f} on 7 images, float32")
    assert capsys.readouterr().out.count(words) == 2
    assert "Infinity" not in (tmp_path / "log.jsonl").read_text()


def test_eval_reads_its_options_and_refuses_others(folder, trained, capsys, monkeypatch, tmp_path):
    job = ["--eval", "--out", trained, "--device", "cpu", "--workers", 0]
    here(finetune, *job, "--image-size", 96)
    assert "6 classes, images of (96, 96) pixels" in capsys.readouterr().out
    for words, values in (("embed_dim is 48 in the file", ["--model", "vit_nano"]),
                          ("data/cifar10", ["--dataset", "cifar10"])):
        with pytest.raises(InputError, match=words):
            here(finetune, *job, *values)
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
    with pytest.raises(InputError, match="no classifier"):
        here(finetune, "--init", encoder, *job)


def test_predict_names_the_likeliest_classes_and_goes_on_after_a_bad_file(folder, trained, capsys,
                                                                           tmp_path):
    image = next((folder / "val").rglob("*.png"))
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no image")
    with pytest.raises(OSError, match="bad.png .*; .*missing.png"):
        here(finetune, "--predict", image, bad, tmp_path / "missing.png", folder / "val/class 0",
             "--out", trained, "--device", "cpu")
    first, *others = capsys.readouterr().out.strip().splitlines()[2:]
    words = first.removeprefix(f"{image}: ").split(", ")
    shares = [float(word.split()[-1].rstrip("%")) for word in words]
    assert len(words) == 5 and shares == sorted(shares, reverse=True) and 50 < sum(shares) < 100.5
    assert [line.split(": ")[0] for line in others] == [
        str(folder / "val/class 0" / name) for name in ("0.png", "6.png")]


def test_predict_turns_a_photo_upright(trained, tmp_path, capsys):
    upright = textured_image()
    exif = Image.Exif()
    exif[0x0112] = 6    # the camera was turned: show it rotated by 270 degrees
    upright.save(tmp_path / "upright.png")
    upright.rotate(90, expand=True).save(tmp_path / "turned.png", exif=exif)
    here(finetune, "--predict", tmp_path / "upright.png", tmp_path / "turned.png", "--out", trained,
         "--device", "cpu")
    first, second = (line.split(": ")[1]
                     for line in capsys.readouterr().out.strip().splitlines()[2:])
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


def test_killed_run_resumes_bit_for_bit(folder, tmp_path):
    options = ["--data", folder, *QUICK, "--recipe", "mae", "--batch-size", 2, "--epochs", 3,
               "--log-every", 2]
    straight = check_kill_and_resume(finetune, options, tmp_path,
                                     lambda line: line["epoch"] == 2 and line.get("lr"))
    best = state_of(straight / "best.pt")
    killed = state_of(tmp_path / "killed/best.pt")
    assert all(torch.equal(best["model"][k], killed["model"][k]) for k in best["model"])


@pytest.mark.parametrize("lost", ["best.pt", "log.jsonl"])
def test_a_finished_run_says_so_and_writes_what_is_missing(folder, copied_run, lost, capsys):
    """Also an evaluation that a kill behind the last last.pt has lost."""
    best = state_of(copied_run / "best.pt")
    (copied_run / lost).unlink()
    here(finetune, "--data", folder, "--out", copied_run, *QUICK, *PLAIN)
    out = capsys.readouterr().out
    lines = evaluations(copied_run)
    assert "the run is finished" in out and lines[-1]["epoch"] == 2
    assert f"finished: top-1 {lines[-1]['top1']:.2f} in the last epoch, 2, and " in out
    found = state_of(copied_run / "best.pt")
    if lost == "best.pt":
        assert (found["epoch"], found["top1"]) == (2, lines[-1]["top1"])
    else:
        assert found["epoch"] == best["epoch"]
    assert f"{found['top1']:.2f} in the best, {found['epoch']}, which {copied_run}/best.pt" in out


def test_the_next_evaluation_is_the_best_where_only_last_pt_was_moved(folder, tmp_path):
    options = ["--data", folder, *QUICK, *PLAIN, "--eval-every", 1]
    out = tmp_path / "moved"
    out.mkdir()
    here(finetune, *options, "--out", tmp_path / "a")
    last = state_of(tmp_path / "a/last.pt")
    torch.save(dict(last, epoch=1, best=dict(top1=101.0, epoch=1)), out / "last.pt")
    here(finetune, *options, "--out", out)
    assert state_of(out / "best.pt")["epoch"] == 2


@pytest.mark.parametrize("share", [17, 50])
def test_no_better_than_chance_is_said(folder, copied_run, share, capsys, monkeypatch):
    monkeypatch.setattr(finetune, "evaluate", lambda *_: dict(top1=40.0, mean_class=share))
    here(finetune, "--data", folder, "--out", copied_run, *QUICK, *PLAIN)
    assert ("that is no better than chance" in capsys.readouterr().out) == (share == 17)


def test_resume_takes_remedies_and_moved_folders(copied, copied_run, capsys):
    here(finetune, "--data", copied, "--out", f"{copied_run}/", *QUICK, *PLAIN, "--clip-grad", 1,
         "--dtype", "fp16", "--skip-corrupt", "--base-lr", 1e-4, "--accum-steps", 2)
    assert "base_lr is now 0.0001" in capsys.readouterr().out


def test_resume_refuses_another_run(folder, copied, trained, encoder):
    refused("epochs 2, not 3", "--data", folder, "--out", trained, *PLAIN, "--epochs", 3)
    with pytest.raises(InputError, match="arch {.*'patch_size': 16"):
        here(finetune, "--data", folder, "--init", encoder, "--out", trained, *PLAIN)
    next((copied / "train").rglob("*.png")).unlink()
    refused("train-images 24, not 23", "--data", copied, "--out", trained, *PLAIN)
    for split in ("train", "val"):    # other data of as many classes and images
        (copied / split / "class 5").rename(copied / split / "zebra")
    refused("classes .*'class 5'., not .*'zebra'", "--data", copied, "--out", trained, *PLAIN)


@pytest.mark.parametrize("split", ["train", "val"])
def test_an_unreadable_image_stops_the_run_or_is_left_out(copied, tmp_path, split, capfd):
    bad = sorted((copied / split).rglob("*.png"))[3]
    bad.write_bytes(b"no image")
    job = ["--data", copied, "--out", tmp_path / "out", *QUICK, *PLAIN]
    with pytest.raises(OSError, match=f"cannot read image {re.escape(str(bad))} .*: replace it"):
        here(finetune, *job)
    here(finetune, *job, "--skip-corrupt")
    assert capfd.readouterr().err.count(f"{bad} (not an image): left out") == 1
    assert evaluations(tmp_path / "out")[-1]["test_images"] == 7 - (split == "val")


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
    assert first["args"]["train_images"] == 16 and last["test_images"] == 16
    assert (first["args"]["keep_blocks"], first["args"]["seed"]) == (6, 3) and "top1" in last
