"""Costs of small programs with known answers, compiled for TPUs that are not there."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from flowdit.planning.compilation import devices_of
from flowdit.planning.cost import Collective, program_cost
from flowdit.planning.environment import COMPILER_ONLY
from flowdit.planning.links import Links, device_groups, moved
from flowdit.planning.machines import parse_topology
from flowdit.planning.program import Program, shape_bytes

pytest.importorskip("libtpu", reason="needs the TPU compiler")
FOUR = "v5e:2x2"


def compiled(function, *shapes: tuple[int, ...], dtype=jnp.bfloat16) -> str:
    """`function` on each of four devices, whose arguments have these shapes."""
    mesh = Mesh(np.array(devices_of(parse_topology(FOUR))), ("x",))
    split = PartitionSpec("x")
    mapped = jax.shard_map(function, mesh=mesh, in_specs=split, out_specs=split, check_vma=False)
    rows = NamedSharding(mesh, split)
    given = [jax.ShapeDtypeStruct((4 * shape[0], *shape[1:]), dtype, sharding=rows) for shape in shapes]
    return jax.jit(mapped).lower(*given).compile().as_text()


def counts(text: str) -> dict[str, tuple[int, int]]:
    """Number and bytes of the collectives of each kind."""
    found = {}
    for collective, count in program_cost(text).collectives.items():
        before = found.get(collective.kind, (0, 0))
        found[collective.kind] = (before[0] + count, before[1] + count * collective.bytes)
    return found


@pytest.mark.parametrize(
    "machine", ["v5e", *(pytest.param(machine, marks=pytest.mark.slow) for machine in ("v5p", "v6e"))]
)
def test_a_matrix_product_takes_its_published_time(machine):
    topology = parse_topology(f"{machine}:1")
    device = SingleDeviceSharding(devices_of(topology)[0])
    square = jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16, sharding=device)
    cost = program_cost(jax.jit(lambda a, b: a @ b).lower(square, square).compile().as_text())
    rate = 2 * 4096**3 * topology.machine.clock / cost.cycles
    assert 0.85 < rate / topology.peak("bfloat16") < 1


def test_the_compilers_environment_does_not_stay():
    """JAX would take this machine for one of a TPU slice, and wait for the others."""
    devices_of(parse_topology("v5e:1"))
    assert not (COMPILER_ONLY.keys() - {"TPU_SKIP_MDS_QUERY"}) & os.environ.keys()


def test_loops_are_counted_as_often_as_they_run():
    def function(x):
        def outer(x, _):
            return jax.lax.scan(lambda x, _: (jax.lax.psum(x @ x, "x"), None), x, length=5)[0], None

        x = jax.lax.scan(outer, x, length=3)[0]
        x = jax.lax.fori_loop(2, 9, lambda i, x: jax.lax.all_gather(jnp.sin(x[:64] + i), "x", tiled=True), x)
        return jax.lax.while_loop(lambda x: x.sum() > 0, lambda x: jax.lax.ppermute(x, "x", [(0, 1), (1, 0)]), x)

    text = compiled(function, (256, 256))
    assert counts(text)["all-reduce"] == (15, 15 * 256 * 256 * 2)
    assert counts(text)["all-gather"] == (7, 7 * 256 * 256 * 2)
    assert counts(text)["collective-permute"] == (1, 256 * 256 * 2)
    assert program_cost(text).unknown_loops == 1


def test_cycles_grow_with_the_length_of_a_loop():
    def product(length):
        return program_cost(
            compiled(lambda x: jax.lax.scan(lambda x, _: (x @ x, None), x, length=length)[0], (512, 512))
        )

    few, many = product(4).cycles, product(400).cycles
    assert 396 / 4 * 0.9 < (many - few) / few < 396 / 4 * 1.1


def test_bytes_of_collectives():
    def function(x, y):
        whole = jax.lax.all_gather(jnp.cos(x), "x", tiled=True)
        part = jax.lax.psum_scatter(y * 2, "x", tiled=True)
        return jax.lax.psum(x * 3, "x"), whole, jax.lax.all_gather(part, "x", tiled=True)

    found = counts(compiled(function, (1024, 512), (2048, 1024), dtype=jnp.float32))
    assert found["all-reduce"] == (1, 1024 * 512 * 4)
    assert found["all-gather"] == (2, (4 * 1024 * 512 + 2048 * 1024) * 4)
    assert found["reduce-scatter"][0] == 1
    assert 2048 * 1024 * 4 <= found["reduce-scatter"][1] <= 2048 * 1024 * 4 * 1.25  # padded by the compiler


LOOP = """
%condition (p: (s32[], bf16[8])) -> pred[] {
  %p = (s32[], bf16[8]) parameter(0)
  %limit = s32[]{:T(128)} constant(12)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

%body (q: (s32[], bf16[8])) -> (s32[], bf16[8]) {
  %q = (s32[], bf16[8]) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %two = s32[] constant(2)
  %next = s32[] add(%j, %two)
  %x = bf16[8]{0} get-tuple-element(%q), index=1
  %kernel = bf16[8]{0} custom-call(%x), custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{
"body":"abc","cost_estimate":{"flops":"1000","transcendentals":"0"}}}
  %y = bf16[8]{0} fusion(%kernel), kind=kLoop, calls=%fused, backend_config={"estimated_cycles":"70"}
  ROOT %t = (s32[], bf16[8]) tuple(%next, %y)
}

ENTRY %main (x: bf16[8]) -> bf16[8] {
  %x = bf16[8]{0} parameter(0)
  %zero = s32[] constant(0)
  %start = (s32[], bf16[8]) tuple(%zero, %x)
  %loop = (s32[], bf16[8]) while(%start), condition=%condition, body=%body
  ROOT %result = bf16[8]{0} get-tuple-element(%loop), index=1
}
"""


def test_steps_of_a_loop_and_kernels():
    cost = program_cost(LOOP)
    assert (cost.cycles, cost.kernels, cost.kernel_flops) == (6 * 70, {"tpu_custom_call": 6}, 6000)
    with pytest.raises(ValueError, match="no entry computation"):
        Program("not a program")


@pytest.mark.parametrize(
    ("old", "new", "trips"),
    [
        ("direction=LT", "direction=LE", 7),
        ("direction=LT", "direction=NE", 6),
        ("direction=LT", "direction=EQ", None),
        ("%two = s32[] constant(2)", "%two = s32[] constant(0)", None),
        ("%two = s32[] constant(2)", "%two = s32[] constant(-1)", None),
        ("%next = s32[] add(%j, %two)", "%next = s32[] multiply(%j, %two)", None),
        ("%next = s32[] add(%j, %two)", "%next = s32[] add(%two, %two)", None),
        ("%limit = s32[]{:T(128)} constant(12)", "%limit = f32[] constant(12)", None),
        ("%next = s32[] add(%j, %two)", "%next = s32[] fusion(%two, %j), kind=kLoop, calls=%sum", 6),
        ("%next = s32[] add(%j, %two)", "%next = s32[] fusion(%j, %j), kind=kLoop, calls=%sum", None),
        ("%next = s32[] add(%j, %two)", "%next = s32[] fusion(%j, %two), kind=kLoop, calls=%product", None),
        (
            "%next = s32[] add(%j, %two)",
            "%both = (s32[], s32[]) fusion(%j, %two), kind=kLoop, calls=%pair\n"
            "  %next = s32[] get-tuple-element(%both), index=1",
            6,
        ),
    ],
)
def test_the_length_of_a_loop_is_known_or_not(old, new, trips):
    assert old in LOOP
    program = Program(FUSED + LOOP.replace(old, new))
    assert program.trip_count("main", program.computations["main"]["loop"]) == trips


FUSED = """
%sum (a: s32[], b: s32[]) -> s32[] {
  %b = s32[] parameter(1)
  %a = s32[] parameter(0)
  ROOT %c = s32[] add(%a, %b)
}

%product (a: s32[], b: s32[]) -> s32[] {
  %a = s32[] parameter(0)
  %b = s32[] parameter(1)
  ROOT %c = s32[] multiply(%a, %b)
}

%pair (a: s32[], b: s32[]) -> (s32[], s32[]) {
  %a = s32[] parameter(0)
  %b = s32[] parameter(1)
  %c = s32[] add(%a, %b)
  ROOT %t = (s32[], s32[]) tuple(%a, %c)
}
"""
OTHERS = """
%spread.1 (x: bf16[8]) -> bf16[32] {
  %x = bf16[8]{0} parameter(0)
  ROOT %g = bf16[32]{0} all-gather(%x), replica_groups={{0,1,2,3}}, frontend_attributes={chain_id="7"}
}

%spread.2 (x: bf16[8]) -> bf16[32] {
  %x = bf16[8]{0} parameter(0)
  ROOT %g = bf16[32]{0} all-gather(%x), replica_groups={{0,1,2,3}}, frontend_attributes={chain_id="7"}
}

%cheap (x: bf16[8]) -> bf16[32] {
  %x = bf16[8]{0} parameter(0)
  ROOT %a = bf16[32]{0} fusion(%x), kind=kLoop, calls=%spread.1, backend_config={"estimated_cycles":"10"}
}

%dear (x: bf16[8]) -> bf16[32] {
  %x = bf16[8]{0} parameter(0)
  ROOT %a = bf16[32]{0} fusion(%x), kind=kLoop, calls=%spread.2, backend_config={"estimated_cycles":"25"}
}

ENTRY %main (p: pred[], x: bf16[8]) -> bf16[32] {
  %p = pred[] parameter(0)
  %x = bf16[8]{0} parameter(1)
"""


def test_a_collective_spread_over_fusions_counts_once():
    fusions = "".join(
        f'  %f.{i} = bf16[32]{{0}} fusion(%x), calls=%spread.{i}, backend_config={{"estimated_cycles":"5"}}\n'
        for i in (1, 2)
    )
    cost = program_cost(OTHERS + fusions + "}\n")
    assert (cost.cycles, cost.collectives) == (10, {Collective("all-gather", 64, "{{0,1,2,3}}"): 1})


def test_start_and_end_of_a_collective_count_once():
    text = """  %s = (bf16[8]{0}, bf16[32]{0}) all-gather-start(%x), replica_groups={{0,1,2,3}}, dimensions={0}
  ROOT %d = bf16[32]{0} all-gather-done(%s)
}
"""
    assert program_cost(OTHERS + text).collectives == {Collective("all-gather", 64, "{{0,1,2,3}}"): 1}


@pytest.mark.parametrize("branches", ["%cheap, %dear", "%dear, %cheap"])
def test_of_a_conditional_the_dearest_branch_counts(branches):
    text = f"  ROOT %c = bf16[32]{{0}} conditional(%p, %x, %x), branch_computations={{{branches}}}\n}}\n"
    cost = program_cost(OTHERS + text)
    assert (cost.cycles, cost.conditional_cycles) == (25, 15)
    assert cost.collectives == {Collective("all-gather", 64, "{{0,1,2,3}}"): 1}


@pytest.mark.parametrize(
    ("shape", "size"),
    [("f32[]", 4), ("(bf16[2,3]{1,0:T(8,128)(2,1)}, pred[5])", 17), ("s4[3]", 2), ("f8e4m3fn[7]", 7), ("token[]", 0)],
)
def test_bytes_of_shapes(shape, size):
    assert shape_bytes(shape) == size


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("{{0,1},{2,3}}", [[0, 1], [2, 3]]),
        ("[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("mesh['a'=2,'b'=2] {'b'}", [[0, 1], [2, 3]]),
        ("mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
        ("mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}", [[0, 2], [1, 3]]),
        ("mesh['a'=2,'b'=2] {'a','b'}", [[0, 1, 2, 3]]),
        ("", [[0, 1, 2, 3]]),
    ],
)
def test_groups_of_devices(text, groups):
    assert sorted(sorted(group) for group in device_groups(text, 4)) == groups


def test_time_on_links():
    """An array of 100 MB on v5e, whose links carry 50 GB/s in each direction."""
    coordinates = [(x, y, 0) for y in range(4) for x in range(4)]
    links = Links(parse_topology("v5e:4x4"), coordinates)
    row = "[4,4]<=[16]"
    assert links.seconds(Collective("all-gather", 10**8, row)) == pytest.approx(0.75 * 2e-3)  # a row's end has one link
    assert links.seconds(Collective("all-reduce", 10**8, row)) == pytest.approx(2 * 0.75 * 2e-3)
    both = links.seconds(Collective("all-gather", 10**8, "[1,16]<=[16]"))
    assert both == pytest.approx(15 / 16 * 1e-3)  # a corner has two
    every_other = links.seconds(Collective("all-gather", 10**8, "{{0,2},{1,3}}"))
    assert every_other == pytest.approx(0.5 * 2e-3 * 3 / 2)  # two groups share three places of the row
    assert links.seconds(Collective("all-reduce", 10**8, "[16,1]<=[16]")) == 0
    ring = Links(parse_topology("v5e:16x16"), [(x, y, 0) for y in range(16) for x in range(16)])
    assert ring.seconds(Collective("all-gather", 10**8, "[16,16]<=[256]")) == pytest.approx(15 / 16 * 1e-3)
    around = "{" + ",".join(f"{{{i},{(i + 1) % 16}}}" for i in range(16)) + "}"
    assert ring.seconds(Collective("collective-permute", 10**8, around)) == pytest.approx(2e-3)  # one link each
    assert links.seconds(Collective("collective-permute", 10**8, "{{0,1},{3,0}}")) == pytest.approx(2e-3 * 4 / 2)


def test_gpus_of_one_node_and_of_several():
    links = Links(parse_topology("h100:16"))
    size = 45 * 10**8
    assert links.seconds(Collective("all-gather", size, "[2,8]<=[16]")) == pytest.approx(7 / 8 * 0.01)
    assert links.seconds(Collective("all-gather", size, "[1,16]<=[16]")) == pytest.approx(15 / 16 * 0.09)
    assert moved("all-to-all", 100, 4) == 75
