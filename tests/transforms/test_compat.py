"""The jax that this is: parameters of primitives, as `transforms/core` relies on them.

A failure here after an upgrade names the primitive that changed. Read its new parameters, mend
`transforms/core/compat.py` or the rule, then write the new names down here.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from stowax.transforms.core import compat
from stowax.transforms.core.interpret import RULES
from tests.transforms.test_control import jvp_matmul, vjp_matmul

X = jax.ShapeDtypeStruct((4, 4), jnp.float32)
CUBE = jax.ShapeDtypeStruct((2, 4, 4), jnp.float32)
IMAGE = jax.ShapeDtypeStruct((1, 4, 4, 4), jnp.float32)
I = jax.ShapeDtypeStruct((), jnp.int32)
SIZES = jax.ShapeDtypeStruct((2,), jnp.int32)


def mapped(x):
    mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    return jax.shard_map(
        lambda x: x * 2, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec()
    )(x)


# primitive: (a function that uses it, its arguments, the names of its parameters)
PRIMITIVES = {
    "jit": (
        jax.jit(jnp.sin),
        (X,),
        (
            "compiler_options_kvs ctx_mesh donated_invars in_layouts in_shardings inline "
            "jaxpr keep_unused name out_layouts out_shardings"
        ),
    ),
    "scan": (
        lambda x: lax.scan(lambda c, _: (c, None), x, length=2),
        (X,),
        "ft_in ft_out jaxpr length reverse unroll",
    ),
    "while": (
        lambda x: lax.while_loop(lambda x: x.sum() > 0, lambda x: x - 1, x),
        (X,),
        "body_jaxpr body_nconsts cond_jaxpr cond_nconsts",
    ),
    "cond": (lambda i, x: lax.cond(i > 0, jnp.sin, jnp.cos, x), (I, X), "branches"),
    "remat2": (jax.checkpoint(jnp.sin), (X,), "differentiated jaxpr policy prevent_cse"),
    "custom_jvp_call": (jvp_matmul, (X, X), "call_jaxpr jvp_jaxpr_fun num_consts symbolic_zeros"),
    "custom_vjp_call": (
        vjp_matmul,
        (X, X),
        "bwd call_jaxpr fwd_jaxpr_thunk num_consts out_trees symbolic_zeros",
    ),
    "shard_map": (mapped, (X,), "check_vma in_specs jaxpr mesh newly_manual_axes out_specs"),
    "dot_general": (
        jnp.dot,
        (X, X),
        "dimension_numbers out_sharding precision preferred_element_type",
    ),
    "ragged_dot_general": (
        lax.ragged_dot,
        (X, CUBE, SIZES),
        ("group_offset out_sharding precision preferred_element_type ragged_dot_dimension_numbers"),
    ),
    "conv_general_dilated": (
        lambda x, w: lax.conv(x, w, (1, 1), "SAME"),
        (IMAGE, IMAGE),
        (
            "batch_group_count dimension_numbers feature_group_count lhs_dilation "
            "out_sharding padding precision preferred_element_type rhs_dilation "
            "window_strides"
        ),
    ),
    "gather": (
        lambda x, i: jnp.take(x, i, axis=0),
        (X, SIZES),
        "dimension_numbers fill_value indices_are_sorted mode slice_sizes unique_indices",
    ),
    "dynamic_slice": (lambda x, i: lax.dynamic_slice_in_dim(x, i, 1), (X, I), "slice_sizes"),
    "slice": (lambda x: x[1:], (X,), "limit_indices start_indices strides"),
    "split": (lambda x: jnp.split(x, 2), (X,), "axis sizes"),
    "unstack": (lambda x: tuple(x), (X,), "axis"),
    "transpose": (lambda x: x.T, (X,), "permutation"),
    "reshape": (lambda x: x.reshape(16), (X,), "dimensions new_sizes sharding"),
    "squeeze": (lambda x: x[:1].squeeze(0), (X,), "dimensions"),
    "broadcast_in_dim": (lambda x: x[None], (X,), "broadcast_dimensions shape sharding"),
    "convert_element_type": (
        lambda x: x.astype(jnp.bfloat16),
        (X,),
        "new_dtype sharding weak_type",
    ),
    "optimization_barrier": (lambda x: lax.optimization_barrier(x), (X,), ""),
    "stop_gradient": (lax.stop_gradient, (X,), ""),
    "name": (lambda x: checkpoint_name(x, "x"), (X,), "name"),
}


def find(jaxpr, name):
    for eqn in compat.open_jaxpr(jaxpr)[0].eqns:
        if eqn.primitive.name == name:
            return eqn
        for inner in compat.inner_jaxprs(eqn):
            if (found := find(inner, name)) is not None:
                return found
    return None


@pytest.mark.parametrize("name", PRIMITIVES)
def test_parameters(name):
    fn, args, names = PRIMITIVES[name]
    jaxpr = jax.make_jaxpr(lambda *a: fn(*a))(*args)
    eqn = find(jaxpr, name)
    assert eqn is not None, f"jax does not emit `{name}` here: {jaxpr}"
    assert " ".join(sorted(eqn.params)) == names
    assert name in RULES


@pytest.mark.parametrize("name", PRIMITIVES)
def test_bind_gives_the_same_equation(name):
    """Binding an equation again on its own operands changes nothing."""
    fn, args, _ = PRIMITIVES[name]
    jaxpr = jax.make_jaxpr(lambda *a: fn(*a))(*args)

    def again(*values):
        body, consts = compat.open_jaxpr(jaxpr)
        env = dict(zip(body.constvars, consts)) | dict(zip(body.invars, values))
        for eqn in body.eqns:
            env.update(zip(eqn.outvars, compat.bind(eqn, compat.read(env, eqn.invars))))
        return compat.read(env, body.outvars)

    rebound = jax.make_jaxpr(again)(*args)
    assert [e.primitive for e in rebound.eqns] == [e.primitive for e in jaxpr.eqns]
    assert [v.aval for v in rebound.jaxpr.outvars] == [v.aval for v in jaxpr.jaxpr.outvars]


def test_scan_split():
    def fn(w, x, xs):
        return lax.scan(lambda c, x: ((c[0] + w @ x, c[1] * 2), x), (x, w), xs)

    eqn = find(jax.make_jaxpr(fn)(X, X, CUBE), "scan")
    assert compat.scan_split(eqn) == (1, 2)
