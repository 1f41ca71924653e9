"""Operations split over the devices of a mesh.

XLA does not know what a kernel does, and would gather whatever it reads; nor does it see through loops over blocks
of a weight. `split` tells it by a rule: arrays stay where they lie, and each device runs the operation on its own
pieces. Shardy carries shardings along by the same rule. In a program for one device nothing is left of it.

XLA for TPU takes no such rules (JAX 0.10): there operations are left to it as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager

import jax
import numpy as np
from jax import lax
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend.backend import backends
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

Array = jax.Array
Terms = list[list[str]]  # the names of the axes of every operand and, last, of the result
Cut = dict[str, tuple[str, ...]]  # the axes of a mesh by which a named axis is cut

WHOLE = "_"
_ELSEWHERE = jax.make_user_context(False)  # part of the key of every jitted program


def split(f: Callable, rule: str, summed: Callable | None = None) -> Callable:
    """f, from arrays or trees of them to one array, such that a mesh may split it: it is called with the pieces.

    rule: "m k, n k -> m n" names the axes of all arrays of each argument, and of the result. A named axis is cut
    as it lies in the largest array that has it. `_` stays whole, and so does an array of another rank. Names that
    the result lacks are summed over: each device runs `summed` (default f) on its pieces, and the results are
    added before they get f's dtype. Arguments may be None.

    An axis may have several lengths, as the columns, bytes and groups of a packed weight: it is then cut where all
    of them can be. What has too few such places for the devices is gathered.
    """

    def call(*args):
        if not on_mesh():
            return f(*args)
        leaves, tree = jax.tree.flatten(args)
        flat = lambda g: lambda *leaves: g(*jax.tree.unflatten(tree, leaves))
        return _split(flat(f), flat(summed or f), _terms(rule, args), leaves)

    return call


def meshes() -> AbstractContextManager[None]:
    """Within it, programs are traced for a mesh though no platform of this process has several devices.

    For compilation ahead of time, for devices that are elsewhere."""
    return _ELSEWHERE(True)


def on_mesh() -> bool:
    """Whether an operation may be split here.

    Rules cost a third of the time that tracing takes: they are left out where nothing can be. Within
    `jax.shard_map` an array is a piece already.
    """
    if AxisType.Manual in jax.sharding.get_abstract_mesh().axis_types:
        return False
    return _ELSEWHERE.value or any(platform.device_count() > 1 for platform in backends().values())


def _terms(rule: str, args: Sequence) -> Terms:
    operands, result = rule.split("->")
    pairs = zip(operands.split(","), args, strict=True)
    named = [(term.split(), a) for term, arg in pairs for a in jax.tree.leaves(arg)]
    return [*(names if len(names) == a.ndim else [WHOLE] * a.ndim for names, a in named), result.split()]


def _split(f: Callable, summed: Callable, terms: Terms, args: Sequence[Array]) -> Array:
    """With `vmap`, the axis it adds leads in the rule as well, and may be cut."""
    if not any(isinstance(a, jax.core.Tracer) for a in args):
        on_mesh = any(isinstance(a, jax.Array) and len(a.devices()) > 1 for a in args)
        return jax.jit(lambda *args: _split(f, summed, terms, args))(*args) if on_mesh else f(*args)
    traced = jax.make_jaxpr(f)(*args)
    n = len(traced.consts)  # which become operands that stay whole
    whole = lambda *args: jax.core.eval_jaxpr(traced.jaxpr, args[:n], *args[n:])[0]
    of_args = lambda g: lambda *args: g(*args[n:])
    longer = [*([WHOLE] * np.ndim(a) for a in traced.consts), *terms]
    call = custom_vmap(_partitioned(whole, of_args(f), of_args(summed), longer))

    @call.def_vmap
    def _(_, moves, *args):
        axes, name = [0 if m else None for m in moves[n:]], f"v{len(terms[-1])}"
        many = lambda g: jax.vmap(g, axes)
        named = [[name, *term] if m else term for m, term in zip([*moves[n:], True], terms, strict=True)]
        return _split(many(f), many(summed), named, args[n:]), True

    return call(*traced.consts, *args)


def _partitioned(whole: Callable, f: Callable, summed: Callable, terms: Terms) -> Callable:
    """`whole`, or on several devices f (or `summed`) of their pieces."""

    def call(*args):
        pieces = _pieces(terms, args)

        def partition(mesh, args, result):
            mesh = _finer(mesh, args[0])
            cut = _cut(mesh, terms, args, pieces)
            added = [axis for name, axes in cut.items() if name not in terms[-1] for axis in axes]
            total = lambda *args: lax.psum(summed(*args), added).astype(result.dtype)
            *places, place = [_place(mesh, cut, *both) for both in zip(terms, [*args, result], strict=True)]
            return mesh, total if added else f, place, tuple(places)

        run = custom_partitioning(whole)
        run.def_partition(
            partition,
            infer_sharding_from_operands=lambda *args: partition(*args)[2],  # where Shardy is turned off
            decode_shardings=False,  # JAX's own fails where half an axis of a mesh cuts one axis and half another
            **_for_shardy(terms, args, pieces),
        )
        return lax.platform_dependent(*args, tpu=whole, default=run)

    return call


def _pieces(terms: Terms, args: Sequence[Array]) -> dict[str, int]:
    """How many equal pieces there can be of each named axis, in all arrays that have it: two or more.

    Where it has length 1 in an array, that array is for all pieces."""
    pieces = {}
    for names, a in zip(terms, args, strict=False):
        for name, size in zip(names, a.shape, strict=True):
            if size > 1:
                pieces[name] = math.gcd(pieces.get(name, 0), size)
    return {name: n for name, n in pieces.items() if name != WHOLE and n > 1}


def _for_shardy(terms: Terms, args: Sequence[Array], pieces: dict[str, int]) -> dict:
    """The rule in Shardy's words. What stays whole, as the elements of a piece do, has a name of its own."""
    whole, inner = [], {}

    def axis(name: str, size: int) -> str:
        if size == pieces.get(name):
            return name
        whole.append(f"w{len(whole)}")
        if name not in pieces or size == 1:
            return whole[-1]
        inner[whole[-1]] = size // pieces[name]
        return f"({name} {whole[-1]})"

    shapes = [*(a.shape for a in args), [pieces.get(name, 1) for name in terms[-1]]]
    *operands, result = [" ".join(map(axis, *both)) for both in zip(terms, shapes, strict=True)]
    summed = tuple(name for name in pieces if name not in terms[-1])
    rule = f"{', '.join(operands)} -> {result}"
    return dict(sharding_rule=rule, reduction_factors=summed, need_replication_factors=tuple(whole), **inner)


def _cut(mesh: Mesh, terms: Terms, args: Sequence[jax.ShapeDtypeStruct], pieces: dict[str, int]) -> Cut:
    """Each name is cut as it lies in the largest array that has it; large arrays get the mesh's axes first."""
    cut, taken = {}, set()
    for names, a in sorted(
        zip(terms, args, strict=False), key=lambda both: -both[1].size * both[1].dtype.itemsize
    ):
        for name, size, axes in zip(names, a.shape, _lies(mesh, a.sharding, a.ndim), strict=True):
            if name in pieces and name not in cut and size > 1:
                cut[name] = _dividing(mesh, [axis for axis in axes if axis not in taken], pieces[name])
                taken |= set(cut[name])
    return cut


def _place(mesh: Mesh, cut: Cut, names: list[str], a: jax.ShapeDtypeStruct) -> NamedSharding:
    axes = [cut.get(name) if size > 1 else None for name, size in zip(names, a.shape, strict=True)]
    return NamedSharding(mesh, PartitionSpec(*axes))


def _dividing(mesh: Mesh, axes: list[str], pieces: int) -> tuple[str, ...]:
    """As many of the first axes as there are pieces for."""
    while pieces % math.prod(mesh.shape[axis] for axis in axes):
        axes = axes[:-1]
    return tuple(axes)


def _lies(mesh: Mesh, sharding: Sharding, ndim: int) -> list[list[str]]:
    """The axes of the mesh that cut each axis of an array, the largest step first; none where they do not tell."""
    first, axes = _first(mesh, sharding, ndim), range(mesh.devices.ndim)
    steps = [first[tuple(int(i == axis) for i in axes)] for axis in axes]  # along each axis of the mesh: [ndim]
    found = [sorted((i for i in axes if steps[i][at]), key=lambda i: -steps[i][at]) for at in range(ndim)]
    found = [[mesh.axis_names[i] for i in some] for some in found]
    again = _first(mesh, NamedSharding(mesh, PartitionSpec(*map(tuple, found))), ndim)
    return found if (first == again).all() else [[]] * ndim


def _first(mesh: Mesh, sharding: Sharding, ndim: int) -> np.ndarray:
    """Where the piece of each device begins [*mesh, ndim], in an array that any number of pieces divides."""
    index = sharding.devices_indices_map((mesh.devices.size,) * ndim)
    first = [[one.start or 0 for one in index[device]] for device in mesh.devices.flat]
    return np.array(first, np.int64).reshape(*mesh.devices.shape, ndim)


def _finer(mesh: Mesh, a: jax.ShapeDtypeStruct) -> Mesh:
    """The same devices with axes of prime sizes: what lies on part of an axis lies on whole ones of these."""
    if mesh.empty:  # a program whose arguments have no named axes
        n = len(a.sharding.device_set)
        mesh = Mesh(np.array(list(a.sharding.devices_indices_map((n,) * a.ndim))), ("all",))
    sizes = {f"{name}/{i}": n for name, size in mesh.shape.items() for i, n in enumerate(_primes(size))}
    return Mesh(mesh.devices.reshape(*sizes.values()), tuple(sizes))


def _primes(n: int) -> Iterator[int]:
    p = 2
    while n > 1:
        while n % p == 0:
            yield p
            n //= p
        p += 1
