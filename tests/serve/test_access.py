"""Who may come in: keys, tenants and what they may ask for, operators, and that no secret is ever shown."""

from __future__ import annotations

import io
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest
from fake_engine import FakeEngine
from hypothesis import given
from hypothesis import strategies as st
from live import TIERS, make_plan, until
from test_gateway import CHAT, MESSAGES, over, post

from polyserve.config import ConfigError, load
from polyserve.core.types import Slo, Tenant, Tier
from polyserve.journal import replay
from polyserve.serve.access import Keyring, Operators, clamped, fresh_key, hashed
from polyserve.serve.errors import ApiError
from polyserve.serve.plan import TenantPlan

KEY, OTHER, ADMIN = fresh_key(), fresh_key(), fresh_key()
TENANTS = [
    {"name": "shop", "keys": [hashed(KEY)], "tiers": ["slow", "best-effort"], "default_tier": "slow"},
    {"name": "lab", "keys": [hashed(OTHER)]},
]


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


# -------------------------------------------------------------------------------------------------------------- keys


async def test_the_sdk_gets_in_with_a_key_and_its_own_error_without() -> None:
    engine = FakeEngine()
    async with over(engine, tenants=TENANTS) as live:
        with pytest.raises(openai.AuthenticationError) as caught:
            await live.openai.chat.completions.create(model="tiny", messages=MESSAGES)
        assert caught.value.code == "invalid_api_key"
        assert caught.value.response.headers["x-should-retry"] == "false"
        assert caught.value.response.headers["www-authenticate"] == "Bearer"
        assert not engine.seen
        client = live.openai.with_options(api_key=KEY)
        answer = await client.chat.completions.create(model="tiny", messages=MESSAGES)
        assert answer.choices[0].finish_reason == "stop"
        assert [model.id async for model in client.models.list()] == ["tiny"]


WRONG: list[dict[str, str]] = [
    {},
    {"authorization": ""},
    {"authorization": "Bearer"},
    {"authorization": "Bearer wrong"},
    {"authorization": f"Basic {KEY}"},
    {"authorization": f"Bearer {KEY} {KEY}"},
    {"authorization": f"Bearer {hashed(KEY)}"},
    {"x-api-key": KEY[:-1]},
    {"x-api-key": OTHER, "authorization": f"Bearer {KEY}"},
]


async def test_no_other_key_gets_in_and_none_is_repeated() -> None:
    engine = FakeEngine()
    async with over(engine, tenants=TENANTS) as live:
        for headers in WRONG:
            for path in ("/v1/chat/completions", "/v1/models", "/v1/nothing"):
                status, answer, _ = await post(live, CHAT, path, **headers)
                assert (status, answer["error"]["code"]) == (401, "invalid_api_key"), headers
                assert KEY[:8] not in answer["error"]["message"]
        for path in ("/v1/models", "/v1/models/tiny"):
            async with live.http.get(live.url + path) as got:
                assert got.status == 401
        right = (bearer(KEY), {"x-api-key": KEY}, {"x-api-key": KEY} | bearer(KEY), {"authorization": f"bearer {KEY}"})
        for headers in right:
            assert (await post(live, CHAT, **headers))[0] == 200
        assert len(engine.seen) == 4


@given(st.binary(max_size=80))
def test_a_keyring_knows_its_keys_and_no_others(guess: bytes) -> None:
    ring = Keyring([(hashed(KEY), "a"), (hashed(OTHER), "b")])
    assert ring.owner({b"x-api-key": KEY.encode()}) == "a"
    assert ring.owner({b"authorization": b"Bearer " + OTHER.encode()}) == "b"
    for headers in ({b"x-api-key": guess}, {b"authorization": guess}, {b"authorization": b"Bearer " + guess}):
        with pytest.raises(ApiError):
            ring.owner(headers)


async def test_without_tenants_the_gateway_is_open_and_says_so_when_others_reach_it(caplog: Any) -> None:
    async with over(FakeEngine()) as live:
        assert (await post(live, CHAT))[0] == 200
        assert "anybody who reaches" not in caplog.text
    async with over(FakeEngine(), listen={"host": "0.0.0.0", "port": 0}):
        assert "anybody who reaches 0.0.0.0:0 may send requests: the config has no tenants" in caplog.text


# ---------------------------------------------------------------------------------------------------- what one may ask


async def test_a_tenant_gets_its_own_tiers_and_no_others() -> None:
    async with over(FakeEngine(), tenants=TENANTS) as live:
        shop, lab = bearer(KEY), bearer(OTHER)
        assert (await post(live, CHAT, **shop))[2]["x-polyserve-tier"] == "slow"
        assert (await post(live, CHAT, x_polyserve_tier="best-effort", **shop))[2]["x-polyserve-tier"] == "best-effort"
        status, answer, headers = await post(live, CHAT, x_polyserve_tier="fast", **shop)
        assert (status, answer["error"]["code"]) == (403, "tier_not_allowed")
        assert answer["error"]["type"] == "permission_error"
        assert headers["x-should-retry"] == "false"
        assert (await post(live, CHAT, x_slo_tpot_ms="20", **shop))[2]["x-polyserve-tier"] == "slow"
        assert (await post(live, CHAT, x_slo_tpot_ms="20", **lab))[2]["x-polyserve-tier"] == "fast"
        with pytest.raises(openai.PermissionDeniedError):
            await live.openai.with_options(api_key=KEY).chat.completions.create(
                model="tiny", messages=MESSAGES, extra_headers={"x-polyserve-tier": "fast"}
            )


async def test_an_slo_tighter_than_a_tenant_may_ask_is_clamped() -> None:
    tenants = [{"name": "a", "keys": [hashed(KEY)], "tightest": {"tpot_ms": 50, "ttft_ms": 400}}]
    async with over(FakeEngine(), tenants=tenants) as live:
        await post(live, CHAT, x_slo_tpot_ms="1", x_slo_ttft_ms="1", **bearer(KEY))
        (decision,) = live.gateway.decisions.last(1)
        assert decision["slo"] == {"ttft_s": 0.4, "tpot_s": 0.05}


TIER_LIST = [Tier("a", 0.01, 0.2), Tier("b", 0.02, 0.3), Tier("c", 0.05, 0.5), Tier("d", 0.1, 1.0)]


@given(
    st.sets(st.sampled_from("abcd"), min_size=1),
    st.floats(0.001, 1.0),
    st.floats(0.01, 10.0),
    st.floats(0.0, 0.2),
    st.floats(0.0, 2.0),
)
def test_whatever_is_asked_is_served_in_an_allowed_tier_and_no_tighter_than_allowed(
    allowed: set[str], tpot_s: float, ttft_s: float, tightest_tpot_s: float, tightest_ttft_s: float
) -> None:
    tenant = TenantPlan(Tenant("t"), (), tuple(allowed), "a", tightest_tpot_s, tightest_ttft_s)
    slo = clamped(tenant, TIER_LIST, Slo(ttft_s, tpot_s))
    served = max((tier for tier in TIER_LIST if tier.tpot_s <= slo.tpot_s * (1 + 1e-9)), key=lambda tier: tier.tpot_s)
    assert served.name in allowed
    assert slo.ttft_s == max(ttft_s, tightest_ttft_s)
    # Tighter than asked only where the tier that was asked for is not the tenant's.
    wanted_s = max(tpot_s, tightest_tpot_s)
    assert slo.tpot_s >= wanted_s or slo.tpot_s == served.tpot_s


def test_a_tenant_of_best_effort_alone_may_ask_for_no_pace() -> None:
    tenant = TenantPlan(Tenant("t"), (), ("best-effort",), "best-effort")
    with pytest.raises(ApiError) as caught:
        clamped(tenant, TIER_LIST, Slo(1.0, 0.1))
    assert caught.value.code == "tier_not_allowed"


async def test_what_is_over_a_tenants_bounds_is_refused_and_the_sdk_knows_when_to_come_back(tmp_path: Path) -> None:
    journal = tmp_path / "steps.jsonl"
    tenants: list[dict[str, Any]] = [
        {"name": "a", "keys": [hashed(KEY)], "requests_per_s": 0.5, "burst_s": 2, "body_mib": 0.001},
        {"name": "b", "keys": [hashed(OTHER)]},
    ]
    async with over(FakeEngine(), tenants=tenants, journal=journal) as live:
        assert (await post(live, CHAT, **bearer(KEY)))[0] == 200
        with pytest.raises(openai.RateLimitError) as caught:
            await live.openai.with_options(api_key=KEY).chat.completions.create(model="tiny", messages=MESSAGES)
        assert caught.value.code == "rate_limit_exceeded"
        assert "requests per second" in caught.value.message
        headers = caught.value.response.headers
        assert 1 <= int(headers["retry-after-ms"]) <= 2000
        assert "x-should-retry" not in headers
        assert (await post(live, CHAT, **bearer(OTHER)))[0] == 200
        large = CHAT | {"messages": [{"role": "user", "content": "x" * 2000}]}
        assert (await post(live, large, **bearer(KEY)))[0] == 413
        assert (await post(live, large, **bearer(OTHER)))[0] == 200
        await live.quiet()
    assert "rate_limit_exceeded" in journal.read_text()
    assert replay(journal).mismatch is None


# ------------------------------------------------------------------------------------------------------- the operators


async def test_the_admin_api_wants_its_key_where_it_has_one() -> None:
    async with over(FakeEngine(), tenants=TENANTS, admin={"keys": [hashed(ADMIN)]}) as live:
        for path in ("/admin/fleet", "/admin/tiers", "/admin/decisions", "/metrics", "/admin/nothing", "/"):
            for headers in ({}, bearer(KEY), bearer("x")):
                async with live.http.get(live.url + path, headers=headers) as answer:
                    assert (answer.status, (await answer.json())["error"]["code"]) == (401, "invalid_api_key"), path
        for method, path in (
            ("POST", "/admin/instances"),
            ("DELETE", "/admin/instances/e0"),
            ("POST", "/admin/instances/e0/drain"),
        ):
            async with live.http.request(method, live.url + path, json={}) as answer:
                assert answer.status == 401
        for path in ("/admin/fleet", "/metrics"):
            async with live.http.get(live.url + path, headers=bearer(ADMIN)) as answer:
                assert answer.status == 200
        for path in ("/health", "/ready", "/version"):
            async with live.http.get(live.url + path) as answer:
                assert answer.status == 200
        assert (await post(live, CHAT, **bearer(ADMIN)))[0] == 401


OPERATED = [
    ("GET", "/metrics"), ("GET", "/admin/fleet"), ("GET", "/admin/decisions"), ("GET", "/admin/audit"),
    ("GET", "/admin/observe"), ("GET", "/admin/tiers"), ("PUT", "/admin/tiers"), ("POST", "/admin/reload"),
    ("POST", "/admin/instances"), ("DELETE", "/admin/instances/e0"), ("POST", "/admin/instances/e0/drain"),
]  # fmt: skip


async def asked(app: Any, method: str, path: str, key: str = "") -> int:
    """The status with which an ASGI application answers."""
    headers = [(b"host", b"gateway"), *([(b"authorization", f"Bearer {key}".encode())] if key else [])]
    scope = {
        "type": "http", "method": method, "path": path, "raw_path": path.encode(), "query_string": b"",
        "headers": headers, "client": ("10.0.0.7", 5), "server": ("10.0.0.1", 80), "scheme": "http",
        "http_version": "1.1", "root_path": "",
    }  # fmt: skip
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": b"{}", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    await app(scope, receive, send)
    status: int = sent[0]["status"]
    return status


async def test_nothing_of_the_operators_is_open_on_either_listener() -> None:
    async with over(FakeEngine(), admin={"keys": [hashed(ADMIN)]}) as live:
        for app in (live.house.front, live.house.admin):
            for method, path in OPERATED:
                assert await asked(app, method, path) == 401, path
                assert await asked(app, method, path, KEY) == 401, path
            assert await asked(app, "GET", "/health") == 200
            assert await asked(app, "GET", "/admin/fleet", ADMIN) == 200
        assert live.gateway.fleet.get("e0") is not None
    async with over(FakeEngine()) as live:
        for app in (live.house.front, live.house.admin):
            for method, path in OPERATED:
                assert await asked(app, method, path) == 403, path


FROM_ELSEWHERE: list[dict[str, str]] = [
    {"x-forwarded-for": "203.0.113.9"},
    {"forwarded": "for=203.0.113.9"},
    {"via": "1.1 proxy"},
    {"host": "rebound.example.com"},
    {"origin": "https://evil.example.com"},
    {"origin": "null"},
]


async def test_without_a_key_the_admin_api_is_for_this_machine_and_its_programs() -> None:
    async with over(FakeEngine()) as live:
        for headers in FROM_ELSEWHERE:
            for path in ("/admin/fleet", "/admin/instances/e0/drain"):
                async with live.http.post(live.url + path, headers=headers) as answer:
                    assert (answer.status, (await answer.json())["error"]["code"]) == (403, "admin_not_allowed")
        async with live.http.get(f"{live.url}/admin/fleet") as answer:
            assert answer.status == 200


@pytest.mark.parametrize(("client", "host", "may"), [
    (("127.0.0.1", 5), b"localhost:8000", True),
    (("::1", 5), b"[::1]:8000", True),
    (None, b"127.0.0.9", True),
    (("10.0.0.7", 5), b"localhost", False),
    (("127.0.0.1", 5), b"127.0.0.1.example.com", False),
    (("127.0.0.1", 5), b"", False),
])  # fmt: skip
def test_this_machine_is_told_by_both_ends(client: Any, host: bytes, may: bool) -> None:
    operators = Operators(())
    if may:
        operators.check({"client": client}, {b"host": host})
    else:
        with pytest.raises(ApiError):
            operators.check({"client": client}, {b"host": host})


async def test_metrics_are_not_for_clients_where_there_are_tenants() -> None:
    async with (
        over(FakeEngine(), tenants=TENANTS, admin="off") as live,
        live.http.get(f"{live.url}/metrics") as answer,
    ):
        assert answer.status == 404


# ------------------------------------------------------------------------------------------------------------- secrets


TALKATIVE = [
    FakeEngine(status=500, refusal="Traceback: /opt/engine/secret.py on 10.9.8.7"),
    FakeEngine(answer=b'data: {"error": {"message": "10.9.8.7 died"}}\n\n'),
    FakeEngine(answer=b"10.9.8.7", answer_type="text/10.9.8.7"),
    FakeEngine(hang_up_after=-1),
]


@pytest.mark.parametrize("engine", TALKATIVE, ids=["500", "error event", "another type", "hang up"])
async def test_what_an_engine_says_when_it_fails_is_for_the_log(engine: FakeEngine, caplog: Any) -> None:
    caplog.set_level(logging.INFO)
    async with over(engine, limits={"probe_s": 0.05, "shutdown_s": 1, "attempts": 1}) as live:
        status, answer, headers = await post(live, CHAT | {"stream": True})
        assert (status, answer["error"]["code"]) == (502, "upstream_error")
        for secret in ("10.9.8.7", "secret.py", str(engine.port), "127.0.0.1"):
            assert secret not in f"{answer} {dict(headers)}"
        assert "10.9.8.7" in caplog.text or engine.hang_up_after == -1


async def test_the_engine_gets_its_own_key_and_never_the_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGINE_KEY", "engine-secret-1")
    engine = FakeEngine(wants_key="engine-secret-1")
    async with engine.running():
        instances = [{"id": "e0", "url": engine.url, "api_key_env": "ENGINE_KEY"}]
        async with over(tenants=TENANTS, instances=instances) as live:
            await live.ready()
            headers = bearer(KEY) | {"cookie": "session=client-secret", "x-api-key": KEY}
            assert (await post(live, CHAT, **headers))[0] == 200
        assert engine.seen[0][1]["authorization"] == "Bearer engine-secret-1"
        assert KEY not in str(engine.seen)
        assert "client-secret" not in str(engine.seen)


async def test_an_open_gateway_keeps_the_clients_key_to_itself_too() -> None:
    engine = FakeEngine()
    async with over(engine) as live:
        assert (await post(live, CHAT, **bearer(KEY)))[0] == 200
        assert "authorization" not in engine.seen[0][1]


async def test_an_engine_that_wants_another_key_is_named_and_gets_no_requests(caplog: Any) -> None:
    engine = FakeEngine(wants_key="engine-secret-1")
    async with engine.running():
        instances = [{"id": "e0", "url": engine.url}, {"id": "e1", "url": engine.url, "api_key": "engine-secret-2"}]
        async with over(instances=instances):
            await until(lambda: "e0" in caplog.text and "e1" in caplog.text)
    said = [record.getMessage() for record in caplog.records if record.name == "polyserve.serve.fleet"]
    assert sorted(said) == [
        f"instance e0: {engine.url} refuses us without a key; see api_key; it is tried again",
        f"instance e1: {engine.url} refuses our key; see api_key; it is tried again",
    ]


async def test_an_engine_that_refuses_our_key_later_is_not_the_clients_fault() -> None:
    refusing = FakeEngine(status=401)
    async with over(refusing, tenants=TENANTS) as live:
        status, answer, headers = await post(live, CHAT, **bearer(KEY))
        assert status in (502, 503)
        assert answer["error"]["code"] in ("upstream_error", "no_instances")
        assert "www-authenticate" not in headers


async def test_no_secret_is_in_logs_journals_errors_or_the_admin_api(tmp_path: Path, caplog: Any) -> None:
    caplog.set_level(logging.DEBUG)
    journal = tmp_path / "steps.jsonl"
    engine = FakeEngine(wants_key="engine-secret-1")
    secrets = [KEY, OTHER, ADMIN, "engine-secret-1", "engine-secret-2", hashed(KEY), hashed(ADMIN)]
    shown: list[str] = []
    async with engine.running():
        instances = [
            {"id": "e0", "url": engine.url, "api_key": "engine-secret-1"},
            {"id": "e1", "url": engine.url, "api_key": "engine-secret-2"},
        ]
        values = {"tenants": TENANTS, "instances": instances, "journal": journal, "settings": {"explain": True}}
        async with over(admin={"keys": [hashed(ADMIN)]}, **values) as live:
            await live.ready()
            joined = {"id": "e2", "url": engine.url, "api_key": "engine-secret-2"}
            async with live.http.post(f"{live.url}/admin/instances", json=joined, headers=bearer(ADMIN)) as answer:
                assert answer.status == 202
                shown.append(await answer.text())
            for headers in (
                bearer(KEY),
                bearer(OTHER),
                bearer(KEY + "x"),
                {"x-api-key": KEY, "authorization": "Bearer x"},
            ):
                for body in (CHAT, CHAT | {"stream": True}, CHAT | {"n": "x"}):
                    _, text, answered = await post(live, body, **headers)
                    shown.append(f"{text} {dict(answered)}")
            for path in ("/admin/fleet", "/admin/decisions", "/admin/tiers", "/metrics", "/admin/nothing"):
                async with live.http.get(live.url + path, headers=bearer(ADMIN)) as answer:
                    shown.append(f"{await answer.text()} {dict(answer.headers)}")
            shown += [
                repr(live.gateway.plan),
                repr(live.gateway),
                repr(live.house.plan),
                str(list(live.gateway.fleet)),
            ]
            await until(lambda: "instance e1" in caplog.text)
    shown += [caplog.text, journal.read_text()]
    assert '"shop"' in shown[-1]
    for secret in secrets:
        for text in shown:
            assert secret not in text


MISTAKES = {
    "a key in place of its hash": ("tenants: [{name: a, keys: [SECRET]}]", "tenants.0.keys: wants the SHA-256 of each"),
    "a key that is a list of none": ("tenants: [{name: a, keys: SECRET}]", "tenants.0.keys: a list with the SHA-256"),
    "tenants that are a key": ("tenants: SECRET", "tenants: input should be a valid list"),
    "an admin that is a key": ("admin: SECRET", "admin: wants host, port and keys, or off"),
    "an admin key in clear": ("admin: {keys: [SECRET]}", "admin.keys: wants the SHA-256"),
    "an engine key in a list": ("instances: [{id: a, url: 'http://h:1', api_key: [SECRET]}]", "instances.0.api_key: "),
    "two engine keys": (
        "instances: [{id: a, url: 'http://h:1', api_key: SECRET, api_key_env: HOME}]",
        "instances.0.api_key_env: there is an api_key too; give one of them",
    ),
    "an engine key with a space": (
        "instances: [{id: a, url: 'http://h:1', api_key: 'SECRET two'}]",
        "instances.0.api_key: a key is printable ASCII",
    ),
    "a variable that is not set": (
        "instances: [{id: a, url: 'http://h:1', api_key_env: NOT_SET_ANYWHERE}]",
        "instances.0.api_key_env: the environment variable NOT_SET_ANYWHERE is not set",
    ),
    "a password in a URL": (
        "instances: [{id: a, url: 'http://me:SECRET@h:1'}]",
        "instances.0.url: a URL is shown and logged, so it has no user and password; give api_key or api_key_env",
    ),
    "an open admin": (
        "admin: {host: 0.0.0.0, port: 81}",
        "admin: 0.0.0.0 can be reached from elsewhere; give admin.keys (`polyserve key` makes one), or a host of this",
    ),
    "two tenants of one name": (
        f"tenants: [{{name: a, keys: ['{'0' * 64}']}}, {{name: a, keys: ['{'1' * 64}']}}]",
        "tenants: two have the name 'a'; each needs its own",
    ),
    "one key for two": (
        f"tenants: [{{name: a, keys: ['{'0' * 64}']}}, {{name: b, keys: ['sha256:{'0' * 64}']}}]",
        "tenants.1.keys: a key is given twice; each belongs to one tenant",
    ),
    "a tier that is none": (
        f"tenants: [{{name: a, keys: ['{'0' * 64}'], tiers: [gold]}}]",
        "tenants.0: no tier 'gold'; there are: best-effort, fast",
    ),
    "a default that is not allowed": (
        f"tenants: [{{name: a, keys: ['{'0' * 64}'], tiers: [fast], default_tier: slow}}]",
        "tenants.0: default_tier: 'slow' is not among its tiers: fast",
    ),
    "a rate of nothing": (
        f"tenants: [{{name: a, keys: ['{'0' * 64}'], requests_per_s: 0}}]",
        "tenants.0.requests_per_s: input should be greater than 0, not 0",
    ),
    "an unknown key": (
        f"tenants: [{{name: a, keys: ['{'0' * 64}'], tier: fast}}]",
        "tenants.0.tier: unknown key; there are: name, keys, tiers",
    ),
}


@pytest.mark.parametrize(("section", "line"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_one_line_that_shows_no_secret(tmp_path: Path, section: str, line: str) -> None:
    plain = {"model": "tiny", "profile": "a100-llama-3-8b", "tiers": TIERS}
    if not section.startswith("instances"):
        plain["instances"] = [{"id": "e0", "url": "http://127.0.0.1:1"}]
    path = tmp_path / "gateway.yaml"
    path.write_text(json.dumps(plain)[:-1] + ",\n" + section.replace("SECRET", "sk-secret-7") + "}\n")
    with pytest.raises(ConfigError) as caught:
        load(path)
    message = str(caught.value)
    assert line in message
    assert "secret-7" not in message


def test_a_key_is_printed_with_its_hash(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from polyserve.cli import main

    with pytest.raises(SystemExit) as ended:
        main(["key"])
    assert ended.value.code == 0
    made, digest = (line.split()[1] for line in capsys.readouterr().out.splitlines())
    assert hashed(made) == digest
    assert len(made) >= 40
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{made}\n"))
    with pytest.raises(SystemExit):
        main(["key", "--stdin"])
    assert capsys.readouterr().out == f"sha256: {digest}\n"


def test_plans_do_not_show_their_secrets() -> None:
    plan = make_plan(["http://127.0.0.1:1"], tenants=TENANTS, admin={"keys": [hashed(ADMIN)]})
    engine = replace(plan.sole.engines[0], api_key="engine-secret-1")
    for shown in (repr(plan), repr(engine)):
        for secret in (hashed(KEY), hashed(ADMIN), "engine-secret-1"):
            assert secret not in shown
