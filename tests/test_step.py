"""Steps: accumulation, empty rows, retracing, sharding, and scores that come for free."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sage_jax import batch, logprobs, losses, scores, selection, step
from sage_jax.runtime import mesh as meshes

T, S, D, V = 16, 1, 8, 30


def rows_of(count, seed=0, weight=1.0):
    rng = np.random.default_rng(seed)
    rows = batch.empty(count, T, S)
    for r in range(count):
        rows.pair_RS[r, 0], rows.weight_RS[r, 0] = r, weight
        rows.ref_logps_RS2[r, 0] = rng.normal(size=2) - 8
        for side in range(2):
            span = slice(8 * side, 8 * side + int(rng.integers(4, 9)))
            rows.tokens_RT[r, span] = rng.integers(1, V, span.stop - span.start)
            rows.segment_RT[r, span] = batch.segment_id(0, side)
            rows.completion_RT[r, span.start + 2 : span.stop] = True
    return rows


def params(seed=0):
    rng = np.random.default_rng(seed)
    embed, head = rng.normal(size=(V, D)), rng.normal(size=(D, V))
    return {"embed": jnp.float32(embed), "head": jnp.float32(head)}


logps_fn = logprobs.make_logps_fn(lambda p, _, b: p["embed"][b.tokens_RT], lambda p, _: p["head"])
score_fn = scores.make_score_fn(losses.sigmoid(0.1))


def run(rows, count=1, **settings):
    tx = optax.sgd(0.1)
    fn = jax.jit(step.make_train_step(logps_fn, losses.sigmoid(0.1), tx, **settings))
    state, output = step.init_state(params(), tx), None
    for _ in range(count):
        state, output = fn(state, None, rows)
    return state, output


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulated_parts_give_the_step_of_the_whole_batch(parts):
    rows = rows_of(8)
    rows.weight_RS[3] = 0.25
    rows.pair_RS[5] = -1
    whole, a = run(rows, score_fn=score_fn)
    cut, b = run(rows, score_fn=score_fn, accumulate=parts)
    for x, y in zip(jax.tree.leaves(whole.params), jax.tree.leaves(cut.params), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
    for name in a.metrics:
        np.testing.assert_allclose(a.metrics[name], b.metrics[name], rtol=1e-5, atol=1e-5)
    margins = (x.pairs.pessimistic_margin for x in (a, b))
    np.testing.assert_allclose(*margins, rtol=1e-5)


def test_empty_rows_change_nothing():
    rows = rows_of(4)
    padded = jax.tree.map(lambda x, e: np.concatenate([x, e]), rows, batch.empty(3, T, S))
    (a, out_a), (b, out_b) = run(rows), run(padded)
    for x, y in zip(jax.tree.leaves(a.params), jax.tree.leaves(b.params), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(out_a.metrics["loss"], out_b.metrics["loss"], rtol=1e-6)


@pytest.mark.parametrize("name", sorted(losses.LOSSES))
def test_a_batch_without_any_pair_has_loss_and_gradient_zero(name):
    tx = optax.sgd(0.1)
    fn = step.make_train_step(logps_fn, losses.LOSSES[name](), tx, nll_weight=0.5)
    before = step.init_state(params(), tx)
    state, output = fn(before, None, batch.empty(2, T, S))
    assert float(output.metrics["loss"]) == 0.0 and float(output.metrics["grad_norm"]) == 0.0
    assert all(jnp.array_equal(x, y) for x, y in zip(
        jax.tree.leaves(state.params), jax.tree.leaves(before.params), strict=True))  # fmt: skip


def test_two_batches_of_one_shape_share_one_trace():
    tx, traces = optax.sgd(0.1), []

    def counted(p, frozen, rows):
        traces.append(1)
        return logps_fn(p, frozen, rows)

    fn = jax.jit(step.make_train_step(counted, losses.sigmoid(), tx))
    state = step.init_state(params(), tx)
    for seed in range(3):
        state, _ = fn(state, None, rows_of(4, seed))
    assert len(traces) == 1


def test_train_step_reports_the_scores_that_a_scoring_pass_computes():
    rows = rows_of(6)
    _, output = run(rows, score_fn=score_fn)
    alone = step.make_score_step(logps_fn, score_fn)(params(), None, rows)
    for name, value in alone._asdict().items():
        np.testing.assert_allclose(getattr(output.pairs, name), value, rtol=1e-5, err_msg=name)


def test_gradient_of_the_step_is_that_of_the_loss_written_out():
    rows, p = rows_of(5), params()

    def written(p):
        stats = logps_fn(p, None, rows)
        ratio = stats.logps[:, 0] - rows.ref_logps_RS2[:, 0]
        return -jnp.mean(jax.nn.log_sigmoid(0.1 * (ratio[:, 0] - ratio[:, 1])))

    state, output = run(rows)
    value, grads = jax.value_and_grad(written)(p)
    np.testing.assert_allclose(output.metrics["loss"], value, rtol=1e-6)
    for name in p:
        expected = p[name] - 0.1 * grads[name]
        np.testing.assert_allclose(state.params[name], expected, rtol=1e-5, atol=1e-6)


def test_policy_equal_to_its_reference_logs_ln2_and_accuracy_zero():
    rows = rows_of(6)
    stats = step.make_stats_step(logps_fn)(params(), None, rows)
    # The reference ran in another program: its last bits differ.
    rows = rows._replace(ref_logps_RS2=np.asarray(stats.logps) * np.float32(1 + 1e-6))
    _, output = run(rows)
    np.testing.assert_allclose(output.metrics["loss"], np.log(2), atol=1e-5)
    assert float(output.metrics["rewards/accuracies"]) == 0.0


def test_soft_weights_follow_the_score_and_carry_no_gradient():
    rows = rows_of(6)

    def weigh(pairs, weight):
        return selection.soft_weights(pairs.score, 1.0, weight)

    _, output = run(rows, score_fn=score_fn, weight_fn=weigh)
    stats = logps_fn(params(), None, rows)
    pairs = score_fn(stats, rows.ref_logps_RS2)
    loss = step.pair_losses(losses.sigmoid(0.1), stats, rows.ref_logps_RS2)
    expected = np.sum(np.asarray(pairs.score * loss)) / np.sum(np.asarray(pairs.score))
    np.testing.assert_allclose(output.metrics["loss"], expected, rtol=1e-5)
    with pytest.raises(ValueError, match="score_fn"):
        step.make_train_step(logps_fn, losses.sigmoid(), optax.sgd(0.1), weight_fn=weigh)


def test_rows_that_do_not_divide_into_parts_are_an_error():
    with pytest.raises(ValueError, match=r"6 rows .* 4 accumulation parts"):
        run(rows_of(6), accumulate=4)


def test_eight_devices_take_the_step_of_one():
    rows, tx = rows_of(16), optax.adam(1e-2)
    train = step.make_train_step(logps_fn, losses.sigmoid(0.1), tx, score_fn=score_fn)
    found = []
    for count in (1, 8):
        mesh = meshes.make_mesh(devices=jax.devices()[:count])
        whole = meshes.replicated(mesh)
        inputs = (whole, None, meshes.batch_sharding(mesh))
        fn = jax.jit(train, in_shardings=inputs, out_shardings=whole)
        state = jax.device_put(step.init_state(params(), tx), whole)
        losses_seen = []
        for _ in range(5):
            state, output = fn(state, None, meshes.put(rows, mesh))
            losses_seen.append(float(output.metrics["loss"]))
        found.append(losses_seen)
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5)


def test_displacement_is_the_change_against_the_reference_in_nats_a_completion_token():
    rng = np.random.default_rng(3)
    tokens = rng.integers(1, 9, (5, 2)).astype(float)
    logps, reference = -3 * rng.random((5, 2)) * tokens, -3 * rng.random((5, 2)) * tokens
    zero = np.zeros((5, 2), np.float32)
    stats = logprobs.SequenceStats(np.float32(logps), np.float32(tokens), *[zero] * 5)
    weight = np.float32([1, 0.5, 0, 2, 1])  # the third pair is left out; the others count alike
    found = step.pair_metrics(stats, np.float32(reference), weight, 0.1)
    kept = weight > 0
    for side, name in enumerate(("chosen", "rejected")):
        total = tokens[kept, side].sum()
        per_token = logps[kept, side].sum() / total
        change = per_token - reference[kept, side].sum() / total
        np.testing.assert_allclose(found[f"logps/{name}_per_token"], per_token, rtol=1e-6)
        np.testing.assert_allclose(found[f"displacement/{name}"], change, rtol=1e-5)


@pytest.mark.parametrize("parts", [1, 2])
def test_a_traced_nll_weight_gives_the_step_of_the_fixed_one_in_one_trace(parts):
    tx, rows, traces = optax.sgd(0.1), rows_of(4), []

    def counted(p, frozen, b):
        traces.append(1)
        return logps_fn(p, frozen, b)

    loss = losses.sigmoid(0.1)
    fn = jax.jit(step.make_train_step(counted, loss, tx, accumulate=parts))
    state = step.init_state(params(), tx)
    for weight in (0.0, 0.5, 2.0):
        traced, output = fn(state, None, rows, step.Now(nll_weight=jnp.float32(weight)))
        fixed, expected = run(rows, nll_weight=weight, accumulate=parts)
        np.testing.assert_allclose(output.metrics["loss"], expected.metrics["loss"], rtol=1e-6)
        for name in traced.params:
            np.testing.assert_allclose(
                traced.params[name], fixed.params[name], rtol=1e-5, atol=1e-7
            )
    assert len(traces) == 1


def test_a_traced_exponent_gives_the_step_of_the_fixed_one_in_one_trace():
    tx, rows, traces = optax.sgd(0.1), rows_of(4), []

    def counted(p, frozen, b):
        traces.append(1)
        return logps_fn(p, frozen, b)

    def weigh(pairs, weight, tau):
        return selection.soft_weights(pairs.score, tau, weight)

    make = lambda fn, how: step.make_train_step(  # noqa: E731
        fn, losses.sigmoid(0.1), tx, score_fn=score_fn, weight_fn=how
    )
    fn, state = jax.jit(make(counted, weigh)), step.init_state(params(), tx)
    for tau in (0.0, 0.5, 2.0):
        traced, output = fn(state, None, rows, step.Now(soft=jnp.float32(tau)))
        fixed, expected = run(
            rows,
            score_fn=score_fn,
            weight_fn=lambda pairs, weight, tau=tau: weigh(pairs, weight, tau),
        )
        np.testing.assert_allclose(output.metrics["loss"], expected.metrics["loss"], rtol=1e-6)
        for name in traced.params:
            np.testing.assert_allclose(
                traced.params[name], fixed.params[name], rtol=1e-5, atol=1e-7
            )
    assert len(traces) == 1
    plain = step.make_train_step(logps_fn, losses.sigmoid(0.1), tx)
    with pytest.raises(ValueError, match="weight_fn"):
        plain(state, None, rows, step.Now(soft=0.5))


@pytest.mark.parametrize("parts", [1, 2])
def test_a_penalty_is_added_to_the_loss_and_reported(parts):
    def with_penalty(params, frozen, rows):
        mean_token = jnp.mean(jnp.asarray(rows.tokens_RT, jnp.float32))  # differs between parts
        return logps_fn(params, frozen, rows), mean_token * jnp.sum(params["head"] ** 2)

    tx, rows, first = optax.sgd(1.0), rows_of(4), params()
    outcomes = []
    for fn, settings in ((logps_fn, {}), (with_penalty, {"penalty_weight": 0.01})):
        train = step.make_train_step(fn, losses.sigmoid(0.1), tx, accumulate=parts, **settings)
        outcomes.append(jax.jit(train)(step.init_state(first, tx), None, rows))
    (plain, before), (moved, after) = outcomes
    penalty = rows.tokens_RT.mean() * np.sum(np.square(first["head"]))
    np.testing.assert_allclose(after.metrics["router_aux"], penalty, rtol=1e-5)
    np.testing.assert_allclose(
        after.metrics["loss"] - before.metrics["loss"], 0.01 * penalty, rtol=1e-4
    )
    pull = 0.01 * rows.tokens_RT.mean() * 2 * first["head"]  # its gradient, a step of size 1
    np.testing.assert_allclose(
        plain.params["head"] - moved.params["head"], pull, rtol=1e-3, atol=1e-5
    )
    assert "router_aux" not in before.metrics


@pytest.mark.parametrize("parts", [1, 2])
def test_an_unknown_reference_of_a_pair_without_weight_changes_nothing(parts):
    rows = rows_of(4)
    rows.weight_RS[2] = 0.0
    unknown = rows._replace(ref_logps_RS2=rows.ref_logps_RS2.copy())
    unknown.ref_logps_RS2[2] = np.nan
    known, a = run(rows, accumulate=parts)
    state, b = run(unknown, accumulate=parts)
    jax.tree.map(np.testing.assert_array_equal, state.params, known.params)
    jax.tree.map(np.testing.assert_array_equal, b.metrics, a.metrics)
    assert np.isfinite(state.params["embed"]).all()
