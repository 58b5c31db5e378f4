"""What a study found, as one JSON value with a stable schema (`docs/method.md` describes it)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import fmean, stdev
from typing import Any

from polyserve.study.day import Bought, DayTrack, outcome
from polyserve.study.ground import Case
from polyserve.study.run import Job
from polyserve.study.store import code
from polyserve.study.study import RESOLUTION, Study
from polyserve.study.track import OVERLOAD, SHOWN_AT, TUNED_AT, Found, Track

SCHEMA = 1
Json = dict[str, Any]
# Student's t, two-sided 95 %, by degrees of freedom.
T95 = (math.inf, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
# What stands in a run's result and says nothing beyond the job, or only how fast this machine is.
LEFT_OUT = ("policy", "profile", "trace", "instances", "settings", "seed", "notes", "decision_us", "steps", "showcase")


AnyTrack = Track | DayTrack
AnyFound = Found | Bought


def result(study: Study, found: Sequence[AnyFound], command: str) -> Json:
    """Everything that tables and reports show."""
    pairs = list(zip(study.tracks, found, strict=True))
    cases = [_case(case, [(t, f) for t, f in pairs if t.case == case]) for case in study.cases]
    made_by = {record["code"] for f in found for record in _records(f)}
    notes = [f"not there yet, so not compared: {', '.join(study.missing)}"] if study.missing else []
    if study.left_out:
        notes.append(f"only without --quick: {', '.join(study.left_out)}")
    if made_by - {code()}:
        notes.append("some runs were made by other code than this; --fresh makes them again")
    return {
        "schema": SCHEMA,
        "setting": study.setting.name,
        "asks": study.setting.asks,
        "mode": "quick" if study.quick else "full",
        "seeds": list(study.tracks[0].effort.seeds) if study.tracks else [],
        "resolution": RESOLUTION["quick" if study.quick else "full"],
        "tuned_at": TUNED_AT,
        "overload_at": OVERLOAD,
        "command": command,
        "code": sorted(made_by),
        "simulated_requests": sum(r["result"]["simulated_requests"] for f in found for r in _records(f)),
        "simulated_s": round(sum(r["result"]["wall_s"] for f in found for r in _records(f)), 1),
        "notes": notes,
        "cases": cases,
        "summary": _summary(cases, study.setting.measures),
    }


def _records(found: AnyFound) -> list[Json]:
    """Each of its runs once."""
    if isinstance(found, Bought):
        runs = list(found.runs.values())
    else:
        runs = [record for by_load in found.runs.values() for record in by_load.values()]
        runs += [found.shown] if found.shown else []
    return list({record["key"]: record for record in (*runs, *found.tuned.tried.values())}.values())


# ---------------------------------------------------------------------------------------------------------------- case


def _case(case: Case, pairs: list[tuple[AnyTrack, AnyFound]]) -> Json:
    entries = [_entry(track, found) for track, found in pairs]
    _compare(entries)
    return {
        "case": case.name,
        "fleet": {
            "name": case.fleet.name,
            "instances": case.fleet.instances,
            "groups": [{**asdict(group), "role": group.role.value} for group in case.fleet.groups],
        },
        "workload": case.workload,
        "paces": [list(pair) for pair in case.paces],
        "later_paces": [list(pair) for pair in case.world.later],
        "ttfts": list(case.ttfts),
        "jitter": case.world.jitter,
        "bias": case.world.bias,
        "day": case.world.day or None,
        "start_up_s": case.world.start_up_s,
        "infeasible_share": case.infeasible_share,
        "bounds": case.bounds,
        "residency_p99_s": case.residency_p99_s,
        "window_s": case.window_s,
        "warm_up_s": case.warm_up_s,
        "entries": entries,
        "showcase": [_showcase(track, found) for track, found in pairs if isinstance(found, Found) and found.shown],
    }


def _entry(track: AnyTrack, found: AnyFound) -> Json:
    shown = _by_day(track, found) if isinstance(found, Bought) else _by_load(track, found)
    return {
        "label": track.entry.label,
        "policy": track.entry.policy,
        "role": track.entry.role,
        "values": dict(found.tuned.choice.values),
        "chunk": found.tuned.choice.chunk,
        "tuning": [
            {
                "chunk": choice.chunk,
                "values": dict(choice.values),
                "load": TUNED_AT,
                "attainment": record["result"]["attainment"],
            }
            for choice, record in found.tuned.tried.items()
        ],
        **shown,
    }


def _by_load(track: AnyTrack, found: Found) -> Json:
    optimal = track.case.optimal_rate
    overload = {seed: runs[OVERLOAD] for seed, runs in found.runs.items() if OVERLOAD in runs}
    jobs = found.jobs
    return {
        "goodput": {name: _goodput(by_seed, optimal) for name, by_seed in found.crossings.items()},
        "attained_at_150": _attained(overload, optimal) if overload else None,
        "sweep": _sweep(found.runs.get(track.effort.seeds[0], {}), optimal) if track.effort.loads else None,
        "day": None,
        "runs": [
            _run(record, jobs[seed, load])
            for seed, by_load in sorted(found.runs.items())
            for load, record in sorted(by_load.items())
        ],
    }


def _by_day(track: AnyTrack, found: Bought) -> Json:
    counted = outcome(found)
    day = None
    if counted is not None:
        index, record = counted
        left = record["result"]
        value = found.knob.values[index]
        day = {
            "scaler": track.entry.scaler,
            "holds": found.cheapest is not None,
            "knob": found.knob.name if value is not None else None,
            "value": value,
            "instance_seconds": left["instance_seconds"],
            "mean_instances": left["instance_seconds"] / track.case.window_s,
            "cost_per_attained_s": left["cost_per_attained_s"],
            "overall": left["attainment"]["overall"],
            "worst_tier": left["attainment"]["worst_tier"],
        }
    runs = [
        {**_run(record, found.jobs[index]), "value": found.knob.values[index]}
        for index, record in sorted(found.runs.items())
    ]
    return {"goodput": {}, "attained_at_150": None, "sweep": None, "day": day, "runs": runs}


def _goodput(by_seed: Mapping[int, Any], optimal: float) -> Json:
    loads = {seed: found.load for seed, found in by_seed.items()}
    return {
        "load": fmean(loads.values()),
        "rate": fmean(loads.values()) * optimal,
        "interval": interval(list(loads.values())),
        "by_seed": {str(seed): load for seed, load in loads.items()},
        "bracket": {str(seed): [found.holds, found.fails] for seed, found in by_seed.items()},
        "at_least": any(found.at_least for found in by_seed.values()),
    }


def _attained(overload: Mapping[int, Json], optimal: float) -> Json:
    results = {seed: record["result"] for seed, record in overload.items()}
    shares = {seed: left["attained_rate"] / optimal for seed, left in results.items()}
    return {
        "load": fmean(shares.values()),
        "rate": fmean(shares.values()) * optimal,
        "interval": interval(list(shares.values())),
        "by_seed": {str(seed): share for seed, share in shares.items()},
        "overall": fmean(left["attainment"]["overall"] for left in results.values()),
        "tiers": {
            tier: fmean(left["attainment"]["tiers"][tier] or 0.0 for left in results.values())
            for tier in next(iter(results.values()))["attainment"]["tiers"]
        },
    }


def _sweep(by_load: Mapping[float, Json], optimal: float) -> Json:
    """How the attained rate holds up beyond its peak, and how even the tiers are at 150 % load."""
    shares = {load: record["result"]["attained_rate"] / optimal for load, record in sorted(by_load.items())}
    peak = max(shares, key=lambda load: shares[load])
    over = by_load.get(OVERLOAD)
    attainment = over["result"]["attainment"] if over else None
    return {
        "attained": [[load, share] for load, share in shares.items()],
        "peak_load": peak,
        "peak": shares[peak],
        "at_150_over_peak": shares[OVERLOAD] / shares[peak] if over and shares[peak] else None,
        "widest_tier_gap_at_150": max(abs((a or 0.0) - attainment["overall"]) for a in attainment["tiers"].values())
        if attainment
        else None,
    }


def _run(record: Json, job: Job) -> Json:
    left = record["result"]
    return {
        "load": job.load,
        "seed": job.seed,
        "rate": job.rate,
        "command": job.command,
        "code": record["code"],
        **{name: value for name, value in left.items() if name not in LEFT_OUT},
    }


def _showcase(track: AnyTrack, found: Found) -> Json:
    assert found.shown is not None
    assert found.shown_job is not None
    left = found.shown["result"]
    return {
        "label": track.entry.label,
        "load": SHOWN_AT,
        "seed": found.shown["seed"],
        "command": found.shown_job.command,
        "attainment": left["attainment"],
        **left["showcase"],
    }


# ----------------------------------------------------------------------------------------------------------- compared


def _compare(entries: Sequence[Json]) -> None:
    """Note beside every figure how it compares with those of others."""
    for entry in entries:
        for measure, held in entry["goodput"].items():
            held["over"] = _over(entry, entries, measure)
        if entry["attained_at_150"]:
            entry["attained_at_150"]["over"] = _over(entry, entries, None)
        if entry["day"]:
            entry["day"]["over"] = _cheaper(entry, entries)


def _cheaper(entry: Json, entries: Sequence[Json]) -> Json:
    """Instance-seconds per attained request over those of the cheapest others that hold; below 1 is cheaper."""
    groups = {
        "best_static": [e for e in entries if e["day"] and e["day"]["scaler"] == "static"],
        "best_queue_baseline": [
            e for e in entries if e["day"] and e["day"]["scaler"] == "queue" and e["role"] == "baseline"
        ],
    }
    ratios = {}
    for name, members in groups.items():
        able = [e for e in members if e is not entry and e["day"]["holds"]]
        if able and entry["day"]["holds"]:
            best = min(able, key=lambda e: e["day"]["cost_per_attained_s"])
            ratio = entry["day"]["cost_per_attained_s"] / best["day"]["cost_per_attained_s"]
            ratios[name] = {"label": best["label"], "ratio": ratio, "interval": None}
    return ratios


def _over(entry: Json, entries: Sequence[Json], measure: str | None) -> Json:
    """This entry over the best baseline that is not told the mix, the best that is, and others of note."""
    groups = {
        "best_baseline": [e for e in entries if e["role"] == "baseline"],
        "hindsight": [e for e in entries if e["role"] == "hindsight"],
        "best_untuned": [e for e in entries if e["role"] == "untuned"],
        "polyserve": [e for e in entries if e["label"] == "polyserve"],
    }
    ratios = {}
    for name, members in groups.items():
        able = [(e, g) for e in members if e is not entry and (g := _loads(e, measure)) is not None]
        own = _loads(entry, measure)
        if able and own is not None:
            best, loads = max(able, key=lambda pair: fmean(pair[1].values()))
            ratios[name] = _ratio(best["label"], own, loads)
    return ratios


def _loads(entry: Json, measure: str | None) -> dict[str, float] | None:
    held = entry["attained_at_150"] if measure is None else entry["goodput"].get(measure)
    return held["by_seed"] if held else None


def _ratio(label: str, own: Mapping[str, float], other: Mapping[str, float]) -> Json:
    """The mean of the ratios seed by seed: both met the same requests."""
    ratios = [own[seed] / other[seed] for seed in own if other.get(seed)]
    return {"label": label, "ratio": fmean(ratios) if ratios else None, "interval": interval(ratios)}


def interval(values: Sequence[float]) -> list[float] | None:
    """The 95 % confidence interval of the mean, by Student's t; None for fewer than two values."""
    if len(values) < 2:
        return None
    half = T95[min(len(values), len(T95)) - 1] * stdev(values) / math.sqrt(len(values))
    return [fmean(values) - half, fmean(values) + half]


def _summary(cases: Sequence[Json], measures: Sequence[str]) -> list[Json]:
    """Means over all cases, for entries that are in every one of them."""
    rows = []
    labels = list(dict.fromkeys(entry["label"] for case in cases for entry in case["entries"]))
    for label in labels:
        own = [entry for case in cases for entry in case["entries"] if entry["label"] == label]
        row: Json = {"label": label, "role": own[0]["role"], "cases": len(own)}
        for measure in measures:
            held = [entry["goodput"][measure] for entry in own if measure in entry["goodput"]]
            if held:
                row[measure] = {"share": fmean(h["load"] for h in held), "over": _mean_over(held)}
        overload = [entry["attained_at_150"] for entry in own if entry["attained_at_150"]]
        if overload:
            row["attained_at_150"] = {"share": fmean(h["load"] for h in overload), "over": _mean_over(overload)}
        rows.append(row)
    return rows


def _mean_over(held: Sequence[Json]) -> Json:
    names = dict.fromkeys(name for h in held for name in h["over"])
    means = {}
    for name in names:
        ratios = [h["over"][name]["ratio"] for h in held if name in h["over"] and h["over"][name]["ratio"] is not None]
        means[name] = fmean(ratios) if ratios else None
    return means
