"""Buckets of S3 and Google Cloud Storage, against servers on this machine that answer as these do.

They run where the packages are that the addresses need, which the test extra does not bring: ``pip install s3fs gcsfs
'moto[server]' gcp-storage-emulator``. What is said about an address that can't be read is tested without them, on
exceptions of the same names and contents as theirs.
"""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from finetui.engine.data.access import why_unreadable
from finetui.engine.data.sources import mark_of, read_rows
from finetui.planner.datasource import DataSource
from finetui.planner.errors import DataError

ROWS = [{"text": f"row {i}"} for i in range(5)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
FILES = {"d/a.jsonl": LINES, "d/b.jsonl.gz": gzip.compress(LINES), "d/readme.md": b"no data"}
Put = Callable[[str, bytes], Any]


def texts(path: str, **more: Any) -> list[str]:
    return [row.values["text"] for row in read_rows(DataSource(path=path, **more))]


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[Put]:
    s3fs, moto = pytest.importorskip("s3fs"), pytest.importorskip("moto.server")
    boto3 = pytest.importorskip("boto3")
    server = moto.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.get_host_and_port()[1]}", "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    try:
        client = boto3.client("s3")
        client.create_bucket(Bucket="bucket")
        yield lambda key, body: client.put_object(Bucket="bucket", Key=key, Body=body)
    finally:
        server.stop()
        s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def gs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Put]:
    emulator = pytest.importorskip("gcp_storage_emulator.server")
    # Newer releases ask a service of Google's, which no emulator has, what kind of bucket it is, for a minute each.
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    gcsfs = pytest.importorskip("gcsfs")
    server = emulator.create_server("127.0.0.1", 0, in_memory=True)
    server.start()
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{server._api._httpd.server_address[1]}")
    gcsfs.GCSFileSystem.clear_instance_cache()
    try:
        store = gcsfs.GCSFileSystem(token="anon", skip_instance_cache=True)
        store.mkdir("bucket")
        yield lambda key, body: store.pipe(f"bucket/{key}", body)
    finally:
        server.stop()
        gcsfs.GCSFileSystem.clear_instance_cache()


@pytest.mark.parametrize("protocol", ["s3", "gs"])
def test_a_bucket(protocol: str, request: pytest.FixtureRequest) -> None:
    put: Put = request.getfixturevalue(protocol)
    for key, body in FILES.items():
        put(key, body)
    one = [row["text"] for row in ROWS]
    assert texts(f"{protocol}://bucket/d/a.jsonl") == one
    assert texts(f"{protocol}://bucket/d") == one * 2
    assert texts(f"{protocol}://bucket/d/*.gz", limit=3) == one[:3]
    source = DataSource(path=f"{protocol}://bucket/d/a.jsonl")
    before = mark_of(source)
    assert before == mark_of(source)
    with pytest.raises(DataError, match=r"none\.jsonl: there is nothing at this address"):
        texts(f"{protocol}://bucket/none.jsonl")
    with pytest.raises(DataError, match=r"other/x\.jsonl: there is (no such bucket|nothing at this address)"):
        texts(f"{protocol}://other/x.jsonl")
    with pytest.raises(DataError, match=r"readme\.md: the address holds no dataset file\. finetui reads \.jsonl"):
        texts(f"{protocol}://bucket/d/readme.md")
    put("d/a.jsonl", LINES * 2)
    _forget(protocol)
    assert mark_of(source) != before


def _forget(protocol: str) -> None:
    """A new process would list the bucket anew; this one remembers what was there."""
    import fsspec

    for store in fsspec.get_filesystem_class(protocol)._cache.values():
        store.invalidate_cache()


def test_a_bucket_without_credentials(s3: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    s3("a.jsonl", LINES)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(DataError) as told:
        texts("s3://bucket/a.jsonl")
    assert told.value.what.startswith("the address needs credentials, and there are none (NoCredentialsError")
    assert told.value.do.startswith("Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE")


def error(name: str, base: type[Exception] = Exception, text: str = "", **more: Any) -> Exception:
    made = type(name, (base,), {})(text)
    vars(made).update(more)
    return made


@pytest.mark.parametrize(
    ("address", "raised", "what", "do"),
    [
        ("s3://b/x", error("NoCredentialsError"), "needs credentials, and there are none", "AWS_PROFILE"),
        ("s3a://b/x", error("ClientError", response={"Error": {"Code": "AccessDenied"}}), "is refused", "s3:GetObject"),
        ("s3://b/x", error("NoSuchBucket"), "no such bucket", "endpoint"),
        ("gs://b/x", error("HttpError", code=401), "is refused", "gcloud auth application-default login"),
        ("gcs://b/x", error("OSError", OSError, "Forbidden: b/x"), "is refused", "GOOGLE_APPLICATION_CREDENTIALS"),
        ("gs://b/x", error("DefaultCredentialsError"), "needs credentials", "gcloud auth"),
        ("abfs://b/x", error("ClientAuthenticationError"), "is refused", "AZURE_STORAGE_CONNECTION_STRING"),
        ("https://h/x", error("ClientResponseError", status=403), "is refused", "?token=${DATA_TOKEN}"),
        ("https://h/x", error("ClientResponseError", status=503), "can't be read", "Check the network"),
        ("https://h/x", error("ClientConnectorDNSError", OSError), "can't be reached", "proxies"),
        ("sftp://h/x", PermissionError("no"), "is refused", "Check your credentials."),
    ],
)  # fmt: skip
def test_why_an_address_can_not_be_read(address: str, raised: Exception, what: str, do: str) -> None:
    told = why_unreadable(address, raised)
    assert what in told[0]
    assert do in told[1]


def test_the_cause_below_an_exception_counts() -> None:
    raised = OSError("can't open")
    raised.__cause__ = error("NoCredentialsError")
    assert why_unreadable("s3://b/x", raised)[0] == "the address needs credentials, and there are none"


@pytest.mark.parametrize(
    ("address", "package"),
    [
        ("s3://b/x.jsonl", "s3fs"),
        ("gs://b/x.jsonl", "gcsfs"),
        ("abfs://b/x.jsonl", "adlfs"),
        ("sftp://h/x", "paramiko"),
    ],
)
def test_a_package_that_is_missing_is_named(address: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # as if it were
    protocol = address.partition("://")[0]
    message = f"{protocol}:// needs a package that is not installed. Install it with: pip install {package}"
    with pytest.raises(DataError) as told:
        texts(address)
    assert message in str(told.value)
