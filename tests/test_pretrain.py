"""Masking, decoders, distillation and the training run of pretrain_d2mae.py."""
import functools
import io
import os
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, rel_error, run, seed_weights, seeded
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

import pretrain_d2mae as P
from models import MODELS, Hiera, InputError, VisionTransformer, load_encoder
from pretrain_d2mae import HieraMaskedAutoencoder, MaskedAutoencoder, random_masking, teacher_signals

SCRIPT = ROOT / "pretrain_d2mae.py"
SMALL = dict(img_size=32, patch_size=8, embed_dim=24, depth=12, num_heads=3, fixed_pos_embed=True)
QUICK = ["--data", "shapes", "--image-size", 32, "--patch-size", 8, "--val-images", 8, "--workers", 0, "--device", "cpu"]


def public_name(name):
    """Names of the student's parameters -> those of the authors' checkpoints, by which the golden weights are seeded."""
    name = re.sub(r"^encoder\.", "", name)
    name = name.replace("extra_norm.", "blocks.12.norm1.").replace("extra_qk.", "blocks.12.attn.qkv.")
    return re.sub(r"^adapters\.\d+\.", "adapter.", name)


@torch.no_grad()
def seed_student(model, hidden=False):
    seed_weights(model, rename=public_name)
    if hasattr(model, "extra_qk"):    # q and k are the first two thirds of the authors' projection
        model.extra_qk.weight.copy_(0.05 * seeded((576, 192), "blocks.12.attn.qkv.weight")[:384])
        model.extra_qk.bias.copy_(0.05 * seeded((576,), "blocks.12.attn.qkv.bias")[:384])
    for adapter in model.adapters.values():
        shape = tuple(adapter.weight.shape)
        adapter.weight.copy_(0.05 * seeded(shape, "hidden_adapter.weight" if hidden else "attn_adapter.weight"))
    return model


def small_student(decoupled=False, teacher=None, **kwargs):
    torch.manual_seed(0)
    encoder = VisionTransformer(**SMALL)
    return MaskedAutoencoder(encoder, 8 if decoupled else 12, 24, 1, 3, teacher=teacher, layers=[12] if teacher else [],
                             decoupled=decoupled, **kwargs)


def small_hiera_student():
    torch.manual_seed(0)
    encoder = Hiera(img_size=96, embed_dim=8, num_heads=1, stages=(1, 1, 2, 1), q_pool=2)
    return HieraMaskedAutoencoder(encoder, 5, 24, 1, 3)


# ---- golden numbers -------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def vit_inputs():
    ids = random_masking(seeded((2, 196), "noise"), 0.75)
    return seeded((2, 3, 224, 224), "images"), *ids


@torch.no_grad()
def test_mae_matches_golden(golden, vit_inputs):
    images, ids_keep, ids_masked = vit_inputs
    model = seed_student(MaskedAutoencoder(MODELS["vit_tiny"](fixed_pos_embed=True)))
    g = {k.split("/")[1]: golden[k] for k in golden.files if k.startswith("mae_vit_tiny/")}
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == g["params"]
    assert rel_error(model.encoder.pos_embed[0, ::13], g["pos_embed"]) < 1e-6
    masked = torch.ones(2, 196, dtype=torch.bool).scatter(1, ids_keep, False)
    assert (masked.numpy() == g["mask"]).all() and ids_masked.shape == (2, 147)

    assert rel_error(model(images, ids_keep, ids_masked)["loss"], g["loss_norm1"]) < 1e-5
    model.norm_pix = False
    assert rel_error(model(images, ids_keep, ids_masked)["loss"], g["loss_norm0"]) < 1e-5

    features = model.encoder.forward_features(images, (11, 12), ids_keep)
    latent = model.encoder.norm(features[12])
    assert rel_error(latent[:, :6, :16], g["latent"]) < 1e-4
    assert rel_error(latent.abs().mean(), g["latent_abs_mean"]) < 1e-5
    logits = model.encoder.attention_map(features[11], 12)
    assert rel_error(logits[:, :, :6, :6], g["attn_logits_block12"]) < 1e-4
    assert rel_error(logits.abs().mean(), g["attn_logits_block12_abs_mean"]) < 1e-5
    tokens = model.forward_decoder(features, ids_keep, ids_masked)
    order = torch.cat([ids_keep, ids_masked], 1).argsort(1)                       # back to raster order
    pred = model.predict(tokens, 196).gather(1, order[..., None].expand(-1, -1, 768))
    assert rel_error(pred[:, :6, :24], g["pred"]) < 1e-4 and rel_error(pred.abs().mean(), g["pred_abs_mean"]) < 1e-5


@torch.no_grad()
def test_distillation_matches_golden(golden, vit_inputs):
    images, ids_keep, ids_masked = vit_inputs
    teacher = seed_weights(MODELS["vit_base"](fixed_pos_embed=True), "teacher.")
    signals = teacher_signals(teacher, images, ids_keep, [12])
    assert rel_error(signals[0][:, :, :6, :6], golden["teacher_vit_base/attn_logits_block12"]) < 1e-4
    assert rel_error(signals[0].abs().mean(), golden["teacher_vit_base/attn_logits_block12_abs_mean"]) < 1e-5

    def student(tap, **kwargs):
        encoder = MODELS["vit_tiny"](fixed_pos_embed=True)
        return seed_student(MaskedAutoencoder(encoder, tap, teacher=teacher, **kwargs), kwargs.get("distill") == "hidden")

    losses = student(12, layers=[12])(images, ids_keep, ids_masked, signals)
    assert rel_error(losses["rec"], golden["d_mae/loss_rec"]) < 1e-5
    assert rel_error(losses["attn"], golden["d_mae/loss_attn"]) < 1e-5
    for k in (6, 12):
        hidden = teacher_signals(teacher, images, ids_keep, [k], "hidden")
        losses = student(12, layers=[k], distill="hidden")(images, ids_keep, ids_masked, hidden)
        assert rel_error(losses["attn"], golden[f"d_mae/loss_hidden_block{k}"]) < 1e-5

    model = student(8, layers=[12], decoupled=True)
    losses = model(images, ids_keep, ids_masked, signals)
    for key, name in (("rec", "loss_rec"), ("attn", "loss_attn"), ("loss", "loss")):
        assert rel_error(losses[key], golden[f"d2_mae/{name}"]) < 1e-5
    features = model.encoder.forward_features(images, model.encoder_taps(), ids_keep)
    assert rel_error(model.student_signal(features, 12)[:, :, :6, :6], golden["d2_mae/student_logits"]) < 1e-4


@torch.no_grad()
def test_hiera_matches_golden(golden):
    images = seeded((2, 3, 224, 224), "images")
    ids_keep, ids_masked = (ids.sort(1).values for ids in random_masking(seeded((2, 49), "mask_units"), 0.4))
    kept = torch.zeros(2, 49, dtype=torch.bool).scatter(1, ids_keep, True)
    assert (kept.numpy() == golden["mae_hiera_tiny/mask"]).all()
    teacher = seed_weights(MODELS["hiera_base"](q_pool=2), "teacher.")
    model = HieraMaskedAutoencoder(MODELS["hiera_tiny"](q_pool=2), teacher=teacher, layers=[12])
    assert sum(p.numel() for n, p in model.named_parameters() if "adapters" not in n) == golden["mae_hiera_tiny/params"]
    seed_student(model)

    signals = teacher_signals(teacher, images, ids_keep, [24])
    assert rel_error(signals[0][:, :, :6, :6], golden["mae_hiera_tiny/teacher_logits"]) < 1e-4
    losses = model(images, ids_keep, ids_masked, signals)
    assert rel_error(losses["rec"], golden["mae_hiera_tiny/loss"]) < 1e-5
    assert rel_error(losses["attn"], golden["mae_hiera_tiny/loss_attn"]) < 1e-5
    features = model.encoder.forward_features(images, model.encoder_taps(), ids_keep)
    logits = model.student_signal(features, 12)
    assert tuple(logits.shape) == tuple(golden["mae_hiera_tiny/student_logits_shape"])
    assert rel_error(logits[:, :, :6, :6], golden["mae_hiera_tiny/student_logits"]) < 1e-4

    pred = model.predict(model.forward_decoder(features, ids_keep, ids_masked), 80)
    label = model.targets(images, ids_masked)
    raster = model.raster_ids(ids_masked).argsort(1)[0]                           # tokens of the first image, raster order
    assert rel_error(pred[0, raster][:6, :24], golden["mae_hiera_tiny/pred"]) < 1e-4
    assert rel_error(label[0, raster][:6, :24], golden["mae_hiera_tiny/label"]) < 1e-4


# ---- losses against a slow direct version ---------------------------------------------------------------------------
def test_losses_equal_a_double_loop():
    torch.manual_seed(0)
    images, ids = torch.randn(2, 3, 32, 32), torch.tensor([[0, 5, 15], [3, 4, 10]])
    for channels_last in (True, False):
        slow = []
        for image, row in zip(images, ids):
            for i in row.tolist():
                patch = image[:, 8 * (i // 4):8 * (i // 4) + 8, 8 * (i % 4):8 * (i % 4) + 8]
                slow.append((patch.permute(1, 2, 0) if channels_last else patch).reshape(-1))
        slow = torch.stack(slow).view(2, 3, 192)
        patches = P.patch_pixels(images, ids, 8, channels_last)
        assert torch.equal(patches, slow)
    target, pred = P.normalize_patches(patches), torch.randn(2, 3, 192)
    total = 0.0
    for b in range(2):
        for m in range(3):
            x = slow[b, m].double()
            x = (x - x.sum() / 192) / ((x - x.sum() / 192).square().sum() / 191 + 1e-6) ** 0.5
            total += sum((pred[b, m, i].item() - x[i].item()) ** 2 for i in range(192))
    assert P.reconstruction_loss(pred, target).item() == pytest.approx(total / (6 * 192), rel=1e-5)

    student, teacher, adapter = torch.randn(2, 3, 4, 4), torch.randn(2, 5, 4, 4), nn.Conv2d(3, 5, 1, bias=False)
    for probs in (False, True):
        s, t = (x.softmax(-1) if probs else x for x in (student, teacher))
        total = sum((t[b, h, i, j] - sum(adapter.weight[h, g, 0, 0] * s[b, g, i, j] for g in range(3))).item() ** 2
                    for b in range(2) for h in range(5) for i in range(4) for j in range(4))
        assert P.attention_loss(student, teacher, adapter, probs).item() == pytest.approx(total / (2 * 5 * 16), rel=1e-5)


def test_losses_and_maps_stay_float32_under_autocast():
    teacher = VisionTransformer(**SMALL).eval()
    model, images = small_student(True, teacher), torch.randn(2, 3, 32, 32)
    ids = random_masking(torch.rand(2, 16), 0.75)
    with torch.autocast("cpu", torch.bfloat16):
        signals = teacher_signals(teacher, images, ids[0], [12])
        losses = model(images, *ids, signals)
    assert {x.dtype for x in (*signals, *losses.values())} == {torch.float32}


# ---- invariants of the method ---------------------------------------------------------------------------------------
def test_teacher_equal_to_student_gives_zero_loss_with_the_identity_adapter():
    teacher = VisionTransformer(**SMALL).eval().requires_grad_(False)
    model = small_student(teacher=teacher)
    model.encoder.load_state_dict(teacher.state_dict())
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    with torch.no_grad():
        model.adapters["12"].weight.copy_(torch.eye(3)[..., None, None])
    images, ids = torch.randn(2, 3, 32, 32), random_masking(torch.rand(2, 16), 0.75)
    losses = model(images, *ids, teacher_signals(teacher, images, ids[0], [12]))
    assert losses["attn"].item() < 1e-12
    losses["loss"].backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)    # DistributedDataParallel needs it
    assert all(torch.equal(v, before[k]) and not v.requires_grad for k, v in teacher.state_dict().items())


def test_reconstruction_shapes_blocks_1_to_8_and_distillation_all_12():
    teacher = VisionTransformer(**SMALL).eval().requires_grad_(False)
    model = small_student(True, teacher)
    images, ids = torch.randn(2, 3, 32, 32), random_masking(torch.rand(2, 16), 0.75)
    losses = model(images, *ids, teacher_signals(teacher, images, ids[0], [12]))
    blocks = [block.mlp.fc1.weight for block in model.encoder.blocks]
    rec, attn = (torch.autograd.grad(losses[k], blocks, retain_graph=True, allow_unused=True) for k in ("rec", "attn"))
    assert [g is not None and g.abs().sum() > 0 for g in rec] == [True] * 8 + [False] * 4
    assert all(g.abs().sum() > 0 for g in attn)
    losses["loss"].backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert not any(name.startswith(("encoder.blocks.12", "teacher")) for name in model.state_dict())


@pytest.mark.parametrize("model", [small_student(), small_hiera_student()], ids=["vit", "hiera"])
@torch.no_grad()
def test_masked_pixels_cannot_reach_the_encoder(model):
    size = model.encoder.img_size
    images, (ids_keep, ids_masked) = torch.randn(2, 3, *size), random_masking(torch.rand(2, model.cells), 0.6)
    changed = images.clone()
    p, w = (32, 3) if isinstance(model, HieraMaskedAutoencoder) else (8, 4)
    for image, row in zip(changed, ids_masked):
        for i in row.tolist():
            image[:, p * (i // w):p * (i // w + 1), p * (i % w):p * (i % w + 1)] = 1e4 * torch.randn(3, p, p)
    taps = range(model.encoder.depth + 1)
    a, b = (model.encoder.forward_features(x, taps, ids_keep) for x in (images, changed))
    assert all(torch.equal(a[t], b[t]) for t in taps)
    everything = model.encoder.forward_features(images, taps)
    assert a[taps[-1]].shape[1] < everything[taps[-1]].shape[1]


def test_teacher_runs_only_as_far_as_the_loss_reads():
    teacher = VisionTransformer(**SMALL).eval()
    teacher.blocks[11].forward = teacher.blocks[11].mlp.forward = teacher.norm.forward = None    # would raise if called
    (signal_,) = teacher_signals(teacher, torch.randn(1, 3, 32, 32), torch.tensor([[0, 3]]), [12])
    assert signal_.shape == (1, 3, 3, 3) and not signal_.requires_grad


@torch.no_grad()
@pytest.mark.parametrize("model", [small_student(), small_hiera_student()], ids=["vit", "hiera"])
def test_perfect_prediction_gives_the_input_back(model):
    images, ids = torch.rand(2, 3, *model.encoder.img_size), random_masking(torch.rand(2, model.cells), 0.75)
    answer = model.targets(images, ids[1])
    model.predict = lambda tokens, n: answer
    masked, filled = P.reconstruct(model, images, *ids)
    assert (filled - images).abs().max() < 1 / 255 and (masked == 0).float().mean() > 0.5


# ---- data -----------------------------------------------------------------------------------------------------------
def test_every_kind_of_image_file_is_read_as_rgb(tmp_path):
    rgb = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    picture = Image.fromarray(rgb)
    for mode, ending in (("RGB", "png"), ("L", "png"), ("LA", "png"), ("P", "png"), ("RGBA", "png"), ("CMYK", "jpg"),
                         ("L", "jpg"), ("RGB", "bmp"), ("P", "gif"), ("RGB", "webp"), ("RGB", "tiff")):
        path = tmp_path / f"{mode}.{ending}"
        picture.convert(mode).save(path)
        image, expected = P.read_image(path), np.asarray(Image.open(path).convert("RGB"))
        assert image.shape == (3, 20, 30) and image.dtype == torch.uint8
        assert np.abs(image.permute(1, 2, 0).numpy().astype(int) - expected).max() <= 4, path    # decoders round apart
    Image.fromarray(np.linspace(0, 65535, 600).astype(np.uint16).reshape(20, 30)).save(tmp_path / "deep.png")
    image = P.read_image(tmp_path / "deep.png")
    assert image[0, 0, 0] == 0 and image[2, 19, 29] == 255 and abs(image.float().mean() - 127.5) < 2


@pytest.fixture
def folder(tmp_path):
    """Flat and nested images, one of them cut short."""
    (tmp_path / "a" / "b").mkdir(parents=True)
    for i, path in enumerate([tmp_path / "0.png", tmp_path / "a" / "1.jpg", *(tmp_path / "a" / "b" / f"{i}.png" for i in range(9))]):
        Image.fromarray(P.draw_shapes(i).permute(1, 2, 0).numpy()).save(path)
    buffer = io.BytesIO()
    Image.fromarray(P.draw_shapes(3).permute(1, 2, 0).numpy()).save(buffer, "JPEG")
    (tmp_path / "a" / "cut.jpg").write_bytes(buffer.getvalue()[:len(buffer.getvalue()) // 2])
    return tmp_path


def dataset(folder, **kwargs):
    return P.Images(P.list_images(folder), P.read_image, (32, 32), 16, **kwargs)


def test_corrupt_files_are_named_or_skipped(folder, tmp_path):
    data = dataset(folder)
    assert len(data) == 12
    bad = next(i for i, name in enumerate(data.items) if name.endswith("cut.jpg"))
    with pytest.raises(InputError, match="cut.jpg.*--skip-corrupt"):
        data[0, bad]
    image, _, index, replaced = dataset(folder, skip_corrupt=True)[0, bad]
    assert image.shape == (3, 32, 32) and index != bad and replaced == 1
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    damaged = bytearray((tmp_path / "a.png").read_bytes())
    damaged[3000] ^= 255    # crashes the PNG decoder of torchvision and with it the process
    (tmp_path / "a.png").write_bytes(damaged)
    with pytest.raises((OSError, SyntaxError)):
        P.read_image(tmp_path / "a.png")


def test_crops_and_masks_depend_on_seed_epoch_and_image_alone(folder):
    data = dataset(folder, skip_corrupt=True)
    keys = [[(epoch, i) for i in range(len(data))] for epoch in (0, 1)]
    plain = list(DataLoader(data, batch_sampler=keys))
    spawned = list(DataLoader(data, batch_sampler=keys, num_workers=2, multiprocessing_context="spawn"))
    for a, b in zip(plain, spawned):
        assert all(torch.equal(x, y) for x, y in zip(a, b))
    noise = torch.cat([b[1] for b in plain])
    assert len(noise.unique(dim=0)) == 24                                         # differ by image and by epoch
    other = next(iter(DataLoader(dataset(folder, skip_corrupt=True, seed=1), batch_sampler=keys)))
    assert not torch.equal(other[1], plain[0][1])


def test_batches_cover_an_epoch_once_whatever_the_number_of_processes():
    def batches(rank, world, accum, start=0):
        sampler = P.EpochBatches(22, 8, accum, rank, world, seed=3)
        sampler.epoch, sampler.start = 1, start
        return list(sampler)
    whole = batches(0, 1, 1)
    assert len(whole) == 2 and len({i for b in whole for _, i in b}) == 16
    dealt = [batches(r, 2, 2) for r in range(2)]
    joined = [[key for micro in (2 * s, 2 * s + 1) for r in range(2) for key in dealt[r][micro]] for s in range(2)]
    assert joined == whole and batches(0, 1, 1, start=1) == whole[1:]
    assert P.EpochBatches(5, 8, 1, 0, 2, 0).batch == 4
    with pytest.raises(InputError, match="--batch-size 9"):
        P.EpochBatches(22, 9, 1, 0, 2, 0)


# ---- runs -----------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A random MAE teacher of this project's own kind."""
    torch.manual_seed(1)
    model = MODELS["vit_tiny"](img_size=32, patch_size=8, fixed_pos_embed=True)
    path = tmp_path_factory.mktemp("teacher") / "encoder.pt"
    torch.save({"model": model.state_dict(), "arch": model.arch}, path)
    return path


def state_of(path):
    return torch.load(path, weights_only=True)


def same_weights(a, b, tolerance=0.0):
    a, b = (state_of(p / "last.pt")["model"] for p in (a, b))
    return a.keys() == b.keys() and all((a[k] - b[k]).abs().max() <= tolerance for k in a)


def test_killed_run_resumes_bit_for_bit(tmp_path, teacher, capsys):
    (tmp_path / "data").mkdir()
    for i in range(41):
        Image.fromarray(P.draw_shapes(i).permute(1, 2, 0).numpy()).save(tmp_path / "data" / f"{i}.png")
    command = [SCRIPT, *QUICK, "--data", tmp_path / "data", "--teacher", teacher, "--epochs", 4, "--warmup-epochs", 1,
               "--batch-size", 5, "--base-lr", 0.05, "--log-every", 2]
    def here(out):
        P.main(P.parse_args([*map(str, command[1:]), "--out", str(out)]))

    here(tmp_path / "straight")
    for name, kind in (("killed", signal.SIGKILL), ("stopped", signal.SIGTERM)):
        out = tmp_path / name
        process = subprocess.Popen([sys.executable, *map(str, command), "--out", str(out)], cwd=ROOT, stdout=subprocess.DEVNULL,
                                   stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        steps = lambda: [v.get("step", 0) for v in P.read_log(out / "log.jsonl")] if (out / "log.jsonl").exists() else []
        while process.poll() is None and max(steps(), default=0) < 10:            # in the second of four epochs of 8
            time.sleep(0.02)
        process.send_signal(kind)
        _, errors = process.communicate(timeout=60)
        assert process.returncode != 0 and (out / "last.pt").exists()
        if kind == signal.SIGTERM:
            assert "stopped by SIGTERM after step" in errors
            assert state_of(out / "last.pt")["step"] >= 10                        # not a step is lost
        here(out)
        assert "going on after step" in capsys.readouterr().out
        assert same_weights(out, tmp_path / "straight")
        logged = [v["step"] for v in P.read_log(out / "log.jsonl") if "rec" in v]
        assert logged == sorted(set(logged)) and logged[-1] == 32

    encoder = state_of(tmp_path / "straight" / "encoder.pt")
    model = MODELS["vit_tiny"](img_size=32, patch_size=8, fixed_pos_embed=True)
    assert encoder["model"].keys() == model.state_dict().keys()                   # 12 blocks; no decoder, adapter, 13th block
    load_encoder(model, tmp_path / "straight" / "last.pt")
    assert torch.equal(model.blocks[11].mlp.fc2.weight, encoder["model"]["blocks.11.mlp.fc2.weight"])
    assert {"arch", "mean", "std", "args"} <= encoder.keys() and encoder["arch"]["num_heads"] == 12
    for picture in ("reconstruction", "attention", "curves"):
        assert np.asarray(Image.open(tmp_path / "straight" / f"{picture}.png")).std() > 10
    lines = P.read_log(tmp_path / "straight" / "log.jsonl")
    assert lines[0]["args"]["lr"] == pytest.approx(0.05 * 5 / 256)
    assert {"rec", "attn", "lr", "grad_norm", "img_s", "data_share", "memory_gb", "eta_h"} <= lines[2].keys()
    with pytest.raises(InputError, match="--epochs 4, 40 training images, not 39"):
        args = P.resolve(P.parse_args([str(c) for c in command[1:]] + ["--epochs", "5", "--out", str(tmp_path / "straight")]))
        args.lr = lines[0]["args"]["lr"]
        P.resume(tmp_path / "straight" / "last.pt", args, 39)


def test_two_processes_equal_one_with_accumulation(tmp_path, teacher):
    command = [SCRIPT, *QUICK, "--teacher", teacher, "--epochs", 1, "--warmup-epochs", 0, "--batch-size", 16,
               "--base-lr", 4e-3, "--max-steps", 4, "--val-images", 7, "--log-every", 1]
    run(*command, "--accum-steps", 2, "--out", tmp_path / "one")
    done = run(*command, "--out", tmp_path / "two", torchrun=2)
    assert "batch 16 = 8 images x 2 process(es) x 1 micro-steps" in done.stdout
    assert same_weights(tmp_path / "one", tmp_path / "two", 1e-4)
    one, two = (P.read_log(tmp_path / name / "log.jsonl")[1:] for name in ("one", "two"))
    assert [v["step"] for v in one] == [v["step"] for v in two] == [0, 1, 2, 3, 4, 4]
    for a, b in zip(one, two):    # losses, the uneven held-out set, lr and gradients
        assert all(a[k] == pytest.approx(b[k], rel=1e-3) for k in a.keys() & {"rec", "attn", "lr", "grad_norm", "val_rec", "val_attn", "val_images"})
    assert one[0]["val_images"] == 7


def test_non_finite_loss_stops_every_process(tmp_path):
    done = run(SCRIPT, *QUICK, "--method", "mae", "--epochs", 1, "--warmup-epochs", 0, "--batch-size", 8, "--base-lr", 1e30,
               "--log-every", 3, "--out", tmp_path, torchrun=2, check=False)
    assert done.returncode != 0 and re.search(r"error: the loss is \S+ at step \d+, lr", done.stderr)
    assert "images: " in done.stderr and not (tmp_path / "last.pt").exists()
    with pytest.raises(FloatingPointError, match="weights are not finite"):    # of the last update, which no loss has seen
        P.main(P.parse_args([*map(str, QUICK), "--method", "mae", "--warmup-epochs", "0", "--base-lr", "1e39", "--max-steps", "1",
                             "--out", str(tmp_path)]))
    assert not (tmp_path / "last.pt").exists()


@pytest.mark.parametrize("options", [["--model", "hiera_tiny", "--image-size", "64", "--patch-size", "16"],
                                     ["--dtype", "bf16", "--no-norm-pix", "--clip-grad", "1"],
                                     ["--compile", "--model", "vit_nano"]])
def test_other_ways_to_train(tmp_path, options, capsys):
    torch.compiler.set_stance("force_eager")    # the compiled module with its names, without minutes of compilation
    MODELS["vit_nano"] = functools.partial(VisionTransformer, embed_dim=24, depth=2, num_heads=3)
    P.main(P.parse_args([str(c) for c in QUICK] + ["--method", "mae", "--epochs", "1", "--batch-size", "4", "--max-steps", "2",
                                                   "--decoder-dim", "24", "--out", str(tmp_path), *options]))
    assert "held-out reconstruction loss" in capsys.readouterr().out
    assert all("_orig_mod" not in k and "module" not in k for k in state_of(tmp_path / "last.pt")["model"])
    torch.compiler.set_stance("default")


def test_teacher_of_the_hiera_student(tmp_path):
    torch.manual_seed(0)
    torch.save({"model_state": MODELS["hiera_base"](img_size=64, q_pool=2).state_dict()}, tmp_path / "hiera.pth")
    common = ["--data", "shapes", "--image-size", "64", "--model", "hiera_tiny", "--method", "d-mae", "--workers", "0",
              "--teacher", str(tmp_path / "hiera.pth"), "--out", str(tmp_path / "out"), "--device", "cpu"]
    P.main(P.parse_args([*common, "--val-images", "4", "--epochs", "1", "--batch-size", "4", "--max-steps", "1"]))
    lines = P.read_log(tmp_path / "out" / "log.jsonl")
    assert lines[-1]["val_attn"] > 0 and (tmp_path / "out" / "attention.png").exists()
    with pytest.raises(InputError, match="choose among blocks 5..12"):
        P.main(P.parse_args([*common, "--distill-layers", "3"]))


def test_training_replays_the_shipped_log(tmp_path):
    """tests/reference_log.jsonl is this run as first made; a change of the numbers shows here."""
    P.main(P.parse_args([str(c) for c in QUICK] + ["--method", "mae", "--epochs", "1", "--warmup-epochs", "0.5", "--batch-size", "64",
                         "--base-lr", "4e-3", "--max-steps", "12", "--log-every", "1", "--out", str(tmp_path)]))
    ours, shipped = P.read_log(tmp_path / "log.jsonl"), P.read_log(ROOT / "tests" / "reference_log.jsonl")
    for a, b in zip(ours[1:], shipped[1:]):
        assert all(a[k] == pytest.approx(b[k], rel=1e-2) for k in b.keys() & {"step", "rec", "lr", "val_rec", "val_base"})
    assert len(ours) == len(shipped) and ours[-1]["val_rec"] < ours[1]["val_rec"]


# ---- bad input ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("options, match", [
    (["--teacher", "nothing.pth"], "nothing.pth does not exist"),
    ([], "distils from a teacher"),
    (["--method", "mae", "--data", "no/such/folder"], "no/such/folder is not a folder"),
    (["--method", "mae", "--data", ".ci"], "holds no image"),
    (["--teacher", "T", "--model", "hiera_tiny"], "d2-mae is defined for plain ViTs"),
    (["--teacher", "T", "--model", "hiera_tiny", "--method", "d-mae", "--image-size", "100"], "is a vit_tiny, the student a hiera_tiny"),
    (["--method", "mae", "--model", "hiera_tiny", "--image-size", "100"], "nearest valid size is 96x96"),
    (["--method", "mae", "--image-size", "100"], "not a multiple of the patch size"),
    (["--teacher", "T", "--patch-size", "16"], "give --patch-size 8"),
    (["--teacher", "T", "--decoder-tap", "13"], "not one of the blocks 1..12"),
    (["--teacher", "T", "--distill-layers", "6"], "needs block 12"),
    (["--method", "mae", "--mask-ratio", "1.5"], "between 0 and 1"),
    (["--teacher", "N", "--method", "d-mae", "--distill", "hidden"], "no final norm"),
    (["--method", "mae", "--batch-size", "6", "--accum-steps", "4"], "choose a multiple of 4"),
    (["--method", "mae", "--device", "mps"], "--device mps is not available"),
    (["--method", "mae", "--accum-steps", "0"], "--accum-steps 0 must be at least 1"),
    (["--method", "mae", "--base-lr", "nan"], "--base-lr nan must be at least 0"),
    (["--method", "mae", "--mask-ratio", "0.99"], "at least one visible"),
    (["--method", "mae", "--crop-scale", "1", "0.5"], "a range within"),
    (["--method", "mae", "--decoder-dim", "90"], "multiple of 4"),
    (["--method", "mae", "--image-size", "32", "32", "32"], "one number, or height and width"),
])
def test_bad_options_end_in_one_sentence(options, match, tmp_path, teacher):
    state = torch.load(teacher, weights_only=True)
    torch.save({k: v for k, v in state["model"].items() if not k.startswith("norm.")}, tmp_path / "no_norm.pth")
    options = [{"T": str(teacher), "N": str(tmp_path / "no_norm.pth")}.get(o, o) for o in options]
    with pytest.raises(InputError, match=match) as error:
        P.main(P.parse_args([*map(str, QUICK), "--out", str(tmp_path), *options]))
    assert "\n" not in str(error.value)


def test_errors_are_printed_without_a_traceback(tmp_path, folder):
    done = run(SCRIPT, "--method", "mae", "--data", folder, "--image-size", 32, "--patch-size", 8, "--batch-size", 4, "--workers", 2,
               "--out", tmp_path / "out", "--device", "cpu", check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert re.fullmatch(r"error: cannot read image \S+cut.jpg .*--skip-corrupt", done.stderr.strip().splitlines()[-1])
    done = run(SCRIPT, "--help")
    assert "--mask-ratio" in done.stdout


def test_defaults_are_the_papers_recipe():
    args = P.resolve(P.parse_args(["--teacher", "x"]))
    recipe = SimpleNamespace(epochs=400, warmup_epochs=40, batch_size=4096, base_lr=1.5e-4, weight_decay=0.05, betas=(0.9, 0.95), alpha=1.0,
                             clip_grad=0, mask_ratio=0.75, decoder_tap=8, distill_layers=[12], crop_scale=(0.08, 1.0), norm_pix=True)
    assert all(getattr(args, k) == v for k, v in vars(recipe).items())
    assert P.resolve(P.parse_args(["--method", "mae", "--model", "hiera_tiny"])).mask_ratio == 0.4
    section = (ROOT / "README.md").read_text().split("## Pre-training")[1].split("\n## ")[0]
    table = re.findall(r"\| `--([\w-]+)` \| ([\d. ]+)", section)                # the README's table of defaults
    assert len(table) == 14
    for option, text in table:
        value = getattr(args, option.replace("-", "_"))
        assert [float(t) for t in text.split()] == list(np.ravel(value)), option


def test_waiting_for_data_is_reported(tmp_path, monkeypatch, capsys):
    slow = P.draw_shapes.__wrapped__
    monkeypatch.setattr(P, "draw_shapes", lambda index: (time.sleep(0.05), slow(index))[1])
    P.main(P.parse_args([str(c) for c in QUICK] + ["--method", "mae", "--epochs", "1", "--batch-size", "8", "--max-steps", "2",
                                                   "--out", str(tmp_path)]))
    assert "waiting for data" in capsys.readouterr().out
    assert P.read_log(tmp_path / "log.jsonl")[2]["data_share"] > 0.3
