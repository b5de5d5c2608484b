"""Names of classes as sentences, and rows made from them."""

import pytest
import torch
from torch.nn import functional

from mmsearch.errors import InputError, UsageError
from mmsearch.towers.anchor_names import class_rows, imagenet_prompts, prompts, read_prompts


def test_imagenet_has_a_sentence_or_two_for_each_of_its_classes():
    """In the classifier's order: 0 is the tench, 340 the zebra, 999 toilet tissue."""
    sentences, owners = imagenet_prompts(2)
    assert set(owners) == set(range(1000))
    assert owners == sorted(owners)
    assert sentences[:2] == ["a photo of a tench", "a photo of a Tinca tinca"]
    assert [sentences[owners.index(i)] for i in (340, 999)] == ["a photo of a zebra", "a photo of a toilet tissue"]
    assert len(imagenet_prompts(1)[0]) == 1000 < len(sentences) < len(imagenet_prompts(9)[0])


def test_synonyms_are_stripped_cut_and_never_repeated():
    """Two classes; the first names itself twice."""
    found = prompts([["cat ", " cat", "", "tomcat", "mouser"], ["dog"]], synonyms=2, template="the {}")
    assert found == (["the cat", "the tomcat", "the dog"], [0, 0, 1])


def test_names_come_from_a_file_a_line_a_class(tmp_path):
    """With a byte order mark, Windows line ends and a last line without end."""
    path = tmp_path / "names.txt"
    path.write_bytes("\ufeffcat, tomcat\r\nhot dog".encode())
    assert read_prompts(path, template="{}") == (["cat", "tomcat", "hot dog"], [0, 0, 1])


@pytest.mark.parametrize("content", [b"cat\n\ndog\n", b"", b" , ,\ncat", b"\xff\xfe"])
def test_a_file_that_leaves_a_class_without_a_name_is_refused(tmp_path, content):
    """Line numbers are class numbers."""
    path = tmp_path / "names.txt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"names\.txt"):
        read_prompts(path)
    with pytest.raises(InputError, match="nowhere"):
        read_prompts(tmp_path / "nowhere")


@pytest.mark.parametrize("settings", [{"synonyms": 0}, {"template": "no place"}, {"template": "{} {}"}])
def test_impossible_prompts_are_refused(settings):
    """Before a thousand sentences are made."""
    with pytest.raises(UsageError):
        prompts([["cat"]], **settings)


def test_a_class_is_the_mean_direction_of_its_sentences():
    """(1, 0) and (0, 1) give the diagonal; a single sentence gives itself."""
    rows = class_rows(torch.tensor([[1.0, 0.0], [0.0, -1.0], [0.0, 1.0]]), [0, 1, 0], classes=2)
    assert torch.allclose(rows, torch.tensor([[0.5**0.5, 0.5**0.5], [0.0, -1.0]]))


def test_the_first_name_of_a_class_may_weigh_more():
    """Known value: first name (1, 0) with weight 3 and a synonym (0, 1) point to (3, 1)."""
    rows = class_rows(torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), [0, 1, 0], classes=2, first=3.0)
    assert torch.allclose(rows, torch.tensor([[3.0, 1.0], [10.0**0.5, 0.0]]) / 10**0.5)


def test_class_rows_carry_gradients_to_the_sentences():
    """So that names may be part of a training step."""
    rows = functional.normalize(torch.randn(4, 3, dtype=torch.float64), dim=-1).requires_grad_()
    assert torch.autograd.gradcheck(lambda r: class_rows(r, [0, 1, 1, 0], classes=2), (rows,))


@pytest.mark.parametrize(("owners", "classes"), [([0, 0], 2), ([0, 1], 1), ([0], 1)])
def test_every_class_needs_a_sentence_and_every_sentence_a_class(owners, classes):
    """A zero row would be a class that nothing resembles."""
    with pytest.raises(UsageError, match="anchor names"):
        class_rows(torch.eye(2), owners, classes=classes)
