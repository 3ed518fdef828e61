"""Tests of track.py: golden numbers, losses and metrics against loops, crops, data layouts, evaluation, training."""
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
from PIL import Image

from conftest import ROOT, rel_error, run, seed_weights, seeded

import models
import track


def make_tracker(**options):
    encoder = seed_weights(models.MODELS["vit_tiny"](), "track.backbone.")
    tracker = track.Tracker(encoder, **options)
    seed_weights(tracker.head, "track.head.")
    return tracker.eval()


# ----------------------------------------------------------------------------------------------------------------------
# Golden numbers
# ----------------------------------------------------------------------------------------------------------------------
@torch.no_grad()
def test_golden_model(golden):
    tracker = make_tracker()
    template, search = seeded((2, 3, 128, 128), "template"), seeded((2, 3, 256, 256), "search")
    encoder = tracker.encoder
    assert rel_error(encoder.template_pos_embed[0, ::9, :8], golden["track/pos_embed_z"]) < 1e-4
    assert rel_error(encoder.search_pos_embed[0, ::37, :8], golden["track/pos_embed_x"]) < 1e-4
    z = tracker.embed_template(template)
    for name, keep in (("full", 1.0), ("ce", 0.7)):
        feat = tracker.forward_features(z, search, keep)
        assert rel_error(feat[:, [0, 63, 64, 100, 200, 319], :16], golden[f"track/{name}/feat"]) < 1e-4
        assert abs(feat.abs().mean() / float(golden[f"track/{name}/feat_abs_mean"]) - 1) < 1e-4
        score, size, offset = tracker(template, search, keep)
        assert rel_error(score[:, 0, ::5, ::5], golden[f"track/{name}/score"]) < 1e-4
        assert rel_error(size[:, :, ::5, ::5], golden[f"track/{name}/size"]) < 1e-4
        assert rel_error(offset[:, :, ::5, ::5], golden[f"track/{name}/offset"]) < 1e-4
        assert rel_error(track.decode(score, size, offset), golden[f"track/{name}/bbox_cxcywh"]) < 1e-4
    gone = feat[:, 64:].abs().sum(dim=2) == 0
    assert gone.sum(dim=1).tolist() == [golden["track/ce/removed"].sum()] * 2
    tracker.eliminate_blocks = (4,)
    gone = tracker.forward_features(z, search, 0.7)[:, 64:].abs().sum(dim=2) == 0
    assert np.array_equal([g.nonzero()[:, 0].numpy() for g in gone], golden["track/ce/removed_first"])


def test_golden_losses_and_schedules(golden):
    boxes = torch.from_numpy(golden["track/heatmap_boxes_xywh"])
    target = track.gaussian_target(boxes, 16)
    assert rel_error(target, golden["track/heatmap"]) < 1e-5
    score = track.clamped_sigmoid(seeded((3, 1, 16, 16), "focal"))
    assert rel_error(track.focal_loss(score, target[:, None]), golden["track/focal_loss"]) < 1e-5
    assert rel_error(track.hann_window(16)[:3], golden["track/hann16"]) < 1e-4
    args = track.parse_args([])
    rates = [track.keep_rate_at(int(e), args) for e in golden["track/keep_rate_epochs"]]
    assert np.allclose(rates, golden["track/keep_rate"], atol=1e-6)


def test_golden_crops(golden):
    """Side, corner and box of a crop. The corner is read off an image whose pixels hold their own position."""
    frame = torch.stack([torch.arange(400).expand(300, -1) % 256, torch.arange(400).expand(300, -1) // 256,
                         torch.arange(300)[:, None].expand(-1, 400) % 256]).to(torch.uint8)
    for box, truth, side, corner, inside in zip(*(golden[f"track/crop_{k}"] for k in
                                                  ("box_xywh", "gt_xywh", "side", "x1y1", "gt_in_crop"))):
        crop, got = track.crop_square(frame, box, 4, int(side))    # not resized
        assert got == side
        x, y = 10 - min(corner[0], 0), 10 - min(corner[1], 0)      # a pixel inside the image
        assert crop[0, y, x] + 256 * int(crop[1, y, x]) == corner[0] + x and crop[2, y, x] == (corner[1] + y) % 256
        assert rel_error(track.box_to_crop(truth, box, side, 256), inside) < 1e-4


def test_golden_evaluation(golden):
    keys = ("pred", "gt", "visible")
    curves = [track.score_sequence(*(golden[f"track_eval/{k}{i}"] for k in keys)) for i in range(3)]
    success, precision, normed = (torch.stack(c).mean(dim=0) for c in zip(*curves))
    assert abs(success.mean() - float(golden["track_eval/auc"])) < 1e-6
    assert abs(precision[20] - float(golden["track_eval/precision20"])) < 1e-6
    assert abs(normed[20] - float(golden["track_eval/norm_precision20"])) < 1e-6


# ----------------------------------------------------------------------------------------------------------------------
# Elimination, head, crops, losses, metrics
# ----------------------------------------------------------------------------------------------------------------------
@torch.no_grad()
def test_elimination_keeps_what_full_attention_keeps():
    """A reference with the whole attention map: same tokens kept, same values."""
    torch.manual_seed(0)
    block = seed_weights(models.Block(192, 12), "block.")
    x, ids = torch.randn(3, 16 + 36, 192), torch.rand(3, 64).argsort(dim=1)[:, :36]
    got, kept = track.block_with_elimination(block, x, ids, 11, centre=5)
    attention = block.attn.logits(block.norm1(x)).softmax(dim=-1)
    full = block(x)
    for b in range(3):
        order = attention[b, :, 5, 16:].mean(dim=0).argsort(descending=True)[:11]
        assert set(kept[b].tolist()) == set(ids[b, order].tolist())
        rows = {int(i): full[b, 16 + n] for n, i in enumerate(ids[b])}
        assert rel_error(got[b, :16], full[b, :16]) < 1e-5
        assert rel_error(got[b, 16:], torch.stack([rows[int(i)] for i in kept[b]])) < 1e-5


def make_small(**options):
    """Template 2 x 2 and search 8 x 8 tokens, batch norms away from their initial state."""
    torch.manual_seed(1)
    encoder = models.VisionTransformer(img_size=64, patch_size=8, embed_dim=48, depth=3, num_heads=3)
    tracker = track.Tracker(encoder, 16, 64, eliminate_blocks=(2,), **options).eval()
    for m in tracker.head.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.1)
            m.running_var.uniform_(0.05, 0.2)
    return tracker


@torch.no_grad()
def test_fused_head_is_the_head_everywhere():
    head = make_small().head
    fused, x = track.FusedHead(head), torch.randn(2, 48, 8, 8)
    score, size, offset = head(x)
    for y, x_ in [(0, 0), (0, 7), (7, 0), (7, 7), (3, 4), (1, 6)]:    # a window forces the peak
        window = torch.zeros(8, 8)
        window[y, x_] = 1
        boxes, scores = fused(x, window)
        want = torch.cat([(torch.tensor([[x_, y]]) + offset[:, :, y, x_]) / 8, size[:, :, y, x_]], dim=1)
        assert rel_error(boxes, want) < 1e-4 and rel_error(scores, score[:, 0, y, x_]) < 1e-4
    assert size.std() > 1e-3    # not a constant


def test_crop_and_box_invert_each_other():
    rng = np.random.default_rng(0)
    frame = torch.zeros(3, 90, 120, dtype=torch.uint8)
    for around in ([50, 40, 20, 10], [-8, -6, 30, 30], [110, 80, 25, 18], [2, 80, 9, 40]):    # three reach outside
        around = np.array(around, dtype=float)
        crop, side = track.crop_square(frame, around, 4, 64)
        assert crop.shape == (3, 64, 64)
        for _ in range(20):
            box = np.concatenate([around[:2] + rng.normal(0, 10, 2), rng.uniform(1, 40, 2)])
            again = track.box_from_crop(track.box_to_crop(box, around, side, 64), around, side, 64)
            assert np.abs(again - box).max() < 1e-4
    # a bright rectangle is where the mapped box says, half a pixel of rounding and half a pixel of convention aside
    frame[:, 30:50, 70:110] = 255
    around, box = np.array([60.0, 20, 60, 45]), np.array([70.0, 30, 40, 20])
    crop, side = track.crop_square(frame, around, 2, 256)
    ys, xs = (crop[0] > 127).nonzero().numpy().T
    found = np.array([xs.min(), ys.min(), xs.max() + 1 - xs.min(), ys.max() + 1 - ys.min()])
    assert np.abs(found - 256 * track.box_to_crop(box, around, side, 256)).max() < 0.5 * 256 / side + 1.5
    assert (track.crop_square(frame, [500, 500, 10, 10], 4, 64)[0] == 0).all()    # nothing but padding


def test_losses_against_loops():
    torch.manual_seed(0)
    score, size, offset = track.clamped_sigmoid(torch.randn(4, 1, 8, 8)), torch.rand(4, 2, 8, 8), torch.rand(4, 2, 8, 8)
    boxes = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.5, 0.5, 0.2, 0.1], [0.0, 0.0, 1.0, 1.0], [0.3, 0.6, 0.05, 0.3]])
    got, target = track.tracking_losses(score, size, offset, boxes), track.gaussian_target(boxes, 8)
    giou = l1 = focal = ones = 0.0
    for b in range(4):
        y, x = divmod(int(score[b, 0].argmax()), 8)
        cx, cy = (x + float(offset[b, 0, y, x])) / 8, (y + float(offset[b, 1, y, x])) / 8
        w, h = float(size[b, 0, y, x]), float(size[b, 1, y, x])
        p, (tx, ty, tw, th) = (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2), boxes[b].tolist()
        t = (tx, ty, min(1, tx + tw), min(1, ty + th))
        inter = max(0, min(p[2], t[2]) - max(p[0], t[0])) * max(0, min(p[3], t[3]) - max(p[1], t[1]))
        union = w * h + (t[2] - t[0]) * (t[3] - t[1]) - inter
        hull = (max(p[2], t[2]) - min(p[0], t[0])) * (max(p[3], t[3]) - min(p[1], t[1]))
        giou += (1 - inter / union + (hull - union) / hull) / 4
        l1 += sum(abs(a - c) for a, c in zip(p, t)) / 16
        for y in range(8):
            for x in range(8):
                s, g = float(score[b, 0, y, x]), float(target[b, y, x])
                focal -= (1 - s) ** 2 * math.log(s) if g == 1 else (1 - g) ** 4 * s ** 2 * math.log(1 - s)
                ones += g == 1
    assert abs(float(got["giou"]) - giou) < 1e-4 and abs(float(got["l1"]) - l1) < 1e-5
    assert abs(float(got["focal"]) - focal / ones) < 1e-3 and ones == 4
    assert abs(float(got["loss"]) - (focal / ones + 2 * giou + 5 * l1)) < 1e-3


@pytest.mark.parametrize("box", [[0.5, 0.5, 0.0, 0.0], [0.2, 0.2, 0.3, 0.0], [1.5, 2.0, 0.2, 0.2], [-3, -3, 0.1, 0.1]])
def test_degenerate_boxes_give_finite_losses(box):
    maps = [torch.randn(2, c, 8, 8, requires_grad=True) for c in (1, 2, 2)]
    score, size = (track.clamped_sigmoid(m) for m in maps[:2])
    losses = track.tracking_losses(score, size, maps[2], torch.tensor([box] * 2))
    losses["loss"].backward()
    assert all(v.isfinite() for v in losses.values()) and all(m.grad.isfinite().all() for m in maps)


def test_evaluation_by_hand():
    """Five frames: the first is the truth whatever was predicted, a shifted box, a zero-size box (the one before it),
    an absent target, a truth without size."""
    truth = np.array([[10, 10, 10, 10], [10, 10, 10, 10], [12, 10, 10, 10], [10, 10, 10, 10], [0, 0, 0, 0]], float)
    boxes = np.array([[90, 90, 5, 5], [15, 10, 10, 10], [0, 0, 0, 0], [10, 10, 10, 10], [0, 0, 10, 10]], float)
    success, precision, normed = track.score_sequence(boxes, truth, np.array([1, 1, 1, 0, 1], dtype=bool))
    ious = [1, 5 / 15, 7 / 13]    # the others fail at every threshold, 0 included
    assert np.allclose(success, [sum(i > t for i in ious) / 5 for t in np.arange(21) / 20])
    assert np.allclose(precision, [sum(e <= t for e in (0, 5, 3)) / 5 for t in range(51)])
    assert np.allclose(normed, [sum(e <= t + 1e-9 for e in (0, 0.5, 0.3)) / 5 for t in np.arange(51) / 100])


def test_pairs_are_causal_visible_and_close():
    rng, visible = np.random.default_rng(0), np.array([0, 1, 1, 0, 0, 1, 0, 0, 0, 0, 1, 0], dtype=bool)
    pairs = {track.sample_pair(rng, visible, 4) for _ in range(300)}
    assert pairs == {(1, 2), (1, 5), (2, 5)}
    assert track.sample_pair(rng, visible, 2) in {(1, 2)} and track.sample_pair(rng, np.array([True]), 9) == (0, 0)
    assert track.sample_pair(rng, np.zeros(5, dtype=bool), 9) is None
    sequence = track.make_sequence("x", [], np.array([[0, 0, 5, 5], [0, 0, 0, 5], [0, 0, np.nan, 5]], dtype=float))
    assert sequence.visible.tolist() == [True, False, False]


# ----------------------------------------------------------------------------------------------------------------------
# Data sets and runs
# ----------------------------------------------------------------------------------------------------------------------
def write_video(folder, boxes, name="{:08d}.jpg", first=1):
    folder.mkdir(parents=True)
    for i, (x, y, w, h) in enumerate(boxes):
        frame = np.full((48, 64, 3), 90, dtype=np.uint8)
        frame[y:y + h, x:x + w] = (230, 40, 60)
        Image.fromarray(frame).save(folder / name.format(i + first), quality=95, subsampling=0)


BOXES = [(5 + 2 * i, 8 + i, 14, 10) for i in range(8)]
LINES = "\n".join(",".join(map(str, b)) for b in BOXES)


def write_lasot(folder, nested, names=("airplane-1", "airplane-2")):
    for name in names:
        root = folder / name.split("-")[0] / name if nested else folder / name
        write_video(root / "img", BOXES)
        (root / "groundtruth.txt").write_text(LINES)
        (root / "full_occlusion.txt").write_text("0,0,0,1,0,0,0,0")
        (root / "out_of_view.txt").write_text("0,0,0,0,0,0,1,0")
    return folder


SMALL = ["--template-size", 32, "--search-size", 64, "--pairs", 8, "--val-pairs", 3, "--batch-size", 4, "--epochs", 2,
         "--eliminate-from", 0, "--eliminate-to", 2, "--workers", 0, "--log-every", 1, "--device", "cpu",
         "--eval-every", 1, "--head-channels", 32]


def start(*options):
    return track.main(track.parse_args([str(o) for o in options]))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tracker trained for four steps on a nested LaSOT of one training and one test sequence."""
    root = tmp_path_factory.mktemp("track")
    start("--data", f"lasot={write_lasot(root / 'lasot', nested=True)}", "--out", root / "out", *SMALL)
    return root


def test_lasot_test_list():
    assert len(set(track.LASOT_TEST)) == 280 and len({n.rsplit("-", 1)[0] for n in track.LASOT_TEST}) == 70


def test_every_data_set_is_read(tmp_path):
    write_lasot(tmp_path / "lasot", nested=False)
    got10k = tmp_path / "got10k" / "train" / "GOT-10k_Train_000001"
    write_video(got10k, BOXES)
    (got10k / "groundtruth.txt").write_text(LINES)
    (got10k / "absence.label").write_text("\n".join("00010000"))
    (got10k / "cover.label").write_text("\n".join("88880888"))
    write_video(tmp_path / "trackingnet" / "TRAIN_0" / "frames" / "abc", BOXES, "{}.jpg", first=0)
    (tmp_path / "trackingnet" / "TRAIN_0" / "anno").mkdir()
    (tmp_path / "trackingnet" / "TRAIN_0" / "anno" / "abc.txt").write_text(LINES)
    write_video(tmp_path / "coco" / "train2017", BOXES[:2], "{:012d}.jpg")
    (tmp_path / "coco" / "annotations").mkdir()
    things = [dict(image_id=image, bbox=box, iscrowd=crowd) for image, box, crowd in
              ((1, [5, 8, 14, 10], 0), (2, [7, 9, 14, 10], 0), (2, [7, 9, 14, 0], 0), (1, [0, 0, 60, 40], 1))]
    (tmp_path / "coco" / "annotations" / "instances_train2017.json").write_text(json.dumps({"annotations": things}))
    text = ",".join(f"{name}={tmp_path / name}" for name in ("lasot", "got10k", "trackingnet", "coco"))
    args = track.parse_args([str(o) for o in ("--data", text, "--data-weights", 1, 2, 1, 3, *SMALL)])
    sets = track.open_sets(text)
    assert {k: len(v) for k, v in sets.items()} == {"lasot": 1, "got10k": 1, "trackingnet": 1, "coco": 2}
    assert sets["lasot"][0].name == "airplane-2" and sets["lasot"][0].visible.tolist() == [1, 1, 1, 0, 1, 1, 0, 1]
    assert sets["got10k"][0].visible.tolist() == [1, 1, 1, 0, 0, 1, 1, 1]    # absent in one frame, covered in another
    pairs, held, _ = track.make_data(args)
    names = set()
    for index in range(40):
        template, search, box, name = pairs[0, index]
        assert template.shape == (3, 32, 32) and search.shape == (3, 64, 64) and template.dtype == torch.uint8
        assert (box[2:] > 0).all() and (0 < box[:2] + box[2:] / 2).all() and (box[:2] + box[2:] / 2 < 1).all()
        names.add(name.split()[0])
    assert len(names) >= 4
    item, again, next_epoch = pairs[0, 7], pairs[0, 7], pairs[1, 7]
    assert all(torch.equal(a, b) for a, b in zip(item[:3], again[:3])) and not torch.equal(item[1], next_epoch[1])


def test_boxes_of_pairs_are_where_the_target_is(trained):
    """The red rectangle of the search crop, jittered, mirrored and relit, fills its box."""
    args = track.parse_args(["--data", f"lasot={trained / 'lasot'}", *map(str, SMALL)])
    pairs, errors = track.make_data(args)[0], []
    for index in range(60):
        _, search, box, _ = pairs[0, index]
        red = search[0].int() - search[1].int()
        if red.max() > 100 and (box[:2] > 0.05).all() and (box[:2] + box[2:] < 0.95).all():    # not grey, not cut off
            ys, xs = (red > red.max() / 2).nonzero().T
            found = torch.tensor([xs.min(), ys.min(), xs.max() + 1 - xs.min(), ys.max() + 1 - ys.min()]).float()
            centres = [b[:2] + b[2:] / 2 for b in (found, 64 * box)]
            errors.append(torch.cat([centres[0] - centres[1], found[2:] - 64 * box[2:]]))
    errors = torch.stack(errors)    # in crop pixels; whole-pixel corners blur them, but nothing may shift them
    assert len(errors) > 20 and errors.abs().max() < 2.5
    assert (errors.mean(dim=0) - torch.tensor([0.5, 0.5, 0, 0])).abs().max() < 0.35    # pixel 0 is centred on 0


def test_evaluates_and_tracks(trained, tmp_path, capsys):
    """The same tracker on both layouts gives the same scores; its text files score the same, with tabs, too."""
    flat, best = write_lasot(tmp_path / "flat", nested=False), trained / "out" / "best.pt"
    common = ["--checkpoint", best, "--device", "cpu", "--allow-partial"]
    lines = []
    for name, folder in (("a", trained / "lasot"), ("b", flat)):
        start("--eval", f"lasot={folder}", "--out", tmp_path / name, *common)
        said = capsys.readouterr().out
        assert "evaluated 1/280" in said and "PARTIAL" in said
        lines.append(next(line for line in said.splitlines() if line.startswith("AUC")))
    results = tmp_path / "tabs"
    results.mkdir()
    text = (tmp_path / "a" / "results" / "airplane-1.txt").read_text()
    assert len(text.splitlines()) == 8 and text.startswith("5.00,8.00,14.00,10.00")
    (results / "airplane-1.txt").write_text(text.replace(",", "\t"))
    start("--eval", f"lasot={flat}", "--results", results, "--out", tmp_path / "c", *common)
    lines.append(next(line for line in capsys.readouterr().out.splitlines() if line.startswith("AUC")))
    assert lines[0] == lines[1] == lines[2]
    assert {"sequences.csv", "curves.csv", "curves.png"} <= {p.name for p in (tmp_path / "c").iterdir()}
    with pytest.raises(models.InputError, match="279 of 280 sequences are missing"):
        start("--eval", f"lasot={flat}", "--results", results, "--out", tmp_path / "c")
    (results / "airplane-1.txt").write_text(text.replace("\n", ",0.9\n"))
    with pytest.raises(models.InputError, match="does not hold 4 number"):    # not five columns read as four
        start("--eval", f"lasot={flat}", "--results", results, "--out", tmp_path / "c", "--allow-partial")
    (results / "airplane-1.txt").write_text("\n".join(text.splitlines()[:7]))
    with pytest.raises(models.InputError, match="has 7 boxes, the sequence 8 frames"):
        start("--eval", f"lasot={flat}", "--results", results, "--out", tmp_path / "c", "--allow-partial")

    frames = flat / "airplane-1" / "img"
    start("--frames", frames, "--init", "5,8,14,10", "--out", tmp_path / "mine", *common[:4])
    assert (tmp_path / "mine" / "boxes.txt").read_text() == text    # the same tracker on the same frames
    picture = Image.open(tmp_path / "mine" / "overlay.gif")
    assert picture.n_frames > 1 and (255, 32, 32) in {color for _, color in picture.convert("RGB").getcolors(10 ** 6)} and "real time" in capsys.readouterr().out
    images = [Image.open(p) for p in sorted(frames.iterdir())]
    images[0].save(tmp_path / "video.gif", save_all=True, append_images=images[1:])
    start("--frames", tmp_path / "video.gif", "--init", "5,8,14,10", "--out", tmp_path / "gif", "--int", *common[:4])
    numbers = (tmp_path / "gif" / "boxes.txt").read_text().replace(",", " ").split()
    assert len(numbers) == 32 and all(n.isdigit() for n in numbers)


def test_checkpoint_is_plain_and_an_encoder(trained):
    state = torch.load(trained / "out" / "last.pt", weights_only=True)
    assert {"model", "optimizer", "scaler", "step", "arch", "mean", "std", "args"} <= set(state)
    groups = state["optimizer"]["param_groups"]
    assert {(g["lr_scale"], round(g["lr"], 9)) for g in groups} == {(0.1, 4e-5), (1.0, 4e-4)}
    encoder, saved = models.MODELS["vit_tiny"](), torch.load(trained / "out" / "best.pt", weights_only=True)["model"]
    models.load_encoder(encoder, trained / "out" / "best.pt")
    assert torch.equal(encoder.blocks[3].attn.qkv.weight, saved["encoder.blocks.3.attn.qkv.weight"])
    lines = [json.loads(line) for line in open(trained / "out" / "log.jsonl")]
    assert {"loss", "focal", "giou", "l1", "iou", "lr", "grad_norm", "img_s", "data_share"} <= set(lines[1])
    assert lines[-1]["val_pairs"] == 3


def test_two_processes(trained, tmp_path):
    """torchrun trains, and evaluates to the same numbers as one process."""
    data, best = f"lasot={trained / 'lasot'}", trained / "out" / "best.pt"
    run("track.py", "--data", data, "--out", tmp_path / "two", *SMALL, "--max-steps", 2, torchrun=2)
    assert torch.load(tmp_path / "two" / "last.pt", weights_only=True)["step"] == 2
    three = write_lasot(tmp_path / "three", True, ("airplane-1", "bear-2", "zebra-10"))
    options = ["--eval", f"lasot={three}", "--checkpoint", best, "--device", "cpu", "--allow-partial"]
    run("track.py", *options, "--out", tmp_path / "e2", torchrun=2)
    start(*options, "--out", tmp_path / "e1")
    for name in ("sequences.csv", "curves.csv"):
        assert (tmp_path / "e1" / name).read_text() == (tmp_path / "e2" / name).read_text()


def test_killed_run_resumes_bit_for_bit(trained, tmp_path):
    command = [sys.executable, "track.py", "--data", f"lasot={trained / 'lasot'}", "--out", tmp_path, *SMALL]
    process = subprocess.Popen([str(c) for c in command], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 60
    while not (tmp_path / "last.pt").exists() and time.time() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] == 2, "killed too late for this test"
    start("--data", f"lasot={trained / 'lasot'}", "--out", tmp_path, *SMALL)
    ours, straight = (torch.load(p / "last.pt", weights_only=True) for p in (tmp_path, trained / "out"))
    assert ours["step"] == straight["step"] == 4 and ours["best"] == straight["best"]
    assert all(torch.equal(ours["model"][k], v) for k, v in straight["model"].items())
    (tmp_path / "best.pt").unlink()    # as if the run had been stopped before its last validation
    torch.save({**ours, "best": -1.0}, tmp_path / "last.pt")
    start("--data", f"lasot={trained / 'lasot'}", "--out", tmp_path, *SMALL)
    best = torch.load(tmp_path / "best.pt", weights_only=True)["best"]
    assert best == pytest.approx(track.read_log(tmp_path / "log.jsonl")[-1]["val_iou"], abs=1e-4)


def test_encoder_hand_over(tmp_path):
    """An encoder of another image and patch size, as pre-training writes it, starts a tracker; a Hiera is refused."""
    encoder = models.MODELS["vit_tiny"](img_size=48, patch_size=8)
    common = dict(arch=encoder.arch, mean=[0.5] * 3, std=[0.2] * 3)
    torch.save({"model": encoder.state_dict(), **common}, tmp_path / "e.pt")
    args = track.parse_args(["--init", str(tmp_path / "e.pt"), "--template-size", "32", "--search-size", "64"])
    args.blocks, args.eliminate_blocks = 4, [2, 3]
    tracker, mean, std = track.build_tracker(args)
    assert len(tracker.encoder.blocks) == tracker.arch["depth"] == 4
    assert mean == [0.5] * 3 and std == [0.2] * 3 and (tracker.template_side, tracker.search_side) == (4, 8)
    assert torch.equal(tracker.encoder.blocks[2].mlp.fc1.weight, encoder.blocks[2].mlp.fc1.weight)
    torch.save({"model": models.MODELS["deit_tiny"]().state_dict()}, tmp_path / "deit.pth")    # does not tell its heads
    heads = [track.build_tracker(track.parse_args(["--init", str(tmp_path / "deit.pth"), *more]))[0].arch["num_heads"]
             for more in ([], ["--model", "deit_tiny"])]
    assert heads == [12, 3]
    hiera = models.MODELS["hiera_tiny"](q_pool=2)
    torch.save({"model": hiera.state_dict(), "arch": hiera.arch}, tmp_path / "h.pt")
    with pytest.raises(models.InputError, match="plain ViT"):
        track.build_tracker(track.parse_args(["--init", str(tmp_path / "h.pt")]))


def test_benchmark_prints_both_speeds(trained, capsys):
    args = track.parse_args(["--checkpoint", str(trained / "out" / "best.pt"), "--device", "cpu"])
    track.benchmark(args, seconds=0.2)
    said = capsys.readouterr().out
    assert all(word in said for word in ("model only", "end to end", "threads", "float32", "warm-up"))


def test_bad_input_is_told_in_one_sentence(trained, tmp_path):
    data, best = f"lasot={trained / 'lasot'}", trained / "out" / "best.pt"
    frames = trained / "lasot" / "airplane" / "airplane-1" / "img"
    (tmp_path / "empty").mkdir()
    encoder = models.MODELS["vit_tiny"]()
    torch.save({"model": encoder.state_dict(), "arch": encoder.arch}, tmp_path / "encoder.pt")
    broken = write_lasot(tmp_path / "broken", nested=False)
    (broken / "airplane-2" / "img" / "00000008.jpg").unlink()
    for options, message in (
            (["--data", f"lasot={tmp_path / 'empty'}"], "holds no training sequence"),
            (["--data", "imagenet=x"], "data sets are lasot"),
            (["--data", "nonsense"], "NAME=FOLDER"),
            (["--data", f"{data},{data}"], "each name once"),
            (["--data", data, "--blocks", 13], "the encoder has 12"),
            (["--data", data, "--log-every", 0], "--log-every 0 must be at least 1"),
            (["--data", data, "--drop-path", 1], "must lie in"),
            (["--data", f"lasot={broken}"], "lacks its frame"),
            (["--data", data, "--data-weights", 1, 2], "shares"),
            (["--data", data, "--init", tmp_path / "no.pt"], "does not exist"),
            (["--data", data, "--search-size", 250], "multiples of the patch size"),
            (["--eval", f"lasot={tmp_path / 'empty'}", "--checkpoint", best], "none of the 280"),
            (["--eval", "otb=x", "--checkpoint", best], "lasot=FOLDER"),
            (["--eval", "shapes", "--checkpoint", tmp_path / "encoder.pt"], "is no tracker"),
            (["--eval", "shapes"], "does not exist"),
            (["--results", tmp_path], "--eval"),
            (["--frames", frames, "--checkpoint", best], "needs --init x,y,w,h"),
            (["--frames", frames, "--checkpoint", best, "--init", "1,2,3"], "needs --init x,y,w,h"),
            (["--frames", frames, "--checkpoint", best, "--init", "10,10,0,5"], "has no area inside the frame"),
            (["--frames", frames, "--checkpoint", best, "--init", "900,10,20,5"], "has no area inside the frame"),
            (["--frames", frames, "--checkpoint", best, "--init", "1,1,inf,5"], "has no area inside the frame"),
            (["--frames", frames, "--checkpoint", best, "--init", "0,0,1e5,1e5"], "has no area inside the frame"),
            (["--frames", frames, "--checkpoint", best, "--init", "1,2,3,4", "--fps", 0], "--fps"),
            (["--frames", tmp_path / "empty", "--checkpoint", best, "--init", "1,2,3,4"], "neither a folder with")):
        with pytest.raises(models.InputError, match=message):
            start("--out", tmp_path / "out", "--device", "cpu", *options)
    done = run("track.py", "--data", "nonsense", "--device", "cpu", check=False)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and "Traceback" not in done.stderr
