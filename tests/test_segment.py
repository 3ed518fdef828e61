"""Labels, metrics, sliding windows, network, augmentation and runs of segment.py."""
import argparse
import colorsys
import re
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (ROOT, check_kill_and_resume, here, rel_error, run, seed_weights, seeded,
                      state_of)
from PIL import Image
from toy import picture

import segment
from models import (InputError, RelativeVisionTransformer, VisionTransformer, build_model,
                    eval_loader, fcntl, load_encoder, lock_folder, param_groups, read_log,
                    resize_relative_table)
from segment import IGNORE, ScaledBlock, SegmentationSet, SemanticFPN

SCRIPT = ROOT / "segment.py"


def scaled_vit(size, **options):
    """A ViT of narrow blocks as segment.py builds it."""
    options = {**dict(embed_dim=32, depth=3, num_heads=2), **options}
    return RelativeVisionTransformer(size, block=ScaledBlock, **options)


def small_model(size, classes=4):
    """Semantic FPN on a ViT of 3 narrow blocks, with seeded weights."""
    return seed_weights(SemanticFPN(scaled_vit(size), classes))


def parsed(*options):
    return segment.parse_args([*map(str, options), "--workers", "0"])


def scores(*options):
    """What --eval prints, with all digits."""
    args = segment.resolve(parsed("--eval", *options))
    model, names, stored = segment.load_segmenter(args.init)
    data = SegmentationSet(args.data, "validation", len(names), stored["zero_is_class"],
                           model.img_size)
    run = (0, 1, torch.device("cpu"), torch.float32)
    return segment.evaluate(model, eval_loader(data, 1, 0, run), names, args.out, run)


def paper_model(*options):
    return segment.build_segmenter(segment.resolve(parsed(*options)))


def test_a_photograph_is_labelled_in_three_lines():
    model = small_model(64)
    image = seeded((3, 100, 150), "photograph")
    logits = segment.sliding_logits(model, image, window=(64, 64), stride=42)
    assert logits.argmax(dim=0).shape == (100, 150)


# ---- labels and metrics ----------------------------------------------------------------------
RAW = np.array([[0, 1, 2, 150], [150, 0, 1, 255]], np.uint8)
SHIFTED = [[255, 0, 1, 149], [149, 255, 0, 255]]


def read(image, path, num_classes=150, zero_is_class=False):
    """What the script reads from a label image that was saved to a path."""
    image.save(path)
    return segment.read_labels(path, num_classes, zero_is_class).tolist()


def test_labels_are_shifted_once(tmp_path):
    assert read(Image.fromarray(RAW), tmp_path / "grey.png") == SHIFTED


def test_palette_files_hold_numbers_too(tmp_path):
    image = Image.fromarray(RAW)
    image.putpalette(np.random.default_rng(0).integers(0, 256, 768).tolist())
    assert read(image, tmp_path / "palette.png") == SHIFTED


def test_alpha_is_no_label(tmp_path):
    grey = Image.fromarray(RAW)
    image = Image.merge("LA", (grey, grey.point(lambda number: 255 - number)))
    assert read(image, tmp_path / "alpha.png") == SHIFTED


def test_one_bit_files_hold_numbers_too(tmp_path):
    image = Image.fromarray(RAW > 1)
    assert read(image, tmp_path / "bits.png") == [[255, 255, 0, 0], [0, 255, 255, 0]]


def test_labels_of_custom_data_may_begin_at_zero(tmp_path):
    assert read(Image.fromarray(RAW), tmp_path / "grey.png", 151, True) == RAW.tolist()


@pytest.mark.parametrize("classes, zero_is_class", [(149, False), (150, True)])
def test_numbers_beyond_the_classes_are_refused(classes, zero_is_class, tmp_path):
    with pytest.raises(OSError, match="grey.png hold the number 150, which is no class"):
        read(Image.fromarray(RAW), tmp_path / "grey.png", classes, zero_is_class)


@pytest.mark.parametrize("zero_is_class", [False, True])
def test_negative_numbers_are_refused(zero_is_class, tmp_path):
    with pytest.raises(OSError, match="deep.tiff hold the number -1, which is no class"):
        image = Image.fromarray(np.array([[-1, 0, 1]], np.int32))
        read(image, tmp_path / "deep.tiff", 150, zero_is_class)


def test_numbers_beyond_a_byte_are_refused(tmp_path):
    with pytest.raises(OSError, match="deep.png hold the number 256"):
        read(Image.fromarray(np.array([[256, 0, 1]], np.uint16)), tmp_path / "deep.png")


def test_colour_images_are_no_labels(tmp_path):
    with pytest.raises(OSError, match="PNG of mode RGB: give a grey or palette PNG"):
        read(Image.new("RGB", (4, 4)), tmp_path / "colour.png")


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "GIF"])    # GIF renumbers grey
def test_labels_of_a_format_with_losses_are_refused(kind, tmp_path):
    Image.fromarray(RAW).save(tmp_path / "labels.png", kind)
    with pytest.raises(OSError, match=f"labels.png are {kind} of mode"):
        segment.read_numbers(tmp_path / "labels.png")


@pytest.mark.parametrize("kind", ["BMP", "TIFF"])
def test_labels_of_other_formats_without_loss_are_read(kind, tmp_path):
    Image.fromarray(RAW).save(tmp_path / "labels.png", kind)
    assert segment.read_numbers(tmp_path / "labels.png").tolist() == RAW.tolist()


def test_names_of_ade20k(tmp_path):
    rows = [f"{k}\t0.1\t9\t9\tname {k}, synonym" for k in range(1, 151)]
    header = "Idx\tRatio\tTrain\tVal\tName"
    (tmp_path / "objectInfo150.txt").write_text("\n".join([header, *rows]), "utf-8-sig")
    assert segment.class_names(tmp_path, 150, False) == [f"name {k}" for k in range(1, 151)]


def test_names_of_custom_data_are_a_line_each_and_empty_lines_are_none(tmp_path):
    (tmp_path / "objectInfo150.txt").write_text("road\n\nsky\n \n")
    assert segment.class_names(tmp_path, 2, False) == ["road", "sky"]
    assert segment.class_names(tmp_path, 3, False) == ["class 1", "class 2", "class 3"]
    (tmp_path / "objectInfo150.txt").write_text("stra\xdfe\nhimmel", "latin-1")
    with pytest.raises(OSError, match="objectInfo150.txt is no UTF-8 text"):
        segment.class_names(tmp_path, 2, False)


def test_classes_without_names_count_as_label_files_do():
    assert segment.class_names("nowhere", 2, False) == ["class 1", "class 2"]
    assert segment.class_names("nowhere", 2, True) == ["class 0", "class 1"]


def test_mean_iou_equals_a_double_loop():
    """Hand-made maps with ignored pixels; class 3 occurs nowhere, class 4 only in predictions."""
    truth = torch.tensor([[0, 0, 1, 1], [0, 2, 1, 1], [2, 2, 255, 255], [2, 2, 0, 255]]).byte()
    guess = torch.tensor([[0, 1, 1, 1], [0, 2, 2, 1], [2, 2, 3, 0], [4, 2, 0, 4]]).byte()
    hits = [0] * 5
    union = [0] * 5
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
    assert values["miou"] == pytest.approx(100 * sum(expected) / 4) and values["pixels"] == 13
    assert values["iou"][3] is None and values["iou"][4] == 0    # absent; only predicted
    assert values["iou"].count(None) == 1
    assert values["pixel_accuracy"] == pytest.approx(100 * sum(hits) / 13)


def test_loss_equals_a_loop():
    logits = seeded((2, 3, 4, 4), "logits")
    labels = torch.randint(0, 3, (2, 8, 8), generator=torch.Generator().manual_seed(0))
    labels[0, :3] = IGNORE
    enlarged = F.interpolate(logits, (8, 8), mode="bilinear")
    total = 0.0
    for b, y, x in (labels != IGNORE).nonzero().tolist():
        total -= enlarged[b, :, y, x].log_softmax(0)[labels[b, y, x]].item()
    loss = segment.segmentation_loss(logits, labels.byte())
    assert loss.item() == pytest.approx(total / 128, rel=1e-5)


def test_a_crop_without_labels_has_no_loss():
    logits = seeded((2, 3, 4, 4), "logits").requires_grad_()
    nothing = segment.segmentation_loss(logits, torch.full((2, 8, 8), IGNORE).byte())
    nothing.backward()
    assert nothing == 0 and logits.grad.abs().max() == 0


# ---- sliding windows -------------------------------------------------------------------------
@torch.no_grad()
def one_window_at_a_time(model, image, stride):
    """Every score padded to the image, and divided by the number of windows over a pixel."""
    h, w = model.encoder.img_size
    H, W = image.shape[1:]
    image = F.pad(image, (0, max(0, w - W), 0, max(0, h - H)))
    height, width = image.shape[1:]
    total = 0
    count = torch.zeros(height, width)
    for i in range(max(height - h + stride - 1, 0) // stride + 1):
        for j in range(max(width - w + stride - 1, 0) // stride + 1):
            bottom = min(i * stride + h, height)
            right = min(j * stride + w, width)
            score = model(image[None, :, bottom - h:bottom, right - w:right])
            score = F.interpolate(score, (h, w), mode="bilinear")[0]
            total = total + F.pad(score, (right - w, width - right, bottom - h, height - bottom))
            count[bottom - h:bottom, right - w:right] += 1
    assert count.min() >= 1
    return (total / count)[:, :H, :W]


@pytest.mark.parametrize("size", [(100, 100), (512, 512), (513, 700), (300, 1200)])
def test_windows_in_one_batch_equal_one_at_a_time(size):
    model = small_model(512)
    image = seeded((3, *size), f"image {size}")
    logits = segment.sliding_logits(model, image, (512, 512), 341)
    assert logits.shape == (4, *size)
    assert rel_error(logits, one_window_at_a_time(model, image, 341)) < 1e-5


@torch.no_grad()
def test_an_image_of_a_windows_size_passes_the_network_once():
    model = small_model(512)
    image = seeded((3, 512, 512), "image")
    whole = F.interpolate(model(image[None]), (512, 512), mode="bilinear")[0]
    assert rel_error(segment.sliding_logits(model, image, (512, 512), 341), whole) < 1e-6


@torch.no_grad()
def test_a_small_image_is_padded_to_a_window():
    model = small_model(512)
    image = seeded((3, 100, 100), "image")
    padded = F.interpolate(model(F.pad(image, (0, 412, 0, 412))[None]), (512, 512), mode="bilinear")
    logits = segment.sliding_logits(model, image, (512, 512), 341)
    assert rel_error(logits, padded[0, :, :100, :100]) < 1e-5


@pytest.mark.parametrize("length, starts", [
    (512, [0]), (683, [0, 171]), (853, [0, 341]), (1200, [0, 341, 682, 688])])
def test_windows_cover_the_image(length, starts):
    assert segment.window_starts(length, 512, 341) == starts


@pytest.mark.parametrize("shape, scaled", [
    ((600, 800), [512, 683]), ((300, 1800), [341, 2048]), ((1, 5000), [1, 2048])])
def test_images_are_scaled_as_in_the_paper(shape, scaled):
    assert segment.resized_shape(shape, 512, 2048) == scaled
    image = torch.zeros(3, *shape, dtype=torch.uint8)
    assert list(segment.rescale(image, 512).shape[1:]) == scaled


# ---- network ---------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [(512, 512), (640, 480)])
def test_pyramid_and_head_have_the_shapes_of_the_paper(size):
    h, w = size
    model = paper_model("--image-size", *size)
    assert model.taps == [4, 6, 8, 12]
    model = model.to("meta")
    images = torch.empty(2, 3, h, w, device="meta")
    maps = model.encoder.feature_maps(images, model.taps)
    assert [tuple(m.shape) for m in maps] == [(2, 192, h // 16, w // 16)] * 4
    maps = model.pyramid(maps)
    assert [tuple(m.shape) for m in maps] == [(2, 48, h // s, w // s) for s in (4, 8, 16, 32)]
    for head, m in zip(model.scale_heads, maps):
        assert tuple(head(m).shape) == (2, 128, h // 4, w // 4)
    assert tuple(model(images).shape) == (2, 150, h // 4, w // 4)


def test_pyramid_and_head_have_the_parameters_of_the_paper():
    up4 = 192 * 48 * 4 + 48 + 2 * 48 + 48 * 48 * 4 + 48    # two transposed convolutions, a norm
    pyramid = up4 + 192 * 48 * 4 + 48 + 2 * (192 * 48 + 48)
    head = 4 * 48 * 128 * 9 + 3 * 128 * 128 * 9 + 7 * 256 + 128 * 150 + 150    # 1 + 1 + 2 + 3
    counted = {n: p.numel() for n, p in paper_model().named_parameters()}
    assert sum(v for n, v in counted.items() if not n.startswith("encoder.")) == pyramid + head


def test_every_parameter_learns():
    """One without gradient would stop DistributedDataParallel, one in no group never change."""
    encoder = scaled_vit(64, drop_path=0.1)
    model = SemanticFPN(encoder, 5).train()
    torch.manual_seed(3)
    out = model(seeded((4, 3, 64, 64), "images"))
    assert out.shape == (4, 5, 16, 16)
    segment.segmentation_loss(out, torch.randint(0, 5, (4, 64, 64)).byte()).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    groups = param_groups(model, 0.05, 0.8, encoder.depth)
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())


@pytest.mark.parametrize("name, power, decay", [
    ("encoder.pos_embed", 13, 0), ("encoder.cls_token", 13, 0),
    ("encoder.patch_embed.proj.weight", 13, 0.05), ("encoder.blocks.0.attn.qkv.weight", 12, 0.05),
    ("encoder.blocks.0.ls1.gamma", 12, 0), ("encoder.blocks.11.mlp.fc2.bias", 1, 0),
    ("encoder.blocks.7.attn.relative_position_bias_table", 5, 0.05),
    ("pyramid.levels.0.0.weight", 0, 0.05), ("scale_heads.0.1.weight", 0, 0),
    ("classifier.weight", 0, 0.05)])
def test_layer_decay_reaches_every_part(name, power, decay):
    model = paper_model()
    parameter = dict(model.named_parameters())[name]
    for group in param_groups(model, 0.05, 0.8, 12):
        if any(p is parameter for p in group["params"]):
            assert group["lr_scale"] == pytest.approx(0.8 ** power)
            assert group["weight_decay"] == decay


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """Files of a classifier with relative position bias and of an encoder without."""
    folder = tmp_path_factory.mktemp("encoders")
    options = dict(img_size=224, embed_dim=48, depth=2, num_heads=4)
    models = {"rpe": RelativeVisionTransformer(num_classes=10, **options),
              "plain": VisionTransformer(**options)}
    for name, model in models.items():
        seed_weights(model)
        torch.save({"model": model.state_dict(), "arch": model.arch}, folder / f"{name}.pt")
    return folder, models


def segmentation_encoder(size):
    return SemanticFPN(scaled_vit(size, embed_dim=48, depth=2, num_heads=4), 5).encoder


@pytest.mark.parametrize("size", [224, 512])
def test_position_tables_of_fine_tuning_are_handed_over(size, encoders):
    trained = encoders[1]["rpe"]
    encoder = segmentation_encoder(size)
    load_encoder(encoder, encoders[0] / "rpe.pt")
    for block, source in zip(encoder.blocks, trained.blocks):
        table = block.attn.relative_position_bias_table
        old = source.attn.relative_position_bias_table
        side = 2 * size // 16 - 1
        assert table.shape == (side ** 2 + 3, 4) and table.abs().max() > 0
        assert torch.equal(table[-3:], old[-3:])
        expected = resize_relative_table(old, (14, 14), (size // 16,) * 2)
        assert torch.equal(table, expected)
        assert torch.equal(table, old) == (size == 224)
        assert (block.ls1.gamma == 1).all() and (block.ls2.gamma == 1).all()
    assert torch.equal(encoder.pos_embed, trained.pos_embed) == (size == 224)
    assert torch.equal(encoder.pos_embed[:, 0], trained.pos_embed[:, 0])
    assert torch.equal(encoder.blocks[1].attn.qkv.weight, trained.blocks[1].attn.qkv.weight)


def test_an_encoder_without_relative_positions_keeps_zero_tables(encoders):
    encoder = segmentation_encoder(512)
    load_encoder(encoder, encoders[0] / "plain.pt")
    plain = encoders[1]["plain"]
    assert torch.equal(encoder.blocks[1].attn.qkv.weight, plain.blocks[1].attn.qkv.weight)
    assert encoder.blocks[1].attn.relative_position_bias_table.abs().max() == 0


def test_learning_rate_of_the_recipe():
    rates = [segment.linear_lr(s, 160_000, 1500, 1e-4) for s in (0, 750, 1500, 80_750, 159_999)]
    expected = [1e-10, 0.5e-4, 1e-4, 0.5e-4, 1e-4 / 158_500]
    assert rates == pytest.approx(expected, rel=1e-5)


# ---- augmentation ----------------------------------------------------------------------------
def test_image_and_labels_stay_together():
    """Black is class 0, white class 1; no distortion makes black brighter than white. Padding has
    marks of its own."""
    labels = torch.tensor(picture(4, (70, 90))[2]).clamp(max=1)
    image = (labels * 255).expand(3, -1, -1)
    fill = [12, 34, 56]
    padded = 0
    for seed in range(40):
        torch.manual_seed(seed)
        x, y = segment.augment(image, labels, (64, 64), fill)
        assert x.shape == (3, 64, 64) and y.shape == (64, 64) and x.dtype == y.dtype == torch.uint8
        inside = y != IGNORE
        assert (x[:, ~inside] == torch.tensor(fill)[:, None]).all()
        wrong = (x.float().mean(dim=0) > 80) != (y == 1)
        assert wrong[inside].float().mean() < 0.06, seed    # the rim: bilinear against nearest
        padded += int(not inside.all())
    assert 0 < padded < 40    # scales from 0.5 to 2


def test_no_class_fills_three_quarters_of_a_crop():
    labels = torch.zeros(100, 100, dtype=torch.uint8)
    labels[70:, 70:] = 1
    labels[:10] = IGNORE
    for seed in range(60):
        torch.manual_seed(seed)
        top, left, h, w = segment.class_ratio_crop(labels, (40, 40), tries=200)
        counts = labels[top:top + h, left:left + w].flatten().bincount(minlength=2)[:2]
        assert (h, w) == (40, 40)
        assert counts.max() / counts.sum() < 0.75


def test_a_crop_of_a_single_class_is_taken_in_the_end():
    box = segment.class_ratio_crop(torch.zeros(30, 50, dtype=torch.uint8), (40, 40))
    assert box[0] == 0 and box[2:] == (30, 40)


def test_saturation_is_that_of_hsv():
    x = torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(1))
    x[:, 0, 0] = 0.4    # grey
    for factor in (0.5, 1.0, 1.5):
        y = segment.saturate(x, factor)
        for i, j in np.ndindex(4, 5):
            h, s, v = colorsys.rgb_to_hsv(*x[:, i, j].tolist())
            expected = colorsys.hsv_to_rgb(h, min(1, s * factor), v)
            assert y[:, i, j].tolist() == pytest.approx(expected, abs=1e-5)


@pytest.fixture(scope="module")
def distortions():
    """What 600 distortions did to a picture of two greys and a red -> (600, 4): contrast factor,
    brightness in units of 0..255, saturation factor, hue in turns, all solved for exactly."""
    image = torch.tensor([[51, 51, 51], [128, 128, 128], [150, 75, 75]]).byte().T[:, None]
    found = []
    for seed in range(600):
        torch.manual_seed(seed)
        dark, grey, red = segment.distort(image)[:, 0].T.tolist()
        contrast = (grey[0] - dark[0]) / (128 - 51)
        brightness = dark[0] / contrast - 51
        hue, saturation, _ = colorsys.rgb_to_hsv(*(c / 255 for c in red))
        saturation /= 75 / (150 + brightness)    # brightness alone changes it to that
        found.append((contrast, brightness, saturation, (hue + 0.5) % 1 - 0.5))
    return torch.tensor(found)


@pytest.mark.parametrize("column, low, high, neutral, tolerance", [
    (0, 0.5, 1.5, 1, 0.02), (1, -32, 32, 0, 2.5), (2, 0.5, 1.5, 1, 0.06), (3, -0.1, 0.1, 0, 0.008)],
    ids=["contrast", "brightness", "saturation", "hue"])
def test_photometric_distortion_has_the_ranges_of_the_paper(column, low, high, neutral, tolerance,
                                                            distortions):
    values = distortions[:, column]
    width = high - low
    assert low - tolerance < values.min() < low + 0.05 * width
    assert high - 0.05 * width < values.max() < high + tolerance
    untouched = ((values - neutral).abs() < tolerance).float().mean().item()
    assert untouched == pytest.approx(0.5 + tolerance / width, abs=0.08)    # and small changes


@pytest.mark.parametrize("shape", [(40, 80), (90, 30)])
def test_training_and_evaluation_scale_a_picture_alike(shape, monkeypatch):
    """At --image-size 32 64 a crop of scale 1 is the test image: its ratio stays in both."""
    monkeypatch.setattr(segment, "uniform", lambda low, high: 1.0)
    monkeypatch.setattr(segment, "distort", lambda image: image)
    image = torch.tensor(picture(3, shape)[0]).permute(2, 0, 1)
    labels = torch.tensor(picture(3, shape)[2])
    tested = segment.rescale(image, 32)
    assert tested.shape[1:] == ((32, 64) if shape == (40, 80) else (96, 32))
    crop, _ = segment.augment(image, labels, (32, 64), [0, 0, 0])
    rows = tested.unfold(1, 32, 1).permute(1, 0, 3, 2)    # every crop of 32 rows: (., 3, 32, w)
    width = tested.shape[2]
    assert crop.shape == (3, 32, 64) and any(
        torch.equal(crop[..., 64 - width:].flip(-1), row) or torch.equal(crop[..., :width], row)
        or torch.equal(crop[..., :width].flip(-1), row) for row in rows)


# ---- runs ------------------------------------------------------------------------------------
SMALL = ["--num-classes", 5, "--image-size", 32, "--batch-size", 2, "--lr", 1e-3, "--workers", 0,
         "--device", "cpu", "--log-every", 1]
QUICK = [*SMALL, "--model", "vit_pico", "--patch-size", 8]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Six training and three validation images of different sizes, labels 0 .. 5, as ADE20K has
    them."""
    root = tmp_path_factory.mktemp("ade")
    for k, split in enumerate(["training"] * 6 + ["validation"] * 3):
        image, _, labels, _ = picture(k, (40 + 4 * k, 70 - 5 * k))
        labels = np.minimum(labels, 4) + 1
        labels[:3] = 0
        for kind, pixels in (("images", image), ("annotations", labels)):
            folder = root / kind / split
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / f"{k}.png")
    return root


@pytest.fixture
def own_data(data, tmp_path):
    """A copy of the data, to be spoilt."""
    return shutil.copytree(data, tmp_path / "data")


def spoil(path):
    path.write_bytes(path.read_bytes()[:60])


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """A run of 23 steps, 3 in an epoch, that equals one that was killed in its sixth epoch; its
    options."""
    options = [*QUICK, "--data", data, "--iters", 23, "--eval-every", 3]
    folder = check_kill_and_resume(segment, options, tmp_path_factory.mktemp("run"),
                                   line=lambda values: values.get("step") == 16)
    return folder, options


@pytest.fixture
def moved(finished, tmp_path):
    """A copy of the finished run, and the command that resumes it."""
    folder = shutil.copytree(finished[0], tmp_path / "moved")
    return folder, [*finished[1], "--out", folder]


def scores_of(folder):
    return [(v["epoch"], v["step"], v["miou"]) for v in read_log(folder / "log.jsonl")
            if "miou" in v]


def test_a_run_is_scored_every_n_epochs_and_at_its_end(finished):
    folder = finished[0]
    assert [score[:2] for score in scores_of(folder)] == [(3, 9), (6, 18), (8, 23)]
    last, final = (state_of(folder / name) for name in ("last.pt", "segmenter.pt"))
    assert not (folder / "best.pt").exists() and "optimizer" not in final
    assert last["epoch"] == last["epochs"] == 8 and last["train_images"] == 6
    assert all(torch.equal(w, final["model"][k]) for k, w in last["model"].items())
    assert final["classes"] == last["classes"] == [f"class {k}" for k in range(1, 6)]


def test_a_run_learns_and_logs_every_step(finished):
    lines = [v for v in read_log(finished[0] / "log.jsonl") if "loss" in v]
    losses = [v["loss"] for v in lines]
    assert [v["step"] for v in lines] == [*range(23)] and np.mean(losses[-6:]) < np.mean(losses[:6])


def test_a_run_draws_what_it_predicts(finished):
    for k in (1, 2, 3):
        sheet = Image.open(finished[0] / f"input_truth_prediction_{k}.png")
        assert np.asarray(sheet).std() > 10


def test_a_finished_run_that_is_started_again_writes_its_model_again(moved, capsys):
    folder, command = moved
    final = state_of(folder / "segmenter.pt")["model"]
    log = (folder / "log.jsonl").read_text()
    (folder / "segmenter.pt").unlink()
    here(segment, *command)
    assert all(torch.equal(w, final[k]) for k, w in
               state_of(folder / "segmenter.pt")["model"].items())
    assert re.search(r"(\d+) of \1 epochs are finished", capsys.readouterr().out)
    assert (folder / "log.jsonl").read_text() == log    # no line twice


def test_resume_takes_remedies_and_refuses_another_run(moved, own_data, capsys):
    _, command = moved
    here(segment, *command, "--clip-grad", 1, "--dtype", "bf16", "--lr", 1e-4)
    assert "clip_grad is now 1.0, was 0.0" in capsys.readouterr().out
    for options, match in ((["--iters", 25], "iters is now 25, was 23"),
                           (["--drop-path", 0], "drop_path is now 0.0, was 0.1")):
        with pytest.raises(InputError, match=match):
            here(segment, *command, *options)
    here(segment, *command, "--data", own_data)
    (own_data / "objectInfo150.txt").write_text("a\nb\nc\nd\ne")
    with pytest.raises(InputError, match="classes is now .'a', 'b', .*, was .'class 1'"):
        here(segment, *command, "--data", own_data)
    (own_data / "objectInfo150.txt").unlink()
    for kind in ("images", "annotations"):    # other data with the same classes
        (own_data / kind / "training" / "0.png").unlink()
    with pytest.raises(InputError, match="train_images is now 5, was 6"):
        here(segment, *command, "--data", own_data)


def test_a_loss_that_is_not_finite_ends_the_run_and_spoils_no_file(data, tmp_path):
    command = [*QUICK, "--data", data, "--iters", 12, "--warmup-iters", 3, "--out", tmp_path]
    with pytest.raises(FloatingPointError, match="rerun with --dtype fp32"):
        here(segment, *command, "--lr", 1e30)
    for file in tmp_path.glob("*.pt"):
        assert all(w.isfinite().all() for w in state_of(file)["model"].values())


WITHOUT_DROPOUT = f"""    # its random numbers are a process's own
import sys
sys.path.insert(0, {str(ROOT)!r})
import segment
segment.RECIPE.update(dropout=0.0)
segment.main(segment.parse_args())
"""


@pytest.fixture(scope="module")
def two_processes(data, tmp_path_factory):
    """A run of two processes without dropout, its options, and what it printed."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "without_dropout.py").write_text(WITHOUT_DROPOUT)
    options = [*QUICK, "--data", data, "--iters", 12, "--lr", 1e-4, "--drop-path", 0]
    done = run(folder / "without_dropout.py", *options, "--out", folder, torchrun=2)
    return folder, options, done


def test_two_processes_equal_one_with_accumulation(two_processes, tmp_path, monkeypatch):
    """Batch statistics are those of one image in both runs, running ones those of other images."""
    folder, options, _ = two_processes
    monkeypatch.setitem(segment.RECIPE, "dropout", 0.0)
    here(segment, *options, "--accum-steps", 2, "--out", tmp_path)
    one, two = (state_of(out / "last.pt")["model"] for out in (tmp_path, folder))
    for key in one:
        if "running" not in key and "num_batches" not in key:
            assert (one[key] - two[key]).abs().max() <= 1e-6, key


def test_processes_share_the_evaluation(data, two_processes, tmp_path):
    """Two processes and three images: the scores that one process gives the same weights."""
    folder, _, done = two_processes
    one = scores("--data", data, "--init", folder / "last.pt", "--out", tmp_path)
    two = read_log(folder / "log.jsonl")[-1]
    assert {**two, **one} == two and two["step"] == 12
    assert sum(iou > 0 for iou in one["iou"] if iou is not None) > 1    # no constant
    printed = f"on {one['pixels']} labelled pixels; windows of (32, 32), float32"
    assert printed in done.stdout + done.stderr
    assert done.stdout.count("images/training: 6 images; the label files") == 1    # rank 0


def test_eval_gives_the_score_of_training_again(data, finished, tmp_path, capsys):
    last = scores_of(finished[0])[-1][2]
    for name in ("segmenter.pt", "last.pt"):
        command = ["--data", data, "--out", tmp_path, "--init", finished[0] / name]
        assert scores(*command)["miou"] == last
    here(segment, "--eval", "--workers", 0, *command)
    assert f"mIoU {last:.2f}, pixel accuracy" in "".join(capsys.readouterr())


def test_files_of_older_versions_are_read(data, finished, tmp_path):
    """best.pt held the names of classes among the options."""
    file = state_of(finished[0] / "segmenter.pt")
    file["args"]["classes"] = file.pop("classes")
    torch.save({**file, "miou": 1.0}, tmp_path / "best.pt")
    command = ["--data", data, "--out", tmp_path, "--init", tmp_path / "best.pt"]
    assert scores(*command)["miou"] == scores_of(finished[0])[-1][2]


class Frozen(argparse.Namespace):
    """Options that nobody may write to."""

    def __setattr__(self, name, value):
        raise AssertionError(f"args.{name} is written after resolve")


@pytest.mark.parametrize("mode", ["train", "eval", "predict"])
def test_nobody_writes_to_args_after_resolve(mode, data, finished, tmp_path, monkeypatch):
    def frozen(args):
        copy = Frozen()
        vars(copy).update(vars(resolve(args)))
        return copy

    resolve = segment.resolve
    monkeypatch.setattr(segment, "resolve", frozen)
    file = ["--init", finished[0] / "segmenter.pt", "--workers", 0, "--out", tmp_path]
    here(segment, *{"train": [*QUICK, "--data", data, "--iters", 2, "--out", tmp_path],
                    "eval": ["--eval", *file],
                    "predict": ["--predict", data / "images/validation", *file]}[mode])


def test_eval_takes_an_image_size_and_refuses_what_it_does_not_read(data, moved, capsys):
    folder, command = moved
    job = ["--eval", "--out", folder, "--workers", 0]    # the data are those of the training
    here(segment, *job, "--image-size", 48)
    assert "windows of (48, 48)" in "".join(capsys.readouterr())
    for options in (["--num-classes", 7], ["--dtype", "bf16"], ["--model", "vit_nano"]):
        with pytest.raises(SystemExit):
            here(segment, *job, *options)
        assert f"a trained model does not read {options[0]}: leave it" in capsys.readouterr().err


@pytest.mark.parametrize("options", [
    [*QUICK, "--dtype", "bf16", "--clip-grad", 1],
    [*QUICK, "--zero-is-class", "--num-classes", 6]], ids=["bf16", "zero is a class"])
def test_other_ways_to_train(options, data, tmp_path, capsys):
    here(segment, *options, "--data", data, "--iters", 2, "--out", tmp_path)
    assert "mIoU" in "".join(capsys.readouterr())


def test_the_logged_loss_is_that_of_the_whole_batch(data, tmp_path, monkeypatch):
    """With accumulation, the mean over micro-batches; here images of one process each."""
    monkeypatch.setattr(segment, "segmentation_loss",
                        lambda logits, labels: 0 * logits.mean() + labels.float().mean())
    losses = []
    for parts in (1, 2):
        out = tmp_path / str(parts)
        here(segment, *QUICK, "--data", data, "--iters", 3, "--accum-steps", parts, "--out", out)
        losses.append([v["loss"] for v in read_log(out / "log.jsonl") if "loss" in v])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6) and len(losses[0]) == 3


def test_a_compiled_run_saves_names_without_a_prefix(data, tmp_path):
    with torch.compiler.set_stance("force_eager"):    # its names, not its compilation
        here(segment, *QUICK, "--data", data, "--iters", 1, "--out", tmp_path, "--compile")
    assert "classifier.weight" in state_of(tmp_path / "last.pt")["model"]


# ---- starting from a file --------------------------------------------------------------------
def saved(model, path, **more):
    torch.save({"model": model.state_dict(), "arch": model.arch, **more}, path)
    return path


def test_model_patch_and_colours_come_from_the_file(tmp_path):
    file = saved(build_model("vit_pico", img_size=48, patch_size=8), tmp_path / "encoder.pt",
                 mean=[0.5] * 3, std=[0.25] * 3)
    model = paper_model("--init", file, "--image-size", 64)
    encoder = model.encoder
    assert (encoder.embed_dim, encoder.patch_size, encoder.grid) == (48, 8, (8, 8))
    assert model.mean == (0.5,) * 3 and model.std == (0.25,) * 3 and model.arch == encoder.arch
    told = paper_model("--init", file, "--mean", 0.1, 0.2, 0.3, "--std", 0.4, 0.5, 0.6)
    assert told.mean == (0.1, 0.2, 0.3) and told.std == (0.4, 0.5, 0.6)


def test_a_segmentation_model_serves_as_encoder_here_and_elsewhere(finished):
    file = finished[0] / "segmenter.pt"
    weights = state_of(file)["model"]
    model = paper_model("--init", file, "--image-size", 32)
    for name, weight in model.encoder.state_dict().items():
        assert torch.equal(weight, weights[f"encoder.{name}"])
    plain = RelativeVisionTransformer(32, 8, embed_dim=48, num_heads=3)
    load_encoder(plain, file)    # LayerScale is folded into the layer before it
    gamma = weights["encoder.blocks.3.ls1.gamma"][:, None]
    expected = gamma * weights["encoder.blocks.3.attn.proj.weight"]
    assert torch.equal(plain.blocks[3].attn.proj.weight, expected)


# ---- pictures and predictions ----------------------------------------------------------------
@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Three pictures; their sizes and the names of their labels."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "sub").mkdir()
    sizes = {"sub/a.png": (50, 37), "b.jpg": (33, 60), "wide.png": (900, 2)}
    for name, (w, h) in sizes.items():
        Image.fromarray(picture(7, (h, w))[0]).save(folder / name)
    return folder, dict(zip(["sub/a", "b", "wide"], sizes.values()))


def test_predict_labels_a_folder(photos, finished, tmp_path, capsys):
    folder, sizes = photos
    here(segment, "--predict", folder, "--out", tmp_path, "--init", finished[0] / "segmenter.pt")
    printed = "".join(capsys.readouterr())
    for name, size in sizes.items():
        file = tmp_path / "predict" / f"{name}_labels.png"
        labels = Image.open(file)
        assert labels.size == size and labels.mode == "P" and str(file) in printed
        assert 1 <= np.asarray(labels).min() <= np.asarray(labels).max() <= 5
        assert labels.convert("RGB").getpixel((0, 0)) != (0, 0, 0)    # a viewer shows the class
        assert max(Image.open(tmp_path / "predict" / f"{name}_overlay.png").size) < 1300
    assert len([*tmp_path.rglob("*.png")]) == 6


def test_pictures_have_a_bounded_size_and_a_legend(tmp_path):
    strip = torch.zeros(3, 2000, 2, dtype=torch.uint8)
    labels = torch.ones(2000, 2, dtype=torch.uint8)
    labels[:1000] = IGNORE
    segment.draw_overlay(tmp_path / "a.png", ["class 1", "class 2"], strip, labels, labels)
    sheet = Image.open(tmp_path / "a.png")
    assert sheet.size == (3 * 1 + 200, 480)
    legend = {c for _, c in sheet.crop((4, 0, 203, 480)).getcolors()}
    assert segment.class_colors(2)[1] in legend and segment.class_colors(2)[0] not in legend
    pixels = np.asarray(sheet)
    assert (pixels[:230, :3] == 0).all() and (pixels[250:, 1:3] > 0).any()    # ignored, coloured


def test_predict_labels_a_photograph_as_it_stands(photos, finished, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6    # lies on its side
    Image.open(photos[0] / "b.jpg").save(tmp_path / "phone.jpg", exif=exif)
    here(segment, "--predict", tmp_path / "phone.jpg", "--out", tmp_path, "--init",
         finished[0] / "segmenter.pt")
    assert Image.open(tmp_path / "predict" / "phone_labels.png").size == (60, 33)


def test_predict_stops_at_a_broken_image_and_names_it(photos, finished, tmp_path):
    (tmp_path / "photos").mkdir()
    for name in "acb":
        shutil.copy(photos[0] / "b.jpg", tmp_path / "photos" / f"{name}.jpg")
    spoil(tmp_path / "photos" / "b.jpg")
    command = ["--out", tmp_path, "--init", finished[0] / "segmenter.pt", "--predict"]
    with pytest.raises(OSError, match=r"^cannot read image \S+b.jpg \("):
        here(segment, *command, tmp_path / "photos")
    names = {file.name[:-11] for file in (tmp_path / "predict").glob("*_labels.png")}
    assert names == {"a"}    # those before it
    with pytest.raises(OSError, match=r"^cannot read image \S+nothing.jpg \("):
        here(segment, *command, tmp_path / "nothing.jpg")


def test_predictions_are_not_labelled_again(photos, finished, tmp_path, capsys):
    folder = shutil.copytree(photos[0], tmp_path / "here")
    command = ["--predict", folder, "--out", folder / "out", "--init", finished[0] / "segmenter.pt"]
    here(segment, *command)
    first = sorted(path.name for path in folder.rglob("*.png"))
    here(segment, *command)
    assert sorted(path.name for path in folder.rglob("*.png")) == first


def test_pictures_of_results_inside_a_data_set_are_no_data(photos, own_data, finished):
    """A later training on the data skips what --predict and --eval drew there."""
    out = own_data / "images/training/results"
    for mode in (["--predict", photos[0]], ["--eval", "--workers", 0]):
        here(segment, *mode, "--out", out, "--init", finished[0] / "segmenter.pt")
    assert len([*out.rglob("*.png")]) == 9    # 6 predictions, 3 of the evaluation
    assert len(opened(own_data)) == 6


@pytest.mark.skipif(fcntl is None, reason="Windows has no such locks")
def test_a_picture_leaves_the_lock_of_a_run_alone(data, tmp_path):
    file = lock_folder(tmp_path)
    labels = torch.zeros(4, 4, dtype=torch.uint8)
    segment.draw_overlay(tmp_path / "a.png", ["class 1"], labels.expand(3, -1, -1), labels)
    done = run(SCRIPT, *QUICK, "--data", data, "--iters", 2, "--out", tmp_path, check=False)
    assert "another process is writing to --out" in done.stderr and not file.closed


# ---- bad input -------------------------------------------------------------------------------
@pytest.mark.parametrize("options, match", [
    (["--image-size", 40], r"--image-size \(40, 40\) is not a multiple of 16"),
    (["--image-size", 48, "--patch-size", 16], "not a multiple of 32"),
    (["--init", "HIERA", "--image-size", 64], "hiera.pt (is not a vit|.*kind is hiera)"),
    (["--model", "vit_small_"], "model vit_small_ is none of vit_pico"),
    (["--num-classes", 4], "need --num-classes 5; given is 4: check it and .*tests/tools/check.py"),
    (["--data", "nowhere"], "nowhere/images/training is not a folder"),
    (["--init", "nowhere.pt"], "nowhere.pt does not exist"),
    (["--iters", 1000, "--warmup-iters", 1500], "--warmup-iters must be fewer than --iters 1000"),
    (["--batch-size", 6, "--accum-steps", 4], "multiple of processes x --accum-steps = 4"),
    (["--device", "mps"], "--device mps is not available"),
])
def test_bad_options_end_in_one_sentence(options, match, data, tmp_path):
    file = saved(build_model("hiera_tiny", img_size=64), tmp_path / "hiera.pt")
    options = [file if option == "HIERA" else option for option in options]
    with pytest.raises(InputError, match=match) as error:
        here(segment, *QUICK, "--data", data, "--out", tmp_path / "out", *options)
    assert "\n" not in str(error.value)


def test_a_file_that_is_no_segmentation_model_is_refused(encoders, tmp_path):
    for mode in (["--eval"], ["--predict", "x.png"]):
        with pytest.raises(InputError, match="segmenter.pt does not exist"):
            here(segment, *mode, "--out", tmp_path, "--device", "cpu")
        with pytest.raises(InputError, match="plain.pt is no segmentation model"):
            here(segment, *mode, "--init", encoders[0] / "plain.pt", "--device", "cpu")


@pytest.mark.parametrize("options, match", [
    (["--num-classes", "255"], r"255 must lie in \[2, 254\]"),
    (["--num-classes", "1"], r"1 must lie in \[2, 254\]"),
    (["--lr", "nan"], "--lr: nan must lie in"),
    (["--drop-path", "2"], "--drop-path: 2 must lie in"),
    (["--betas", "0.9", "1"], "unrecognized arguments"),
])
def test_numbers_out_of_range_are_refused_by_the_command_line(options, match, capsys):
    with pytest.raises(SystemExit):
        segment.parse_args(options)
    assert re.search(match, capsys.readouterr().err)


@pytest.mark.parametrize("pretrained, patch, size", [
    (224, 16, (512, 512)), (64, 8, (144, 144)), (512, 16, (512, 512)),
    ((224, 112), 16, (512, 256)), (48, 12, (120, 120)), (224, 14, (504, 504))])
def test_the_size_of_crops_grows_with_that_of_the_encoder_up_to_the_papers(pretrained, patch, size,
                                                                           tmp_path):
    model = build_model("vit_pico", img_size=pretrained, patch_size=patch)
    torch.save({"model": model.state_dict(), "arch": model.arch}, tmp_path / "encoder.pt")
    assert paper_model("--init", tmp_path / "encoder.pt").encoder.img_size == size


def test_warm_up_that_is_not_given_scales_with_the_run():
    assert segment.resolve(parsed()).warmup_iters == 1500
    assert segment.resolve(parsed("--iters", "1000")).warmup_iters == 9


def test_defaults_are_the_papers_recipe():
    args = segment.resolve(parsed())
    model = segment.build_segmenter(args)
    recipe = dict(iters=160_000, batch_size=16, lr=1e-4, layer_decay=0.8, weight_decay=0.05,
                  drop_path=0.1, dropout=0.1, num_classes=150, betas=(0.9, 0.999), clip_grad=0,
                  eval_every=13)    # 13 * (20210 // 16) = 16419 iterations
    assert {k: getattr(args, k) for k in recipe} == recipe
    assert model.encoder.img_size == (512, 512)
    assert model.encoder.arch["num_heads"] == 12 and model.encoder.patch_size == 16
    assert model.encoder.blocks[-1].drop_path.p == pytest.approx(0.1)


def opened(root, split="training", num_classes=5, **options):
    return SegmentationSet(root, split, num_classes, False, (32, 32), **options)


def test_folders_of_other_names_are_shown(own_data):
    with pytest.raises(InputError, match=r"data/images/images holds \[\]$"):
        opened(own_data / "images")
    (own_data / "images/training").rename(own_data / "images/train")
    with pytest.raises(InputError, match=r"data/images holds \['train', 'validation'\]$"):
        opened(own_data)


def test_nothing_below_out_is_data(own_data):
    out = own_data / "images/training/out"
    (out / "deep").mkdir(parents=True)
    shutil.copy(own_data / "images/training/0.png", out / "deep" / "x.png")
    assert len(opened(own_data, out=out)) == 6 and len(opened(own_data)) == 7


def test_an_image_without_labels(own_data):
    (own_data / "annotations/training/3.png").unlink()
    with pytest.raises(OSError, match="cannot read labels .*3.png .FileNotFoundError"):
        segment.check_labels(opened(own_data))


def test_labels_of_another_size(own_data):
    Image.new("L", (30, 40)).save(own_data / "annotations/training/0.png")
    with pytest.raises(OSError, match=r"image .*images/training/0.png and its labels .*annotations/"
                                      r"training/0.png differ in size: .*EXIF.*as stored"):
        opened(own_data)[0, 0]


def test_labels_that_cannot_be_read(own_data):
    spoil(own_data / "annotations/training/0.png")
    with pytest.raises(OSError, match="cannot read labels .*0.png .*tests/tools/check.py"):
        segment.check_labels(opened(own_data))


def masks(root, numbers, count=3):
    """Folders of label files of 8 x 8 pixels that hold the numbers."""
    for split in ("training", "validation"):
        for part in ("images", "annotations"):
            folder = root / part / split
            folder.mkdir(parents=True)
            pixels = np.resize(np.repeat(np.uint8(numbers), 8), (8, 8))
            for k in range(count):
                Image.fromarray(pixels).save(folder / f"{k}.png")
    return root


@pytest.mark.parametrize("numbers, options", [
    ([0, 255], ["--zero-is-class", "--num-classes", 2]), ([0, 255], ["--num-classes", 2]),
    ([0, 1], ["--num-classes", 2]), ([1, 255], ["--num-classes", 2]), ([7], [])])
def test_labels_of_fewer_than_two_classes_are_refused_before_training(numbers, options, tmp_path):
    """Masks of 0 and 255 had an mIoU of 100."""
    root = masks(tmp_path / "data", numbers)
    found = re.escape(str(numbers))
    with pytest.raises(InputError, match=f"/training hold {found} alone, .*write 1 for 255"):
        here(segment, *QUICK, "--num-classes", 150, *options, "--data", root, "--out",
             tmp_path / "out")
    assert not (tmp_path / "out" / "log.jsonl").exists()


def test_labels_without_any_class_have_no_score(finished, tmp_path):
    root = masks(tmp_path / "data", [0, 255])
    with pytest.raises(InputError, match=r"/validation hold \[0, 255\] alone"):
        here(segment, "--eval", "--init", finished[0] / "segmenter.pt", "--data", root, "--workers",
             0)


def test_two_classes_that_are_rare_are_searched_in_all_files(tmp_path):
    root = masks(tmp_path / "data", [1], 9)
    Image.fromarray(np.full((8, 8), 2, np.uint8)).save(root / "annotations/training/7.png")
    segment.check_labels(opened(root, num_classes=2), enough=2)
    with pytest.raises(InputError, match=r"annotations/validation hold \[1\] alone"):
        segment.check_labels(opened(root, "validation", num_classes=2), enough=2)


def test_a_look_takes_evenly_spaced_files(tmp_path, monkeypatch):
    root = masks(tmp_path / "data", [1, 2], 12)
    looked = []
    read_numbers = segment.read_numbers
    monkeypatch.setattr(segment, "read_numbers",
                        lambda path: looked.append(path.stem) or read_numbers(path))
    dataset = opened(root)
    segment.check_labels(dataset, enough=4)
    assert looked == [dataset.label_file(k).stem for k in (0, 3, 6, 9)]


def test_what_the_labels_need_and_what_is_given_is_said_at_the_start(data, capsys):
    segment.check_labels(opened(data, num_classes=6))
    assert "; 0 is ignored: give --zero-is-class if it is a class" in capsys.readouterr().out
    segment.check_labels(opened(data, num_classes=150))
    assert capsys.readouterr().out.endswith(
        "images/training: 6 images; the label files that were read need --num-classes 5; given is "
        "150\n")


@pytest.mark.parametrize("split, file", [("training", 2), ("validation", 7)])
def test_a_number_that_is_no_class_is_found_before_training(split, file, own_data, tmp_path):
    file = own_data / "annotations" / split / f"{file}.png"
    labels = np.array(Image.open(file))
    labels[5] = 6
    Image.fromarray(labels).save(file)
    with pytest.raises(InputError, match=f"{split}: .* need --num-classes 6; given is 5"):
        here(segment, *QUICK, "--data", own_data, "--out", tmp_path / "out")
    assert not (tmp_path / "out" / "log.jsonl").exists()


def test_an_unreadable_image_ends_both_of_two_processes_with_one_sentence(own_data, tmp_path):
    spoil(own_data / "images/training/2.png")
    done = run(SCRIPT, *QUICK, "--data", own_data, "--iters", 300, "--out", tmp_path, torchrun=2,
               check=False, timeout=30)
    own = done.stderr.split("exitcode")[0]
    assert done.returncode == 1 and "Traceback" not in own
    assert len(re.findall(r"error: cannot read image \S+2.png.*tests/tools/check.py", own)) == 1


def test_items_depend_on_seed_epoch_and_index_alone(data):
    train_set = opened(data, seed=0, fill=[128, 128, 128])
    torch.manual_seed(5)
    first = train_set[1, 0]
    after = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(3))    # the global generator is left alone
    assert torch.equal(first[0], train_set[1, 0][0])
    assert not torch.equal(first[0], train_set[2, 0][0])
    assert not torch.equal(first[0], opened(data, seed=1, fill=[128, 128, 128])[1, 0][0])


def test_help_needs_neither_data_nor_device(capsys):
    with pytest.raises(SystemExit) as stop:
        segment.parse_args(["--help"])
    printed = capsys.readouterr().out
    assert stop.value.code == 0 and "--zero-is-class" in printed and "None" not in printed
