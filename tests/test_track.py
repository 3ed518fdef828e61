"""Tests of track.py: golden numbers, losses and metrics against slow loops, crops, data layouts, evaluation, training runs."""
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
    curves = [track.score_sequence(*(golden[f"track_eval/{k}{i}"] for k in ("pred", "gt", "visible"))) for i in range(3)]
    success, precision, normed = (torch.stack(c).mean(dim=0) for c in zip(*curves))
    assert abs(success.mean() - float(golden["track_eval/auc"])) < 1e-6
    assert abs(precision[20] - float(golden["track_eval/precision20"])) < 1e-6
    assert abs(normed[20] - float(golden["track_eval/norm_precision20"])) < 1e-6
