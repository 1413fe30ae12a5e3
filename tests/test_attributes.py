"""common/attributes.py: CelebA's file of attributes, and everything that can be wrong with it."""

from pathlib import Path

import pytest

from common.attributes import TEN_ATTRIBUTES, attributes_of, read_attributes
from common.cli import UserError
from preparation.inspection import Report, inspect_attributes
from preparation.layout import write_attributes
from preparation.synthetic import looks

GOOD = "2\nBald Smiling \n000001.jpg -1  1\n000002.jpg  1 -1\n"


def write(tmp_path: Path, text: str) -> Path:
    """A file of attributes."""
    path = tmp_path / "attributes.txt"
    path.write_bytes(text.encode())
    return path


@pytest.mark.parametrize("text", [GOOD, GOOD.replace("\n", "\r\n"), GOOD + "\n\n", "\ufeff" + GOOD])
def test_values_are_found_by_name(text, tmp_path):
    table = read_attributes(write(tmp_path, text))
    assert table.of(["000002.png", "000001.png"], ["Smiling"]).tolist() == [[-1], [1]]
    assert table.of(["000001.jpg"], ["Smiling", "Bald"]).tolist() == [[1, -1]]


def test_the_order_of_the_columns_does_not_matter(tmp_path):
    other = "2\nSmiling Bald\n000002.jpg -1 1\n000001.jpg 1 -1\n"
    values = [
        read_attributes(write(tmp_path, text)).of(["000001.png", "000002.png"], ["Bald", "Smiling"])
        for text in (GOOD, other)
    ]
    assert values[0].tolist() == values[1].tolist()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "needs a line with the number"),
        ("0\nBald\n", "needs a line with the number"),
        (GOOD.replace("2\n", "3\n", 1), "line 1 should be 2, the number of rows, not 3"),
        (GOOD.replace("Bald Smiling", ""), "line 2 has no names"),
        (GOOD.replace("Smiling", "Bald"), "line 2 has the attribute Bald 2 times"),
        (GOOD.replace("000002", "000001"), "has rows for the image 000001 2 times"),
        (GOOD.replace(" 1 -1", " 1"), "line 4 has 1 values, but line 2 has 2 names"),
        (GOOD.replace(" 1 -1", " 1  0"), "line 4 has '0' for Smiling; values are 1 and -1"),
    ],
)
def test_a_malformed_file_is_one_clear_line(text, message, tmp_path):
    path = write(tmp_path, text)
    with pytest.raises(UserError, match=message) as error:
        read_attributes(path)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(UserError, match=r"face/list_attr_celeba.txt: there is no such file"):
        attributes_of(tmp_path)
    path = write(tmp_path, "\xff")
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="is not in UTF-8"):
        read_attributes(path)
    table = read_attributes(write(tmp_path, GOOD))
    with pytest.raises(UserError, match="has no attribute 'Hat'; it has Bald Smiling"):
        table.of([], ["Hat"])
    with pytest.raises(UserError, match=r"has no row for the image 7.png"):
        table.of(["7.png"], ["Bald"])


def test_synthetic_faces_have_the_ten_attributes_in_the_same_layout(tmp_path):
    assert looks.ATTRIBUTES == TEN_ATTRIBUTES
    (tmp_path / "face").mkdir()
    write_attributes(tmp_path / "face", looks.ATTRIBUTES, [("00000.png", [1, -1] * 5)])
    table = attributes_of(tmp_path)
    assert table.of(["00000.png"], ["Bald", "Black_Hair"]).tolist() == [[1, -1]]


def test_a_malformed_file_is_a_problem_of_the_data_folder(tmp_path):
    report = Report()
    inspect_attributes(write(tmp_path, GOOD), report)
    assert (report.rows, report.problems) == (
        [("face", "attributes", "2", "", "", "2 of each image")],
        [],
    )
    inspect_attributes(write(tmp_path, GOOD.replace("2\n", "9\n", 1)), report)
    assert ["line 1 should be 2" in problem for problem in report.problems] == [True]
