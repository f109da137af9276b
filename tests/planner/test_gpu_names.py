"""Names that the catalog does not have: what was meant is told, and what can be planned instead."""

from __future__ import annotations

import pytest

from finetui.planner.errors import HardwareError
from finetui.planner.hardware import find_gpu, load_catalog


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Apple M3 Max", ["does not train on Apple's", "finetui gpus MODEL", "hardware.device: cpu"]),
        ("M4", ["Apple", "hardware.device=cpu"]),
        ("TPU v5e-8", ["Google"]),
        ("Arc A770", ["Intel"]),
        ("RX 7900 XTX", ["Of AMD's it has MI300X", "finetui gpus MODEL"]),
        ("cpu", ["is no GPU", "hardware.device: cpu"]),
        ("A100 MIG 3g.40gb", ["slices of a GPU (MIG) are not supported", "the whole A100-80GB"]),
        ("1g.10gb", ["MIG", "a whole GPU"]),
        ("8GB", ["with 8 GB there are RTX-", "others (`finetui gpus`)"]),
        ("24 GB card", ["RTX-4090", "RTX-3090"]),
        ("7GB", ["with their memory"]),
        ("0GB", ["with their memory"]),
        ("Tesla M4", ["in the catalog. "]),
        ("RTX 4099", ["Did you mean RTX-4090"]),
        ("banana", ["`finetui gpus` lists those it has"]),
    ],
)
def test_who_names_what_is_not_there_is_told_what_to_do(name, words):
    with pytest.raises(HardwareError) as refused:
        find_gpu(name)
    told = str(refused.value)
    assert told.startswith("hardware.gpu: ")
    assert all(word in told for word in words), told


def test_the_cards_told_for_a_size_have_that_size():
    with pytest.raises(HardwareError) as refused:
        find_gpu("16 GB")
    told = str(refused.value).partition("there are ")[2].partition(" and ")[0].split(", ")
    assert len(told) == 6
    assert all(15 < load_catalog()[name].memory_gib < 16 for name in told)
    generations = [float(load_catalog()[name].compute_capability) for name in told]
    assert generations == sorted(generations, reverse=True)
    assert "RTX-5080" in told
    assert not any(name.endswith("-Laptop") for name in told)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("NVIDIA GeForce RTX 4060 Laptop GPU", "RTX-4060-Laptop"), ("RTX 4060 laptop", "RTX-4060-Laptop"),
        ("RTX 4090 Mobile", "RTX-4090-Laptop"), ("RTX 4090", "RTX-4090"), ("3070", "RTX-3070"),
        ("RTX 5060 Ti", "RTX-5060-Ti-16GB"), ("NVIDIA RTX 4000 Ada Generation", "RTX-4000-Ada"),
    ],
)  # fmt: skip
def test_cards_that_people_have_at_home_are_found(name, found):
    assert find_gpu(name).name == found
