"""Labels, metrics, sliding windows, network, augmentation and runs of segment.py."""
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

import segment
from models import (MODELS, Hiera, InputError, VisionTransformer, load_encoder, param_groups,
                    read_log, toy_picture)
from segment import IGNORE, SemanticFPN

SCRIPT = ROOT / "segment.py"


def small_model(size, classes=4):
    """Semantic FPN on a ViT of 3 narrow blocks, with seeded weights."""
    encoder = VisionTransformer(img_size=size, embed_dim=32, depth=3, num_heads=2,
                                rel_pos_bias=True, layer_scale=1.0)
    return seed_weights(SemanticFPN(encoder, classes))


def parsed(*options):
    return segment.parse_args([*map(str, options), "--workers", "0"])


def paper_model(*options):
    args = segment.resolve(parsed(*options))
    return segment.build_model(args, segment.class_names(args))


def test_a_photograph_is_labelled_in_three_lines():
    model = small_model(64)
    logits = segment.sliding_logits(model, seeded((3, 100, 150), "photograph"), stride=42)
    assert logits.argmax(dim=0).shape == (100, 150)


# ---- labels and metrics ----------------------------------------------------------------------
RAW = np.array([[0, 1, 2, 150], [150, 0, 1, 255]], np.uint8)
ADE20K = segment.label_table(150, zero_is_class=False)


def saved(path, image):
    image.save(path)
    return path


def test_labels_are_shifted_once(tmp_path):
    path = saved(tmp_path / "grey.png", Image.fromarray(RAW))
    assert segment.read_labels(path, ADE20K).tolist() == [[255, 0, 1, 149], [149, 255, 0, 255]]


def test_palette_files_hold_numbers_too(tmp_path):
    image = Image.fromarray(RAW)
    image.putpalette(np.random.default_rng(0).integers(0, 256, 768).tolist())
    path = saved(tmp_path / "palette.png", image)
    assert segment.read_labels(path, ADE20K).tolist() == [[255, 0, 1, 149], [149, 255, 0, 255]]


def test_one_bit_files_hold_numbers_too(tmp_path):
    path = saved(tmp_path / "bits.png", Image.fromarray(RAW > 1))
    assert segment.read_labels(path, ADE20K).tolist() == [[255, 255, 0, 0], [0, 255, 255, 0]]


def test_labels_of_custom_data_may_begin_at_zero(tmp_path):
    path = saved(tmp_path / "grey.png", Image.fromarray(RAW))
    table = segment.label_table(151, zero_is_class=True)
    assert segment.read_labels(path, table).tolist() == RAW.tolist()


@pytest.mark.parametrize("classes, zero_is_class", [(149, False), (150, True)])
def test_numbers_beyond_the_classes_are_refused(classes, zero_is_class, tmp_path):
    path = saved(tmp_path / "grey.png", Image.fromarray(RAW))
    with pytest.raises(InputError, match="grey.png hold the number 150, which is no class"):
        segment.read_labels(path, segment.label_table(classes, zero_is_class))


def test_numbers_beyond_a_byte_are_refused(tmp_path):
    path = saved(tmp_path / "deep.png", Image.fromarray(RAW.astype(np.uint16) + 256))
    with pytest.raises(InputError, match="deep.png hold the number 256"):
        segment.read_labels(path, ADE20K)


def test_colour_images_are_no_labels(tmp_path):
    path = saved(tmp_path / "colour.png", Image.new("RGB", (4, 4)))
    with pytest.raises(InputError, match="one class number per pixel"):
        segment.read_labels(path, ADE20K)


def test_names_of_ade20k(tmp_path):
    rows = [f"{k}\t0.1\t9\t9\tname {k}, synonym" for k in range(1, 151)]
    header = "Idx\tRatio\tTrain\tVal\tName"
    (tmp_path / "objectInfo150.txt").write_text("\n".join([header, *rows]))
    names = segment.class_names(segment.parse_args(["--data", str(tmp_path)]))
    assert names == [f"name {k}" for k in range(1, 151)]


def test_names_of_custom_data_are_a_line_each(tmp_path):
    (tmp_path / "objectInfo150.txt").write_text("road\nsky\n")
    options = ["--data", str(tmp_path), "--num-classes"]
    assert segment.class_names(segment.parse_args([*options, "2"])) == ["road", "sky"]
    with pytest.raises(InputError, match="has 2 names, --num-classes is 3"):
        segment.class_names(segment.parse_args([*options, "3"]))


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
    assert values["miou"] == pytest.approx(100 * sum(expected) / 4) and values["absent"] == 1
    assert values["pixel_accuracy"] == pytest.approx(100 * sum(hits) / 13)


def test_labels_without_any_class_have_no_score():
    with pytest.raises(InputError, match="no pixel of the validation labels has a class"):
        segment.summarize(torch.zeros(5, 5))


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
    logits = segment.sliding_logits(model, image, 341)
    assert logits.shape == (4, *size)
    assert rel_error(logits, one_window_at_a_time(model, image, 341)) < 1e-5


@torch.no_grad()
def test_an_image_of_a_windows_size_passes_the_network_once():
    model = small_model(512)
    image = seeded((3, 512, 512), "image")
    whole = F.interpolate(model(image[None]), (512, 512), mode="bilinear")[0]
    assert rel_error(segment.sliding_logits(model, image, 341), whole) < 1e-6


@torch.no_grad()
def test_a_small_image_is_padded_to_a_window():
    model = small_model(512)
    image = seeded((3, 100, 100), "image")
    padded = F.interpolate(model(F.pad(image, (0, 412, 0, 412))[None]), (512, 512), mode="bilinear")
    assert rel_error(segment.sliding_logits(model, image, 341), padded[0, :, :100, :100]) < 1e-5


@pytest.mark.parametrize("length, starts", [
    (512, [0]), (683, [0, 171]), (853, [0, 341]), (1200, [0, 341, 682, 688])])
def test_windows_cover_the_image(length, starts):
    assert segment.window_starts(length, 512, 341) == starts


@pytest.mark.parametrize("shape, scaled", [
    ((600, 800), [512, 683]), ((300, 1800), [341, 2048]), ((1, 5000), [1, 2048])])
def test_images_are_scaled_as_in_the_paper(shape, scaled):
    assert segment.resized_shape(shape, 512, 2048) == scaled
    image = torch.zeros(3, *shape, dtype=torch.uint8)
    assert list(segment.resize_for_test(image, (512, 512)).shape[1:]) == scaled


# ---- network ---------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [(512, 512), (640, 480)])
def test_pyramid_and_head_have_the_shapes_of_the_paper(size):
    h, w = size
    model = paper_model("--image-size", *size)
    assert model.pyramid.taps == [4, 6, 8, 12]
    model = model.to("meta")
    images = torch.empty(2, 3, h, w, device="meta")
    maps = model.encoder.feature_maps(images, model.pyramid.taps)
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


@pytest.mark.parametrize("encoder", [
    VisionTransformer(img_size=64, embed_dim=32, depth=3, num_heads=2, rel_pos_bias=True,
                      layer_scale=1.0, drop_path=0.1),
    Hiera(img_size=64, embed_dim=16, stages=(1, 1, 1, 1), drop_path=0.1)], ids=["vit", "hiera"])
def test_every_parameter_learns(encoder):
    """One without gradient would stop DistributedDataParallel, one in no group never change."""
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
    models = {"rpe": VisionTransformer(num_classes=10, rel_pos_bias=True, **options),
              "plain": VisionTransformer(**options)}
    for name, model in models.items():
        seed_weights(model)
        torch.save({"model": model.state_dict(), "arch": model.arch}, folder / f"{name}.pt")
    return folder, models


def segmentation_encoder(size):
    encoder = VisionTransformer(img_size=size, embed_dim=48, depth=2, num_heads=4,
                                rel_pos_bias=True, layer_scale=1.0)
    return SemanticFPN(encoder, 5).encoder


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
        expected = F.interpolate(old[:-3].T.view(1, 4, 27, 27), (side, side), mode="bicubic")
        assert rel_error(table[:-3].detach(), expected[0].flatten(1).T.detach()) < 1e-6
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
    labels = torch.tensor(toy_picture(4, (70, 90))[2]).clamp(max=1)
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
        rows, columns = segment.class_ratio_crop(labels, (40, 40), tries=200)
        counts = labels[rows, columns].flatten().bincount(minlength=2)[:2]
        assert counts.max() / counts.sum() < 0.75


def test_a_crop_of_a_single_class_is_taken_in_the_end():
    rows, _ = segment.class_ratio_crop(torch.zeros(30, 50, dtype=torch.uint8), (40, 40))
    assert rows.start == 0


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


# ---- runs ------------------------------------------------------------------------------------
QUICK = ["--model", "vit_pico", "--num-classes", 5, "--image-size", 32, "--patch-size", 8,
         "--batch-size", 4, "--lr", 1e-3, "--workers", 0, "--device", "cpu"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Six training and three validation images of different sizes, labels 0 .. 5, as ADE20K has
    them."""
    root = tmp_path_factory.mktemp("ade")
    for k, split in enumerate(["training"] * 6 + ["validation"] * 3):
        image, _, labels, _ = toy_picture(k, (40 + 4 * k, 70 - 5 * k))
        labels = np.minimum(labels, 4) + 1
        labels[:3] = 0
        for kind, picture in (("images", image), ("annotations", labels)):
            folder = root / kind / split
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(folder / f"{k}.png")
    return root


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """A run of 24 steps that was killed, stopped and resumed on the way, after an evaluation."""
    options = [*QUICK, "--data", data, "--iters", 24, "--save-every", 7, "--eval-every", 12]
    segment.RECIPE["log_every"] = 1
    folder = check_kill_and_resume(segment, options, tmp_path_factory.mktemp("run"), at_step=12)
    segment.RECIPE["log_every"] = 50
    return folder, options


def test_an_interrupted_run_resumes_bit_for_bit(finished):
    folder = finished[0].parent
    scores = [[(v["step"], v["miou"]) for v in read_log(folder / name / "log.jsonl") if "miou" in v]
              for name in ("straight", "SIGKILL", "SIGTERM")]
    assert [step for step, _ in scores[0]] == [12, 24] and scores[0] == scores[1] == scores[2]
    best = [state_of(folder / name / "best.pt") for name in ("straight", "SIGKILL", "SIGTERM")]
    assert best[0]["best"] == best[1]["best"] == best[2]["best"] == max(m for _, m in scores[0])


def test_an_evaluation_lost_by_a_kill_is_made_again(finished, tmp_path):
    """As if the run had been killed between its last writing of last.pt and the evaluation."""
    folder, options = finished
    here(segment, *options, "--out", tmp_path, "--max-steps", 1)
    torch.save(state_of(folder / "last.pt"), tmp_path / "last.pt")
    (tmp_path / "best.pt").unlink()
    (tmp_path / "log.jsonl").write_text((folder / "log.jsonl").read_text())
    here(segment, *options, "--out", tmp_path)
    last, expected = (read_log(f / "log.jsonl")[-1] for f in (tmp_path, folder))
    assert last == expected
    assert (tmp_path / "best.pt").exists() == (last["miou"] > state_of(folder / "last.pt")["best"])


def test_a_run_learns_and_logs_every_step(finished):
    losses = [v["loss"] for v in read_log(finished[0] / "log.jsonl") if "loss" in v]
    assert len(losses) == 24 and np.mean(losses[-6:]) < np.mean(losses[:6])


def test_a_run_is_saved_every_save_every_steps_and_at_no_epochs_end(data, tmp_path):
    """An epoch is a single step here."""
    written = []

    def note(path, save=segment.save_checkpoint, **state):
        written.append((path.name, state["step"]))
        save(path, **state)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segment, "save_checkpoint", note)
        here(segment, *QUICK, "--data", data, "--iters", 8, "--save-every", 3, "--out", tmp_path)
    assert [step for name, step in written if name == "last.pt"] == [3, 6, 8]


def test_a_run_draws_what_it_predicts(finished):
    assert np.asarray(Image.open(finished[0] / "overlay.png")).std() > 10


def test_the_best_model_serves_other_scripts(finished):
    best = state_of(finished[0] / "best.pt")
    assert best["classes"] == [f"class {k}" for k in range(5)] and best["arch"]["rel_pos_bias"]
    encoder = MODELS["vit_pico"](img_size=32, patch_size=8, rel_pos_bias=True, layer_scale=1.0)
    load_encoder(encoder, finished[0] / "best.pt")
    assert torch.equal(encoder.blocks[3].ls1.gamma, best["model"]["encoder.blocks.3.ls1.gamma"])


def test_a_run_starts_from_an_encoder_with_its_patches_and_colours(data, tmp_path, capsys):
    encoder = MODELS["vit_pico"](img_size=48, patch_size=8)
    torch.save({"model": encoder.state_dict(), "arch": encoder.arch, "mean": [0.5] * 3,
                "std": [0.25] * 3}, tmp_path / "encoder.pt")
    args = segment.resolve(segment.parse_args(["--init", str(tmp_path / "encoder.pt")]))
    assert args.patch_size == 8 and args.mean == (0.5,) * 3 and args.std == (0.25,) * 3


def test_resume_takes_remedies_and_refuses_another_run(finished, tmp_path, capsys):
    folder = shutil.copytree(finished[0], tmp_path / "moved")
    options = finished[1]
    here(segment, *options, "--out", folder, "--clip-grad", 1, "--dtype", "bf16", "--lr", 1e-4)
    assert "clip_grad is now 1.0, was 0.0" in capsys.readouterr().out
    with pytest.raises(InputError, match="iters 24, not 25"):
        here(segment, *options, "--iters", 25, "--warmup-iters", 0, "--out", folder)


WITHOUT_DROPOUT = f"""    # its random numbers are a process's own
import sys
sys.path.insert(0, {str(ROOT)!r})
import segment
segment.RECIPE.update(dropout=0.0, drop_path=0.0)
segment.main(segment.parse_args())
"""


@pytest.fixture(scope="module")
def two_processes(data, tmp_path_factory):
    """A run of two processes without dropout, its options, and what it printed."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "without_dropout.py").write_text(WITHOUT_DROPOUT)
    options = [*QUICK, "--data", data, "--iters", 12, "--batch-size", 2, "--lr", 1e-4]
    done = run(folder / "without_dropout.py", *options, "--out", folder, torchrun=2)
    return folder, options, done.stdout


def test_two_processes_equal_one_with_accumulation(two_processes, tmp_path, monkeypatch):
    """Batch statistics are those of one image in both runs, running ones those of other images."""
    folder, options, printed = two_processes
    assert "batch 2 = 1 images x 2 process(es) x 1 micro-steps" in printed
    monkeypatch.setitem(segment.RECIPE, "dropout", 0.0)
    monkeypatch.setitem(segment.RECIPE, "drop_path", 0.0)
    here(segment, *options, "--accum-steps", 2, "--out", tmp_path)
    one, two = (state_of(out / "last.pt")["model"] for out in (tmp_path, folder))
    for key in one:
        if "running" not in key and "num_batches" not in key:
            assert (one[key] - two[key]).abs().max() <= 1e-6, key


def test_processes_share_the_evaluation(data, two_processes, tmp_path):
    """Two processes and three images: the scores that one process gives the same weights."""
    folder, _, printed = two_processes
    here(segment, "--data", data, "--workers", 0, "--eval", "--init", folder / "best.pt",
         "--out", tmp_path)
    one = read_log(tmp_path / "eval.jsonl")[-1]
    assert one == read_log(folder / "log.jsonl")[-1] and one["step"] == 12
    assert sum(iou > 0 for iou in one["iou"]) > 1    # no constant
    assert "3 images, slide, window (32, 32), stride 21" in printed


def test_eval_gives_the_score_of_training_again(data, finished, tmp_path):
    here(segment, "--data", data, "--eval", "--workers", 0, "--out", tmp_path, "--init",
         finished[0] / "best.pt")
    best = state_of(finished[0] / "best.pt")
    scores = {v["step"]: v["miou"] for v in read_log(finished[0] / "log.jsonl") if "miou" in v}
    assert read_log(tmp_path / "eval.jsonl")[0]["miou"] == scores[best["step"]] == best["best"]


@pytest.mark.parametrize("options", [
    ["--model", "hiera_tiny", "--image-size", 32], ["--dtype", "bf16", "--clip-grad", 1],
    ["--zero-is-class", "--num-classes", 6], ["--data", "toy"]],
    ids=["hiera", "bf16", "zero is a class", "toy"])
def test_other_ways_to_train(options, data, tmp_path, capsys):
    here(segment, *QUICK, "--data", data, "--iters", 2, "--out", tmp_path, *options)
    assert "step 2: mIoU" in capsys.readouterr().out


def test_a_compiled_run_saves_names_without_a_prefix(data, tmp_path):
    with torch.compiler.set_stance("force_eager"):    # its names, not its compilation
        here(segment, *QUICK, "--data", data, "--iters", 1, "--out", tmp_path, "--compile")
    assert "classifier.weight" in state_of(tmp_path / "last.pt")["model"]


def test_the_demo_compares_with_scratch(tmp_path, monkeypatch, capsys):
    encoder = MODELS["vit_pico"](img_size=48, patch_size=8)
    torch.save({"model": encoder.state_dict(), "arch": encoder.arch}, tmp_path / "encoder.pt")
    monkeypatch.setattr(segment, "DEMO", {**segment.DEMO, "iters": 1, "seeds": 2})
    here(segment, "--demo", "--out", tmp_path / "demo", "--init", tmp_path / "encoder.pt")
    printed = capsys.readouterr().out
    for name in ("scratch", "pre-trained", "difference"):
        assert re.search(rf"{name} +-?\d+\.\d \+- \d+\.\d", printed)
        assert name == "difference" or (tmp_path / "demo" / f"{name}1" / "overlay.png").exists()


def test_the_demo_says_which_other_demo_comes_first(tmp_path):
    with pytest.raises(InputError, match="run pretrain_d2mae.py --demo first"):
        here(segment, "--demo", "--out", tmp_path, "--init", tmp_path / "nothing.pt")


# ---- predictions -----------------------------------------------------------------------------
@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Three pictures, two of which have the same stem; their sizes."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "sub").mkdir()
    sizes = {"sub/a.png": (50, 37), "sub/a.jpg": (90, 40), "b.jpg": (33, 60)}
    for name, (w, h) in sizes.items():
        Image.fromarray(toy_picture(7, (h, w))[0]).save(folder / name)
    return folder, sizes


def test_predict_labels_a_folder(photos, finished, tmp_path):
    folder, sizes = photos
    here(segment, "--predict", folder, "--out", tmp_path, "--init", finished[0] / "best.pt")
    for name, size in sizes.items():    # a.jpg and a.png do not overwrite each other's
        labels = Image.open(tmp_path / "predict" / f"{name}_labels.png")
        assert labels.size == size
        assert 1 <= np.asarray(labels).min() <= np.asarray(labels).max() <= 5
        assert (tmp_path / "predict" / f"{name}_overlay.png").exists()


def test_predict_labels_a_photograph_as_it_stands(photos, finished, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6    # lies on its side
    Image.open(photos[0] / "b.jpg").save(tmp_path / "phone.jpg", exif=exif)
    here(segment, "--predict", tmp_path / "phone.jpg", "--out", tmp_path, "--init",
         finished[0] / "best.pt")
    assert Image.open(tmp_path / "predict" / "phone.jpg_labels.png").size == (60, 33)


def test_predict_names_a_broken_image_and_labels_the_others(photos, finished, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"\xff\xd8\xff")
    Image.open(photos[0] / "b.jpg").save(tmp_path / "photos" / "b.jpg")
    with pytest.raises(OSError, match=r"cannot read \S+a.jpg \(\w+\); every other image"):
        here(segment, "--predict", tmp_path / "photos", "--out", tmp_path, "--init",
             finished[0] / "best.pt")
    assert (tmp_path / "predict" / "b.jpg_labels.png").exists()


# ---- bad input -------------------------------------------------------------------------------
@pytest.mark.parametrize("options, match", [
    (["--image-size", 40], "--image-size 40 must be one or two multiples of 16"),
    (["--image-size", 32, 32, 32], "must be one or two multiples of 16"),
    (["--model", "hiera_tiny", "--image-size", 48], "multiples of 32"),
    (["--num-classes", 4], "hold the number 5, which is no class"),
    (["--data", "nowhere"], "nowhere/images/training is not a folder"),
    (["--init", "nowhere.pt"], "nowhere.pt does not exist"),
    (["--eval"], "best.pt does not exist"),
    (["--predict", "x.png", "--init", "ENCODER"], "encoder.pt is no segmentation model"),
    (["--eval", "--init", "ENCODER"], "encoder.pt is no segmentation model"),
    (["--iters", 1000, "--warmup-iters", 1500], "--warmup-iters 1500 must be fewer than --iters"),
    (["--batch-size", 6, "--accum-steps", 4], "choose a multiple of 4"),
    (["--device", "mps"], "--device mps is not available"),
])
def test_bad_options_end_in_one_sentence(options, match, data, encoders, tmp_path):
    torch.save(state_of(encoders[0] / "plain.pt"), tmp_path / "encoder.pt")
    options = [tmp_path / "encoder.pt" if o == "ENCODER" else o for o in options]
    with pytest.raises(InputError, match=match) as error:
        here(segment, *QUICK, "--data", data, "--out", tmp_path, *options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("options, match", [
    (["--num-classes", "255"], r"255 must lie in \[2, 254\]: labels are bytes"),
    (["--num-classes", "1"], r"1 must lie in \[2, 254\]"),
    (["--accum-steps", "0"], r"--accum-steps: 0 must lie in \[1, inf\)"),
    (["--lr", "nan"], "--lr: nan must lie in"),
    (["--save-every", "0"], "--save-every: 0 must lie in"),
    (["--seed", "5000000000"], "--seed: 5000000000 must lie in"),
    (["--betas", "0.9", "1"], "unrecognized arguments"),
    (["--std", "0", "0", "0"], "unrecognized arguments"),
])
def test_numbers_out_of_range_are_refused_by_the_command_line(options, match, capsys):
    with pytest.raises(SystemExit):
        segment.parse_args(options)
    assert re.search(match, capsys.readouterr().err)


def test_warm_up_that_is_not_given_scales_with_the_run():
    assert segment.resolve(segment.parse_args([])).warmup_iters == 1500
    assert segment.resolve(segment.parse_args(["--iters", "1000"])).warmup_iters == 9


def test_defaults_are_the_papers_recipe():
    args = segment.resolve(segment.parse_args([]))
    recipe = dict(iters=160_000, batch_size=16, lr=1e-4, layer_decay=0.8, weight_decay=0.05,
                  drop_path=0.1, dropout=0.1, image_size=(512, 512), stride=341, num_classes=150,
                  betas=(0.9, 0.999), clip_grad=0, patch_size=16)
    assert {k: getattr(args, k) for k in recipe} == recipe


@pytest.mark.parametrize("model, patch", [("vit_huge", 14), ("vit_tiny", 16)])
def test_the_patch_is_that_of_the_model(model, patch):
    args = segment.parse_args(["--model", model, "--image-size", "448"])
    assert segment.resolve(args).patch_size == patch


def test_an_encoder_of_hiera_needs_its_model_named(tmp_path):
    encoder = MODELS["hiera_tiny"](img_size=64)
    torch.save({"model": encoder.state_dict(), "arch": encoder.arch}, tmp_path / "encoder.pt")
    with pytest.raises(InputError, match="is a hiera_tiny: choose --model hiera_tiny"):
        segment.resolve(segment.parse_args(["--init", str(tmp_path / "encoder.pt")]))


@pytest.fixture
def pair(tmp_path):
    """A data set of one training pair, to be spoilt."""
    for kind in ("images", "annotations"):
        (tmp_path / kind / "training").mkdir(parents=True)
    image = tmp_path / "images" / "training" / "a.png"
    labels = tmp_path / "annotations" / "training" / "a.png"
    Image.new("RGB", (40, 40)).save(image)
    Image.new("L", (40, 40)).save(labels)
    return image, labels


def test_an_image_without_labels(pair, tmp_path):
    pair[1].unlink()
    with pytest.raises(InputError, match="a.png has no labels"):
        segment.list_pairs(tmp_path, "training")


def test_labels_of_another_size(pair, tmp_path):
    Image.new("L", (30, 40)).save(pair[1])
    with pytest.raises(InputError, match="40x40 pixels, its labels .* 30x40"):
        segment.open_set(parsed("--data", tmp_path), "training")


def test_labels_that_cannot_be_read(pair, tmp_path):
    pair[1].write_bytes(b"\x89PNG")
    with pytest.raises(InputError, match="cannot read labels .*a.png"):
        segment.open_set(parsed("--data", tmp_path), "training")


def test_a_wrong_number_ends_all_processes_with_one_sentence(data, tmp_path):
    """In a loader process, before the first step."""
    done = run(SCRIPT, *QUICK, "--data", data, "--num-classes", 4, "--workers", 1,
               "--out", tmp_path, torchrun=2, check=False)
    own = done.stderr.split("exitcode")[0]    # torchrun adds its own report and traceback
    assert done.returncode == 1 and "Traceback" not in own
    assert len(re.findall(r"error: labels \S+ hold the number 5, which is no class", own)) == 1


def test_a_wrong_number_of_the_held_out_labels_is_found_before_training(data, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    file = tmp_path / "data" / "annotations" / "validation" / "7.png"
    labels = np.array(Image.open(file))
    labels[5] = 6
    Image.fromarray(labels).save(file)
    with pytest.raises(InputError, match=r"labels \S+7.png hold the number 6"):
        here(segment, *QUICK, "--data", tmp_path / "data", "--out", tmp_path / "out")
    assert not (tmp_path / "out" / "log.jsonl").exists()


def test_what_one_process_alone_cannot_read_is_named(photos, finished, tmp_path):
    """The second of two processes, for which no other speaks."""
    (tmp_path / "photos").mkdir()
    Image.open(photos[0] / "b.jpg").save(tmp_path / "photos" / "a.jpg")
    (tmp_path / "photos" / "b.jpg").write_bytes(b"no image")
    done = run(SCRIPT, "--predict", tmp_path / "photos", "--out", tmp_path, "--init",
               finished[0] / "best.pt", "--device", "cpu", torchrun=2, check=False)
    own = done.stderr.split("exitcode")[0]
    assert done.returncode == 1 and "Traceback" not in own
    assert len(re.findall(r"error: cannot read \S+b.jpg", own)) == 1


def test_a_corrupt_image_is_named_or_replaced(pair, tmp_path, capsys):
    Image.new("RGB", (40, 40)).save(pair[0].with_name("b.png"))
    Image.new("L", (40, 40), 1).save(pair[1].with_name("b.png"))
    for kind in ("images", "annotations"):
        (tmp_path / kind / "training").rename(tmp_path / kind / "validation")
        (tmp_path / kind / "training").symlink_to(tmp_path / kind / "validation")
    broken = tmp_path / "images" / "validation" / "a.png"
    broken.write_bytes(broken.read_bytes()[:60])
    command = [*QUICK, "--data", tmp_path, "--iters", 2, "--batch-size", 2,
               "--out", tmp_path / "out"]
    with pytest.raises(SystemExit) as stop:
        here(segment, *command)
    printed = capsys.readouterr().err
    assert stop.value.code == 1
    assert re.search(r"error: cannot read image \S+a.png: .*--skip-corrupt", printed)
    here(segment, *command, "--skip-corrupt")
    counts = [v["unreadable"] for v in read_log(tmp_path / "out" / "log.jsonl") if "lr" in v]
    assert sum(counts) > 0


def test_a_data_set_leaves_the_global_generator_alone(data):
    args = segment.resolve(parsed(*QUICK, "--data", data))
    train_set = segment.open_set(args, "training")
    torch.manual_seed(5)
    first = train_set[1, 0]
    after = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(3))
    assert torch.equal(first[0], train_set[1, 0][0])
    assert not torch.equal(first[0], train_set[2, 0][0])


def test_help_needs_neither_data_nor_device(capsys):
    with pytest.raises(SystemExit) as stop:
        segment.parse_args(["--help"])
    assert stop.value.code == 0 and "--zero-is-class" in capsys.readouterr().out
