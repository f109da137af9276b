"""Prices of today: asked of the providers through gpuhunt, and kept under the state directory beside the shipped ones.

gpuhunt (dstack, MPL-2.0) publishes catalogs of clouds and asks marketplaces; it sets no time limits of its own, so it
runs in a process that does. What comes back replaces the shipped offers of the same providers
(:func:`.hardware.load_offers`), whose file is never touched.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import astuple, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .errors import HardwareError, MissingExtraError, first_line
from .hardware import Offer, all_offers, find_gpu, refreshed_prices

#: The longest that asking may take.
TIMEOUT_S = 60.0
COLUMNS = ("provider", "gpu", "count", "usd_per_h", "usd_per_h_spot", "region", "as_of", "source")
#: Providers that answer without an account, by gpuhunt's names, and what the shipped prices call them.
PROVIDERS = {
    "aws": "aws", "azure": "azure", "gcp": "gcp", "lambdalabs": "lambda", "nebius": "nebius", "oci": "oci",
    "runpod": "runpod", "verda": "verda", "cloudrift": "cloudrift", "vastai": "vast-ai", "vultr": "vultr",
    "jarvislabs": "jarvis-labs", "lium": "lium",
}  # fmt: skip
#: Clouds whose A100 and H100 sit on SXM boards unless a name says otherwise.
_SXM = {"aws", "gcp", "oci", "nebius", "lambda"}
#: How far the memory that a provider names may lie from what torch can use of a GPU.
_MEMORY_SHARE = 0.2


@dataclass(frozen=True)
class Refreshed:
    """What a refresh brought: where it is kept, how many offers of which providers, and which did not answer."""

    path: Path
    offers: int
    providers: tuple[str, ...]
    failed: tuple[str, ...]
    source: str


def refresh(timeout_s: float = TIMEOUT_S) -> Refreshed:
    """Ask for today's prices and keep them.

    Raises:
        MissingExtraError: gpuhunt is not installed.
        HardwareError: nobody answered in time; what was kept before stays.
    """
    if importlib.util.find_spec("gpuhunt") is None:
        raise MissingExtraError("gpus --refresh", "prices")
    answer = _ask(timeout_s)
    source = f"gpuhunt {answer['version']}"
    offers = list(_offers(answer["items"], datetime.now(UTC).date().isoformat(), source))
    if not offers:
        raise _unanswered(f"no provider answered ({'; '.join(answer['failed'])[:300] or 'nothing came back'})")
    path = refreshed_prices()
    _write(path, offers)
    all_offers.cache_clear()
    providers = tuple(sorted({offer.provider for offer in offers}))
    return Refreshed(path, len(offers), providers, tuple(answer["failed"]), source)


def _ask(timeout_s: float) -> dict[str, Any]:
    command = [sys.executable, "-P", "-m", __name__]
    # The child has to find this package where the parent did.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        raise _unanswered(f"no answer within {timeout_s:.0f} s") from None
    try:
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise _unanswered(f"gpuhunt failed ({last[:200]})") from None
    return answer


def _unanswered(why: str) -> HardwareError:
    kept = refreshed_prices()
    stays = f"the prices of {kept} stay" if kept.is_file() else "the shipped prices stay"
    return HardwareError(f"prices can't be refreshed: {why}", where="--refresh", do=f"Check the network; {stays}.")


def _offers(items: Iterable[dict[str, Any]], today: str, source: str) -> Iterable[Offer]:
    """The cheapest machine of each provider, GPU and count: on demand, and interruptible."""
    best: dict[tuple[str, str, int], dict[bool, dict[str, Any]]] = {}
    for item in items:
        provider = PROVIDERS[item["provider"]]
        gpu = gpu_name(item["gpu_name"], item["gpu_memory"], provider, item["instance_name"])
        if gpu is None or item["price"] <= 0:
            continue
        kinds = best.setdefault((provider, gpu, item["gpu_count"]), {})
        if item["spot"] not in kinds or item["price"] < kinds[item["spot"]]["price"]:
            kinds[item["spot"]] = item
    for (provider, gpu, count), kinds in sorted(best.items()):
        price = {spot: item["price"] for spot, item in kinds.items()}
        region = kinds.get(False, kinds.get(True, {})).get("location", "")
        yield Offer(provider, gpu, count, price.get(False), price.get(True), region, today, source)


def gpu_name(name: str | None, memory_gb: float | None, provider: str, instance: str = "") -> str | None:
    """The catalog's name of a GPU as gpuhunt names it, by name, memory and board; None where the catalog has none."""
    if not name or not memory_gb:
        return None
    words = f"{name} {instance}".lower()
    pcie = "pcie" in words or ("sxm" not in words and provider not in _SXM)
    sized = f"{name}-{memory_gb:.0f}GB"
    boards = [f"{sized}-PCIe", f"{name}-PCIe"] if pcie else []
    for candidate in (*boards, sized, name):
        try:
            gpu = find_gpu(candidate)
        except HardwareError:
            continue
        if abs(gpu.memory_gib / memory_gb - 1) < _MEMORY_SHARE:
            return gpu.name
    return None


def _write(path: Path, offers: Iterable[Offer]) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".prices-")
    with os.fdopen(handle, "w", encoding="utf-8", newline="") as file:
        out = csv.writer(file)
        out.writerow(COLUMNS)
        out.writerows(["" if value is None else value for value in astuple(offer)] for offer in offers)
    os.replace(name, path)


def main() -> int:
    """The asking process: one line of JSON with all machines that have a GPU, and the providers that did not answer."""
    import contextlib
    from importlib import metadata

    found: list[dict[str, Any]] = []
    failed: list[str] = []
    with contextlib.redirect_stdout(sys.stderr):
        import gpuhunt

        try:
            catalog = gpuhunt.default_catalog()
        except Exception as error:  # whatever a provider's library may raise
            print(json.dumps({"version": "", "items": [], "failed": [first_line(error, 120)]}), file=sys.__stdout__)
            return 0
        for provider in PROVIDERS:
            try:
                found += [_item(item) for item in catalog.query(provider=provider, min_gpu_count=1)]
            except Exception as error:  # as above
                failed.append(f"{provider}: {first_line(error, 120)}")
    print(json.dumps({"version": metadata.version("gpuhunt"), "items": found, "failed": failed}))
    return 0


def _item(item: Any) -> dict[str, Any]:
    names = ("provider", "instance_name", "location", "price", "gpu_count", "gpu_name", "gpu_memory", "spot")
    return {name: getattr(item, name) for name in names}


if __name__ == "__main__":
    sys.exit(main())
