"""Weights packed by plain loops, after the published layouts: (tensors by leaf, the values they stand for).

Codes, scales and zeros are drawn at random, so values are exact and nothing is rounded here.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

import ml_dtypes
import numpy as np

Packed = tuple[dict[str, np.ndarray], np.ndarray]
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
F8, POWERS = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e8m0fnu
AWQ_ROWS = (0, 2, 4, 6, 1, 3, 5, 7)  # of a word's fields, the lowest first


def words(codes: Iterable[int], bits: int) -> list[int]:
    """Fields of `bits`, the first one lowest, as the 32-bit words that hold them."""
    number = sum(int(code) << (bits * i) for i, code in enumerate(codes))
    count = -(-len(list(codes)) * bits // 32)
    return np.frombuffer(number.to_bytes(4 * count, "little"), np.int32).tolist()


def rows_of_words(codes: np.ndarray, bits: int) -> np.ndarray:
    return np.array([words(row, bits) for row in codes], np.int32)


def drawn(rng, N: int, K: int, bits: int, group: int | None):
    """(codes [N, K], scale f16 [N, G], zero [N, G])."""
    G = -(-K // (group or K))
    codes = rng.integers(0, 2**bits, (N, K))
    scale = (rng.uniform(0.5, 1.5, (N, G)) * K**-0.5 / 2 ** (bits - 1)).astype(np.float16)
    return codes, scale, rng.integers(0, 2**bits, (N, G))


def values(codes, scale, zero, group_of: np.ndarray) -> np.ndarray:
    """(code - zero) * scale in f32, each column with its own group's."""
    by_column = scale.astype(np.float32)[:, group_of]
    return (
        codes.astype(np.float32) - np.broadcast_to(zero, scale.shape)[:, group_of].astype(np.float32)
    ) * by_column


def gptq(rng, N, K, *, bits=4, group=32, sym=False, v2=False, act_order=False) -> Packed:
    codes, scale, zero = drawn(rng, N, K, bits, group)
    zero = np.full_like(zero, 2 ** (bits - 1)) if sym else zero
    g_idx = np.arange(K) // (group or K)
    if act_order:
        rng.shuffle(g_idx)
    stored = zero if v2 else (zero - 1) % 2**bits
    tensors = {
        "qweight": rows_of_words(codes.T.T, bits).T,
        "qzeros": rows_of_words(stored.T, bits),
        "scales": scale.T,
        "g_idx": g_idx.astype(np.int32),
    }
    return tensors, values(codes, scale, zero, g_idx)


def awq(rng, N, K, *, group=32) -> Packed:
    codes, scale, zero = drawn(rng, N, K, 4, group)
    order = np.arange(N).reshape(-1, 8)[:, AWQ_ROWS].reshape(-1)
    tensors = {
        "qweight": rows_of_words(codes[order].T, 4),
        "qzeros": rows_of_words(zero[order].T, 4),
        "scales": scale.T,
    }
    return tensors, values(codes, scale, zero, np.arange(K) // group)


def awq_gemv(rng, N, K, *, group=32) -> Packed:
    codes, scale, zero = drawn(rng, N, K, 4, group)
    wide = -(-scale.shape[1] // 8) * 8
    more = ((0, 0), (0, wide - scale.shape[1]))
    tensors = {
        "qweight": rows_of_words(codes, 4),
        "qzeros": rows_of_words(np.pad(zero, more), 4),
        "scales": np.pad(scale, more),
    }
    return tensors, values(codes, scale, zero, np.arange(K) // group)


def float8s(rng, N, K) -> np.ndarray:
    return (rng.standard_normal((N, K)) * 100).clip(-440, 440).astype(F8)


def fp8(rng, N, K, *, block=None, leaf="weight_scale_inv", static=None) -> Packed:
    """One scale for the matrix (block None), for each row (block "row"), or for each block."""
    codes = float8s(rng, N, K)
    shape = (1,) if block is None else (N, 1) if block == "row" else (-(-N // block[0]), -(-K // block[1]))
    scale = (rng.uniform(0.5, 1.5, shape) / 100 / K**0.5).astype(np.float32)
    want = np.empty((N, K), np.float32)
    for n in range(N):
        for k in range(K):
            at = (0,) if block is None else (n, 0) if block == "row" else (n // block[0], k // block[1])
            want[n, k] = np.float32(codes[n, k]) * scale[at]
    extra = {} if static is None else {static: np.float32([0.02])}
    return {"weight": codes, leaf: scale, **extra}, want


def ct_pack(rng, N, K, *, bits=4, group=32, zeros=False, act_order=False) -> Packed:
    codes, scale, zero = drawn(rng, N, K, bits, group)
    zero = zero if zeros else np.full_like(zero, 2 ** (bits - 1))
    g_idx = np.arange(K) // (group or K)
    tensors = {
        "weight_packed": rows_of_words(codes, bits),
        "weight_scale": scale,
        "weight_shape": np.array([N, K], np.int64),
    }
    if zeros:
        tensors["weight_zero_point"] = rows_of_words(zero.T, bits).T
    if act_order:
        rng.shuffle(g_idx)
        tensors["weight_g_idx"] = g_idx.astype(np.int32)
    return tensors, values(codes, scale, zero, g_idx)


def ct_int8(rng, N, K, *, static=False) -> Packed:
    codes, scale, _ = drawn(rng, N, K, 8, None)
    codes = (codes - 128).astype(np.int8)
    extra = {"input_scale": np.float32([0.05])} if static else {}
    return {"weight": codes, "weight_scale": scale, **extra}, codes.astype(np.float32) * scale.astype(np.float32)


def e2m1(codes: np.ndarray) -> np.ndarray:
    return np.float32([-E2M1[c - 8] if c >= 8 else E2M1[c] for c in codes.reshape(-1)]).reshape(codes.shape)


def nibbles(codes: np.ndarray) -> np.ndarray:
    """Two codes a byte, the first one low."""
    return (codes[..., 0::2] | codes[..., 1::2] << 4).astype(np.uint8)


def nvfp4(rng, N, K, *, factor=300.0, names=("weight_packed", "weight_global_scale"), divide=True) -> Packed:
    codes = rng.integers(0, 16, (N, K))
    scale = rng.uniform(0.5, 8.0, (N, K // 16)).astype(F8)
    whole = np.float32(1 / factor) / np.float32(K**0.5)
    want = e2m1(codes) * (np.repeat(scale.astype(np.float32), 16, 1) * whole)
    above = 1 / whole if divide else whole
    return {names[0]: nibbles(codes), "weight_scale": scale, names[1]: np.float32([above])}, want


def mx(rng, *shape: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(codes, exponents, values) of MXFP4 [.., K]."""
    codes = rng.integers(0, 16, shape)
    exponents = rng.integers(120, 125, (*shape[:-1], shape[-1] // 32)).astype(np.uint8)
    return codes, exponents, e2m1(codes) * np.repeat(np.float32(2.0) ** (exponents.astype(np.int32) - 127), 32, -1)


def ct_mxfp4(rng, N, K) -> Packed:
    codes, exponents, want = mx(rng, N, K)
    return {"weight_packed": nibbles(codes), "weight_scale": exponents}, want


def bnb4(rng, N, K, *, table, kind="nf4", double=True) -> Packed:
    """Blocks of 64 codes over the flat matrix, the first code of a byte high."""
    codes, blocks = rng.integers(0, 16, N * K), -(-N * K // 64)
    state = {"quant_type": kind, "blocksize": 64, "dtype": "float16", "shape": [N, K]}
    tensors = {"weight": (codes[0::2] << 4 | codes[1::2]).astype(np.uint8)[:, None]}
    absmax = rng.uniform(0.1, 0.3, blocks).astype(np.float32)
    if double:
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.2}
        number = rng.integers(0, 256, blocks).astype(np.uint8)
        levels, above = np.linspace(-1, 1, 256, dtype=np.float32), rng.uniform(0.05, 0.1, -(-blocks // 256))
        above = above.astype(np.float32)
        absmax = np.float32([levels[n] * above[i // 256] + np.float32(0.2) for i, n in enumerate(number)])
        tensors |= {"weight.absmax": number, "weight.nested_absmax": above, "weight.nested_quant_map": levels}
    else:
        tensors["weight.absmax"] = absmax
    tensors["weight.quant_map"] = np.float32(table)
    text = np.frombuffer(json.dumps(state).encode(), np.uint8)
    want = np.float32([table[c] for c in codes]) * np.float32([absmax[i // 64] for i in range(N * K)])
    return tensors | {f"weight.quant_state.bitsandbytes__{kind}": text}, want.reshape(N, K)


def bnb8(rng, N, K) -> Packed:
    codes, largest = rng.integers(-127, 128, (N, K)).astype(np.int8), rng.uniform(0.2, 0.5, N).astype(np.float32)
    want = codes.astype(np.float32) * (largest / np.float32(127))[:, None]
    return {"weight": codes, "SCB": largest, "weight_format": np.uint8(0)}, want


def text(word: str) -> np.ndarray:
    return np.frombuffer(word.encode(), np.uint8)


def hqq(rng, N, K, *, bits=4, group=32, axis=1, view=None) -> Packed:
    rows = N * K // group if axis == 1 else group
    codes = rng.integers(0, 2**bits, (rows, N * K // rows))
    many = (rows, 1) if axis == 1 else (1, codes.shape[1])
    scale = (rng.uniform(0.5, 1.5, many) * K**-0.5 / 2 ** (bits - 1)).astype(np.float16)
    zero = rng.uniform(0, 2**bits - 1, many).astype(np.float16)
    per, kind = {8: (1, np.uint8), 4: (2, np.uint8), 3: (10, np.int32), 2: (4, np.uint8), 1: (8, np.uint8)}[bits]
    high = -(-rows // per)
    packed = np.zeros((high, codes.shape[1]), np.int64)
    for i in range(rows):
        packed[i % high] |= codes[i] << (bits * (per - 1 - i // high))
    packed = packed.astype(kind)
    settings = {
        "nbits": np.int32(bits),
        "group_size": np.int32(group),
        "shape": np.array([N, K], np.int64),
        "axis": np.int32(axis),
        "packing": text("3bit_32" if bits == 3 else f"{bits}bit_u8"),
        "view_as_float": np.uint8(view is not None),
        "unpack_view_dtype": text("torch.uint8"),
        "encoded_state_dict": np.uint8(1),
    }
    want = (codes.astype(np.float32) - zero.astype(np.float32)) * scale.astype(np.float32)
    packed = packed if view is None else packed.view(view)
    return {"W_q": packed, "scale": scale, "zero": zero, **settings}, want.reshape(N, K)


def torchao_int4(rng, N, K, *, group=32) -> Packed:
    codes, scale, _ = drawn(rng, N, K, 4, group)
    offset = (rng.standard_normal(scale.shape) * 0.05).astype(np.float16)
    signed = codes.astype(np.float32) - 8
    of = np.arange(K) // group
    want = signed * scale.astype(np.float32)[:, of] + offset.astype(np.float32)[:, of]
    data = nibbles(np.where(codes < 8, codes + 8, codes - 8)).view(np.int8)  # two's complement
    return {"_weight_qdata": data, "_weight_scale": scale.T, "_weight_zero_point": offset.T}, want


def torchao_int8(rng, N, K) -> Packed:
    codes, scale = rng.integers(-127, 128, (N, K)).astype(np.int8), rng.uniform(1e-3, 2e-3, (N, 1))
    scale = scale.astype(np.float32)
    return {"_weight_qdata": codes, "_weight_scale": scale}, codes.astype(np.float32) * scale


def ternary(rng, N, K, *, divides=False, loose=False) -> Packed:
    """Four codes a byte: the lowest bits of row r, the next ones row r + N / 4, and so on."""
    codes, scale = rng.integers(0, 3, (N, K)), np.float32([12.5 if divides else 0.11])
    packed = np.zeros((N // 4, K), np.uint8)
    for n in range(N):
        packed[n % (N // 4)] |= (codes[n] << 2 * (n // (N // 4))).astype(np.uint8)
    want = (codes - 1).astype(np.float32) * (1 / scale if divides else scale)
    return {"weight": (codes - 1).astype(np.float32) if loose else packed, "weight_scale": scale}, want
