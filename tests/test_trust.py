"""The room trust: small files, and names that become paths."""
import errno
import os

import pytest

from trust.errors import BadInput
from trust.files import check_file, check_inside, check_name, read_json, writing


# ---- files -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_only_files_are_opened(make, tmp_path):
    path = tmp_path / "a.json"
    make(path)
    for read in (check_file, read_json):
        with pytest.raises(BadInput, match=f"{path} is "):
            read(path)


def test_files_that_are_missing_or_impossible(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file: .*nothing"):
        check_file(tmp_path / "nothing")
    for path in ("a\0b", "x" * 5000):
        with pytest.raises(BadInput, match="cannot use"):
            check_file(path)


NO_JSON = [
    (b'{"a": 1, "a": 2}', "the key 'a' comes twice"),
    (b'{"b": {"a": 1, "a": 1}}', "the key 'a' comes twice"),
    (b'{"a": NaN}', "NaN is no number"),
    (b'{"a": -Infinity}', "-Infinity is no number"),
    (b"[1]", "a dict expected"),
    (b'{"a": "\xff"}', "UnicodeDecodeError"),
    (b"[" * 100_000, "RecursionError"),
    (b"", "JSONDecodeError"),
]


@pytest.mark.parametrize("content, message", NO_JSON)
def test_json_that_is_none_is_named(content, message, tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(BadInput, match=message) as error:
        read_json(path)
    assert str(path) in str(error.value)


def test_a_byte_order_mark_is_skipped(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(path) == {"a": 1}


def test_a_full_disk_names_its_file(tmp_path):
    with pytest.raises(OSError, match="cannot write a.png .No space left on device"):
        with writing("a.png"):
            raise OSError(errno.ENOSPC, "No space left on device")
    # A name that is known stays.
    with pytest.raises(OSError, match="nothing"):
        with writing("a.png"):
            open(tmp_path / "nothing")


# ---- names -----------------------------------------------------------------------------------------
GOOD = ["00000", "img_0000001", "-CiPki3XuVI", "a b", "é", "视频", ".hidden", "a..b", "x" * 200, "a.partial.b"]
BAD = ["", ".", "..", "a\\b", "a\nb", "a\0b", "\ud83d", "\u202e", "x" * 201, "é" * 101]
BAD += ["a.partial", 5, None, ["a"]]
PATHS = ["UVO/all/-CiPki3XuVI", "a/.b/c"]
NO_PATHS = ["/a", "a/", "a//b", "a/../b", "../a", "a/.", "a.partial/b"]


@pytest.mark.parametrize("name", GOOD)
def test_names_of_files(name):
    assert check_name(name, "here") == name
    assert check_name(name, "here", slashes=True) == name


@pytest.mark.parametrize("name", BAD)
def test_names_that_no_file_of_ours_has(name):
    for slashes in (False, True):
        with pytest.raises(BadInput, match="the name .*: here") as error:
            check_name(name, "here", slashes)
        assert str(error.value).isprintable()


@pytest.mark.parametrize("name", PATHS + NO_PATHS)
def test_names_of_several_parts(name):
    with pytest.raises(BadInput, match="here"):
        check_name(name, "here")
    if name in PATHS:
        assert check_name(name, "here", slashes=True) == name
        return
    with pytest.raises(BadInput, match="here"):
        check_name(name, "here", slashes=True)


def test_what_is_written_lies_inside(tmp_path):
    check_inside(f"{tmp_path}/a/b", f"{tmp_path}/a")
    check_inside("a/b", "a")
    for path in ("a", "a/..", "a/../b", "/", "ab", "a/../../x"):
        with pytest.raises(BadInput, match="is not inside"):
            check_inside(path, "a")
