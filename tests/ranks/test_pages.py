"""Memory that a step frees stays with the process: taken again it costs no page faults."""

from __future__ import annotations

import resource
import sys

import pytest
import torch

from sixfold.mesh import keep_pages


def faults() -> int:
    """Page faults of taking 64 MB."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(16 * 2**20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a setting of glibc")
@pytest.mark.ranks(1, fresh=True)
def test_memory_that_was_freed_is_taken_without_page_faults() -> None:
    """In a process of its own; what the pool forks from was started with `malloc_variables`, as ranks are."""
    faults()
    # 64 MB are 16384 pages of 4 KiB, or 32 of the largest.
    assert faults() > 10
    assert keep_pages()
    first, *again = [faults() for _ in range(60)]
    assert first > 10
    assert max(again) < 10, again
