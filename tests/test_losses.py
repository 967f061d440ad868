"""Losses against float64 numpy and against autodiff of themselves.

Values pair by pair against TRL are in test_trl_parity.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sage_jax import losses

JIT = pytest.mark.parametrize("jit", [jax.jit, lambda f: f], ids=["jit", "eager"])
BOTH = {  # every loss, also with the settings that change its form
    **{name: factory() for name, factory in losses.LOSSES.items()},
    "sigmoid smoothed": losses.sigmoid(beta=0.5, label_smoothing=0.2),
    "robust flipped": losses.robust(beta=0.5, label_smoothing=0.3),
    "simpo wide": losses.simpo(beta=10.0, gamma=3.0, label_smoothing=0.1),
    "ipo soft": losses.ipo(beta=2.0),
}
EVERY = pytest.mark.parametrize("loss", BOTH.values(), ids=BOTH.keys())


def _sigma(x):
    return 1 / (1 + np.exp(-x))


def _softplus(x):
    return np.logaddexp(0, x)


NUMPY = {  # float64, as the papers write them; c, r rewards, b = beta, e = label smoothing
    "sigmoid": lambda c, r, b: -np.log(_sigma(c - r)),
    "robust": lambda c, r, b: -(0.9 * np.log(_sigma(c - r)) - 0.1 * np.log(_sigma(r - c))) / 0.8,
    "ipo": lambda c, r, b: ((c - r) / b - 1 / (2 * b)) ** 2,
    "hinge": lambda c, r, b: np.maximum(0, 1 - (c - r)),
    "simpo": lambda c, r, b: -np.log(_sigma(c - r - 0.5)),
    "apo_zero": lambda c, r, b: 1 - _sigma(c) + _sigma(r),
    "apo_down": lambda c, r, b: _sigma(c) + 1 - _sigma(c - r),
    "sppo_hard": lambda c, r, b: (c / b - 0.5 / b) ** 2 + (r / b + 0.5 / b) ** 2,
    "nca_pair": lambda c, r, b: (
        -np.log(_sigma(c)) - 0.5 * np.log(_sigma(-c)) - 0.5 * np.log(_sigma(-r))
    ),
    "sft": lambda c, r, b: -c,
}


def _rewards(scale=6.0, n=64):
    rng = np.random.default_rng(0)
    return np.float32(rng.normal(0, scale, n)), np.float32(rng.normal(0, scale, n))


@JIT
@pytest.mark.parametrize("name", losses.LOSSES)
def test_value_is_that_of_the_paper_in_float64(name, jit):
    loss = losses.LOSSES[name]()
    chosen, rejected = _rewards()
    expected = NUMPY[name](np.float64(chosen), np.float64(rejected), loss.beta)
    np.testing.assert_allclose(jit(loss.value)(chosen, rejected), expected, rtol=2e-6, atol=1e-6)


@JIT
@pytest.mark.parametrize("name", losses.LOSSES)
def test_slope_and_curvature_are_differences_of_the_float64_value(name, jit):
    loss = losses.LOSSES[name]()
    chosen, rejected = _rewards()
    c, r, h = np.float64(chosen), np.float64(rejected), 1e-4
    off_kink = np.abs(c - r - 1) > 2 * h if name == "hinge" else slice(None)

    def at(t):
        return NUMPY[name](c + t / 2, r - t / 2, loss.beta)

    slope = (at(h) - at(-h)) / (2 * h)
    curvature = (at(h) - 2 * at(0) + at(-h)) / h**2
    found = jit(loss.slope)(chosen, rejected)
    np.testing.assert_allclose(found[off_kink], slope[off_kink], rtol=1e-5, atol=1e-6)
    found = jit(loss.curvature)(chosen, rejected)
    np.testing.assert_allclose(found[off_kink], curvature[off_kink], rtol=1e-4, atol=1e-5)


@JIT
@EVERY
def test_slope_and_curvature_agree_with_autodiff_of_the_value(loss, jit):
    chosen, rejected = _rewards(3.0)

    def along(t, c, r):
        return loss.value(c + t / 2, r - t / 2)

    slope = jax.vmap(jax.grad(along), (None, 0, 0))(0.0, chosen, rejected)
    curvature = jax.vmap(jax.grad(jax.grad(along)), (None, 0, 0))(0.0, chosen, rejected)
    np.testing.assert_allclose(jit(loss.slope)(chosen, rejected), slope, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        jit(loss.curvature)(chosen, rejected), curvature, rtol=1e-5, atol=2e-6
    )


@JIT
def test_sigmoid_slope_matches_the_closed_form_by_the_margin_alone(jit):
    margin = np.linspace(-40, 40, 17)
    slope = jit(jax.vmap(jax.grad(losses.sigmoid())))(jnp.float32(margin))
    np.testing.assert_allclose(slope, -1 / (1 + np.exp(margin)), atol=1e-6)


def test_sigmoid_keeps_relative_precision_where_the_loss_is_tiny():
    margin = np.array([20.0, 40.0, 80.0])
    loss = losses.sigmoid()
    np.testing.assert_allclose(loss(margin), np.exp(-margin), rtol=1e-5)
    np.testing.assert_allclose(loss.slope(margin, 0.0), -np.exp(-margin), rtol=1e-5)
    np.testing.assert_allclose(loss.curvature(margin, 0.0), np.exp(-margin), rtol=1e-5)


@EVERY
@pytest.mark.parametrize("size", [1e2, 1e3, 1e4])
def test_extreme_margins_are_finite_in_value_slope_curvature_and_gradient(loss, size):
    sides = np.float32([[size, -size], [-size, size], [size / 2, -size / 2], [0, size], [size, 0]])
    for fn in (loss.value, loss.slope, loss.curvature):
        assert np.isfinite(fn(sides[:, 0], sides[:, 1])).all()
    gradient = jax.grad(lambda s: loss.value(s[:, 0], s[:, 1]).sum())(sides)
    assert np.isfinite(gradient).all()


@EVERY
def test_loss_of_two_sides_equals_the_loss_of_their_margin_or_says_so(loss):
    chosen, rejected = _rewards(2.0)
    of_margin = loss.name in {"sigmoid", "robust", "ipo", "hinge", "simpo"}
    same = np.allclose(loss(chosen, rejected), loss(chosen - rejected), rtol=1e-5, atol=1e-5)
    assert same == of_margin


@EVERY
def test_scalars_and_any_shape_are_mapped_elementwise(loss):
    chosen, rejected = _rewards(2.0, 12)
    for fn in (loss.value, loss.slope, loss.curvature):
        flat = fn(chosen, rejected)
        assert flat.shape == (12,) and flat.dtype == jnp.float32
        grid = fn(chosen.reshape(3, 4), rejected.reshape(3, 4))
        # XLA may vectorise another shape otherwise: the last bit differs on JAX 0.12.
        np.testing.assert_array_max_ulp(np.asarray(grid), np.asarray(flat.reshape(3, 4)), 2)
        np.testing.assert_allclose(fn(float(chosen[0]), float(rejected[0])), flat[0], rtol=1e-6)
        np.testing.assert_array_equal(fn(chosen, 0.0), fn(chosen, np.zeros(12)))


def test_label_smoothing_turns_back_beyond_the_margin_where_labels_are_right_often_enough():
    loss = losses.sigmoid(label_smoothing=0.2)
    turning = np.log(0.8 / 0.2)  # σ(m) = 1 - ε
    assert loss.slope(turning - 0.1, 0.0) < 0 < loss.slope(turning + 0.1, 0.0)


def test_robust_is_unbiased_under_label_flips():
    margin, rate = np.linspace(-5, 5, 11), 0.3
    noisy = losses.robust(label_smoothing=rate)
    expected = (1 - rate) * noisy(margin) + rate * noisy(-margin)
    np.testing.assert_allclose(expected, losses.sigmoid()(margin), rtol=1e-5, atol=1e-6)


# --- a user's own loss


@JIT
def test_own_margin_loss_gets_the_derivatives_of_the_shipped_one(jit):
    own = losses.from_margin(lambda m: -jax.nn.log_sigmoid(m), beta=0.1, name="mine")
    shipped = losses.sigmoid()
    chosen, rejected = _rewards(4.0)
    for fn in ("value", "slope", "curvature"):
        expected = getattr(shipped, fn)(chosen, rejected)
        np.testing.assert_allclose(
            jit(getattr(own, fn))(chosen, rejected), expected, rtol=1e-5, atol=1e-6
        )
    assert (own.name, own.needs_reference) == ("mine", True)


@JIT
@pytest.mark.parametrize("name", ["apo_zero", "apo_down", "nca_pair", "sppo_hard"])
def test_own_pair_loss_gets_the_derivatives_of_the_shipped_one(name, jit):
    shipped = losses.LOSSES[name]()
    own = losses.from_pair(shipped.value, beta=0.1)
    chosen, rejected = _rewards(2.0)
    for fn in ("value", "slope", "curvature"):
        expected = getattr(shipped, fn)(chosen, rejected)
        np.testing.assert_allclose(
            jit(getattr(own, fn))(chosen, rejected), expected, rtol=1e-5, atol=1e-5
        )


def test_own_loss_may_branch_on_a_scalar():
    own = losses.from_margin(
        lambda m: jax.lax.cond(m < 0, lambda x: x**2, lambda x: 0 * x, m), beta=1.0
    )
    np.testing.assert_array_equal(own(np.array([[-2.0, 3.0]])), [[4.0, 0.0]])
    np.testing.assert_array_equal(own.slope(np.array([-2.0, 3.0]), 0.0), [-4.0, 0.0])


# --- rewards


def _stats():
    logps = np.float32([[-10.0, -12.0], [-3.0, -8.0]])
    ref = np.float32([[-11.0, -11.0], [-4.0, -4.0]])
    tokens = np.float32([[5, 4], [2, 10]])
    return logps, ref, tokens


@pytest.mark.parametrize("name", losses.LOSSES)
def test_rewards_scale_what_the_loss_asks_for(name):
    loss = losses.LOSSES[name]()
    logps, ref, tokens = _stats()
    expected = {
        "log_ratio": logps - ref,
        "log_ratio_mean": (logps - ref) / tokens,
        "logp": logps,
        "logp_mean": logps / tokens,
    }[loss.input] * loss.beta
    found = losses.rewards(loss, logps, ref if loss.needs_reference else None, tokens)
    np.testing.assert_allclose(np.stack(found, -1), expected, rtol=1e-6)


@EVERY
def test_an_empty_side_has_reward_0_and_no_gradient_even_if_its_reference_is_broken(loss):
    logps, ref, tokens = _stats()
    tokens[0, 1] = 0
    ref[0, 1] = np.nan

    def total(logps):
        return loss(*losses.rewards(loss, logps, ref, tokens)).sum()

    gradient = jax.grad(total)(logps)
    assert losses.rewards(loss, logps, ref, tokens)[1][0] == 0
    assert np.isfinite(gradient).all() and gradient[0, 1] == 0
    if loss.name not in {"sft", "hinge"}:
        assert (gradient[1] != 0).all()


@pytest.mark.parametrize("name", losses.LOSSES)
def test_a_masked_pair_adds_exactly_0_to_loss_and_gradient(name):
    loss = losses.LOSSES[name]()
    logps, ref, tokens = _stats()
    weight = np.float32([1.0, 0.0])

    def total(logps, tokens):
        value = loss(*losses.rewards(loss, logps, ref, tokens))
        return jnp.where(weight > 0, value, 0.0) @ weight

    empty = tokens * weight[:, None]
    value, gradient = jax.value_and_grad(total)(logps, empty)
    alone = loss(*losses.rewards(loss, logps[:1], ref[:1], tokens[:1]))[0]
    assert value == alone
    assert (gradient[1] == 0).all() and np.isfinite(gradient).all()


def test_nll_is_the_mean_over_tokens_and_0_without_tokens():
    found = losses.nll(np.float32([-6.0, 0.0]), np.int32([3, 0]))
    np.testing.assert_array_equal(found, [2.0, 0.0])


# --- errors say the value, the rule and the fix


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: losses.sigmoid(beta=0.0), "beta=0.0 must be positive"),
        (lambda: losses.ipo(beta=-1.0), "beta=-1.0 must be positive"),
        (lambda: losses.sigmoid(beta=float("nan")), "beta=nan must be positive"),
        (lambda: losses.robust(label_smoothing=0.5), r"label_smoothing=0.5 must lie in \[0, 0.5\)"),
        (lambda: losses.from_margin(jnp.abs, 0.1, input="sum"), "must be one of log_ratio"),
        (lambda: losses.rewards(losses.ipo(), np.ones(2), None, np.ones(2)), "ref_logps is None"),
    ],
)
def test_wrong_settings_are_named_with_rule_and_fix(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize(
    ("logps", "reference"), [((4,), (4,)), ((2, 4), (2, 4)), ((3, 2), (2,)), ((3, 4, 2), (4, 2))]
)
def test_log_probs_of_other_shapes_are_refused_before_they_broadcast(logps, reference):
    with pytest.raises(ValueError, match="Give all of them one shape"):
        losses.rewards(losses.sigmoid(), np.zeros(logps), np.zeros(reference), np.ones(logps))
