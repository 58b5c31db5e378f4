"""Which headers cross the gateway, and which end here: nobody speaks to an engine, or as the gateway, through us."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from polyserve.serve.errors import ApiError, Headers

# RFC 9110, 7.6.1, and what the two ends of a proxy each say for themselves.
HOP_BY_HOP = frozenset(
    b"connection keep-alive proxy-authenticate proxy-authorization proxy-connection te trailer trailers "
    b"transfer-encoding upgrade http2-settings".split()
)
# What we send ourselves, what is between the client and us (keys, cookies, addresses), and what routers tell engines:
# `priority` and a data-parallel rank are ours to give.
_NOT_UPSTREAM = HOP_BY_HOP | frozenset(
    b"host content-length content-type content-encoding accept-encoding expect x-request-id authorization x-api-key "
    b"api-key cookie origin referer forwarded via x-real-ip priority x-priority x-data-parallel-rank "
    b"x-prefiller-host-port x-session-id".split()
)
_NOT_UPSTREAM_PREFIXES = (
    b"x-polyserve-", b"x-slo-", b"x-llm-d-", b"x-sgl-", b"x-vllm-", b"x-dynamo-", b"x-gateway-", b"x-envoy-",
    b"x-forwarded-", b"x-prefill", b"x-decode", b"x-kv-", b"sec-",
)  # fmt: skip
_NOT_DOWNSTREAM = HOP_BY_HOP | frozenset(
    b"content-length content-encoding date server via x-powered-by x-request-id set-cookie www-authenticate "
    b"authorization x-api-key alt-svc".split()
)
_NOT_DOWNSTREAM_PREFIXES = (b"x-polyserve-", b"x-vllm-", b"x-sgl-", b"x-llm-d-", b"x-dynamo-", b"x-envoy-")

# Headers that we decide by. Two of one name would let two readers see two requests.
_ONCE = frozenset(
    b"authorization x-api-key host content-length content-type content-encoding transfer-encoding expect x-request-id "
    b"origin".split()
)
_ONCE_PREFIXES = (b"x-polyserve-", b"x-slo-", b"x-llm-d-slo-", b"x-sgl-")


def incoming(pairs: Iterable[tuple[bytes, bytes]]) -> dict[bytes, bytes]:
    """A client's headers by lower-case name, lists joined; raises `ApiError` for what may come once and came twice."""
    headers: dict[bytes, bytes] = {}
    for name, value in pairs:
        if name not in headers:
            headers[name] = value
        elif name in _ONCE or name.startswith(_ONCE_PREFIXES):
            shown = name.decode("latin-1")
            raise ApiError(400, "duplicate_header", f"the header {shown} was sent more than once", shown)
        else:
            headers[name] = headers[name] + b", " + value
    if b"transfer-encoding" in headers and b"content-length" in headers:
        message = "content-length and transfer-encoding exclude each other"
        raise ApiError(400, "invalid_request", message, "content-length")
    return headers


def for_engine(headers: Mapping[bytes, bytes]) -> Headers:
    """What an engine gets of a client's headers."""
    hops = _named(headers.get(b"connection"))
    return [header for header in headers.items() if not _stays(header[0], hops, _NOT_UPSTREAM, _NOT_UPSTREAM_PREFIXES)]


def for_client(headers: Headers) -> Headers:
    """What a client gets of an engine's headers."""
    hops = _named(next((value for name, value in headers if name == b"connection"), None))
    return [header for header in headers if not _stays(header[0], hops, _NOT_DOWNSTREAM, _NOT_DOWNSTREAM_PREFIXES)]


def _named(connection: bytes | None) -> frozenset[bytes]:
    """The headers that `Connection` declares to be of this hop."""
    if connection is None:
        return frozenset()
    return frozenset(name.strip().lower() for name in connection.split(b","))


def _stays(name: bytes, hops: frozenset[bytes], names: frozenset[bytes], prefixes: tuple[bytes, ...]) -> bool:
    if b"_" in name:  # some servers read it as a dash
        name = name.replace(b"_", b"-")
    return name in names or name in hops or name.startswith(prefixes)
