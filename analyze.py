"""Layer similarity, attention, cost and curves of any checkpoints (Figs. 1, 3, 4 and 5).

    python analyze.py cka DeiT=deit_tiny_300e.pth.tar MAE=mae.pt D2-MAE=encoder.pt          # Fig. 3
    python analyze.py attention random MAE=mae.pt D2-MAE=out/pretrain/encoder.pt            # Fig. 5
    python analyze.py cost vit_tiny vit_tiny+rpe hiera_tiny --points tests/assets/fig1.csv  # Fig. 1
    python analyze.py curves MAE=out/mae D2-MAE=out/pretrain
    python analyze.py fig4 MAE=FOLDER_OF_RUNS D2-MAE=FOLDER_OF_RUNS                         # Fig. 4
    python tests/tools/demo.py analyze                                            # needs no files

Nothing here trains. `analyze.py COMMAND --help` explains a command. A model is [LABEL=]SOURCE; the
default label is the last two parts of the path. SOURCE is one of
- a checkpoint of README, "Checkpoints": MAE, MAE-Lite, DeiT, MoCo-v3, Hiera, this project's own;
- MODEL:FILE for a file that does not store its number of heads. Without MODEL, a file of width 192
  is read as vit_tiny, with 12 heads, as all of the paper's models have, its DeiT-Tiny included. For
  the DeiT of timm and of its own authors write deit_tiny:FILE (3 heads) or deit_small:FILE (6);
- the name of an untrained model: vit_tiny, vit_tiny+rpe (relative position bias), hiera_tiny, ...;
- `random`, an untrained copy of the first other model, which reads the same pixels; of vit_tiny if
  there is none.
Every command writes a picture NAME.png and its numbers, NAME.csv, to --out.

Shapes: B images, N patches, D width, H heads, Q queries and K keys of an attention map, n images of
        a CKA batch. Layers count from 1, as in the paper; layer 0 is the patch embedding.

NOTES, departures from the authors' code:
1. Attention distance is measured in pixels, grid distance times patch size. The authors multiply by
   14 for patches of 16 pixels (attn_analyzer.py): their numbers are 14/16 of these.
2. Entropy is exact. The authors add 1e-6 inside the logarithm.
3. Whiskers reach the lowest and the highest head: no head counts as an outlier.
4. Layer 0 is the embedding itself. The authors take the output of the first block's norm1.
5. Layer 12 is normalised by the final norm of the file, which D2-MAE trained on block 8. The
   authors' model uses global pooling; its untrained fc_norm stays at the identity.
6. Hiera has no norm after its last block; a norm without scale and bias takes its place.
7. Images are drawn at random. The authors take the first 1,152 of ImageNet, which show 24 classes.
8. HSICs are estimated on batches of 64 images. The authors take 128: --batch-size 128.
9. Blocks of Hiera that attend within mask units are excluded from the attention statistics.
"""
import csv
from collections import defaultdict
from pathlib import Path
from timeit import Timer
from zlib import crc32

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms.v2.functional import pil_to_tensor
from tqdm import tqdm

from models import (MODELS, InputError, Parser, build_model, init_distributed, list_images,
                    load_encoder, normalize, open_image, plain_errors, read_encoder, read_log,
                    read_text, unroll)


# --------------------------------------------------------------------------------------------------
# Layer similarity (Fig. 3)
# --------------------------------------------------------------------------------------------------
def representations(model, images):
    """Compute the patch tokens after the embedding (layer 0) and each block's normalised
    representation (Fig. 2), without the class token: images (B, 3, H, W) -> depth + 1 tensors
    (B, N, D).

    Tokens of Hiera stay unrolled; each stage has fewer and wider ones.
    """
    features = model.forward_features(images, range(model.depth + 1))
    if model.kind == "vit":
        return [(model.representation(x, k) if k else x)[:, 1:] for k, x in features.items()]
    *inner, last = features.values()
    tokens = [model.blocks[k].norm1(x) if k else x for k, x in enumerate(inner)]
    return [*tokens, F.layer_norm(last, last.shape[-1:], eps=1e-6)]


def centred_gram(features):
    """Gram matrix of features (n, ...), centred so that HSIC_1(K, L) = sum(K~ * L~) / (n (n - 3))
    -> (n * n,) float64.

    That is the unbiased HSIC of arXiv 2010.15327, Eq. 3, for K and L with zeroed diagonals,

        HSIC_1 = [tr KL + 1'K1 1'L1 / ((n-1)(n-2)) - 2 / (n-2) 1'KL1] / (n (n-3)),

    where K~ = K - r 1' - 1 r' + s, r_i = sum_j K_ij / (n-2), s = sum_i r_i / (n-1), and the
    diagonal is zeroed again. An offset common to all samples has no effect, so the mean is removed
    first, which saves digits. On the host: float64 does not exist on every device.
    """
    n = len(features)
    x = features.flatten(1).cpu().double()
    x = x - x.mean(dim=0)
    gram = (x @ x.T).fill_diagonal_(0)
    rows = gram.sum(dim=1) / (n - 2)
    centred = gram - rows[:, None] - rows + rows.sum() / (n - 1)
    return centred.fill_diagonal_(0).flatten()


def minibatch_cka(batches):
    """Compute CKA of each layer of model 0 with each of the others; HSICs are averaged over batches
    *before* the ratio, in which their common factor 1 / (n (n - 3)) cancels.

    batches: for each batch a list over models of lists over layers of features (n, ...), n >= 4 the
    same everywhere -> for every other model m a float64 matrix (layers of model 0, layers of m). A
    layer whose features never vary has similarity 0. Raises ValueError.
    """
    sizes = set()
    cross = defaultdict(float)    # HSIC of the layers of model 0 with those of model m
    own = defaultdict(float)      # HSIC of each layer of model m with itself
    for models in batches:
        sizes |= {len(x) for layers in models for x in layers}
        if len(sizes) > 1 or min(sizes) < 4:
            raise ValueError(f"minibatch_cka needs batches of one size, at least 4, not of {sizes}")
        grams = [torch.stack([centred_gram(x) for x in layers]) for layers in models]
        for m, gram in enumerate(grams):                                    # gram (layers, n * n)
            cross[m] += grams[0] @ gram.T
            own[m] += gram.square().sum(dim=1)
    return [cross[m] / (own[0][:, None] * own[m]).sqrt().clamp(min=1e-300)
            for m in range(1, len(own))]


def cka(args):
    """Layer similarity, CKA (Fig. 3): compares every input with the first, each layer of the one
    with each layer of the other."""
    models = load_models(args)
    reference, *others = models
    files = draw_files(args.data, args.images, args.seed, args.out)
    n = min(args.batch_size, len(files))
    if not others or n < 4:
        raise InputError("cka compares every model with the first: it needs two models or more, "
                         "and 4 images or more in --data, --images and --batch-size")
    files = files[:len(files) // n * n]
    matrices = minibatch_cka([representations(model, images) for _, model, images in batch]
                             for batch in batches(models, files, n))

    rows = []
    panels = defaultdict(list)
    for other, matrix in zip(others, matrices):
        for (i, j), value in np.ndenumerate(matrix):
            rows.append((reference, i, other, j, value))
            corners = (j - 0.5, i + 0.5), (j + 0.5, i - 0.5)
            panels[f"layer of {other}", f"layer of {reference}"].append((corners, shade(value), 0))
    scale = {f"CKA {v:g}": shade(v) for v in (0, 0.25, 0.5, 0.75, 1)}
    write(args.out, "cka", "reference,layer_of_reference,model,layer_of_model,cka", rows, panels,
          scale, f"layer 0: patch embedding; {len(files)} images in batches of {n}")


# --------------------------------------------------------------------------------------------------
# Attention distance and entropy (Fig. 5)
# --------------------------------------------------------------------------------------------------
def attention_statistics(logits, distance):
    """Compute attention distance and entropy of every image and head -> (2, B, H), means over
    queries i of

        sum_j p_ij |x_i - x_j|   and   -sum_j p_ij log p_ij (nats),   p = softmax of logits over j.

    logits (B, H, Q, K) before the softmax, of patch tokens alone: the class token is removed
    *before* the softmax; keys masked by -inf add nothing. distance (Q, K): Euclidean, in the unit
    of the result.
    """
    p = logits.float().softmax(dim=-1)
    distances = (p * distance.to(p.device)).sum(dim=-1)                     # (B, H, Q)
    entropies = torch.special.entr(p).sum(dim=-1)
    return torch.stack([distances, entropies]).mean(dim=-1)


def token_distances(model):
    """Distances in pixels between the tokens of each global attention map -> {block: (Q, K)}.

    ViT: raster patches. Hiera: unrolled tokens; a pooled query lies at the centre of its four
    tokens, and blocks that attend within mask units are left out.
    """
    side = model.img_size[0] // model.grid[0]
    keys = side * torch.ones(model.grid).nonzero().float()                  # raster, (N, 2)
    if model.kind == "vit":
        return dict.fromkeys(range(1, model.depth + 1), torch.cdist(keys, keys))
    keys = unroll(keys.t().unflatten(1, model.grid)[None])[0]
    distances = {}
    for k, block in enumerate(model.blocks, start=1):
        queries = keys.unflatten(0, (4, -1)).mean(dim=0) if block.attn.q_pool else keys
        if not block.attn.tokens_per_unit:
            distances[k] = torch.cdist(queries, keys)
        keys = queries
    return distances


def attention(args):
    """Attention distance and entropy (Fig. 5): compares the heads of every block of all inputs.
    Blocks of Hiera that attend within mask units, which bounds both, are left out."""
    models = load_models(args)
    files = draw_files(args.data, args.images, args.seed, args.out)
    means = defaultdict(float)                                              # (label, block): (2, H)
    for batch in batches(models, files, args.batch_size):
        for label, model, images in batch:
            features = model.forward_features(images, range(model.depth))
            for k, distance in token_distances(model).items():
                queries, keys = distance.shape
                logits = model.attention_map(features[k - 1], k)            # a class token is first
                values = attention_statistics(logits[:, :, -queries:, -keys:], distance)
                means[label, k] += values.sum(dim=1).cpu() / len(files)

    colors = dict(zip(models, COLORS))
    shifts = dict(zip(models, np.linspace(-0.5, 0.5, len(models) + 2)[1:]))
    names = "attention distance (pixels)", "attention entropy (nats)"
    rows = []    # a row for each head
    panels = defaultdict(list)
    for (label, block), values in means.items():
        for head, pair in enumerate(values.T.tolist(), start=1):
            rows.append((label, block, head, *pair))
        quartiles = np.quantile(values, (0, 0.25, 0.5, 0.75, 1), axis=1)
        for name, ys in zip(names, quartiles.T):
            color = colors[label]
            points = [(block + shifts[label], y) for y in ys]
            panels["block", name] += [(points, color, 2), (points[1:4], color, 12),
                                      (points[2:3], color, 7), (points[2:3], "white", 4)]
    write(args.out, "attention", "model,block,head,distance_px,entropy_nats", rows, panels, colors,
          f"{len(files)} images; of the heads of a block: extremes, quartiles (thick) and median")


# --------------------------------------------------------------------------------------------------
# Cost (Fig. 1)
# --------------------------------------------------------------------------------------------------
def cost(args):
    """Cost (Fig. 1): compares latency at batch size 1, parameters and multiply-adds of all inputs
    with 1000 classes; with --points, top-1 accuracy against latency.

    Multiply-adds are the "FLOPs" of papers (ViT-Tiny: 1.25e9); attention counts as its two
    products.
    """
    models = load_models(args, num_classes=1000)
    lines = defaultdict(list)
    latency = {}
    for label, model in models.items():
        device = model.pos_embed.device
        image = torch.zeros(1, 3, *model.img_size, device=device)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            model(image)
        timer = Timer(lambda: model(image).cpu())               # .cpu() waits for the device
        number, seconds = timer.autorange()                     # 0.2 s or more: the warm-up
        times = timer.repeat(8 + int(args.seconds * number / seconds), number=1)
        low, ms, high = 1000 * np.quantile(times, (0.1, 0.5, 0.9))
        parameters = sum(p.numel() for p in model.parameters()) / 1e6
        operations = counter.get_total_flops() / 2e9
        print(f"{label}: {parameters:.2f}M parameters, {operations:.2f}G multiply-adds, "
              f"{ms:.2f} ms (median; 10th to 90th percentile: {low:.2f} to {high:.2f} ms)")
        latency[label] = ms
        lines["parameters (M)", label] = [(ms, parameters, None)]
        lines["multiply-adds (G)", label] = [(ms, operations, None)]
    try:
        rows = read_text(args.points).splitlines() if args.points else ()
        for row in csv.DictReader(rows):
            point = latency[row["model"]], float(row["top1"]), None
            lines["top-1 (%)", row["label"]].append(point)
    except (LookupError, TypeError, ValueError) as error:
        raise InputError(f"--points {args.points} needs label, model (the label of an input) and "
                         f"top1 in each row: {error}") from None
    name = torch.cuda.get_device_name() if device.type == "cuda" else device.type
    draw_lines(args.out, "cost", lines, "latency (ms)",
               f"{name}, {torch.get_num_threads()} CPU thread(s), float32")


# --------------------------------------------------------------------------------------------------
# Training curves, and accuracy by pre-trained blocks kept (Fig. 4)
# --------------------------------------------------------------------------------------------------
def read_run(path):
    """Read a log.jsonl, given as such or by its folder -> settings of the run (its options, the
    sizes of its model, numbers of images), and the other lines of its log. Raises InputError."""
    path = Path(path)
    if path.is_dir():
        path /= "log.jsonl"
    try:
        first, *lines = read_log(path)
        return {**first, **first["args"]}, lines
    except (LookupError, TypeError, ValueError):
        raise InputError(f"{path} is not the log.jsonl of a run") from None


def curves(args):
    """Curves of what runs have logged, by step: compares all inputs, folders of runs of any script,
    or their log.jsonl."""
    lines = defaultdict(list)
    for label, path in named(args.inputs).items():
        for line in read_run(path)[1]:
            for key, value in line.items():
                if isinstance(value, float):    # counts are whole
                    lines[key, label].append((line["step"], value, None))
    for (key, label), points in lines.items():
        _, values, _ = zip(*points)
        print(f"{key}, {label}: {values[0]:.4g} at the start, {values[-1]:.4g} at the end, lowest "
              f"{min(values):.4g}, highest {max(values):.4g}")
    draw_lines(args.out, "curves", lines, "step", "what the runs logged")


def mean_and_error(values):
    """Mean and its standard error, None for a single value."""
    n = len(values)
    return np.mean(values), np.std(values, ddof=1) / n ** 0.5 if n > 1 else None


SAME_POINT = {"epoch", "commit", "args", "arch", "keep_blocks", "seed", "data", "out", "no_resume",
              "device", "dtype", "workers", "accum_steps", "compile", "log_every",
              "eval_every"}    # settings that may differ among the runs of a point


def fig4(args):
    """Top-1 accuracy by the number of pre-trained blocks kept (Fig. 4): compares folders of
    fine-tuning runs. Runs that differ in --seed alone make one point, with their mean and standard
    error; a folder whose runs differ in other options has one line for each setting of them."""
    lines = defaultdict(list)
    for label, folder in named(args.inputs).items():
        points = defaultdict(list)    # (options as text, blocks kept): last top-1 of each run
        for path in sorted(Path(folder).rglob("log.jsonl")):
            settings, logged = read_run(path)
            last = (logged or [{}])[-1]
            if "top1" not in last or last["epoch"] < settings["epochs"]:
                print(f"{path}: skipped, this is not the log of a finished fine-tuning run")
                continue
            blocks = settings["keep_blocks"]
            if blocks is None:
                blocks = settings["arch"]["depth"] if settings["init"] else 0
            texts = [f"{k} {v}" for k, v in settings.items()
                     if k not in SAME_POINT and v is not None]    # older logs lack newer options
            options = tuple(text if len(text) < 60 else f"{text[:40]}... #{crc32(text.encode()):x}"
                            for text in sorted(texts))    # a checksum tells long ones apart
            points[options, blocks].append(last["top1"])

        for (options, blocks), top1 in sorted(points.items()):
            differing = [text for text in options if any(text not in other for other, _ in points)]
            name = ", ".join([label, *differing])
            mean, error = mean_and_error(top1)
            spread = f"+- {error:.2f} of {len(top1)} runs" if len(top1) > 1 else "of 1 run"
            print(f"{name}, {blocks} blocks kept: {mean:.2f} {spread}")
            lines["top-1 (%)", name].append((blocks, mean, error))
    draw_lines(args.out, "fig4", lines, "pre-trained blocks kept",
               "mean and standard error of runs")


# --------------------------------------------------------------------------------------------------
# Models and images
# --------------------------------------------------------------------------------------------------
def named(inputs):
    """[LABEL=]SOURCE ... -> {label: source}. The default label is the last two parts of the path.
    """
    sources = {}
    for text in inputs:
        label, equals, source = text.partition("=")
        if not equals or Path(text).exists():
            label = "/".join(Path(text).parts[-2:])
            source = text
        if label in sources:
            raise InputError(f"two inputs are labelled {label}: tell them apart by LABEL=...")
        sources[label] = source
    return sources


def open_source(source):
    """A SOURCE -> name of its model or None, whether "+rpe" was added to it, and its file as
    `read_encoder` reads it, or None."""
    name, _, path = source.partition(":")
    name, rpe, _ = name.partition("+rpe")
    if name not in MODELS:    # a path, which may have a colon of its own
        name, rpe, path = None, "", source
    return name, bool(rpe), read_encoder(path or None)


def load_models(args, num_classes=0):
    """Load the models of the command line -> {label: model} on the device, frozen. All get one
    image size, by default that of the first that is not `random`; --mean and --std are for files
    that store none. Raises InputError."""
    _, _, device, _ = init_distributed(args.device, "fp32")
    torch.set_float32_matmul_precision("highest")
    sources = named(args.inputs)
    others = [source for source in sources.values() if source != "random"] + ["vit_tiny"]
    size = args.image_size
    models = {}
    for label, source in sources.items():
        name, rpe, file = open_source(others[0] if source == "random" else source)
        pooled = num_classes or (file and file.supervised)    # others as they were pre-trained
        pixels = {} if file and file.arch.get("mean") else dict(mean=args.mean, std=args.std)
        torch.manual_seed(args.seed)
        model = build_model(name, file, rpe, img_size=size, num_classes=num_classes,
                            q_pool=3 if pooled else 2, **pixels)
        if file and source != "random":
            load_encoder(model, file)
        size = model.img_size
        print(f"{label}: {model.img_size} pixels, mean {model.mean}, std {model.std}")
        models[label] = model.eval().requires_grad_(False).to(device)
    return models


def draw_files(folder, count, seed, out):
    """At most `count` image files of a folder, drawn at random; nothing below `out` is one."""
    files = list_images(folder, out)
    return [files[i] for i in np.random.default_rng(seed).permutation(len(files))[:count]]


def batches(models, files, n):
    """Yield for n images at a time a list of (label, model, images (B, 3, H, W)), normalised as in
    the training of that model.

    Images are the central 224/256 of the pictures in the shape of the models' image size, bicubic
    and antialiased. Raises OSError naming a file that cannot be read.
    """
    first, *_ = models.values()
    size = first.img_size[::-1]
    for start in tqdm(range(0, len(files), n), leave=False):
        images = torch.stack([
            pil_to_tensor(ImageOps.fit(open_image(file), size, bleed=1 / 16))
            for file in files[start:start + n]]).to(first.pos_embed.device)
        yield [(label, model, normalize(images, model.mean, model.std))
               for label, model in models.items()]


# --------------------------------------------------------------------------------------------------
# Tables and pictures. Lengths are in half pixels: pictures are drawn at twice their size and then
# reduced, which smooths lines and letters
# --------------------------------------------------------------------------------------------------
def blank(height):
    image = Image.new("RGB", (1080, height), "white")
    draw = ImageDraw.Draw(image)
    draw.font = ImageFont.load_default(26)
    return image, draw


def write(out, name, header, rows, panels, legend, note):
    """Write the table NAME.csv and the picture NAME.png to the folder `out`: a legend {label:
    color} and a note, a line each, above the panels {(label of x, label of y): marks}."""
    Path(out).mkdir(parents=True, exist_ok=True)
    path = f"{out}/{name}"
    with open(f"{path}.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header.split(","), *rows])

    top, draw = blank(40 * len(legend) + 60)
    for i, (label, color) in enumerate([*legend.items(), (note, "white")]):
        y = 40 * i + 18
        draw.rectangle((32, y, 60, y + 24), color)
        draw.text((72, y - 2), label, "black")
    sheet = np.vstack([top, *(draw_panel(*labels, marks) for labels, marks in panels.items())])
    Image.fromarray(sheet).reduce(2).save(f"{path}.png")
    print(f"{path}.png and .csv: {note}")


def draw_lines(out, name, lines, xlabel, note):
    """Write {(quantity, label): [(x, y, standard error or None)]}, a panel for each quantity, a
    colour for each label, with dots and bars of +- error where the points are few."""
    if not lines:
        raise InputError(f"nothing to draw: {name} found no results of finished epochs or runs")
    colors = {}
    rows = []
    panels = defaultdict(list)
    for (quantity, label), points in lines.items():
        rows += [(quantity, label, *point) for point in points]
        color = colors.setdefault(label, COLORS[len(colors)])
        marks = panels[xlabel, quantity]
        marks.append(([point[:2] for point in points], color, 4))
        for x, y, error in points if len(points) < 40 else ():
            marks.append(([(x, y)], color, 7))
            if error:
                marks.append(([(x, y - error), (x, y + error)], color, 2))
    write(out, name, f"quantity,label,{xlabel},value,standard_error", rows, panels, colors, note)


COLORS = 4 * ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000",
              "#8c564b", "#999999", "#7f3c8d", "#7fb800")    # seven for the colour-blind


def shade(value):
    """Colour of a value 0 .. 1, like magma: black over purple and orange to pale yellow."""
    value = max(value, 0)
    return f"hsl({(260 + 150 * value) % 360:.0f}, 75%, {6 + 82 * value:.0f}%)"


def axis(values, start, end):
    """Choose ticks, multiples of 1, 2 or 5 times a power of ten, nine at most, which enclose the
    values up to a quarter of a step -> ticks, function from values to the range start .. end."""
    low = min(values)
    high = max(values)
    third = round(3 * np.log10((high - low or abs(high) or 1) / 5))
    step = float(f"{10 ** (third / 3):.0e}")    # the third roots of 1, 10 and 100, rounded
    ticks = step * np.arange(np.floor(low / step + 0.25), np.ceil(high / step - 0.25) + 1)
    ends = ticks[0] - step / 4, ticks[-1] + step / 4
    return ticks, lambda value: np.interp(value, ends, (start, end))


def draw_panel(xlabel, ylabel, marks):
    """Draw marks (points [(x, y), ...], color, width) within axes that enclose them -> image of
    1080 x 560; the label of the y axis stands above it. A mark is a polyline, a dot of radius
    `width` if it has one point, or a rectangle from upper left to lower right if its width is 0.
    """
    image, draw = blank(560)
    xs, ys = np.concatenate([points for points, _, _ in marks]).T
    xticks, place_x = axis(xs, 110, 1048)
    yticks, place_y = axis(ys, 468, 60)
    draw.text((110, 50), ylabel, "black", anchor="ld")
    draw.text((579, 510), xlabel, "black", anchor="ma")
    for value in xticks:
        draw.text((place_x(value), 476), f"{value:g}", "black", anchor="ma")
    for value in yticks:
        y = place_y(value)
        draw.line((110, y, 1048, y), "#d0d0d0", 2)
        draw.text((98, y), f"{value:g}", "black", anchor="rm")
    for points, color, width in marks:
        places = [(place_x(x), place_y(y)) for x, y in points]
        if width == 0:
            draw.rectangle(places, color)
        elif len(places) == 1:
            draw.circle(places[0], width, color)
        else:
            draw.line(places, color, width)
    return image


# --------------------------------------------------------------------------------------------------
# Arguments
# --------------------------------------------------------------------------------------------------
def model_options(parser, add):
    """Options of `load_models`."""
    parser.pixel_options(add, "that of the first model but random",
                         "for files that store none; default: ImageNet's")
    add("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto",
        help="auto: the first available of cuda, mps and cpu")
    add("--seed", low=0, default=0, help="seed of untrained weights and of the choice of images")


def image_options(add):
    """Options of `draw_files` and `batches`."""
    add("--data", default="data/imagenet/val", help="folder of images, flat or nested")
    add("--images", low=1, default=1024, help="number of images to sample, at most")
    add("--batch-size", low=1, default=64,
        help="images per forward pass; of cka, per minibatch of the unbiased HSIC")


def parse_args(argv=None):
    """Parse the command line, or the list `argv`."""
    parser = Parser(__doc__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True, prog=parser.prog)
    for command in (cka, attention, cost, curves, fig4):
        doc = command.__doc__
        sub = commands.add_parser(command.__name__, doc=doc, help=doc.split(":")[0])
        sub.usage = "%(prog)s [LABEL=]SOURCE ... [options]"
        sub.set_defaults(command=command)
        add = sub.group("inputs and outputs")
        add("inputs", nargs="+", help="of curves and fig4: folders of runs; of the others: "
            "checkpoints, MODEL:FILE, names of untrained models such as vit_tiny or vit_tiny+rpe, "
            "or random (see the docstring of analyze.py)")
        add("--out", default="out/analyze", help="folder for picture and table")
        if command not in (curves, fig4):
            model_options(sub, add)
        if command in (cka, attention):
            image_options(add)
        if command is cost:
            add("--seconds", type=float, low=0, default=5.0, help="time for each model")
            add("--points", help="CSV with the columns label, model (the label of an input), top1 "
                                 "(%%); draws top-1 accuracy against latency")
    return parser.parse_args(argv)


def main(args):
    args.command(args)


if __name__ == "__main__":
    with plain_errors():
        main(parse_args())
