"""Whether this machine is about to be taken away: what the metadata services of clouds say before the signal comes.

Sources, read 2026-11:
    AWS      ``spot/instance-action`` under IMDSv2, two minutes ahead
             https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html
    Google   ``instance/preempted`` and ``instance/maintenance-event``, 30 s and 60 s ahead
             https://cloud.google.com/compute/docs/instances/preemptible, …/setting-vm-host-options
    Azure    scheduled events of type Preempt, Terminate, Redeploy or Reboot, 30 s ahead and more
             https://learn.microsoft.com/azure/virtual-machines/linux/scheduled-events

Asked is only the service of the cloud that the firmware names, so that no other network is knocked at; further clouds
by a command of the recipe, or by ``touch RUN/control/preempted``.
"""

from __future__ import annotations

import contextlib
import email.utils
import json
import os
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from datetime import datetime
from http.client import HTTPException
from pathlib import Path
from typing import Any

from ...planner.limits import Limits
from ..run import Run

#: Seconds between two questions: AWS recommends five, Google and Azure announce half a minute ahead.
EVERY_S = 5.0
#: A file in ``control/`` by which any program can announce it.
FILE = "preempted"
_TIMEOUT_S = 2.0
#: Where the metadata service of AWS and Azure answers, on the link itself.
_LINK_LOCAL = "http://169.254.169.254"
#: What the firmware of the clouds' machines calls itself.
_DMI = Path("/sys/class/dmi/id")
_VENDORS = {"Amazon EC2": "AWS", "Google": "Google Cloud"}
#: Azure's machines bear the vendor of any Hyper-V; this tag is theirs alone (as cloud-init tells them apart).
_AZURE_TAG = "7783-7084-3265-9085-8269-3286-77"

#: A service that is not there, or answers something else than its documentation says.
_NO_ANSWER = (OSError, HTTPException, ValueError, LookupError, TypeError, AttributeError, subprocess.TimeoutExpired)

Ask = Callable[[], float | None]
"""Seconds until the machine is taken; None while nothing is announced."""


class Notices:
    """Asks from a thread of its own, while a run is at work.

    Args:
        told: called once, with who says so and how many seconds are left.
    """

    def __init__(self, limits: Limits, run: Run, told: Callable[[str, float], None], every_s: float = EVERY_S) -> None:
        self._told, self._every_s = told, every_s
        self._asks = sources(limits, run)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._work, name="preemption", daemon=True)

    def __enter__(self) -> Notices:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(1.0)  # a service that hangs is left to its timeout

    def _work(self) -> None:
        silent: set[str] = set()
        while not self._over.is_set():
            for who, ask in self._asks.items():
                try:
                    left_s = ask()
                except _NO_ANSWER as error:
                    if who not in silent:  # once: a service that does not answer would fill the log
                        silent.add(who)
                        print(f"{who} can't be asked whether it takes this machine away: {error}", file=sys.stderr)
                    continue
                if left_s is not None:
                    self._told(who, left_s)
                    return
            self._over.wait(self._every_s)


def sources(limits: Limits, run: Run, dmi: Path = _DMI) -> dict[str, Ask]:
    """Who is asked about a run."""
    asks: dict[str, Ask] = {f"control/{FILE}": lambda: _by_file(run, limits.grace_s)}
    if limits.preemption == "off":
        return asks
    if command := limits.preemption_command:
        asks["limits.preemption_command"] = lambda: _by_command(command, limits.grace_s)
        return asks
    cloud = cloud_of(dmi)
    if cloud == "AWS":
        service = Aws(os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT") or _LINK_LOCAL)
        asks[cloud] = service.ask
    elif cloud == "Google Cloud":
        host = os.environ.get("GCE_METADATA_HOST") or "metadata.google.internal"
        asks[cloud] = lambda: google(f"http://{host}")
    elif cloud == "Azure":
        asks[cloud] = lambda: azure(_LINK_LOCAL)
    return asks


def cloud_of(dmi: Path = _DMI) -> str | None:
    """The cloud that this machine belongs to.

    The variables by which the clouds' own tools are pointed at another address of the service count as well.
    """
    if os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT"):
        return "AWS"
    if os.environ.get("GCE_METADATA_HOST"):
        return "Google Cloud"
    if _word(dmi / "chassis_asset_tag") == _AZURE_TAG:
        return "Azure"
    return _VENDORS.get(_word(dmi / "sys_vendor"))


def _word(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text(encoding="utf-8", errors="replace").strip()
    return ""


class Aws:
    """The spot notice of AWS, behind the session token of IMDSv2."""

    def __init__(self, base: str = _LINK_LOCAL) -> None:
        self._base, self._token, self._until = base.rstrip("/"), "", 0.0

    def ask(self) -> float | None:
        """Seconds until the instance is stopped, terminated or hibernated."""
        if time.monotonic() > self._until:
            wish = {"X-aws-ec2-metadata-token-ttl-seconds": "21600"}
            self._token = _fetch(f"{self._base}/latest/api/token", wish, method="PUT") or ""
            self._until = time.monotonic() + 18000.0
        url = f"{self._base}/latest/meta-data/spot/instance-action"
        try:
            told = _fetch(url, {"X-aws-ec2-metadata-token": self._token})
        except urllib.error.HTTPError as error:
            if error.code == 401:  # the token is no longer good: ask for another one next time
                self._until = 0.0
            raise
        if told is None:
            return None
        return _left_s(datetime.fromisoformat(_object(told)["time"].replace("Z", "+00:00")).timestamp(), 120.0)


def google(base: str) -> float | None:
    """Seconds until Google takes an instance: 30 s when preempted, 60 s before maintenance that ends it."""
    flavor = {"Metadata-Flavor": "Google"}
    if (_fetch(f"{base}/computeMetadata/v1/instance/preempted", flavor) or "").strip() == "TRUE":
        return 30.0
    event = (_fetch(f"{base}/computeMetadata/v1/instance/maintenance-event", flavor) or "").strip()
    return 60.0 if event == "TERMINATE_ON_HOST_MAINTENANCE" else None


def azure(base: str) -> float | None:
    """Seconds until the soonest scheduled event that ends a machine of this scale set; one that runs has none left."""
    told = _fetch(f"{base}/metadata/scheduledevents?api-version=2020-07-01", {"Metadata": "true"})
    ending = []
    for event in _object(told or "{}").get("Events", []):
        if event.get("EventType") in {"Preempt", "Terminate", "Redeploy", "Reboot"}:
            at = email.utils.parsedate_to_datetime(event["NotBefore"]).timestamp() if event.get("NotBefore") else 0.0
            ending.append(_left_s(at, 30.0) if at else 0.0)
    return min(ending, default=None)


def _by_file(run: Run, grace_s: float) -> float | None:
    """The file may hold the seconds that are left."""
    path = run.path / "control" / FILE
    try:
        text = path.read_text(encoding="utf-8", errors="replace").strip()
    except FileNotFoundError:
        return None
    path.unlink(missing_ok=True)  # it was about this attempt, not about one that resumes elsewhere
    return float(text) if text.replace(".", "", 1).isdigit() else grace_s


def _by_command(command: str, grace_s: float) -> float | None:
    done = subprocess.run(["/bin/sh", "-c", command], capture_output=True, timeout=30.0, check=False)
    return grace_s if done.returncode == 0 else None


def _left_s(at: float, usual_s: float) -> float:
    """Seconds until a moment of the cloud's clock; the usual notice where ours must be wrong."""
    left_s = at - time.time()
    return left_s if 0.0 <= left_s <= 3600.0 else usual_s


def _object(text: str) -> Mapping[str, Any]:
    tree = json.loads(text)
    if not isinstance(tree, dict):
        raise ValueError("the metadata service answered with something else than an object")
    return tree


def _fetch(url: str, headers: Mapping[str, str], method: str = "GET") -> str | None:
    """The answer as text, or None for "not found"; never through a proxy, which would answer for another machine."""
    request = urllib.request.Request(url, headers=dict(headers), method=method)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=_TIMEOUT_S) as answer:
            body: bytes = answer.read(1 << 16)
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return None
        raise
    return body.decode("utf-8", errors="replace")
