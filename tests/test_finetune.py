"""finetune.py: golden numbers, augmentation, data, and real runs on a few small pictures."""
import csv
import io
import math
import os

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
from models import MODELS, InputError, read_log

QUICK = ["--model", "vit_pico", "--image-size", 32, "--device", "cpu", "--workers", 0]
PLAIN = ["--recipe", "improved", "rand_augment=0", "mixup=0", "--batch-size", 8, "--epochs", 2]


def options(*values):
    return finetune.parse_args([str(value) for value in values])


def resolved(*values):
    """Options of one run with all defaults filled in."""
    return finetune.plan(options(*values))[0]


def dataset(items, *values, classes=5, train=True):
    args = resolved("--image-size", 32, *values)
    return finetune.LabelledImages(items, [f"class {k}" for k in range(classes)], args, train)


def save_noise(path, rng, colour=(90, 90, 90), size=(34, 40)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.array(colour) + rng.integers(0, 90, (*size, 3))
    Image.fromarray(pixels.astype(np.uint8)).save(path)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """train/ (6 classes of 4) and val/ (7 images, an odd number) of noise, in several sizes."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for split, number in (("train", 24), ("val", 7)):
        for i in range(number):
            colour = np.eye(6, 3)[i % 6] * 160
            save_noise(root / split / f"class {i % 6}" / f"{i}.png", rng, colour, (30 + i, 40))
    return root


@pytest.fixture(scope="session")
def encoder(tmp_path_factory):
    """A ViT of 24 channels, saved as `pretrain_d2mae.py` saves its encoder, with another mean."""
    torch.manual_seed(0)
    model = MODELS["vit_pico"](img_size=32, patch_size=8)
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


def test_training_leaves_a_classifier_and_a_log(trained):
    classifier = state_of(trained / "best.pt")
    assert classifier["classes"] == [f"class {k}" for k in range(6)]
    assert read_log(trained / "log.jsonl")[-1]["step"] == 6


# ---- golden numbers ----
CLASSIFIERS = {"vit_tiny": [], "vit_tiny_rpe": ["--rpe"], "hiera_tiny": ["--model", "hiera_tiny"]}


@pytest.mark.parametrize("key", CLASSIFIERS)
def test_classifiers_match_the_reference(golden, key):
    model = seed_weights(finetune.build_model(resolved(*CLASSIFIERS[key]), 1000))
    with torch.no_grad():
        logits = model(seeded((2, 3, 224, 224), "images"))
    assert rel_error(logits[:, :32], golden[f"{key}/logits"]) < 1e-4
    assert sum(p.numel() for p in model.parameters()) == golden[f"{key}/params"]


def test_relative_positions_match_the_reference(golden):
    model = finetune.build_model(resolved("--rpe"), 10)
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
    optimizer = finetune.build_optimizer(MODELS["vit_tiny"](num_classes=10), args, 1e-3)
    scales = {group["layer"]: group["lr_scale"] for group in optimizer.param_groups}
    reference = golden["finetune/layer_scale_vit_tiny_0.85"]
    assert np.allclose([scales[i] for i in range(14)], reference, rtol=1e-6)


def test_every_parameter_is_in_the_group_of_its_layer():
    model = MODELS["vit_tiny"](num_classes=10)
    layer_of = layers_of(finetune.build_optimizer(model, resolved(), 1e-3))
    names = {name: layer_of[id(p)] for name, p in model.named_parameters()}
    assert len(layer_of) == len(names)
    assert names["pos_embed"] == names["cls_token"] == names["patch_embed.proj.weight"] == 0
    assert names["blocks.0.norm1.weight"] == 1
    assert names["blocks.11.mlp.fc2.bias"] == 12
    assert names["head.weight"] == names["fc_norm.bias"] == 13


def test_sgd_is_nesterov_s_as_the_authors_build_it():
    model = MODELS["vit_pico"](img_size=32, num_classes=5)
    optimizer = finetune.build_optimizer(model, resolved("--recipe", "transfer"), 0.1)
    assert isinstance(optimizer, torch.optim.SGD)
    assert optimizer.defaults["nesterov"] and optimizer.defaults["momentum"] == 0.9


def test_models_with_relative_positions_start_as_those_of_beit():
    torch.manual_seed(0)
    model = finetune.build_model(resolved("--rpe", *QUICK), 5)
    model.requires_grad_(False)
    for k, block in enumerate(model.blocks, start=1):
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
    items = finetune.list_folder(folder / "train")[0]
    data = dataset(items, "--mean", 0.2, 0.4, 0.6, classes=6)
    pixels = {tuple(data[0, i][0][:, 0, 0].tolist()) for i in range(20)}
    assert (51, 102, 153) in pixels and len(pixels) > 1
    assert (51, 102, 153) not in {tuple(dataset(items, classes=6, train=False)[0, i][0][:, 0, 0])
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
    mixing = finetune.build_mixing(args, 5)
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
    mixing = finetune.build_mixing(resolved("--recipe", "transfer"), 5)
    images, labels = mixing(torch.randn(3, 3, 8, 8), torch.arange(3))
    assert labels.tolist() == [0, 1, 2]


def step_loss(folder, out, *changes):
    """Loss of one training step on all 24 images by the improved recipe with changes."""
    here(finetune, "--data", folder, "--out", out, *QUICK, "--epochs", 1, "--batch-size", 24,
         "--recipe", "improved", "rand_augment=0", "mixup=0", *changes)
    return read_log(out / "log.jsonl")[1]["grad_norm"]


@pytest.mark.parametrize("change", ["erasing=1", "mixup=0.8", "cutmix=1", "rand_augment=9",
                                    "smoothing=0.1"])
def test_each_part_of_a_recipe_reaches_the_training_step(folder, tmp_path, change):
    plain = step_loss(folder, tmp_path / "a")
    assert plain == step_loss(folder, tmp_path / "b") != step_loss(folder, tmp_path / "c", change)


# ---- data ----
def test_less_data_is_a_part_of_more():
    items = [(i, i % 3) for i in range(60)]
    two, five, half, everything = (finetune.select(items, share, shots, 1)
                                   for share, shots in ((1, 2), (1, 5), (0.5, None), (1, None)))
    assert set(two) < set(five) < set(half) < set(everything) == set(items)
    assert [sum(label == k for _, label in five) for k in range(3)] == [5, 5, 5]
    assert finetune.select(items, 1, 5, 2) != five


@pytest.fixture
def copied(folder, tmp_path):
    """A copy of the folder to break."""
    for split in ("train", "val"):
        for path in (folder / split).rglob("*.png"):
            target = tmp_path / "data" / split / path.parent.name / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    return tmp_path / "data"


def refused(words, *values):
    with pytest.raises(InputError, match=words):
        here(finetune, *QUICK, *values)


def test_flat_validation_images_are_explained(copied, tmp_path):
    for path in list((copied / "val").rglob("*.png")):
        path.rename(copied / "val" / path.name)
        if not list(path.parent.iterdir()):
            path.parent.rmdir()
    refused("val has no images in class folders .* valprep.sh", "--data", copied, "--out", tmp_path)


def test_another_class_in_val_is_named(copied, tmp_path):
    (copied / "val" / "class 3").rename(copied / "val" / "other")
    refused("not the same: class 3 is class 3 here and class 4 there", "--data", copied, "--out",
            tmp_path)


def test_a_class_missing_in_val_is_named(copied, tmp_path):
    for path in (copied / "val" / "class 5").iterdir():
        path.unlink()
    (copied / "val" / "class 5").rmdir()
    refused("val 5, not the same: class 5 is class 5 here and absent there", "--data", copied,
            "--out", tmp_path)


def test_an_empty_class_is_named(copied, tmp_path):
    (copied / "train" / "zebra").mkdir()
    refused("zebra", "--data", copied, "--out", tmp_path)


@pytest.mark.parametrize("words, values", [
    ("none/train has no images", ["--data", "none"]),
    ("imagenet has 1000 classes", ["--dataset", "imagenet"]),
    ("add --download", ["--dataset", "cifar10"])])
def test_wrong_data_ends_in_a_sentence(folder, tmp_path, words, values):
    refused(words, "--data", folder, "--out", tmp_path, *values)


@pytest.mark.parametrize("label", [5, -1])
def test_labels_out_of_range_end_in_a_sentence(label):
    with pytest.raises(InputError, match="none of the 5 classes"):
        dataset([("a.png", label)])


@pytest.fixture
def broken(folder, tmp_path):
    """A png that is cut short, and a good one."""
    good = next((folder / "train").rglob("*.png"))
    bad = tmp_path / "bad.png"
    bad.write_bytes(good.read_bytes()[:200])
    return str(bad), str(good)


def test_another_image_stands_in_for_a_broken_one(broken):
    bad, good = broken
    image, label, index, unreadable = dataset([(bad, 0), (good, 1)])[0, 0]
    assert (label, index, unreadable) == (1, 0, True) and image.shape == (3, 32, 32)


def test_items_depend_on_seed_epoch_and_index_alone(folder):
    items = finetune.list_folder(folder / "train")[0]
    keys = [[(0, 3), (0, 4)], [(1, 3), (0, 3)]]
    data = dataset(items, classes=6)
    spawned = DataLoader(data, batch_sampler=keys, num_workers=1, multiprocessing_context="spawn")
    (a, _, _, _), (b, _, _, _) = spawned
    torch.manual_seed(99)
    assert torch.equal(a[0], data[0, 3][0]) and torch.equal(a[0], b[1])
    assert not torch.equal(a[0], b[0])
    assert not torch.equal(a[0], dataset(items, "--seed", 1, classes=6)[0, 3][0])


def test_items_leave_the_generator_of_the_process_alone(folder):
    data = dataset(finetune.list_folder(folder / "train")[0], classes=6)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    data[0, 0]
    assert torch.equal(before, torch.get_rng_state())


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
    assert train[0, 1][0].shape == test[0, 1][0].shape == (3, 32, 32)
    labels = [[label for _, label in part.items] for part in (train, test)]
    if name != "cifar10":    # an unreadable file is named by its path
        assert train.name(0).startswith(str(root)) and train.name(0).endswith(".jpg")
    return train.classes, *labels


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
    with pytest.raises(SystemExit):
        here(finetune, "--dataset", "pets", "--data", tmp_path, "--out", tmp_path / "out", *QUICK,
             *PLAIN, "--batch-size", 4)
    assert f"error: cannot read image {bad}: replace it" in capfd.readouterr().err


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
    monkeypatch.delattr(datasets.Flowers102, "classes", raising=False)    # as in older versions
    assert splits_of("flowers", tmp_path)[0][101] == "102"


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


def test_cars_say_where_their_files_come_from(tmp_path):
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


def test_an_option_or_a_change_stands_above_the_recipe_zero_included():
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
    ("fewer than --epochs", ["--warmup-epochs", 5, "--epochs", 5]),
    ("height and width", ["--image-size", 32, 32, 32]),
    ("multiples of 16", ["--image-size", 40]),
    ("does not exist", ["--init", "none.pt"]),
    ("give --init", ["--keep-blocks", 3]),
    ("defined for ViT", ["--model", "hiera_tiny", "--rpe", "--image-size", 32]),
    ("multiple of 20", ["--accum-steps", 20, "--batch-size", 30])]


@pytest.mark.parametrize("words, values", BAD_OPTIONS)
def test_options_that_make_no_sense_are_told_before_the_work(folder, tmp_path, words, values):
    refused(words, "--data", folder, "--out", tmp_path, *values)


@pytest.mark.parametrize("words, values", [
    ("[0, 1]", ["--recipe", "mae", "erasing=2"]),
    ("[0, 10]", ["--recipe", "improved", "rand_augment=15"]),
    ("neither a recipe", ["--recipe", "best"]),
    ("[0, 4294967296)", ["--seed", "5000000000"]),
    ("(0, 1]", ["--std", "0", "0", "0"]),
    ("divide values of 0..255 by 255", ["--mean", "123.7", "116.3", "103.5"]),
    ("(0, 1]", ["--data-fraction", "1.5"]),
    ("[1, inf)", ["--epochs", "0"])])
def test_values_out_of_range_end_in_a_sentence(capsys, words, values):
    with pytest.raises(SystemExit):
        finetune.parse_args(values)
    assert words in capsys.readouterr().err


def test_a_mistake_ends_the_script_in_one_line(tmp_path):
    done = run("finetune.py", "--data", tmp_path / "none", "--out", tmp_path, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.strip().startswith("error: ")


# ---- hand-over ----
def test_size_model_and_colours_come_from_the_encoder(encoder):
    args = resolved("--init", encoder)
    assert (args.model, args.image_size, args.patch_size) == ("vit_pico", [32, 32], 8)
    assert args.mean == [0.4, 0.5, 0.6]


def test_patches_of_vit_huge_are_14_pixels():
    assert resolved("--model", "vit_huge").patch_size == 14


@pytest.mark.parametrize("keep", [None, 0, 5, 12])
def test_pretrained_weights_arrive_whole_or_by_blocks(encoder, keep):
    torch.manual_seed(1)
    blocks = [] if keep is None else ["--keep-blocks", keep]
    model = finetune.build_model(resolved("--init", encoder, *blocks), 5).state_dict()
    source = state_of(encoder)["model"]
    for k in range(12):
        name = f"blocks.{k}.mlp.fc1.weight"
        assert torch.equal(model[name], source[name]) == (keep is None or k < keep)
    assert torch.equal(model["patch_embed.proj.weight"], source["patch_embed.proj.weight"])


def test_more_blocks_than_there_are_are_refused(encoder, folder, tmp_path):
    refused("0..12", "--init", encoder, "--keep-blocks", 13, "--data", folder, "--out", tmp_path)


def test_a_file_with_other_heads_is_refused(encoder, folder, tmp_path):
    file = state_of(encoder)
    file["arch"]["num_heads"] = 1
    torch.save(file, tmp_path / "one.pt")
    refused("num_heads = 1", "--init", tmp_path / "one.pt", "--data", folder, "--out", tmp_path)


def test_names_are_those_of_timm(trained):
    timm = pytest.importorskip("timm")
    own, _, _ = finetune.load_classifier(options("--init", trained / "best.pt"))
    model = timm.create_model("vit_tiny_patch16_224", num_heads=own.arch["num_heads"], embed_dim=96,
                              num_classes=6, global_pool="avg", img_size=32).eval()
    model.load_state_dict(own.state_dict(), strict=True)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert rel_error(own(x), model(x)) < 1e-4


def test_classifier_exports():
    model = MODELS["vit_pico"](img_size=32, num_classes=5).eval()
    x = torch.randn(1, 3, 32, 32)
    exported = torch.export.export(model, (x,)).module()
    with torch.no_grad():
        assert rel_error(exported(x), model(x)) < 1e-5


# ---- evaluation ----
def test_accuracies_match_a_loop(folder, trained):
    args = resolved("--data", folder, *QUICK)
    model, classes, _ = finetune.load_classifier(options("--init", trained / "best.pt"))
    test_set = finetune.make_data(args, 0, 1)[1]
    values = finetune.evaluate((0, 1, torch.device("cpu"), torch.float32), args, model, test_set)
    right, of_class, losses = [], [[] for _ in classes], []
    for i in range(len(test_set)):
        image, label, _, _ = test_set[0, i]
        with torch.no_grad():
            logits = model(models.normalize(image[None]))[0]
        order = logits.argsort(descending=True).tolist()
        right.append(order.index(label))
        of_class[label].append(order[0] == label)
        losses.append((logits.logsumexp(0) - logits[label]).item())
    assert len(classes) == 6    # so that top-5 is no triviality
    assert values["top1"] == pytest.approx(100 * np.mean([r == 0 for r in right]), abs=1e-3)
    assert values["top5"] == pytest.approx(100 * np.mean([r < 5 for r in right]), abs=1e-3)
    mean_class = 100 * np.mean([np.mean(hits) for hits in of_class])
    assert values["mean_class"] == pytest.approx(mean_class, abs=1e-3)
    assert values["val_loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    assert values["test_images"] == 7


def test_an_unreadable_test_image_is_left_out_of_all_means(broken):
    bad, good = broken
    data = dataset([(good, 1), (bad, 0)], "--skip-corrupt", *QUICK, train=False)
    model = MODELS["vit_pico"](img_size=32, num_classes=5)
    run_ = (0, 1, torch.device("cpu"), torch.float32)
    values = finetune.evaluate(run_, data.args, model, data)
    assert values["test_images"] == 1 and values["mean_class"] in (0, 100)


def test_eval_prints_the_numbers_of_the_training(trained, capsys):
    last = [line for line in read_log(trained / "log.jsonl") if "top1" in line][-1]
    here(finetune, "--init", trained / "last.pt", "--eval", "--workers", 0, "--device", "cpu")
    assert f"top-1 {last['top1']:.2f}, top-5 {last['top5']:.2f}" in capsys.readouterr().out


def test_eval_refuses_data_of_other_classes(trained, tmp_path):
    file = state_of(trained / "best.pt")
    file["classes"] = file["classes"][::-1]
    torch.save(file, tmp_path / "renamed.pt")
    refused("class 0 is class 0 here and class 5 there", "--eval", "--init",
            tmp_path / "renamed.pt")


@pytest.mark.parametrize("job", [["--eval"], ["--predict", "a.png"]])
def test_an_encoder_is_no_classifier(encoder, job):
    refused("no classifier", "--init", encoder, *job)


def test_predict_names_the_likeliest_classes(folder, trained, capsys):
    image = next((folder / "val").rglob("*.png"))
    here(finetune, "--predict", image, "--out", trained, "--device", "cpu")
    words = capsys.readouterr().out.strip().removeprefix(f"{image}: ").split(", ")
    shares = [float(word.split()[-1].rstrip("%")) for word in words]
    assert len(words) == 5 and shares == sorted(shares, reverse=True) and 50 < sum(shares) < 100.5


def test_predict_turns_a_photo_upright(trained, tmp_path, capsys):
    upright = textured_image()
    exif = Image.Exif()
    exif[0x0112] = 6    # the camera was turned: show it rotated by 270 degrees
    upright.save(tmp_path / "upright.png")
    upright.rotate(90, expand=True).save(tmp_path / "turned.png", exif=exif)
    here(finetune, "--predict", tmp_path / "upright.png", tmp_path / "turned.png", "--out", trained,
         "--device", "cpu")
    first, second = (line.split(": ")[1] for line in capsys.readouterr().out.strip().splitlines())
    assert first == second


def test_predict_names_a_file_that_is_no_image(trained, broken):
    refused("bad.png cannot be read", "--predict", broken[0], "--out", trained)


# ---- real runs ----
@pytest.fixture(scope="module")
def two_processes(folder, tmp_path_factory):
    """The run of `trained` in two processes, each with an --out of its own, as on machines without
    a common disk; then once more from step 3 on, by a last.pt that only process 0 has."""
    base = tmp_path_factory.mktemp("two")
    script = base / "twice.py"
    script.write_text("""
import os, shutil, sys, torch
sys.path.insert(0, os.getcwd())
import finetune
out = f"{sys.argv[1]}/{os.environ['RANK']}"
args = finetune.parse_args([*sys.argv[2:], "--out", out])
finetune.main(args)
if os.environ["RANK"] == "0":
    shutil.copytree(out, f"{sys.argv[1]}/first")
    state = torch.load(f"{out}/last.pt", weights_only=True)
    torch.save(dict(state, step=3), f"{out}/last.pt")
finetune.main(args)
""")
    run(script, base, "--data", folder, *QUICK, *PLAIN, torchrun=2)
    return base


def test_two_processes_train_the_same_weights_as_one(trained, two_processes):
    assert same_weights(two_processes / "first", trained, tolerance=1e-5)


def test_two_processes_count_each_of_7_images_once(trained, two_processes):
    one, two = ([line for line in read_log(out / "log.jsonl") if "top1" in line][-1]
                for out in (trained, two_processes / "first"))
    assert two.pop("val_loss") == pytest.approx(one.pop("val_loss"), rel=1e-4)
    assert one == two and two["test_images"] == 7


def test_two_processes_go_on_where_only_the_first_has_the_checkpoint(two_processes):
    lines = read_log(two_processes / "0/log.jsonl")
    assert [line["step"] for line in lines if "lr" in line] == [6]
    assert not (two_processes / "1/last.pt").exists()


def test_killed_run_resumes_bit_for_bit(folder, tmp_path):
    here_options = ["--data", folder, *QUICK, "--recipe", "mae", "--batch-size", 6, "--epochs", 4]
    straight = check_kill_and_resume(finetune, here_options, tmp_path, at_step=6)
    assert state_of(straight / "last.pt")["step"] == 16


def test_an_evaluation_lost_by_a_kill_is_made_again(folder, trained, tmp_path):
    """A kill between last.pt and the evaluation: best.pt comes out the same."""
    last = state_of(trained / "last.pt")
    torch.save(dict(last, best=-1.0), tmp_path / "last.pt")
    here(finetune, "--data", folder, "--out", tmp_path, *QUICK, *PLAIN)
    best = state_of(tmp_path / "best.pt")
    assert best["step"] == 6 and best["best"] == read_log(tmp_path / "log.jsonl")[-1]["top1"]


def test_resume_takes_remedies_and_moved_folders(folder, copied, trained, tmp_path, capsys):
    torch.save(state_of(trained / "last.pt"), tmp_path / "last.pt")
    here(finetune, "--data", copied, "--out", f"{tmp_path}/", *QUICK, *PLAIN, "--clip-grad", 1,
         "--dtype", "fp16", "--skip-corrupt", "--base-lr", 1e-4, "--accum-steps", 2)
    assert "base_lr is now 0.0001" in capsys.readouterr().out


def test_resume_refuses_another_schedule(folder, trained):
    refused("epochs 2, not 3", "--data", folder, "--out", trained, *PLAIN, "--epochs", 3)


def test_resume_refuses_another_encoder(folder, encoder, trained):
    refused("init-sha None, not [0-9a-f]+", "--data", folder, "--init", encoder, "--out", trained,
            *PLAIN)


def test_resume_refuses_other_classes(copied, trained):
    for split in ("train", "val"):
        (copied / split / "class 5").rename(copied / split / "zebra")
    refused("not the same: class 5 is zebra here and class 5 there", "--data", copied, "--out",
            trained, *PLAIN)


def test_resume_refuses_fewer_classes_of_as_many_images(copied, trained):
    for split in ("train", "val"):
        folder = copied / split / "class 5"
        for path in list(folder.iterdir()):
            path.rename(copied / split / "class 4" / f"moved {path.name}")
        folder.rmdir()
    refused("classes 6, not 5", "--data", copied, "--out", trained, *PLAIN)


def test_an_unreadable_test_image_stops_the_run_and_is_named(copied, tmp_path, capfd):
    bad = sorted((copied / "val").rglob("*.png"))[3]
    bad.write_bytes(b"no image")
    with pytest.raises(SystemExit):
        here(finetune, "--data", copied, "--out", tmp_path / "out", *QUICK, *PLAIN)
    assert f"error: cannot read image {bad}: replace it" in capfd.readouterr().err


def test_resume_refuses_another_number_of_images(copied, trained):
    next((copied / "train").rglob("*.png")).unlink()
    refused("train-images 24, not 23", "--data", copied, "--out", trained, *PLAIN)


@pytest.mark.parametrize("batch, accum", [(4, 2), (6, 2), (2, 2)])
def test_odd_batches_with_mixing_and_accumulation_train(folder, tmp_path, batch, accum):
    here(finetune, "--data", folder, "--shots", 2, "--out", tmp_path, *QUICK, "--epochs", 1,
         "--recipe", "mae", "--batch-size", batch, "--accum-steps", accum)
    assert state_of(tmp_path / "last.pt")["model"]["head.bias"].abs().sum() > 0


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_on_the_cpu_logs_plain_json(folder, tmp_path, dtype):
    here(finetune, "--data", folder, "--out", tmp_path, *QUICK, *PLAIN, "--dtype", dtype)
    text = (tmp_path / "log.jsonl").read_text()
    assert "Infinity" not in text and "NaN" not in text
    assert read_log(tmp_path / "log.jsonl")[-1]["val_loss"] < 3


def test_hiera_trains(folder, tmp_path):
    here(finetune, "--data", folder, "--out", tmp_path, *QUICK, *PLAIN, "--model", "hiera_tiny")
    assert read_log(tmp_path / "log.jsonl")[-1]["test_images"] == 7


@pytest.mark.skipif(not os.environ.get("SLOW"), reason="a minute of compiling: set SLOW=1")
def test_compiled_training_equals_eager(folder, trained, tmp_path):
    here(finetune, "--data", folder, "--out", tmp_path, *QUICK, *PLAIN, "--compile")
    assert same_weights(tmp_path, trained, tolerance=1e-4)


def test_a_corrupt_image_stops_all_processes_with_one_sentence(copied, tmp_path):
    bad = sorted((copied / "train").rglob("*.png"))[5]
    bad.write_bytes(b"no image")
    done = run("finetune.py", "--data", copied, "--out", tmp_path / "out", *QUICK, *PLAIN,
               torchrun=2, check=False)
    assert done.returncode != 0 and done.stderr.count("error: ") == 1
    assert f"error: cannot read image {bad}" in done.stderr


def test_skip_corrupt_counts_what_it_replaces(copied, tmp_path):
    sorted((copied / "train").rglob("*.png"))[5].write_bytes(b"no image")
    here(finetune, "--data", copied, "--out", tmp_path / "out", *QUICK, *PLAIN, "--skip-corrupt",
         "--batch-size", 24)
    lines = read_log(tmp_path / "out/log.jsonl")
    assert [line["unreadable"] for line in lines if "lr" in line] == [1]


def test_sweep_writes_the_numbers_of_figure_4(folder, encoder, tmp_path):
    here(finetune, "--data", folder, "--init", encoder, "--out", tmp_path, "--sweep-keep-blocks", 0,
         12, "--data-fraction", 0.5, 1, "--seed", 0, 1, *PLAIN, "--epochs", 1, "--device", "cpu",
         "--workers", 0)
    rows = list(csv.DictReader(io.StringIO((tmp_path / "fig4.csv").read_text())))
    assert list(rows[0]) == ["keep_blocks", "data_fraction", "seed", "top1"]
    found = {(row["keep_blocks"], row["data_fraction"], row["seed"]) for row in rows}
    assert found == {(k, f, s) for k in ("0", "12") for f in ("0.5", "1.0") for s in "01"}


def test_demo_compares_scratch_and_pretrained(tmp_path, capsys):
    torch.manual_seed(0)
    model = MODELS["vit_pico"](img_size=48, patch_size=8)
    torch.save(dict(model=model.state_dict(), arch=model.arch), tmp_path / "encoder.pt")
    here(finetune, "--demo", "--init", tmp_path / "encoder.pt", "--out", tmp_path, "--epochs", 1,
         "--seed", 0, 1, "--device", "cpu", "--batch-size", 16, "--shots", 1, "--image-size", 16)
    lines = capsys.readouterr().out.strip().splitlines()[-3:]
    assert [line.split()[0] for line in lines] == ["scratch", "pre-trained", "difference"]
    assert all(" +- " in line for line in lines)
