"""Reading a pickle as a description."""

import pickle

import pytest

from infir2.pickles import Record, read_pickle

GETATTR = b"\x80\x04\x8c\x08builtins\x8c\x07getattr\x93"
LAYOUT = "torch.Layout"


def call(owner: bytes, name: bytes) -> bytes:
    return GETATTR + owner + name + b"\x86R."


def text(value: bytes) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value


def class_named(module: bytes, name: bytes) -> bytes:
    return text(module) + text(name) + b"\x93"


def test_a_member_of_an_enum_is_described_as_other_pythons_write_it() -> None:
    """3.11.0 to 3.11.3, as Debian 12's, write getattr(class, name)."""
    found = read_pickle(call(class_named(b"torch", b"Layout"), text(b"X")), LAYOUT.__eq__)
    assert isinstance(found, Record)
    assert (found.name, found.args) == (LAYOUT, ("X",))


@pytest.mark.parametrize(
    "data",
    [
        call(class_named(b"os", b"system"), text(b"X")),
        call(text(b"Layout"), text(b"X")),
        call(class_named(b"builtins", b"getattr"), text(b"__self__")),
        call(class_named(b"torch", b"Layout"), b"K\x01"),
    ],
)
def test_getattr_is_nothing_else(data: bytes) -> None:
    with pytest.raises(ValueError, match="asks for"):
        read_pickle(data, LAYOUT.__eq__)
    alone = read_pickle(pickle.dumps(getattr), LAYOUT.__eq__)
    assert (alone.name, alone.args) == ("builtins.getattr", None)
