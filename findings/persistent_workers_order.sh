#!/usr/bin/env bash
# One would guess: the order in which a DataLoader shuffles depends on its generator alone, so that
# persistent_workers, a setting for speed, changes nothing.
# What happens: the order of the first epoch is the same, and from the second epoch on it is another one. A
# loader draws one more number from the generator, the seed of its workers, whenever it makes a new iterator.
# Workers that stay keep theirs. No workers at all give the order of workers that do not stay.
# Why it matters: two runs with the same seed are no longer comparable when one machine uses persistent workers,
# and a run resumed with the saved state of its generator goes on in another order than without the stop.
set -euo pipefail
export OMP_NUM_THREADS=1
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq torch==2.14.1 numpy==2.4.6
cat > "$folder/run.py" <<'EOF'
import sys
from importlib.metadata import version

import torch
from torch.utils.data import DataLoader

def make(workers, persistent):
    return DataLoader(torch.arange(12), batch_size=4, shuffle=True, num_workers=workers,
                      persistent_workers=persistent, generator=torch.Generator().manual_seed(0))

def orders(workers, persistent):
    loader = make(workers, persistent)
    return [torch.cat(list(loader)).tolist() for _ in range(3)]

def resumed(workers, persistent):
    """The order of the second epoch in a new loader that has the generator's state after the first one."""
    first, second = make(workers, persistent), make(workers, persistent)
    list(first)
    second.generator.set_state(first.generator.get_state())
    return torch.cat(list(second)).tolist()

if __name__ == "__main__":
    print("torch", version("torch"))
    results = {}
    for name, workers, persistent in (("none", 0, False), ("new ones", 2, False), ("persistent", 2, True)):
        results[name] = orders(workers, persistent)
        for epoch, order in enumerate(results[name]):
            print(f"workers: {name:10} epoch {epoch}: {order}")
    if results["none"] != results["new ones"]:
        sys.exit("changed: the order now depends on the number of workers as well")
    same = [a == b for a, b in zip(results["new ones"], results["persistent"])]
    if same != [True, False, False]:
        sys.exit(f"changed: epochs with the same order with persistent workers: {same}")
    same = [resumed(2, persistent) == results[name][1] for name, persistent in (("new ones", False), ("persistent", True))]
    print("a run resumed after epoch 0 has the same epoch 1: new workers %s, persistent workers %s" % tuple(same))
    if same != [True, False]:
        sys.exit("changed: the order after resuming")
    print("persistent_workers=True changes the order of a seeded DataLoader from the second epoch on.")
EOF
cd "$folder"
"$folder/venv/bin/python" run.py
