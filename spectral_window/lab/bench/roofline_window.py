"""The least time of the window's GPU kernels, counted from what they read, write and multiply.

A kernel cannot be faster than its least bytes through memory (each input once, each output once),
than its programs' own loads through the cache (a tile of keys is loaded by every tile of queries
that sees it), or than its products, tiles with masked corners included. Numbers are per token and
head of one long document. Rates are an H100's: predictions, not measurements.
"""

from __future__ import annotations

from dataclasses import dataclass

MEMORY = 3.35e12  # bytes/s
CACHE = 5.5e12  # bytes/s from L2 to all multiprocessors, about
PRODUCTS = {2: 989e12, 4: 67e12}  # flop/s by bytes an element: tensor cores, and without them


@dataclass(frozen=True)
class Counts:
    """Bytes and operations of one row and head.

    least:    bytes that must move through memory.
    loads:    bytes that all programs load; tables of RoPE's angles are not in it.
    turns:    bytes of those tables that all programs load.
    stores:   bytes that all programs store.
    flops:    of the products, two an element and term.
    """

    least: int
    loads: int
    turns: int
    stores: int
    flops: int

    def nanoseconds(self, time: int, size: int) -> dict[str, float]:
        """Least time per token by what limits it, for elements of `size` bytes."""
        return {
            "memory": 1e9 * self.least / MEMORY / time,
            "cache": 1e9 * (self.loads + self.turns + self.stores) / CACHE / time,
            "products": 1e9 * self.flops / PRODUCTS[size] / time,
        }


def count(
    kernel: str, time: int, window: int, key: int, value: int, size: int, own: int, met: int
) -> Counts:
    """For kernel "attend", "attend_queries" or "attend_keys" on one document of `time` tokens.

    key, value: head sizes, powers of two here; size: bytes an element; own, met: rows of the
    tiles, see `triton_window.Tiles`.
    """
    rows = {  # elements a row: of the tile itself, of those it meets; float32 numbers; stored
        "attend": (key, key + value, 0, 0, value, 1),
        "attend_queries": (key + 2 * value, key + value, 1, 0, key, 1),
        "attend_keys": (key + value, key + value, 0, 2, key + value, 0),
    }
    own_row, met_row, own_extra, met_extra, out_row, out_extra = rows[kernel]
    loads = turns = stores = flops = 0
    products = {"attend": key + value, "attend_queries": 2 * key + value}
    terms = products.get(kernel, 2 * (key + value))
    angles = 4 * key  # bytes of cos and sin of one place
    for first in range(0, time, own):
        here = min(own, time - first)
        if kernel == "attend_keys":
            begin, end = first // met * met, ((first + own - 1) // window + 2) * window
        else:
            begin, end = max(first // window - 1, 0) * window // met * met, first + own
        end = min(end, time)
        tiles = -(-(end - begin) // met)
        others = min(begin + tiles * met, time) - begin
        loads += here * (own_row * size + 4 * own_extra)
        loads += others * (met_row * size + 4 * met_extra)
        back = 1 if kernel == "attend" else 2  # the result is turned back
        turns += angles * (back * (own + 1) + met + tiles)
        stores += here * (out_row * size + 4 * out_extra)
        flops += 2 * tiles * own * met * terms
    inputs = {"attend": 2 * key + value, "attend_queries": 2 * key + 3 * value}
    least = time * (inputs.get(kernel, 2 * (key + value)) * size)
    numbers = {"attend": 1, "attend_queries": 2}.get(kernel, 2)  # lse and delta
    least += time * (4 * numbers + out_row * size)
    return Counts(least, loads, turns, stores, flops)


def table(windows: tuple[int, ...] = (32, 64, 128, 256), key: int = 64) -> list[dict[str, object]]:
    """Rows {kernel, window, memory, cache, products: ns per token and head} in bfloat16."""
    rows: list[dict[str, object]] = []
    for window in windows:
        for kernel in ("attend", "attend_queries", "attend_keys"):
            met = 32 if window < 64 else 64
            counts = count(kernel, 1 << 14, window, key, key, 2, 64, met)
            times = counts.nanoseconds(1 << 14, 2)
            rounded = {name: float(f"{value:.3g}") for name, value in times.items()}
            rows.append({"kernel": kernel, "window": window, **rounded})
    return rows
