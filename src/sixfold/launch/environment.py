"""Where is this process: is it already a rank, or one node of several, and which?

Read by the command line before it launches anything, and by `initialize` inside every rank. It only
reads the mapping it is given: it starts nothing, opens no connection and imports no tensor library.

The sources, in the order they are asked: torch elastic (torchrun, and this library's own launcher),
Slurm inside `srun`, and Kubernetes operators that set RANK and WORLD_SIZE without LOCAL_RANK.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass

from sixfold.base.errors import ConfigError

_RENDEZVOUS = ("MASTER_ADDR", "MASTER_PORT")
_FIRST_PORT, _NUM_PORTS = 10_000, 20_000  # below the range from which systems hand out free ports


@dataclass(frozen=True)
class Placement:
    """Which rank a process is, and where all ranks meet.

    Args:
        rank: number of this process among all, from 0.
        world_size: number of processes over all nodes.
        local_rank: number of this process on its node, from 0.
        local_world_size: number of processes on this node.
        master_addr: host on which rank 0 listens.
        master_port: port on which it listens.
        source: "elastic", "slurm" or "kubernetes".
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_addr: str
    master_port: int
    source: str


@dataclass(frozen=True)
class NodePlacement:
    """Which node of several this is: the ranks on it are still to be started.

    Args:
        node_rank: number of this node, from 0.
        num_nodes: number of nodes.
        ranks_per_node: how many ranks to start here; None leaves it to the launcher.
        master_addr: host of node 0.
        master_port: port on which node 0 listens.
    """

    node_rank: int
    num_nodes: int
    ranks_per_node: int | None
    master_addr: str
    master_port: int


def discover(environ: Mapping[str, str]) -> Placement | None:
    """The place of this process, or None when it is not a rank and should launch normally.

    A process that Slurm or Kubernetes started alone (a world of one) is not a rank: it launches as on
    a plain machine.

    Raises:
        ConfigError: variables are half set, contradict each other, or hold no usable number.
    """
    if "LOCAL_RANK" in environ:
        return _from_elastic(environ)
    if _in_slurm_step(environ):
        return _from_slurm(environ)
    if "RANK" in environ or "WORLD_SIZE" in environ:
        return _from_kubernetes(environ)
    return None


def nodes(environ: Mapping[str, str]) -> NodePlacement | None:
    """Which node this is, where an operator asks every pod to start an agent of its own (PET_NNODES...).

    Ask `discover` first: ranks started by such an agent inherit these variables.

    Raises:
        ConfigError: variables are half set, contradict each other, or hold no usable number.
    """
    if "PET_NNODES" not in environ:
        return None
    _demand(environ, ("PET_NNODES", "PET_NODE_RANK", "PET_MASTER_ADDR", "PET_MASTER_PORT"))
    per_node = environ.get("PET_NPROC_PER_NODE", "auto")
    place = NodePlacement(
        node_rank=_number(environ, "PET_NODE_RANK"),
        num_nodes=_number(environ, "PET_NNODES", least=1),
        ranks_per_node=None
        if per_node in ("auto", "gpu", "cpu")
        else _number(environ, "PET_NPROC_PER_NODE", least=1),
        master_addr=environ["PET_MASTER_ADDR"],
        master_port=_port(environ, "PET_MASTER_PORT"),
    )
    _below(place.node_rank, "PET_NODE_RANK", place.num_nodes, "PET_NNODES")
    return place


def host_names(node_list: str) -> list[str]:
    """`node[01-03,7],gpu` -> `["node01", "node02", "node03", "node7", "gpu"]`, in the order written.

    Raises:
        ConfigError: the brackets do not match, or a range does not count upwards.
    """
    hosts: list[str] = []
    for item in re.findall(r"(?:[^,\[\]]|\[[^\[\]]*\])+", node_list):
        parts = re.split(r"\[([^\[\]]*)\]", item)  # text, range, text, range, ..., text
        choices = [_range(part) if index % 2 else [part] for index, part in enumerate(parts)]
        hosts += ["".join(pieces) for pieces in itertools.product(*choices)]
    if not hosts or node_list.count("[") != node_list.count("]"):
        raise ConfigError(
            f"the node list {node_list!r} names no host",
            rule="a node list reads like node[01-03,7],gpu5",
            fix="start with srun, which sets SLURM_STEP_NODELIST, or set MASTER_ADDR to the first host",
        )
    return hosts


def _from_elastic(environ: Mapping[str, str]) -> Placement:
    _demand(environ, ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", *_RENDEZVOUS))
    return _checked(
        Placement(
            rank=_number(environ, "RANK"),
            world_size=_number(environ, "WORLD_SIZE", least=1),
            local_rank=_number(environ, "LOCAL_RANK"),
            local_world_size=_number(environ, "LOCAL_WORLD_SIZE", least=1),
            master_addr=environ["MASTER_ADDR"],
            master_port=_port(environ, "MASTER_PORT"),
            source="elastic",
        ),
        ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    )


def _from_kubernetes(environ: Mapping[str, str]) -> Placement | None:
    _demand(environ, ("RANK", "WORLD_SIZE", *_RENDEZVOUS))
    place = _checked(
        Placement(
            rank=_number(environ, "RANK"),
            world_size=_number(environ, "WORLD_SIZE", least=1),
            local_rank=0,
            local_world_size=1,
            master_addr=environ["MASTER_ADDR"],
            master_port=_port(environ, "MASTER_PORT"),
            source="kubernetes",
        ),
        ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    )
    return None if place.world_size == 1 else place


def _in_slurm_step(environ: Mapping[str, str]) -> bool:
    # A batch script sees SLURM_PROCID too; only `srun` counts the tasks of a step.
    return "SLURM_PROCID" in environ and "SLURM_STEP_ID" in environ and _slurm_tasks(environ) is not None


def _slurm_tasks(environ: Mapping[str, str]) -> str | None:
    return next((name for name in ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS") if name in environ), None)


def _from_slurm(environ: Mapping[str, str]) -> Placement | None:
    tasks = _slurm_tasks(environ)
    assert tasks is not None, "asked only inside a step"
    world_size = _number(environ, tasks, least=1)
    if world_size == 1:
        return None
    _demand(environ, ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_ID", "SLURM_JOB_ID"))
    for own, theirs in (("RANK", "SLURM_PROCID"), ("WORLD_SIZE", tasks)):
        if own in environ and _number(environ, own) != _number(environ, theirs):
            raise ConfigError(
                f"{own}={environ[own]} contradicts {theirs}={environ[theirs]}",
                rule="inside srun both describe the same process",
                fix=f"unset {own}: Slurm's own variables are enough",
            )
    return _checked(
        Placement(
            rank=_number(environ, "SLURM_PROCID"),
            world_size=world_size,
            local_rank=_number(environ, "SLURM_LOCALID"),
            local_world_size=_slurm_local_tasks(environ, world_size),
            master_addr=environ.get("MASTER_ADDR") or _slurm_first_host(environ),
            master_port=_port(environ, "MASTER_PORT") if "MASTER_PORT" in environ else _slurm_port(environ),
            source="slurm",
        ),
        ("SLURM_PROCID", tasks, "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
    )


def _slurm_first_host(environ: Mapping[str, str]) -> str:
    for name in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST"):
        if environ.get(name):
            return host_names(environ[name])[0]
    raise _half_set(["SLURM_PROCID", "SLURM_STEP_ID"], ["SLURM_STEP_NODELIST"])


def _slurm_port(environ: Mapping[str, str]) -> int:
    # Every rank must derive the same port without asking; steps of one job may run side by side.
    job, step = _number(environ, "SLURM_JOB_ID"), _number(environ, "SLURM_STEP_ID")
    return _FIRST_PORT + (job * 31 + step) % _NUM_PORTS


def _slurm_local_tasks(environ: Mapping[str, str], world_size: int) -> int:
    """The entry of this node in a list like `4(x2),1`."""
    name = next((n for n in ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE") if environ.get(n)), None)
    if name is None:
        if environ.get("SLURM_STEP_NUM_NODES", environ.get("SLURM_NNODES")) == "1":
            return world_size
        raise _half_set(["SLURM_PROCID", "SLURM_STEP_ID"], ["SLURM_STEP_TASKS_PER_NODE"])
    counts: list[int] = []
    for item in environ[name].split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", item.strip())
        if match is None:
            raise _unusable(environ, name, "a list like 4(x2),1")
        counts += [int(match[1])] * int(match[2] or 1)
    node = _number(environ, "SLURM_NODEID") if len(counts) > 1 else 0
    _below(node, "SLURM_NODEID", len(counts), name)
    return counts[node]


def _range(text: str) -> list[str]:
    """`01-03,7` -> `["01", "02", "03", "7"]`; leading zeros keep their width."""
    numbers: list[str] = []
    for item in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", item.strip())
        if match is None or (match[2] and int(match[2]) < int(match[1])):
            raise ConfigError(
                f"the node range [{text}] cannot be read at {item!r}",
                rule="a range is a number or two rising numbers with a dash, as in [01-03,7]",
                fix="set MASTER_ADDR to the first host by hand",
            )
        numbers += [f"{n:0{len(match[1])}d}" for n in range(int(match[1]), int(match[2] or match[1]) + 1)]
    return numbers


def _demand(environ: Mapping[str, str], names: tuple[str, ...]) -> None:
    missing = [name for name in names if not environ.get(name)]
    if missing:
        raise _half_set([name for name in names if environ.get(name)], missing)


def _half_set(present: list[str], missing: list[str]) -> ConfigError:
    return ConfigError(
        f"{', '.join(present)} set, but not {', '.join(missing)}",
        rule="a process is a rank only when all of these are set",
        fix=f"set {', '.join(missing)} too, or unset {', '.join(present)} to launch on this machine",
    )


def _number(environ: Mapping[str, str], name: str, least: int = 0) -> int:
    text = environ.get(name, "")
    if not re.fullmatch(r"\s*\d+\s*", text) or int(text) < least:
        raise _unusable(environ, name, f"a whole number, at least {least}")
    return int(text)


def _port(environ: Mapping[str, str], name: str) -> int:
    port = _number(environ, name, least=1)
    if port > 65_535:
        raise _unusable(environ, name, "a port, 1 to 65535")
    return port


def _unusable(environ: Mapping[str, str], name: str, rule: str) -> ConfigError:
    return ConfigError(
        f"{name}={environ.get(name, '')!r}",
        rule=f"{name} is {rule}",
        fix=f"correct {name} where this process is started, or unset it",
    )


def _checked(place: Placement, names: tuple[str, str, str, str]) -> Placement:
    rank, world, local_rank, local_world = names
    _below(place.rank, rank, place.world_size, world)
    _below(place.local_rank, local_rank, place.local_world_size, local_world)
    _below(place.local_world_size - 1, f"{local_world} - 1", place.world_size, world)
    return place


def _below(value: int, name: str, limit: int, limit_name: str) -> None:
    if value >= limit:
        raise ConfigError(
            f"{name}={value} with {limit_name}={limit}",
            rule=f"{name} counts from 0 and stays below {limit_name}",
            fix=f"correct {name} or {limit_name} where this process is started",
        )
