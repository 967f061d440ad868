"""The reference store: content keys, exact bits, damaged and stale files named."""

import hashlib
import logging
import multiprocessing
import os

import numpy as np
import pytest

from sage_jax import logprobs
from sage_jax.runtime import reference

SPACE = reference.space("f" * 32, "float32")


def digests(*names: str) -> np.ndarray:
    values = [hashlib.blake2b(name.encode(), digest_size=16).digest() for name in names]
    return np.frombuffer(b"".join(values), np.uint8).reshape(-1, 16)


def stats_of(digest_N16: np.ndarray) -> logprobs.SequenceStats:
    """Statistics that are a function of the content, as those of a real model are."""
    fields = []
    for number, name in enumerate(logprobs.SequenceStats._fields):
        rows = digest_N16[:, 2 * number : 2 * number + 2].astype(np.float32)
        fields.append(rows if name == "tokens" else -rows / np.float32(7))
    return logprobs.SequenceStats(*fields)


class Model:
    """Counts what it is asked to compute."""

    def __init__(self, digest_N16: np.ndarray, shift: float = 0.0):
        self.digest_N16, self.shift, self.asked = digest_N16, shift, []

    def __call__(self, index: np.ndarray) -> logprobs.SequenceStats:
        self.asked.append(index.tolist())
        stats = stats_of(self.digest_N16[index])
        return stats._replace(logps=stats.logps + np.float32(self.shift))


def assert_equal(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == np.float32
        np.testing.assert_array_equal(a, b)


def test_what_was_added_is_found_whatever_the_order_and_the_rest_is_not(tmp_path):
    store = reference.Store(tmp_path)
    first, second = digests("a", "b", "c"), digests("d", "e")
    store.add(SPACE, first, stats_of(first))
    store.add(SPACE, second, stats_of(second))
    asked = digests("e", "new", "a", "c", "e")
    stats, found = reference.Store(tmp_path).lookup(SPACE, asked)
    assert found.tolist() == [True, False, True, True, True]
    expected = stats_of(asked)
    for value, right in zip(stats, expected, strict=True):
        np.testing.assert_array_equal(value[found], right[found])
        assert (value[1] == 0).all()


def test_many_pairs_over_many_parts_match_a_dictionary(tmp_path):
    rng = np.random.default_rng(0)
    everything = rng.integers(0, 256, (3000, 16), dtype=np.uint8)
    everything[:50, 1:] = 0  # digests that begin or end with zero bytes are digests too
    everything[:50, 0] = np.arange(50)
    store, known = reference.Store(tmp_path), {}
    for part in np.array_split(rng.permutation(3000)[:2000], 7):
        store.add(SPACE, everything[part], stats_of(everything[part]))
        known.update({everything[i].tobytes(): stats_of(everything[i][None]) for i in part})
    stats, found = store.lookup(SPACE, everything)
    assert found.tolist() == [d.tobytes() in known for d in everything]
    for i in np.flatnonzero(found)[::97]:
        right = known[everything[i].tobytes()]
        assert all((a[i] == b[0]).all() for a, b in zip(stats, right, strict=True))


def test_an_empty_store_and_an_empty_question(tmp_path):
    store = reference.Store(tmp_path / "missing")
    assert not store.lookup(SPACE, digests("a"))[1].any()
    store.add(SPACE, digests(), stats_of(digests()))
    assert not (tmp_path / "missing").exists()
    stats, found = store.lookup(SPACE, digests())
    assert stats.logps.shape == (0, 2)
    assert found.shape == (0,)


def test_other_weights_dtype_or_policy_is_another_space(tmp_path):
    spaces = {
        SPACE,
        reference.space("e" * 32, "float32"),
        reference.space("f" * 32, "bfloat16"),
        reference.space("f" * 32, "float32", logit_norm=True),
        reference.space("f" * 31 + "e", "float32"),
    }
    assert len(spaces) == 5
    store = reference.Store(tmp_path)
    store.add(SPACE, digests("a"), stats_of(digests("a")))
    for other in spaces - {SPACE}:
        assert not store.lookup(other, digests("a"))[1].any()


def test_fill_computes_only_what_is_missing_and_equal_pairs_once(tmp_path):
    store = reference.Store(tmp_path)
    data = digests("a", "b", "a", "c")
    model = Model(data)
    assert_equal(reference.fill(store, SPACE, data, model, spot_check=2), stats_of(data))
    assert model.asked == [[0, 1, 3]]

    more = digests("x", "c", "b", "y")  # rows removed, added and moved
    model = Model(more)
    assert_equal(reference.fill(store, SPACE, more, model, spot_check=0), stats_of(more))
    assert model.asked == [[0, 3]]

    model = Model(more)
    assert_equal(reference.fill(store, SPACE, more, model, spot_check=2), stats_of(more))
    (checked,) = model.asked
    assert len(checked) == 2


def test_fill_returns_the_stored_bits_not_those_of_the_spot_check(tmp_path):
    data = digests("a", "b")
    reference.fill(reference.Store(tmp_path), SPACE, data, Model(data))
    again = reference.fill(reference.Store(tmp_path), SPACE, data, Model(data, shift=1e-3))
    assert_equal(again, stats_of(data))


def test_a_stale_file_is_refused_by_name_with_the_fix(tmp_path):
    store, data = reference.Store(tmp_path), digests("a", "b", "c")
    reference.fill(store, SPACE, data, Model(data))
    (file,) = store.files(SPACE)
    with pytest.raises(ValueError) as error:
        reference.fill(store, SPACE, data, Model(data, shift=50.0))
    message = str(error.value)
    assert f"{file} is stale" in message
    assert "Delete that file" in message
    assert "\n" not in message


@pytest.mark.parametrize("damage", ["truncated", "flipped bit", "empty", "other file", "renamed"])
def test_a_damaged_file_is_named_once_and_its_pairs_are_computed_again(tmp_path, caplog, damage):
    first, data = digests("a"), digests("a", "b")
    store = reference.Store(tmp_path)
    store.add(SPACE, first, stats_of(first))
    (file,) = store.files(SPACE)
    content = file.read_bytes()
    if damage == "renamed":  # into a space of other weights
        space = reference.space("e" * 32, "float32")
        (tmp_path / space).mkdir()
        file = file.rename(tmp_path / space / file.name)
    else:
        space = SPACE
        file.write_bytes({
            "truncated": content[:-9],
            "flipped bit": content[:-1] + bytes([content[-1] ^ 1]),
            "empty": b"",
            "other file": b"{}" * 100,
        }[damage])  # fmt: skip
    store, model = reference.Store(tmp_path), Model(data)
    with caplog.at_level(logging.WARNING):
        assert_equal(reference.fill(store, space, data, model), stats_of(data))
        assert store.lookup(space, data)[1].all()
    assert model.asked == [[0, 1]]
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 1
    assert str(file) in lines[0]
    assert "Delete it" in lines[0]


def test_unfinished_files_are_ignored(tmp_path):
    store = reference.Store(tmp_path)
    store.add(SPACE, digests("a"), stats_of(digests("a")))
    (file,) = store.files(SPACE)
    os.rename(file, file.with_suffix(".tmp"))
    assert not store.lookup(SPACE, digests("a"))[1].any()


def test_where_two_runs_stored_a_pair_the_older_value_counts(tmp_path):
    one, two, data = reference.Store(tmp_path), reference.Store(tmp_path), digests("a")
    assert not two.lookup(SPACE, data)[1].any()  # both looked before either wrote
    one.add(SPACE, data, stats_of(data))
    two.add(SPACE, data, Model(data, shift=0.5)(np.array([0])))
    for store in (one, two, reference.Store(tmp_path)):
        assert_equal(store.lookup(SPACE, data)[0], stats_of(data))


def write(directory, name):
    data = digests(*(f"{name}{i}" for i in range(40)), *(f"common{i}" for i in range(40)))
    reference.fill(reference.Store(directory), SPACE, data, Model(data))


def test_several_processes_share_a_store(tmp_path):
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=write, args=(tmp_path, name)) for name in "ab"]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
        assert worker.exitcode == 0
    data = digests("a0", "b39", "common7")
    stats, found = reference.Store(tmp_path).lookup(SPACE, data)
    assert found.all()
    assert_equal(stats, stats_of(data))


def test_what_is_not_finite_is_never_stored(tmp_path):
    data = digests("a", "b")
    bad = stats_of(data)
    bad.logps[1, 0] = np.nan
    with pytest.raises(ValueError, match="logps=nan for pair 1 of the 2 computed"):
        reference.Store(tmp_path).add(SPACE, data, bad)
    assert list(tmp_path.iterdir()) == []


def test_shapes_that_do_not_agree_are_refused(tmp_path):
    store, data = reference.Store(tmp_path), digests("a", "b")
    with pytest.raises(ValueError, match=r"logps has the shape \(1, 2\); 2 digests need \(2, 2\)"):
        store.add(SPACE, data, stats_of(data[:1]))
    with pytest.raises(ValueError, match=r"must be uint8 \[N, 16\]"):
        store.lookup(SPACE, data[:, :8])
