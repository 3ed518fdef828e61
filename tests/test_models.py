"""Encoders against golden numbers and peers, and every checkpoint format that users bring."""
import argparse
import io
import struct

import numpy as np
import pytest
import torch
from conftest import rel_error, seed_weights, seeded
from PIL import Image
from torch import nn

import models
from models import (MODELS, Attention, Hiera, InputError, VisionTransformer, infer_model, layer_id,
                    load_encoder, normalize, param_groups, random_crop, read_image, reroll,
                    resize_grid, sincos_2d, unroll)

SMALL = dict(img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=3)


def small_vit(**kwargs):
    torch.manual_seed(0)
    return VisionTransformer(**{**SMALL, **kwargs}).eval()


def small_hiera(**kwargs):
    torch.manual_seed(0)
    options = dict(img_size=64, embed_dim=8, num_heads=1, stages=(1, 1, 2, 1))
    return Hiera(**{**options, **kwargs}).eval()


def test_a_classifier_of_the_paper_in_two_lines():
    vit = MODELS["vit_tiny"](num_classes=1000)
    assert vit(normalize(torch.zeros(1, 3, 224, 224, dtype=torch.uint8))).shape == (1, 1000)


# ---- golden numbers ------------------------------------------------------------------------------
@pytest.mark.parametrize("key, name, options", [
    ("vit_tiny", "vit_tiny", {}),
    ("vit_tiny_rpe", "vit_tiny", {"rel_pos_bias": True}),
    ("hiera_tiny", "hiera_tiny", {})])
@torch.no_grad()
def test_classifiers_match_golden(golden, key, name, options):
    model = seed_weights(MODELS[name](num_classes=1000, **options))
    images = seeded((2, 3, 224, 224), "images")
    assert sum(p.numel() for p in model.parameters()) == golden[f"{key}/params"]
    assert rel_error(model(images)[:, :32], golden[f"{key}/logits"]) < 1e-4
    if key == "vit_tiny_rpe":
        assert (model.rel_pos_index[:20, :20].numpy() == golden["vit_tiny_rpe/index_corner"]).all()
        assert model.rel_pos_index.sum() == golden["vit_tiny_rpe/index_sum"]
        table = model.blocks[0].attn.relative_position_bias_table
        assert len(table) == golden["vit_tiny_rpe/table_rows"]
    if key == "hiera_tiny":
        for i, stage in enumerate(model.feature_maps(images)):
            stage = stage.permute(0, 2, 3, 1)
            assert tuple(stage.shape) == tuple(golden[f"hiera_tiny/stage{i}_shape"])
            assert rel_error(stage[:, :3, :3, :8], golden[f"hiera_tiny/stage{i}"]) < 1e-4
            assert rel_error(stage.abs().mean(), golden[f"hiera_tiny/stage{i}_abs_mean"]) < 1e-5


# ---- attention, tokens, positions ----------------------------------------------------------------
@pytest.mark.parametrize("rows", [0, 7 * 7 + 3])
@torch.no_grad()
def test_fused_attention_equals_the_map_it_could_have_formed(rows):
    torch.manual_seed(0)
    attn, x = Attention(24, 3, rows), torch.randn(2, 17, 24)
    index = None
    if rows:
        index = models.relative_position_index((4, 4))
        attn.relative_position_bias_table.normal_()
    probs = attn.logits(x, index).softmax(-1)
    v = attn.qkv(x).view(2, 17, 3, 3, 8)[:, :, 2].transpose(1, 2)
    explicit = attn.proj((probs @ v).transpose(1, 2).reshape(2, 17, 24))
    assert torch.allclose(attn(x, index), explicit, atol=1e-5)
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
    raster = torch.arange(16.).view(1, 16, 1)
    one_round = unroll(raster, (4, 4), rounds=1).flatten().tolist()
    in_docstring = [0, 2, 8, 10, 1, 3, 9, 11, 4, 6, 12, 14, 5, 7, 13, 15]
    assert one_round == in_docstring
    x = torch.randn(2, 16 * 24, 3)
    assert torch.equal(reroll(unroll(x, (16, 24)), (2, 3), 3).flatten(1, 2), x)
    pooled = unroll(x, (16, 24)).unflatten(1, (4, -1)).amax(1)
    pooled = reroll(pooled, (2, 3), 2).permute(0, 3, 1, 2)
    raster = x.view(2, 16, 24, 3).permute(0, 3, 1, 2)
    assert torch.equal(pooled, nn.functional.max_pool2d(raster, 2))


def test_hiera_maps_are_in_raster_order():
    model = small_hiera(img_size=(64, 96))
    images = torch.randn(1, 3, 64, 96, requires_grad=True)
    # mask-unit attention: only the pixels of the unit and of the convolution's margin matter
    for stage, level in zip(model.feature_maps(images, (1, 2)), (4, 8)):
        (grad,) = torch.autograd.grad(stage[0, :, 0, -1].sum(), images, retain_graph=True)
        assert grad[..., :32, 64:].abs().sum() > 0 and stage.shape[2:] == (64 // level, 96 // level)
        assert grad[..., 40:, :].abs().sum() == 0 and grad[..., :48].abs().sum() == 0
    shapes = [tuple(f.shape[2:]) for f in model.feature_maps(images)]
    assert shapes == [(16, 24), (8, 12), (4, 6), (2, 3)]


@pytest.mark.parametrize("size", [112, 120, (224, 200)])
def test_hiera_refuses_sizes_it_cannot_unroll(size):
    with pytest.raises(ValueError, match="nearest valid size is"):
        MODELS["hiera_tiny"](img_size=size)


def test_sizes_and_position_tables(tmp_path):
    table = sincos_2d(24, (4, 4), class_token=False)
    assert resize_grid(table, (4, 4), (4, 4)) is table
    model = small_vit(rel_pos_bias=True)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.relative_position_bias_table.normal_()
    torch.save({"model": model.state_dict(), "arch": model.arch}, tmp_path / "own.pt")
    same = small_vit(rel_pos_bias=True)
    load_encoder(same, tmp_path / "own.pt")
    pairs = zip(model.state_dict().values(), same.state_dict().values())
    assert all(torch.equal(a, b) for a, b in pairs)
    for size in (*range(8, 88, 8), (16, 64), (40, 24)):    # every multiple, non-square too
        other = small_vit(img_size=size, rel_pos_bias=True)
        load_encoder(other, tmp_path / "own.pt")
        assert torch.equal(other.pos_embed[:, 0], model.pos_embed[:, 0])    # class row untouched
        tables = [m.blocks[0].attn.relative_position_bias_table for m in (other, model)]
        assert torch.equal(tables[0][-3:], tables[1][-3:])
        assert other(torch.randn(1, 3, *other.img_size)).isfinite().all()
    torch.save({"model": other.state_dict(), "arch": other.arch}, tmp_path / "wide.pt")
    load_encoder(small_vit(rel_pos_bias=True), tmp_path / "wide.pt")    # from a non-square one
    with pytest.raises(ValueError, match="multiple of the patch size"):
        small_vit(img_size=30)


def test_normalize_is_imagenet_statistics():
    images = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8)
    for channel, (mean, std) in enumerate(zip(models.IMAGENET_MEAN, models.IMAGENET_STD)):
        slow = (images[:, channel] / 255 - mean) / std
        assert torch.allclose(normalize(images)[:, channel], slow, atol=1e-6)


def test_torch_export_of_the_classifier():
    model = MODELS["vit_tiny"](img_size=64, num_classes=10).eval()
    images = torch.randn(1, 3, 64, 64)
    exported = torch.export.export(model, (images,)).module()
    assert torch.allclose(exported(images), model(images), atol=1e-5)


def test_layer_ids_follow_block_order():
    model = MODELS["vit_tiny"](num_classes=10)
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
            "module.model.blocks.3.norm1.weight": torch.ones(24),
            "module.attn_adapter.adapter12.weight": torch.ones(3, 3, 1, 1)}


def two_encoders(state):
    return {**prefixed(state, "module.base_encoder."),
            **prefixed(state, "module.momentum_encoder.")}


FORMATS = {
    "bare": lambda s: s,
    "mae": lambda s: {"model": s},
    "mae training file": lambda s: {"model": {**s, **DECODER}, "epoch": 3, "optimizer": {},
                                    "args": argparse.Namespace(lr=1)},
    "mae-lite": lambda s: {"model": prefixed({**s, **DECODER}, "model.")},
    "mae-lite distilled": lambda s: {"model": distilled(s)},
    "ddp and compile": lambda s: {"model": prefixed(s, "module._orig_mod.")},
    "moco-v3": lambda s: {"arch": "vit_base", "epoch": 300, "state_dict": two_encoders(s)},
    "timm pooled": pooled_names,
    "hugging face": hugging_face_names,
    "hugging face pre-training": lambda s: {**prefixed(hugging_face_names(s), "vit."),
                                            "decoder.mask_token": torch.zeros(1)},
    "own": lambda s: {"model": s, "arch": small_vit().arch, "mean": [0.5] * 3},
    "own last.pt": lambda s: {"model": {**prefixed(s, "encoder."), **DECODER},
                              "arch": small_vit().arch},
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_weights(name, tmp_path, capsys):
    source, target = seed_weights(small_vit()), small_vit()
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
    assert "ignored 5" in capsys.readouterr().out


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
    refused({"model": DECODER}, "no ViT or Hiera encoder")
    refused({"model": state, "extra": Arbitrary()}, "Arbitrary.*re-save")
    refused(b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS")
    refused(b"<!DOCTYPE html><html>", "web page")
    for damaged in (b"PK\x03\x04 but cut short", b"", b"\x89PNG\r\n", b"plain text"):
        refused(damaged, "not a readable PyTorch file")
    no_key = {k: v for k, v in hugging_face_names(state).items()
              if "layer.1.attention.attention.key.weight" not in k}
    refused(no_key, lost)
    refused({"model": state, "arch": {**small_vit().arch, "num_heads": 6}},
            "num_heads = 6, the model num_heads = 3")
    refused({**state, "cls_token": torch.zeros(1, 1, 32)}, r"cls_token is \(1, 1, 32\)")
    refused(VisionTransformer(**{**SMALL, "depth": 6}).state_dict(), "6 blocks, the model 3")
    refused(small_vit(rel_pos_bias=True).state_dict(), "relative_position_bias_table")
    refused({**state, "pos_embed": torch.zeros(1, 18, 24)}, "pos_embed")
    refused({**prefixed(state, "a."), **prefixed(state, "b.")}, "several encoders")


def test_keep_blocks_loads_the_embedding_and_the_first_blocks(tmp_path):
    source = seed_weights(small_vit())
    torch.save(source.state_dict(), tmp_path / "file.pth")
    for keep in range(4):
        target, fresh = small_vit(), small_vit().state_dict()
        load_encoder(target, tmp_path / "file.pth", keep_blocks=keep)
        for key, value in target.state_dict().items():
            expected = source.state_dict() if layer_id(key, 3) <= keep else fresh
            assert torch.equal(value, expected[key]), key


@pytest.mark.parametrize("name, patch", [("vit_tiny", 16), ("vit_base", 16), ("hiera_tiny", 7)])
def test_infer_model_from_shapes(name, patch, tmp_path):
    torch.save(MODELS[name](img_size=32).state_dict(), tmp_path / "file.pth")
    assert infer_model(tmp_path / "file.pth") == (name, patch)


# ---- peers, where they are installed -------------------------------------------------------------
@torch.no_grad()
def test_timm_runs_our_weights():
    timm = pytest.importorskip("timm")
    ours = seed_weights(MODELS["vit_tiny"](num_classes=1000))
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
    model = MODELS["vit_tiny"](num_classes=10, img_size=32, patch_size=8, rel_pos_bias=True)
    groups = param_groups(model, 0.05, 0.75)
    place = {id(p): group for group in groups for p in group["params"]}
    assert len(place) == sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
    for name, p in model.named_parameters():
        group = place[id(p)]
        assert group["lr_scale"] == 0.75 ** (13 - layer_id(name, 12))
        undecayed = p.dim() == 1 or name in ("cls_token", "pos_embed")
        assert group["weight_decay"] == (0.0 if undecayed else 0.05)    # RPE tables decay


def test_numbers_of_the_command_line_lie_in_their_interval(capsys):
    parser = argparse.ArgumentParser()
    parser.add_argument("--rate", type=models.number(float, "[0, 1)", " of all"))
    parser.add_argument("--count", type=models.number(int, "[1, inf)"))
    assert parser.parse_args(["--rate", "0", "--count", "7"]).count == 7
    for text in ("1", "-0.1", "nan", "inf", "x"):
        with pytest.raises(SystemExit):
            parser.parse_args(["--rate", text])
    assert "nan must lie in [0, 1) of all" in capsys.readouterr().err


def test_seeds_differ_in_every_number():
    seeds = {models.mix_seed(a, b, c) for a in range(20) for b in range(20) for c in range(20)}
    assert len(seeds) == 8000 and all(0 <= s < 2 ** 63 for s in seeds)


def test_logs_hold_json_alone_and_go_on_after_a_cut(tmp_path):
    args = argparse.Namespace(size=(1, 2), out=tmp_path)
    path = tmp_path / "log.jsonl"
    models.start_log(path, args, 0)
    models.log_line(path, step=1, lr=0.1, grad_norm=float("inf"))
    models.log_line(path, step=1, val_rec=0.5)
    models.log_line(path, step=2, lr=0.1)
    path.write_text(path.read_text() + '{"step": 3, "lr"')
    assert models.read_log(path)[1]["grad_norm"] is None
    models.start_log(path, args, 1)    # the evaluation at step 1 will be made again
    assert [v["step"] for v in models.read_log(path)] == [0, 1, 1]
    assert [sorted(v) for v in models.read_log(path)][1] == ["grad_norm", "lr", "step"]


def test_out_of_memory_says_which_option_helps(capsys):
    with pytest.raises(SystemExit, match="--accum-steps"):
        with models.plain_errors():
            raise torch.OutOfMemoryError("CUDA out of memory")


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


@pytest.mark.parametrize("values", [np.linspace(0, 65535, 600).astype(np.uint16),
                                    np.linspace(0, 65535, 600).astype(np.int32),
                                    np.linspace(0, 255, 600).astype(np.float32),
                                    np.linspace(0, 1, 600).astype(np.float32)])
def test_deep_grey_keeps_its_range(values, tmp_path):
    Image.fromarray(values.reshape(20, 30)).save(tmp_path / "deep.tiff")
    image = read_image(tmp_path / "deep.tiff")
    assert image[0, 0, 0] == 0 and image[2, 19, 29] == 255
    assert abs(image.float().mean() - 127.5) < 2


@pytest.mark.parametrize("top, white", [(1.001, 255), (256, 255), (1e12, 255), (np.inf, 0)])
def test_a_float_image_beyond_the_usual_ranges_is_read(top, white, tmp_path):
    values = np.linspace(0, min(top, 255 if top < 1e3 else top) - top % 1, 600)
    values = np.nan_to_num(values, posinf=0).astype(np.float32)
    values[7] = top
    Image.fromarray(values.reshape(20, 30)).save(tmp_path / "deep.tiff")
    image = read_image(tmp_path / "deep.tiff")
    assert image[0, 0, 7] == white
    if top < np.inf:
        assert abs(image.float().mean() - 127.5) < 2


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
    (OSError(), 0, "error: OSError()"), (InputError("all say so"), 1, 1)])
def test_an_error_becomes_one_sentence(error, rank, printed, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    with pytest.raises(SystemExit) as stop, models.plain_errors():
        raise error
    assert stop.value.code == printed


def test_emulated_bf16_is_not_chosen(monkeypatch):
    """V100, T4: fp16. is_bf16_supported counts emulation unless told otherwise."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported",
                        lambda including_emulation=True: including_emulation)
    assert models.choose_dtype("auto", torch.device("cuda")) == torch.float16


def test_damaged_files_raise_one_of_the_errors_that_callers_expect(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8)
    for ending in ("png", "jpg"):
        path = tmp_path / f"a.{ending}"
        Image.fromarray(noise).save(path)
        whole = path.read_bytes()
        path.write_bytes(whole[:len(whole) // 2])
        with pytest.raises(models.READ_ERRORS):
            read_image(path)


def test_a_crop_from_a_reduced_jpeg_looks_like_the_full_one(tmp_path):
    """Within half a pixel of the reduced picture, and so within a few of 256 levels."""
    coarse = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    picture = Image.fromarray(coarse).resize((1000, 750), Image.Resampling.BICUBIC)
    picture.save(tmp_path / "a.jpg", quality=95)
    for seed in range(8):
        crops = []
        whole = Image.open(tmp_path / "a.jpg").convert("RGB")
        for image in (models.open_image(tmp_path / "a.jpg"), whole):
            torch.manual_seed(seed)
            crops.append(random_crop(image, (64, 48), (0.08, 1.0)).numpy().astype(float))
        assert crops[0].shape == (3, 64, 48)
        difference = np.abs(crops[0] - crops[1])
        assert difference.mean() < 10 and difference.max() < 40


@pytest.mark.parametrize("size", [(1001, 1000), (1000, 1001), (525, 700), (999, 1003)])
def test_a_crop_of_a_whole_reduced_jpeg_stays_inside(tmp_path, size):
    """Width and height are rounded up when a JPEG is decoded at reduced size, each its own way."""
    Image.new("RGB", size, "white").save(tmp_path / "a.jpg", quality=95)
    for side in (112, 224):
        for seed in range(4):
            torch.manual_seed(seed)
            crop = random_crop(models.open_image(tmp_path / "a.jpg"), (side, side), (1.0, 1.0))
            assert crop.min() > 250, (side, seed)
