"""The gateway's one YAML file: read, checked, and made into a plan.

Nothing is skipped in silence: an unknown key, a wrong type or two tiers alike are refused, one line each, naming the
file, the path of the key and what would do.
"""

from __future__ import annotations

import gc
import re
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import uvloop
import yaml
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator, model_validator

from polyserve import config_access as access
from polyserve.config_access import AdminConfig, TenantConfig
from polyserve.core.profile import Profile, ProfileError
from polyserve.core.settings import SettingError, Settings, policy
from polyserve.core.types import ChunkRule, Configured, Tenant, Tier, to_microsecond
from polyserve.profiles import store
from polyserve.serve import logs, observe
from polyserve.serve.adapters import chunk_rule
from polyserve.serve.house import House, serve
from polyserve.serve.listener import GatewayError
from polyserve.serve.pace import BEST_EFFORT, SERVICE_TIERS
from polyserve.serve.plan import (
    Address,
    Bounds,
    EngineKind,
    EngineSpec,
    LocalPlan,
    LogPlan,
    ModelPlan,
    Order,
    Plan,
    PlanError,
)
from polyserve.serve.reload import Source
from polyserve.serve.tokens import TokenizerError, tokenizer

Milliseconds = Annotated[float, Field(gt=0, le=86_400_000, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, strict=True)]
Positive = Annotated[int, Field(ge=1, strict=True)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]

# Objects made and not let go, before the collector looks at the young ones, and looks before it goes further back.
# Hundreds of requests in flight are no garbage: Python's 700 took an eighth of the processor time of a request.
COLLECT_AFTER = (50_000, 20, 50)

# Instances up to which the margins of everybody asked are kept by default, for `/admin/decisions`.
MOST_EXPLAINED = 64
# Names that the brain gives to instances it starts.
_STARTED = re.compile(r"i\d+")


class ConfigError(PlanError):
    """A config that cannot be used; one line for each thing that is wrong."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Listen(_Section):
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535, strict=True)] = 8000


class TierConfig(_Section):
    name: Name
    tpot_ms: Milliseconds
    ttft_ms: Milliseconds
    min_instances: Count = 0
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    on_late: Literal["refuse", "serve_late", "never"] | None = None


class InstanceConfig(_Section):
    id: Name
    url: Annotated[str, Field(pattern=r"^https?://[^\s/]+\S*$")]
    api_key: SecretStr | None = None
    api_key_env: str | None = None
    profile: str | None = None
    kind: EngineKind = "auto"
    chunk: ChunkRule | None = None
    order: Order | None = None
    kv_tokens: Positive | None = None
    max_num_seqs: Positive | None = None
    max_num_batched_tokens: Positive | None = None
    send_priority: bool = False

    _without_secrets = field_validator("url")(access.without_secrets)

    @field_validator("chunk", mode="before")
    @classmethod
    def _read_chunk(cls, value: Any) -> Any:
        return chunk_rule(value) if isinstance(value, str) else value


class LauncherConfig(_Section):
    kind: Literal["static", "local"]
    profile: str | None = None
    min: Count = 0
    max: Positive = 1
    command: list[str] = [
        sys.executable, "-m", "polyserve", "engine", "--profile", "{profile}", "--port", "{port}",
        "--model-name", "{model}",
    ]  # fmt: skip
    environment: dict[str, str] = {}
    api_key: SecretStr | None = None
    api_key_env: str | None = None
    start_up_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 3.0
    start_timeout_s: Seconds = 120.0
    stop_timeout_s: Seconds = 10.0

    @model_validator(mode="after")
    def _ordered(self) -> LauncherConfig:
        if self.min > self.max:
            raise ValueError(f"min {self.min} is more than max {self.max}")
        return self


class LimitsConfig(_Section):
    body_mib: Annotated[float, Field(gt=0, le=1024)] = 16.0
    open_requests: Positive = 20_000
    attempts: Positive = 3
    connections: Positive = 20_000
    head_kib: Annotated[float, Field(ge=1, le=1024)] = 64.0
    head_s: Seconds = 10.0
    upload_s: Seconds = 60.0
    stall_s: Seconds = 30.0
    silence_s: Seconds = 300.0
    connect_s: Seconds = 5.0
    shutdown_s: Seconds = 60.0
    retire_s: Seconds = 3600.0
    probe_s: Seconds = 1.0


class LogConfig(_Section):
    format: Literal["text", "json"] = "text"
    level: Literal["debug", "info", "warning", "error"] = "info"
    requests: bool = False


class ModelKeys(_Section):
    """What is said of one model: at the top of a file for its only model, else under `models`."""

    aliases: list[Annotated[str, Field(min_length=1)]] = []
    policy: str = "polyserve"
    settings: dict[str, Any] = {}
    tiers: list[TierConfig] = []
    default_tier: str | None = None
    service_tiers: dict[str, str] = {}
    profile: str | None = None
    instances: list[InstanceConfig] = []
    launcher: LauncherConfig | None = None
    journal: Path | None = None
    tokenizer: Path | None = None
    seed: Count = 0

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for key, values in (("name", [t.name for t in self.tiers]), ("tpot_ms", [t.tpot_ms for t in self.tiers])):
            if (twice := _twice(values)) is not None:
                raise ValueError(f"tiers: two tiers have {key} {twice}; each needs its own")
        if (twice := _twice([instance.id for instance in self.instances])) is not None:
            raise ValueError(f"instances: two have the id {twice!r}; each needs its own")
        names = [BEST_EFFORT, *(tier.name for tier in self.tiers)]
        named = {f"service_tiers.{key}": name for key, name in self.service_tiers.items()}
        for key, name in (named | ({"default_tier": self.default_tier} if self.default_tier else {})).items():
            if name not in names:
                raise ValueError(f"{key}: no tier {name!r}; there are: {', '.join(names)}")
        if any(tier.name == BEST_EFFORT for tier in self.tiers):
            raise ValueError(f"tiers: {BEST_EFFORT!r} is the name for no tier at all; choose another")
        return self

    @field_validator("service_tiers")
    @classmethod
    def _known_to_openai(cls, value: dict[str, str]) -> dict[str, str]:
        for key in value:
            if key not in SERVICE_TIERS:
                raise ValueError(f"OpenAI's service tiers are {', '.join(SERVICE_TIERS)}, not {key!r}")
        return value


class ModelConfig(ModelKeys):
    name: Annotated[str, Field(min_length=1)]
    tiers: Annotated[list[TierConfig], Field(min_length=1)]


# What models have in common unless one says otherwise.
_SHARED = ("policy", "settings", "tiers", "default_tier", "service_tiers", "profile", "seed")
# What only one model can have.
_OWN = ("aliases", "instances", "launcher", "journal", "tokenizer")


class Config(ModelKeys):
    """The file as it is written; `plan` is what it means."""

    model: Annotated[str, Field(min_length=1)] | None = None
    models: list[ModelConfig] = []
    listen: Listen = Listen()
    relays: Annotated[int, Field(ge=0, le=64, strict=True)] = 0
    admin: AdminConfig | None = None
    tenants: list[TenantConfig] = []
    limits: LimitsConfig = LimitsConfig()
    log: LogConfig = LogConfig()
    watch: bool = False

    @model_validator(mode="before")
    @classmethod
    def _share(cls, plain: Any) -> Any:
        """Hand what the top says down to every model that does not say it itself."""
        if not isinstance(plain, dict) or not isinstance(models := plain.get("models"), list):
            return plain
        shared = {key: plain[key] for key in _SHARED if key in plain}
        return plain | {"models": [shared | one if isinstance(one, dict) else one for one in models]}

    @model_validator(mode="after")
    def _one_or_several(self) -> Self:
        if not self.models:
            if missing := [key for key in ("model", "tiers") if not getattr(self, key)]:
                raise ValueError(f"{missing[0]}: is missing")
            access.check_tenants(self.tenants, [tier.name for tier in self.tiers])
            return self
        for key in ("model", *_OWN):
            if key in self.model_fields_set:
                raise ValueError(f"{key}: with `models`, say it of one of them")
        names = [name for one in self.models for name in (one.name, *one.aliases)]
        if (twice := _twice(names)) is not None:
            raise ValueError(f"models: two are called {twice!r}; each needs a name of its own")
        if (twice := _twice([one.journal for one in self.models if one.journal])) is not None:
            raise ValueError(f"models: two write the journal {twice}; each needs its own")
        access.check_tenants(self.tenants, dict.fromkeys(tier.name for one in self.models for tier in one.tiers))
        return self

    def each(self) -> dict[str, ModelConfig]:
        """Every model by the path of its keys in the file."""
        if self.models:
            return {f"models.{n}.": one for n, one in enumerate(self.models)}
        assert self.model is not None, "it was checked"
        return {"": ModelConfig(name=self.model, **{key: getattr(self, key) for key in ModelKeys.model_fields})}


def load(path: str | Path, launch: bool = False) -> Plan:
    """The plan that a config file makes; raises `ConfigError`.

    Without `launch` the fleet is the instances of the file, and its launcher is left alone.
    """
    return plan(_read(Path(path)), str(path), launch)


def plan(config: Config, source: str, launch: bool = False) -> Plan:
    """What a gateway is to do; raises `ConfigError` naming `source`."""
    listen = Address(config.listen.host, config.listen.port)
    tenants = tuple(map(access.tenant_plan, config.tenants))
    known = tuple(tenant.tenant for tenant in tenants)
    models = tuple(_model(one, source, prefix, launch, known) for prefix, one in config.each().items())
    try:
        admin = access.admin_address(config.admin, listen)
    except ValueError as error:
        raise ConfigError(f"{source}: admin: {error}") from None
    return Plan(
        listen=listen,
        admin=admin,
        models=models,
        tenants=tenants,
        admin_keys=config.admin.keys if config.admin is not None else (),
        bounds=_bounds(config.limits),
        log=LogPlan(config.log.format, config.log.level, config.log.requests),
        watch=config.watch,
        relays=config.relays,
    )


def _model(config: ModelConfig, source: str, prefix: str, launch: bool, tenants: tuple[Tenant, ...]) -> ModelPlan:
    """What serves one model; `prefix` is the path of its keys in the file."""
    launcher = config.launcher if launch and config.launcher and config.launcher.kind == "local" else None
    if not config.instances and launcher is None:
        hint = "; `polyserve up` starts those of its launcher" if config.launcher else ""
        raise ConfigError(f"{source}: {prefix}instances: there are none, give at least one{hint}")
    if launcher is not None and (taken := [i.id for i in config.instances if _STARTED.fullmatch(i.id)]):
        raise ConfigError(
            f"{source}: {prefix}instances: the launcher gives names like {taken[0]!r} itself; choose another"
        )
    names = [(f"{prefix}instances.{n}.profile", i.profile) for n, i in enumerate(config.instances)]
    names += [(f"{prefix}launcher.profile", launcher.profile)] if launcher else []
    profiles = {key: _profile(source, key, name or config.profile) for key, name in names}
    return ModelPlan(
        name=config.name,
        configured=_configured(config, source, prefix, launcher, profiles, tenants),
        default_tier=config.default_tier or max(config.tiers, key=lambda tier: tier.tpot_ms).name,
        service_tiers=config.service_tiers,
        engines=tuple(
            _spec(instance, profiles[key].name, _key(f"{source}: {prefix}instances.{n}", instance))
            for n, (instance, (key, _)) in enumerate(zip(config.instances, names, strict=False))
        ),
        aliases=tuple(config.aliases),
        launcher=None if launcher is None else _local(launcher, config, _key(f"{source}: {prefix}launcher", launcher)),
        journal=config.journal,
        tokenizer=_tokenizer(config, source, prefix),
    )


def run_gateway(config_path: str | Path, launch: bool, incumbent: str | None = None) -> None:
    """Serve until a signal comes; raises `ConfigError` or `GatewayError`, each in one line.

    With `incumbent` that rule routes, and PolyServe only says what it would have done.
    """
    houses: list[House] = []

    def read() -> Plan:
        made = load(config_path, launch)
        return made if incumbent is None else observe.watching(made, incumbent)

    logs.set_up(LogPlan())
    made = read()
    logs.set_up(made.log)

    def say(house: House, port: int) -> None:
        # What is there now stays: no collection need walk it again, which would hold every stream up.
        gc.collect()
        gc.freeze()
        gc.set_threshold(*COLLECT_AFTER)
        houses.append(house)
        print(f"polyserve: {', '.join(house.gateways)} on http://{made.listen.host}:{port}/v1", flush=True)

    uvloop.run(serve(made, say, Source(Path(config_path), read)))
    for gateway in (gateway for house in houses for gateway in house.gateways.values()):
        if (shadow := observe.observed(gateway.brain)) is not None:
            print("\n".join(observe.summary(gateway.model, shadow, gateway.audit)), flush=True)


def _read(path: Path) -> Config:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    try:
        plain = yaml.load(text, _StrictLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {_in_one_line(error)}") from None
    except RecursionError:
        raise ConfigError(f"{path}: not YAML: nested too deep") from None
    except ValueError as error:  # of a number or a date that is none
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(plain, dict):
        raise ConfigError(f"{path}: a config is a mapping of keys; `model` (or `models`) and `tiers` are needed")
    try:
        return Config.model_validate(plain)
    except ValidationError as error:
        raise ConfigError("\n".join(dict.fromkeys(_told(path, problem) for problem in error.errors()))) from None


class _StrictLoader(yaml.SafeLoader):
    """YAML that refuses a key given twice, which would hide the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key is a word", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _in_one_line(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error)
    return f"line {mark.line + 1}: {problem}" if mark is not None else " ".join(problem.split())


def _told(path: Path, problem: Any) -> str:
    """One of pydantic's findings as our line."""
    where = [str(part) for part in problem["loc"]]
    if problem["type"] == "extra_forbidden":
        there = ", ".join(_section(where[:-1]).model_fields)
        return f"{path}: {'.'.join(where)}: unknown key; there are: {there}"
    if problem["type"] == "missing":
        return f"{path}: {'.'.join(where)}: is missing"
    if problem["type"] == "value_error":  # ours: it says what would do
        return ": ".join(
            [str(path), *([".".join(where)] if where else []), problem["msg"].removeprefix("Value error, ")]
        )
    message = problem["msg"]
    if access.may_be_secret(where):
        return f"{path}: {'.'.join(where)}: {message[0].lower()}{message[1:]}"
    return f"{path}: {'.'.join(where)}: {message[0].lower()}{message[1:]}, not {problem['input']!r}"


def _section(where: list[str]) -> type[BaseModel]:
    """The section of the config that a path leads to."""
    sections: dict[str, type[BaseModel]] = {
        "listen": Listen,
        "admin": AdminConfig,
        "tenants": access.Tightest if "tightest" in where else TenantConfig,
        "tiers": TierConfig,
        "instances": InstanceConfig,
        "launcher": LauncherConfig,
        "limits": LimitsConfig,
        "log": LogConfig,
    }
    if where[:1] == ["models"]:
        return sections.get(where[2], ModelConfig) if len(where) > 2 else ModelConfig
    return sections.get(where[0], Config) if where else Config


def _twice(values: list[Any]) -> Any:
    return next((value for n, value in enumerate(values) if value in values[:n]), None)


def _profile(source: str, key: str, name: str | None) -> Profile:
    if name is None:
        there = ", ".join(store.shipped_names())
        raise ConfigError(f"{source}: {key}: is missing, and so is `profile`; there are: {there}")
    try:
        return store.load(name)
    except ProfileError as error:
        raise ConfigError(f"{source}: {key}: {error}") from None


def _configured(
    config: ModelConfig,
    source: str,
    prefix: str,
    launcher: LauncherConfig | None,
    profiles: dict[str, Profile],
    tenants: tuple[Tenant, ...],
) -> Configured:
    """What the brain is told first."""
    values = {"explain": len(config.instances) <= MOST_EXPLAINED} | config.settings
    if launcher is not None:
        values = {
            "min_instances": len(config.instances) + launcher.min,
            "max_instances": len(config.instances) + launcher.max,
            "start_up_s": launcher.start_up_s,
        } | values
    try:
        settings: Settings = policy(config.policy, values)
    except SettingError as error:
        key = "policy" if "policy" in str(error) else "settings"
        raise ConfigError(f"{source}: {prefix}{key}: {error}") from None
    if settings.disaggregated:
        raise ConfigError(
            f"{source}: {prefix}settings: disaggregated: PD is simulated only (polyserve simulate --pd); leave it"
        )
    tiers = tuple(
        Tier(
            tier.name,
            to_microsecond(tier.tpot_ms / 1e3),
            to_microsecond(tier.ttft_ms / 1e3),
            tier.min_instances,
            tier.weight,
            tier.on_late,
        )
        for tier in config.tiers
    )
    used = {profile.name: profile.to_dict() for profile in profiles.values()}
    return Configured(0.0, settings.to_dict(), tiers, used, config.seed, tenants)


def _tokenizer(config: ModelConfig, source: str, prefix: str) -> Path | None:
    """The model's tokenizer, if it is one."""
    try:
        if config.tokenizer is not None:
            tokenizer(config.tokenizer)
    except TokenizerError as error:
        raise ConfigError(f"{source}: {prefix}tokenizer: {error}") from None
    return config.tokenizer


def _key(where: str, section: InstanceConfig | LauncherConfig) -> str | None:
    try:
        return access.engine_key(section.api_key, section.api_key_env)
    except ValueError as error:
        raise ConfigError(f"{where}.{error}") from None


def _spec(instance: InstanceConfig, profile: str, api_key: str | None) -> EngineSpec:
    return EngineSpec(
        id=instance.id,
        url=instance.url,
        profile=profile,
        kind=instance.kind,
        chunk=instance.chunk,
        order=instance.order,
        kv_tokens=instance.kv_tokens,
        max_num_seqs=instance.max_num_seqs,
        max_num_batched_tokens=instance.max_num_batched_tokens,
        send_priority=instance.send_priority,
        api_key=api_key,
    )


def _local(launcher: LauncherConfig, config: ModelConfig, api_key: str | None) -> LocalPlan:
    name = launcher.profile or config.profile
    assert name is not None, "the profile was loaded"
    return LocalPlan(
        profile=name,
        command=tuple(part.replace("{model}", config.name) for part in launcher.command),
        environment=launcher.environment,
        start_timeout_s=launcher.start_timeout_s,
        stop_timeout_s=launcher.stop_timeout_s,
        api_key=api_key,
    )


def _bounds(limits: LimitsConfig) -> Bounds:
    return Bounds(
        body_bytes=round(limits.body_mib * 1024 * 1024),
        open_requests=limits.open_requests,
        attempts=limits.attempts,
        connections=limits.connections,
        head_bytes=round(limits.head_kib * 1024),
        head_s=limits.head_s,
        upload_s=limits.upload_s,
        stall_s=limits.stall_s,
        silence_s=limits.silence_s,
        connect_s=limits.connect_s,
        shutdown_s=limits.shutdown_s,
        retire_s=limits.retire_s,
        probe_s=limits.probe_s,
    )


__all__ = ["Config", "ConfigError", "GatewayError", "load", "plan", "run_gateway"]
