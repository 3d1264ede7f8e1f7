"""Tables of environments: which of them make a rank, and which are refused by name."""

from __future__ import annotations

import subprocess
import sys

import pytest

from sixfold.base.errors import ConfigError
from sixfold.base.malloc import malloc_variables
from sixfold.launch import NodePlacement, Placement, discover, host_names, nodes

ELASTIC = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "n0",
    "MASTER_PORT": "29500",
}
KUBERNETES = {"RANK": "2", "WORLD_SIZE": "3", "MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456"}
SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_NTASKS": "6",
    "SLURM_STEP_NUM_TASKS": "6",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3)",
    "SLURM_STEP_NODELIST": "node[08-10]",
}
PET = {
    "PET_NNODES": "2",
    "PET_NODE_RANK": "1",
    "PET_MASTER_ADDR": "pod-0",
    "PET_MASTER_PORT": "29400",
    "PET_NPROC_PER_NODE": "8",
}


def without(environ: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in environ.items() if name not in names}


def test_elastic() -> None:
    assert discover(ELASTIC) == Placement(3, 4, 1, 2, "n0", 29500, "elastic")


def test_elastic_inside_a_slurm_step_wins() -> None:
    place = discover({**SLURM, **ELASTIC})
    assert place is not None
    assert (place.rank, place.source) == (3, "elastic")


def test_elastic_of_one_rank_is_a_rank() -> None:
    lone = {**ELASTIC, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    assert discover(lone) == Placement(0, 1, 0, 1, "n0", 29500, "elastic")


def test_kubernetes() -> None:
    assert discover(KUBERNETES) == Placement(2, 3, 0, 1, "job-master-0", 23456, "kubernetes")


def test_slurm() -> None:
    port = 10_000 + (4711 * 31) % 20_000
    assert discover(SLURM) == Placement(5, 6, 1, 2, "node08", port, "slurm")


def test_every_slurm_rank_derives_the_same_meeting_point() -> None:
    places = [discover({**SLURM, "SLURM_PROCID": str(rank)}) for rank in range(6)]
    assert len({(place.master_addr, place.master_port) for place in places if place}) == 1
    other_step = discover({**SLURM, "SLURM_STEP_ID": "1"})
    assert other_step is not None
    assert other_step.master_port != places[0].master_port  # type: ignore[union-attr]


def test_slurm_keeps_a_meeting_point_that_is_given() -> None:
    place = discover({**SLURM, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234", "WORLD_SIZE": "6"})
    assert place is not None
    assert (place.master_addr, place.master_port) == ("10.0.0.1", 1234)


def test_slurm_uneven_nodes() -> None:
    uneven = {**SLURM, "SLURM_STEP_TASKS_PER_NODE": "3,2,1", "SLURM_LOCALID": "0"}
    place = discover(uneven)
    assert place is not None
    assert place.local_world_size == 1


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"MASTER_ADDR": "n0", "MASTER_PORT": "1"},
        {**SLURM, "SLURM_STEP_NUM_TASKS": "1"},
        without(SLURM, "SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS"),  # a batch script
        {**KUBERNETES, "RANK": "0", "WORLD_SIZE": "1"},
        PET,
    ],
    ids=["plain", "only an address", "alone in a step", "batch script", "lone pod", "node agent"],
)
def test_no_rank(environ: dict[str, str]) -> None:
    assert discover(environ) is None


@pytest.mark.parametrize(
    ("environ", "named"),
    [
        (without(ELASTIC, "WORLD_SIZE"), "WORLD_SIZE"),
        (without(ELASTIC, "MASTER_PORT"), "MASTER_PORT"),
        (without(ELASTIC, "LOCAL_WORLD_SIZE"), "LOCAL_WORLD_SIZE"),
        ({**ELASTIC, "RANK": "4"}, "RANK=4"),
        ({**ELASTIC, "LOCAL_RANK": "2"}, "LOCAL_RANK=2"),
        ({**ELASTIC, "LOCAL_WORLD_SIZE": "5"}, "LOCAL_WORLD_SIZE"),
        ({**ELASTIC, "RANK": "one"}, "RANK='one'"),
        ({**ELASTIC, "WORLD_SIZE": "0"}, "WORLD_SIZE='0'"),
        ({**ELASTIC, "MASTER_PORT": "70000"}, "MASTER_PORT='70000'"),
        ({"RANK": "0"}, "WORLD_SIZE"),
        ({"WORLD_SIZE": "2"}, "RANK"),
        (without(KUBERNETES, "MASTER_ADDR"), "MASTER_ADDR"),
        ({**SLURM, "RANK": "0"}, "RANK=0 contradicts SLURM_PROCID=5"),
        ({**SLURM, "WORLD_SIZE": "8"}, "WORLD_SIZE=8 contradicts"),
        (without(SLURM, "SLURM_LOCALID"), "SLURM_LOCALID"),
        (without(SLURM, "SLURM_STEP_NODELIST"), "SLURM_STEP_NODELIST"),
        (without(SLURM, "SLURM_STEP_TASKS_PER_NODE"), "SLURM_STEP_TASKS_PER_NODE"),
        ({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "2(x"}, "SLURM_STEP_TASKS_PER_NODE"),
        ({**SLURM, "SLURM_NODEID": "3"}, "SLURM_NODEID=3"),
        ({**SLURM, "SLURM_STEP_NODELIST": "node[3-1]"}, "[3-1]"),
    ],
)
def test_half_set_or_contradictory_variables_are_named(environ: dict[str, str], named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        discover(environ)
    assert named in str(caught.value)
    assert caught.value.fix


def test_node_of_several() -> None:
    assert nodes(PET) == NodePlacement(1, 2, 8, "pod-0", 29400)
    assert nodes({**PET, "PET_NPROC_PER_NODE": "auto"}) == NodePlacement(1, 2, None, "pod-0", 29400)
    assert nodes(ELASTIC) is None


@pytest.mark.parametrize(
    ("environ", "named"),
    [
        (without(PET, "PET_NODE_RANK"), "PET_NODE_RANK"),
        ({**PET, "PET_NNODES": "1:4"}, "PET_NNODES='1:4'"),
        ({**PET, "PET_NODE_RANK": "2"}, "PET_NODE_RANK=2"),
        ({**PET, "PET_NPROC_PER_NODE": "0"}, "PET_NPROC_PER_NODE='0'"),
    ],
)
def test_a_node_with_bad_variables_is_refused(environ: dict[str, str], named: str) -> None:
    with pytest.raises(ConfigError, match=named.replace("'", ".")):
        nodes(environ)


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("node1", ["node1"]),
        ("node[01-03,7],gpu5", ["node01", "node02", "node03", "node7", "gpu5"]),
        ("a[9-11]", ["a9", "a10", "a11"]),
        ("a[009-010]", ["a009", "a010"]),
        ("rack[1-2]n[01-02]", ["rack1n01", "rack1n02", "rack2n01", "rack2n02"]),
        ("n[1-2]-ib,login.example.org", ["n1-ib", "n2-ib", "login.example.org"]),
    ],
)
def test_host_names(text: str, hosts: list[str]) -> None:
    assert host_names(text) == hosts


@pytest.mark.parametrize("text", ["", ",", "node[1-2", "node1-2]", "node[b-c]", "node[2-1]", "node[]"])
def test_a_damaged_node_list_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        host_names(text)


def test_the_launch_room_loads_no_torch() -> None:
    code = "import sys, sixfold.launch, sixfold.launch.script; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a setting of glibc")
@pytest.mark.parametrize(
    ("given", "added"),
    [
        ({}, "glibc.malloc.tcache_max=24"),
        ({"GLIBC_TUNABLES": ""}, "glibc.malloc.tcache_max=24"),
        ({"GLIBC_TUNABLES": "glibc.malloc.check=1"}, "glibc.malloc.check=1:glibc.malloc.tcache_max=24"),
        ({"GLIBC_TUNABLES": "glibc.malloc.tcache_count=3"}, None),
    ],
)
def test_malloc_is_told_to_cache_no_large_rests_unless_its_cache_is_set(
    given: dict[str, str], added: str | None
) -> None:
    assert malloc_variables(given).get("GLIBC_TUNABLES") == added
