"""Today's prices through gpuhunt: a stand-in with its interface answers, since tests ask nobody."""

from __future__ import annotations

import time
from datetime import date, timedelta

import pytest

from finetui.planner import prices
from finetui.planner.errors import HardwareError, MissingExtraError
from finetui.planner.hardware import PRESETS, all_offers, load_offers, refreshed_prices

STAND_IN = """
import time
from types import SimpleNamespace
ITEMS = {items!r}
class Catalog:
    def query(self, provider, min_gpu_count):
        time.sleep({sleep})
        if provider not in ITEMS:
            raise ValueError("Provider is not loaded: " + provider)
        names = ("instance_name", "location", "price", "gpu_count", "gpu_name", "gpu_memory", "spot")
        return [SimpleNamespace(provider=provider, **dict(zip(names, row))) for row in ITEMS[provider]]
def default_catalog():
    print("talk on stdout")
    {body}
    return Catalog()
"""
ITEMS = {
    "aws": [
        ("p4d.24xlarge", "us-east-1", 21.96, 8, "A100", 40.0, False),
        ("p4d.24xlarge", "us-west-2", 19.5, 8, "A100", 40.0, False),
        ("p4d.24xlarge", "us-east-1", 9.1, 8, "A100", 40.0, True),
    ],
    "runpod": [("NVIDIA H100 PCIe", "EU", 1.99, 1, "H100", 80.0, False), ("?", "EU", 0.1, 1, "FooBar", 24.0, False)],
}


@pytest.fixture
def gpuhunt(tmp_path, monkeypatch):
    """Puts a stand-in on the path; returns the function that makes it."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    all_offers.cache_clear()

    def make(items=ITEMS, sleep=0.0, body="pass"):
        folder = tmp_path / "site"
        (folder / "gpuhunt-1.2.3.dist-info").mkdir(parents=True, exist_ok=True)
        (folder / "gpuhunt-1.2.3.dist-info" / "METADATA").write_text("Name: gpuhunt\nVersion: 1.2.3\n")
        (folder / "gpuhunt.py").write_text(STAND_IN.format(items=items, sleep=sleep, body=body))
        monkeypatch.syspath_prepend(str(folder))

    yield make
    all_offers.cache_clear()


def test_refreshed_prices_replace_those_of_their_providers_alone(gpuhunt):
    shipped, before = load_offers(), (PRESETS / "prices.csv").read_bytes()
    gpuhunt()
    found = prices.refresh()
    assert (found.offers, found.providers, found.source) == (2, ("aws", "runpod"), "gpuhunt 1.2.3")
    assert any(line.startswith("gcp: Provider is not loaded") for line in found.failed)
    now = load_offers()
    cheapest = next(offer for offer in now if offer.provider == "aws")
    assert (cheapest.gpu, cheapest.count, cheapest.usd_per_h, cheapest.usd_per_h_spot) == ("A100-40GB", 8, 19.5, 9.1)
    assert (cheapest.region, cheapest.source) == ("us-west-2", "gpuhunt 1.2.3")
    assert not cheapest.is_stale()
    assert cheapest.is_stale(date.today() + timedelta(days=92))
    replaced = {"aws", "runpod", "runpod (secure)", "runpod (community)"}
    assert [offer for offer in now if offer.provider not in replaced] == [
        offer for offer in shipped if offer.provider not in replaced
    ]
    assert sum(offer.provider in replaced for offer in now) == 2
    assert (PRESETS / "prices.csv").read_bytes() == before


def test_no_answer_in_time_leaves_what_was_there(gpuhunt):
    gpuhunt()
    prices.refresh()
    kept = refreshed_prices().read_bytes()
    gpuhunt(sleep=30.0)
    began = time.monotonic()
    with pytest.raises(HardwareError, match=r"no answer within 1 s.*prices\.csv stay"):
        prices.refresh(timeout_s=1.0)
    assert time.monotonic() - began < 10
    assert refreshed_prices().read_bytes() == kept


@pytest.mark.parametrize(
    ("body", "words"),
    [("raise OSError('no route to host')", "no route to host"), ("import sys; sys.exit(3)", "gpuhunt failed")],
)
def test_a_failure_is_told_and_nothing_is_kept(gpuhunt, body, words):
    gpuhunt(body=body)
    with pytest.raises(HardwareError, match=f"{words}.*the shipped prices stay"):
        prices.refresh()
    assert not refreshed_prices().exists()


def test_a_file_of_another_release_is_passed_over(gpuhunt):
    refreshed_prices().parent.mkdir(parents=True)
    refreshed_prices().write_text("provider,cost\naws,1\n")
    assert len(load_offers()) > 200


def test_without_gpuhunt_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(prices.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(MissingExtraError, match=r"finetui\[prices\]"):
        prices.refresh()


@pytest.mark.parametrize(
    ("name", "memory", "provider", "instance", "expected"),
    [
        ("A100", 80, "aws", "p4de.24xlarge", "A100-80GB"),
        ("A100", 80, "azure", "Standard_NC24ads_A100_v4", "A100-80GB-PCIe"),
        ("A100", 40, "gcp", "a2-highgpu-1g", "A100-40GB"),
        ("H100", 80, "lambda", "gpu_1x_h100_pcie", "H100-PCIe"),
        ("H100", 80, "vast-ai", "H100_SXM", "H100"),
        ("H100NVL", 94, "azure", "", "H100-NVL"),
        ("RTX4090", 24, "runpod", "NVIDIA GeForce RTX 4090", "RTX-4090"),
        ("RTX6000Ada", 48, "runpod", "", "RTX-6000-Ada"),
        ("L40S", 48, "runpod", "", "L40S"),
        ("T4", 16, "gcp", "", "T4"),
        ("V100", 16, "aws", "", "V100-16GB"),
        ("MI300X", 192, "runpod", "", "MI300X"),
        ("H200", 141, "nebius", "", "H200"),
        ("RTX4090", 48, "vast-ai", "modded", None),
        ("Gaudi2", 96, "aws", "", None),
        (None, None, "aws", "", None),
    ],
)
def test_gpus_get_the_catalogs_names(name, memory, provider, instance, expected):
    assert prices.gpu_name(name, memory, provider, instance) == expected
