"""Real attention inputs: q.npy, k.npy and v.npy of a folder, checked, and handed to the bench as plain floats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import UsageError
from .contract import shown

MOST_TOKENS = 1024  # the error is measured against fp64: more would take minutes
MOST_HEADS = 16


def load(folder: Path) -> dict[str, Any]:
    """The arrays q, k and v [batch, token, head, dim] as float32; UsageError names file, value and rule."""
    if not folder.is_dir():
        raise UsageError(f"option --input = {shown(str(folder))}: must be a folder with q.npy, k.npy and v.npy")
    arrays = {name: load_array(folder / f"{name}.npy") for name in "qkv"}
    for name in "kv":
        if arrays[name].shape != arrays["q"].shape:
            where = ascii(str(folder / f"{name}.npy"))
            shape, wanted = list(arrays[name].shape), list(arrays["q"].shape)
            raise UsageError(f"{where}: shape = {shape}: must be the shape of q.npy, {wanted}")
    return arrays


def load_array(path: Path) -> Any:
    import numpy as np

    where = ascii(str(path))
    try:
        array = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise UsageError(f"{where}: is missing: an input folder holds q.npy, k.npy and v.npy") from None
    except OSError as error:
        raise UsageError(f"{where}: cannot be read: {error.strerror or 'it is cut short'}") from None
    except (ValueError, EOFError, SyntaxError):
        raise UsageError(f"{where}: is no .npy file of numbers, or it is broken") from None
    if not isinstance(array, np.ndarray) or array.dtype.kind != "f" or array.dtype.itemsize not in (2, 4, 8):
        kind = getattr(array, "dtype", type(array).__name__)
        raise UsageError(f"{where}: dtype = {kind}: must be float16, float32 or float64")
    if array.ndim != 4 or 0 in array.shape:
        raise UsageError(f"{where}: shape = {list(array.shape)}: must be [batch, token, head, dim], none of them 0")
    array = array.astype(np.float32)
    if not np.isfinite(array).all():
        at = [int(i) for i in np.argwhere(~np.isfinite(array))[0]]
        raise UsageError(f"{where}: value at {at} = {array[tuple(at)]}: must be finite (as float32)")
    return array


def raw(arrays: dict[str, Any]) -> bytes:
    """What bench.c reads: four sizes, then q, k and v. Large inputs are cut to a sample."""
    import numpy as np

    sample = {name: a[:1, :MOST_TOKENS, :MOST_HEADS] for name, a in arrays.items()}
    sizes: bytes = np.array(sample["q"].shape, dtype=np.int64).tobytes()
    return sizes + b"".join(np.ascontiguousarray(sample[name]).tobytes() for name in "qkv")
