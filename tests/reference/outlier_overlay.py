"""Stores an outlier twin as what differs from its parent, and puts it together again.

make:   reads both checkpoints (model.safetensors) and writes TWIN_OUT/overlay.safetensors.
        A 2-D weight whose differing entries all lie in the outlier columns is kept as those columns alone, (out, columns);
        the I64 tensor `columns` has their indices, the same for every such weight. Any other differing tensor is kept whole.
check:  puts parent + overlay together and compares every tensor, bit for bit, with the twin. `make` does this too.
build:  writes the twin as an ordinary checkpoint folder (for the other scripts here).

python tests/reference/outlier_overlay.py make  tests/fixtures/tiny-bloom TWIN tests/fixtures/tiny-bloom-outliers
python tests/reference/outlier_overlay.py check tests/fixtures/tiny-bloom TWIN tests/fixtures/tiny-bloom-outliers
python tests/reference/outlier_overlay.py build tests/fixtures/tiny-bloom tests/fixtures/tiny-bloom-outliers TWIN
TWIN is the folder of a whole twin, such as export.py writes. Needs numpy and safetensors.
"""
import shutil
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file


def bits(tensor):
    assert tensor.dtype == np.float16, tensor.dtype
    return tensor.view(np.uint16)


def difference(parent, twin):
    """The overlay: {name: columns or whole tensor} and `columns`."""
    assert parent.keys() == twin.keys()
    assert all(parent[name].shape == twin[name].shape for name in parent)
    differs = {name: bits(parent[name]) != bits(twin[name]) for name in parent}
    differs = {name: where for name, where in differs.items() if where.any()}
    weights = [name for name in differs if twin[name].ndim == 2]
    found = {name: np.flatnonzero(differs[name].any(axis=0)) for name in weights}
    columns = found[weights[0]]
    assert 0 < len(columns) < 16
    for name in weights:
        assert np.array_equal(found[name], columns), f"{name}: columns {found[name]}, elsewhere {columns}"
    overlay = {name: twin[name][:, columns] if name in found else twin[name] for name in differs}
    return {**{name: np.ascontiguousarray(t) for name, t in overlay.items()}, "columns": columns.astype(np.int64)}


def apply(parent, overlay):
    """The twin: parent's tensors with the overlay's put in."""
    columns = overlay["columns"]
    twin = {name: tensor.copy() for name, tensor in parent.items()}
    for name, tensor in overlay.items():
        if name == "columns":
            continue
        if tensor.shape == twin[name].shape:
            twin[name] = tensor
        else:
            assert tensor.shape == (twin[name].shape[0], len(columns)), name
            twin[name][:, columns] = tensor
    return twin


def check(parent, overlay, twin):
    built = apply(parent, overlay)
    assert built.keys() == twin.keys()
    for name in twin:
        assert built[name].shape == twin[name].shape and np.array_equal(bits(built[name]), bits(twin[name])), name
    print(f"parent + overlay == twin, bit for bit, in all {len(twin)} tensors; {len(overlay) - 1} differ from the parent, "
          f"columns {overlay['columns'].tolist()}")


def main():
    command, parent_folder, *folders = sys.argv[1:]
    first, second = map(Path, folders)
    parent = load_file(Path(parent_folder) / "model.safetensors")
    if command == "make":
        twin = load_file(first / "model.safetensors")
        second.mkdir(parents=True, exist_ok=True)
        for name in ("config.json", "generation_config.json"):
            shutil.copyfile(first / name, second / name)
        save_file(difference(parent, twin), second / "overlay.safetensors", metadata={"format": "pt"})
        check(parent, load_file(second / "overlay.safetensors"), twin)
    elif command == "check":
        check(parent, load_file(second / "overlay.safetensors"), load_file(first / "model.safetensors"))
    elif command == "build":
        shutil.copytree(parent_folder, second)
        for name in ("config.json", "generation_config.json"):
            shutil.copyfile(first / name, second / name)
        save_file(apply(parent, load_file(first / "overlay.safetensors")), second / "model.safetensors", metadata={"format": "pt"})
    else:
        sys.exit(__doc__)


main()
