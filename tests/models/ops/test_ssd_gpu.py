"""SSD and convolution kernels against float64 on a GPU: results and every gradient."""

import pytest
import torch

from benchmarks.gpu_check_ssd import check_conv, check_ssd

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("state_size", [128, 512])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_ssd_kernels_equal_float64(state_size, dtype):
    assert check_ssd(("triton",), (state_size,), (dtype,), (1, 63, 64, 65, 1000, 8192)) == 0


def test_convolution_kernels_equal_float64():
    assert check_conv(("triton",)) == 0
