"""A hostile pickle is read as plain values or refused, in bounded time and memory."""

import collections
import itertools
import pickle
import time
import tracemalloc

import pytest
from mutate_pickles import SNIPPETS, mutants
from readers import PICKLED

from infir2 import pickles
from infir2.pickles import Record, read_pickle


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_plain_values_are_read(protocol):
    assert read_pickle(pickle.dumps(PICKLED, protocol)) == PICKLED


def test_a_set_is_read_as_a_list():
    assert sorted(read_pickle(pickle.dumps({3, 4}))) == [3, 4]
    assert sorted(read_pickle(pickle.dumps(frozenset({3, 4})))) == [3, 4]


class Example:
    pass


def test_an_object_is_a_record_and_its_class_is_not_looked_up():
    example = Example()
    example.size = 3
    data = pickle.dumps(example).replace(b"Example", b"Missing")
    read = read_pickle(data, lambda name: name.endswith(".Missing"))
    assert isinstance(read, Record)
    assert (read.args, read.state) == ((), {"size": 3})
    with pytest.raises(ValueError, match=r"asks for '.*Missing', which no such file needs"):
        read_pickle(data)


def test_an_ordered_dict_with_attributes_is_a_dict():
    state_dict = collections.OrderedDict(a=1)
    state_dict._metadata = {"version": 1}
    assert read_pickle(pickle.dumps(state_dict), lambda name: True) == {"a": 1}


@pytest.mark.parametrize("seed", range(3))
def test_mutants_end_in_a_value_or_a_sentence(seed):
    tracemalloc.start()
    for name, data in itertools.islice(mutants(pickle.dumps(PICKLED), seed), 300):
        started = time.perf_counter()
        tracemalloc.reset_peak()
        sentence = ""
        try:
            read_pickle(data, lambda name: not name.startswith(("os.", "posix.", "builtins.")))
        except ValueError as error:
            sentence = str(error)
        assert sentence.isprintable(), name
        assert len(sentence) < 400, name
        assert time.perf_counter() - started < 20, name
        assert tracemalloc.get_traced_memory()[1] < 2**20 + 400 * len(data), name
    tracemalloc.stop()


@pytest.mark.parametrize("label", ["path-state", "slots-state"])
def test_a_state_changes_no_class_and_no_object_of_this_process(label):
    read = read_pickle(b"\x80\x04" + SNIPPETS[label] + b".", lambda name: True)
    assert isinstance(read, Record)
    with pytest.raises(ValueError, match="sets attributes of something that is no object"):
        read_pickle(b"\x80\x04" + SNIPPETS["class-state"] + b".", lambda name: True)


def test_the_number_of_operations_is_bounded(monkeypatch):
    monkeypatch.setattr(pickles, "MAX_OPCODES", 1000)
    with pytest.raises(ValueError, match="has more than 1,000 operations"):
        read_pickle(b"\x80\x04" + b"}" * 1001 + b".")
