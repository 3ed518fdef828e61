"""Export a trained model: to ONNX, or to files that timm, transformers or ncnn's converter load.

    python tests/tools/export.py out/finetune/classifier.pt classifier                # .onnx
    python tests/tools/export.py out/finetune/classifier.pt classifier --uint8 --int8 \\
        --data data/imagenet                        # pixels as they are; int8, and its top-1
    python tests/tools/export.py out/track/tracker.pt tracker --keep-rate 0.7
    python tests/tools/export.py out/pretrain/encoder.pt my_encoder --to timm         # a folder
    python tests/tools/export.py out/finetune/classifier.pt my_classifier --to transformers
    python tests/tools/export.py out/segment/segmenter.pt segmenter --to ncnn         # for pnnx

FILE is an encoder or classifier of README, "Checkpoints", a segmenter.pt or a tracker.pt. OUT.onnx
takes a batch of any size. Its outputs are compared with PyTorch's at batches of 1, 2 and 5, and its
time at batch 1 with that of eager PyTorch; the runtimes take turns, on one CPU thread.

    kind        inputs                          outputs
    encoder     images (B, 3, H, W)             tokens (B, T, D), after the final norm of a ViT
    classifier  images (B, 3, H, W)             logits (B, K)
    segmenter   images (B, 3, H, W)             logits (B, K, H/s, W/s) of one window
    tracker     template, search (B, 3, ., .)   score (B, 1, g, g), size, offset (B, 2, g, g)

Inputs are normalised float32, with --uint8 the pixels. To locate the target, multiply the score by
`hann_window` and `decode` the maps, see `OnePassTracker` in track.py.

--int8 also writes OUT.int8.onnx, in which ONNX Runtime quantises the constant matrices of MatMul
and Gemm to int8, and their inputs while it runs. Measure on --data what that costs. A tracker loses
most if it eliminates tokens (--keep-rate below 1): rounding changes the ranks, so other tokens
remain, and single boxes are off by a third of their size or more. The same holds for bfloat16, the
default of OpenVINO where the CPU has it. Therefore trackers are exported with a keep rate of 1: for
a tracker of toy videos the mean error fell from 7 % of the box to 0.4 %.
"""
import argparse
import copy
import importlib.util
import itertools
import json
import logging
import statistics
import sys
import time
import warnings
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torchvision.ops import box_convert, box_iou
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import finetune  # noqa: E402
import segment  # noqa: E402
import track  # noqa: E402
from models import (Attention, InputError, Parser, PatchEmbed, RelativeAttention,  # noqa: E402
                    build_model, eval_loader, load_encoder, normalize, plain_errors, read_encoder)

CPU = 0, 1, torch.device("cpu"), torch.float32    # what init_distributed returns
OUTPUTS = {"encoder": ["tokens"], "classifier": ["logits"], "segmenter": ["logits"],
           "tracker": ["score", "size", "offset"]}
PACKAGES = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "ncnn": (),
            "timm": ("timm", "safetensors"), "transformers": ("transformers", "safetensors")}


# --------------------------------------------------------------------------------------------------
# The network
# --------------------------------------------------------------------------------------------------
class Network(nn.Module):
    """The model that is exported. uint8: its inputs are pixels, and are normalised inside."""
    inputs = ["images"]

    def __init__(self, kind, model, sizes, uint8, keep_rate=None):
        super().__init__()
        self.kind = kind
        self.model = model
        self.sizes = sizes            # (height, width) of each input
        self.uint8 = uint8
        self.keep_rate = keep_rate    # of a tracker

    def prepare(self, images):
        return normalize(images, self.model.mean, self.model.std) if self.uint8 else images

    def forward(self, images):
        return self.model(self.prepare(images))

    def examples(self, batch):
        """Draw random inputs of `batch` images."""
        generator = torch.Generator().manual_seed(batch)
        pixels = [torch.randint(256, (batch, 3, *size), dtype=torch.uint8, generator=generator)
                  for size in self.sizes]
        if self.uint8:
            return pixels
        return [normalize(x, self.model.mean, self.model.std) for x in pixels]


class TrackerNetwork(Network):
    inputs = ["template", "search"]

    def forward(self, template, search):
        return self.model(self.prepare(template), self.prepare(search), self.keep_rate)


def load_network(args):
    """-> the `Network` of the model in args.file, and all that the file holds. Raises InputError.

    Its parameters are frozen: PyTorch's exporter fails on attention with a bias that is computed
    from a trained table.
    """
    file = read_encoder(args.file)
    if "tracker" in file.arch:
        kind = "tracker"
    elif "zero_is_class" in (file.content.get("args") or {}):
        kind = "segmenter"
    else:
        kind = "classifier" if file.supervised else "encoder"
    given = [args.model, args.mean, args.std] + [args.image_size] * (kind == "tracker")
    if kind in ("segmenter", "tracker") and any(given):
        raise InputError(f"{args.file} is a {kind} and stores its sizes and statistics: leave out "
                         "--model, --mean, --std" + " and --image-size" * (kind == "tracker"))
    if args.keep_rate is not None and kind != "tracker":
        raise InputError(f"{args.file} is no tracker: leave out --keep-rate")

    options = dict(mean=args.mean, std=args.std, img_size=args.image_size)
    if kind == "tracker":
        model = track.load_tracker(args.file, CPU[2]).model
    elif kind == "segmenter":
        model, _, _ = segment.load_segmenter(args.file, args.image_size)
    elif kind == "classifier":
        model, _ = finetune.load_classifier(file, args.model, **options)
    else:
        model = build_model(args.model, file, **options)
        load_encoder(model, file)
    model.eval().requires_grad_(False)
    if kind != "tracker":
        return Network(kind, model, [model.img_size], args.uint8).eval(), file.content
    sizes = [(side, side) for _, side in (model.crops["template"], model.crops["search"])]
    return TrackerNetwork(kind, model, sizes, args.uint8, args.keep_rate or 1).eval(), file.content


# --------------------------------------------------------------------------------------------------
# ONNX
# --------------------------------------------------------------------------------------------------
def write_onnx(network, path):
    """Write the network for a batch of any size. The example has two images: from a batch of one,
    PyTorch concludes that all batches are of one."""
    batch = {0: torch.export.Dim("batch")}
    large = sum(p.nbytes for p in network.parameters()) > 1.8e9    # a file holds 2 GB
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")    # both inputs have the same batch
        torch.onnx.export(network, tuple(network.examples(2)), path, dynamo=True, verbose=False,
                          input_names=network.inputs, output_names=OUTPUTS[network.kind],
                          dynamic_shapes=(batch,) * len(network.inputs), external_data=large)


def write_int8(source, path):
    """Quantise the MatMul and Gemm of an ONNX file. Convolutions stay in float32."""
    from onnxruntime.quantization import quantize_dynamic
    large = Path(f"{source}.data").exists()
    logging.disable(logging.WARNING)    # which recommends to optimise first; nothing changes
    quantize_dynamic(source, path, op_types_to_quantize=["MatMul", "Gemm"],
                     use_external_data_format=large)
    logging.disable(logging.NOTSET)


def in_pytorch(network):
    """-> function of input tensors that returns a list of outputs, as those below do."""
    def run(*inputs):
        outputs = network(*inputs)
        return list(outputs) if isinstance(outputs, tuple) else [outputs]

    return run


def in_onnx_runtime(path):
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [x.name for x in session.get_inputs()]

    def run(*inputs):
        outputs = session.run(None, {name: x.numpy() for name, x in zip(names, inputs)})
        return [torch.from_numpy(y) for y in outputs]

    return run


def in_openvino(path, hints):
    import openvino
    options = dict(INFERENCE_NUM_THREADS=1, **hints)
    compiled = openvino.Core().compile_model(str(path), "CPU", options)
    precision = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()

    def run(*inputs):
        return [torch.from_numpy(y.copy()) for y in compiled([x.numpy() for x in inputs]).values()]

    return f"OpenVINO, {precision}", run


def difference(outputs, truth):
    """Largest difference of any output, as a share of its largest value."""
    return max(((y - t).abs().max() / t.abs().max().clamp(min=1e-12)).item()
               for y, t in zip(outputs, truth))


def compare(network, runtimes, rounds):
    """Print the time of each runtime and its difference from PyTorch -> {runtime: the largest}."""
    names = [name for name in runtimes if name != "PyTorch"]
    worst = dict.fromkeys(names, 0.0)
    for batch in (1, 2, 5):
        inputs = network.examples(batch)
        truth = runtimes["PyTorch"](*inputs)
        for name in names:
            worst[name] = max(worst[name], difference(runtimes[name](*inputs), truth))

    seconds = {name: [] for name in runtimes}
    inputs = network.examples(1)
    for _, (name, run) in itertools.product(range(rounds), runtimes.items()):
        begun = time.perf_counter()
        run(*inputs)
        seconds[name].append(time.perf_counter() - begun)
    print(f"{'runtime':20} {'ms, batch 1':>11}  largest difference at batches 1, 2, 5")
    for name in runtimes:
        text = f"{name:20} {1000 * statistics.median(seconds[name]):11.2f}"
        if name in names:
            text += f"  {worst[name]:.1e} of the largest value"
        print(text)
    return worst


def export_onnx(network, args, content):
    """Write OUT.onnx, and OUT.int8.onnx with --int8; compare and score them."""
    files = {"ONNX Runtime": Path(f"{args.out}.onnx")}
    write_onnx(network, files["ONNX Runtime"])
    if args.int8:
        files["ONNX Runtime, int8"] = Path(f"{args.out}.int8.onnx")
        write_int8(*files.values())
    runtimes = {"PyTorch": in_pytorch(network),
                **{name: in_onnx_runtime(file) for name, file in files.items()}}
    if args.openvino:
        for hints in (dict(INFERENCE_PRECISION_HINT="f32"), {}):
            name, run = in_openvino(files["ONNX Runtime"], hints)
            runtimes[name] = run
    worst = compare(network, runtimes, args.rounds)
    for name, file in files.items():
        if name == "ONNX Runtime" and worst[name] > 1e-3:
            raise InputError(f"{file} differs from the model: do not use it")
        print(f"{file}: {file.stat().st_size / 1e6:.1f} MB")
    if args.data:
        SCORES[network.kind](network, runtimes, args.data, content)
    if args.int8 and (network.keep_rate or 1) < 1:
        print("in int8 this tracker eliminates other tokens, and boxes may be off by a third of "
              "their size: export it without --keep-rate, or measure on --data")


# --------------------------------------------------------------------------------------------------
# Scores on data
# --------------------------------------------------------------------------------------------------
class Deployed(nn.Module):
    """A runtime in the place of the model, on normalised images."""

    def __init__(self, network, run):
        super().__init__()
        self.run = run
        self.uint8 = network.uint8
        self.img_size = network.sizes[0]
        self.mean, self.std = network.model.mean, network.model.std

    def to_pixels(self, images):
        """The inverse of `normalize`."""
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (255 * (images * std + mean)).round().clamp(0, 255).byte()

    def forward(self, *images):
        outputs = self.run(*map(self.to_pixels, images) if self.uint8 else images)
        return outputs[0] if len(outputs) == 1 else outputs


def score_classifier(network, runtimes, data, content):
    """Print top-1 accuracies on DATA/val."""
    files, labels, folders = finetune.list_split(data, "val", None, content.get("classes"))
    classes = count_classes(network)
    if len(folders) != classes:
        raise InputError(f"{data} has {len(folders)} classes in val, not those of the model "
                         f"({classes}): give the data set that it was trained on")
    prepare = partial(finetune.centre_crop, size=network.sizes[0])
    dataset = finetune.LabelledImages(files, labels, prepare)
    hits = dict.fromkeys(runtimes, 0)
    for images, labels in tqdm(eval_loader(dataset, 32, 2, CPU), "top-1"):
        images = normalize(images, network.model.mean, network.model.std)
        for name, run in runtimes.items():
            hits[name] += (Deployed(network, run)(images).argmax(dim=1) == labels).sum().item()
    for name in runtimes:
        print(f"{name:20} top-1 {100 * hits[name] / len(files):.2f} on {len(files)} images")


def score_segmenter(network, runtimes, data, content):
    """Print mean IoUs on DATA/{images,annotations}/validation."""
    stored = content["args"]
    classes = stored["num_classes"]
    dataset = segment.SegmentationSet(data, "validation", classes, stored["zero_is_class"],
                                      network.sizes[0])
    counts = dict.fromkeys(runtimes, 0)
    for images, labels in tqdm(eval_loader(dataset, 1, 2, CPU), "mIoU"):
        for name, run in runtimes.items():
            found = segment.label_image(Deployed(network, run), images[0], labels.shape[1:])
            counts[name] = counts[name] + segment.confusion_matrix(found, labels[0], classes)
    for name in runtimes:
        miou = segment.summarize(counts[name])["miou"]
        print(f"{name:20} mIoU {miou:.2f} on {len(dataset)} images")


def boxes_of(network, outputs):
    """Boxes (B, 4) in the search crop, centre, width and height, of a tracker's maps."""
    score, size, offset = outputs
    return track.decode(score * track.hann_window(network.model.search_side), size, offset)


def box_shift(boxes, truth):
    """Largest change of a box in x, y, w or h, as a share of its size sqrt(w h) -> (B,)."""
    return ((boxes - truth).abs() / truth[:, 2:].prod(dim=1, keepdim=True).sqrt()).amax(dim=1)


def score_tracker(network, runtimes, data, content, pairs=256):
    """Print the IoU of boxes with the truth on pairs of frames of DATA's training videos, and how
    far the boxes are from PyTorch's."""
    dataset = track.Pairs(track.open_sets(data), pairs, 1, **network.model.crops)
    ious = {name: [] for name in runtimes}
    shifts = {name: [] for name in runtimes}
    for *crops, truth in tqdm(eval_loader(dataset, 8, 2, CPU), "boxes"):
        crops = [normalize(x, network.model.mean, network.model.std) for x in crops]
        truth = box_convert(truth, "xywh", "xyxy")
        for name, run in runtimes.items():
            boxes = boxes_of(network, Deployed(network, run)(*crops))
            expected = boxes if name == "PyTorch" else expected
            ious[name].append(box_iou(box_convert(boxes, "cxcywh", "xyxy"), truth).diagonal())
            shifts[name].append(box_shift(boxes, expected))
    for name in runtimes:
        text = f"{name:20} IoU {torch.cat(ious[name]).mean():.4f} on {pairs} pairs"
        if name != "PyTorch":
            shift = torch.cat(shifts[name])
            text += f"; boxes off by {shift.mean():.4f} of their size, {shift.max():.3f} at most"
        print(text)


SCORES = {"classifier": score_classifier, "segmenter": score_segmenter, "tracker": score_tracker}


# --------------------------------------------------------------------------------------------------
# timm, transformers, ncnn: each writes files -> the line that reads them, and a function of images
# --------------------------------------------------------------------------------------------------
def count_classes(network):
    """Classes of a classifier; 0 for an encoder."""
    if network.kind == "encoder":
        return 0
    return network(*network.examples(1)).shape[1]


def rename(state, *pairs):
    """Replace parts of the names in a state dict, in order."""
    for old, new in pairs:
        state = {key.replace(old, new): value for key, value in state.items()}
    return state


def split_qkv(state, part, *names):
    """Split qkv.PART of each block into three tensors of these names. None drops one: BEiT has no
    bias of k, which adds the same to all logits of a query, so that the softmax cancels it."""
    split = {}
    for key, tensor in state.items():
        stem = key.removesuffix(f"qkv.{part}")
        if stem == key:
            split[key] = tensor
        else:
            split.update({stem + name: x for name, x in zip(names, tensor.chunk(3)) if name})
    return split


def write_folder(out, state, **configs):
    """Write out/model.safetensors, and out/NAME.json for each config."""
    from safetensors.torch import save_file
    out.mkdir(parents=True, exist_ok=True)
    state = {key: tensor.contiguous() for key, tensor in state.items()}
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    for name, config in configs.items():
        (out / f"{name}.json").write_text(json.dumps(config, indent=1) + "\n")


def to_timm(network, out, names):
    """A folder for timm: of its ViT, its BEiT if there is a relative position bias, its Hiera."""
    import timm
    model, arch = network.model, network.model.arch
    keys = ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "stages")
    sizes = {key: arch[key] for key in keys if key in arch}
    state = model.state_dict()
    pool = "avg" if network.kind == "classifier" else ""
    if arch["kind"] == "hiera":
        name = "hiera_base_224"
        del sizes["depth"]
        state = rename(state, ("head.projection", "head.fc"))
        for part, value in (("weight", 1.0), ("bias", 0.0)):    # not in an encoder, nor in features
            value = state.pop(f"norm.{part}", torch.full([model.embed_dim], value))
            state[f"head.norm.{part}"] = value
    elif arch.get("rel_pos_bias"):
        name = "beit_base_patch16_224"
        sizes.update(use_abs_pos_emb=True, init_values=None)
        state = split_qkv(state, "bias", "q_bias", None, "v_bias")
    else:
        name = "vit_base_patch16_224"
    pixels = dict(input_size=[3, *model.img_size], mean=model.mean, std=model.std, crop_pct=0.875,
                  interpolation="bicubic", fixed_input_size=True)
    if names:
        pixels["label_names"] = names
    write_folder(out, state, config=dict(
        architecture=name, num_classes=count_classes(network), pretrained_cfg=pixels,
        model_args=dict(sizes, global_pool=pool)))
    peer = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    line = f'timm.create_model("local-dir:{out}", pretrained=True)'
    return line, peer if pool else peer.forward_features


def to_transformers(network, out, names):
    """A folder for transformers: of ViTModel or, for a classifier or a relative position bias, of
    BEiT. ViTForImageClassification reads the class token, BeitForImageClassification the mean
    patch token. The names are those of files on the hub, which all versions read."""
    import transformers
    model, arch = network.model, network.model.arch
    if arch["kind"] == "hiera":
        raise InputError("--to transformers takes a ViT: for Hiera give --to timm")
    classify = network.kind == "classifier"
    beit = classify or arch.get("rel_pos_bias")
    if beit and len(set(model.img_size)) > 1:
        raise InputError(f"BEiT in transformers reads square images, not {model.img_size}: give "
                         "--to timm")
    state = split_qkv(model.state_dict(), "weight", "query.weight", "key.weight", "value.weight")
    state = split_qkv(state, "bias", "query.bias", None if beit else "key.bias", "value.bias")
    state = rename(
        state, ("attn.relative", "attn.relative_position_bias.relative"),
        ("attn.proj", "attention.output.dense"), ("attn.", "attention.attention."),
        ("norm1", "layernorm_before"), ("norm2", "layernorm_after"),
        ("mlp.fc1", "intermediate.dense"), ("mlp.fc2", "output.dense"),
        ("blocks.", "encoder.layer."),
        ("cls_token", "embeddings.cls_token"), ("pos_embed", "embeddings.position_embeddings"),
        ("patch_embed.proj", "embeddings.patch_embeddings.projection"),
        ("fc_norm", "pooler.layernorm"))
    state = {f"layernorm.{key[5:]}" if key.startswith("norm.") else key: value
             for key, value in state.items()}
    if classify:
        state = {f"classifier.{key[5:]}" if key.startswith("head.") else f"beit.{key}": value
                 for key, value in state.items()}

    name = "BeitForImageClassification" if classify else "BeitModel" if beit else "ViTModel"
    config = dict(
        model_type="beit" if beit else "vit", architectures=[name], hidden_size=arch["embed_dim"],
        num_hidden_layers=arch["depth"], num_attention_heads=arch["num_heads"],
        intermediate_size=4 * arch["embed_dim"], image_size=list(model.img_size),
        patch_size=arch["patch_size"], layer_norm_eps=1e-6)
    if beit:
        config.update(use_absolute_position_embeddings=True, layer_scale_init_value=0.0,
                      use_relative_position_bias=arch.get("rel_pos_bias", False),
                      use_mean_pooling=classify)
    if classify:
        names = names or [f"class {k}" for k in range(count_classes(network))]
        config.update(id2label=dict(enumerate(names)), label2id={n: k for k, n in enumerate(names)})
    h, w = model.img_size
    pixels = dict(image_processor_type="BitImageProcessor", size={"shortest_edge": int(h / 0.875)},
                  crop_size={"height": h, "width": w}, resample=3, image_mean=model.mean,
                  image_std=model.std)
    write_folder(out, state, config=config, preprocessor_config=pixels)
    options = {} if classify else dict(add_pooling_layer=False)
    peer = getattr(transformers, name).from_pretrained(out, **options).eval()
    text = "".join(f", {key}={value}" for key, value in options.items())
    line = f'transformers.{name}.from_pretrained("{out}"{text})'
    return line, lambda images: peer(images)["logits" if classify else "last_hidden_state"]


class ConvEmbed(PatchEmbed):
    """The patch embedding as a convolution, which ncnn's converter knows."""

    def forward(self, images, ids_keep=None):
        return self.proj(images).flatten(2).transpose(1, 2)


class SplitAttention(Attention):
    """Attention that splits qkv first: ncnn has no axis for the batch, nor tensors of 5 axes."""

    def project(self, x):
        return [y.unflatten(2, (self.num_heads, -1)).transpose(1, 2)
                for y in self.qkv(x).chunk(3, dim=2)]


class SplitRelativeAttention(SplitAttention, RelativeAttention):
    pass


def to_ncnn(network, out, names):
    """OUT.pt, TorchScript for one image, which pnnx converts: a ViT or a segmenter on one."""
    if network.kind == "tracker" or network.model.arch["kind"] == "hiera":
        raise InputError("--to ncnn takes a ViT or a segmenter on one: neither the tracker nor "
                         "Hiera converts")
    simple = copy.deepcopy(network)
    for module in simple.modules():    # the same weights, another forward
        same = {PatchEmbed: ConvEmbed, Attention: SplitAttention,
                RelativeAttention: SplitRelativeAttention}
        module.__class__ = same.get(type(module), type(module))
    path = Path(f"{out}.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")    # pnnx reads TorchScript, which PyTorch deprecates
        traced = torch.jit.trace(simple, network.examples(1))
    traced.save(path)
    h, w = network.sizes[0]
    return f"pnnx {path} inputshape=[1,3,{h},{w}]f32", traced


TO = {"timm": to_timm, "transformers": to_transformers, "ncnn": to_ncnn}


def export_to(network, args, content):
    """Write the files of --to; compare the model that they hold with this one."""
    if args.to != "ncnn" and network.kind not in ("encoder", "classifier"):
        raise InputError(f"--to {args.to} takes an encoder or a classifier: {args.file} is a "
                         f"{network.kind}")
    names = content.get("classes") if network.kind == "classifier" else None
    line, peer = TO[args.to](network, Path(args.out), names)
    images = network.examples(1)
    worst = difference([peer(*images)], in_pytorch(network)(*images))
    if worst > 1e-4:
        raise InputError(f"what {line} reads differs from the model by {worst:.1e}: do not use it")
    print(f"{line}\nlargest difference {worst:.1e} of the largest value")


# --------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------
def require(*packages):
    """Raise InputError unless all packages are installed."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"this export needs more packages: pip install {' '.join(missing)}")


def parse_args(argv=None):
    summary, _, details = __doc__.partition("\n\n")
    parser = Parser(summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.usage = "%(prog)s FILE OUT [options]"
    parser.add_argument("file", metavar="FILE", help="checkpoint")
    parser.add_argument("out", metavar="OUT", help="OUT.onnx, OUT.pt (ncnn), or a folder (others)")
    add = parser.group("model")
    parser.pixel_options(add, "that of the file")
    add("--model", help="size, where an encoder or classifier of others stores no number of heads")
    add("--keep-rate", type=float, low=0.01, high=1,
        help="share of search tokens that blocks 4, 7 and 10 of a tracker keep; default: 1")
    add = parser.group("export")
    add("--to", choices=PACKAGES, default="onnx", help="format")
    add("--uint8", action="store_true", help="take pixels in 0 .. 255, and normalise them inside")
    add("--int8", action="store_true", help="quantise to OUT.int8.onnx, too")
    add("--data", help="score what was written on this data: top-1 on val, mIoU on validation, or "
                       "boxes on training videos (lasot=DIR,...)")
    add("--openvino", action="store_true",
        help="also run OUT.onnx in OpenVINO, in float32 and in its default precision")
    add("--rounds", low=1, default=20, help="measurements of time")
    args = parser.parse_args(argv)
    if args.to != "onnx":
        parser.check_unread(args, f"--to {args.to}", "file out image_size mean std model to")
    return args


def main(args):
    require(*PACKAGES[args.to], *["openvino"] * args.openvino)
    torch.set_num_threads(1)
    network, content = load_network(args)
    if args.data and network.kind not in SCORES:
        raise InputError(f"{args.file} is an encoder, which has no score: leave out --data")
    out = Path(args.out)
    written = Path(f"{out}.pt") if args.to == "ncnn" else out / "model.safetensors"
    if Path(args.file).resolve() == written.resolve():
        raise InputError(f"OUT {out} would overwrite {args.file}: give another")
    if args.to in ("timm", "transformers") and out.exists() and not out.is_dir():
        raise InputError(f"OUT {out} is a file: give a folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    if args.to == "onnx":
        export_onnx(network, args, content)
    else:
        export_to(network, args, content)


if __name__ == "__main__":
    with plain_errors():
        main(parse_args())
