"""Layer similarity, attention, probes, cost and curves of any checkpoints (Figs. 1, 3, 4 and 5).

    python analyze.py cka DeiT=deit_tiny:deit.pth MAE=mae.pt D2-MAE=out/pretrain/encoder.pt # Fig. 3
    python analyze.py attention random MAE=mae.pt D2-MAE=out/pretrain/encoder.pt            # Fig. 5
    python analyze.py probe random MAE=mae.pt D2-MAE=out/pretrain/encoder.pt --data CLASS_FOLDERS
    python analyze.py cost vit_tiny vit_tiny+rpe hiera_tiny --points tests/assets/fig1.csv  # Fig. 1
    python analyze.py curves MAE=out/mae/log.jsonl D2-MAE=out/pretrain/log.jsonl
    python analyze.py curves MAE=out/mae/fig4.csv D2-MAE=out/d2/fig4.csv                    # Fig. 4
    python analyze.py --demo                  # on drawn pictures, after pretrain_d2mae.py --demo

Nothing here trains. A model is [LABEL=]SOURCE, and a SOURCE is
- a checkpoint of README, "Checkpoints": MAE, MAE-Lite, DeiT, MoCo-v3, Hiera, this project's own;
- MODEL:FILE if its number of heads, which weights do not tell, is not that of the standard model;
- the name of an untrained model: vit_tiny, vit_tiny+rpe (relative position bias), hiera_tiny, ...;
- `random`, an untrained copy of the first other model.
Every command writes pictures, and the numbers behind them as .csv, to --out.

Shapes: B images, N patches, D width, H heads, Q queries and K keys of an attention map, n images of
        a CKA batch, t training and s test images of a probe, C classes. Layers count from 1, as in
        the paper; layer 0 is the patch embedding.

NOTES, departures from the authors' code:
- Attention distance is in pixels: grid distance times patch size. The authors multiply by 14 for
  patches of 16 pixels: their numbers are 14/16 of these. Entropy has no 1e-6 inside the logarithm.
- Whiskers reach the lowest and the highest head: no head counts as an outlier.
- Layer 0 is the embedding itself; the authors' stands behind the first block's norm1.
- Layer 12 is normalised by the file's own norm, which D2-MAE trained on block 8. The authors' model
  pools: its fc_norm is in no file of pre-training, and stays without scale and bias. Hiera has no
  norm behind its last block: that stands for it here, too.
- Images are drawn at random; the authors take the first 1,152 of ImageNet's, that is of 24 classes.
- Blocks of Hiera that attend within mask units are left out of the attention statistics.
"""
import argparse
import csv
import functools
import math
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from PIL.ImageColor import getrgb
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from models import (IMAGENET_MEAN, IMAGENET_STD, MODELS, READ_ERRORS, InputError,
                    VisionTransformer, choose_device, infer_model, list_images, load_encoder,
                    load_state, mean_and_error, normalize, number, open_item, pair, plain_errors,
                    read_log, to_tensor, toy_picture, unroll)


# --------------------------------------------------------------------------------------------------
# Layer similarity (Fig. 3)
# --------------------------------------------------------------------------------------------------
def representations(model, images):
    """Patch tokens after the embedding (layer 0), and the normalised representation of each block
    (Fig. 2), without the class token: images (B, 3, H, W) -> depth + 1 tensors (B, N, D).

    Tokens of Hiera stay unrolled, and get fewer and wider with each stage.
    """
    features = model.forward_features(images, range(model.depth + 1))
    if isinstance(model, VisionTransformer):
        return [(model.representation(x, k) if k else x)[:, 1:] for k, x in features.items()]
    last = features.pop(model.depth)
    inner = [model.blocks[k].norm1(x) if k else x for k, x in features.items()]
    return inner + [F.layer_norm(last, last.shape[-1:], eps=1e-6)]


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
    x = features.flatten(1).cpu().to(torch.float64, copy=True)
    x -= x.mean(dim=0)
    gram = (x @ x.T).fill_diagonal_(0)
    rows = gram.sum(dim=1) / (n - 2)
    centred = gram - rows[:, None] - rows + rows.sum() / (n - 1)
    return centred.fill_diagonal_(0).flatten()


def minibatch_cka(batches):
    """CKA of each layer of model 0 with each layer of the others; HSICs are averaged over batches
    *before* the ratio.

    batches: for each batch a list over models of lists over layers of features (n, ...), n >= 4
    -> for every other model m a float64 matrix (layers of model 0, layers of m). A layer whose
    features never vary has similarity 0.
    """
    cross = defaultdict(float)    # HSIC of the layers of model 0 with those of model m
    own = defaultdict(float)      # HSIC of each layer of model m with itself
    for models in batches:
        n = len(models[0][0])
        grams = [torch.stack([centred_gram(x) for x in layers]) for layers in models]
        for m, gram in enumerate(grams):                                    # gram (layers, n * n)
            cross[m] += grams[0] @ gram.T / (n * (n - 3))
            own[m] += gram.square().sum(dim=1) / (n * (n - 3))
    return [cross[m] / (own[0][:, None] * own[m]).sqrt().clamp(min=1e-300)
            for m in range(1, len(own))]


@torch.no_grad()
def cka(args):
    """Fig. 3: similarity of the layers of the first model with those of the others."""
    models = load_models(args)
    reference, *others = models
    if not others:
        raise InputError("cka compares two models or more: name the reference first")
    items, _ = list_items(args)
    n = min(args.batch_size, len(items))
    if n < 4:
        raise InputError("the unbiased HSIC needs 4 images or more in --data and --batch-size")
    items = items[:len(items) // n * n]
    matrices = minibatch_cka(
        [representations(model, prepare(model, images)) for model in models.values()]
        for images in batches(items, args, n))

    scale = {f"CKA {v:g}": magma(v) for v in (0, 0.25, 0.5, 0.75, 1)}
    figure = Figure(len(others), 3, scale,
                    f"layer 0: patch embedding; {len(items) // n} batches of {n} images")
    rows = []
    for other, matrix in zip(others, matrices):
        height, width = matrix.shape
        figure.panel(f"layer of {other}", f"layer of {reference}",
                     (-0.5, width - 0.5), (-0.5, height - 0.5))
        figure.heatmap(matrix)
        rows += [(reference, i, other, j, value) for (i, j), value in np.ndenumerate(matrix)]
    save(args, "cka", "reference,layer_of_reference,model,layer_of_model,cka", rows, figure)


# --------------------------------------------------------------------------------------------------
# Attention distance and entropy (Fig. 5)
# --------------------------------------------------------------------------------------------------
def attention_statistics(logits, distance):
    """Attention distance and entropy of every image and head -> two (B, H), means over queries i of

        sum_j p_ij |x_i - x_j|   and   -sum_j p_ij log p_ij (nats),   p = softmax of logits over j.

    logits (B, H, Q, K) before the softmax, of patch tokens alone: the class token is removed
    *before* the softmax. distance (Q, K): Euclidean, in the unit that the result is to have.
    """
    log_p = logits.float().log_softmax(dim=-1)
    p = log_p.exp()
    distances = (p * distance.to(p.device)).sum(dim=-1)
    entropies = -(p * log_p).sum(dim=-1)                                    # (B, H, Q)
    return distances.mean(dim=-1), entropies.mean(dim=-1)


def token_distances(model):
    """Distances in pixels between the tokens of each global attention map -> {block: (Q, K)}.

    ViT: raster patches. Hiera: unrolled tokens; a pooled query lies at the centre of its four
    tokens, and blocks that attend within mask units are left out.
    """
    vit = isinstance(model, VisionTransformer)
    side = model.patch_size if vit else model.patch_stride
    y, x = (side * torch.arange(float(n)) for n in model.grid)
    keys = torch.cartesian_prod(y, x)                                       # (N, 2), raster
    if vit:
        return dict.fromkeys(range(1, model.depth + 1), torch.cdist(keys, keys))
    keys = unroll(keys[None], model.grid)                                   # (1, N, 2)
    distances = {}
    for k, block in enumerate(model.blocks, start=1):
        queries = keys.unflatten(1, (4, -1)).mean(dim=1) if block.attn.q_pool else keys
        if not block.attn.tokens_per_unit:
            distances[k] = torch.cdist(queries, keys)[0]
        keys = queries
    return distances


@torch.no_grad()
def attention(args):
    """Fig. 5: attention distance and entropy of the heads of every block."""
    models = load_models(args)
    items, _ = list_items(args)
    distances = {label: token_distances(model) for label, model in models.items()}
    for label, model in models.items():
        if len(distances[label]) < model.depth:
            print(f"{label}: left out are blocks that attend within mask units of 32x32 pixels, "
                  "which bounds distance and entropy")
    means = defaultdict(float)                                              # (label, block): (2, H)
    for images in batches(items, args, args.batch_size):
        for label, model in models.items():
            features = model.forward_features(prepare(model, images), range(model.depth))
            for block, distance in distances[label].items():
                logits = model.attention_map(features[block - 1], block)
                queries, keys = distance.shape
                logits = logits[:, :, -queries:, -keys:]                    # no class token
                values = torch.stack(attention_statistics(logits, distance))    # (2, B, H)
                means[label, block] += values.sum(dim=1).cpu() / len(items)

    rows = [(*key, head, *pair) for key, values in means.items()
            for head, pair in enumerate(values.T.tolist(), start=1)]
    colors = dict(zip(models, COLORS))
    figure = Figure(2, 1, colors, f"{len(items)} images; a box: median, quartiles and extremes of "
                    "the heads of a block")
    last = max(block for _, block in means)
    for i, name in enumerate(("attention distance (pixels)", "attention entropy (nats)")):
        figure.panel("block", name, (0.5, last + 0.5), limits([row[3 + i] for row in rows]))
        for (label, block), values in means.items():
            place = (list(models).index(label) + 0.5) / len(models) - 0.5
            figure.box(block + 0.8 * place, values[i], 0.6 / len(models), colors[label])
    save(args, "attention", "model,block,head,distance_px,entropy_nats", rows, figure)


# --------------------------------------------------------------------------------------------------
# Few-shot probes of every layer
# --------------------------------------------------------------------------------------------------
DRAWS = 20    # random choices of the training images, the same for all models and layers


def knn_scores(train, onehot, test, neighbours=5, temperature=0.07):
    """k nearest neighbours by cosine similarity, each voting with weight exp(similarity /
    temperature). train (t, D), onehot (t, C), test (s, D) -> (s, C)."""
    similarity = F.normalize(test, dim=1) @ F.normalize(train, dim=1).T
    nearest, ids = similarity.topk(min(neighbours, len(train)), dim=1)
    return torch.einsum("sk,skc->sc", (nearest / temperature).exp(), onehot[ids])


def ridge_scores(train, onehot, test, strength=0.01):
    """Ridge regression onto one-hot labels, in its dual form: the features outnumber the images.

    W = argmin |X W - Y|^2 + lambda |W|^2 gives X* W = X* X' (X X' + lambda I)^-1 Y; lambda =
    strength * mean |x|^2, so that it does not depend on the scale of the features. train (t, D),
    onehot (t, C), test (s, D) -> (s, C).
    """
    gram = train @ train.T
    penalty = (strength * gram.diagonal().mean()).clamp(min=1e-12) * torch.eye(len(gram)).to(gram)
    return test @ train.T @ torch.linalg.solve(gram + penalty, onehot)


def draw_shots(labels, shots, seed):
    """One random choice of `shots` training images per class, labels (n,) int -> their indices,
    and those of all other images."""
    order = np.random.default_rng(seed).permutation(len(labels))
    train = [order[labels[order] == kind][:shots] for kind in np.unique(labels)]
    return np.concatenate(train), np.setdiff1d(order, train)


def probe_accuracy(features, labels, classifier, shots, draws, seed):
    """Accuracy in % on the images that are not drawn for training -> a list over draws.

    features (n, D), centred by the mean of the training images; labels (n,) int; classifier:
    `knn_scores` or `ridge_scores`. The mean over classes is taken, so that features that say
    nothing score 100 / C whatever the sizes of the classes.
    """
    features = features.double()
    onehot = F.one_hot(torch.from_numpy(labels)).double()
    accuracies = []
    for draw in range(draws):
        train, test = draw_shots(labels, shots, [seed, shots, draw])
        mean = features[train].mean(dim=0)
        scores = classifier(features[train] - mean, onehot[train], features[test] - mean)
        truth = onehot[test]
        correct = scores.argmax(dim=1) == truth.argmax(dim=1)
        share = truth[correct].sum(dim=0) / truth.sum(dim=0)                # of each class
        accuracies.append(100 * float(share.mean()))
    return accuracies


@torch.no_grad()
def probe(args):
    """Few-shot accuracy of the frozen features of every layer; --data has one folder per class."""
    models = load_models(args)
    items, classes = list_items(args)
    names, labels, sizes = np.unique(classes, return_inverse=True, return_counts=True)
    if len(names) < 2 or sizes.min() <= max(args.shots):
        raise InputError(f"--data {args.data}: probe needs one folder per class, two or more, and "
                         "in each more images than --shots; raise --images, or lower --shots")
    features = defaultdict(list)                                # (label, layer): [(B, D), ...]
    for images in batches(items, args, args.batch_size):
        for label, model in models.items():
            for layer, tokens in enumerate(representations(model, prepare(model, images))):
                features[label, layer].append(tokens.mean(dim=1).cpu())
    lines = defaultdict(list)
    for name, classifier in (("5-NN", knn_scores), ("ridge", ridge_scores)):
        for shots in args.shots:
            quantity = f"{name} accuracy (%), {shots} per class"
            for (label, layer), parts in features.items():
                accuracies = probe_accuracy(torch.cat(parts), labels, classifier, shots, DRAWS,
                                            args.seed)
                lines[quantity, label].append((layer, *mean_and_error(accuracies)))
            chance = 100 / len(names)
            lines[quantity, "chance"] = [(0, chance, 0.0), (layer, chance, 0.0)]
    draw_lines(args, "probe", lines, "layer",
               f"{len(items)} images; mean and standard error over {DRAWS} choices of the shots")


# --------------------------------------------------------------------------------------------------
# Cost (Fig. 1)
# --------------------------------------------------------------------------------------------------
def timings(model, images, seconds):
    """Forward passes for `seconds`, eight at least, of which the first quarter is warm-up ->
    median, 10th and 90th percentile in milliseconds."""
    times = []
    end = time.perf_counter() + seconds
    while len(times) < 8 or time.perf_counter() < end:
        start = time.perf_counter()
        model(images)
        if not images.is_cpu:
            torch.accelerator.synchronize()
        times.append(1000 * (time.perf_counter() - start))
    return np.quantile(times[len(times) // 4:], (0.5, 0.1, 0.9)).tolist()


def multiply_adds(model, images):
    """Multiply-adds of a forward pass, the "FLOPs" of papers (ViT-Tiny: 1.25e9). Attention counts
    as its two products."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(images)
    return counter.get_total_flops() // 2


POINTS = dict(label=str, model=str, top1=number(float, "[0, 100]"))    # columns of --points


@torch.no_grad()
def cost(args):
    """Latency at batch size 1, parameters and multiply-adds of models with 1000 classes; with
    --points, top-1 accuracy against latency (Fig. 1)."""
    points = read_csv(args.points, POINTS) if args.points else []
    for row in points:
        if row["model"] not in named(args.inputs):
            raise InputError(f"--points: model {row['model']} is not among those to be measured")
    device = choose_device(args.device)
    where = torch.cuda.get_device_name() if device.type == "cuda" else device.type
    where = (f"{where}, {torch.get_num_threads()} CPU thread(s), float32 with matmul precision "
             f"{torch.get_float32_matmul_precision()}")
    print(f"{where}; median [10th-90th percentile] in {args.seconds:g} s")
    lines = defaultdict(list)
    latency = {}
    for label, model in load_models(args, num_classes=1000).items():
        image = torch.zeros(1, 3, *args.image_size, device=device)
        ms, low, high = timings(model, image, args.seconds)
        parameters = sum(p.numel() for p in model.parameters()) / 1e6
        operations = multiply_adds(model, image) / 1e9
        print(f"{label}: {parameters:.2f}M parameters, {operations:.2f}G multiply-adds, "
              f"{ms:.2f} ms [{low:.2f}-{high:.2f}]")
        lines["parameters (M)", label] = [(ms, parameters, 0.0)]
        lines["multiply-adds (G)", label] = [(ms, operations, 0.0)]
        latency[label] = ms
    for row in points:
        lines["top-1 (%)", row["label"]].append((latency[row["model"]], row["top1"], 0.0))
    draw_lines(args, "cost", lines, "latency (ms)", where)


# --------------------------------------------------------------------------------------------------
# Training curves, and accuracy by pre-trained blocks kept (Fig. 4)
# --------------------------------------------------------------------------------------------------
BOOKKEEPING = {"data_share", "img_s", "eta_h", "memory_gb", "unreadable", "stop"}


def curves(args):
    """log.jsonl files of any script, or fig4.csv files of finetune.py (Fig. 4)."""
    lines = {}
    tables = args.inputs[0].endswith(".csv")
    for label, source in named(args.inputs).items():
        lines |= read_fig4(label, source) if tables else read_curves(label, source)
    if not lines:
        raise InputError("nothing to draw in these files: give log.jsonl files of runs")
    xlabel = "pre-trained blocks kept" if tables else "step"
    draw_lines(args, "fig4" if tables else "curves", lines, xlabel)


def read_curves(label, path):
    """log.jsonl of any script -> {(quantity, label): [(step, value, 0)]} of all that is measured:
    numbers of images and the like are whole, and constants are left out."""
    lines = defaultdict(list)
    try:
        for values in read_log(path):
            for key, value in values.items():
                if isinstance(value, float) and key not in BOOKKEEPING:
                    lines[key, label].append((values["step"], value, 0.0))
    except (ValueError, LookupError, AttributeError):
        raise InputError(f"{path} is not the log.jsonl of a run") from None
    return {name: points for name, points in lines.items()
            if len(points) == 1 or len({value for _, value, _ in points}) > 1}


def read_fig4(label, path):
    """fig4.csv of finetune.py -> {(quantity, label, data fraction): [(blocks, mean, error)]}."""
    runs = defaultdict(list)
    for row in read_csv(path, dict(keep_blocks=int, data_fraction=float, top1=float)):
        runs[row["data_fraction"], row["keep_blocks"]].append(row["top1"])
    lines = defaultdict(list)
    for (fraction, blocks), top1 in sorted(runs.items()):
        name = f"{label}, {100 * fraction:g}% of the images"
        lines["top-1 (%), mean and error over seeds", name].append((blocks, *mean_and_error(top1)))
    return lines


# --------------------------------------------------------------------------------------------------
# Models and images
# --------------------------------------------------------------------------------------------------
UNTRAINED = {**MODELS, "vit_tiny+rpe": functools.partial(MODELS["vit_tiny"], rel_pos_bias=True)}


def named(inputs):
    """[LABEL=]SOURCE ... -> {label: source}. Without a label, the source is its own."""
    sources = {}
    for text in inputs:
        label, equals, source = text.partition("=")
        if not equals or "/" in label:
            label = source = text
        if label in sources:
            raise InputError(f"two inputs are labelled {label}: tell them apart by LABEL=...")
        sources[label] = source
    return sources


def find_model(source, num_classes):
    """SOURCE -> function that builds its model, file or None, image size of the file or None."""
    if source in UNTRAINED:
        return functools.partial(UNTRAINED[source], num_classes=num_classes), None, None
    name, _, file = source.rpartition(":")
    if not Path(file).exists() or name not in ("", *MODELS):
        raise InputError(f"{source} is no file, nor MODEL:FILE, nor random, nor one of "
                         f"{', '.join(UNTRAINED)}")
    inferred, patch_size = infer_model(file)
    name = name or inferred
    state, info = load_state(file)
    if name.startswith("hiera"):    # an encoder is analysed as it was pre-trained
        options = dict(q_pool=3 if num_classes or "head.projection.weight" in state else 2)
    else:
        rpe = "blocks.0.attn.relative_position_bias_table" in state
        options = dict(patch_size=patch_size, rel_pos_bias=rpe)
    build = functools.partial(MODELS[name], num_classes=num_classes, **options)
    return build, file, info.get("arch", {}).get("img_size")


def load_models(args, num_classes=0):
    """The models of the command line, all at one image size, which is filled in -> {label: model}.
    Besides, `mean` and `std` of a model are those of the pixels that it was trained on."""
    sources = named(args.inputs)
    found = {source: find_model(source, num_classes) for source in sources.values()
             if source != "random"}
    if not found:
        raise InputError("`random` copies the first other model, and there is none: name one")
    first = next(iter(found.values()))
    found["random"] = (first[0], None, None)
    sizes = [size for _, _, size in found.values() if size]
    args.image_size = pair(args.image_size or max(sizes, default=224))
    models = {}
    for label, source in sources.items():
        build, file, _ = found[source]
        torch.manual_seed(args.seed)
        try:
            model = build(img_size=args.image_size)
        except ValueError as error:
            raise InputError(f"--image-size {args.image_size}: {error}") from None
        info = load_encoder(model, file) if file else {}
        model.mean = info.get("mean", IMAGENET_MEAN)
        model.std = info.get("std", IMAGENET_STD)
        models[label] = model.eval().requires_grad_(False).to(choose_device(args.device))
    return models


def prepare(model, images):
    """uint8 images -> on the device of the model, normalised as in its training."""
    return normalize(images.to(model.pos_embed.device), model.mean, model.std)


def load_image(item, size):
    """Image file, or number of a toy picture -> (3, H, W) uint8: the central 224/256 of the picture
    in the shape of `size`, bicubic and antialiased."""
    try:
        return to_tensor(ImageOps.fit(open_item(item), size[::-1], Image.BICUBIC, bleed=1 / 16))
    except READ_ERRORS as error:
        raise InputError(f"cannot read image {item} ({type(error).__name__}): remove it from --data"
                         ) from None


def list_items(args):
    """At most --images items of --data, drawn at random -> items, names of their classes."""
    if args.data == "toy":    # pictures that pre-training has not seen
        items = range(7000, 7000 + args.images)
        classes = [toy_picture(i)[1] for i in items]
    else:
        items = list_images(args.data)
        classes = [Path(file).parent.name for file in items]
    rng = np.random.default_rng(args.seed)
    order = rng.permutation(len(items))[:args.images]
    return [items[i] for i in order], [classes[i] for i in order]


def batches(items, args, batch_size):
    """Images (B, 3, H, W) uint8, read by several threads."""
    with ThreadPoolExecutor() as pool:
        for start in tqdm(range(0, len(items), batch_size), leave=False):
            part = items[start:start + batch_size]
            yield torch.stack(list(pool.map(load_image, part, [args.image_size] * len(part))))


# --------------------------------------------------------------------------------------------------
# Tables and pictures
# --------------------------------------------------------------------------------------------------
def read_csv(path, columns):
    """Rows of a CSV file as dictionaries. columns: name -> function that reads the text of a cell.
    Raises InputError naming the line."""
    rows = []
    with open(path, newline="", errors="replace") as file:
        for line, row in enumerate(csv.DictReader(file), start=2):
            try:
                rows.append({name: read(row[name]) for name, read in columns.items()})
            except (LookupError, TypeError, ValueError, argparse.ArgumentTypeError) as error:
                raise InputError(f"{path}, line {line}: {error}; it takes the columns "
                                 f"{', '.join(columns)}") from None
    return rows


def save(args, name, header, rows, figure):
    """Write the table NAME.csv and the picture NAME.png to --out."""
    path = f"{args.out}/{name}"
    with open(f"{path}.csv", "w", newline="") as file:
        csv.writer(file).writerows([header.split(","), *rows])
    figure.image.reduce(2).save(f"{path}.png")
    print(f"{path}.png and .csv")


def draw_lines(args, name, lines, xlabel, note=""):
    """{(quantity, label): [(x, y, standard error)]} -> a panel a quantity, a colour a label."""
    quantities = dict.fromkeys(quantity for quantity, _ in lines)
    colors = dict(zip(dict.fromkeys(label for _, label in lines), COLORS))
    figure = Figure(len(quantities), min(3, len(quantities) + 1), colors, note)
    for quantity in quantities:
        shown = {label: line for (key, label), line in lines.items() if key == quantity}
        xs, ys, errors = np.array(sum(shown.values(), [])).T
        ends = [*(ys - errors), *(ys + errors)]
        figure.panel(xlabel, quantity, limits(xs), limits(ends))
        for label, line in shown.items():
            figure.line(line, colors[label])
            print(f"{quantity}, {label}:", *(f"{y:.4g}" for _, y, _ in line[-13:]))
    rows = [(*key, *point) for key, line in lines.items() for point in line]
    save(args, name, f"quantity,label,{xlabel},value,standard_error", rows, figure)


COLORS = 4 * ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000",
              "#8c564b", "#999999", "#7f3c8d", "#7fb800")    # seven for the colour-blind


def magma(value):
    """Colour of a value 0 .. 1: black over purple and orange to pale yellow -> (r, g, b)."""
    anchors = [getrgb(c) for c in ("#000004", "#4f127b", "#b5367a", "#fb8761", "#fcfdbf")]
    return tuple(int(np.interp(4 * value, range(5), channel)) for channel in zip(*anchors))


def limits(values):
    """Range of the values and a margin on either side, never empty."""
    low = min(values)
    high = max(values)
    pad = 0.06 * (high - low) or abs(high) / 10 or 1.0
    return low - pad, high + pad


def round_ticks(low, high):
    """Multiples of 1, 2 or 5 times a power of ten inside [low, high], three to eight of them."""
    steps = (m * 10.0 ** power for power in range(-12, 13) for m in (1, 2, 5))
    step = next(step for step in steps if step >= (high - low) / 7)
    return step * np.arange(math.ceil(low / step), high / step + 1e-9)


class Figure:
    """A picture of `panels` panels of equal size, a legend {label: color} above and a note below.

    `panel` begins the next panel, in which the other methods draw. Lengths are in half pixels: the
    picture is drawn at twice its size and then reduced, which smooths lines and letters.
    """

    height = 560    # of a panel

    def __init__(self, panels, columns, legend, note):
        self.columns = min(columns, panels)
        self.width = 2160 // columns
        self.count = 0
        self.font = ImageFont.load_default(26)
        entry = 80 + max(self.font.getlength(label) for label in legend)
        per_row = int(self.columns * self.width // entry) or 1
        self.head = 16 + 40 * math.ceil(len(legend) / per_row)
        bottom = self.head + math.ceil(panels / columns) * self.height
        self.image = Image.new("RGB", (self.columns * self.width, bottom + 50), "white")
        self.draw = ImageDraw.Draw(self.image)
        for i, (label, color) in enumerate(legend.items()):
            x = 32 + i % per_row * entry
            y = 16 + i // per_row * 40
            self.draw.rectangle((x, y + 6, x + 28, y + 26), color)
            self.text((x + 40, y), label)
        self.text((32, bottom), note)

    def text(self, place, text, anchor="la"):
        self.draw.text(place, text, "black", self.font, anchor)

    def panel(self, xlabel, ylabel, xlim, ylim):
        """Frame, grid and labels; the label of the y axis stands above it."""
        row, column = divmod(self.count, self.columns)
        self.count += 1
        left = column * self.width + 110
        right = (column + 1) * self.width - 32
        top = self.head + row * self.height + 60
        bottom = self.head + (row + 1) * self.height - 92
        self.x_axis = (xlim, (left, right))
        self.y_axis = (ylim, (bottom, top))
        self.text((left, top - 10), ylabel, "ld")
        self.text(((left + right) / 2, bottom + 42), xlabel, "ma")
        for value in round_ticks(*xlim):
            x, _ = self.place(value, 0)
            self.draw.line((x, bottom, x, top), "#e0e0e0", 2)
            self.text((x, bottom + 8), f"{value:g}", "ma")
        for value in round_ticks(*ylim):
            _, y = self.place(0, value)
            self.draw.line((left, y, right, y), "#e0e0e0", 2)
            self.text((left - 12, y), f"{value:g}", "rm")
        self.draw.rectangle((left, top, right, bottom), None, "black", 2)

    def place(self, x, y):
        """Data -> half pixels."""
        return np.interp(x, *self.x_axis), np.interp(y, *self.y_axis)

    def line(self, points, color):
        """Polyline of [(x, y, error)] with bars of +- error, and dots where the points are few."""
        self.draw.line([self.place(x, y) for x, y, _ in points], color, 4, joint="curve")
        for x, y, error in points if len(points) < 40 else ():
            self.draw.line([self.place(x, y - error), self.place(x, y + error)], color, 2)
            self.draw.regular_polygon((*self.place(x, y), 7), 20, fill=color)

    def box(self, x, values, width, color):
        """Box and whiskers: quartiles, median, lowest and highest value."""
        lowest, low, median, high, highest = np.quantile(values, (0, 0.25, 0.5, 0.75, 1))
        left = x - width / 2
        right = x + width / 2
        self.draw.line([self.place(x, lowest), self.place(x, highest)], color, 2)
        self.draw.rectangle([self.place(left, high), self.place(right, low)], "white", color, 3)
        self.draw.line([self.place(left, median), self.place(right, median)], color, 6)

    def heatmap(self, values):
        """Cells (h, w) of values 0 .. 1 centred on whole coordinates, row 0 at the bottom."""
        for (y, x), value in np.ndenumerate(values):
            top_left = self.place(x - 0.5, y + 0.5)
            bottom_right = self.place(x + 0.5, y - 0.5)
            self.draw.rectangle([top_left, bottom_right], magma(value))


# --------------------------------------------------------------------------------------------------
# Arguments
# --------------------------------------------------------------------------------------------------
COMMANDS = dict(cka=cka, attention=attention, probe=probe, cost=cost, curves=curves)


def parse_args(argv=None):
    """Options of the command line, or of the list `argv`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    positive = number(int, "[1, inf)")
    add = parser.add_argument
    add("command", nargs="?", choices=COMMANDS, help="what to look at")
    add("inputs", nargs="*", help="checkpoints, MODEL:FILE, names of untrained models, or random "
                                  "(see the head of this file); of curves: log.jsonl or fig4.csv")
    add("--out", help="folder for pictures and tables; default: out/analyze, of the demo "
                      "out/demo/analyze")
    add("--demo", action="store_true", help="every command on drawn pictures, with the encoders of "
                                            "pretrain_d2mae.py --demo")

    add = parser.add_argument_group("models (all but curves)").add_argument
    add("--image-size", type=positive,
        help="side in pixels; default: the largest stored in a file, else 224")
    add("--batch-size", type=positive, default=64,
        help="images per forward pass; of cka, per minibatch of the unbiased HSIC")
    add("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto")
    add("--seed", type=number(int, "[0, 4294967296)"), default=0,
        help="of untrained weights and of the choice of images")

    add("--seconds", type=number(float, "(0, inf)"), default=5.0, help="cost: time for each model")
    add("--points", help="cost: CSV with the columns label, model (a label of those measured), "
                         "top1 (%%); draws top-1 accuracy against latency")

    add = parser.add_argument_group("images (cka, attention, probe)").add_argument
    add("--data", default="data/imagenet/val", help="folder of images, or 'toy' for drawn ones")
    add("--images", type=positive, default=1024, help="at most so many, at random")
    add("--shots", type=positive, nargs="+", default=[2, 5, 10],
        help="probe: training images per class")
    args = parser.parse_intermixed_args(argv)
    if not args.demo and not args.inputs:
        parser.error("give a command and what it is to look at, or --demo")
    args.out = args.out or ("out/demo/analyze" if args.demo else "out/analyze")
    return args


# --------------------------------------------------------------------------------------------------
# Demo, main
# --------------------------------------------------------------------------------------------------
def demo(out):
    """Every command on drawn pictures, as a user would type it."""
    runs = ("teacher=out/demo/pretrain/teacher", "D2-MAE=out/demo/pretrain", "MAE=out/demo/mae")
    found = [run for run in runs if Path(run.partition("=")[2], "encoder.pt").exists()]
    if not found:
        raise InputError("out/demo/pretrain/encoder.pt is not there: run pretrain_d2mae.py --demo")
    models = " ".join(f"{run}/encoder.pt" for run in found) + " random"
    logs = " ".join(f"{run}/log.jsonl" for run in found)
    for command in (f"cka {models} --data toy --batch-size 128",
                    f"attention {models} --data toy --images 256",
                    f"probe {models} --data toy",
                    "cost vit_tiny vit_tiny+rpe hiera_tiny --points tests/assets/fig1.csv "
                    "--seconds 1",
                    f"curves {logs}"):
        print(f"\n$ python analyze.py {command} --out {out}")
        main(parse_args([*command.split(), "--out", out]))


def main(args):
    if args.demo:
        return demo(args.out)
    Path(args.out).mkdir(parents=True, exist_ok=True)
    COMMANDS[args.command](args)


if __name__ == "__main__":
    with plain_errors():
        main(parse_args())
