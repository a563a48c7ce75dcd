"""The plan of a folder of shards, `prepare.json`: what all runs into it have in common.

It is written first, so that runs with other settings cannot mix their shards.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from etils import epath
from pydantic import RootModel

from flowdit.data.manifest import write_json
from flowdit.json_input import InputError, parse_file

PLAN_NAME = "prepare.json"
FORMER = "former_ids"
"""Its note with the identities of version 1 that the data had before a licence was corrected."""


class Plan(RootModel[dict[str, Any]]):
    """What two runs into one folder must have in common, by name."""


def claim_folder(
    field: str,
    folder: epath.Path,
    plan: Mapping[str, Any],
    manifest_name: str,
    *,
    notes: Mapping[str, Any] | None = None,
    explain: Callable[[str, Any], str | None] = lambda name, stored: None,
) -> dict[str, Any]:
    """Create or reuse `folder`, set by the configuration field `field`: all runs into it must have the same `plan`.

    `notes` are stored with it and may change; those that are None keep their stored value. Returns plan and notes as
    they are stored. A plan that differs is replaced if no shard was begun yet.

    Raises `ValueError` with the difference, in the words of `explain` (name, stored value) if it returns any, or if
    there are shards without a plan.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stored = read_plan(field, folder)
    has_shards = (folder / manifest_name).exists() or any(".array_record" in path.name for path in folder.iterdir())
    if stored is None and has_shards:
        raise ValueError(f"{field}: {folder} holds shards without {PLAN_NAME}: give another folder")
    different = [] if stored is None else _different(plan, stored)
    if stored is not None and different and has_shards:
        name = different[0]
        reason = f"was started with {name}={stored.get(name)!r}, this run has {plan[name]!r}"
        raise ValueError(f"{field}: {folder} {explain(name, stored.get(name)) or reason}: give another folder")
    kept = {} if stored is None or different else stored
    wanted = kept | dict(plan) | {name: value for name, value in (notes or {}).items() if value is not None}
    if wanted != stored:
        write_json(folder / PLAN_NAME, wanted)
    return wanted


def check_claim(field: str, folder: epath.Path, plan: Mapping[str, Any]) -> None:
    """Raise `ValueError` with the difference if a run with another plan claimed `folder` before the first shard."""
    stored = read_plan(field, folder) or {}
    for name in _different(plan, stored):
        reason = f"was claimed by another run with {name}={stored.get(name)!r}, this run has {plan[name]!r}"
        raise ValueError(f"{field}: {folder} {reason}: give another folder")


def _different(plan: Mapping[str, Any], stored: Mapping[str, Any]) -> list[str]:
    return [name for name in plan if stored.get(name) != plan[name]]


def read_plan(field: str, folder: epath.Path) -> dict[str, Any] | None:
    """The plan of `folder` with its notes; None if it has none. Raises `ValueError` if it is damaged."""
    path = folder / PLAN_NAME
    if not path.exists():
        return None
    try:
        return parse_file(Plan, path).root
    except InputError:
        raise ValueError(f"{field}: {path} is damaged: remove the folder or give another one") from None


def claimed_id(field: str, folder: epath.Path, ids: Sequence[str], former: Sequence[Any]) -> Any:
    """The identity of a data set in the plan of a cache for it: the one that is stored there if it is among `ids`, of
    which the first is the present one, or `former`.
    """
    stored = (read_plan(field, folder) or {}).get("data")
    return stored if stored in (*ids, *former) else ids[0]


def former_ids(folder: epath.PathLike) -> list[Any]:
    """The identities of version 1 that the data in `folder` had before a correction; none if there is no plan."""
    try:
        stored = parse_file(Plan, epath.Path(folder) / PLAN_NAME).root.get(FORMER)
    except InputError:
        return []
    return stored if isinstance(stored, list) else []


def keep_former_id(folder: epath.Path, former: str) -> None:
    """Store an identity of version 1 before it changes, as text caches may hold it."""
    plan = read_plan("out", folder) or {}
    others = [known for known in former_ids(folder) if known != former]
    write_json(folder / PLAN_NAME, plan | {FORMER: [*others, former]})
