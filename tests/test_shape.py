"""The shape of the repository: what the scripts import, repeat, and how long they are."""
import ast
import importlib
import io
import subprocess
import sys
import tokenize

import pytest
from conftest import ROOT

TRAINING = ("pretrain_d2mae", "finetune", "segment", "track")
SCRIPTS = (*TRAINING, "analyze")
TOTAL = 35_400    # code tokens of the six files
CLOSURES = [      # of a script and a name: what must be read, or copied, with it
    ("pretrain_d2mae", "main", 13_000), ("finetune", "main", 12_500), ("segment", "main", 12_150),
    ("track", "main", 12_850), ("models", "VisionTransformer", 1_800),
    ("models", "load_encoder", 1_600), ("models", "ImageDataset", 300),
    ("pretrain_d2mae", "Distillation", 420), ("track", "OnePassTracker", 800)]
SILENT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
          tokenize.ENDMARKER}


def text_of(name):
    return (ROOT / f"{name}.py").read_text()


def tree_of(name):
    return ast.parse(text_of(name))


def code_tokens(name):
    """Tokens without comments and docstrings, so that packing lines wins nothing."""
    docstrings = set()
    for node in ast.walk(tree_of(name)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            if ast.get_docstring(node):
                docstrings.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    tokens = tokenize.generate_tokens(io.StringIO(text_of(name)).readline)
    return [token for token in tokens
            if token.type not in SILENT and token.start[0] not in docstrings]


def test_top_level_is_that_of_the_readme():
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    top = {name.split("/")[0] for name in done.stdout.splitlines()}
    assert top <= {"models.py", *(f"{name}.py" for name in SCRIPTS), "tests", "README.md",
                   "findings", "requirements.txt", "LICENSE", ".gitignore", ".ci"}
    assert {path.stem for path in ROOT.glob("*.py")} == {"models", *SCRIPTS}


@pytest.mark.parametrize("name", ("models", *SCRIPTS))
def test_a_script_imports_five_packages_and_twenty_names_of_models(name):
    allowed = {"torch", "torchvision", "numpy", "PIL", "tqdm"} | set(sys.stdlib_module_names)
    if name != "models":
        allowed |= {"models"}
    shared = 0
    for node in ast.walk(tree_of(name)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module]
            shared += len(node.names) * (node.module == "models")
        assert {n.split(".")[0] for n in names} <= allowed, names
    assert shared <= 20


@pytest.mark.parametrize("word", [".cuda(", "weights_only=False", "register_forward_hook",
                                  "SIGTERM", "(default: None)"])
def test_no_script_contains(word):
    assert not [name for name in ("models", *SCRIPTS) if word in text_of(name)]


@pytest.mark.parametrize("name", TRAINING)
def test_the_loop_is_the_one_that_every_reader_knows(name):
    [train] = [node for node in tree_of(name).body if getattr(node, "name", "") == "train"]
    assert train.end_lineno - train.lineno < 60
    loops = [node for node in ast.walk(train) if isinstance(node, ast.For)]
    batches = next(loop for loop in loops if "enumerate(bar)" in ast.unparse(loop.iter))
    assert batches.end_lineno - batches.body[0].lineno < 35
    text = ast.unparse(train)
    order = ["init_distributed(args.device", "loader", "resume(args", "for epoch in range(",
             "set_epoch(epoch)", ".train()", "enumerate(bar)", "torch.autocast(", ".backward()",
             "scaler.unscale_(", "clip_grad_norm_(", "scaler.step(", "zero_grad(", "log(args",
             "save(args"]
    places = [text.find(part) for part in order]
    assert -1 not in places and places == sorted(places), dict(zip(order, places))


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_needs_nothing_and_shows_no_missing_default(name, capsys):
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(name).parse_args(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and "default: None" not in text and "usage:" in text


@pytest.mark.parametrize("name", TRAINING)
def test_options_are_few_and_those_of_all_scripts(name):
    parser_text = text_of(name)
    count = parser_text.count('add("--') + text_of("models").count('add("--')
    assert 0 < count <= 36
    args = importlib.import_module(name).parse_args([])
    shared = {"out", "no_resume", "accum_steps", "clip_grad", "workers", "device", "dtype", "seed",
              "log_every", "eval_every", "batch_size", "data", "model", "mean", "std"}
    assert shared <= vars(args).keys()


def test_six_scripts_read_in_one_sitting():
    total = 0
    for name in ("models", *SCRIPTS):
        for node in ast.walk(tree_of(name)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 70, (name, node.name)
        tokens = code_tokens(name)
        rows = len({token.start[0] for token in tokens})
        assert len(tokens) / rows <= 12.0, name
        wide = [line for line in text_of(name).splitlines() if len(line) > 100]
        assert not wide, (name, wide)
        total += len(tokens)
    assert total <= TOTAL, total


def definitions(name):
    """{top-level name: (code tokens, names that it mentions)}."""
    tokens = code_tokens(name)
    found = {}
    for node in tree_of(name).body:
        names = [node.name] if isinstance(node, (ast.ClassDef, ast.FunctionDef)) else [
            part.id for target in getattr(node, "targets", []) for part in ast.walk(target)
            if isinstance(part, ast.Name)]
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
        size = sum(first <= token.start[0] <= node.end_lineno for token in tokens)
        local = {n.id for n in ast.walk(node)
                 if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        local |= {argument.arg for argument in ast.walk(node) if isinstance(argument, ast.arg)}
        mentioned = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)} - local
        found.update({own: (size, mentioned) for own in names})
    return found


def closure_tokens(script, name):
    """Code tokens of a name and of all that it needs, in its script and in models.py."""
    known = {**definitions("models"), **definitions(script)}
    todo, seen = [name], {}
    while todo:
        name = todo.pop()
        if name in known and name not in seen:
            seen[name], mentioned = known[name]
            todo += mentioned
    return sum(seen.values())


@pytest.mark.parametrize("script, name, most", CLOSURES)
def test_what_a_reader_must_read_for_a_name(script, name, most):
    assert closure_tokens(script, name) <= most


@pytest.mark.parametrize("name", SCRIPTS)
def test_nothing_writes_to_the_options_after_they_are_resolved(name):
    """Every assignment to an attribute of `args`, and every setattr, stands in `resolve`."""
    writes = []
    for function in tree_of(name).body:
        for node in ast.walk(function):
            targets = getattr(node, "targets", [getattr(node, "target", None)])
            if isinstance(node, (ast.Assign, ast.AugAssign)):
                written = {ast.unparse(part) for target in targets for part in ast.walk(target)
                           if isinstance(part, ast.Attribute)}
                writes += [getattr(function, "name", "")] * any(
                    part.startswith("args.") for part in written)
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("setattr", "vars.update"):
                writes.append(getattr(function, "name", ""))
    assert set(writes) <= {"resolve", "parse_args"}, writes
