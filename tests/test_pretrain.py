"""Masking, decoders, distillation and the training run of pretrain_d2mae.py."""
import re
import time
from argparse import Namespace

import numpy as np
import pytest
import torch
from conftest import (ROOT, check_kill_and_resume, here, rel_error, run, same_weights, seed_weights,
                      seeded, state_of)
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

import pretrain_d2mae as P
import toy
from models import (EpochSampler, Hiera, InputError, VisionTransformer, build_model, load_encoder,
                    read_log)
from pretrain_d2mae import (AblatedDistillation, CoupledDistillation, Distillation,
                            HieraMaskedAutoencoder, MaskedAutoencoder, random_masking)

SCRIPT = ROOT / "pretrain_d2mae.py"
SMALL = dict(img_size=32, patch_size=8, embed_dim=24, depth=12, num_heads=3)
QUICK = ["--image-size", 32, "--patch-size", 8, "--workers", 0, "--device", "cpu", "--model",
         "vit_nano"]


def with_statistics(encoder):
    encoder.mean, encoder.std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
    return encoder


def small_student(decoupled=False, teacher=None, **options):
    torch.manual_seed(0)
    encoder = with_statistics(VisionTransformer(**SMALL))
    kind = Distillation if decoupled else CoupledDistillation
    distillation = kind(encoder, teacher) if teacher else None
    return MaskedAutoencoder(encoder, 8 if decoupled else 12, 32, distillation=distillation,
                             **options)


def small_hiera_student():
    torch.manual_seed(0)
    encoder = Hiera(img_size=96, embed_dim=8, num_heads=1, stages=(1, 1, 2, 1), q_pool=2)
    with_statistics(encoder)
    return HieraMaskedAutoencoder(encoder, 5, 32)


def small_teacher():
    return VisionTransformer(**SMALL).eval().requires_grad_(False)


def step_inputs(cells=16, ratio=0.75, size=(32, 32)):
    return torch.randn(2, 3, *size), *random_masking(torch.rand(2, cells), ratio)


def test_a_pretraining_step_in_six_lines():
    teacher = small_teacher()
    student = small_student(decoupled=True, teacher=teacher)
    images, ids_keep, ids_masked = step_inputs()
    target = student.distillation.target_maps(teacher, images, ids_keep)
    losses = student(images, ids_keep, ids_masked, target)
    losses["loss"].backward()
    assert losses["loss"] == losses["rec"] + losses["attn"]


# ---- golden numbers --------------------------------------------------------------------------
def public_name(name):
    """Names of the student's parameters -> those of the authors' files, which seed the weights."""
    thirteenth = name.startswith("distillation.")
    name = name.removeprefix("encoder.").removeprefix("distillation.")
    name = re.sub("^norm", "blocks.12.norm1", name) if thirteenth else name
    name = re.sub("^qk.", "blocks.12.attn.qkv.", name)
    return re.sub("^adapter.(0.)?", "attn_adapter.", name)


@torch.no_grad()
def seed_student(model):
    seed_weights(model, rename=public_name)
    extra = getattr(model.distillation, "qk", None)
    if extra:    # q and k are the first two thirds of the authors' projection
        extra.weight.copy_(0.05 * seeded((576, 192), "blocks.12.attn.qkv.weight")[:384])
        extra.bias.copy_(0.05 * seeded((576,), "blocks.12.attn.qkv.bias")[:384])
    if isinstance(model.distillation, AblatedDistillation):
        weight = model.distillation.adapter[0].weight
        weight.copy_(0.05 * seeded(tuple(weight.shape), "hidden_adapter.weight"))
    return model


def tiny_student(decoder_tap, kind, teacher, *options):
    encoder = tiny()
    distillation = kind(encoder, teacher, *options)
    return seed_student(MaskedAutoencoder(encoder, decoder_tap, distillation=distillation))


@pytest.fixture(scope="module")
def vit_inputs():
    ids_keep, ids_masked = random_masking(seeded((2, 196), "noise"), 0.75)
    return seeded((2, 3, 224, 224), "images"), ids_keep, ids_masked


@pytest.fixture(scope="module")
def base_teacher():
    teacher = build_model("vit_base")
    table = P.sincos_2d(768, (14, 14))
    teacher.pos_embed = torch.nn.Parameter(table, requires_grad=False)    # of which no seeds
    return seed_weights(teacher, "teacher.")


def tiny():
    return build_model("vit_tiny")


@torch.no_grad()
def test_mae_matches_golden(golden, vit_inputs):
    images, ids_keep, ids_masked = vit_inputs
    model = seed_student(MaskedAutoencoder(tiny()))
    g = {k.split("/")[1]: golden[k] for k in golden.files if k.startswith("mae_vit_tiny/")}
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == g["params"]
    assert rel_error(model.encoder.pos_embed[0, ::13], g["pos_embed"]) < 1e-6
    masked = torch.ones(2, 196, dtype=torch.bool).scatter(1, ids_keep, False)
    assert (masked.numpy() == g["mask"]).all() and ids_masked.shape == (2, 147)

    assert rel_error(model(images, ids_keep, ids_masked)["loss"], g["loss_norm1"]) < 1e-5
    model.norm_pix = False
    assert rel_error(model(images, ids_keep, ids_masked)["loss"], g["loss_norm0"]) < 1e-5

    features = model.encoder.forward_features(images, (11, 12), ids_keep)
    latent = model.latent(features)
    assert rel_error(latent[:, :6, :16], g["latent"]) < 1e-4
    assert rel_error(latent.abs().mean(), g["latent_abs_mean"]) < 1e-5
    logits = model.encoder.attention_map(features[11], 12)
    assert rel_error(logits[:, :, :6, :6], g["attn_logits_block12"]) < 1e-4
    assert rel_error(logits.abs().mean(), g["attn_logits_block12_abs_mean"]) < 1e-5


@torch.no_grad()
def test_predicted_pixels_match_golden(golden, vit_inputs):
    images, ids_keep, ids_masked = vit_inputs
    model = seed_student(MaskedAutoencoder(tiny()))
    latent = model.latent(model.encoder.forward_features(images, (12,), ids_keep))
    tokens = []    # what the last block gives for all patches, though only masked ones are read
    model.decoder_blocks[-1].register_forward_hook(lambda *call: tokens.append(call[2][:, 1:]))
    masked_pred = model.forward_decoder(latent, ids_keep, ids_masked)
    pred = model.decoder_pred(model.decoder_norm(tokens[0]))
    assert torch.allclose(pred[:, -147:], masked_pred, atol=1e-5)
    raster = torch.cat([ids_keep, ids_masked], dim=1).argsort(dim=1)
    pred = pred.gather(1, raster[..., None].expand(-1, -1, 768))
    assert rel_error(pred[:, :6, :24], golden["mae_vit_tiny/pred"]) < 1e-4
    assert rel_error(pred.abs().mean(), golden["mae_vit_tiny/pred_abs_mean"]) < 1e-5


@torch.no_grad()
def test_coupled_distillation_matches_golden(golden, vit_inputs, base_teacher):
    images, ids_keep, ids_masked = vit_inputs
    model = tiny_student(12, CoupledDistillation, base_teacher)
    maps = model.distillation.target_maps(base_teacher, images, ids_keep)
    target = maps
    key = "teacher_vit_base/attn_logits_block12"
    assert rel_error(target[:, :, :6, :6], golden[key]) < 1e-4
    assert rel_error(target.abs().mean(), golden[f"{key}_abs_mean"]) < 1e-5
    losses = model(images, ids_keep, ids_masked, maps)
    assert rel_error(losses["rec"], golden["d_mae/loss_rec"]) < 1e-5
    assert rel_error(losses["attn"], golden["d_mae/loss_attn"]) < 1e-5


@torch.no_grad()
def test_decoupled_distillation_matches_golden(golden, vit_inputs, base_teacher):
    images, ids_keep, ids_masked = vit_inputs
    model = tiny_student(8, Distillation, base_teacher)
    target = model.distillation.target_maps(base_teacher, images, ids_keep)
    losses = model(images, ids_keep, ids_masked, target)
    for key, name in (("rec", "loss_rec"), ("attn", "loss_attn"), ("loss", "loss")):
        assert rel_error(losses[key], golden[f"d2_mae/{name}"]) < 1e-5
    features = model.encoder.forward_features(images, model.taps, ids_keep)
    student = model.distillation.student_map(model.encoder, features)
    assert rel_error(student[:, :, :6, :6], golden["d2_mae/student_logits"]) < 1e-4


@pytest.mark.parametrize("block", [6, 12])
@torch.no_grad()
def test_hidden_states_match_golden(block, golden, vit_inputs, base_teacher):
    images, ids_keep, ids_masked = vit_inputs
    model = tiny_student(12, AblatedDistillation, base_teacher, [block], "hidden")
    target = model.distillation.target_maps(base_teacher, images, ids_keep)
    losses = model(images, ids_keep, ids_masked, target)
    assert rel_error(losses["attn"], golden[f"d_mae/loss_hidden_block{block}"]) < 1e-5


@torch.no_grad()
def test_hiera_matches_golden(golden):
    g = {k.split("/")[1]: golden[k] for k in golden.files if k.startswith("mae_hiera_tiny/")}
    images = seeded((2, 3, 224, 224), "images")
    ids = random_masking(seeded((2, 49), "mask_units"), 0.4)
    ids_keep, ids_masked = (i.sort(dim=1).values for i in ids)
    kept = torch.zeros(2, 49, dtype=torch.bool).scatter(1, ids_keep, True)
    assert (kept.numpy() == g["mask"]).all()
    teacher = seed_weights(build_model("hiera_base", q_pool=2), "teacher.")
    encoder = build_model("hiera_tiny", q_pool=2)
    model = HieraMaskedAutoencoder(encoder, 12, distillation=CoupledDistillation(encoder, teacher))
    size = sum(p.numel() for name, p in model.named_parameters() if "adapter" not in name)
    assert size == g["params"]
    seed_student(model)

    maps = model.distillation.target_maps(teacher, images, ids_keep)
    assert rel_error(maps[:, :, :6, :6], g["teacher_logits"]) < 1e-4
    losses = model(images, ids_keep, ids_masked, maps)
    assert rel_error(losses["rec"], g["loss"]) < 1e-5
    assert rel_error(losses["attn"], g["loss_attn"]) < 1e-5
    features = model.encoder.forward_features(images, model.taps, ids_keep)
    logits = model.distillation.student_map(encoder, features)
    assert tuple(logits.shape) == tuple(g["student_logits_shape"])
    assert rel_error(logits[:, :, :6, :6], g["student_logits"]) < 1e-4

    pred = model.forward_decoder(model.latent(features), ids_keep, ids_masked)
    label = model.target(images, ids_masked)
    raster = model.decoder_rows(ids_masked).argsort(1)[0]    # tokens of the first image
    assert rel_error(pred[0, raster][:6, :24], g["pred"]) < 1e-4
    assert rel_error(label[0, raster][:6, :24], g["label"]) < 1e-4


# ---- losses against a slow direct version ----------------------------------------------------
@pytest.mark.parametrize("model", [small_student(), small_hiera_student()], ids=["vit", "hiera"])
def test_masked_pixels_are_cut_and_pasted_as_by_hand(model):
    """ViT: (row, column, channel) of a patch of 8; Hiera: (channel, row, column) of 4 x 16 a unit."""
    vit = isinstance(model.encoder, VisionTransformer)
    images = torch.randn(2, 3, *model.encoder.img_size)
    ids = torch.tensor([[0, 5, 8], [3, 4, 7]])
    patches = model.masked_pixels(images, ids)
    for b in range(2):
        for m, i in enumerate(ids[b].tolist()):
            if vit:
                y, x = 8 * (i // 4), 8 * (i % 4)
                patch = images[b, :, y:y + 8, x:x + 8].permute(1, 2, 0)
                assert torch.equal(patches[b, m], patch.reshape(-1))
                continue
            for j in range(4):
                y, x = 32 * (i // 3) + 16 * (j // 2), 32 * (i % 3) + 16 * (j % 2)
                patch = images[b, :, y:y + 16, x:x + 16]
                assert torch.equal(patches[b, 4 * m + j], patch.reshape(-1))
    blank = P.paste(model, images, torch.zeros_like(patches), ids)
    assert (blank == 0).float().mean() == pytest.approx(3 / (16 if vit else 9))
    assert torch.equal(P.paste(model, blank, patches, ids), images)


def test_reconstruction_loss_equals_a_loop():
    torch.manual_seed(0)
    patches, pred = torch.randn(2, 3, 192), torch.randn(2, 3, 192)
    loss = P.reconstruction_loss(pred, P.normalize_patches(patches)).item()
    total = 0.0
    for b in range(2):
        for m in range(3):
            x = patches[b, m].double()
            mean = x.sum() / 192
            variance = (x - mean).square().sum() / 191
            x = (x - mean) / (variance + 1e-6) ** 0.5
            total += sum((pred[b, m, i].item() - x[i].item()) ** 2 for i in range(192))
    assert loss == pytest.approx(total / (6 * 192), rel=1e-5)


def test_attention_loss_equals_a_loop():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 4, 4), torch.randn(2, 5, 4, 4)
    adapter = nn.Conv2d(3, 5, 1, bias=False)
    total = 0.0
    for b, h, i, j in np.ndindex(2, 5, 4, 4):
        mixed = sum(adapter.weight[h, g, 0, 0] * student[b, g, i, j] for g in range(3))
        total += (teacher[b, h, i, j] - mixed).item() ** 2
    loss = P.attention_loss(student, teacher, adapter).item()
    assert loss == pytest.approx(total / (2 * 5 * 16), rel=1e-5)


def test_losses_and_maps_stay_float32_under_autocast():
    teacher = small_teacher()
    model = small_student(True, teacher)
    images, ids_keep, ids_masked = step_inputs()
    with torch.autocast("cpu", torch.bfloat16):
        target = model.distillation.target_maps(teacher, images, ids_keep)
        losses = model(images, ids_keep, ids_masked, target)
    assert {x.dtype for x in (target, *losses.values())} == {torch.float32}


@pytest.mark.parametrize("distill", ["attention", "probabilities", "hidden"])
@pytest.mark.parametrize("decoupled", [False, True])
def test_ablations_sum_over_layers_and_train_every_parameter(distill, decoupled):
    teacher = small_teacher()
    images, ids_keep, ids_masked = step_inputs()
    torch.manual_seed(0)
    encoder = with_statistics(VisionTransformer(**SMALL))
    layers = [6, 13 if decoupled else 12]
    distillation = AblatedDistillation(encoder, teacher, layers, distill)
    model = MaskedAutoencoder(encoder, 8, 32, distillation=distillation)
    target = model.distillation.target_maps(teacher, images, ids_keep)
    losses = model(images, ids_keep, ids_masked, target)
    losses["loss"].backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad
               ) or not decoupled    # then the last block gives its map alone
    features = model.encoder.forward_features(images, model.taps, ids_keep)
    everything = teacher.forward_features(images, range(13), ids_keep)
    parts = []
    for k, adapter, truth in zip(layers, distillation.adapter, target):
        if distill == "hidden":
            student = (distillation.norm(features[12]) if k == 13
                       else encoder.representation(features[k], k))
            expected = teacher.representation(everything[min(k, 12)], min(k, 12))
        else:
            student = (distillation.student_map(encoder, features) if k == 13
                       else encoder.attention_map(features[k - 1], k))
            expected = teacher.attention_map(everything[min(k, 12) - 1], min(k, 12))
        if distill == "probabilities":
            student, expected = student.softmax(-1), expected.softmax(-1)
        assert torch.equal(truth, expected)
        parts.append((adapter(student) - truth).square().mean())
    assert len(parts) == len(target) == 2
    assert losses["attn"].item() == pytest.approx(sum(parts).item(), rel=1e-5)


# ---- invariants of the method ----------------------------------------------------------------
def test_a_teacher_equal_to_the_student_gives_no_attention_loss():
    teacher = small_teacher()
    model = small_student(teacher=teacher)
    model.encoder.load_state_dict(teacher.state_dict())
    with torch.no_grad():
        model.distillation.adapter.weight.copy_(torch.eye(3)[..., None, None])
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    images, ids_keep, ids_masked = step_inputs()
    target = model.distillation.target_maps(teacher, images, ids_keep)
    losses = model(images, ids_keep, ids_masked, target)
    assert losses["attn"].item() < 1e-12
    losses["loss"].backward()
    # DistributedDataParallel needs a gradient in every parameter
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())


def test_reconstruction_shapes_blocks_1_to_8_and_distillation_all_12():
    teacher = small_teacher()
    model = small_student(True, teacher)
    images, ids_keep, ids_masked = step_inputs()
    target = model.distillation.target_maps(teacher, images, ids_keep)
    losses = model(images, ids_keep, ids_masked, target)
    weights = [block.mlp.fc1.weight for block in model.encoder.blocks]
    options = dict(retain_graph=True, allow_unused=True)
    rec = torch.autograd.grad(losses["rec"], weights, **options)
    attn = torch.autograd.grad(losses["attn"], weights, **options)
    assert [g is not None and g.abs().sum() > 0 for g in rec] == [True] * 8 + [False] * 4
    assert all(g.abs().sum() > 0 for g in attn)
    losses["loss"].backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    foreign = ("encoder.blocks.12", "teacher")
    assert not any(name.startswith(foreign) for name in model.state_dict())


@pytest.mark.parametrize("model", [small_student(), small_hiera_student()], ids=["vit", "hiera"])
@torch.no_grad()
def test_masked_pixels_cannot_reach_the_encoder(model):
    size = model.encoder.img_size
    images, ids_keep, ids_masked = step_inputs(model.cells, 0.6, size)
    noise = 1e4 * torch.randn_like(model.masked_pixels(images, ids_masked))
    changed = P.paste(model, images, noise, ids_masked)
    taps = range(model.encoder.depth + 1)
    a, b = (model.encoder.forward_features(x, taps, ids_keep) for x in (images, changed))
    assert not torch.equal(images, changed) and all(torch.equal(a[t], b[t]) for t in taps)
    everything = model.encoder.forward_features(images, taps)
    assert a[taps[-1]].shape[1] < everything[taps[-1]].shape[1]


def test_the_teacher_runs_only_as_far_as_the_loss_reads():
    teacher = small_teacher()
    student = small_student(True, teacher)
    for module in (teacher.blocks[11], teacher.blocks[11].mlp, teacher.norm):
        module.forward = None    # would raise if called
    target = student.distillation.target_maps(teacher, torch.randn(1, 3, 32, 32), torch.tensor([[0, 3]]))
    assert target.shape == (1, 3, 3, 3) and not target.requires_grad


@pytest.mark.parametrize("model", [small_student(), small_hiera_student()], ids=["vit", "hiera"])
@torch.no_grad()
def test_a_perfect_prediction_gives_the_input_back(model):
    images, ids_keep, ids_masked = step_inputs(model.cells, 0.75, model.encoder.img_size)
    answer = model.target(images, ids_masked)
    model.forward_decoder = lambda latent, ids_keep, ids_masked: answer
    masked, filled = P.reconstruct(model, images, ids_keep, ids_masked)
    assert (filled - images).abs().max() < 1 / 255 and (masked == 0).float().mean() > 0.5


def test_schedule_matches_the_recipe():
    rates = [P.lr_at(step, 400, 40, 2.4e-3, 0.0) for step in range(401)]
    assert rates[0] == 0 and rates[20] == pytest.approx(1.2e-3) and rates[40] == 2.4e-3
    assert rates[220] == pytest.approx(1.2e-3) and rates[400] == pytest.approx(0, abs=1e-12)


# ---- data ------------------------------------------------------------------------------------
@pytest.fixture
def folder(tmp_path):
    """Flat and nested images."""
    nested = tmp_path / "data" / "a" / "b"
    nested.mkdir(parents=True)
    paths = [tmp_path / "data" / "0.png", nested.parent / "1.jpg"]
    paths += [nested / f"{i}.png" for i in range(9)]
    for i, path in enumerate(paths):
        Image.fromarray(toy.picture(i)[0]).save(path)
    return tmp_path / "data"


def dataset(folder, seed=0):
    return P.Images(P.list_images(folder), seed, 16, (32, 32), (0.08, 1.0))


def test_crops_and_masks_depend_on_seed_epoch_and_image_alone(folder):
    data = dataset(folder)
    keys = [[(epoch, i) for i in range(len(data))] for epoch in (0, 1)]
    plain = list(DataLoader(data, batch_sampler=keys))
    options = dict(num_workers=2, multiprocessing_context="spawn")
    spawned = list(DataLoader(data, batch_sampler=keys, **options))
    for a, b in zip(plain, spawned):
        assert all(torch.equal(x, y) for x, y in zip(a, b))
    noise = torch.cat([batch[1] for batch in plain])
    assert len(noise.unique(dim=0)) == 22    # differ by image and by epoch
    other = next(iter(DataLoader(dataset(folder, seed=1), batch_sampler=keys)))
    assert not torch.equal(other[1], plain[0][1])


def test_a_data_set_leaves_the_global_generator_alone(folder):
    torch.manual_seed(3)
    state = torch.get_rng_state()
    dataset(folder)[0, 0]
    assert torch.equal(torch.get_rng_state(), state)


def test_batches_are_the_same_for_any_number_of_processes_and_micro_batches():
    def batches(rank, world, accum):
        sampler = EpochSampler(range(22), 8, accum, 512, rank, world, seed=3)
        keys = []
        for epoch in (0, 1):
            sampler.set_epoch(epoch)
            keys += list(sampler)
        share = 8 // world
        return [keys[i:i + share] for i in range(0, len(keys), share)]
    whole = batches(0, 1, 1)
    assert [key[0] for batch in whole for key in batch] == [0] * 16 + [1] * 16
    assert len({index for batch in whole[:2] for _, index in batch}) == 16
    assert whole[0] != whole[2]
    dealt = [batches(rank, 2, 2) for rank in range(2)]
    for step in range(4):
        assert sorted(dealt[0][step] + dealt[1][step]) == sorted(whole[step])


def test_a_set_smaller_than_the_batch_makes_one_batch():
    assert EpochSampler(range(5), 8, 1, 512, 0, 2, 0).total_batch == 4
    with pytest.raises(InputError, match="--batch-size 9, for 22 items, must be a multiple of"):
        EpochSampler(range(22), 9, 1, 512, 0, 2, 0)


# ---- runs ------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A random MAE teacher of this project's own kind."""
    torch.manual_seed(1)
    model = build_model("vit_tiny", img_size=32, patch_size=8)
    path = tmp_path_factory.mktemp("teacher") / "encoder.pt"
    torch.save({"model": model.state_dict(), "arch": model.arch}, path)
    return path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder that holds train, 40 pictures, and val, 7."""
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(47):
        part = folder / ("train" if i < 40 else "val")
        part.mkdir(exist_ok=True)
        Image.fromarray(toy.picture(i)[0]).save(part / f"{i:02}.png")
    (folder / "train/._00.png").write_bytes(b"a hidden file is no data")
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory, teacher, pictures):
    """A D2-MAE run of four epochs of eight steps, beside one killed on the way."""
    options = [*QUICK, "--data", pictures, "--teacher", teacher, "--epochs", 4, "--log-every", 2,
               "--warmup-epochs", 1, "--batch-size", 5, "--base-lr", 0.05, "--eval-every", 2]
    folder = check_kill_and_resume(P, options, tmp_path_factory.mktemp("run"),
                                   lambda values: values["epoch"] == 3 and values["step"] >= 18)
    return folder, options


def test_a_killed_run_resumes_bit_for_bit_with_the_same_log(finished):
    lines = read_log(finished[0] / "log.jsonl")
    assert [(v["epoch"], v["step"]) for v in lines[-5:]] == [
        (4, 24), (4, 26), (4, 28), (4, 30), (4, 32)]
    assert [v["epoch"] for v in lines if "val_rec" in v] == [0, 2, 4]
    assert lines[0]["train_images"] == 40


def test_the_encoder_file_holds_twelve_blocks_and_no_more(finished):
    encoder = state_of(finished[0] / "encoder.pt")
    model = build_model("vit_nano", img_size=32, patch_size=8)
    assert encoder["model"].keys() == model.state_dict().keys()
    assert {"arch", "mean", "std", "args"} <= encoder.keys() and encoder["arch"]["num_heads"] == 3
    load_encoder(model, finished[0] / "last.pt")
    key = "blocks.11.mlp.fc2.weight"
    assert torch.equal(model.state_dict()[key], encoder["model"][key])


def test_a_run_draws_its_pictures_and_logs_what_users_ask_for(finished):
    for picture in ("reconstruction", "attention"):
        assert np.asarray(Image.open(finished[0] / f"{picture}.png")).std() > 10
    lines = read_log(finished[0] / "log.jsonl")
    assert lines[0]["args"]["batch_size"] == 5 and "commit" in lines[0]
    assert {"loss", "rec", "attn", "lr", "grad_norm", "step", "epoch"} == lines[2].keys()


def test_resume_takes_remedies_and_refuses_another_run(finished, pictures, tmp_path, capsys):
    folder, options = finished
    here(P, *options, "--out", f"{folder}/", "--clip-grad", 1, "--dtype", "bf16", "--base-lr", 0.01,
         "--crop-scale", 0.08, 1)
    assert "clip_grad is now 1.0, was 0.0" in capsys.readouterr().out
    Image.fromarray(toy.picture(0)[0]).save(tmp_path / "a.png")
    Image.fromarray(toy.picture(1)[0]).save(tmp_path / "b.png")
    with pytest.raises(InputError, match="epochs is now 5, was 4; batch_size is now 1, was 5; train"):
        here(P, *options, "--epochs", 5, "--data", tmp_path, "--batch-size", 1, "--out", folder)


def test_a_finished_run_writes_a_missing_encoder_again(finished, capsys):
    folder, options = finished
    before = state_of(folder / "encoder.pt")["model"]
    (folder / "encoder.pt").unlink()
    here(P, *options, "--out", folder)
    assert "4 of 4 epochs are finished" in capsys.readouterr().out
    after = state_of(folder / "encoder.pt")["model"]
    assert all(torch.equal(before[k], after[k]) for k in before)


@pytest.mark.parametrize("model, patch", [("vit_huge", 14), ("vit_tiny", 16)])
def test_patches_are_those_of_the_model(model, patch):
    assert build_model(model).patch_size == patch


def test_a_small_student_has_the_authors_decoder():
    args = P.resolve(P.parse_args([*MAE, "--model", "vit_small", "--image-size", "32"]))
    student, _ = P.build_student(args)
    assert student.encoder.blocks[0].attn.num_heads == 12
    assert student.decoder_embed.weight.shape == (192, 384) and len(student.decoder_blocks) == 1
    assert student.decoder_blocks[0].attn.num_heads == 6


def test_two_processes_equal_one_with_accumulation(tmp_path, teacher, pictures, capsys):
    command = [SCRIPT, *QUICK, "--data", pictures, "--teacher", teacher, "--epochs", 2,
               "--warmup-epochs", 0, "--batch-size", 16, "--base-lr", 4e-3]
    here(P, *command[1:], "--accum-steps", 2, "--out", tmp_path / "one")
    done = run(*command, "--out", tmp_path / "two", torchrun=2)
    assert "batch 16 = 8 x 2 process(es) x 1 micro-batches of at most 512" in done.stdout
    assert same_weights(tmp_path / "one", tmp_path / "two", 1e-4)
    one, two = (read_log(tmp_path / name / "log.jsonl")[1:] for name in ("one", "two"))
    assert [v["step"] for v in one] == [v["step"] for v in two] == [0, 0, 4]
    names = {"lr", "grad_norm", "loss", "rec", "attn", "val_rec", "val_attn", "val_images"}
    for a, b in zip(one, two):
        assert all(a[k] == pytest.approx(b[k], rel=1e-3) for k in a.keys() & names)
    # the same command with other numbers of processes and micro-batches
    here(P, *command[1:], "--accum-steps", 4, "--out", tmp_path / "two")
    assert "accum_steps is now 4, was None" in capsys.readouterr().out


def test_two_processes_leave_blocks_alone_that_the_decoder_does_not_read(tmp_path, pictures):
    command = [SCRIPT, *QUICK, *MAE, "--decoder-tap", 3, "--data", pictures, "--epochs", 2,
               "--warmup-epochs", 0, "--batch-size", 16, "--base-lr", 4e-3]
    run(*command, "--out", tmp_path / "two", torchrun=2)
    here(P, *command[1:], "--accum-steps", 2, "--out", tmp_path / "one")
    assert same_weights(tmp_path / "one", tmp_path / "two", 1e-4)


def test_a_loss_that_turns_nan_ends_in_one_sentence_and_last_pt_stays_good(tmp_path, pictures):
    command = [SCRIPT, *QUICK, *MAE, "--data", pictures, "--warmup-epochs", 0, "--batch-size", 8,
               "--out", tmp_path]
    here(P, *command[1:], "--epochs", 1, "--base-lr", 1e-4)
    file = state_of(tmp_path / "last.pt")
    file["args"]["epochs"] = 2
    torch.save(file, tmp_path / "last.pt")
    done = run(*command, "--epochs", 2, "--base-lr", 1e30, torchrun=2, check=False)
    assert done.returncode != 0 and "Traceback" not in done.stderr.split("exitcode")[0]
    assert len(re.findall(r"error: the (?:loss in epoch 2|sum of the weights) is not finite",
                          done.stderr)) == 1
    assert all(w.isfinite().all() for w in state_of(tmp_path / "last.pt")["model"].values())


@pytest.mark.parametrize("options", [["--model", "hiera_tiny", "--image-size", 64],
                                     ["--dtype", "bf16", "--clip-grad", 1, "--no-norm-pix"]])
def test_other_ways_to_train(tmp_path, options, pictures, capsys):
    quick = QUICK[:2] + QUICK[4:] if "hiera_tiny" in options else QUICK
    here(P, *quick, "--method", "mae", "--data", pictures, "--epochs", 1, "--batch-size", 20,
         "--out", tmp_path, *options)
    assert "epoch 1: held-out reconstruction loss" in capsys.readouterr().out
    file = state_of(tmp_path / "last.pt")
    assert file["args"]["norm_pix"] is ("--no-norm-pix" not in options)


def test_a_run_that_learns_nothing_says_so_at_its_start_and_end(tmp_path, pictures, capsys):
    here(P, *QUICK, *MAE, "--data", pictures, "--epochs", 1, "--batch-size", 8, "--base-lr", 0,
         "--out", tmp_path)
    said = capsys.readouterr().out
    assert "5 steps, peak lr 0: a model learns little in fewer than 1,000 steps" in said
    assert "; 75% of the 16 patches or mask units are masked" in said
    assert said.count("that is no better than the mean, see 'Your own images'") == 1


def test_a_compiled_run_saves_names_without_a_prefix(tmp_path, pictures):
    with torch.compiler.set_stance("force_eager"):    # its names, not its compilation
        here(P, *QUICK, "--method", "mae", "--data", pictures, "--epochs", 1, "--batch-size", 40,
             "--out", tmp_path, "--compile")
    names = state_of(tmp_path / "last.pt")["model"]
    assert not any("_orig_mod" in name or "module" in name for name in names)


def test_a_hiera_student_learns_from_a_hiera_teacher(tmp_path, pictures):
    torch.manual_seed(0)
    teacher = build_model("hiera_base", img_size=64, q_pool=2)
    torch.save({"model_state": teacher.state_dict()}, tmp_path / "hiera.pth")
    here(P, "--data", pictures, "--image-size", 64, "--model", "hiera_tiny", "--method", "d-mae",
         "--workers", 0, "--teacher", tmp_path / "hiera.pth", "--device", "cpu", "--epochs", 1,
         "--batch-size", 40, "--out", tmp_path / "out")
    assert read_log(tmp_path / "out" / "log.jsonl")[-1]["val_attn"] > 0


def test_training_replays_the_shipped_log(tmp_path):
    """tests/reference_log.jsonl is this run as first made; a change of the numbers shows here."""
    toy.write_images(tmp_path / "data", 768, 64)
    here(P, *QUICK, "--method", "mae", "--data", tmp_path / "data", "--epochs", 1,
         "--warmup-epochs", 0.5, "--batch-size", 64, "--base-lr", 4e-3, "--log-every", 1, "--out",
         tmp_path)
    ours = read_log(tmp_path / "log.jsonl")
    shipped = read_log(ROOT / "tests" / "reference_log.jsonl")
    assert len(ours) == len(shipped) and ours[-1]["val_rec"] < ours[1]["val_rec"]
    for a, b in zip(ours[1:], shipped[1:]):
        names = {"step", "rec", "lr", "val_rec", "val_base"} & b.keys()
        assert all(a[k] == pytest.approx(b[k], rel=1e-2) for k in names)


# ---- bad input -------------------------------------------------------------------------------
MAE = ["--method", "mae"]


@pytest.mark.parametrize("options, match", [
    (["--teacher", "nothing.pth"], "nothing.pth does not exist"),
    ([], "--method d2-mae needs a teacher: .*--teacher FILE"),
    ([*MAE, "--teacher", "T"], "mae has no teacher"),
    ([*MAE, "--data", "no/such/folder"], "no/such/folder is not a folder"),
    ([*MAE, "--data", ".ci"], "holds no image"),
    (["--teacher", "T", "--model", "hiera_tiny", "--image-size", 64], "d2-mae, .* are for ViT"),
    ([*MAE, "--model", "hiera_tiny", "--decoder-tap", 3], "--decoder-tap, .* are for ViT"),
    (["--teacher", "T", "--model", "hiera_tiny", "--method", "d-mae", "--image-size", 64],
     "patch size has no effect on hiera_tiny"),
    ([*MAE, "--model", "hiera_tiny", "--image-size", 100], "patch size has no effect on hiera"),
    ([*MAE, "--image-size", 100], r"100 x 100 is not a multiple of 8 .* size is \(96, 96\)"),
    (["--teacher", "T", "--patch-size", 16], r"has \(4, 4\) tokens, the student \(2, 2\)"),
    (["--teacher", "T", "--decoder-tap", 13], r"among the 12 blocks"),
    (["--teacher", "T", "--distill-layers", 6], "d2-mae needs the last one"),
    (["--teacher", "T", "--distill-layers", 13], r"among the blocks 1..12"),
    (["--teacher", "N", "--method", "d-mae", "--distill", "hidden"], "lacks the final norm"),
    ([*MAE, "--batch-size", 6, "--accum-steps", 4], "must be a multiple of .* = 4"),
    ([*MAE, "--device", "mps"], "--device mps is not available"),
    ([*MAE, "--mask-ratio", 0.99], "must leave visible and masked"),
    ([*MAE, "--crop-scale", 1, 0.5], "--crop-scale takes the smaller number first"),
    ([*MAE, "--epochs", 20, "--warmup-epochs", 20], "fewer than --epochs 20"),
])
def test_bad_options_end_in_one_sentence(options, match, tmp_path, teacher, pictures):
    state = {k: v for k, v in state_of(teacher)["model"].items() if not k.startswith("norm.")}
    torch.save(state, tmp_path / "no_norm.pth")
    files = {"T": teacher, "N": tmp_path / "no_norm.pth"}
    with pytest.raises(InputError, match=match) as error:
        here(P, *QUICK, "--data", pictures, "--out", tmp_path, *(files.get(option, option) for option in options))
    assert "\n" not in str(error.value)


def test_a_teacher_of_another_kind_is_refused(teacher, tmp_path):
    with pytest.raises(InputError, match=r"is not a hiera model: choose another"):
        here(P, "--teacher", teacher, "--model", "hiera_tiny", "--method", "d-mae", "--image-size",
             64, "--device", "cpu", "--out", tmp_path)


@pytest.mark.parametrize("options, match", [
    (["--mask-ratio", "1.5"], "--mask-ratio: 1.5 must lie in"),
    (["--accum-steps", "0"], r"--accum-steps: 0 must lie in \[1, inf\]"),
    (["--base-lr", "nan"], "--base-lr: nan must lie in"),
    (["--seed", "5000000000"], "--seed: 5000000000 must lie in"),
    (["--std", "0", "0", "0"], "--std: 0 must lie in"),
    (["--mean", "123.675", "116.28", "103.53"], "--mean: 123.675 must lie in"),
    (["--betas", "0.9", "1"], "unrecognized arguments"),
    (["--image-size", "32", "32", "32"], "takes a side, or height and width, not 3 numbers"),
])
def test_numbers_out_of_range_are_refused_by_the_command_line(options, match, capsys):
    with pytest.raises(SystemExit):
        P.parse_args(options)
    assert re.search(match, capsys.readouterr().err)


def test_a_corrupt_image_ends_both_processes_with_one_sentence(tmp_path, folder):
    whole = (folder / "a/1.jpg").read_bytes()
    (folder / "a/cut.jpg").write_bytes(whole[:len(whole) // 2])
    command = [SCRIPT, *MAE, "--data", folder, "--image-size", 32, "--patch-size", 8, "--model",
               "vit_nano", "--batch-size", 4, "--workers", 1, "--device", "cpu", "--epochs", 2]
    started = time.perf_counter()
    done = run(*command, "--out", tmp_path / "out", check=False, torchrun=2)
    assert done.returncode == 1 and time.perf_counter() - started < 30
    own = done.stderr.split("exitcode")[0]    # torchrun adds its own report and traceback
    assert "Traceback" not in own
    sentences = re.findall(r"error: cannot read image \S+cut.jpg .*tests/tools/check.py lists", own)
    assert len(sentences) == 1


def test_what_a_run_wrote_is_no_data(folder, capsys):
    """The pictures of a run with --out below --data are not learned when it is resumed."""
    options = [*QUICK, *MAE, "--data", folder, "--batch-size", 4, "--out", folder / "out"]
    here(P, *options, "--epochs", 1)
    assert (folder / "out/reconstruction.png").exists()
    here(P, *options, "--epochs", 1)
    assert "1 of 1 epochs are finished" in capsys.readouterr().out
    assert read_log(folder / "out/log.jsonl")[0]["train_images"] == 10    # of 11, one held out


def test_the_root_of_ade20k_is_no_folder_of_images(folder, tmp_path):
    (folder / "annotations").mkdir()
    with pytest.raises(InputError, match="holds annotations beside its images: give .*training"):
        here(P, *QUICK, *MAE, "--data", folder, "--out", tmp_path / "out")


class Frozen(Namespace):
    def __setattr__(self, name, value):
        raise AttributeError(f"args.{name} is written after resolve")


def freeze(args):
    frozen = Frozen()
    vars(frozen).update(vars(args))
    return frozen


@pytest.mark.parametrize("options", [["--method", "mae"], ["--teacher", "T"]])
def test_options_are_read_only_once_they_are_resolved(options, teacher, pictures, tmp_path,
                                                      monkeypatch):
    resolve = P.resolve
    monkeypatch.setattr(P, "resolve", lambda args: freeze(resolve(args)))
    options = [teacher if option == "T" else option for option in options]
    here(P, *QUICK, *options, "--data", pictures, "--epochs", 1, "--batch-size", 20, "--out",
         tmp_path)
    with pytest.raises(AttributeError, match="args.seed is written after resolve"):
        freeze(P.parse_args([])).seed = 1


def test_the_encoder_of_a_seed_is_the_same_for_every_method(teacher):
    states = []
    for options in (["--method", "mae"], ["--method", "d-mae"], [],
                    ["--distill", "hidden", "--distill-layers", "6", "12"]):
        if options != ["--method", "mae"]:
            options = [*options, "--teacher", str(teacher)]
        torch.manual_seed(5)
        args = P.resolve(P.parse_args([*map(str, QUICK), *options]))
        student, _ = P.build_student(args)
        states.append({k: v for k, v in student.state_dict().items() if "distillation" not in k})
    for state in states[1:]:
        assert state.keys() == states[0].keys()
        assert all(torch.equal(v, states[0][k]) for k, v in state.items())


def test_a_teacher_may_be_any_module(pictures):
    """The interface in the docstring of Distillation is all that is read."""
    teacher = small_teacher()

    class Block(nn.Module):
        attn = Namespace(num_heads=3)

    class Foreign(nn.Module):
        depth, blocks = 12, [Block()]

        def forward_features(self, images, taps, ids_keep):
            return teacher.forward_features(images, taps, ids_keep)

        def attention_map(self, x, k):
            return teacher.attention_map(x, k)

    images, ids_keep, ids_masked = step_inputs()
    model = small_student(True, Foreign())
    target = model.distillation.target_maps(Foreign(), images, ids_keep)
    assert model(images, ids_keep, ids_masked, target)["attn"].isfinite()


def test_help_needs_neither_data_nor_device(capsys):
    with pytest.raises(SystemExit) as stop:
        P.parse_args(["--help"])
    assert stop.value.code == 0 and "--mask-ratio" in capsys.readouterr().out


def test_defaults_are_the_papers_recipe(tmp_path):
    args = P.resolve(P.parse_args(["--teacher", "x"]))
    recipe = dict(epochs=400, warmup_epochs=40, batch_size=4096, base_lr=1.5e-4, weight_decay=0.05,
                  betas=(0.9, 0.95), alpha=1.0, clip_grad=0, mask_ratio=0.75,
                  crop_scale=[0.08, 1.0], norm_pix=True)
    assert {k: getattr(args, k) for k in recipe} == recipe
    file = build_model("vit_base")
    torch.save(file.state_dict(), tmp_path / "teacher.pth")
    args = P.resolve(P.parse_args(["--teacher", str(tmp_path / "teacher.pth")]))
    student, teacher = P.build_student(args)
    assert student.decoder_tap == 8 and student.taps == {8, 12} and teacher.depth == 12
    assert type(student.distillation) is Distillation
    assert student.distillation.adapter.weight.shape == (12, 12, 1, 1)
    hiera = P.resolve(P.parse_args(["--method", "mae", "--model", "hiera_tiny"]))
    assert hiera.mask_ratio == 0.4


def test_warm_up_that_is_not_given_scales_with_the_run():
    assert P.resolve(P.parse_args([*MAE, "--epochs", "20"])).warmup_epochs == 2
