"""Names out of folders, names into sentences, sentences into one row a class."""

import numpy as np
import pytest

from mmsearch.errors import InputError
from mmsearch.evaluate.prompts import TEMPLATES, class_name, ensembled, filled, parse_templates


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("sea_horse", "sea horse"),
        ("t-shirt", "t shirt"),
        ("Faces_easy", "Faces easy"),
        ("BACKGROUND_Google", "BACKGROUND Google"),
        ("GoldenRetriever", "Golden Retriever"),
        ("DVDPlayer", "DVD Player"),
        ("TVs", "TVs"),
        ("iPhone", "iPhone"),
        ("001.Black_footed_Heron", "Black footed Heron"),
        ("n02085620-Chihuahua", "Chihuahua"),
        ("3d_printer", "3d printer"),
        ("747", "747"),
        ("crane (bird)", "crane (bird)"),
        ("  a__b ", "a b"),
        ("__", "__"),
        ("café_crème", "café crème"),
    ],
)
def test_a_folder_is_read_as_a_person_would(folder, name):
    """Separators and capitals part words, numbering in front goes, and there is always a name."""
    assert class_name(folder) == name


def test_the_bundled_templates_are_usable_and_different():
    """Each has one place for the name, and none comes twice."""
    assert parse_templates("\n".join(TEMPLATES), where="own") == TEMPLATES
    assert 20 <= len(set(TEMPLATES)) == len(TEMPLATES)


def test_comments_and_empty_lines_are_no_templates():
    """A file for people."""
    assert parse_templates("# mine\n\n  a {}  \nthe {}\n", where="t.txt") == ("a {}", "the {}")


@pytest.mark.parametrize(
    ("text", "where"), [("a {}\nno name\n", "t.txt:2"), ("{} and {}", "t.txt:1"), ("# a\n", "t.txt")]
)
def test_a_template_without_a_place_for_the_name_is_refused(text, where):
    """It would say the same of every class; the line is named."""
    with pytest.raises(InputError, match=where):
        parse_templates(text, where="t.txt")


def test_every_name_is_in_every_template():
    """Names side by side; braces in a name are no place to fill."""
    assert filled(["a{}b", "c"], ["my {}", "{}!"]) == ["my a{}b", "a{}b!", "my c", "c!"]


def test_a_class_is_the_direction_of_the_mean_of_its_sentences():
    """Known values: two orthogonal sentences give their diagonal, one sentence gives itself."""
    x, y, z = np.eye(3, dtype=np.float32)
    found = ensembled(np.stack([x, y, z, z]), templates=2)
    assert found == pytest.approx(np.array([(x + y) / np.sqrt(2), z]), abs=1e-6)
    assert (ensembled(np.stack([x, y]), templates=1) == np.stack([x, y])).all()
