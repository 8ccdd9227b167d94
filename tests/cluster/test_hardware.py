"""Energy and money come from the table or not at all."""

from pathlib import Path

import pytest

from cluster import hardware
from sweeps.devices import peak_flops


def test_h100_hours_cost_what_the_reference_says() -> None:
    seconds = 84.2602 * 3600  # 1.2e20 FLOPs at 40% of 989e12
    used = hardware.energy("NVIDIA H100 80GB HBM3", seconds)
    assert used.value == pytest.approx(70.7786 / 1.2, rel=1e-4), "at 700 W, before cooling"
    paid = hardware.money("NVIDIA H100 80GB HBM3", seconds)
    assert paid.value == pytest.approx(84.2602 * 6.88)
    assert "2026" in paid.note
    assert "AWS" in paid.note


@pytest.mark.parametrize(
    ("name", "watts"),
    [
        ("NVIDIA B200", 1000),
        ("NVIDIA H200", 700),
        ("NVIDIA A100-SXM4-80GB", 400),
        ("NVIDIA A100 80GB PCIe", 300),
        ("NVIDIA L40S", 350),
        ("NVIDIA L4", 72),
        ("Tesla T4", 70),
        ("Tesla V100-SXM2-16GB", 300),
        ("NVIDIA GeForce RTX 4090", 450),
    ],
)
def test_a_known_board_is_found_by_its_drivers_name(name: str, watts: float) -> None:
    found = hardware.find_device(name)
    assert found is not None
    assert found.watts == watts


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA GB200",
        "NVIDIA GH200 480GB",
        "NVIDIA H100 PCIe",
        "NVIDIA H100 NVL",
        "NVIDIA H200 NVL",
        "NVIDIA A100-PCIE-40GB",
        "NVIDIA L40",
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "Intel(R) Xeon(R) Processor",
    ],
)
def test_another_form_factor_or_device_has_no_number_but_a_reason(name: str) -> None:
    for amount in (hardware.energy(name, 3600.0), hardware.money(name, 3600.0)):
        assert amount.value is None
        assert name in amount.note
        assert "not in the table" in amount.note


def test_a_board_without_a_price_has_energy_alone() -> None:
    assert hardware.energy("NVIDIA L4", 3600.0).value == pytest.approx(0.072)
    paid = hardware.money("NVIDIA L4", 3600.0)
    assert (paid.value, "no price" in paid.note) == (None, True)


def test_every_price_has_a_source_with_a_year() -> None:
    for device in hardware.DEVICES:
        assert (device.dollars_per_hour is None) == (device.source == "")
        assert device.source == "" or "202" in device.source


def test_gpus_are_named_as_cuda_names_them_without_loading_torch(tmp_path: Path) -> None:
    folder = tmp_path / "0000:01:00.0"
    folder.mkdir()
    (folder / "information").write_text("Model: \t\t NVIDIA H100 80GB HBM3\nIRQ:   \t\t 59\n")
    hardware.local_gpus.cache_clear()
    assert hardware.local_gpus(tmp_path) == ("NVIDIA H100 80GB HBM3",)
    hardware.local_gpus.cache_clear()
    assert peak_flops("NVIDIA H100 80GB HBM3", "bfloat16") == 989e12


def test_a_kind_is_a_file_name_and_threads_count_on_a_cpu_alone() -> None:
    assert hardware.kind_of("NVIDIA H100 80GB HBM3", 4) == "nvidia-h100-80gb-hbm3"
    assert hardware.kind_of(hardware.processor(), 1).endswith("-1-thread")
    assert hardware.kind_of(hardware.processor(), 2).endswith("-2-threads")
