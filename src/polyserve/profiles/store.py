"""Profile files: JSON as `Profile.to_dict` gives it. The shipped ones lie in `shipped/`, origin inside."""

from __future__ import annotations

import hashlib
import json
from importlib import resources
from pathlib import Path

from polyserve.core.profile import Profile, ProfileError

__all__ = ["ProfileError", "digest", "load", "save", "shipped_names"]

SHIPPED = resources.files("polyserve.profiles") / "shipped"


def shipped_names() -> list[str]:
    """Names of the profiles that come with the product, sorted."""
    return sorted(f.name.removesuffix(".json") for f in SHIPPED.iterdir() if f.name.endswith(".json"))


def load(name_or_path: str | Path) -> Profile:
    """The shipped profile of that name, or the one in a .json file; raises `ProfileError` in one line."""
    name = str(name_or_path)
    if name in shipped_names():
        return _parsed((SHIPPED / f"{name}.json").read_text(encoding="utf-8"), f"profile {name}")
    path = Path(name)
    if not name.endswith(".json") and not path.is_file():
        raise ProfileError(
            f"unknown profile {name!r}; there are: {', '.join(shipped_names())}, or the path of a .json file"
        )
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ProfileError(f"{name}: no such profile file; shipped are: {', '.join(shipped_names())}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ProfileError(f"{name}: cannot be read as a profile: {error}") from None
    return _parsed(text, name)


def _parsed(text: str, source: str) -> Profile:
    try:
        plain = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ProfileError(f"{source}: not JSON: {error}") from None
    if not isinstance(plain, dict):
        raise ProfileError(f"{source}: a profile is a JSON object")
    return Profile.from_dict(plain, source)


def save(profile: Profile, path: str | Path) -> None:
    """Write a profile file that `load` reads back equal; the same profile always gives the same bytes."""
    text = json.dumps(profile.to_dict(), indent=2, ensure_ascii=False, allow_nan=False)
    try:
        Path(path).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise ProfileError(f"{path}: cannot be written: {error}") from None


def digest(profile: Profile) -> str:
    """Twelve hex digits that two profiles share when they are equal, notes included."""
    canonical = json.dumps(profile.to_dict(), sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]
