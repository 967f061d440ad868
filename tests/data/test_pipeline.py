"""The loader: in order, from any position, shared by processes, and loud when it fails."""

import functools
import threading
import time

import jax
import numpy as np
import pytest

from sage_jax.data import encode, pack, pipeline, pool, records

ROW_LENGTH, ROWS, SLOTS = 56, 4, 3  # two of the longest pairs fit into a row


@pytest.fixture(scope="module")
def pairs():
    rng = np.random.default_rng(0)

    def draw():
        return rng.integers(1, 50, rng.integers(1, 8)).tolist()

    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return encode.encode(
        records.read([{name: draw() for name in names} for _ in range(101)]), None, max_length=99
    )


@pytest.fixture(scope="module")
def plan(pairs):
    order = np.random.default_rng(1).permutation(len(pairs))
    return pack.plan(
        pairs.lengths_N2, order, row_length=ROW_LENGTH, rows=ROWS, slots=SLOTS, batch_pairs=6
    )


def equal(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(x, y, equal_nan=True) for x, y in pairs)  # nan: no reference


@pytest.mark.parametrize("threads", [0, 1, 3])
@pytest.mark.parametrize("start", [0, 1, 7, 15, 16])
def test_starting_at_k_gives_the_tail_of_an_uninterrupted_run(pairs, plan, threads, start):
    assert len(plan) == 16
    whole = [pack.collate(pairs, pair_RS, ROW_LENGTH) for pair_RS in plan]  # without the loader
    tail = list(pipeline.batches(pairs, plan, ROW_LENGTH, start=start, threads=threads))
    assert len(tail) == len(whole) - start
    assert all(equal(a, b) for a, b in zip(whole[start:], tail, strict=True))


def test_references_and_weights_reach_the_batches(pairs, plan):
    ref = np.arange(2.0 * len(pairs)).reshape(-1, 2)
    weight = np.arange(1.0, len(pairs) + 1)
    for rows in pipeline.batches(pairs, plan, ROW_LENGTH, ref_logps_N2=ref, weight_N=weight):
        real = rows.pair_RS >= 0
        np.testing.assert_array_equal(rows.ref_logps_RS2[real], ref[rows.pair_RS[real]])
        np.testing.assert_array_equal(rows.weight_RS[real], weight[rows.pair_RS[real]])


def test_each_process_builds_its_own_rows_and_no_others(pairs, plan, monkeypatch):
    whole = list(pipeline.batches(pairs, plan, ROW_LENGTH))
    count, asked = plan.shape[1], []
    real = pack.collate
    monkeypatch.setattr(pack, "collate", lambda p, rows, *a, **k: asked.append(rows.shape[0])
                        or real(p, rows, *a, **k))  # fmt: skip
    odd = np.arange(1, count, 2)  # the rows of a process need not lie side by side
    for rows_L in (odd, np.arange(0, count, 2)):
        for all_rows, own in zip(
            whole, pipeline.batches(pairs, plan, ROW_LENGTH, rows_L=rows_L), strict=True
        ):
            take = functools.partial(np.take, indices=rows_L, axis=0)
            assert equal(jax.tree.map(take, all_rows), own)
    assert sum(asked) == plan.shape[0] * count


def test_wrong_rows_and_positions_are_refused(pairs, plan):
    with pytest.raises(ValueError, match="each must lie in"):
        pipeline.batches(pairs, plan, ROW_LENGTH, rows_L=np.array([0, plan.shape[1]]))
    with pytest.raises(ValueError, match="outside the plan"):
        pipeline.batches(pairs, plan, ROW_LENGTH, start=17)


class Failing:
    """A source that fails at one element in a given way."""

    def __init__(self, failure, at=5):
        self.failure, self.at = failure, at

    def __len__(self):
        return 12

    def __getitem__(self, k):
        if k == self.at and self.failure is not None:
            raise self.failure
        return None if k == self.at else k

    def __repr__(self):
        return "Failing()"


@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize(
    "failure", [ValueError("bad"), StopIteration(), IndexError(5), KeyError("x"), None], ids=repr
)
def test_a_failing_loader_raises_and_never_looks_like_the_end(failure, threads):
    seen = []
    with pytest.raises(RuntimeError, match="batch 5 of Failing"):
        for k in pipeline.iterate(Failing(failure), threads=threads, prefetch=2):
            seen.append(k)
    assert seen == [0, 1, 2, 3, 4]


def test_a_corrupt_plan_ends_the_run_with_an_error(pairs, plan):
    broken = plan.copy()
    broken[3, 0, 0] = len(pairs) + 7
    iterator = pipeline.batches(pairs, broken, ROW_LENGTH)
    with pytest.raises(RuntimeError, match="Building batch 3"):
        list(iterator)


def test_closing_the_iterator_ends_its_threads(pairs, plan):
    before = threading.active_count()
    iterator = pipeline.batches(pairs, plan, ROW_LENGTH, threads=2)
    next(iterator)
    iterator.close()
    deadline = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before


def test_the_source_describes_itself_briefly(pairs, plan):
    source = pool.PlannedBatches(pairs, plan, ROW_LENGTH)
    assert repr(source) == "PlannedBatches(shape=(16, 4, 3), row_length=56)"
    assert len(source) == 16
