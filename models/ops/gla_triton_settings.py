"""Settings of the GLA kernels in `models/ops/gla_triton.py`: tuned ones over those built in."""

from functools import cache

import torch
from torch import Tensor

from .kernel_configs import kernel_config

FEW_PROGRAMS = 96  # fewer tiles than this leave a third of an H100's 132 multiprocessors idle


def settings_for(q: Tensor, v: Tensor) -> dict[str, dict]:
    """Tile sizes, warps and stages of every kernel for this shape, tuned ones over the built-in."""
    B, _, H, K = q.shape
    return _settings(B * H, H, K, v.shape[-1], v.element_size(), q.device)


@cache
def _settings(heads: int, H: int, K: int, V: int, bytes_each: int, device: torch.device) -> dict[str, dict]:
    wide = bytes_each == 4
    built_in = default_wide(K, V) if wide else default(heads, K, V)
    return kernel_config("gla", f"K{K}-V{V}-H{H}-{8 * bytes_each}bit", built_in, device)


def default(heads: int, K: int, V: int) -> dict[str, dict]:
    """16-bit operands."""
    large = K * V >= 1 << 20
    march = next(
        (BK, BV, warps)
        for BK, BV, warps in ((128, 128, 8), (64, 128, 4), (64, 64, 4))
        if (heads * K * V) // (BK * BV) >= FEW_PROGRAMS or BK * BV == 64 * 64
    )
    return {
        "chunk": {"size": 256 if large else 128},
        "prepare": {"BK": min(64, K), "num_warps": 4, "num_stages": 2},
        "march": {
            "BK": min(march[0], K),
            "BV": min(march[1], V),
            "BT": 64,
            "STAGES": 4,
            "BLOCKS": False,
            "num_warps": march[2],
        },
        "scores": {"BM": 128, "BK": min(64, K), "num_warps": 8, "num_stages": 3},
        "strong_scores": {"BK": min(64, K), "num_warps": 4, "num_stages": 1},
        "mix": {
            "BM": 128,
            "BK": min(64, K),
            "BV": min(256, V),
            "BN": 64,
            "num_warps": 8,
            "num_stages": 3,
        },
        "grad": {
            "BM": 128,
            "BK": min(128, K),
            "BV": min(64, V),
            "STAGES": 3,
            "BLOCKS": False,
            "num_warps": 8,
        },
        "dscores": {"BM": 128, "BV": min(64, V), "num_warps": 8, "num_stages": 3},
        # chunks of one block need 140 registers a thread; 128, without spilling, let two programs run at once
        "intra_backward": {
            "BM": 128,
            "BK": min(32, K),
            "num_warps": 8,
            "num_stages": 1,
            "maxnreg": None if large else 128,
        },
        "strong_intra_backward": {
            "BK": min(32, K),
            "TILES": min(4, -(-K // 32)),
            "num_warps": 4,
            "num_stages": 1,
        },
    }


def default_wide(K: int, V: int) -> dict[str, dict]:
    """32-bit operands: half the tile, so that it fits; a path for tests and comparisons, not for speed."""
    tile_k, tile_v = min(64, K), min(64, V)
    return {
        "chunk": {"size": 128},
        "prepare": {"BK": tile_k, "num_warps": 4, "num_stages": 2},
        "march": {"BK": tile_k, "BV": tile_v, "BT": 32, "STAGES": 2, "BLOCKS": False, "num_warps": 4},
        "scores": {"BM": 64, "BK": min(32, K), "num_warps": 4, "num_stages": 2},
        "strong_scores": {"BK": min(32, K), "num_warps": 4, "num_stages": 1},
        "mix": {"BM": 64, "BK": min(32, K), "BV": tile_v, "BN": 32, "num_warps": 4, "num_stages": 2},
        "grad": {
            "BM": 64,
            "BK": tile_k,
            "BV": min(32, V),
            "STAGES": 2,
            "BLOCKS": False,
            "num_warps": 4,
        },
        "dscores": {"BM": 64, "BV": min(32, V), "num_warps": 4, "num_stages": 2},
        "intra_backward": {"BM": 64, "BK": min(32, K), "num_warps": 4, "num_stages": 1},
        "strong_intra_backward": {
            "BK": min(32, K),
            "TILES": min(4, -(-K // 32)),
            "num_warps": 4,
            "num_stages": 1,
        },
    }
