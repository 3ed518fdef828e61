"""The README: its lines of code run, its counts are those of the code."""
import re

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from test_shape import closure_tokens

import models
from analyze import attention_statistics, minibatch_cka
from finetune import rand_augment
from models import Hiera, VisionTransformer, build_model, load_encoder, param_groups
from pretrain_d2mae import Distillation, MaskedAutoencoder, random_masking
from segment import SemanticFPN, sliding_logits
from track import OnePassTracker, Tracker, score_sequence

README = (ROOT / "README.md").read_text()
COPY = README.split("## Copy from here")[1].split("\n## ")[0]
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in COPY.splitlines()
        if line.startswith("| ") and "`" in line]
[BLOCK] = re.findall("```python\n(.*?)```", COPY, re.DOTALL)


class Levels(models.ImageDataset):
    def transform(self, image, index):
        return image.getpixel((0, 0))


@pytest.fixture
def names(tmp_path, monkeypatch):
    """What the lines of the table speak of, small."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    vit = build_model("vit_pico", img_size=64, patch_size=16)
    (tmp_path / "out/pretrain").mkdir(parents=True)
    torch.save({"model": vit.state_dict(), "arch": vit.arch}, "out/pretrain/encoder.pt")
    files = [tmp_path / f"{i}.png" for i in range(8)]
    for file in files:
        Image.new("RGB", (8, 8)).save(file)
    ids_keep, ids_masked = random_masking(torch.rand(2, 16), 0.75)
    encoder = build_model("vit_pico", img_size=64)
    frame = torch.randint(0, 256, (3, 60, 80), dtype=torch.uint8)
    boxes = np.array([[10.0, 10, 20, 20]] * 3)
    follower = Tracker(build_model("vit_pico"), template_size=32, search_size=64, head_channels=8)
    student = MaskedAutoencoder(vit, 8, distillation=Distillation(vit, vit))
    return dict(
        globals(), vit=vit, teacher=vit, student=student, images=torch.randn(2, 3, 64, 64),
        ids_keep=ids_keep, ids_masked=ids_masked, hiera=Hiera(64, embed_dim=8),
        dataset=Levels(files, 0), picture=Image.new("RGB", (20, 20)),
        segmenter=SemanticFPN(encoder, 5).eval(), image=torch.randn(3, 70, 90),
        tracker=OnePassTracker(follower, torch.device("cpu")), frame=frame, box=boxes[0],
        boxes=boxes, truth=boxes.copy(), visible=np.ones(3, bool),
        features_a=[torch.randn(8, 4, 5)], features_b=[torch.randn(8, 4, 6)])


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_a_line_of_the_table_runs(row, names):
    exec(row[3].split("`")[1], names)


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_the_table_counts_what_must_come_along(row):
    pieces = [piece.split(".") for piece in re.findall("`([^`]+)`", row[1])]
    module = pieces[0][0]
    stated = [int(number.replace(",", "")) for number in re.findall(r"\d[\d,]*\d", row[2])]
    for piece, number in zip(pieces, stated, strict=True):
        assert abs(closure_tokens(module, piece[-1]) - number) <= 50, piece


def test_the_block_of_code_runs(tmp_path, monkeypatch):
    timm = pytest.importorskip("timm")
    monkeypatch.chdir(tmp_path)
    for folder in ("out/pretrain", "out/finetune"):
        (tmp_path / folder).mkdir(parents=True)
    torch.manual_seed(0)
    encoder = build_model("vit_tiny")
    for file in ("out/pretrain/encoder.pt", "encoder.pt"):
        torch.save({"model": encoder.state_dict(), "arch": encoder.arch}, file)
    classifier = build_model("vit_tiny", num_classes=1000)
    torch.save({"model": classifier.state_dict()}, "out/finetune/classifier.pt")
    timm_vit = timm.create_model("vit_base_patch16_224", num_classes=0).eval()
    names = dict(globals(), timm=timm, timm_vit=timm_vit)
    lines = BLOCK.splitlines()
    own = [i for i, line in enumerate(lines) if "num_heads=12, num_classes=0" in line]
    exec("\n".join(lines[:own[0] + 1]), names)
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        tokens = names["vit"].eval().forward_features(images)
        assert torch.allclose(tokens, encoder.eval()(images), atol=1e-4)
        exec("\n".join(lines[own[0] + 1:]), names)
        assert torch.allclose(names["vit"](images), classifier.eval()(images), atol=1e-4)
        teacher = names["teacher"].eval()
        assert torch.allclose(teacher(images), timm_vit.forward_features(images), atol=1e-3)
        assert torch.allclose(names["exported"].module()(images), classifier(images), atol=1e-4)


def test_words():
    """A first read of 700 words, 3,060 in all, without the rules of tables and the citation."""
    plain = re.sub(r"```bibtex.*?```|[|]|-{3,}", " ", README, flags=re.DOTALL)
    first = plain.split("## How the scripts are alike")[0]
    assert len(first.split()) <= 700 and len(plain.split()) <= 3_060
