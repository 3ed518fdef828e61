"""track.py: golden numbers, losses and metrics against loops, data layouts, runs, bad input."""
import argparse
import json
import math
import multiprocessing
import os
import pickle
import re
import runpy
import shutil
import sys
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import (ROOT, check_kill_and_resume, here, rel_error, run, seed_weights,
                      seeded, state_of)
from PIL import Image
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.ops import box_convert, generalized_box_iou_loss

import benchmark
import toy
import track
from models import (Block, InputError, VisionTransformer, build_model, load_encoder, normalize,
                    read_log)

BOXES = [(5 + i, 8 + i // 2, 14, 10) for i in range(24)]    # of a red rectangle on grey
LINES = "\n".join(",".join(map(str, box)) for box in BOXES)
SMALL = ["--model", "vit_pico", "--template-size", 32, "--search-size", 64, "--pairs", 8,
         "--batch-size", 4, "--epochs", 2, "--log-every", 1, "--workers", 0, "--device", "cpu"]
USE = ["--device", "cpu", "--workers", 0]


def write_video(folder, boxes=BOXES, name="{:08d}.jpg", first=1):
    folder.mkdir(parents=True)
    for i, (x, y, w, h) in enumerate(boxes):
        frame = np.full((48, 64, 3), 90, dtype=np.uint8)
        frame[y:y + h, x:x + w] = (230, 40, 60)
        Image.fromarray(frame).save(folder / name.format(i + first), quality=95, subsampling=0)


def write_lasot(folder, nested=True, names=("airplane-1", "airplane-2")):
    for name in names:
        root = folder / name.split("-")[0] / name if nested else folder / name
        write_video(root / "img")
        (root / "groundtruth.txt").write_text(LINES)
        (root / "full_occlusion.txt").write_text(",".join("000100000000000000000000"))
        (root / "out_of_view.txt").write_text(",".join("000000100000000000000000"))
    return folder


def small_tracker(**options):
    """Template 2 x 2 and search 8 x 8 tokens, batch norms away from their initial state."""
    torch.manual_seed(1)
    encoder = VisionTransformer(img_size=64, patch_size=8, embed_dim=48, depth=3, num_heads=3)
    encoder.mean, encoder.std = (0.5,) * 3, (0.25,) * 3
    tracker = track.Tracker(encoder, template_size=16, search_size=64, eliminate_blocks=(2,),
                            head_channels=64, **options)
    for module in tracker.head.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.05, 0.2)
    return tracker.eval()


@pytest.fixture(scope="module", autouse=True)
def few_pairs_to_evaluate():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(track.RECIPE, "val_pairs", 16)
        yield


def one_pass(tracker):
    return track.OnePassTracker(tracker, torch.device("cpu"))


def save_encoder(path, model, **more):
    torch.save(dict(model=model.state_dict(), arch=model.arch, **more), path)
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tracker trained for four steps on a LaSOT of one training and one test sequence."""
    root = tmp_path_factory.mktemp("track")
    here(track, "--data", f"lasot={write_lasot(root / 'lasot')}", "--out", root / "out", *SMALL)
    return root


def test_a_tracker_follows_a_box_through_frames():
    tracker = one_pass(small_tracker())
    frames = torch.randint(256, (3, 3, 90, 120), dtype=torch.uint8)
    tracker.start(frames[0], (40, 30, 20, 16))
    for frame in frames[1:]:
        box, score = tracker.step(frame)
        assert box.shape == (4,) and 0 < score < 1


# ---- golden numbers ------------------------------------------------------------------------------
def public_name(name):
    """Names of the head's parameters -> OSTrack's, by which the golden weights are seeded."""
    branch, layer, kind = name.split(".")
    branch = {"score": "ctr"}.get(branch, branch)
    number, part = divmod(int(layer), 3)
    return f"conv5_{branch}.{kind}" if number == 4 else f"conv{number + 1}_{branch}.{part}.{kind}"


@pytest.fixture(scope="module")
def golden_tracker():
    tracker = track.Tracker(seed_weights(build_model("vit_tiny"), "track.backbone."))
    seed_weights(tracker.head, "track.head.", public_name)
    return tracker.eval()


@torch.no_grad()
def test_position_tables_match_golden(golden, golden_tracker):
    encoder = golden_tracker.encoder
    assert rel_error(encoder.template_pos_embed[0, ::9, :8], golden["track/pos_embed_z"]) < 1e-4
    assert rel_error(encoder.search_pos_embed[0, ::37, :8], golden["track/pos_embed_x"]) < 1e-4


@pytest.mark.parametrize("name, keep_rate", [("full", 1.0), ("ce", 0.7)])
@torch.no_grad()
def test_model_matches_golden(golden, golden_tracker, name, keep_rate):
    template = seeded((2, 3, 128, 128), "template")
    search = seeded((2, 3, 256, 256), "search")
    tokens = golden_tracker.embed_template(template)
    features = golden_tracker.forward_features(tokens, search, keep_rate)
    rows = [0, 63, 64, 100, 200, 319]
    assert rel_error(features[:, rows, :16], golden[f"track/{name}/feat"]) < 1e-4
    mean = float(golden[f"track/{name}/feat_abs_mean"])
    assert abs(features.abs().mean() / mean - 1) < 1e-4
    score, size, offset = golden_tracker(template, search, keep_rate)
    assert rel_error(score[:, 0, ::5, ::5], golden[f"track/{name}/score"]) < 1e-4
    assert rel_error(size[:, :, ::5, ::5], golden[f"track/{name}/size"]) < 1e-4
    assert rel_error(offset[:, :, ::5, ::5], golden[f"track/{name}/offset"]) < 1e-4
    boxes = track.decode(score, size, offset)
    assert rel_error(boxes, golden[f"track/{name}/bbox_cxcywh"]) < 1e-4
    gone = features[:, 64:].abs().sum(dim=2) == 0
    removed = golden["track/ce/removed"].sum() if name == "ce" else 0
    assert gone.sum(dim=1).tolist() == [removed] * 2


@torch.no_grad()
def test_first_elimination_matches_golden(golden, golden_tracker, monkeypatch):
    monkeypatch.setitem(golden_tracker.options, "eliminate_blocks", (4,))
    tokens = golden_tracker.embed_template(seeded((2, 3, 128, 128), "template"))
    search = seeded((2, 3, 256, 256), "search")
    features = golden_tracker.forward_features(tokens, search, 0.7)
    gone = features[:, 64:].abs().sum(dim=2) == 0
    gone = [row.nonzero()[:, 0].numpy() for row in gone]
    assert np.array_equal(gone, golden["track/ce/removed_first"])


def test_losses_match_golden(golden):
    boxes = torch.from_numpy(golden["track/heatmap_boxes_xywh"])
    target = track.gaussian_target(boxes, 16)
    assert rel_error(target, golden["track/heatmap"]) < 1e-5
    score = track.clamped_sigmoid(seeded((3, 1, 16, 16), "focal"))
    loss = track.focal_loss(score, target[:, None])
    assert rel_error(loss, golden["track/focal_loss"]) < 1e-5


def test_hann_window_matches_golden(golden):
    window = track.hann_window(16)
    assert rel_error(window[:3], golden["track/hann16"]) < 1e-4
    assert torch.allclose(window, window.flip(0)) and torch.allclose(window, window.t())
    assert window.argmax() // 16 in (7, 8) and window.min() > 0


def test_keep_rate_matches_golden(golden):
    rates = [track.keep_rate_at(int(epoch)) for epoch in golden["track/keep_rate_epochs"]]
    assert np.allclose(rates, golden["track/keep_rate"], atol=1e-6)


def test_crops_match_golden(golden):
    """Side, corner and box of a crop; the corner is read off pixels that hold their position."""
    x = torch.arange(400).expand(300, -1)
    y = torch.arange(300)[:, None].expand(-1, 400)
    frame = torch.stack([x % 256, x // 256, y % 256]).to(torch.uint8)
    keys = ("box_xywh", "gt_xywh", "side", "x1y1", "gt_in_crop")
    for box, truth, side, corner, inside in zip(*(golden[f"track/crop_{key}"] for key in keys)):
        crop, got, _ = track.crop_square(frame, box, 4, int(side))    # not resized
        assert got == side
        x, y = (10 - min(v, 0) for v in corner)                    # a pixel inside the image
        assert crop[0, y, x] + 256 * int(crop[1, y, x]) == corner[0] + x
        assert crop[2, y, x] == (corner[1] + y) % 256
        _, _, origin = track.crop_square(frame, box, 4, 256)
        assert rel_error((truth - origin) / side, inside) < 1e-4


def test_evaluation_matches_golden(golden):
    curves = [track.score_sequence(*(golden[f"track_eval/{key}{i}"]
                                     for key in ("pred", "gt", "visible"))) for i in range(3)]
    success, precision, normed = (torch.stack(c).mean(dim=0) for c in zip(*curves))
    assert abs(success.mean() - float(golden["track_eval/auc"])) < 1e-6
    assert abs(precision[20] - float(golden["track_eval/precision20"])) < 1e-6
    assert abs(normed[20] - float(golden["track_eval/norm_precision20"])) < 1e-6


# ---- elimination, head, following ----------------------------------------------------------------
@torch.no_grad()
def test_elimination_keeps_what_full_attention_keeps():
    """A reference with the whole attention map: same tokens kept, same values."""
    torch.manual_seed(0)
    block = seed_weights(Block(192, 12), "block.")
    x = torch.randn(3, 16 + 36, 192)
    ids = torch.rand(3, 80).argsort(dim=1)[:, :16 + 36]
    got, kept = track.block_with_elimination(block, x, ids, 16, 11, centre=5)
    attention = block.attn.logits(block.norm1(x)).softmax(dim=-1)
    full = block(x)
    for b in range(3):
        order = attention[b, :, 5, 16:].mean(dim=0).argsort(descending=True)[:11]
        assert torch.equal(kept[b, :16], ids[b, :16])
        assert set(kept[b, 16:].tolist()) == set(ids[b, 16 + order].tolist())
        rows = {int(i): full[b, n] for n, i in enumerate(ids[b])}
        assert rel_error(got[b], torch.stack([rows[int(i)] for i in kept[b]])) < 1e-5


def test_elimination_ranks_in_float32_under_autocast():
    """Logits of about 1000 that differ by 1: bfloat16 cannot tell them apart."""
    block = Block(16, 1)
    nn.init.zeros_(block.attn.qkv.weight)
    q, k, _ = block.attn.qkv.weight.data.view(3, 16, 16)
    q[0, 0] = k[0, 0] = 1
    block.norm1 = nn.Identity()
    x = torch.zeros(1, 1 + 8, 16)
    x[0, 0, 0] = 4
    x[0, 1:, 0] = torch.tensor([992., 996, 1000, 1004, 1008, 1012, 1016, 1020])
    ids = torch.arange(9)[None]
    with torch.autocast("cpu", torch.bfloat16):
        _, kept = track.block_with_elimination(block, x, ids, 1, 2, centre=0)
    assert sorted(kept[0].tolist()) == [0, 7, 8]


class Network(nn.Module):
    """What a deployed tracker computes for a frame, without elimination and with it."""

    def __init__(self, tracker):
        super().__init__()
        self.tracker = tracker

    def forward(self, template, search):
        boxes = [track.decode(*self.tracker(template, search, rate)) for rate in (1, 0.7)]
        return torch.stack(boxes)


@torch.no_grad()
def test_the_network_is_exported_for_any_batch():
    network = Network(small_tracker())
    batch = torch.export.Dim("batch")
    crops = torch.randn(5, 3, 16, 16), torch.randn(5, 3, 64, 64)
    exported = torch.export.export(network, tuple(x[:2] for x in crops),
                                   dynamic_shapes=({0: batch}, {0: batch})).module()
    for size in (1, 2, 5):
        inputs = [x[:size] for x in crops]
        plain, reduced = network(*inputs)
        assert rel_error(exported(*inputs), torch.stack([plain, reduced])) < 1e-5
        assert (plain - reduced).abs().max() > 1e-4


class PeaksAt(nn.Module):
    """A stub head: score 0.9 in the cells (x, y), size (0.3, 0.2), offset (0.25, 0.5)."""

    def __init__(self, *cells):
        super().__init__()
        self.cells = cells

    def forward(self, x):
        score = torch.full((1, 1, 8, 8), 0.1)
        for column, row in self.cells:
            score[0, 0, row, column] = 0.9
        size = torch.tensor([0.3, 0.2]).view(1, 2, 1, 1).expand(-1, -1, 8, 8)
        offset = torch.tensor([0.25, 0.5]).view(1, 2, 1, 1).expand(-1, -1, 8, 8)
        return score, size, offset


def test_a_peak_becomes_a_box_of_the_frame():
    tracker = one_pass(small_tracker())
    frame = torch.zeros(3, 100, 120, dtype=torch.uint8)
    tracker.start(frame, (40, 30, 20, 20))    # centre 50, 40; search side 4 * 20
    tracker.model.head = PeaksAt((5, 3))
    box, score = tracker.step(frame)
    middle = 63 / 128    # of a crop of 64 pixels, whose centres are whole numbers
    x = 50 + 80 * (5.25 / 8 - middle)
    y = 40 + 80 * (3.5 / 8 - middle)
    assert np.allclose(box, [x - 12, y - 8, 24, 16], atol=1e-4)
    assert score == pytest.approx(0.9 * float(track.hann_window(8)[3, 5]), abs=1e-5)


def test_the_window_prefers_the_middle():
    tracker = one_pass(small_tracker())
    frame = torch.zeros(3, 100, 120, dtype=torch.uint8)
    tracker.start(frame, (40, 30, 20, 20))
    tracker.model.head = PeaksAt((0, 0), (4, 4), (7, 7))
    box, _ = tracker.step(frame)
    x = 50 + 80 * (4.25 / 8 - 63 / 128)
    assert box[0] + box[2] / 2 == pytest.approx(x, abs=1e-4)


@pytest.mark.parametrize("box, clipped", [
    ([20, 30, 40, 25], [20, 30, 40, 25]),       # inside: as it is
    ([-50, 30, 40, 25], [0, 30, 10, 25]),       # beyond the left: 10 pixels remain
    ([150, 90, 40, 25], [110, 70, 10, 10]),     # beyond the lower right corner of 120 x 80
    ([20, 30, 3, 4], [20, 30, 10, 10]),         # smaller than the margin
    ([-20, -10, 400, 300], [0, 0, 120, 80])])   # larger than the frame
def test_boxes_are_clipped_with_a_margin(box, clipped):
    assert track.clip_box(np.array(box, dtype=float), 80, 120).tolist() == clipped


@pytest.mark.parametrize("around", [[50, 40, 20, 10], [-8, -6, 30, 30], [110, 80, 25, 18],
                                    [2, 80, 9, 40]])
def test_what_training_maps_into_a_crop_tracking_maps_out_of_it(around, monkeypatch):
    """To the pixel, at the borders of the frame, too. The head is right about a box."""
    tracker = one_pass(small_tracker())
    frame = torch.zeros(3, 90, 120, dtype=torch.uint8)
    tracker.start(frame, np.array(around, dtype=float))
    rng = np.random.default_rng(0)
    for _ in range(20):
        middle = np.array(around[:2]) + rng.normal(0, 10, 2)
        box = track.clip_box(np.concatenate([middle, rng.uniform(10, 40, 2)]), 90, 120)
        tracker.box = np.array(around, dtype=float)
        _, side, origin = track.crop_square(frame, tracker.box, *tracker.model.crops["search"])
        monkeypatch.setattr(tracker, "locate", lambda search: ((box - origin) / side, 0.5))
        assert np.abs(tracker.step(frame)[0] - box).max() < 1e-4


def test_a_bright_rectangle_is_where_its_box_says():
    """Half a pixel of rounding and half a pixel of convention aside."""
    frame = torch.zeros(3, 90, 120, dtype=torch.uint8)
    frame[:, 30:50, 70:110] = 255
    around = np.array([60.0, 20, 60, 45])
    crop, side, origin = track.crop_square(frame, around, 2, 256)
    y, x = (crop[0] > 127).nonzero().numpy().T
    found = np.array([x.min(), y.min(), np.ptp(x) + 1, np.ptp(y) + 1])
    box = 256 * (np.array([70.0, 30, 40, 20]) - origin) / side
    assert np.abs(found - box).max() < 0.5 * 256 / side + 1.5


def test_crops_outside_the_frame_are_black():
    frame = torch.full((3, 90, 120), 255, dtype=torch.uint8)
    crop, *_ = track.crop_square(frame, np.array([500.0, 500, 10, 10]), 4, 64)
    assert crop.shape == (3, 64, 64) and (crop == 0).all()
    for box in ([-50, -50, 3, 3], [-50, 40, 3, 3], [40, -50, 3, 3], [200, 40, 3, 3]):
        assert (track.crop_square(frame, np.array(box), 4, 64)[0] == 0).all()
    crop, *_ = track.crop_square(frame, np.array([-8.0, -6, 30, 30]), 4, 64)
    assert (crop[:, :10, :10] == 0).all() and (crop[:, -10:, -10:] == 255).all()


# ---- losses and metrics --------------------------------------------------------------------------
def box_losses_by_hand(pred, truth):
    """IoU, GIoU loss and L1 loss of a box (centre x, y, w, h) against a true one (x, y, w, h)."""
    cx, cy, w, h = pred
    p = (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2)
    t = (truth[0], truth[1], min(1, truth[0] + truth[2]), min(1, truth[1] + truth[3]))
    inter = (max(0, min(p[2], t[2]) - max(p[0], t[0]))
             * max(0, min(p[3], t[3]) - max(p[1], t[1])))
    union = w * h + (t[2] - t[0]) * (t[3] - t[1]) - inter
    hull = (max(p[2], t[2]) - min(p[0], t[0])) * (max(p[3], t[3]) - min(p[1], t[1]))
    giou = 1 - inter / union + (hull - union) / hull
    return inter / union, giou, sum(abs(a - c) for a, c in zip(p, t)) / 4


def test_losses_against_loops():
    torch.manual_seed(0)
    score = track.clamped_sigmoid(torch.randn(4, 1, 8, 8))
    size = torch.rand(4, 2, 8, 8)
    offset = torch.rand(4, 2, 8, 8)
    boxes = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.5, 0.5, 0.2, 0.1], [0.0, 0.0, 1.0, 1.0],
                          [0.3, 0.6, 0.05, 0.6]])    # the last reaches out of the crop
    losses = track.tracking_losses(score, size, offset, boxes)
    target = track.gaussian_target(boxes, 8)
    iou = giou = l1 = focal = 0.0
    for b in range(4):
        y, x = divmod(int(score[b, 0].argmax()), 8)
        centre = ((x + float(offset[b, 0, y, x])) / 8, (y + float(offset[b, 1, y, x])) / 8)
        pred = (*centre, *size[b, :, y, x].tolist())
        one_iou, one_giou, one_l1 = box_losses_by_hand(pred, boxes[b].tolist())
        iou += one_iou / 4
        giou += one_giou / 4
        l1 += one_l1 / 4
        for s, g in zip(score[b].flatten().tolist(), target[b].flatten().tolist()):
            if g == 1:
                focal -= (1 - s) ** 2 * math.log(s)
            else:
                focal -= (1 - g) ** 4 * s ** 2 * math.log(1 - s)
    focal /= 4    # ones in the target
    assert abs(float(losses["iou"]) - iou) < 1e-5
    assert abs(float(losses["giou"]) - giou) < 1e-4
    assert abs(float(losses["l1"]) - l1) < 1e-5
    assert abs(float(losses["focal"]) - focal) < 1e-3
    assert abs(float(losses["loss"]) - (focal + 2 * giou + 5 * l1)) < 1e-3


@pytest.mark.parametrize("box", [[0.5, 0.5, 0, 0], [0.2, 0.2, 0.3, 0], [1.5, 2.0, 0.2, 0.2],
                                 [-3, -3, 0.1, 0.1]])
def test_degenerate_boxes_give_finite_losses(box):
    maps = [torch.randn(2, c, 8, 8, requires_grad=True) for c in (1, 2, 2)]
    score, size = (track.clamped_sigmoid(m) for m in maps[:2])
    losses = track.tracking_losses(score, size, maps[2], torch.tensor([box] * 2))
    losses["loss"].backward()
    assert all(value.isfinite() for value in losses.values())
    assert all(m.grad.isfinite().all() for m in maps)


def test_giou_and_its_gradient_are_those_of_torchvisions_loss():
    torch.manual_seed(0)
    score = torch.rand(200, 1, 8, 8)
    size = torch.rand(200, 2, 8, 8) * 0.5 + 0.01
    offset = torch.rand(200, 2, 8, 8)
    corners = torch.rand(200, 2)
    boxes = torch.cat([corners, (1 - corners) * torch.rand(200, 2).clamp(min=0.1)], dim=1)
    truth = box_convert(boxes, "xywh", "xyxy")
    results = []
    for ours in (True, False):
        maps = [size.clone().requires_grad_(), offset.clone().requires_grad_()]
        pred = box_convert(track.decode(score, *maps), "cxcywh", "xyxy")
        loss = generalized_box_iou_loss(pred, truth)
        assert (loss > 1).any()    # some do not overlap
        loss = track.tracking_losses(score, *maps, boxes)["giou"] if ours else loss.mean()
        results.append([loss.detach(), *torch.autograd.grad(loss, maps)])
    assert all(rel_error(got, want) < 1e-4 for got, want in zip(*results))


class Operators(TorchDispatchMode):
    """Collects what makes the host wait for a GPU: values and sizes that depend on data."""
    WAIT = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique")

    def __init__(self):
        super().__init__()
        self.waits = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masks = [x for x in args[1] if x is not None and x.dtype == torch.bool] if (
            name.startswith("index") and isinstance(args[1], (list, tuple))) else []
        if masks or name.strip("_").startswith(self.WAIT) or name in self.WAIT:
            self.waits.append(name)
        return func(*args, **(kwargs or {}))


def test_a_step_makes_no_gpu_wait():
    model = small_tracker().train()
    template, search = torch.randn(2, 3, 16, 16), torch.randn(2, 3, 64, 64)
    boxes = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.5, 0.5, 0.2, 0.1]])
    with Operators() as operators:
        losses = track.tracking_losses(*model(template, search, 0.7), boxes)
        losses["loss"].backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    assert operators.waits == []
    with Operators() as operators:    # the guard sees torchvision's
        x = torch.rand(2, 4, requires_grad=True)
        generalized_box_iou_loss(x, boxes).mean().backward()
    assert operators.waits


def test_evaluation_by_hand():
    """Five frames: the first is the truth whatever was predicted, a shifted box, a box without size
    (the one before it), an absent target, a truth without size."""
    truth = [[10, 10, 10, 10], [10, 10, 10, 10], [12, 10, 10, 10], [10, 10, 10, 10], [0, 0, 0, 0]]
    boxes = [[90, 90, 5, 5], [15, 10, 10, 10], [0, 0, 0, 0], [10, 10, 10, 10], [0, 0, 10, 10]]
    visible = np.array([1, 1, 1, 0, 1], dtype=bool)
    boxes, truth = np.array(boxes, float), np.array(truth, float)
    success, precision, normed = track.score_sequence(boxes, truth, visible)
    ious = [1, 5 / 15, 7 / 13]    # the others fail at every threshold, 0 included
    assert np.allclose(success, [sum(i > t for i in ious) / 5 for t in np.arange(21) / 20])
    assert np.allclose(precision, [sum(e <= t for e in (0, 5, 3)) / 5 for t in range(51)])
    thresholds = np.arange(51) / 100 + 1e-9
    assert np.allclose(normed, [sum(e <= t for e in (0, 0.5, 0.3)) / 5 for t in thresholds])


# ---- data ----------------------------------------------------------------------------------------
def test_lasot_test_list():
    names = Path(__file__).with_name("lasot_test.txt").read_text().split()
    assert sorted(track.LASOT_TEST) == sorted(names) and len(set(names)) == 280


def test_pairs_are_causal_visible_and_close():
    rng = np.random.default_rng(0)
    visible = np.zeros(25, dtype=bool)
    visible[[1, 2, 5, 10, 24]] = True
    pairs = {track.sample_pair(rng, visible, 4) for _ in range(300)}
    assert pairs == {(1, 2), (1, 5), (2, 5)}
    assert track.sample_pair(rng, visible, 2) == (1, 2)
    assert track.sample_pair(rng, np.array([True]), 9) == (0, 0)


def test_short_and_rarely_visible_videos_are_left_out():
    rng = np.random.default_rng(0)
    assert track.sample_pair(rng, np.ones(19, dtype=bool), 9) is None
    assert track.sample_pair(rng, np.arange(25) < 4, 9) is None
    assert track.sample_pair(rng, np.arange(25) < 5, 9) is not None


def test_boxes_without_area_are_never_sampled(monkeypatch):
    """Frames 7 .. 29 have no width, no height or neither."""
    boxes = np.tile([4.0, 4, 5, 5], (30, 1))
    boxes[7:15, 2] = 0
    boxes[15:22, 3] = np.nan
    boxes[22:, 2:] = -1
    monkeypatch.setattr(track, "read_frame", lambda i, size: i)
    sets = [([0], lambda item: track.Sequence(range(30), boxes, np.ones(30, bool)))]
    pairs = pairs_of_sets(sets)
    for seed in range(40):
        frames, _ = pairs.read_pair(np.random.default_rng(seed))
        assert 0 <= frames[0] < frames[1] < 7


@pytest.fixture(scope="module")
def four_sets(tmp_path_factory):
    """--data of tiny copies of the four data sets, in their real layouts."""
    root = tmp_path_factory.mktemp("sets")
    write_lasot(root / "lasot", nested=False)
    got10k = root / "got10k" / "train" / "GOT-10k_Train_000001"
    write_video(got10k)
    (got10k / "groundtruth.txt").write_text(LINES)
    (got10k / "absence.label").write_text("\n".join("000100000000000000000000"))
    (got10k / "cover.label").write_text("\n".join("888808888888888888888888"))
    part = root / "trackingnet" / "TRAIN_0"
    write_video(part / "frames" / "abc", name="{}.jpg", first=0)
    (part / "anno").mkdir()
    (part / "anno" / "abc.txt").write_text(LINES)
    write_video(root / "coco" / "train2014", BOXES[:2], "COCO_train2014_{:012d}.jpg")
    images = [dict(id=i, file_name=f"COCO_train2014_{i:012d}.jpg", width=64, height=48)
              for i in (1, 2)]
    things = [dict(image_id=image, bbox=box, iscrowd=crowd)
              for image, box, crowd in ((1, BOXES[0], 0), (2, BOXES[1], 0), (2, (7, 9, 14, 0), 0),
                                        (1, (0, 0, 60, 40), 1))]
    (root / "coco" / "annotations").mkdir()
    (root / "coco" / "annotations" / "instances_train2014.json").write_text(
        json.dumps(dict(images=images, annotations=things)))
    return ",".join(f"{name}={root / name}" for name in ("lasot", "got10k", "trackingnet", "coco"))


@pytest.mark.parametrize("folder_of_images", ["coco", "coco/images"])    # the second: OSTrack's
def test_of_two_years_of_coco_the_later_is_read(folder_of_images, four_sets, tmp_path):
    old = Path(four_sets.split("coco=")[1])
    shutil.copytree(old, tmp_path / "coco")
    for file in (tmp_path / "coco/train2014").iterdir():
        new = tmp_path / folder_of_images / "train2017" / file.name.removeprefix("COCO_train2014_")
        new.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, new)
    folder = tmp_path / "coco/annotations"
    text = (folder / "instances_train2014.json").read_text().replace("COCO_train2014_", "")
    (folder / "instances_train2017.json").write_text(text)
    (items, read), = track.open_sets(f"coco={tmp_path / 'coco'}")
    frame, = read(items[0])[0]
    assert len(items) == 3 and frame.endswith("train2017/000000000001.jpg") and Path(frame).exists()


def pairs_of_sets(sets, seed=0):
    return track.Pairs(sets, 8, seed, (2.0, 32), (4.0, 64))


def pairs_of(data, seed=0):
    return pairs_of_sets(track.open_sets(data), seed)


def test_every_data_set_is_read(four_sets):
    sets = dict(zip(("lasot", "got10k", "trackingnet", "coco"), track.open_sets(four_sets)))
    counts = {name: len(items) for name, (items, _) in sets.items()}
    assert counts == {"lasot": 1, "got10k": 1, "trackingnet": 1, "coco": 3}
    hidden = {}
    for name, (items, read) in sets.items():
        frames, boxes, visible, size = read(items[0])
        assert track.read_frame(frames[-1]).shape == (3, 48, 64)
        assert size == ((64, 48) if name == "coco" else None)
        assert boxes[0].tolist() == [5, 8, 14, 10]
        hidden[name] = np.flatnonzero(np.logical_not(visible) & (boxes[:, 2] > 0)).tolist()
    assert hidden == {"lasot": [3, 6], "got10k": [3, 4], "trackingnet": [], "coco": []}
    assert "airplane-2" in str(sets["lasot"][0][0])    # airplane-1 is for testing


def test_own_videos_need_no_labels_and_hidden_folders_are_no_data(tmp_path):
    """GOT-10k's layout: DIR/train/NAME/{groundtruth.txt,00000001.jpg,...}."""
    for name in ("mine", ".ipynb_checkpoints"):
        write_video(tmp_path / "train" / name)
        (tmp_path / "train" / name / "groundtruth.txt").write_text(LINES)
    (files, read), = track.open_sets(f"got10k={tmp_path}")
    assert [Path(file).parent.name for file in files] == ["mine"]
    frames, boxes, visible, _ = read(files[0])
    assert visible.all() and len(boxes) == 24 and Path(frames[-1]).exists()
    pairs_of(f"got10k={tmp_path}")[0, 0]


def test_pairs_come_from_all_sets(four_sets, monkeypatch):
    pairs = pairs_of(four_sets)
    names = []
    open_image = track.open_image
    monkeypatch.setattr(track, "open_image", lambda file: names.append(file) or open_image(file))
    for index in range(40):
        template, search, box = pairs[0, index]
        assert template.shape == (3, 32, 32) and search.shape == (3, 64, 64)
        assert template.dtype == search.dtype == torch.uint8
        centre = box[:2] + box[2:] / 2
        assert (box[2:] > 0).all() and (centre > 0).all() and (centre < 1).all()
    assert len(names) == 80
    parts = ("lasot/", "got10k/", "trackingnet/", "coco/")
    assert {part for part in parts for name in names if part in name} == set(parts)


def test_pairs_depend_on_seed_epoch_and_index_alone(four_sets):
    pairs = pairs_of(four_sets)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    item, again, next_epoch = pairs[0, 7], pairs[0, 7], pairs[1, 7]
    assert all(torch.equal(a, b) for a, b in zip(item, again))
    assert not torch.equal(item[1], next_epoch[1])
    assert not torch.equal(item[1], pairs_of(four_sets, seed=1)[0, 7][1])
    assert torch.equal(before, torch.get_rng_state())    # the process's generator is left alone
    with pytest.raises(TypeError, match="cannot unpack"):
        pairs[7]


def test_boxes_of_pairs_are_where_the_target_is(trained):
    """The red rectangle of the search crop, jittered, mirrored and relit, fills its box."""
    pairs = pairs_of(f"lasot={trained / 'lasot'}")
    errors = []
    for index in range(60):
        _, search, box = pairs[0, index]
        red = search[0].int() - search[1].int()
        cut_off = (box[:2] < 0.05).any() or (box[:2] + box[2:] > 0.95).any()
        if red.max() > 100 and not cut_off:    # not grey
            y, x = (red > red.max() / 2).nonzero().T.float()
            extent = torch.stack([x.max() + 1 - x.min(), y.max() + 1 - y.min()])
            centre = torch.stack([x.min(), y.min()]) + extent / 2
            shift = centre - 64 * (box[:2] + box[2:] / 2)
            errors.append(torch.cat([shift, extent - 64 * box[2:]]))
    errors = torch.stack(errors)    # corners are whole pixels: blurred, but nothing may shift them
    assert len(errors) > 20 and errors.abs().max() < 2.5
    bias = errors.mean(dim=0) - torch.tensor([0.5, 0.5, 0, 0])    # pixel 0 is centred on 0
    assert bias.abs().max() < 0.35


def test_a_missing_frame_stops_training(tmp_path):
    folder = write_lasot(tmp_path / "lasot", names=("airplane-2",))
    for i in range(1, 24):
        (folder / "airplane" / "airplane-2" / "img" / f"{i:08}.jpg").unlink()
    options = ["--data", f"lasot={folder}", "--out", tmp_path / "out", *SMALL]
    with pytest.raises(OSError, match="cannot read image .*airplane-2/img/.*.jpg.*tools/check.py"):
        here(track, *options)


def test_a_sequence_without_its_labels_is_named(tmp_path):
    folder = write_lasot(tmp_path / "lasot", names=("airplane-2",))
    file = folder / "airplane" / "airplane-2" / "out_of_view.txt"
    for text in ("0,0,0", "0", "0 0\n" * 24):
        file.write_text(text)
        with pytest.raises(OSError, match="airplane-2/out_of_view.txt is no .* text of 1 numbers"):
            pairs_of(f"lasot={folder}")[0, 0]
    file.unlink()
    with pytest.raises(OSError, match="airplane-2/out_of_view.txt is no .*No such file"):
        pairs_of(f"lasot={folder}")[0, 0]


def test_sequences_without_a_pair_are_told(tmp_path):
    folder = write_lasot(tmp_path / "lasot", names=("airplane-2",))
    (folder / "airplane" / "airplane-2" / "out_of_view.txt").write_text(",".join("1" * 24))
    with pytest.raises(OSError, match="none of 100 sequences drawn from --data has 20 frames"):
        pairs_of(f"lasot={folder}")[0, 0]


def test_a_byte_order_mark_is_no_number_and_utf_16_is_told(tmp_path):
    file = tmp_path / "groundtruth.txt"
    file.write_text(LINES, "utf-8-sig")
    assert track.read_numbers(file)[0].tolist() == list(BOXES[0])
    file.write_text(LINES.splitlines()[0])    # a video of one frame
    assert track.read_numbers(file).tolist() == [list(BOXES[0])]
    file.write_text(LINES, "utf-16")
    with pytest.raises(OSError, match="groundtruth.txt is no UTF-8 text of 4 numbers per frame"):
        track.read_numbers(file)


# ---- COCO ----------------------------------------------------------------------------------------
def write_coco(folder, images, annotations):
    (folder / "annotations").mkdir(parents=True)
    (folder / "train2017").mkdir()
    content = json.dumps(dict(images=images, annotations=annotations))
    (folder / "annotations" / "instances_train2017.json").write_text(content)
    return f"coco={folder}"


@pytest.mark.parametrize("upright", [False, True])
def test_boxes_of_a_turned_photograph_fit_the_frame(upright, tmp_path):
    """The stored pixels are 60 x 40 and EXIF turns them to 40 x 60. Some tools box the stored
    pixels, others the upright ones, and COCO's width and height tell which."""
    stored = Image.new("RGB", (60, 40), (90, 90, 90))
    stored.paste((230, 40, 60), (4, 6, 24, 16))
    exif = Image.Exif()
    exif[0x0112] = 6    # turn by 90 degrees, clockwise
    box = (40 - 16, 4, 10, 20) if upright else (4, 6, 20, 10)
    w, h = (40, 60) if upright else (60, 40)
    data = write_coco(tmp_path / "coco", [dict(id=7, file_name="a.jpg", width=w, height=h)],
                      [dict(image_id=7, bbox=box)])
    stored.save(tmp_path / "coco/train2017/a.jpg", quality=95, subsampling=0, exif=exif)
    (items, read), = track.open_sets(data)
    frames, boxes, _, size = read(items[0])
    frame = track.read_frame(frames[0], size)
    x, y, w, h = boxes[0].astype(int)
    assert frame.shape[1:] == (60, 40) if upright else (40, 60)
    inside = frame[:, y + 2:y + h - 2, x + 2:x + w - 2].float()
    assert inside[0].mean() > 200 and inside[1].mean() < 80
    template, search, box = pairs_of(data)[0, 0]
    assert (template[0].int() - template[1].int()).max() > 100    # it holds the target


def test_annotations_without_box_or_image_are_skipped_and_counted(tmp_path, capsys):
    images = [dict(id=7, file_name="a.jpg", width=60, height=40)]
    things = [dict(image_id=7, bbox=[1, 2, 3, 4]), dict(image_id=7), dict(image_id=7, bbox=[]),
              dict(image_id=7, bbox=None), dict(image_id=8, bbox=[1, 2, 3, 4]),
              dict(image_id=7, bbox=[1, 2, 0, 4]), dict(image_id=7, bbox=[1, 2, 3]),
              dict(image_id=7, bbox=[0, 0, 9, 9], iscrowd=1)]
    (items, read), = track.open_sets(write_coco(tmp_path / "coco", images, things))
    found = [read(item) for item in items]
    assert [one.boxes.tolist() for one in found] == [[[1, 2, 3, 4]], [[1, 2, 0, 4]]]
    assert found[0].frames == [str(tmp_path / "coco/train2017/a.jpg")]
    assert found[0].size == (60, 40) and found[0].visible.tolist() == [True]
    assert "5 of 7 annotations skipped" in capsys.readouterr().out
    with pytest.raises(InputError, match="coco has no training sequence"):
        track.open_sets(write_coco(tmp_path / "none", images, things[1:5]))


@pytest.mark.parametrize("text", [
    "[1, 2]", "{}", "no json", '{"images": [1], "annotations": []}',
    '{"images": [], "annotations": [{"bbox": [1, 2, 3, 4]}]}',
    '{"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": 1, "bbox": '
    '[1, 2, null, 4]}]}'])
def test_another_json_is_no_annotation_of_coco(text, tmp_path):
    data = write_coco(tmp_path / "coco", [], [])
    (tmp_path / "coco/annotations/instances_train2017.json").write_text(text)
    with pytest.raises(InputError, match="instances_train2017.json is no annotation file of COCO"):
        track.open_sets(data)


def test_loader_processes_get_lists_in_shared_memory(four_sets, tmp_path):
    """20,000 names and boxes take no room in what is handed to a process that is not forked."""
    images = [dict(id=i, file_name=f"{i:012}.jpg") for i in range(10_000)]
    things = [dict(image_id=i % 10_000, bbox=[1, 2, 3, 4]) for i in range(20_000)]
    data = write_coco(tmp_path / "coco", images, things)
    pairs = pairs_of(f"{four_sets.split(',coco')[0]},{data}")
    assert len(pairs.sets[3][0]) == 20_000 and len(pickle.dumps(pairs)) > 1_000_000
    assert len(ForkingPickler.dumps(pairs)) < 10_000


def test_pairs_are_the_same_in_processes_that_are_not_forked(four_sets):
    pairs = pairs_of(four_sets)
    handed_over = pickle.loads(ForkingPickler.dumps(pairs))
    for index in range(16):
        assert all(torch.equal(a, b) for a, b in zip(pairs[0, index], handed_over[0, index]))


# ---- training ------------------------------------------------------------------------------------
def test_checkpoint_is_plain_and_an_encoder(trained):
    state = state_of(trained / "out" / "last.pt")
    assert {"model", "optimizer", "scaler", "epoch", "arch", "mean", "std", "args"} <= set(state)
    encoder = build_model("vit_pico")
    load_encoder(encoder, trained / "out" / "last.pt")
    saved = state["model"]["encoder.blocks.3.attn.qkv.weight"]
    assert torch.equal(encoder.blocks[3].attn.qkv.weight, saved)
    final = state_of(trained / "out" / "tracker.pt")
    assert {"model", "epoch", "arch", "mean", "std", "args"} == set(final)
    assert all(torch.equal(w, state["model"][name]) for name, w in final["model"].items())


def test_log_has_every_loss_and_fixed_pairs_are_evaluated(trained, tmp_path, capsys):
    first, *lines = read_log(trained / "out" / "log.jsonl")
    assert first["args"]["pairs"] == 8 and [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    assert {"epoch", "loss", "focal", "giou", "l1", "iou", "lr", "grad_norm", "keep_rate"} <= set(
        lines[0])
    assert lines[-1].keys() == {"epoch", "step", "val_loss", "val_iou"}
    here(track, "--data", f"lasot={trained / 'lasot'}", *SMALL, "--eval-every", 1, "--lr", 0,
         "--epochs", 3, "--out", tmp_path)
    values = [line["val_loss"] for line in read_log(tmp_path / "log.jsonl") if "val_loss" in line]
    assert len(values) == 3    # the same pairs: only the batch norms' statistics have changed
    assert "epoch 3: IoU 0." in capsys.readouterr().out


def test_rates_drop_and_elimination_begins_at_their_epochs(trained, tmp_path, monkeypatch):
    """Ten epochs of one step; OSTrack counts epochs from 1 in its schedule of the keep rate."""
    given = []
    forward = track.Tracker.forward

    def noting(self, template, search, keep_rate):
        given.append(keep_rate)
        return forward(self, template, search, keep_rate)

    monkeypatch.setattr(track.Tracker, "forward", noting)
    here(track, "--data", f"lasot={trained / 'lasot'}", *SMALL, "--out", tmp_path, "--pairs", 4,
         "--epochs", 10, "--encoder-lr", 0.5)
    groups = state_of(tmp_path / "last.pt")["optimizer"]["param_groups"]
    rates = {(group["lr_scale"], round(group["lr"], 9)) for group in groups}
    assert rates == {(0.5, 2e-5), (1.0, 4e-5)}
    lines = [line for line in read_log(tmp_path / "log.jsonl") if "loss" in line]
    assert np.allclose([line["lr"] for line in lines], [4e-4] * 8 + [4e-5] * 2)
    keep_rates = [track.keep_rate_at(epoch, 0.7, 0, 3) for epoch in range(1, 11)]
    assert given[:10] == keep_rates == [line["keep_rate"] for line in lines]


def test_crops_are_multiples_of_the_patch():
    encoder = build_model("vit_pico", img_size=28, patch_size=14)
    with pytest.raises(InputError, match="crops of 128 pixels .* patch size 14"):
        track.Tracker(encoder)


def test_options_reach_the_model(trained):
    args = track.parse_args(["--model", "vit_pico", "--head-channels", "64", "--drop-path", "0.2",
                             "--template-size", "32", "--search-size", "64", "--keep-rate", "0.5"])
    model = track.build_tracker(args)
    assert model.head.score[0].out_channels == 64 and model.options["keep_rate"] == 0.5
    assert model.encoder.blocks[-1].drop_path.p == pytest.approx(0.2)
    assert model.encoder.template_pos_embed.shape[1] == 4 and model.search_side == 4


def test_killed_run_resumes_bit_for_bit(trained, tmp_path):
    options = ["--data", f"lasot={trained / 'lasot'}", *SMALL[:-4], "--device", "cpu",
               "--pairs", 16, "--epochs", 4]
    script = tmp_path / "script.py"    # with as few pairs to evaluate as in this process
    script.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport track\n"
                      "if __name__ == '__main__':\n    track.RECIPE['val_pairs'] = 16\n"
                      "    track.main(track.parse_args())\n")
    module = SimpleNamespace(__file__=str(script), main=track.main, parse_args=track.parse_args)
    check_kill_and_resume(module, options, tmp_path, lambda values: values.get("step", 0) >= 9)


def test_remedies_may_change_on_resume_but_not_the_method(trained, tmp_path, capsys):
    shutil.copytree(trained / "out", tmp_path, dirs_exist_ok=True)
    options = ["--data", f"lasot={trained / 'lasot'}", *SMALL, "--out", tmp_path]
    before = state_of(tmp_path / "last.pt")
    with pytest.raises(InputError, match="keep_rate is now 0.5, was 0.7"):
        here(track, *options, "--keep-rate", 0.5)
    other = write_lasot(tmp_path / "lasot", names=("airplane-2", "bear-1"))
    with pytest.raises(InputError, match=r"sequences is now \[2\], was \[1\]"):
        here(track, *options, "--data", f"lasot={other}")
    with pytest.raises(InputError, match="would overwrite"):
        here(track, *options, "--init", tmp_path / "last.pt", "--no-resume")
    capsys.readouterr()
    here(track, *options, "--lr", 1e-4, "--clip-grad", 1, "--accum-steps", 2)    # is finished
    out = capsys.readouterr().out
    assert "lr is now 0.0001, was 0.0004" in out and re.search(r"(\d+) of \1 epochs are finished", out)
    after = state_of(tmp_path / "last.pt")
    assert all(torch.equal(w, after["model"][name]) for name, w in before["model"].items())


@pytest.fixture(scope="module")
def two_processes(trained, tmp_path_factory):
    """One start of torchrun that trains, evaluates, and evaluates what process 1 cannot read."""
    root = tmp_path_factory.mktemp("two")
    write_lasot(root / "three", names=("airplane-1", "bear-2", "zebra-10"))
    write_lasot(root / "broken", names=("airplane-1", "bear-2"))
    (root / "broken" / "bear" / "bear-2" / "img" / "00000009.jpg").unlink()
    evaluation = ["--eval", "--init", trained / "out" / "last.pt", *USE]
    runs = dict(train=["--data", f"lasot={trained / 'lasot'}", *SMALL, "--batch-size", 2,
                       "--drop-path", 0],
                three=[*evaluation, "--data", f"lasot={root / 'three'}"],
                broken=[*evaluation, "--data", f"lasot={root / 'broken'}"])
    runs = {name: [str(option) for option in options] for name, options in runs.items()}
    lines = ["import sys", f"sys.path.insert(0, {str(ROOT)!r})", "import track",
             "track.RECIPE['val_pairs'] = 16"]
    lines += ["import torch.distributed as dist", "from models import plain_errors",
              "init = dist.init_process_group",    # all runs in one group
              "dist.init_process_group = lambda *a, **b: dist.is_initialized() or init(*a, **b)",
              "with plain_errors():"]
    for name, options in runs.items():
        options = [*options, "--out", str(root / f"{name}-two")]
        lines.append(f"    track.main(track.parse_args({options}))")
    (root / "script.py").write_text("\n".join(lines))
    return root, runs, run(root / "script.py", torchrun=2, check=False)


def test_two_processes_train_as_one_with_accumulation(two_processes):
    """One pair a process and micro-step, so that batch norms see the same; without drop path, whose
    random numbers belong to a process."""
    root, runs, _ = two_processes
    here(track, *runs["train"], "--out", root / "train-one", "--accum-steps", 2)
    one, two = (state_of(root / f"train-{name}" / "last.pt") for name in ("one", "two"))
    assert one["epoch"] == two["epoch"] == 2
    for name, weight in one["model"].items():
        if "running" not in name and "num_batches" not in name:    # process 0 sees half of them
            assert (weight - two["model"][name]).abs().max() < 2e-5, name
    logs = [read_log(root / f"train-{name}" / "log.jsonl")[1:] for name in ("one", "two")]
    losses = [[line["loss"] for line in log if "loss" in line] for log in logs]
    assert np.allclose(*losses, rtol=1e-4) and len(losses[0]) == 8    # those of the whole batch


def test_two_processes_log_the_evaluation_of_the_tracker_that_they_save(two_processes):
    """Each process has its own batch statistics, and those of process 0 are saved."""
    root, runs, _ = two_processes
    [logged] = [line for line in read_log(root / "train-two" / "log.jsonl") if "val_iou" in line]
    model = track.load_tracker(root / "train-two" / "tracker.pt", torch.device("cpu")).model
    args = track.parse_args(runs["train"])
    _, val_loader = track.build_loaders(args, model, (0, 1, torch.device("cpu"), torch.float32))
    val_set = val_loader.dataset
    template, search, boxes = map(torch.stack, zip(*(val_set[0, k] for k in range(16))))
    template, search = (normalize(x, model.mean, model.std) for x in (template, search))
    with torch.no_grad():
        losses = track.tracking_losses(*model(template, search, args.keep_rate), boxes)
    assert logged["val_iou"] == pytest.approx(losses["iou"].item(), rel=1e-5)
    assert logged["val_loss"] == pytest.approx(losses["loss"].item(), rel=1e-5)


def test_trains_in_bfloat16_on_the_cpu(trained, tmp_path):
    here(track, "--data", f"lasot={trained / 'lasot'}", *SMALL, "--out", tmp_path, "--dtype",
         "bf16")
    assert math.isfinite(read_log(tmp_path / "log.jsonl")[-1]["val_loss"])


@pytest.mark.parametrize("epoch", [1, 2])
def test_a_loss_that_is_not_finite_ends_the_run_with_a_good_checkpoint(epoch, trained, tmp_path,
                                                                       monkeypatch):
    focal_loss = track.focal_loss
    calls = []

    def broken(score, target):    # two steps an epoch
        calls.append(0)
        return focal_loss(score, target) * (math.nan if len(calls) == 2 * epoch - 1 else 1)

    monkeypatch.setattr(track, "focal_loss", broken)
    with pytest.raises(FloatingPointError, match=f"the loss in epoch {epoch} is not finite .nan"):
        here(track, "--data", f"lasot={trained / 'lasot'}", "--out", tmp_path, *SMALL)
    assert (tmp_path / "last.pt").exists() == (epoch == 2)
    if epoch == 2:
        state = state_of(tmp_path / "last.pt")
        assert state["epoch"] == 1 and all(w.isfinite().all() for w in state["model"].values())


def test_encoder_of_another_size_starts_a_tracker(tmp_path):
    encoder = build_model("vit_pico", img_size=48, patch_size=8)
    save_encoder(tmp_path / "e.pt", encoder, mean=[0.5] * 3, std=[0.2] * 3)
    args = track.parse_args(["--init", f"{tmp_path}/e.pt", "--template-size", "32",
                             "--search-size", "64", "--std", "0.25", "0.25", "0.25"])
    tracker = track.build_tracker(args)
    assert tracker.mean == (0.5,) * 3 and tracker.std == (0.25,) * 3
    assert tracker.arch["embed_dim"] == 48
    assert (tracker.encoder.template_pos_embed.shape[1], tracker.search_side) == (16, 8)
    assert torch.equal(tracker.encoder.blocks[2].mlp.fc1.weight, encoder.blocks[2].mlp.fc1.weight)


def test_heads_of_a_file_that_does_not_store_them(tmp_path):
    torch.save(build_model("deit_tiny").state_dict(), tmp_path / "deit.pth")
    for options, heads in (([], 12), (["--model", "deit_tiny"], 3)):
        args = track.parse_args(["--init", f"{tmp_path}/deit.pth", *options])
        assert track.build_tracker(args).arch["num_heads"] == heads


# ---- use -----------------------------------------------------------------------------------------
def score_line(capsys):
    """The scores and what they count, without the folder of the boxes."""
    lines = capsys.readouterr().out.splitlines()
    return next(line.split("; boxes in")[0] for line in lines if line.startswith("AUC"))


def result_file(out):
    file, = out.glob("results/*/airplane-1.txt")
    return file


def test_both_layouts_of_lasot_score_the_same(trained, tmp_path, capsys):
    """And a sequence that lies there in both counts once."""
    write_lasot(tmp_path / "flat", nested=False)
    write_lasot(tmp_path / "both", nested=False)
    write_lasot(tmp_path / "both")
    lines = []
    for folder in (trained / "lasot", tmp_path / "flat", tmp_path / "both"):
        here(track, "--eval", "--data", f"lasot={folder}", "--init", trained / "out" / "last.pt",
             "--out", tmp_path / folder.name, *USE)
        lines.append(score_line(capsys))
    assert lines[0] == lines[1] == lines[2]
    assert lines[0].endswith(" PARTIAL, 1 of 280 sequences in float32")
    assert len(track.open_sets(f"lasot={tmp_path / 'both'}")[0][0]) == 1
    text = result_file(tmp_path / "flat").read_text()
    assert text.startswith("5.00,8.00,14.00,10.00\n") and len(text.splitlines()) == 24


def test_a_test_sequence_that_cannot_be_read_is_named(trained, tmp_path):
    data = write_lasot(tmp_path / "lasot", names=("airplane-1", "bear-2"))
    (data / "bear" / "bear-2" / "img" / "00000009.jpg").unlink()
    with pytest.raises(OSError, match="cannot read image .*bear-2/img/00000009.jpg"):
        here(track, "--eval", "--data", f"lasot={data}", "--init", trained / "out" / "tracker.pt",
             *USE, "--out", tmp_path)


def test_use_reads_tracker_pt_of_out_and_files_of_older_versions(trained, tmp_path, capsys):
    options = ["--eval", "--data", f"lasot={trained / 'lasot'}", *USE]
    lines = []
    shutil.copytree(trained / "out", tmp_path / "out")
    (tmp_path / "out" / "last.pt").unlink()
    here(track, *options, "--out", tmp_path / "out")
    lines.append(score_line(capsys))
    old = state_of(trained / "out" / "last.pt")
    old["arch"]["layer_scale"] = None
    torch.save(old, tmp_path / "old.pt")
    here(track, *options, "--out", tmp_path / "old", "--init", tmp_path / "old.pt")
    lines.append(score_line(capsys))
    assert lines[0] == lines[1]


class Frozen(argparse.Namespace):
    def __setattr__(self, name, value):
        raise AttributeError(f"args.{name} is written after resolve")


def test_options_are_read_only_once_they_are_resolved(trained, tmp_path, monkeypatch):
    def freeze(args):
        frozen = Frozen()
        vars(frozen).update(vars(resolve(args)))
        return frozen

    resolve = track.resolve
    monkeypatch.setattr(track, "resolve", freeze)
    data = ["--data", f"lasot={trained / 'lasot'}", "--out", tmp_path / "out"]
    here(track, *data, *SMALL, "--epochs", 1)
    here(track, *data, "--eval", *USE)
    here(track, *data, "--eval", "--results", result_file(tmp_path / "out").parent, *USE)
    here(track, *data, "--frames", trained / "lasot/airplane/airplane-1/img", "--box", *BOXES[0],
         *USE)
    with pytest.raises(AttributeError, match="args.seed is written after resolve"):
        freeze(track.parse_args([])).seed = 1


@pytest.mark.parametrize("separator", [",", "\t", " "])
def test_text_files_of_any_tracker_are_scored(trained, tmp_path, capsys, separator):
    (tmp_path / "airplane-1.txt").write_text(LINES.replace(",", separator))
    here(track, "--eval", "--data", f"lasot={trained / 'lasot'}", "--results", tmp_path,
         "--device", "cpu")
    right = 22 / 24    # two frames without the target fail; IoU > 1 never holds
    assert f"AUC {100 * right * 20 / 21:.1f}, P {100 * right:.1f}," in score_line(capsys)


@pytest.mark.parametrize("change, message", [
    (lambda lines: [line + ",0.9" for line in lines], "no UTF-8 text of 4 numbers"),
    (lambda lines: lines[:-1], r"text of 4 numbers per frame \(\(23, 4\), not \(24, 4\)\)"),
    (lambda lines: ["a,b,c,d"], "no UTF-8 text of 4 numbers")])
def test_broken_text_files_are_told(trained, tmp_path, change, message):
    (tmp_path / "airplane-1.txt").write_text("\n".join(change(LINES.splitlines())))
    with pytest.raises(OSError, match=message):
        here(track, "--eval", "--data", f"lasot={trained / 'lasot'}", "--results", tmp_path,
             "--device", "cpu")


@pytest.mark.parametrize("convert", [
    lambda x, y, w, h: (x, y, x + w, y + h), lambda x, y, w, h: (x + w / 2, y + h / 2, w, h),
    lambda x, y, w, h: (x + 40, y, w, h), lambda x, y, w, h: (x / 64, y / 48, w / 64, h / 48)])
def test_boxes_of_another_format_are_refused(convert, trained, tmp_path):
    """Line 1 of a result is the given box."""
    lines = [",".join(map(str, convert(*box))) for box in BOXES]
    (tmp_path / "airplane-1.txt").write_text("\n".join(lines))
    with pytest.raises(OSError, match="line 1 of .*airplane-1.txt is not the given box"):
        here(track, "--eval", "--data", f"lasot={trained / 'lasot'}", "--results", tmp_path,
             "--device", "cpu")


def test_two_evaluations_may_write_the_same_file_at_once(tmp_path, monkeypatch):
    write, save = track.write_boxes, np.savetxt

    def meanwhile(*args):
        save(*args)
        monkeypatch.setattr(np, "savetxt", save)
        other = multiprocessing.get_context("fork").Process(target=write, args=(tmp_path / "a.txt", [BOXES[0]]))
        other.start()
        other.join()

    monkeypatch.setattr(np, "savetxt", meanwhile)
    write(tmp_path / "a.txt", [BOXES[0]])
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("box", [(0, 0, 0, 0), (3, 4, 5, math.inf), (3, math.nan, 5, 6)])
def test_a_first_box_without_extent_is_refused(box):
    with pytest.raises(OSError, match="1.jpg: the first box .* has no extent: correct ground"):
        next(track.follow(None, ["1.jpg"], np.array(box), 0))


def test_only_what_is_missing_is_tracked_and_nothing_is_deleted(trained, tmp_path):
    """Results belong to the weights; those of others stay as they are."""
    options = ["--eval", "--data", f"lasot={trained / 'lasot'}", "--out", tmp_path, "--init",
               tmp_path / "a.pt", *USE]
    shutil.copy(trained / "out" / "last.pt", tmp_path / "a.pt")
    here(track, *options)
    file = result_file(tmp_path)
    file.write_text(LINES)
    here(track, *options)
    assert file.read_text() == LINES    # not tracked again
    state = state_of(tmp_path / "a.pt")
    state["model"]["head.score.0.bias"] += 1
    torch.save(state, tmp_path / "a.pt")
    here(track, *options)
    assert len(list(tmp_path.glob("results/*/airplane-1.txt"))) == 2 and file.read_text() == LINES


def test_two_processes_evaluate_to_the_same_numbers(two_processes, capsys):
    root, runs, done = two_processes
    here(track, *runs["three"], "--out", root / "three-one")
    lines = [line.split("; boxes in")[0] for line in done.stdout.splitlines() if line[:3] == "AUC"]
    assert lines == [score_line(capsys)]
    texts = [sorted((file.name, file.read_text()) for file in folder.glob("*.txt"))
             for name in ("one", "two") for folder in (root / f"three-{name}").glob("results/*")]
    assert texts[0] == texts[1] and len(texts[0]) == 3


def test_a_missing_frame_ends_every_process_in_one_sentence(two_processes):
    _, _, done = two_processes
    assert done.returncode != 0
    told = [line for line in done.stderr.splitlines() if "error: " in line and ".jpg" in line]
    assert len(told) == 1 and "cannot read image" in told[0] and "00000009.jpg" in told[0]


def test_the_benchmark_gives_both_speeds_and_what_they_depend_on():
    args = argparse.Namespace(device=torch.device("cpu"), rounds=1)
    benchmark.bench_fps(args, count=3, size=(320, 240))
    [row] = benchmark.RESULTS["tracking speed"]
    assert float(row["network_fps"]) > 0 and float(row["end_to_end_fps"]) > 0
    assert row["device"] == "cpu" and row["threads"] == 1 and row["dtype"] == "float32"
    assert row["warm_up"] == "3 frames"


def test_your_own_frames_give_boxes_and_an_overlay(trained, tmp_path, capsys, monkeypatch):
    write_video(tmp_path / "frames", BOXES[:12], "{}.jpg")
    for i in range(1, 13):    # 0.04, 0.08, 0.12, 0.16, 0.2 ... seconds
        name = f"{i / 25}.{'JPEG' if i % 3 else 'jpg'}"
        (tmp_path / "frames" / f"{i}.jpg").rename(tmp_path / "frames" / name)
    seen = []
    open_image = track.open_image
    monkeypatch.setattr(track, "open_image", lambda file: seen.append(file) or open_image(file))
    here(track, "--frames", tmp_path / "frames", "--box", ",".join(map(str, BOXES[0])), "--out",
         tmp_path / "mine", "--init", trained / "out" / "tracker.pt", *USE)
    assert [float(Path(file).stem) for file in seen[1:13]] == [i / 25 for i in range(1, 13)]
    assert "12 frames of 1 folder(s)" in capsys.readouterr().out
    boxes = (tmp_path / "mine" / "boxes.txt").read_text().splitlines()
    assert len(boxes) == 12 and boxes[0] == "5.00,8.00,14.00,10.00"
    picture = Image.open(tmp_path / "mine" / "overlay.gif")
    assert picture.n_frames > 1 and picture.size == (400, 300)
    red = np.asarray(picture.convert("RGB")).astype(int) @ [1, -1, -1]
    assert red.max() > 200


@pytest.mark.parametrize("size", [(4, 2000), (2000, 3)])
def test_narrow_frames_and_frames_of_different_sizes_are_drawn(size, tmp_path):
    files = [tmp_path / f"{i}.png" for i in range(2)]
    for file, (h, w) in zip(files, (size, (48, 64))):
        Image.fromarray(np.zeros((h, w, 3), dtype=np.uint8)).save(file)
    boxes = [track.clip_box(np.array([1.0, 1, 2, 2]), *shape) for shape in (size, (48, 64))]
    track.draw_overlay(tmp_path / "overlay.gif", files, boxes, [0.5, 0.5])
    picture = Image.open(tmp_path / "overlay.gif")
    assert max(picture.size) == 400 and picture.n_frames == 2


@pytest.mark.parametrize("count, still", [(10, True), (31, False), (151, False)])
def test_an_overlay_plays_as_long_as_the_video(count, still, tmp_path):
    """At 30 frames per second. GIF counts hundredths, and Pillow merges frames that are equal."""
    Image.new("RGB", (64, 48)).save(tmp_path / "0.png")
    boxes = [np.array([1.0, 1, 20, 20]) + (0 if still else i % 30) * np.array([1, 0, 0, 0])
             for i in range(count)]
    track.draw_overlay(tmp_path / "a.gif", [tmp_path / "0.png"] * count, boxes, [0.5] * count)
    picture = Image.open(tmp_path / "a.gif")
    seconds = 0
    for i in range(picture.n_frames):
        picture.seek(i)
        seconds += picture.info["duration"] / 1000
    step = 1 if count < 150 else 2
    assert picture.n_frames == (1 if still else math.ceil(count / step))
    assert seconds == pytest.approx(math.ceil(count / step) * step / 30, abs=0.0071 * step)


def test_folders_of_frames_are_counted(trained, tmp_path, capsys):
    write_video(tmp_path / "a", BOXES[:2])
    (tmp_path / "a" / "b").mkdir()
    Image.new("RGB", (80, 60)).save(tmp_path / "a" / "b" / "3.png")
    here(track, "--frames", tmp_path / "a", "--box", *BOXES[0], "--out", tmp_path / "mine",
         "--init", trained / "out" / "last.pt", *USE)
    assert "3 frames of 2 folder(s)" in capsys.readouterr().out


def test_what_a_run_wrote_is_no_frame(trained, tmp_path, monkeypatch, capsys):
    """Nothing below --out is read as a frame, nor is the overlay of a run with another --out."""
    write_video(tmp_path / "video", BOXES[:3])
    monkeypatch.chdir(tmp_path / "video")
    options = ["--frames", ".", "--box", *BOXES[0], "--init", trained / "out" / "tracker.pt", *USE]
    for out in ("own", "own", "other"):
        here(track, *options, "--out", out)
        assert "3 frames of 1 folder(s)" in capsys.readouterr().out
    with pytest.raises(InputError, match="--out"):
        here(track, *options, "--out", ".")


@pytest.mark.parametrize("names", [
    ["0.0.jpg", "0.04.jpg", "0.08.jpg", "0.1.jpg", "0.12.jpg", "9.96.jpg", "10.0.jpg"],    # seconds
    ["1.jpg", "2.jpeg", "3.jpg", "10.JPEG", "11.jpg", "100.jpg"],
    ["clip2/frame9.png", "clip2/frame10.png", "clip10/frame1.png"],
    ["00000001.jpg", "00000002.jpg", "00000010.jpg"], ["a.jpg", "b.jpg", "b1.jpg", "b2.jpg"]])
def test_numbers_in_names_of_frames_are_numbers(names):
    assert sorted(sorted(names), key=track.natural_order) == names


def test_own_frames_are_tracked_as_in_the_evaluation(trained):
    tracker = track.load_tracker(trained / "out" / "last.pt", torch.device("cpu"))
    frames = sorted((trained / "lasot" / "airplane" / "airplane-1" / "img").iterdir())
    followed = [box for box, _ in track.follow(tracker, frames, np.array(BOXES[0]), workers=2)]
    tracker.start(track.read_frame(frames[0]), np.array(BOXES[0]))
    stepped = [tracker.step(track.read_frame(frame))[0] for frame in frames[1:]]
    assert np.array_equal(followed[1:], stepped)


# ---- bad input -----------------------------------------------------------------------------------
@pytest.mark.parametrize("options, message", [
    (["--data", "lasot=EMPTY"], "lasot has no training sequence"),
    (["--data", "imagenet=x"], "give NAME=FOLDER"),
    (["--data", "nonsense"], "give NAME=FOLDER"),
    (["--data", "DATA", "--init", "no.pt"], "does not exist"),
    (["--data", "DATA", "--init", "HIERA"], "hiera.pt is not a vit model: choose another"),
    (["--data", "DATA", "--init", "CUT"], "pos_embed"),
    (["--data", "DATA", "--search-size", 250], "no multiple of the patch size 16"),
    (["--data", "coco=EMPTY,coco=EMPTY"], "each once"),
    (["--eval", "--data", "lasot=EMPTY", "--init", "BEST"], "none of LaSOT's 280 test sequences"),
    (["--eval", "--data", "coco=EMPTY", "--init", "BEST"], "none of LaSOT's 280 test sequences"),
    (["--eval", "--data", "DATA", "--init", "ENCODER"], "is no tracker"),
    (["--eval", "--data", "DATA"], "out/tracker.pt does not exist"),
    (["--eval", "--data", "DATA", "--results", "EMPTY"],
     "none of LaSOT's 280 test sequences is in --data .* and in .*empty"),
    (["--frames", "FRAMES"], "needs --box X Y W H"),
    (["--frames", "FRAMES", "--box", 10, 10, 0, 5], "needs --box X Y W H"),
    (["--frames", "FRAMES", "--box", 30, 10, 44, 24],
     "needs --box X Y W H within a frame of 64 x 48; .* give --box 30 10 14 14"),
    (["--frames", "FRAMES", "--box", 1, 1, "inf", 5], "needs --box X Y W H"),
    (["--frames", "FRAMES", "--box", 1, 2, 3], "needs --box X Y W H"),
    (["--frames", "VIDEO", "--box", 1, 2, 3, 4], "ffmpeg -i .*v.mp4 frames/%08d.jpg"),
    (["--frames", "EMPTY", "--box", 1, 2, 3, 4], "holds no image")])
def test_bad_input_is_told_in_one_sentence(options, message, trained, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "v.mp4").touch()
    encoder = build_model("vit_pico")
    save_encoder(tmp_path / "encoder.pt", encoder)
    if "HIERA" in options:
        save_encoder(tmp_path / "hiera.pt", build_model("hiera_tiny"))
    weights = encoder.state_dict()
    weights.pop("pos_embed")
    torch.save(weights, tmp_path / "cut.pt")
    places = dict(EMPTY=tmp_path / "empty", DATA=f"lasot={trained / 'lasot'}", CUT=tmp_path
                  / "cut.pt", ENCODER=tmp_path / "encoder.pt", HIERA=tmp_path / "hiera.pt",
                  VIDEO=tmp_path / "v.mp4", BEST=trained / "out" / "last.pt",
                  FRAMES=trained / "lasot" / "airplane" / "airplane-1" / "img")
    options = [str(option) for option in options]
    for word, place in places.items():
        options = [option.replace(word, str(place)) for option in options]
    with pytest.raises(InputError, match=message):
        here(track, "--out", tmp_path / "out", "--device", "cpu", *options)


@pytest.mark.parametrize("options, message", [
    (["--eval", "--keep-rate", "1"], "does not read --keep-rate"),
    (["--frames", "x", "--lr", "1"], "does not read --lr"),
    (["--eval", "--dtype", "bf16"], "does not read --dtype"),    # float32, as the authors'
])
def test_options_without_effect_are_refused(options, message, capsys):
    with pytest.raises(SystemExit):
        track.parse_args(options)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("options", [["--seed", "20000000000"], ["--search-size", "0"],
                                     ["--keep-rate", "0"], ["--batch-size", "0"],
                                     ["--clip-grad", "-1"]])
def test_numbers_out_of_range_are_refused(options, capsys):
    with pytest.raises(SystemExit):
        track.parse_args(options)
    assert options[0] in capsys.readouterr().err


def test_errors_are_printed_without_a_traceback(tmp_path, monkeypatch, capsys):
    options = ["--data", "nonsense", "--out", tmp_path, "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["track.py", *map(str, options)])
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "track.py"), run_name="__main__")
    assert stop.value.code == 1
    assert capsys.readouterr().err.startswith("error: --data nonsense: give NAME=FOLDER")


# ---- the toy world -------------------------------------------------------------------------------
def test_toy_videos_train_and_are_evaluated_as_the_demo_does(tmp_path, capsys):
    toy.write_videos(tmp_path / "videos", train=2, test=1)
    data = ["--data", f"lasot={tmp_path / 'videos'}", "--out", tmp_path / "out", *USE]
    here(track, *data, "--model", "vit_pico", "--template-size", 32, "--search-size", 64,
         "--head-channels", 64, "--keep-rate", 0.8, "--drop-path", 0, "--epochs", 1, "--pairs", 16,
         "--batch-size", 8, "--lr", 1e-3, "--encoder-lr", 0.5)
    here(track, "--eval", *data)
    assert score_line(capsys).endswith(" PARTIAL, 1 of 280 sequences in float32")
