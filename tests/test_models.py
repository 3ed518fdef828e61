"""Encoders against golden numbers and peers, and every checkpoint format that users bring."""
import argparse
import io
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import rel_error, run, seed_weights, seeded, state_of
from PIL import Image
from torch import nn

import models
from models import (Attention, Hiera, InputError, RelativeVisionTransformer, VisionTransformer,
                    build_model, layer_id, list_images, load_encoder, normalize, open_image,
                    param_groups, random_crop, read_encoder, read_log, reroll, resize_grid, unroll)
from pretrain_d2mae import sincos_2d

ROOT = Path(__file__).resolve().parents[1]
SMALL = dict(img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=3)


def read_image(path):
    return models.pil_to_tensor(open_image(path))


def small_vit(kind=VisionTransformer, **kwargs):
    torch.manual_seed(0)
    return kind(**{**SMALL, **kwargs}).eval()


def small_hiera(**kwargs):
    torch.manual_seed(0)
    options = dict(img_size=64, embed_dim=8, num_heads=1, stages=(1, 1, 2, 1))
    return Hiera(**{**options, **kwargs}).eval()


def test_a_classifier_of_the_paper_in_two_lines():
    vit = build_model("vit_tiny", num_classes=1000)
    assert vit(normalize(torch.zeros(1, 3, 224, 224, dtype=torch.uint8))).shape == (1, 1000)


# ---- golden numbers ------------------------------------------------------------------------------
@pytest.mark.parametrize("key, name, options", [
    ("vit_tiny", "vit_tiny", {}),
    ("vit_tiny_rpe", "vit_tiny", {"rel_pos_bias": True}),
    ("hiera_tiny", "hiera_tiny", {})])
@torch.no_grad()
def test_classifiers_match_golden(golden, key, name, options):
    model = seed_weights(build_model(name, num_classes=1000, **options))
    images = seeded((2, 3, 224, 224), "images")
    assert sum(p.numel() for p in model.parameters()) == golden[f"{key}/params"]
    assert rel_error(model(images)[:, :32], golden[f"{key}/logits"]) < 1e-4
    if key == "vit_tiny_rpe":
        attention = model.blocks[0].attn
        assert (attention.index[:20, :20].numpy() == golden["vit_tiny_rpe/index_corner"]).all()
        assert attention.index.sum() == golden["vit_tiny_rpe/index_sum"]
        assert len(attention.relative_position_bias_table) == golden["vit_tiny_rpe/table_rows"]
    if key == "hiera_tiny":
        for i, stage in enumerate(model.feature_maps(images, model.stage_ends)):
            stage = stage.permute(0, 2, 3, 1)
            assert tuple(stage.shape) == tuple(golden[f"hiera_tiny/stage{i}_shape"])
            assert rel_error(stage[:, :3, :3, :8], golden[f"hiera_tiny/stage{i}"]) < 1e-4
            assert rel_error(stage.abs().mean(), golden[f"hiera_tiny/stage{i}_abs_mean"]) < 1e-5


# ---- attention, tokens, positions ----------------------------------------------------------------
@pytest.mark.parametrize("relative", [False, True])
@torch.no_grad()
def test_fused_attention_equals_the_map_it_could_have_formed(relative):
    torch.manual_seed(0)
    attn, x = Attention(24, 3), torch.randn(2, 17, 24)
    if relative:
        attn = models.RelativeAttention(24, 3, models.relative_position_index((4, 4)))
        attn.relative_position_bias_table.normal_()
    probs = attn.logits(x).softmax(-1)
    v = attn.qkv(x).view(2, 17, 3, 3, 8)[:, :, 2].transpose(1, 2)
    explicit = attn.proj((probs @ v).transpose(1, 2).reshape(2, 17, 24))
    assert torch.allclose(attn(x), explicit, atol=1e-5)
    assert torch.allclose(probs.sum(-1), torch.ones(2, 3, 17), atol=1e-6)


@torch.no_grad()
def test_vit_on_a_subset_equals_embedding_all_and_picking():
    model, images = small_vit(img_size=(32, 48)), torch.randn(2, 3, 32, 48)
    ids = torch.stack([torch.randperm(24)[:7] for _ in range(2)])
    everything = model.embed(images)
    picked = torch.stack([torch.cat([e[:1], e[1:][i]]) for e, i in zip(everything, ids)])
    assert torch.allclose(model.embed(images, ids), picked, atol=1e-6)
    conv = model.patch_embed.proj(images).flatten(2).transpose(1, 2)    # owner of the weights
    assert torch.allclose(model.patch_embed(images), conv, atol=1e-5)


def test_features_stop_at_the_last_tap_and_forward_is_deterministic():
    model, images = small_vit(num_classes=5), torch.randn(1, 3, 32, 32)
    model.blocks[2].forward = None    # would fail if it were run
    assert set(model.forward_features(images, (0, 2))) == {0, 2}
    model = small_vit(num_classes=5)
    assert torch.equal(model(images), model(images)) and model.embed(images).shape[1] == 17


@torch.no_grad()
def test_unroll_pools_and_rerolls():
    raster = torch.arange(16.).view(1, 1, 4, 4)
    one_round = unroll(raster, rounds=1).flatten().tolist()
    in_docstring = [0, 2, 8, 10, 1, 3, 9, 11, 4, 6, 12, 14, 5, 7, 13, 15]
    assert one_round == in_docstring
    raster = torch.randn(2, 3, 16, 24)
    tokens = unroll(raster)
    assert tokens.shape == (2, 16 * 24, 3) and torch.equal(reroll(tokens, (2, 3)), raster)
    pooled = reroll(tokens.unflatten(1, (4, -1)).amax(1), (2, 3))
    assert torch.equal(pooled, nn.functional.max_pool2d(raster, 2))


def test_hiera_maps_are_in_raster_order():
    model = small_hiera(img_size=(64, 96))
    images = torch.randn(1, 3, 64, 96, requires_grad=True)
    # mask-unit attention: only the pixels of the unit and of the convolution's margin matter
    for stage, level in zip(model.feature_maps(images, (1, 2)), (4, 8)):
        (grad,) = torch.autograd.grad(stage[0, :, 0, -1].sum(), images, retain_graph=True)
        assert grad[..., :32, 64:].abs().sum() > 0 and stage.shape[2:] == (64 // level, 96 // level)
        assert grad[..., 40:, :].abs().sum() == 0 and grad[..., :48].abs().sum() == 0
    shapes = [tuple(f.shape[2:]) for f in model.feature_maps(images, model.stage_ends)]
    assert shapes == [(16, 24), (8, 12), (4, 6), (2, 3)]


@pytest.mark.parametrize("size", [112, 120, (224, 200)])
def test_hiera_refuses_sizes_it_cannot_unroll(size):
    with pytest.raises(InputError, match="nearest valid size is"):
        build_model("hiera_tiny", img_size=size)


def test_sizes_and_position_tables(tmp_path):
    table = sincos_2d(24, (4, 4))[:, 1:]
    assert torch.equal(resize_grid(table, (4, 4), (4, 4)), table)
    model = small_vit(RelativeVisionTransformer)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.relative_position_bias_table.normal_()
    torch.save({"model": model.state_dict(), "arch": model.arch}, tmp_path / "own.pt")
    same = small_vit(RelativeVisionTransformer)
    load_encoder(same, tmp_path / "own.pt")
    pairs = zip(model.state_dict().values(), same.state_dict().values())
    assert all(torch.equal(a, b) for a, b in pairs)
    for size in (*range(8, 88, 8), (16, 64), (40, 24)):    # every multiple, non-square too
        other = small_vit(RelativeVisionTransformer, img_size=size)
        load_encoder(other, tmp_path / "own.pt")
        assert torch.equal(other.pos_embed[:, 0], model.pos_embed[:, 0])    # class row untouched
        tables = [m.blocks[0].attn.relative_position_bias_table for m in (other, model)]
        assert torch.equal(tables[0][-3:], tables[1][-3:])
        assert other(torch.randn(1, 3, *other.img_size)).isfinite().all()
    torch.save({"model": other.state_dict(), "arch": other.arch}, tmp_path / "wide.pt")
    load_encoder(small_vit(RelativeVisionTransformer), tmp_path / "wide.pt")    # from a non-square one
    with pytest.raises(InputError, match="image size 30 x 30 is not a multiple of 8 pixels"):
        small_vit(img_size=30)


def test_normalize_is_imagenet_statistics():
    images = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8)
    for channel, (mean, std) in enumerate(zip(models.IMAGENET_MEAN, models.IMAGENET_STD)):
        slow = (images[:, channel] / 255 - mean) / std
        assert torch.allclose(normalize(images)[:, channel], slow, atol=1e-6)


@pytest.mark.parametrize("name", ["vit_tiny", "hiera_tiny"])
def test_torch_export_of_a_classifier_with_a_dynamic_batch(name):
    model = build_model(name, img_size=64, num_classes=10).eval()
    batch = torch.export.Dim("batch")
    exported = torch.export.export(model, (torch.randn(2, 3, 64, 64),),
                                   dynamic_shapes=({0: batch},)).module()
    for n in (1, 5):
        images = torch.randn(n, 3, 64, 64)
        assert torch.allclose(exported(images), model(images), atol=1e-5)


def test_layer_ids_follow_block_order():
    model = build_model("vit_tiny", num_classes=10)
    ids = {name: layer_id(name, 12) for name, _ in model.named_parameters()}
    assert {ids[k] for k in ("cls_token", "pos_embed", "patch_embed.proj.weight")} == {0}
    assert ids["blocks.0.norm1.weight"] == 1 and ids["blocks.11.mlp.fc2.bias"] == 12
    assert ids["head.weight"] == ids["fc_norm.bias"] == 13


# ---- checkpoints ---------------------------------------------------------------------------------
def hugging_face_names(state):
    table = {"cls_token": "embeddings.cls_token", "pos_embed": "embeddings.position_embeddings",
             "norm.weight": "layernorm.weight", "norm.bias": "layernorm.bias",
             "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
             "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias"}
    parts = {"norm1": "layernorm_before", "norm2": "layernorm_after",
             "attn.proj": "attention.output.dense", "mlp.fc1": "intermediate.dense",
             "mlp.fc2": "output.dense"}
    out = {}
    for key, value in state.items():
        if key in table:
            out[table[key]] = value
            continue
        _, number, *module, kind = key.split(".")
        module, stem = ".".join(module), f"encoder.layer.{number}."
        if module == "attn.qkv":
            for part, v in zip(("query", "key", "value"), value.chunk(3)):
                out[f"{stem}attention.attention.{part}.{kind}"] = v
        else:
            out[f"{stem}{parts[module]}.{kind}"] = value
    return out


DECODER = {"mask_token": torch.zeros(1, 1, 8), "decoder_embed.weight": torch.zeros(8, 24),
           "decoder_blocks.0.attn.qkv.weight": torch.zeros(24, 8)}


def prefixed(state, prefix):
    return {prefix + k: v for k, v in state.items()}


def pooled_names(state):
    return {k.replace("norm.", "fc_norm.") if k.startswith("norm.") else k: v
            for k, v in state.items()}


def distilled(state):
    """A file of the authors: student, teacher and adapter side by side."""
    return {**prefixed(state, "module.model."), **prefixed(state, "module.tch_model."),
            "module.model.blocks.12.norm1.weight": torch.ones(24),
            "module.attn_adapter.adapter12.weight": torch.ones(3, 3, 1, 1)}


def two_encoders(state):
    return {**prefixed(state, "module.base_encoder."),
            **prefixed(state, "module.momentum_encoder.")}


def separate_biases(state):
    """The names of BEiT and of the authors: biases of q and v alone, k has none."""
    out = {}
    for key, value in state.items():
        if key.endswith("attn.qkv.bias"):
            out[key.replace("qkv.bias", "q_bias")], _, out[key.replace("qkv.bias", "v_bias")] = (
                value.chunk(3))
        else:
            out[key] = value
    return out


FORMATS = {
    "bare": lambda s: s,
    "mae": lambda s: {"model": s},
    "mae training file": lambda s: {"model": {**s, **DECODER}, "epoch": 3, "optimizer": {},
                                    "args": argparse.Namespace(lr=1)},
    "mae-lite": lambda s: {"model": prefixed({**s, **DECODER}, "model.")},
    "ddp and compile": lambda s: {"model": prefixed(s, "module._orig_mod.")},
    "moco-v3": lambda s: {"arch": "vit_base", "epoch": 300, "state_dict": two_encoders(s)},
    "timm pooled": pooled_names,
    "hugging face": hugging_face_names,
    "hugging face pre-training": lambda s: {**prefixed(hugging_face_names(s), "vit."),
                                            "decoder.mask_token": torch.zeros(1)},
    "separate q and v biases": separate_biases,
    "training file with averages": lambda s: {
        "model": s, "optimizer": {"state": {}, "param_groups": []},
        **{name: {k: 0 * v for k, v in s.items()} for name in ("ema", "model_ema", "ema_model")}},
    "dino": lambda s: {name: prefixed({**s, "head.mlp.0.weight": torch.zeros(2, 24)}, start)
                       for name, start in (("teacher", "backbone."),
                                           ("student", "module.backbone."))},
    "own, stored before relative positions": lambda s: {
        "model": s, "arch": {**small_vit().arch, "rel_pos_bias": False}},
    "own": lambda s: {"model": s, "arch": small_vit().arch, "mean": [0.5] * 3},
    "own last.pt": lambda s: {"model": {**prefixed(s, "encoder."), **DECODER},
                              "arch": small_vit().arch},
}


def test_the_student_of_a_distilled_file_without_its_13th_block(tmp_path):
    source, target = seed_weights(small_vit(depth=12)), small_vit(depth=12)
    torch.save({"model": distilled(source.state_dict())}, tmp_path / "file.pth")
    load_encoder(target, tmp_path / "file.pth")
    assert all(torch.equal(v, target.state_dict()[k]) for k, v in source.state_dict().items())


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_weights(name, tmp_path, capsys):
    source, target = seed_weights(small_vit()), small_vit()
    if name == "separate q and v biases":
        for block in source.blocks:
            block.attn.qkv.bias.data[24:48] = 0
    torch.save(FORMATS[name](source.state_dict()), tmp_path / "file.pth")
    load_encoder(target, tmp_path / "file.pth")
    assert all(torch.equal(v, target.state_dict()[k]) for k, v in source.state_dict().items())
    assert "loaded" in capsys.readouterr().out


def test_hiera_file_and_classifier_keep_only_what_belongs_downstream(tmp_path, capsys):
    source, target = seed_weights(small_hiera(q_pool=2)), small_hiera(num_classes=4, img_size=96)
    head = target.head.projection.weight.clone()
    state = {**source.state_dict(), **DECODER, "encoder_norm.weight": torch.ones(64),
             "multi_scale_fusion_heads.0.weight": torch.ones(1)}
    torch.save({"model_state": state}, tmp_path / "mae_hiera.pth")
    load_encoder(target, tmp_path / "mae_hiera.pth")
    assert torch.equal(target.blocks[4].attn.qkv.weight, source.blocks[4].attn.qkv.weight)
    assert torch.equal(target.head.projection.weight, head) and target.pos_embed.shape[1] == 24 * 24
    assert "loaded 69 tensors; 4 left at initialisation" in capsys.readouterr().out


def test_safetensors_or_a_clear_message(tmp_path):
    source, target = seed_weights(small_vit()), small_vit()
    try:
        from safetensors.torch import save_file
    except ImportError:
        (tmp_path / "model.safetensors").write_bytes(b"0" * 100)
        with pytest.raises(InputError, match="safetensors"):
            load_encoder(target, tmp_path / "model.safetensors")
        return
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    load_encoder(target, tmp_path / "model.safetensors")
    assert torch.equal(target.cls_token, source.cls_token)


class Arbitrary:
    pass


def test_files_that_must_be_refused(tmp_path):
    state = small_vit().state_dict()
    path = tmp_path / "bad.pth"

    def refused(file, match, model=None):
        path.unlink(missing_ok=True)
        path.write_bytes(file) if isinstance(file, bytes) else torch.save(file, path)
        with pytest.raises(InputError, match=match) as error:
            load_encoder(model or small_vit(), path)
        assert str(path) in str(error.value)

    with pytest.raises(InputError, match="does not exist"):
        load_encoder(small_vit(), tmp_path / "nothing.pth")
    lost = "blocks.1.attn.qkv.weight"
    refused({k: v for k, v in state.items() if k != lost}, lost)
    refused({"model": DECODER}, r"no ViT or Hiera encoder.*prefixes \[\]")
    refused({"model": state, "extra": Arbitrary()}, "Arbitrary.*re-save")
    refused(b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS pointer")
    refused(b"<!DOCTYPE html><html>", "HTML page")
    for damaged in (b"PK\x03\x04 but cut short", b"", b"\x89PNG\r\n", b"plain text"):
        refused(damaged, "not a readable PyTorch")
    no_key = {k: v for k, v in hugging_face_names(state).items()
              if "layer.1.attention.attention.key.weight" not in k}
    refused(no_key, lost)
    refused({"model": state, "arch": {**small_vit().arch, "num_heads": 6}},
            "num_heads is 6 in the file, 3 in the model")
    refused({**state, "cls_token": torch.zeros(1, 1, 32)}, r"cls_token is \(1, 1, 32\) in the file")
    refused(VisionTransformer(**{**SMALL, "depth": 6}).state_dict(), "depth is 6 in the file, 3 in the model")
    refused(small_vit(RelativeVisionTransformer).state_dict(), "relative_position_bias_table")
    refused({**state, "pos_embed": torch.zeros(1, 18, 24)}, "also of its image size")
    refused({**prefixed(state, "a."), **prefixed(state, "b.")}, r"several: .*\['.a.', '.b.'\]")
    refused({**state, "dist_token": torch.zeros(1, 1, 24)}, "dist_token")
    refused({**state, "patch_embed.proj.weight": torch.zeros(24, 3, 2, 8, 8)}, r"\(24, 3, 2, 8, 8\) in the file")
    refused({k: v for k, v in state.items() if k != "pos_embed"}, r"pos_embed.*\(not for videos\)")
    refused([state], "not a readable PyTorch")
    refused(state["cls_token"], "not a readable PyTorch")
    refused({**state, "pos_embed": torch.zeros(1, 15, 24)}, "also of its image size")
    refused({**state, lost: torch.full_like(state[lost], torch.nan)}, f"{lost} is NaN or infinite in")


class ScaledBlock(models.Block):
    """A block with LayerScale, under timm's names."""

    def __init__(self, dim, *options):
        super().__init__(dim, *options)
        self.ls1, self.ls2 = (nn.ParameterDict({"gamma": torch.ones(dim)}) for _ in range(2))

    def forward(self, x):
        x = x + self.ls1.gamma * self.attn(self.norm1(x))
        return x + self.ls2.gamma * self.mlp(self.norm2(x))


def test_a_segmenters_encoder_loads_with_its_layer_scale_folded(tmp_path):
    source = seed_weights(small_vit(block=ScaledBlock))
    plain = small_vit()
    torch.save({"model": prefixed(source.state_dict(), "encoder.")}, tmp_path / "best.pt")
    load_encoder(plain, tmp_path / "best.pt")
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert rel_error(plain(images), source(images)) < 1e-5


def test_a_classifier_keeps_the_final_norm_of_supervised_files_alone(tmp_path):
    source = seed_weights(small_vit())
    for head in ({}, {"head.weight": torch.ones(5, 24), "head.bias": torch.ones(5)}):
        torch.save({"model": {**source.state_dict(), **head}}, tmp_path / "file.pth")
        target = small_vit(num_classes=7)
        load_encoder(target, tmp_path / "file.pth")
        expected = source.norm.weight if head else torch.ones(24)
        assert torch.equal(target.fc_norm.weight, expected)


def geometric_places(old, new):
    """Distances 1, 1 + q, ... up to new - 1 on both sides of 0, by scanning q."""
    def places(q):
        return np.cumsum(q ** np.arange(old - 1))
    qs = np.linspace(0.1, 3, 2_000_001)
    q = qs[np.argmin(abs(sum(qs ** k for k in range(old - 1)) - (new - 1)))]
    return np.concatenate([-places(q)[::-1], [0], places(q)])


@pytest.mark.parametrize("old, new", [(6, 14), (14, 32)])
def test_relative_tables_are_resized_by_splines_on_a_geometric_grid(old, new):
    """As BEiT and mmsegmentation do by scipy's interpolation of a regular grid."""
    interpolate = pytest.importorskip("scipy.interpolate")
    table = np.random.default_rng(0).standard_normal(((2 * old - 1) ** 2 + 3, 2))
    ours = models.resize_relative_table(torch.from_numpy(table).float(), (old, old), (new, new))
    places = geometric_places(old, new)
    grid = table[:-3].reshape(2 * old - 1, 2 * old - 1, 2)
    peer = interpolate.RegularGridInterpolator((places, places), grid, "cubic", False, None)
    offsets = np.arange(1.0 - new, new)
    theirs = peer(np.stack(np.meshgrid(offsets, offsets, indexing="ij"), axis=-1))
    assert rel_error(ours[:-3].view(2 * new - 1, 2 * new - 1, 2), theirs) < 1e-3
    assert torch.equal(ours[-3:], torch.from_numpy(table[-3:]).float())


def test_the_spline_of_a_relative_table():
    """One axis, 6 -> 12: a cubic through the places is exact, and so are they."""
    matrix = models.spline_matrix(6, 12)
    places = geometric_places(6, 12)
    offsets = np.arange(-11.0, 12)
    for power in range(4):
        assert np.allclose(matrix @ places ** power, offsets ** power, rtol=1e-3, atol=1e-2)
    assert np.allclose(matrix[[0, 10, 11, 12, 22]], np.eye(11)[[0, 4, 5, 6, 10]], atol=1e-5)
    assert np.array_equal(models.spline_matrix(5, 3).round(9), np.eye(9)[2:7])    # a smaller grid


def test_the_spline_of_a_small_grid_never_extrapolates():
    """BEiT bounds q by 1.5, and its interpolation keeps the outermost value."""
    assert np.allclose(models.spline_matrix(2, 4)[[0, 1, 3, 5, 6]], np.eye(3)[[0, 0, 1, 2, 2]])
    assert abs(models.spline_matrix(3, 8)).max() < 1.5
    assert np.allclose(models.spline_matrix(3, 8)[[0, 4, 14]], np.eye(5)[[0, 0, 4]])    # at -2.5


def test_keep_blocks_loads_the_embedding_and_the_first_blocks(tmp_path):
    source = seed_weights(small_vit())
    torch.save(source.state_dict(), tmp_path / "file.pth")
    for keep in range(4):
        target, fresh = small_vit(), small_vit().state_dict()
        load_encoder(target, tmp_path / "file.pth", keep_blocks=keep)
        for key, value in target.state_dict().items():
            expected = source.state_dict() if layer_id(key, 3) <= keep else fresh
            assert torch.equal(value, expected[key]), key


@pytest.mark.parametrize("name", ["vit_pico", "vit_nano", "vit_tiny", "vit_base", "hiera_tiny",
                                  "hiera_base"])
def test_a_foreign_file_tells_its_model(name, tmp_path):
    model = build_model(name, img_size=64)
    torch.save(model.state_dict(), tmp_path / "file.pth")
    file = read_encoder(tmp_path / "file.pth")
    loaded = build_model(file=file)
    load_encoder(loaded, file)
    assert loaded.arch == model.arch and loaded.img_size == (64, 64)
    assert torch.equal(loaded.pos_embed, model.pos_embed)


def test_tensors_that_no_encoder_here_has_are_named(tmp_path):
    state = small_vit().state_dict()
    for key in ("reg_token", "norm_pre.weight", "blocks.1.attn.q_norm.weight", "pos_embed_win"):
        torch.save({**state, key: torch.ones(1, 4, 24)}, tmp_path / "file.pth")
        with pytest.raises(InputError, match=key):
            load_encoder(small_vit(), tmp_path / "file.pth")
    harmless = {"mask_token": torch.zeros(1, 1, 24), "head.weight": torch.zeros(3, 24),
                "blocks.0.attn.relative_position_index": torch.zeros(17, 17)}
    torch.save({**state, **harmless}, tmp_path / "file.pth")
    assert len(load_encoder(small_vit(), tmp_path / "file.pth")) == len(state)


def test_a_position_table_without_a_row_for_the_class_token_is_read(tmp_path):
    """As in DeiT III: the class token has no position."""
    source = seed_weights(small_vit())
    source.pos_embed.data[:, 0] = 0
    state = {**source.state_dict(), "pos_embed": source.pos_embed.data[:, 1:]}
    torch.save(state, tmp_path / "file.pth")
    target = small_vit()
    load_encoder(target, tmp_path / "file.pth")
    assert torch.equal(target.pos_embed, source.pos_embed)
    target, resized = small_vit(img_size=48), small_vit(img_size=48)
    gamma = {f"blocks.{k}.ls{i}.gamma": torch.ones(24) for k in range(3) for i in (1, 2)}
    torch.save({**state, **gamma}, tmp_path / "file.pth")    # as DeiT III has it
    load_encoder(target, tmp_path / "file.pth")    # at another size, too
    torch.save(source.state_dict(), tmp_path / "whole.pth")
    load_encoder(resized, tmp_path / "whole.pth")
    assert torch.equal(target.pos_embed, resized.pos_embed)
    # 7 x 7 patches and a class token are 5 x 10 rows
    whole = seed_weights(small_vit(img_size=56)).state_dict()
    torch.save(whole, tmp_path / "whole.pth")
    load_encoder(target := small_vit(img_size=(40, 80)), tmp_path / "whole.pth")
    assert torch.equal(target.pos_embed[:, 0], whole["pos_embed"][:, 0])
    # 3 x 5 patches and a class token are 4 x 4 rows
    for arch in ({}, {"arch": small_vit(img_size=(24, 40)).arch}):
        source, target = (small_vit(img_size=(24, 40)) for _ in range(2))
        seed_weights(source)
        torch.save({"model": source.state_dict(), **arch}, tmp_path / "file.pth")
        load_encoder(target, tmp_path / "file.pth")
        assert torch.equal(target.pos_embed, source.pos_embed)


def test_a_vit_of_seven_pixel_patches_is_no_hiera(tmp_path):
    model = small_vit(img_size=28, patch_size=7)
    torch.save(model.state_dict(), tmp_path / "file.pth")
    file = read_encoder(tmp_path / "file.pth")
    assert file.arch["kind"] == "vit" and file.arch["patch_size"] == 7


def test_a_foreign_grid_that_is_no_square_stays_as_it_is(tmp_path):
    """2 x 8 patches are 16, as 4 x 4 are: without a stored size the model's grid decides."""
    wide = seed_weights(small_vit(img_size=(16, 64)))
    torch.save(wide.state_dict(), tmp_path / "file.pth")
    same = small_vit(img_size=(16, 64))
    load_encoder(same, tmp_path / "file.pth")
    assert torch.equal(same.pos_embed, wide.pos_embed)
    torch.save(small_vit(img_size=(16, 40)).state_dict(), tmp_path / "file.pth")    # 2 x 5
    with pytest.raises(InputError, match=r"pos_embed is \(1, 11, 24\).*also of its image size"):
        load_encoder(small_vit(), tmp_path / "file.pth")


def test_statistics_are_those_of_the_file_unless_given(tmp_path, capsys):
    state = small_vit().state_dict()
    statistics = {"mean": [0.5] * 3, "std": [0.25] * 3}
    torch.save({"model": state, "arch": small_vit().arch, **statistics}, tmp_path / "own.pt")
    torch.save(state, tmp_path / "foreign.pt")
    own, foreign = (read_encoder(tmp_path / name) for name in ("own.pt", "foreign.pt"))
    model = build_model("vit_pico", own)
    assert model.mean == (0.5,) * 3 and model.std == (0.25,) * 3
    assert build_model("vit_pico", own, std=(1, 1, 1)).std == (1, 1, 1)
    assert build_model("vit_pico", foreign).mean == models.IMAGENET_MEAN
    load_encoder(small_vit(), foreign)
    assert "no pixel statistics in the file: assuming mean (0.485, 0.456, 0.406)" in capsys.readouterr().out
    load_encoder(small_vit(), own)
    assert "pixel statistics" not in capsys.readouterr().out


def test_names_of_models_that_fit_no_file(tmp_path):
    """FAIR's and timm's Hiera-Tiny is 96 wide and was once taken for vit_nano."""
    model = Hiera(64, embed_dim=96, stages=(1, 2, 7, 2))
    torch.save({"model_state": model.state_dict()}, tmp_path / "fair.pth")
    with pytest.raises(InputError, match=r"hiera.*96.*; hiera_tiny is 46 wide"):
        build_model(file=read_encoder(tmp_path / "fair.pth"))
    with pytest.raises(InputError, match="embed_dim is 96 in the file, 46 in the model"):
        load_encoder(build_model("hiera_tiny"), tmp_path / "fair.pth")
    with pytest.raises(InputError, match="model vit_giant is none of vit_pico"):
        build_model("vit_giant")
    with pytest.raises(InputError, match="is a folder: give a file"):
        read_encoder(tmp_path)


# ---- peers, where they are installed -------------------------------------------------------------
@torch.no_grad()
def test_timm_runs_our_weights():
    timm = pytest.importorskip("timm")
    ours = seed_weights(build_model("vit_tiny", num_classes=1000))
    peer = timm.create_model("vit_tiny_patch16_224", num_heads=12, global_pool="avg", fc_norm=True,
                             num_classes=1000).eval()
    peer.load_state_dict(ours.state_dict())
    images = seeded((1, 3, 224, 224), "images")
    assert rel_error(ours(images), peer(images)) < 1e-4


@torch.no_grad()
def test_hugging_face_file_gives_its_features(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTMAEConfig(
        hidden_size=24, num_hidden_layers=3, num_attention_heads=3, intermediate_size=96,
        image_size=32, patch_size=8, mask_ratio=0.0, layer_norm_eps=1e-6, decoder_hidden_size=24,
        decoder_num_hidden_layers=1, decoder_num_attention_heads=3, decoder_intermediate_size=48)
    peer = transformers.ViTMAEForPreTraining(config).eval()
    torch.save(peer.state_dict(), tmp_path / "pytorch_model.bin")
    ours, images = small_vit(), torch.randn(1, 3, 32, 32)
    load_encoder(ours, tmp_path / "pytorch_model.bin")
    ascending = torch.arange(16.)[None]    # as noise: nothing is shuffled
    theirs = peer.vit(images, noise=ascending).last_hidden_state
    assert rel_error(ours(images), theirs) < 1e-4


# ---- optimizer groups, options, runs ---------------------------------------------------------
def test_every_parameter_is_in_one_group_at_its_layers_rate():
    model = build_model("vit_tiny", num_classes=10, img_size=32, patch_size=8,
                        rel_pos_bias=True)
    groups = param_groups(model, 0.05, 0.75)
    place = {id(p): group for group in groups for p in group["params"]}
    assert len(place) == sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
    for name, p in model.named_parameters():
        group = place[id(p)]
        assert group["lr_scale"] == 0.75 ** (13 - layer_id(name, 12))
        undecayed = p.dim() == 1 or name in ("cls_token", "pos_embed")
        assert group["weight_decay"] == (0.0 if undecayed else 0.05)    # RPE tables decay


def test_numbers_of_the_command_line_lie_in_their_interval(capsys):
    parser = models.Parser("Title.")
    add = parser.group("numbers")
    add("--rate", help="of all", type=float, low=0, high=1)
    add("--count", help="of things", low=1)
    assert parser.parse_args(["--rate", "0", "--count", "7"]).count == 7
    for text in ("1.1", "-0.1", "nan", "inf", "x"):
        with pytest.raises(SystemExit):
            parser.parse_args(["--rate", text])
    assert "nan must lie in [0, 1]" in capsys.readouterr().err
    assert "default" not in parser.format_help()


def test_seeds_differ_in_every_number():
    seeds = {models.mix_seed(a, b, c) for a in range(20) for b in range(20) for c in range(20)}
    assert len(seeds) == 8000 and all(0 <= s < 2 ** 63 for s in seeds)


def options(out, **values):
    return argparse.Namespace(**{**dict(seed=0, no_resume=False, out=str(out)), **values})


CPU = (0, 1, torch.device("cpu"), torch.float32)


def linear(*sizes):
    """A model with the attributes that a checkpoint stores."""
    model = nn.Linear(*sizes)
    model.arch, model.mean, model.std = {}, (0, 0, 0), (1, 1, 1)
    return model


def saved(tmp_path, model, **state):
    (tmp_path / "log.jsonl").touch()
    models.save(options(out=tmp_path), 0, "last.pt", model, epoch=1, **state)


def resumed(args, steps=8, lr=0.1, **data):
    model = linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr)
    return models.resume(args, CPU, steps, model, optimizer, torch.amp.GradScaler("cpu"), **data)


def test_logs_hold_json_alone_and_resume_after_a_cut(tmp_path):
    args = options(size=(1, 2), out=tmp_path, epochs=2)
    path = tmp_path / "log.jsonl"
    facts = dict(train_images=5, arch={})
    models.open_run(args, facts)
    models.log(args, 0, 1, epoch=1, step=1, lr=0.1, grad_norm=torch.tensor(float("inf")))
    models.save(args, 0, "last.pt", linear(2, 2), epoch=1, optimizer={}, **facts)
    saved = path.read_bytes()
    models.log(args, 0, 1, epoch=2, step=2, loss=torch.tensor(0.5))
    path.write_text(path.read_text() + '{"epoch": 2, "args": {"a": 1}')    # cut in an inner object
    lines = read_log(path)
    assert len(lines) == 3 and lines[1]["grad_norm"] is None and lines[2]["loss"] == 0.5
    for _ in range(2):
        models.open_run(args, facts)    # the second epoch will be logged again
        assert path.read_bytes() == saved
    kept = read_log(path)
    assert [v["epoch"] for v in kept] == [0, 1]
    assert kept[0]["args"]["size"] == [1, 2] and kept[0]["train_images"] == 5
    path.unlink()
    models.open_run(args, facts)    # a log that is gone begins again
    assert read_log(path)[0]["train_images"] == 5
    torch.save({"model": {}}, tmp_path / "last.pt")
    with pytest.raises(InputError, match="last.pt in .* is no training state"):
        models.open_run(args, facts)
    with pytest.raises(FloatingPointError, match="loss in epoch 3 is not finite"):
        models.log(args, 0, 1, epoch=3, step=9, loss=torch.tensor(float("nan")))


@pytest.mark.parametrize("recipe, lr, hint", [
    (dict(epochs=100, base_lr=0.1), 0.1, "800 steps, peak lr 0.1: a model learns little"),
    (dict(epochs=400, base_lr=1.5e-4), 1.5e-4, "3200 steps, peak lr 0.00015: a model learns"),
    (dict(epochs=400, base_lr=1e-3), 1e-3, ""), (dict(epochs=1), 0.1, "")])    # track.py has --lr
def test_a_short_or_slow_recipe_is_said_at_the_start(tmp_path, recipe, lr, hint, capsys):
    resumed(options(out=tmp_path, **recipe), lr=lr)
    _, *rest = capsys.readouterr().out.splitlines()
    assert len(rest) == bool(hint) and "".join(rest).startswith(hint)


@pytest.mark.parametrize("items, batch, world, most, accum_steps, micro", [
    (10_000, 4096, 8, 512, 1, 512), (10_000, 4096, 1, 512, 8, 512), (10_000, 4096, 3, 512, 0, 0),
    (10_000, 1000, 1, 256, 4, 250), (10_000, 768, 1, 512, 2, 384), (300, 4096, 1, 512, 1, 300),
    (10_000, 1536, 1, 500, 4, 384), (7, 2, 1, 512, 1, 2)])
def test_micro_batches_are_the_fewest_that_a_usual_gpu_holds(items, batch, world, most,
                                                            accum_steps, micro):
    def sampler(steps=None):
        return models.EpochSampler(range(items), batch, steps, most, 0, world, 0)

    if not accum_steps:
        with pytest.raises(InputError, match="multiple of processes x --accum-steps"):
            sampler()
        return
    assert (sampler().accum_steps, sampler().micro_batch) == (accum_steps, micro)
    assert sampler(1).micro_batch == min(items, batch) // world    # as given


def test_two_processes_never_write_to_one_folder(tmp_path):
    code = f"""
import sys, time
sys.path[:0] = [{str(ROOT)!r}]
import models, pathlib
with models.plain_errors():
    lock = models.lock_folder(pathlib.Path({str(tmp_path)!r}))
    print("locked", flush=True)
    time.sleep(60)
"""
    first = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert first.stdout.readline() == b"locked\n"
    second = run("-c", code, check=False)
    assert second.returncode == 1
    assert f"error: another process is writing to --out {tmp_path}" in second.stderr
    first.kill()    # SIGKILL: the lock goes with it
    first.wait()
    lock = models.lock_folder(tmp_path)
    lock = models.lock_folder(tmp_path)    # one process may run twice
    lock.close()
    assert run("-c", code.replace("60", "0"), check=False).returncode == 0


@pytest.mark.parametrize("name, value, refused", [
    ("SLURM_PROCID", "1", True), ("SLURM_PROCID", "0", False), ("OMPI_COMM_WORLD_RANK", "3", True),
    ("PMI_RANK", "2", True), ("WORLD_SIZE", "2", True), ("WORLD_SIZE", "1", False)])
def test_processes_of_another_launcher_are_refused(name, value, refused, monkeypatch):
    monkeypatch.setenv(name, value)
    if not refused:
        assert models.init_distributed("cpu")[:2] == (0, 1)
        return
    with pytest.raises(InputError, match=f"{name} is {value}, but RANK is not set: start several"):
        models.init_distributed("cpu")


def test_no_resume_removes_what_a_run_has_written_and_nothing_else(tmp_path):
    for name in ("last.pt", "encoder.pt", "log.jsonl", "reconstruction.png", "mae_base.pt", "a.png"):
        (tmp_path / name).write_text("{}")
    resumed(options(out=tmp_path, no_resume=True))
    assert {file.name for file in tmp_path.iterdir()} == {"mae_base.pt", "a.png", "log.jsonl", ".lock"}


def test_a_checkpoint_with_nan_is_never_written(tmp_path):
    model = linear(2, 2)
    saved(tmp_path, model)
    before = (tmp_path / "last.pt").read_bytes()
    model.weight.data[0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="sum of the weights is not finite"):
        saved(tmp_path, model)
    assert (tmp_path / "last.pt").read_bytes() == before


def test_updates_that_are_skipped_for_ever_end_a_run(tmp_path):
    """20 in a row: the scaler halves its scale each time."""
    model = linear(2, 2)
    scaler = torch.amp.GradScaler("cpu")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for update in range(1, 21):
        for p in model.parameters():
            p.grad = torch.full_like(p, torch.nan)
        scaler.scale(torch.ones(()))
        scaler.step(optimizer)
        scaler.update()
        if update < 20:
            saved(tmp_path, model, scaler=scaler.state_dict())
    with pytest.raises(FloatingPointError, match="gradient of 20 updates in fp16 is not finite"):
        saved(tmp_path, model, scaler=scaler.state_dict())
    assert state_of(tmp_path / "last.pt")["scaler"]["scale"] == 2 ** -3


def test_a_full_disk_leaves_the_old_checkpoint_and_no_scratch_file(tmp_path):
    saved(tmp_path, linear(8, 8))
    before = (tmp_path / "last.pt").read_bytes()
    code = f"""
import resource, signal, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import pathlib, torch, models, test_models
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
with models.plain_errors():
    test_models.saved(pathlib.Path({str(tmp_path)!r}), test_models.linear(500, 500))
"""
    done = run("-c", code, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert re.search(r"^error: cannot write \S+last.pt \(.*\); the file before it is kept$",
                     done.stderr.strip())
    assert (tmp_path / "last.pt").read_bytes() == before
    assert {file.name for file in tmp_path.iterdir()} == {"last.pt", "log.jsonl"}


def test_a_run_never_overwrites_what_it_starts_from(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/encoder.pt").touch()
    for more in (dict(init=f"{tmp_path}/a/encoder.pt"), dict(teacher=f"{tmp_path}/a/../a/encoder.pt")):
        with pytest.raises(InputError, match="would overwrite .*encoder.pt, its own start"):
            resumed(options(out=tmp_path / "a", no_resume=True, **more))
    assert (tmp_path / "a/encoder.pt").exists()
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file is a file: give a folder"):
        resumed(options(out=tmp_path / "file"))


# ---- images ----------------------------------------------------------------------------------
def test_every_kind_of_image_file_is_read_as_rgb(tmp_path):
    rgb = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    picture = Image.fromarray(rgb)
    kinds = (("RGB", "png"), ("L", "png"), ("LA", "png"), ("P", "png"), ("RGBA", "png"),
             ("CMYK", "jpg"), ("L", "jpg"), ("RGB", "bmp"), ("P", "gif"), ("RGB", "webp"),
             ("RGB", "tiff"), ("1", "png"))
    for mode, ending in kinds:
        path = tmp_path / f"{mode}.{ending}"
        picture.convert(mode).save(path)
        expected = np.asarray(Image.open(path).convert("RGB"))
        image = read_image(path)
        assert image.shape == (3, 20, 30) and image.dtype == torch.uint8
        assert (image.permute(1, 2, 0).numpy() == expected).all(), path


def test_deep_grey_is_divided_by_a_fixed_number(tmp_path):
    """16 and 32 bits by 257, rounded; float grey lies in [0, 1], or [0, 255] with larger values."""
    for values, expected in (
            (np.array([[0, 300, 40000, 65535]], np.uint16), [0, 1, 156, 255]),
            (np.array([[-5, 300, 40000, 70000]], np.int32), [0, 1, 156, 255]),
            (np.array([[0, 0.5, 1, np.inf]], np.float32), [0, 128, 255, 255]),
            (np.array([[-1, np.nan, 0.002, 0.7]], np.float32), [0, 0, 1, 178]),
            (np.array([[0, 1, 128, 254.6]], np.float32), [0, 1, 128, 255])):    # of 0..255
        Image.fromarray(values).save(tmp_path / "deep.tiff")
        assert read_image(tmp_path / "deep.tiff")[2, 0].tolist() == expected
    Image.fromarray(np.array([[0, 300, 40000]], np.uint16)).save(tmp_path / "deep.png")
    assert read_image(tmp_path / "deep.png")[0, 0].tolist() == [0, 1, 156]


def test_a_dark_big_endian_16_bit_image_stays_dark(tmp_path):
    header = b"MM\0*\0\0\0\x08"
    tags = [(256, 3, 30), (257, 3, 20), (258, 3, 16), (259, 3, 1), (262, 3, 1), (273, 4, 200),
            (277, 3, 1), (278, 3, 20), (279, 4, 1200)]
    entries = b"".join(struct.pack(">HHI", tag, kind, 1)
                       + (struct.pack(">HH", value, 0) if kind == 3 else struct.pack(">I", value))
                       for tag, kind, value in tags)
    directory = struct.pack(">H", len(tags)) + entries + bytes(4)
    pixels = np.full((20, 30), 255, dtype=">u2").tobytes()
    (tmp_path / "deep.tiff").write_bytes((header + directory).ljust(200, b"\0") + pixels)
    assert Image.open(tmp_path / "deep.tiff").mode == "I;16B"
    assert read_image(tmp_path / "deep.tiff").float().mean() <= 1


@pytest.mark.parametrize("exif", [b"Exif\0\0II*\0", b"Exif\0\0garbage and more of it"])
def test_broken_exif_is_no_broken_image(exif, tmp_path):
    file = io.BytesIO()
    Image.new("RGB", (30, 20), "red").save(file, "JPEG", exif=exif, dpi=(72, 72))
    (tmp_path / "a.jpg").write_bytes(file.getvalue())
    image = read_image(tmp_path / "a.jpg")
    assert image.shape == (3, 20, 30) and image[0].min() > 250


def test_photographs_stand_upright(tmp_path):
    picture = Image.fromarray(np.arange(600, dtype=np.uint8).reshape(20, 30))
    exif = Image.Exif()
    exif[0x0112] = 6    # taken with the camera turned by 90 degrees
    picture.save(tmp_path / "phone.jpg", exif=exif)
    assert read_image(tmp_path / "phone.jpg").shape == (3, 30, 20)

    # with a resolution of the wrong type, which Pillow can read but not write again
    tags = struct.pack("<HHHIIHHI", 2, 0x0112, 3, 1, 6, 0x011A, 7, 4) + bytes(8)
    file = b"Exif\0\0II*\0\x08\0\0\0" + tags
    picture.save(tmp_path / "odd.jpg", exif=file)
    assert read_image(tmp_path / "odd.jpg").shape == (3, 30, 20)


@pytest.mark.parametrize("error, rank, printed", [
    (InputError("x.json is no file of boxes (KeyError: 'images'): get it again"), 0,
     "error: x.json is no file of boxes (KeyError: 'images'): get it again"),
    (InputError("Caught InputError in DataLoader worker\nmodels.InputError: it broke"), 0,
     "error: it broke"),
    (OSError("Caught OSError in DataLoader worker\nOSError: it broke"), 1, "error: it broke"),
    (OSError(), 0, "error: OSError()"), (InputError("all say so"), 1, ""),
    (torch.OutOfMemoryError("CUDA out of memory"), 1, "error: out of memory: in training, --accum"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 1, "error: out of mem"),
    (MemoryError(), 0, "error: out of memory: in training, --accum-steps 2"),
    (RuntimeError("Gloo connectFullMesh failed with ... Connection refused"), 0,
     "error: the processes cannot reach each other: if torchrun has restarted them, rerun"),
    (RuntimeError("InvalidCxxCompiler: No working C++ compiler found in ..."), 1,
     "error: --compile needs a C++ compiler"),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible"), 1,
     "error: a loader process was killed, most often for lack of memory: give fewer --workers"),
    (RuntimeError("[gloo] Connection closed by peer"), 0, "error: the connection to another"),
    (RuntimeError("CUDA error: invalid device ordinal\nCUDA kernel errors might be"), 1,
     "error: this machine has more processes than GPUs: start fewer"),
    (KeyboardInterrupt(), 0, "error: interrupted; rerun")])
def test_an_error_becomes_one_sentence(error, rank, printed, monkeypatch, capsys):
    class Exit(Exception):
        pass

    def leave(status):
        raise Exit(status)

    monkeypatch.setenv("LOCAL_RANK", str(rank))
    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(Exit, match="1"), models.plain_errors():
        raise error
    text = capsys.readouterr().err
    assert text.startswith(printed) and text.count("\n") == bool(printed)


def test_an_error_of_the_code_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="in DataLoader worker"), models.plain_errors():
        raise RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nmat1 and mat2")


def test_processes_with_different_data_stop_at_once_and_say_so():
    code = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import models, test_models
with models.plain_errors():
    run = models.init_distributed("cpu", "fp32")
    assert len(models.train_loader(range(8), 2, 1, 512, 0, 0, run)) == 4
    models.train_loader(range(8 + run[0]), 2, 1, 512, 0, 0, run)
"""
    done = run("--no-python", sys.executable, "-c", code, torchrun=2, check=False, timeout=60)
    assert done.returncode and "4 steps per epoch of 8 items" in done.stdout
    assert done.stderr.count("error: the processes found [8, 9] training items: give every") == 1


def test_emulated_bf16_is_not_chosen(monkeypatch):
    """V100, T4: fp16. is_bf16_supported counts emulation unless told otherwise."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported",
                        lambda including_emulation=True: including_emulation)
    precision = torch.get_float32_matmul_precision()
    assert models.init_distributed("cuda")[3] == torch.float16
    torch.set_float32_matmul_precision(precision)


def test_damaged_and_huge_files_raise_an_error_that_names_them(tmp_path, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8)
    for ending in ("png", "jpg"):
        path = tmp_path / f"a.{ending}"
        Image.fromarray(noise).save(path)
        whole = path.read_bytes()
        path.write_bytes(whole[:len(whole) // 2])
        with pytest.raises(OSError, match=f"cannot read image {path} "):
            read_image(path)
    path.write_text("no image")
    with pytest.raises(OSError, match="a.jpg .UnidentifiedImageError.*tests/tools/check.py lists"):
        read_image(path)
    Image.fromarray(noise).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(OSError, match="3600 pixels. exceeds limit of 2000"):
        read_image(path)


def test_a_folder_lists_each_image_once(tmp_path, capsys):
    names = ["a.gif", "b.JFIF", "c.png", "d/e.PPM", "d/f.jpeg", "d/notes.txt", "._g.jpg",
             ".ipynb_checkpoints/h.png", "d/x.heic", "d/y.heic", "out/reconstruction.png", "d/g.avif",
             "run/.lock", "run/attention.png"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "d/up").symlink_to(tmp_path)
    listed = [os.path.relpath(file, tmp_path) for file in list_images(tmp_path, tmp_path / "out")]
    assert listed == ["a.gif", "b.JFIF", "c.png", "d/e.PPM", "d/f.jpeg", "d/g.avif"]
    assert "3 files of other types skipped ({'.heic': 2, '.txt': 1})" in capsys.readouterr().out


def test_items_have_keys_of_epoch_and_index(tmp_path):
    Image.new("RGB", (4, 4), (10, 10, 10)).save(tmp_path / "0.png")
    (tmp_path / "1.png").write_text("no image")

    class Levels(models.ImageDataset):
        def transform(self, image, index):
            return image.getpixel((0, 0))[0] + torch.rand(()).item(), index

    data = Levels(list_images(tmp_path), seed=0)
    assert data[0, 0] == data[0, 0] != data[1, 0] and len(data) == 2
    with pytest.raises(TypeError, match="cannot unpack"):    # the line says: epoch, index
        data[1]
    with pytest.raises(OSError, match="cannot read image .*1.png .*: put a good copy there"):
        data[0, 1]


def test_names_are_shared_strings(tmp_path):
    names = ["a", "b/c\u00fc.png", "", os.fsdecode(b"\xff.png")]
    shared = models.Names(names)
    assert list(shared) == names and shared[-1] == names[-1] and len(models.Names([])) == 0
    assert shared.rows.is_shared()
    for index in (slice(1, None, 2), torch.tensor([1, 3]), torch.tensor([False, True] * 2)):
        assert list(shared[index]) == names[1::2] and shared[index].rows.is_shared()
    with pytest.raises(IndexError):
        shared[4]


def test_text_is_utf_8_with_or_without_a_mark(tmp_path):
    path = tmp_path / "a.txt"
    for data in (b"1,2", b"\xef\xbb\xbf1,2"):
        path.write_bytes(data)
        assert models.read_text(path) == "1,2"
    path.write_bytes(b"\xff1,2")
    with pytest.raises(OSError, match="a.txt is no UTF-8 text"):
        models.read_text(path)


def test_a_crop_is_that_of_pillow(tmp_path):
    """Within rounding; no JPEG is decoded at reduced size."""
    coarse = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    picture = Image.fromarray(coarse).resize((1000, 750), Image.Resampling.BICUBIC)
    for seed in range(4):
        torch.manual_seed(seed)
        ours = random_crop(picture, (64, 48), (0.08, 1.0))
        torch.manual_seed(seed)
        ratio = [3 / 4 * 48 / 64, 4 / 3 * 48 / 64]    # in the shape of the crop
        top, left, h, w = models.RandomResizedCrop.get_params(picture, [0.08, 1.0], ratio)
        peer = picture.resize((48, 64), Image.Resampling.BICUBIC, (left, top, left + w, top + h))
        peer = torch.from_numpy(np.array(peer)).permute(2, 0, 1)
        peer = peer.flip(2) if torch.rand(()) < 0.5 else peer
        assert (ours.float() - peer.float()).abs().mean() < 1.0
