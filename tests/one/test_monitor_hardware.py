"""What the process measures about itself: orders of magnitude and consistency, never exact times."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest
import torch

from sixfold.monitor import hardware
from sixfold.monitor.hardware import _peak_resident_bytes, _rollup_bytes


def test_peak_is_a_rate_of_this_century_and_draws_no_random_number() -> None:
    state = torch.get_rng_state()
    peak = hardware.peak_flops(torch.float32, seconds=0.0)
    assert 1e8 < peak < 1e16
    assert torch.equal(torch.get_rng_state(), state)


def test_peak_is_the_best_of_its_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "_seconds_per_product", lambda *_: [0.5, 0.25, 0.75])
    assert hardware.peak_flops(torch.float32) == 2 * hardware.PEAK_SIZE**3 / 0.25


@pytest.mark.parametrize(
    ("able", "fast"),
    [
        ({"avx512_bf16": True, "amx_bf16": False}, True),
        ({"avx512_bf16": False, "amx_bf16": True}, True),
        ({"avx512_bf16": False, "amx_bf16": False, "avx512_f": True}, False),
        ({"architecture": "aarch64"}, False),
    ],
)
def test_bf16_is_fast_where_the_processor_has_instructions_for_it(
    monkeypatch: pytest.MonkeyPatch, able: dict[str, object], fast: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    assert hardware.fast_bf16() is fast


def test_whether_bf16_is_fast_does_not_depend_on_a_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> list[float]:
        raise AssertionError("measured; ranks that measure for themselves may disagree")

    monkeypatch.setattr(hardware, "_seconds_per_product", refuse)
    assert hardware.fast_bf16() is hardware.fast_bf16()


def test_memory_follows_an_allocation() -> None:
    before = hardware.memory_bytes(), hardware.resident_bytes()
    # Of the system: malloc may still have pages of what other tests have freed.
    held = torch.frombuffer(mmap.mmap(-1, 32 * 2**20), dtype=torch.uint8).fill_(1)
    after = hardware.memory_bytes(), hardware.resident_bytes()
    for low, high in zip(before, after, strict=True):
        assert 24 * 2**20 < high - low < 64 * 2**20
    assert held.nbytes == 32 * 2**20
    assert after[0] <= after[1]


def test_memory_without_the_system_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _rollup_bytes(tmp_path / "missing") is None
    strange = tmp_path / "rollup"
    strange.write_text("Rss:  12 kB\n")
    assert _rollup_bytes(strange) is None
    strange.write_text("Rss:  12 kB\nPss:   5 kB\nPss_Dirty: 3 kB\n")
    assert _rollup_bytes(strange) == 5120
    monkeypatch.setattr(hardware, "_rollup_bytes", lambda _: None)
    assert hardware.memory_bytes() == pytest.approx(hardware.resident_bytes(), rel=0.2)
    assert _peak_resident_bytes() >= 0.9 * hardware.resident_bytes()


def test_types_are_compared_by_the_best_product_of_each_with_the_threads_of_a_rank(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seconds = {torch.float32: [0.9, 0.3, 0.6], torch.bfloat16: [0.2, 0.4, 0.8]}
    asked = []

    def measure(dtype: torch.dtype, shape: tuple[int, int, int], *_: object) -> list[float]:
        asked.append((*shape, torch.get_num_threads()))
        return seconds[dtype]

    monkeypatch.setattr(hardware, "_seconds_per_product", measure)
    before = torch.get_num_threads()
    assert hardware.bf16_speedup(2048, 64, 128, threads=before + 1) == pytest.approx(1.5)
    assert asked == [(2048, 64, 128, before + 1)] * 2
    assert torch.get_num_threads() == before
    hardware.bf16_speedup(10**6, 4096, 4096)
    assert asked[-1][0] * 2 * 4096**2 <= 2**30


def test_a_comparison_of_types_comes_from_real_products() -> None:
    assert 1e-3 < hardware.bf16_speedup(64, 32, 96) < 1e3
