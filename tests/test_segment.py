import colorsys
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, rel_error, run, seed_weights, seeded
from PIL import Image

import segment
from models import Hiera, InputError, VisionTransformer, load_encoder
from segment import IGNORE, SemanticFPN


def small_model(size, classes=4, patch=16, **options):
    """Semantic FPN on a ViT of 3 narrow blocks, with seeded weights."""
    encoder = VisionTransformer(img_size=size, patch_size=patch, embed_dim=32, depth=3, num_heads=2, rel_pos_bias=True, layer_scale=1.0)
    return seed_weights(SemanticFPN(encoder, classes, **options))


# Metrics, labels, loss ------------------------------------------------------------------------------------------------
def test_mean_iou_against_a_double_loop():
    """Hand-made masks with ignored pixels; class 3 occurs nowhere, class 4 only in the prediction."""
    truth = torch.tensor([[0, 0, 1, 1], [0, 2, 1, 1], [2, 2, 255, 255], [2, 2, 0, 255]], dtype=torch.uint8)
    guess = torch.tensor([[0, 1, 1, 1], [0, 2, 2, 1], [2, 2, 3, 0], [4, 2, 0, 4]], dtype=torch.uint8)
    hits, union = [0] * 5, [0] * 5
    for t, p in zip(truth.flatten().tolist(), guess.flatten().tolist()):
        for k in range(5):
            if t != 255:
                hits[k] += t == k and p == k
                union[k] += t == k or p == k
    confusion = segment.confusion_matrix(guess, truth, 5)
    iou = segment.class_iou(confusion)
    assert confusion.sum() == 13 and iou[3].isnan() and union[3] == 0
    expected = [h / u for h, u in zip(hits, union) if u]
    assert iou[~iou.isnan()].tolist() == pytest.approx(expected)
    values = segment.summarize(confusion)
    assert values["miou"] == pytest.approx(100 * sum(expected) / 4) and values["absent"] == 1
    assert values["pixel_accuracy"] == pytest.approx(100 * sum(hits) / 13)
    everywhere = segment.summarize(segment.confusion_matrix(torch.full_like(truth, 2), truth, 5))    # the commonest class
    assert everywhere["miou"] != values["miou"] and values["baseline_pixel_accuracy"] == pytest.approx(everywhere["pixel_accuracy"])
    assert values["baseline_miou"] == pytest.approx(everywhere["miou"])


def test_labels_are_shifted_once(tmp_path):
    raw = np.array([[0, 1, 2, 150], [150, 0, 1, 255]], np.uint8)
    Image.fromarray(raw).save(tmp_path / "grey.png")
    palette = Image.fromarray(raw)
    palette.putpalette(np.random.default_rng(0).integers(0, 256, 768).tolist())
    palette.save(tmp_path / "palette.png")
    ade = segment.label_table(150, zero_is_class=False)
    for name in ("grey.png", "palette.png"):
        assert segment.read_labels(tmp_path / name, ade).tolist() == [[255, 0, 1, 149], [149, 255, 0, 255]]
    assert segment.read_labels(tmp_path / "grey.png", segment.label_table(151, zero_is_class=True)).tolist() == raw.tolist()
    for classes, zero in ((149, False), (150, True)):
        with pytest.raises(InputError, match="grey.png hold the number 150; classes are"):
            segment.read_labels(tmp_path / "grey.png", segment.label_table(classes, zero))
    Image.fromarray(raw > 1).save(tmp_path / "bits.png")
    assert segment.read_labels(tmp_path / "bits.png", ade).tolist() == [[255, 255, 0, 0], [0, 255, 255, 0]]
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "colour.png")
    with pytest.raises(InputError, match="one class number per pixel"):
        segment.read_labels(tmp_path / "colour.png", ade)


def test_class_names(tmp_path):
    """ADE20K brings a table, any data set can have a list, and a list of another length is refused."""
    listed = [f"{k}\t0.1\t9\t9\tname {k}, synonym" for k in range(1, 151)]
    (tmp_path / "objectInfo150.txt").write_text("\n".join(["Idx\tRatio\tTrain\tVal\tName", *listed]))
    names = segment.class_names(segment.parse_args(["--data", str(tmp_path)]))
    assert names[0] == "name 1" and names[149] == "name 150" and len(names) == 150
    (tmp_path / "names.txt").write_text("road\nsky\n")
    options = ["--data", str(tmp_path), "--class-names", str(tmp_path / "names.txt"), "--num-classes"]
    assert segment.class_names(segment.parse_args([*options, "2"])) == ["road", "sky"]
    with pytest.raises(InputError, match="has 2 class names, --num-classes is 3"):
        segment.class_names(segment.parse_args([*options, "3"]))


def test_loss_against_a_loop():
    logits, labels = seeded((2, 3, 4, 4), "logits"), torch.randint(0, 3, (2, 8, 8), generator=torch.Generator().manual_seed(0))
    labels[0, :3] = IGNORE
    up, total = F.interpolate(logits, (8, 8), mode="bilinear"), 0.0
    for b in range(2):
        for y in range(8):
            for x in range(8):
                if labels[b, y, x] != IGNORE:
                    total -= up[b, :, y, x].log_softmax(0)[labels[b, y, x]].item()
    assert segment.segmentation_loss(logits, labels.byte()).item() == pytest.approx(total / 128, rel=1e-5)
    logits.requires_grad_()
    nothing = segment.segmentation_loss(logits, torch.full((2, 8, 8), IGNORE, dtype=torch.uint8))
    nothing.backward()
    assert nothing == 0 and logits.grad.abs().max() == 0


# Sliding windows ------------------------------------------------------------------------------------------------------
@torch.no_grad()
def one_window_at_a_time(model, image, stride):
    """The plain version: loop over rows and columns, pad every score to the image, divide by the number of windows."""
    (h, w), (H, W) = model.encoder.img_size, image.shape[1:]
    image = F.pad(image, (0, max(0, w - W), 0, max(0, h - H)))
    total, count = 0, torch.zeros(image.shape[1:])
    for i in range(max(image.shape[1] - h + stride - 1, 0) // stride + 1):
        for j in range(max(image.shape[2] - w + stride - 1, 0) // stride + 1):
            bottom, right = min(i * stride + h, image.shape[1]), min(j * stride + w, image.shape[2])
            score = F.interpolate(model(image[None, :, bottom - h:bottom, right - w:right]), (h, w), mode="bilinear")[0]
            total = total + F.pad(score, (right - w, image.shape[2] - right, bottom - h, image.shape[1] - bottom))
            count[bottom - h:bottom, right - w:right] += 1
    assert count.min() >= 1
    return (total / count)[:, :H, :W]


def test_sliding_windows():
    sizes = [(100, 100), (512, 512), (513, 700), (300, 1200)]
    model, images = small_model(512), [seeded((3, *size), f"image {size}") for size in sizes]
    batched = segment.sliding_logits(model, images, 341, at_once=3)
    for size, image, logits in zip(sizes, images, batched):
        assert logits.shape == (4, *size)
        assert rel_error(logits, one_window_at_a_time(model, image, 341)) < 1e-5
    with torch.no_grad():    # where the window covers the image it is the network on the (padded) image
        whole = F.interpolate(model(images[1][None]), (512, 512), mode="bilinear")[0]
        padded = F.interpolate(model(F.pad(images[0], (0, 412, 0, 412))[None]), (512, 512), mode="bilinear")[0, :, :100, :100]
    assert rel_error(batched[1], whole) < 1e-6 and rel_error(batched[0], padded) < 1e-5
    assert segment.window_starts(683, 512, 341) == [0, 171] and segment.window_starts(1200, 512, 341) == [0, 341, 682, 688]
    assert segment.window_starts(853, 512, 341) == [0, 341] and segment.window_starts(512, 512, 341) == [0]


def test_classes_in_chunks():
    logits = seeded((7, 9, 12), "chunks")
    expected = F.interpolate(logits[None], (20, 31), mode="bilinear")[0].argmax(dim=0)
    for chunk in (1, 3, 7, 16):
        assert torch.equal(segment.classify(logits, (20, 31), chunk), expected.byte())


def test_images_are_scaled_as_in_the_paper():
    image = torch.zeros(3, 300, 1200, dtype=torch.uint8)
    assert segment.resized_shape((600, 800), 512, 2048) == [512, 683] and segment.resized_shape((300, 1800), 512, 2048) == [341, 2048]
    assert segment.resize_for_test(image, (512, 512), "slide").shape[1:] == (512, 2048)
    assert segment.resize_for_test(image, (512, 512), "whole").shape[1:] == (128, 512)
    assert segment.resize_for_test(image, (640, 480), "whole").shape[1:] == (120, 480)
    thin = torch.zeros(3, 1, 5000, dtype=torch.uint8)
    assert [segment.resize_for_test(thin, (512, 512), mode).shape[1] for mode in ("slide", "whole")] == [1, 1]


# Network --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [(512, 512), (640, 480)])
def test_pyramid_and_head_shapes(size):
    model = segment.build_model(segment.resolve(segment.parse_args(["--image-size", *map(str, size)])))
    assert model.taps == [4, 6, 8, 12]
    model, images = model.to("meta"), torch.empty(2, 3, *size, device="meta")
    maps = model.encoder.feature_maps(images, model.taps)
    assert [tuple(m.shape) for m in maps] == [(2, 192, size[0] // 16, size[1] // 16)] * 4
    maps = model.pyramid(maps)
    assert [tuple(m.shape) for m in maps] == [(2, 48, size[0] // s, size[1] // s) for s in (4, 8, 16, 32)]
    assert [tuple(head(m).shape) for head, m in zip(model.scale_heads, maps)] == [(2, 128, size[0] // 4, size[1] // 4)] * 4
    assert tuple(model(images).shape) == (2, 150, size[0] // 4, size[1] // 4)
    up4 = 192 * 48 * 4 + 48 + 2 * 48 + 48 * 48 * 4 + 48    # two transposed convolutions and a norm
    pyramid = up4 + 192 * 48 * 4 + 48 + 2 * (192 * 48 + 48)
    head = 4 * 48 * 128 * 9 + 3 * 128 * 128 * 9 + 7 * 256 + 128 * 150 + 150    # 1 + 1 + 2 + 3 convolutions
    assert sum(p.numel() for n, p in model.named_parameters() if not n.startswith("encoder.")) == pyramid + head
    assert segment.count_flops(model) > 2 * 5.3e6 * size[0] * size[1] / 256    # every token passes the blocks' 5.3M weights


@pytest.mark.parametrize("encoder", [
    VisionTransformer(img_size=64, embed_dim=32, depth=3, num_heads=2, rel_pos_bias=True, layer_scale=1.0, drop_path=0.1),
    Hiera(img_size=64, embed_dim=16, stages=(1, 1, 1, 1), drop_path=0.1)], ids=["vit", "hiera"])
def test_every_parameter_learns(encoder):
    """A parameter without gradient would stop DistributedDataParallel, one outside the groups would never change."""
    model = SemanticFPN(encoder, 5).train()
    torch.manual_seed(3)
    out = model(seeded((4, 3, 64, 64), "images"))
    assert out.shape == (4, 5, 16, 16)
    segment.segmentation_loss(out, torch.randint(0, 5, (4, 64, 64), dtype=torch.uint8)).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    groups = segment.param_groups(model, 0.05, 0.8, encoder.depth)
    assert sorted(id(p) for g in groups for p in g["params"]) == sorted(id(p) for p in model.parameters())


def test_layer_decay_groups():
    model = segment.build_model(segment.resolve(segment.parse_args([])))
    where = {id(p): g for g in segment.param_groups(model, 0.05, 0.8, 12) for p in g["params"]}
    named = dict(model.named_parameters())
    for name, power, decay in (("encoder.pos_embed", 13, 0), ("encoder.cls_token", 13, 0), ("encoder.patch_embed.proj.weight", 13, 0.05),
                               ("encoder.blocks.0.attn.qkv.weight", 12, 0.05), ("encoder.blocks.0.ls1.gamma", 12, 0),
                               ("encoder.blocks.7.attn.relative_position_bias_table", 5, 0), ("encoder.blocks.11.mlp.fc2.bias", 1, 0),
                               ("pyramid.levels.0.0.weight", 0, 0.05), ("scale_heads.0.1.weight", 0, 0), ("classifier.weight", 0, 0.05)):
        group = where[id(named[name])]
        assert group["lr_scale"] == pytest.approx(0.8 ** power) and group["weight_decay"] == decay, name


def test_position_tables_from_finetuning(tmp_path):
    """A classifier trained with relative position bias hands over both kinds of tables; an encoder without keeps zeros."""
    options = dict(embed_dim=48, depth=2, num_heads=4)
    trained = seed_weights(VisionTransformer(img_size=224, num_classes=10, rel_pos_bias=True, **options))
    torch.save({"model": trained.state_dict(), "arch": trained.arch}, tmp_path / "rpe.pt")
    plain = seed_weights(VisionTransformer(img_size=224, **options))
    torch.save({"model": plain.state_dict(), "arch": plain.arch}, tmp_path / "plain.pt")
    for size in (224, 512):
        encoder = SemanticFPN(VisionTransformer(img_size=size, rel_pos_bias=True, layer_scale=1.0, **options), 5).encoder
        load_encoder(encoder, tmp_path / "rpe.pt")
        for k in range(2):
            table, old = encoder.blocks[k].attn.relative_position_bias_table, trained.blocks[k].attn.relative_position_bias_table
            side = 2 * size // 16 - 1
            assert table.shape == (side ** 2 + 3, 4) and table.abs().max() > 0 and torch.equal(table[-3:], old[-3:])
            expected = F.interpolate(old[:-3].T.view(1, 4, 27, 27), (side, side), mode="bicubic")[0].flatten(1).T
            assert rel_error(table[:-3].detach(), expected.detach()) < 1e-6
            assert torch.equal(table, old) == (size == 224)
        assert torch.equal(encoder.pos_embed, trained.pos_embed) == (size == 224)
        assert torch.equal(encoder.pos_embed[:, 0], trained.pos_embed[:, 0])
        assert torch.equal(encoder.blocks[1].attn.qkv.weight, trained.blocks[1].attn.qkv.weight)
        assert all((b.ls1.gamma == 1).all() and (b.ls2.gamma == 1).all() for b in encoder.blocks)
        load_encoder(encoder, tmp_path / "plain.pt")
        assert torch.equal(encoder.blocks[1].attn.qkv.weight, plain.blocks[1].attn.qkv.weight)


def test_learning_rate():
    rate = [segment.linear_lr(s, 160_000, 1500, 1e-4) for s in (0, 750, 1500, 80_750, 159_999)]
    assert rate == pytest.approx([1e-10, 0.5e-4, 1e-4, 0.5e-4, 1e-4 / 158_500], rel=1e-5)


# Augmentation ---------------------------------------------------------------------------------------------------------
def test_image_and_labels_stay_together():
    """Black is class 0 and white class 1; no distortion makes black brighter than white. Padding has its own marks."""
    _, labels = segment.draw_scene(4, (70, 90))
    labels = labels.clamp(max=1)
    image, fill, padded = (labels * 255).expand(3, -1, -1), [12, 34, 56], 0
    for seed in range(40):
        torch.manual_seed(seed)
        x, y = segment.augment(image, labels, (64, 64), fill)
        assert x.shape == (3, 64, 64) and y.shape == (64, 64) and x.dtype == y.dtype == torch.uint8
        inside = y != IGNORE
        assert (x[:, ~inside] == torch.tensor(fill)[:, None]).all()
        wrong = (x.float().mean(dim=0) > 80) != (y == 1)
        assert wrong[inside].float().mean() < 0.06, seed    # the rim, where bilinear and nearest differ
        padded += int(not inside.all())
    assert 0 < padded < 40    # scales from 0.5 to 2


def test_class_ratio_crop():
    labels = torch.zeros(100, 100, dtype=torch.uint8)
    labels[70:, 70:] = 1
    labels[:10] = IGNORE
    shares = []
    for seed in range(60):
        torch.manual_seed(seed)
        top, left = segment.class_ratio_crop(labels, (40, 40), tries=200)
        counts = torch.bincount(labels[top:top + 40, left:left + 40].flatten().long(), minlength=2)[:2]
        shares.append((counts.max() / counts.sum()).item())
    assert max(shares) < 0.75
    assert segment.class_ratio_crop(torch.zeros(30, 50, dtype=torch.uint8), (40, 40))[0] == 0    # one class: ends all the same


def test_saturation_is_that_of_hsv():
    x = torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(1))
    x[:, 0, 0] = 0.4    # grey
    for factor in (0.5, 1.0, 1.5):
        y = segment.saturate(x, factor)
        for i in range(4):
            for j in range(5):
                h, s, v = colorsys.rgb_to_hsv(*x[:, i, j].tolist())
                assert y[:, i, j].tolist() == pytest.approx(colorsys.hsv_to_rgb(h, min(1, s * factor), v), abs=1e-5)


# Runs -----------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A data set of ADE20K's layout: 6 training and 3 validation images of different sizes, labels 0 .. 5."""
    root = tmp_path_factory.mktemp("ade")
    for k, split in enumerate(["training"] * 6 + ["validation"] * 3):
        image, labels = segment.draw_scene(k, (40 + 4 * k, 70 - 5 * k))
        labels = (labels + 1).numpy()
        labels[:3] = 0
        for kind, picture in (("images", image.permute(1, 2, 0).numpy()), ("annotations", labels)):
            (root / kind / split).mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(root / kind / split / f"{k}.png")
    return root


def options(data, out, *more):
    return ["--data", str(data), "--out", str(out), "--num-classes", "5", "--image-size", "32", "--patch-size", "8", "--iters", "24",
            "--batch-size", "4", "--warmup-iters", "2", "--lr", "1e-3", "--workers", "0", "--save-every", "3", "--eval-every", "12",
            "--log-every", "1", "--device", "cpu", *map(str, more)]


def lines(out, name="log.jsonl"):
    return [json.loads(line) for line in open(out / name)]


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained")
    segment.main(segment.parse_args(options(data, out)))
    return out


def test_training_writes_what_it_promises(trained):
    for name in ("last.pt", "best.pt", "classes.csv", "overlay_best.png", "overlay_worst.png", "curves.png"):
        assert (trained / name).exists(), name
    losses = [v["loss"] for v in lines(trained) if "loss" in v]
    assert len(losses) == 24 and np.mean(losses[-6:]) < np.mean(losses[:6])
    assert [v["step"] for v in lines(trained) if "miou" in v] == [12, 24]
    best = torch.load(trained / "best.pt", weights_only=True)
    assert best["classes"] == [f"class {k}" for k in range(5)] and best["arch"]["rel_pos_bias"]
    encoder = VisionTransformer(img_size=32, patch_size=8, rel_pos_bias=True, layer_scale=1.0)
    load_encoder(encoder, trained / "best.pt")    # goes on to other scripts
    assert torch.equal(encoder.blocks[3].ls1.gamma, best["model"]["encoder.blocks.3.ls1.gamma"])


def test_killed_run_resumes_bit_for_bit(data, trained, tmp_path):
    command = [sys.executable, "segment.py", *options(data, tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.time() + 120
    while not (tmp_path / "last.pt").exists() and process.poll() is None and time.time() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 0 < torch.load(tmp_path / "last.pt", weights_only=True)["step"] < 24
    segment.main(segment.parse_args(options(data, tmp_path)))
    straight, resumed = (torch.load(folder / "last.pt", weights_only=True) for folder in (trained, tmp_path))
    assert straight["step"] == resumed["step"] == 24 and straight["best"] == resumed["best"]
    assert all(torch.equal(v, resumed["model"][k]) for k, v in straight["model"].items())
    (tmp_path / "best.pt").unlink()    # as if the run had been stopped before its last evaluation
    torch.save({**resumed, "best": -1.0}, tmp_path / "last.pt")
    segment.main(segment.parse_args(options(data, tmp_path)))
    assert torch.load(tmp_path / "best.pt", weights_only=True)["best"] == pytest.approx(lines(tmp_path)[-1]["miou"], abs=1e-3)
    assert [v["loss"] for v in lines(trained) if "loss" in v] == [v["loss"] for v in lines(tmp_path) if "loss" in v]


def test_two_processes(data, tmp_path):
    """Two processes train on halves of the batch and share three validation images: the same scores as one process."""
    done = run("segment.py", *options(data, tmp_path / "two", "--max-steps", 12), torchrun=2)
    assert "2 images x 2 process(es)" in done.stdout and "slide, window 32x32, stride 21" in done.stdout
    assert [v["step"] for v in lines(tmp_path / "two") if "loss" in v] == list(range(1, 13))
    segment.main(segment.parse_args(options(data, tmp_path / "one", "--eval", "--init", tmp_path / "two" / "best.pt")))
    assert lines(tmp_path / "one", "eval.jsonl")[-1] == lines(tmp_path / "two")[-1]
    table = [(tmp_path / name / "classes.csv").read_text() for name in ("one", "two")]
    assert table[0] == table[1] and sum(float(line.split(",")[2]) > 0 for line in table[0].splitlines()[1:]) > 1    # no constant


def test_eval_of_the_best(data, trained, tmp_path, capsys):
    scores = {}
    for mode in ("slide", "whole"):
        segment.main(segment.parse_args(options(data, tmp_path / mode, "--eval", "--init", trained / "best.pt", "--mode", mode)))
        scores[mode] = lines(tmp_path / mode, "eval.jsonl")[-1]["miou"]
    best = torch.load(trained / "best.pt", weights_only=True)
    assert scores["slide"] == [v["miou"] for v in lines(trained) if "miou" in v and v["step"] == best["step"]][0] != scores["whole"]
    printed = capsys.readouterr().out
    assert "3 images; slide, window 32x32, stride 21\n" in printed and "3 images; whole, window 32x32\n" in printed


def test_predict(data, trained, tmp_path):
    folder = tmp_path / "photos" / "sub"
    folder.mkdir(parents=True)
    for name, size in (("a.png", (50, 37)), ("b.jpg", (90, 40))):
        Image.fromarray(segment.draw_scene(7, size[::-1])[0].permute(1, 2, 0).numpy()).save(folder / name)
    segment.main(segment.parse_args(options(data, tmp_path / "out", "--predict", tmp_path / "photos", "--init", trained / "best.pt")))
    made = tmp_path / "out" / "predict" / "sub"
    label, color = (Image.open(made / f"a_{kind}.png") for kind in ("label", "color"))
    assert label.size == color.size == (50, 37) and 1 <= np.asarray(label).min() <= np.asarray(label).max() <= 5
    assert (segment.palette(5)[np.asarray(label) - 1] == np.asarray(color)).all() and (made / "overlay_b.png").exists()


@pytest.mark.parametrize("change, sentence", [
    (["--image-size", "40"], "--image-size 40 40 must be one or two multiples of 16"),
    (["--stride", "33"], "--stride 33 must lie between 1 and the window's side 32"),
    (["--num-classes", "255"], "must lie between 2 and 254"),
    (["--num-classes", "4"], "hold the number 5; classes are 1 .. 4"),
    (["--data", "nowhere"], "must hold the folders images/training and annotations/training"),
    (["--class-names", "nowhere"], "--class-names nowhere does not exist"),
    (["--init", "nowhere.pt"], "nowhere.pt does not exist"),
    (["--eval"], "best.pt does not exist"),
    (["--model", "hiera_tiny", "--image-size", "48"], "multiples of 32"),
])
def test_bad_input_is_one_sentence(data, tmp_path, change, sentence):
    with pytest.raises(InputError, match=sentence.replace("(", r"\(")):
        segment.main(segment.parse_args(options(data, tmp_path, *change)))


def test_bad_files(data, trained, tmp_path):
    torch.save({"model": VisionTransformer(img_size=32, patch_size=8).state_dict()}, tmp_path / "encoder.pt")
    with pytest.raises(InputError, match="encoder.pt is no segmentation model"):
        segment.main(segment.parse_args(options(data, tmp_path, "--predict", "x.png", "--init", tmp_path / "encoder.pt")))
    with pytest.raises(InputError, match="x.png is neither an image nor a folder"):
        segment.main(segment.parse_args(options(data, tmp_path, "--predict", "x.png", "--init", trained / "best.pt")))
    (tmp_path / "images" / "training").mkdir(parents=True)
    (tmp_path / "annotations" / "training").mkdir(parents=True)
    Image.new("RGB", (40, 40)).save(tmp_path / "images" / "training" / "a.png")
    with pytest.raises(InputError, match="a.png has no labels"):
        segment.list_pairs(tmp_path, "training")
    Image.new("L", (30, 40)).save(tmp_path / "annotations" / "training" / "a.png")
    with pytest.raises(InputError, match="40x40 pixels, its labels .* 30x40"):
        segment.read_pair(segment.list_pairs(tmp_path, "training")[0], segment.label_table(5, False))
    with pytest.raises(InputError, match="no pixel of the validation labels has a class"):
        segment.summarize(torch.zeros(5, 5))
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(InputError, match="cannot read image .*broken.jpg"):
        segment.read_image(tmp_path / "broken.jpg")
    done = run("segment.py", "--num-classes", 1, check=False)    # as the user sees it: one sentence, no traceback
    assert done.returncode and done.stderr.strip().startswith("error: --num-classes 1") and "Traceback" not in done.stderr
