#!/usr/bin/env python3
"""Write a tiny llama model (GGUF v3) with random weights, using nothing but the standard library.

    tiny_gguf.py OUT.gguf [--name NAME] [--dim 64] [--layers 2] [--seed 0] …

llama.cpp loads it like any other model: it has a real byte-level tokenizer, a chat template, and answers in
readable ASCII until `max_tokens` is reached. What it says is random; how it is served is real. A larger
`--dim` or `--layers` makes a model that takes longer to load and to answer.
"""

from __future__ import annotations

import argparse
import array
import os
import random
import struct
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

ALIGNMENT = 32
WORDS = (" the", " of", " and", " to", " GPU", " model", " wake", " sleep", " proxy", " token")
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# The types of GGUF's key-value section.
UINT32, FLOAT32, BOOL, STRING, ARRAY, INT32 = 4, 6, 7, 8, 9, 5
NORMAL_TOKEN, CONTROL_TOKEN = 1, 3

T = TypeVar("T")
Tensor = tuple[tuple[int, ...], "array.array[float]"]


@dataclass(frozen=True)
class Shape:
    """The size of a model. ``dim`` and ``heads`` are even, ``heads`` divides ``dim``."""

    name: str = "tiny"
    dim: int = 64
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    feed_forward: int = 176
    context: int = 8192
    seed: int = 0


# ---- the tokenizer: GPT-2's bytes as printable characters, and a few words as merges


@dataclass(frozen=True)
class Vocabulary:
    """Tokens in the order of their ids, how they are merged, and which of them the model may say."""

    tokens: list[str]
    merges: list[str]
    sayable: frozenset[int]


def byte_characters() -> dict[int, str]:
    """Return GPT-2's mapping of each byte to a printable character."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    shifted = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(shifted)}


def vocabulary() -> Vocabulary:
    """Return 256 bytes, the words with their beginnings, and the special tokens."""
    characters = byte_characters()
    tokens = [characters[byte] for byte in range(256)]
    merges: list[str] = []
    for word in WORDS:
        first, *rest = (characters[byte] for byte in word.encode())
        piece = first
        for character in rest:
            merge = f"{piece} {character}"
            if merge not in merges:
                merges.append(merge)
            piece += character
            if piece not in tokens:
                tokens.append(piece)
    sayable = frozenset([10, *range(32, 127), *range(256, len(tokens))])
    return Vocabulary([*tokens, *SPECIAL], merges, sayable)


# ---- the file format


def text(value: str) -> bytes:
    """Return a string as GGUF writes it: its length in bytes, then the bytes."""
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def key_text(value: str) -> bytes:
    """Return a string as the value of a key."""
    return struct.pack("<I", STRING) + text(value)


def key_int(value: int) -> bytes:
    """Return an unsigned integer as the value of a key."""
    return struct.pack("<II", UINT32, value)


def key_float(value: float) -> bytes:
    """Return a float as the value of a key."""
    return struct.pack("<If", FLOAT32, value)


def key_array(kind: int, values: Sequence[T], encode: Callable[[T], bytes]) -> bytes:
    """Return an array as the value of a key."""
    return struct.pack("<IIQ", ARRAY, kind, len(values)) + b"".join(map(encode, values))


def padding(size: int) -> bytes:
    """Return the zeros that bring ``size`` to the next multiple of the alignment."""
    return b"\0" * (-size % ALIGNMENT)


def metadata(shape: Shape, words: Vocabulary) -> dict[str, bytes]:
    """Return the key-value section: the model's architecture and its tokenizer."""
    normal = len(words.tokens) - len(SPECIAL)
    kinds = [NORMAL_TOKEN] * normal + [CONTROL_TOKEN] * len(SPECIAL)
    return {
        "general.architecture": key_text("llama"),
        "general.name": key_text(shape.name),
        "general.file_type": key_int(0),
        "llama.context_length": key_int(shape.context),
        "llama.embedding_length": key_int(shape.dim),
        "llama.block_count": key_int(shape.layers),
        "llama.feed_forward_length": key_int(shape.feed_forward),
        "llama.attention.head_count": key_int(shape.heads),
        "llama.attention.head_count_kv": key_int(shape.kv_heads),
        "llama.attention.layer_norm_rms_epsilon": key_float(1e-5),
        "llama.rope.dimension_count": key_int(shape.dim // shape.heads),
        "llama.rope.freq_base": key_float(10000.0),
        "llama.vocab_size": key_int(len(words.tokens)),
        "tokenizer.ggml.model": key_text("gpt2"),
        "tokenizer.ggml.pre": key_text("gpt-2"),
        "tokenizer.ggml.tokens": key_array(STRING, words.tokens, text),
        "tokenizer.ggml.token_type": key_array(INT32, kinds, lambda kind: struct.pack("<i", kind)),
        "tokenizer.ggml.merges": key_array(STRING, words.merges, text),
        "tokenizer.ggml.bos_token_id": key_int(normal),
        "tokenizer.ggml.eos_token_id": key_int(normal + 2),
        "tokenizer.ggml.padding_token_id": key_int(normal),
        "tokenizer.ggml.add_bos_token": struct.pack("<IB", BOOL, 0),
        "tokenizer.chat_template": key_text(CHAT_TEMPLATE),
    }


# ---- the weights


class Noise:
    """Normally distributed numbers, drawn once and used again from random places: fast for large models."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.pool = array.array("f", (self.random.gauss(0.0, 1.0) for _ in range(1 << 16)))

    def matrix(self, rows: int, columns: int, deviation: float) -> Tensor:
        """Return ``rows`` times ``columns`` numbers; GGUF names the fastest dimension first."""
        count = rows * columns
        start = self.random.randrange(len(self.pool))
        scaled = array.array("f", (deviation * value for value in self.pool))
        turned = scaled[start:] + scaled[:start]
        return (columns, rows), (turned * (count // len(turned) + 1))[:count]


def weights(shape: Shape, words: Vocabulary) -> dict[str, Tensor]:
    """Return all tensors.

    The last channel of the hidden state is constant and acts as a bias in the output layer: tokens that are
    no text, end-of-text among them, are never said, so that an answer is as long as ``max_tokens`` allows.
    """
    noise, dim, size = Noise(shape.seed), shape.dim, len(words.tokens)
    spread = dim**-0.5
    kv = shape.kv_heads * dim // shape.heads
    ones: Tensor = ((dim,), array.array("f", [1.0] * dim))

    _, embedding = noise.matrix(size, dim, 1.0)
    _, output = noise.matrix(size, dim, 0.3)
    silent = array.array("f", [0.0] * (dim - 1) + [-50.0])
    for token in range(size):
        last = (token + 1) * dim - 1
        embedding[last] = 3.0
        if token in words.sayable:
            output[last] = 0.0
        else:
            output[token * dim : last + 1] = silent

    def keeps_last_channel(columns: int, deviation: float) -> Tensor:
        form, values = noise.matrix(dim, columns, deviation)
        values[(dim - 1) * columns :] = array.array("f", [0.0] * columns)
        return form, values

    tensors: dict[str, Tensor] = {
        "token_embd.weight": ((dim, size), embedding),
        "output_norm.weight": ones,
        "output.weight": ((dim, size), output),
    }
    for layer in range(shape.layers):
        tensors |= {
            f"blk.{layer}.attn_norm.weight": ones,
            f"blk.{layer}.attn_q.weight": noise.matrix(dim, dim, spread),
            f"blk.{layer}.attn_k.weight": noise.matrix(kv, dim, spread),
            f"blk.{layer}.attn_v.weight": noise.matrix(kv, dim, spread),
            f"blk.{layer}.attn_output.weight": keeps_last_channel(dim, spread),
            f"blk.{layer}.ffn_norm.weight": ones,
            f"blk.{layer}.ffn_gate.weight": noise.matrix(shape.feed_forward, dim, spread),
            f"blk.{layer}.ffn_up.weight": noise.matrix(shape.feed_forward, dim, spread),
            f"blk.{layer}.ffn_down.weight": keeps_last_channel(shape.feed_forward, shape.feed_forward**-0.5),
        }
    return tensors


def pieces(shape: Shape) -> Iterable[bytes]:
    """Yield the file, piece by piece: header, keys, tensor directory, tensors."""
    words = vocabulary()
    keys, tensors = metadata(shape, words), weights(shape, words)
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(keys))
    head += b"".join(text(key) + value for key, value in keys.items())
    offset = 0
    for name, (form, values) in tensors.items():
        head += text(name) + struct.pack(f"<I{len(form)}QIQ", len(form), *form, 0, offset)
        offset += len(values) * values.itemsize + len(padding(len(values) * values.itemsize))
    yield head + padding(len(head))
    for _, values in tensors.values():
        if sys.byteorder == "big":  # the ones are shared, so no swapping in place
            values = values[:]  # noqa: PLW2901
            values.byteswap()
        raw = values.tobytes()
        yield raw + padding(len(raw))


def write(path: Path, shape: Shape) -> None:
    """Write the model; a file of that name appears only once it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.writelines(pieces(shape))
        Path(name).chmod(0o644)  # an engine may run as another user
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def demo_folder() -> Path:
    """Return where the demo and the tests keep what they generate: ``$LLMUX_DEMO_DIR``, or .demo/."""
    return Path(os.environ.get("LLMUX_DEMO_DIR") or Path(__file__).resolve().parents[2] / ".demo").absolute()


def cached(shape: Shape) -> Path:
    """Return the path of a model of this shape, writing it unless it is there already."""
    sizes = f"{shape.dim}x{shape.layers}-{shape.heads}-{shape.kv_heads}-{shape.feed_forward}-{shape.context}"
    path = demo_folder() / f"{shape.name}-{sizes}-{shape.seed}.gguf"
    if not path.exists():
        write(path, shape)
    return path


def main() -> None:
    """Write one model as the command line says."""
    default = Shape()
    parser = argparse.ArgumentParser(description="Write a tiny llama model with random weights.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--name", default=default.name)
    for option in ("dim", "layers", "heads", "kv_heads", "feed_forward", "context", "seed"):
        parser.add_argument(f"--{option.replace('_', '-')}", type=int, default=getattr(default, option))
    options = vars(parser.parse_args())
    write(options.pop("out"), Shape(**options))


if __name__ == "__main__":
    main()
