"""Numbers from a counter-based hash: value = f(seed, tag, counters).

A billion items then need no table, and rows may be made in any order. These may change with GENERATOR_VERSION, and the hashes of
data/reading/keys.py never.

Shapes: n ids, d latent width.
"""

import numpy as np

from data.reading.keys import SPLITMIX_GAMMA, splitmix64, uniforms

LOW_HALVES = np.uint64(0x0000FFFF0000FFFF)
LOW_WORD = np.uint64(0xFFFFFFFF)
# makes the sum of four 16-bit uniforms unit variance
IRWIN_HALL_SCALE = 1.0 / (65536.0 * np.sqrt(4.0 / 12.0))


def normals(key: np.ndarray, d: int) -> np.ndarray:
    """Turn keys (n,) into (n, d) float64 of mean 0 and variance 1, bell-shaped (Irwin-Hall of four)."""
    out = np.empty((len(key), d))
    for k in range(d):
        counter = np.uint64((k + 1) * int(SPLITMIX_GAMMA) % 2**64)
        bits = splitmix64(key + counter)
        # the sum of its four 16-bit parts, in pairs: a third of the time of a sum over an axis of length four
        pairs = (bits & LOW_HALVES) + ((bits >> np.uint64(16)) & LOW_HALVES)
        total = (pairs & LOW_WORD) + (pairs >> np.uint64(32))
        out[:, k] = (total.astype(np.float64) - 2.0 * 65535.0) * IRWIN_HALL_SCALE
    return out


def choose(key: np.ndarray, count: int, skew: float = 1.0) -> np.ndarray:
    """Turn keys into int64 ids in [0, count); above 1, `skew` makes low ids frequent."""
    draws = uniforms(key)
    return np.minimum((count * (draws if skew == 1.0 else draws**skew)).astype(np.int64), count - 1)


def power_law_ranks(key: np.ndarray, count: int, exponent: float) -> np.ndarray:
    """Turn keys into ranks in [0, count) with P(rank r) about (r + 1) ** -exponent, exponent below 1."""
    rest = 1.0 - exponent
    ranks = ((float(count + 1) ** rest - 1.0) * uniforms(key) + 1.0) ** (1.0 / rest)
    return np.minimum(ranks.astype(np.int64) - 1, count - 1)


def scatter(ranks: np.ndarray, count: int) -> np.ndarray:
    """Spread ranks over [0, count) one to one, so that popular ids do not all meet in one row-wise shard."""
    step = max(1, int(count * 0.6180339887))
    while np.gcd(step, count) != 1:
        step += 1
    return ranks * step % count
