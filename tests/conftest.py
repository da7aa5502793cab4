"""What all tests share: the `gpu` marker, and Triton's interpreter where there is no GPU."""

import gc
import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    # read when triton is first imported: kernels then run on CPU tensors, slowly but to the letter
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and torch sees none"))


@pytest.fixture(autouse=True)
def _give_back_gpu_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """Several processes may share a card; what a test leaves in the allocator is of no use to the next."""
    yield
    if "gpu" in request.keywords and torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


@pytest.fixture
def interpreter() -> None:
    """Skips where Triton kernels cannot run through the interpreter."""
    pytest.importorskip("triton", reason="triton is not installed (it exists on Linux only)")
    from triton import knobs

    if not knobs.runtime.interpret:
        pytest.skip("kernels are compiled for the GPU in this process; the gpu tests cover them")
