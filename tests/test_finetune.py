"""finetune.py: golden numbers, augmentation, data, probes, and real runs on a few small pictures."""
import csv
import json
import math
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps
from torch.utils.data import DataLoader

import finetune
import models
from conftest import ROOT, rel_error, run, seed_weights, seeded

SMALL = ["--image-size", 32, "--patch-size", 16, "--device", "cpu", "--workers", 0, "--log-every", 1]
PLAIN = ["--rand-augment", 0, "--mixup", 0, "--warmup-epochs", 0]    # the same numbers in one process and in two


def options(*values):
    return finetune.parse_args([str(v) for v in values])


def main(*values):
    return finetune.main(options(*values))


def file_of(path):
    return torch.load(path, weights_only=True)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """train/ (5 classes of 5) and val/ (7 images, an odd number) of coloured noise, of several sizes."""
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for split, number in (("train", 25), ("val", 7)):
        for i in range(number):
            path = root / split / f"class {i % 5}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            color = np.eye(5, 3)[i % 5] * 160
            Image.fromarray((color + rng.integers(0, 90, (30 + i, 40, 3))).astype(np.uint8)).save(path)
    return root


@pytest.fixture(scope="session")
def encoder(tmp_path_factory):
    """encoder.pt of a real, two-step pre-training."""
    out = tmp_path_factory.mktemp("pretrained")
    run("pretrain_d2mae.py", "--method", "mae", "--data", "shapes", "--out", out, "--image-size", 32, "--batch-size", 8,
        "--max-steps", 2, "--val-images", 8, "--workers", 0, "--device", "cpu")
    return out / "encoder.pt"


@pytest.fixture(scope="session")
def trained(folder, tmp_path_factory):
    """A finished run from scratch: two epochs of three steps of 8 images."""
    out = tmp_path_factory.mktemp("trained")
    main("--data", folder, "--out", out, "--epochs", 2, "--batch-size", 8, *SMALL, *PLAIN)
    return out


# ---- golden numbers ----
@pytest.mark.parametrize("key, extra", [("vit_tiny", ["--model", "vit_tiny"]), ("vit_tiny_rpe", ["--model", "vit_tiny", "--rpe"]),
                                        ("hiera_tiny", ["--model", "hiera_tiny"])])
def test_classifiers_match_the_reference(golden, key, extra):
    model = seed_weights(finetune.build_model(finetune.resolve(options(*extra)), 1000))
    with torch.no_grad():
        assert rel_error(model(seeded((2, 3, 224, 224), "images"))[:, :32], golden[f"{key}/logits"]) < 1e-4
    assert sum(p.numel() for p in model.parameters()) == golden[f"{key}/params"]
    if key == "vit_tiny_rpe":
        assert np.array_equal(model.rel_pos_index[:20, :20], golden[f"{key}/index_corner"])
        assert model.rel_pos_index.sum() == golden[f"{key}/index_sum"]
        assert all(len(b.attn.relative_position_bias_table) == golden[f"{key}/table_rows"] for b in model.blocks)


def test_schedule_and_layer_decay_match_the_reference(golden):
    rates = [finetune.lr_at(step, 3000, 50, 4e-3, 1e-6) for step in golden["finetune/lr_steps"].tolist()]
    assert np.allclose(rates, golden["finetune/lr"], rtol=1e-6, atol=0)
    model = models.MODELS["vit_tiny"](num_classes=10)
    groups = finetune.param_groups(model, 0.05, 0.85, 12)
    scales = {group["layer"]: group["lr_scale"] for group in groups}
    assert np.allclose([scales[i] for i in range(14)], golden["finetune/layer_scale_vit_tiny_0.85"], rtol=1e-6)
    layer_of = {id(p): group["layer"] for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(layer_of) == len(list(model.parameters()))
    names = {name: layer_of[id(p)] for name, p in model.named_parameters()}
    assert names["pos_embed"] == names["cls_token"] == names["patch_embed.proj.weight"] == 0
    assert names["blocks.0.norm1.weight"] == 1 and names["blocks.11.mlp.fc2.bias"] == 12 and names["head.weight"] == names["fc_norm.bias"] == 13


# ---- augmentation ----
def test_rand_augment_arguments():
    enhance = {0: 1.0, 5: 1.45, 10: 1.9}
    expected = {"AutoContrast": {0: None, 5: None, 10: None}, "Equalize": {0: None, 5: None, 10: None}, "Invert": {0: None, 5: None, 10: None},
                "Rotate": {0: 0, 5: 15, 10: 30}, "Posterize": {0: 4, 5: 2, 10: 0}, "Solarize": {0: 256, 5: 128, 10: 0},
                "SolarizeAdd": {0: 0, 5: 55, 10: 110}, "Color": enhance, "Contrast": enhance, "Brightness": enhance, "Sharpness": enhance,
                "ShearX": {0: 0, 5: 0.15, 10: 0.3}, "ShearY": {0: 0, 5: 0.15, 10: 0.3},
                "TranslateX": {0: 0, 5: 0.225, 10: 0.45}, "TranslateY": {0: 0, 5: 0.225, 10: 0.45}}
    assert set(expected) == set(finetune.RAND_AUGMENT) and len(expected) == 15
    for name, by_level in expected.items():
        argument = finetune.RAND_AUGMENT[name][0]
        for level, value in by_level.items():
            assert argument(level, 1) == (None if value is None else pytest.approx(value)), name
    assert finetune.RAND_AUGMENT["Rotate"][0](5, -1) == -15 and finetune.RAND_AUGMENT["Color"][0](5, -1) == pytest.approx(0.55)
    assert finetune.RAND_AUGMENT["Solarize"][0](9.9, -1) == 3 and finetune.RAND_AUGMENT["Posterize"][0](9.9, -1) == 1


def test_rand_augment_pixels_are_pillow_s():
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(20, 220, (12, 10, 3), dtype=np.uint8)).resize((40, 48), Image.Resampling.BICUBIC)
    bicubic = dict(resample=Image.Resampling.BICUBIC, fillcolor=(124, 116, 104))
    affine = lambda *c: image.transform(image.size, Image.Transform.AFFINE, c, **bicubic)
    pillow = {"AutoContrast": (None, ImageOps.autocontrast(image)), "Equalize": (None, ImageOps.equalize(image)),
              "Invert": (None, ImageOps.invert(image)), "Rotate": (17.0, image.rotate(17, **bicubic)),
              "Posterize": (2, ImageOps.posterize(image, 2)), "Solarize": (90, ImageOps.solarize(image, 90)),
              "SolarizeAdd": (30, Image.fromarray(np.where(np.array(image) < 128, np.minimum(255, np.array(image) + 30.0), image).astype(np.uint8))),
              "Color": (1.7, ImageEnhance.Color(image).enhance(1.7)), "Contrast": (0.4, ImageEnhance.Contrast(image).enhance(0.4)),
              "Brightness": (1.6, ImageEnhance.Brightness(image).enhance(1.6)), "Sharpness": (1.9, ImageEnhance.Sharpness(image).enhance(1.9)),
              "ShearX": (0.2, affine(1, 0.2, 0, 0, 1, 0)), "ShearY": (0.2, affine(1, 0, 0, 0.2, 1, 0)),
              "TranslateX": (0.25, affine(1, 0, -10, 0, 1, 0)), "TranslateY": (0.25, affine(1, 0, 0, 0, 1, -12))}
    for name, (argument, expected) in pillow.items():
        got, expected = (np.array(x, dtype=int) for x in (finetune.RAND_AUGMENT[name][1](image, argument), expected))
        if name == "ShearX" and abs(got - expected).max() > 2:    # which way a positive argument leans does not matter: the sign is random
            expected = np.array(affine(1, -0.2, 0, 0, 1, 0), dtype=int)
        if name == "ShearY" and abs(got - expected).max() > 2:
            expected = np.array(affine(1, 0, 0, -0.2, 1, 0), dtype=int)
        assert abs(got - expected).max() <= 1, name
        assert (got != np.array(image)).any(), name
    for argument, operation in finetune.RAND_AUGMENT.values():               # both ends of the scale; 0 bits are black
        for level, sign in ((0, 1), (10, 1), (10, -1)):
            assert operation(image, argument(level, sign)).size == image.size
    assert np.array(finetune.RAND_AUGMENT["Posterize"][1](image, 0)).max() == 0


def test_rand_augment_draws(monkeypatch):
    levels, image = [], torch.zeros(3, 4, 4, dtype=torch.uint8)
    monkeypatch.setattr(finetune, "RAND_AUGMENT", {"probe": (lambda m, s: levels.append((m, s)), lambda x, v: x)})
    torch.manual_seed(0)
    for _ in range(1000):
        finetune.rand_augment(image, 9)
    level, sign = map(np.array, zip(*levels))
    assert 930 < len(levels) < 1070                                          # two operations, each with probability 1/2
    assert level.max() <= 10 and abs(np.median(level) - 9) < 0.06 and 0.4 < level.std() < 0.55 and 0.45 < (sign == 1).mean() < 0.55


def test_random_erasing():
    torch.manual_seed(0)
    images = torch.full((400, 3, 32, 24), 7.0)
    erased = (finetune.random_erasing(images, 0.25) != 7).all(dim=1)
    hit = erased.flatten(1).any(dim=1)
    assert 0.18 < hit.float().mean() < 0.32
    for mask in erased[hit]:
        rows, columns = mask.any(dim=1), mask.any(dim=0)
        assert mask.sum() == rows.sum() * columns.sum()                      # a full rectangle
        assert 0.01 < mask.float().mean() < 0.4
    assert (finetune.random_erasing(images, 0.0) == 7).all()


@pytest.mark.parametrize("batch", [1, 3, 4])
@pytest.mark.parametrize("mixup, cutmix", [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_mixing_and_its_loss(batch, mixup, cutmix):
    torch.manual_seed(batch)
    K, images, labels = 5, torch.arange(batch).float()[:, None, None, None].expand(batch, 3, 8, 8).contiguous(), torch.arange(batch) % 5
    mixed, targets = finetune.mix_batch(images, finetune.soft_targets(labels, K, 0.1), mixup, cutmix)
    assert torch.allclose(targets.sum(dim=1), torch.ones(batch))
    partner = batch - 1 - torch.arange(batch)
    lam = ((targets[0, labels[0]] - 0.02) / 0.9).item() if batch > 1 else 1.0
    assert torch.allclose(mixed.mean(dim=(1, 2, 3)), lam * torch.arange(batch) + (1 - lam) * partner, atol=1e-5)    # pixels as targets
    logits, expected = torch.randn(batch, K), 0.0
    for i in range(batch):
        norm = math.log(sum(math.exp(v) for v in logits[i].tolist()))
        for k in range(K):
            hard = lambda j: 0.9 * (labels[j].item() == k) + 0.02
            expected -= (lam * hard(i) + (1 - lam) * hard(partner[i].item())) * (logits[i, k].item() - norm) / batch
    assert finetune.soft_cross_entropy(logits, targets).item() == pytest.approx(expected, rel=1e-5)


# ---- data ----
def test_fewer_images_are_a_part_of_more():
    items = [(i, i % 3) for i in range(60)]
    few, more, half = (finetune.select(items, shots=n, seed=1) for n in (2, 5, None)), None, finetune.select(items, fraction=0.5, seed=1)
    two, five, everything = few
    assert set(two) < set(five) < set(half) < set(everything) == set(items)
    assert [sum(label == k for _, label in five) for k in range(3)] == [5, 5, 5]
    assert finetune.select(items, shots=5, seed=2) != five


def test_wrong_folders_end_in_a_sentence(folder, tmp_path):
    def copy(name):
        root = tmp_path / name
        for split in ("train", "val"):
            for path in (folder / split).rglob("*.png"):
                (root / split / path.parent.name).mkdir(parents=True, exist_ok=True)
                (root / split / path.parent.name / path.name).write_bytes(path.read_bytes())
        return root
    flat = copy("flat")
    for path in list((flat / "val").rglob("*.png")):
        path.rename(flat / "val" / path.name)
        if not list(path.parent.iterdir()):
            path.parent.rmdir()
    extra, less, empty = copy("extra"), copy("less"), copy("empty")
    (extra / "val" / "class 3").rename(extra / "val" / "other")
    [p.unlink() for p in (less / "val" / "class 4").iterdir()]
    (less / "val" / "class 4").rmdir()
    (empty / "train" / "zebra").mkdir()
    for root, words in ((flat, "holds 7 images and no class folders"), (extra, "val lacks class 3, train lacks other"),
                        (less, "has 5 classes, .*val 4, not the same"), (empty, "without an image: zebra"), (tmp_path / "none", "is not a folder")):
        with pytest.raises(models.InputError, match=words):
            main("--data", root, "--out", tmp_path / "out", *SMALL)
    with pytest.raises(models.InputError, match="label 5, the 5 classes are 0..4"):
        finetune.LabelledImages([("a.png", 5)], finetune.read_image, [32, 32], 5)
    with pytest.raises(models.InputError, match="imagenet has 1000 classes"):
        main("--data", folder, "--dataset", "imagenet", "--out", tmp_path / "out", *SMALL)
    with pytest.raises(models.InputError, match="add --download"):
        main("--data", tmp_path, "--dataset", "cifar10", "--out", tmp_path / "out", *SMALL)


def test_unreadable_image(folder, tmp_path):
    good, bad = str(next((folder / "train").rglob("*.png"))), tmp_path / "bad.png"
    bad.write_bytes(open(good, "rb").read()[:200])
    make = lambda **more: finetune.LabelledImages([(str(bad), 0), (good, 1)], finetune.read_image, [32, 32], 2, **more)
    with pytest.raises(models.InputError, match="bad.png"):
        make()[0, 0]
    image, label, index, replaced = make(skip_corrupt=True)[0, 0]
    assert (label, index, replaced) == (1, 1, 1) and image.shape == (3, 32, 32)
    assert make(skip_corrupt=True, train=False)[0][1] == -1                  # not counted in an accuracy


def test_items_depend_on_seed_epoch_and_index_alone(folder):
    items = finetune.list_folder(folder / "train")[1]
    make = lambda seed: finetune.LabelledImages(items, finetune.read_image, [32, 32], 5, magnitude=9, seed=seed)
    keys = [[(0, 3), (0, 4)], [(1, 3), (0, 3)]]
    spawned = DataLoader(make(0), batch_sampler=keys, num_workers=1, multiprocessing_context="spawn")    # Windows, macOS
    (a, _, _, _), (b, _, _, _) = spawned
    torch.manual_seed(99)
    assert torch.equal(a[0], make(0)[0, 3][0]) and torch.equal(a[0], b[1])
    assert not torch.equal(a[0], b[0]) and not torch.equal(a[0], make(1)[0, 3][0])


def test_torchvision_sets(tmp_path):
    """The splits and labels of two sets in torchvision's own layout: labels come from names that torchvision does not share."""
    picture = Image.new("RGB", (20, 24), "red")
    for sub in ("oxford-iiit-pet/images", "oxford-iiit-pet/annotations", "fgvc-aircraft-2013b/data/images"):
        (tmp_path / sub).mkdir(parents=True)
    for split in ("trainval", "test"):
        names = [f"{breed}_{split}{i}" for breed in ("Abyssinian", "beagle") for i in range(2)]
        (tmp_path / f"oxford-iiit-pet/annotations/{split}.txt").write_text("".join(f"{n} {1 + n.startswith('b')} 1 1\n" for n in names))
        (tmp_path / f"fgvc-aircraft-2013b/data/images_variant_{split}.txt").write_text("".join(f"{n} {n.split('_')[0]}\n" for n in names))
        for n in names:
            picture.save(tmp_path / f"oxford-iiit-pet/images/{n}.jpg")
            picture.save(tmp_path / f"fgvc-aircraft-2013b/data/images/{n}.jpg")
    (tmp_path / "fgvc-aircraft-2013b/data/variants.txt").write_text("Abyssinian\nbeagle\n")
    for name in ("pets", "aircraft"):
        args = finetune.resolve(options("--dataset", name, "--data", tmp_path, *SMALL))
        train, test, classes, _ = finetune.make_data(args)
        assert len(classes) == 2 and [label for _, label in train.items] == [label for _, label in test.items] == [0, 0, 1, 1]
        assert train[0, 1][0].shape == test[1][0].shape == (3, 32, 32)


# ---- probes ----
def test_bad_options_are_told_before_the_work(folder, tmp_path):
    for options, message in (
            (["--crop-scale", 1, 0.5], "a range within"),
            (["--image-size", 32, 32, 32], "one number, or height and width"),
            (["--epochs", 0], "--epochs 0 must be at least 1"),
            (["--init", folder / "nothing.pt", "--sweep-keep-blocks", 0, 1], "does not exist")):
        with pytest.raises(models.InputError, match=message):
            main("--data", folder, "--out", tmp_path, "--device", "cpu", *options)


def test_resume_refuses_other_images_or_classes(tmp_path):
    rng = np.random.default_rng(0)
    for split, name, k in ((s, n, k) for s in ("train", "val") for n in "ab" for k in range(3)):
        (tmp_path / "data" / split / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(tmp_path / "data" / split / name / f"{k}.png")
    options = ["--data", tmp_path / "data", "--out", tmp_path / "out", "--image-size", 32, "--batch-size", 2, "--epochs", 2, "--workers", 0,
               "--device", "cpu", "--warmup-epochs", 0]
    main(*options, "--max-steps", 1)
    for split in ("train", "val"):
        (tmp_path / "data" / split / "b").rename(tmp_path / "data" / split / "c")
    with pytest.raises(models.InputError, match="other classes"):
        main(*options)
    (tmp_path / "data" / "train" / "c" / "0.png").unlink()
    with pytest.raises(models.InputError, match="6 training images, not 5"):
        main(*options)


def test_knn_equals_a_loop():
    torch.manual_seed(0)
    x, y = F.normalize(torch.randn(7, 5), dim=1), F.normalize(torch.randn(11, 5), dim=1)
    labels, scores = torch.randint(3, (11,)), torch.zeros(7, 3)
    for i in range(7):
        near = sorted(((x[i] @ y[j]).item(), j) for j in range(11))[-4:]
        for cosine, j in near:
            scores[i, labels[j]] += math.exp((cosine - 1) / 0.07)
    for chunk in (1, 3, 512):
        assert torch.allclose(finetune.knn_scores(x, y, labels, 3, 4, 0.07, chunk), scores, rtol=1e-4)


def test_linear_probe_trains_the_head_alone_and_knn_runs(folder, encoder, tmp_path, capsys):
    main("--recipe", "linear", "--init", encoder, "--data", folder, "--out", tmp_path / "linear", "--epochs", 1, "--batch-size", 8,
         "--warmup-epochs", 0, "--device", "cpu", "--workers", 0)
    before, after = file_of(encoder)["model"], file_of(tmp_path / "linear/last.pt")["model"]
    shared = set(before) & set(after)
    assert len(shared) == 148 and all(torch.equal(before[k], after[k]) for k in shared)
    assert after["head.1.bias"].abs().sum() > 0 and after["fc_norm.weight"].eq(1).all()
    values = [main("--eval", "--init", tmp_path / "linear/last.pt", "--out", tmp_path, "--workers", 0), capsys.readouterr().out]
    assert "on 7 images" in values[1]
    main("--recipe", "knn", "--init", encoder, "--data", folder, "--out", tmp_path / "knn", "--device", "cpu", "--workers", 0)
    assert "20 nearest neighbours: top-1" in capsys.readouterr().out and (tmp_path / "knn/classes.csv").exists()


# ---- hand-over ----
def test_pretrained_weights_arrive_whole_and_by_blocks(folder, encoder, tmp_path):
    source = file_of(encoder)["model"]
    for k in (None, 0, 5):
        args = finetune.resolve(options("--init", encoder))
        assert args.image_size == [32, 32] and args.patch_size == 16 and args.model == "vit_tiny"      # of the encoder
        torch.manual_seed(1)
        model = finetune.build_model(args, 5)
        models.load_encoder(model, encoder, k)
        same = {name for name, value in model.state_dict().items() if name in source and torch.equal(value, source[name])}
        kept = {name for name in source if name in model.state_dict() and (not name.startswith("blocks.") or int(name.split(".")[1]) < (12 if k is None else k))}
        constant = {name for name in source if name.startswith("blocks.") and torch.equal(source[name], model.state_dict()[name])} - kept
        assert kept <= same and all(".norm" in name or name.endswith("bias") for name in constant), k
    with pytest.raises(models.InputError, match="0..12"):
        main("--init", encoder, "--keep-blocks", 13, "--data", folder, "--out", tmp_path, "--workers", 0)


def test_files_and_options_that_do_not_fit(folder, encoder, trained, tmp_path):
    three = file_of(encoder)
    three["arch"]["num_heads"] = 3
    torch.save(three, tmp_path / "three.pt")
    for words, extra in (("num_heads = 3", ["--model", "vit_tiny", "--init", tmp_path / "three.pt"]), ("does not exist", ["--init", "none.pt"]),
                         ("give --init", ["--keep-blocks", 3]), ("give --init", ["--recipe", "linear"]), ("defined for ViT", ["--model", "hiera_tiny", "--rpe"]),
                         ("belong to --sweep-keep-blocks", ["--data-fraction", 0.1, 0.5]), ("no classifier", ["--init", encoder, "--eval"]),
                         ("no classifier", ["--init", encoder, "--predict", "a.png"])):
        with pytest.raises(models.InputError, match=words):
            main("--data", folder, "--out", tmp_path / "out", "--workers", 0, *extra)
    renamed = file_of(trained / "best.pt")
    renamed["classes"] = renamed["classes"][::-1]
    torch.save(renamed, tmp_path / "renamed.pt")
    with pytest.raises(models.InputError, match="class 0 is class 0 here and class 4 there"):
        main("--init", tmp_path / "renamed.pt", "--eval", "--out", tmp_path, "--workers", 0)
    done = run("finetune.py", "--data", tmp_path / "none", "--out", tmp_path / "out", check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr and done.stderr.startswith("error: ")


def test_names_are_those_of_timm(trained):
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224", num_heads=12, global_pool="avg", num_classes=5, img_size=32).eval()
    state = file_of(trained / "best.pt")["model"]
    model.load_state_dict(state, strict=True)
    own = finetune.build_model(finetune.resolve(options("--init", trained / "best.pt")), 5).eval()
    own.load_state_dict(state)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert rel_error(own(x), model(x)) < 1e-4


def test_classifier_exports():
    model = models.MODELS["vit_tiny"](img_size=32, num_classes=5).eval()
    x = torch.randn(1, 3, 32, 32)
    exported = torch.export.export(model, (x,)).module()
    with torch.no_grad():
        assert rel_error(exported(x), model(x)) < 1e-5


# ---- real runs ----
def test_two_processes_equal_one(folder, trained, tmp_path):
    """Weights, and the accuracy over an odd number of test images, do not depend on the number of processes."""
    run("finetune.py", "--data", folder, "--out", tmp_path, "--epochs", 2, "--batch-size", 8, *SMALL, *PLAIN, torchrun=2)
    one, two = file_of(trained / "last.pt"), file_of(tmp_path / "last.pt")
    assert max(rel_error(two["model"][k], one["model"][k]) for k in one["model"]) < 1e-4
    assert {k: v for k, v in two["best"].items() if k[:4] in ("top1", "top5", "mean")} == {k: v for k, v in one["best"].items() if k[:4] in ("top1", "top5", "mean")}
    assert two["best"]["test_images"] == 7


def test_killed_run_resumes_bit_for_bit(folder, tmp_path):
    command = ["--data", folder, "--out", tmp_path / "killed", "--epochs", 6, "--batch-size", 4, "--recipe", "mae", "--ema", 0.9, *SMALL]
    process = subprocess.Popen([sys.executable, ROOT / "finetune.py", *map(str, command)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})
    for _ in range(600):
        time.sleep(0.1)
        if (tmp_path / "killed/last.pt").exists() or process.poll() is not None:
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 0 < file_of(tmp_path / "killed/last.pt")["step"] < 36
    main(*command)
    command[3] = tmp_path / "straight"
    main(*command)
    a, b = (file_of(tmp_path / name / "last.pt") for name in ("killed", "straight"))
    assert a["step"] == b["step"] == 36
    assert all(torch.equal(a[part][k], b[part][k]) for part in ("model", "ema") for k in a[part])
    losses = [[(v["step"], v["loss"]) for v in map(json.loads, open(tmp_path / name / "log.jsonl")) if "loss" in v] for name in ("killed", "straight")]
    assert losses[0] == losses[1] and len(losses[0]) == 36


def test_seven_images_with_mixup_and_accumulation(folder, tmp_path):
    """Batches of 4 in two micro-steps from 10 images; odd micro-batches of 1 as well. Weights move."""
    for batch, accum in ((4, 2), (6, 2), (2, 2)):
        out = tmp_path / f"{batch}{accum}"
        main("--data", folder, "--shots", 2, "--out", out, "--epochs", 1, "--batch-size", batch, "--accum-steps", accum, "--mixup", 0.8, "--cutmix", 1,
             "--warmup-epochs", 0, *SMALL)
        assert file_of(out / "last.pt")["model"]["head.bias"].abs().sum() > 0
    with pytest.raises(models.InputError, match="dealt out evenly"):
        main("--data", folder, "--shots", 2, "--out", tmp_path / "x", "--batch-size", 40, "--accum-steps", 20, *SMALL)


def test_eval_predict_and_files(folder, trained, tmp_path, capsys):
    last = [json.loads(line) for line in open(trained / "log.jsonl")][-1]
    main("--init", trained / "last.pt", "--eval", "--out", tmp_path, "--workers", 0)      # data set and folder as stored
    assert f"top-1 {last['top1']:.2f}, top-5 {last['top5']:.2f}" in capsys.readouterr().out
    rows = list(csv.DictReader(open(tmp_path / "classes.csv")))
    assert [row["class"] for row in rows] == [f"class {k}" for k in range(5)] and [int(row["images"]) for row in rows] == [2, 2, 1, 1, 1]
    assert sum(float(row["top1"]) * int(row["images"]) for row in rows) / 7 == pytest.approx(last["top1"], abs=0.01)
    assert (tmp_path / "confusion.png").exists() and (trained / "curves.png").exists()
    image = next((folder / "val").rglob("*.png"))
    main("--predict", image, "--out", trained)
    words = capsys.readouterr().out.strip().removeprefix(f"{image}: ").split(", ")
    assert len(words) == 5 and sum(float(w.split()[-1].rstrip("%")) for w in words) == pytest.approx(100, abs=0.5)


def test_sweep_writes_figure_4(folder, encoder, tmp_path):
    main("--data", folder, "--init", encoder, "--out", tmp_path, "--sweep-keep-blocks", 0, 12, "--data-fraction", 0.4, 1, "--sweep-seeds", 0, 1,
         "--epochs", 1, "--batch-size", 4, "--max-steps", 1, "--device", "cpu", "--workers", 0, *PLAIN)
    rows = list(csv.DictReader(open(tmp_path / "fig4.csv")))
    assert list(rows[0]) == ["keep_blocks", "data_fraction", "seed", "top1"] and len(rows) == 8
    assert {(r["keep_blocks"], r["data_fraction"], r["seed"]) for r in rows} == {(k, f, s) for k in ("0", "12") for f in ("0.4", "1.0") for s in "01"}
    assert (tmp_path / "fig4.png").exists()


def test_recipes_are_those_of_the_paper(capsys):
    def values(*extra):
        args = finetune.resolve(options(*extra))
        return [getattr(args, k) for k in ("epochs", "warmup_epochs", "batch_size", "base_lr", "layer_decay", "rand_augment", "mixup", "cutmix", "smoothing", "erasing", "drop_path")]
    assert values() == [300, 5, 1024, 1e-3, 0.85, 10, 0.2, 0, 0, 0, 0]
    assert values("--recipe", "mae") == [100, 5, 1024, 1e-3, 0.85, 9, 0.8, 1.0, 0.1, 0.25, 0.1]
    assert values("--recipe", "transfer", "--dataset", "cifar100") == [50, 10, 512, 0.05, 0.75, 0, 0, 0, 0, 0, 0]
    assert values("--recipe", "mae", "--epochs", "7", "--mixup", "0")[0:7:6] == [7, 0]     # an option wins, zero included
    readme = ROOT / "README.md"
    if readme.exists() and "| cifar100 |" in readme.read_text():
        for name, entry in finetune.DATASETS.items():
            r = entry.get("recipe")
            assert r is None or f"| {name} | {r['epochs']} | {r['warmup_epochs']} | {r['base_lr']} |" in readme.read_text()
