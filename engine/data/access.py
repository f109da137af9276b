"""Why an address can't be read, in plain words: each service has exceptions of its own.

The names are those of botocore (s3), gcsfs and google-auth (gs), adlfs and azure-core (abfs), aiohttp (https) and
huggingface_hub (hf). None of these packages is imported: an exception is told by the names of its classes, by the HTTP
status or service code that it carries, and by those it was raised from.
"""

from __future__ import annotations

from typing import Any

#: What to do where an address asks for rights that were not given, or not enough.
_CREDENTIALS = {
    "s3": "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or run 'aws configure'; the key needs "
    "s3:GetObject and s3:ListBucket there.",
    "gs": "Run 'gcloud auth application-default login', or set GOOGLE_APPLICATION_CREDENTIALS to the file of a service "
    "account that may read the bucket.",
    "abfs": "Set AZURE_STORAGE_CONNECTION_STRING, or AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY.",
    "hf": "Set HF_TOKEN to a token that may read it.",
    "https": "Put a token into the address by name, such as ?token=${DATA_TOKEN}, and set that variable.",
}
_SAME = {"s3a": "s3", "gcs": "gs", "abfss": "abfs", "az": "abfs", "http": "https"}
#: Classes that mean that nobody is logged in, and those of a login that is not allowed to.
_NOBODY = {"NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError", "TokenRetrievalError",
           "SSOTokenLoadError", "UnauthorizedSSOTokenError", "RefreshError"}  # fmt: skip
_REFUSED = {"PermissionError", "ClientAuthenticationError", "ExpiredToken", "InvalidAccessKeyId"}
_REFUSED_CODES = {"401", "403", "AccessDenied", "Forbidden", "Unauthorized", "ExpiredToken", "InvalidAccessKeyId",
                  "SignatureDoesNotMatch", "AllAccessDisabled"}  # fmt: skip
_NO_BUCKET = {"NoSuchBucket", "ContainerNotFound"}
_NETWORK = {"ClientConnectorError", "ClientConnectorDNSError", "EndpointConnectionError", "ConnectTimeoutError",
            "ConnectionError", "ConnectionRefusedError", "ConnectError", "ConnectTimeout", "ReadTimeout",
            "ReadTimeoutError", "TimeoutError", "ServerDisconnectedError", "SocketTimeoutError",
            "ServiceRequestError", "gaierror"}  # fmt: skip


def why_unreadable(address: str, error: BaseException) -> tuple[str, str]:
    """What is wrong with an address, and what to do about it, from the exception of whoever tried to read it."""
    protocol = address.partition("://")[0]
    causes = list(_chain(error))
    names = {kind.__name__ for item in causes for kind in type(item).__mro__}
    codes = {code for item in causes for code in _codes(item)}
    rights = _CREDENTIALS.get(_SAME.get(protocol, protocol), "Check your credentials.")
    if names & _NOBODY:
        return "the address needs credentials, and there are none", rights
    if (names | codes) & _NO_BUCKET:
        return "there is no such bucket", "Check its name and, where there are several, the endpoint."
    if names & _REFUSED or codes & _REFUSED_CODES or str(error).startswith("Forbidden"):  # gcsfs says no more
        return "access to the address is refused", rights
    if names & _NETWORK:
        return "the address can't be reached", "Check the network, proxies and the address; then try again."
    return "the address can't be read", "Check the network, the address and your credentials."


def _chain(error: BaseException | None) -> Any:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _codes(error: BaseException) -> set[str]:
    """HTTP status and service code of an exception, wherever its package keeps them."""
    response: Any = getattr(error, "response", None)
    told = response.get("Error", {}).get("Code") if isinstance(response, dict) else getattr(response, "status_code", 0)
    found = {told, getattr(error, "status", None), getattr(error, "code", None), getattr(error, "status_code", None)}
    return {str(code) for code in found if code}
