"""Responses of one tokenizer in another one's tokens, on real text: Chinese, code, LaTeX, digits.

Two small tokenizers are trained here. LOPD_TEST_DATA and LOPD_OTHER_TOKENIZER name folders of real
ones, such as Qwen3's and SmolLM2's, which the same tests then take as well.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lopd.cache.token_alignment import Alignment
from lopd.errors import DataError
from lopd.tasks.alignment import chunk_sums
from lopd.tasks.cross_tokenizer import Plan, plan_response
from lopd.tasks.token_bytes import TokenBytes, byte_level_letters
from tests.two_tokenizers import END, TEXTS, write_byte_level, write_sentencepiece

REAL = (
    Path(os.environ.get("LOPD_TEST_DATA", "absent")) / "qwen3_tokenizer",
    Path(os.environ.get("LOPD_OTHER_TOKENIZER", "absent")),
)
PAIRS = ("byte_level-sentencepiece", "sentencepiece-byte_level", "real-other", "other-real")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TokenBytes]:
    folder = tmp_path_factory.mktemp("tokenizers")
    found = {
        "byte_level": TokenBytes(write_byte_level(folder / "byte_level")),
        "sentencepiece": TokenBytes(write_sentencepiece(folder / "sentencepiece")),
    }
    if all((path / "tokenizer.json").is_file() for path in REAL):
        found |= {"real": TokenBytes(REAL[0]), "other": TokenBytes(REAL[1])}
    return found


@pytest.fixture(params=PAIRS)
def pair(
    request: pytest.FixtureRequest, tokenizers: dict[str, TokenBytes]
) -> tuple[TokenBytes, TokenBytes]:
    names = str(request.param).split("-")
    if not set(names) <= tokenizers.keys():
        pytest.skip("LOPD_TEST_DATA and LOPD_OTHER_TOKENIZER name no two tokenizers")
    student, teacher = (tokenizers[name] for name in names)
    return student, teacher


def end_of(tokens: TokenBytes) -> int:
    end = tokens.find_special(END)
    assert end is not None
    return end


def plan(student: TokenBytes, teacher: TokenBytes, ids: Sequence[int]) -> Plan:
    return plan_response(student, teacher, ids, ends=(end_of(student),), other_end=end_of(teacher))


def scored(found: Plan, num_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """The teacher's made-up log-probabilities, and what comes back."""
    rng = np.random.default_rng(0)
    theirs = -rng.exponential(1.0, len(found.token_ids))
    return theirs, found.bring_back(theirs, -rng.exponential(1.0, num_tokens))


def test_the_letters_of_a_byte_level_tokenizer_are_all_bytes() -> None:
    letters = byte_level_letters()
    assert sorted(letters.values()) == list(range(256))
    assert (letters["Ġ"], letters["Ċ"], letters["ĉ"]) == (0x20, 0x0A, 0x09)


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_tokens_are_the_bytes_of_the_text(tokenizers: dict[str, TokenBytes], text: str) -> None:
    for tokens in tokenizers.values():
        _, pieces = tokens.encoded(text)
        assert b"".join(pieces) == text.encode()


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_real_text_is_aligned_as_a_whole(pair: tuple[TokenBytes, TokenBytes], text: str) -> None:
    student, teacher = pair
    ids = [*student.encode(text), end_of(student)]
    found = plan(student, teacher, ids)
    assert found.token_ids.tolist() == [*teacher.encode(text), end_of(teacher)]
    assert (found.alignment == Alignment.ALIGNED).all()
    # Both cut at the same byte often enough.
    assert len(found.student_ends) > 0.2 * min(len(ids), len(found.token_ids))
    theirs, brought = scored(found, len(ids))
    sums = chunk_sums(theirs, found.teacher_ends)
    np.testing.assert_allclose(chunk_sums(brought, found.student_ends), sums, rtol=1e-6, atol=1e-6)
    assert brought.sum(dtype=np.float64) == pytest.approx(theirs.sum(), rel=1e-6)
    # The end of the response of the one is that of the other.
    assert brought[-1] == np.float32(theirs[-1])


@given(text=st.text(max_size=40), cut=st.booleans())
def test_any_text_is_aligned_or_masked(
    tokenizers: dict[str, TokenBytes], text: str, *, cut: bool
) -> None:
    for names in (("byte_level", "sentencepiece"), ("sentencepiece", "byte_level")):
        student, teacher = (tokenizers[name] for name in names)
        ids = student.encode(text) + ([] if cut else [end_of(student)])
        if not ids:
            continue
        found = plan(student, teacher, ids)
        assert len(found.alignment) == len(ids)
        assert len(found.token_ids) >= 1
        theirs, brought = scored(found, len(ids))
        sums = chunk_sums(theirs, found.teacher_ends)
        reasons = found.alignment[found.student_ends - 1]
        has_tokens = np.diff(found.student_ends, prepend=0) > 0
        aligned = np.flatnonzero((reasons == Alignment.ALIGNED) & has_tokens)
        np.testing.assert_allclose(
            chunk_sums(brought, found.student_ends)[aligned], sums[aligned], rtol=1e-6, atol=1e-6
        )
        assert (brought[found.alignment != Alignment.ALIGNED] == 0).all()


def test_tokens_that_the_text_does_not_encode_to_are_masked(
    tokenizers: dict[str, TokenBytes],
) -> None:
    student, teacher = tokenizers["byte_level"], tokenizers["sentencepiece"]
    canonical = student.encode("the other things")
    # The first token letter by letter, as a model may sample it too.
    letters = [student.encode(letter)[0] for letter in "the"]
    assert canonical[0] not in letters
    sampled = [*letters, *canonical[1:], end_of(student)]
    alignment = plan(student, teacher, sampled).alignment
    assert (alignment[:3] == Alignment.NOT_CANONICAL).all()
    assert (alignment[-1] == Alignment.ALIGNED).all()
    assert (alignment == Alignment.ALIGNED).sum() >= 2
    # The control: the same text as its tokenizer encodes it.
    whole = plan(student, teacher, [*canonical, end_of(student)])
    assert (whole.alignment == Alignment.ALIGNED).all()


def test_what_a_normaliser_changes_is_masked(tokenizers: dict[str, TokenBytes]) -> None:
    """The student samples a letter and its accent apart; the teacher's tokenizer composes them."""
    student, teacher = tokenizers["sentencepiece"], tokenizers["byte_level"]
    text = unicodedata.normalize("NFD", "thin thé, thin things and this")
    found = plan(student, teacher, [*student.encode(text), end_of(student)])
    masked = found.alignment == Alignment.OTHER_TEXT
    assert 1 <= masked.sum() <= 6
    assert (found.alignment[~masked] == Alignment.ALIGNED).all()
    # The control: composed from the start.
    composed = student.encode(unicodedata.normalize("NFC", text))
    assert (plan(student, teacher, composed).alignment[:-1] != Alignment.OTHER_TEXT).all()


def test_bytes_that_are_no_text_are_masked(tokenizers: dict[str, TokenBytes]) -> None:
    student, teacher = tokenizers["sentencepiece"], tokenizers["byte_level"]
    # The first two bytes of a character of three.
    half = student.encode("山")[-3:-1]
    assert b"".join(student.pieces(half)) == "山".encode()[:2]
    ids = [*student.encode("these other"), *half, *student.encode("things and things")[1:]]
    found = plan(student, teacher, [*ids, end_of(student)])
    place = len(student.encode("these other"))
    assert (found.alignment[place : place + 2] == Alignment.OTHER_TEXT).all()
    assert found.alignment[0] == Alignment.ALIGNED
    assert found.alignment[-1] == Alignment.ALIGNED


def test_special_tokens_are_chunks_of_their_own(tokenizers: dict[str, TokenBytes]) -> None:
    student, teacher = tokenizers["byte_level"], tokenizers["sentencepiece"]
    image = student.find_special("<|image|>")
    shared = student.find_special("<|endoftext|>")
    assert image is not None
    assert shared is not None
    words = student.encode("the other")
    found = plan(student, teacher, [*words, image, *words, shared, *words, end_of(student)])
    place = len(words)
    assert found.alignment[place] == Alignment.SPECIAL
    # The teacher has a token of this name, so it is scored as that token.
    assert found.alignment[2 * place + 1] == Alignment.ALIGNED
    assert teacher.find_special("<|endoftext|>") in found.token_ids.tolist()
    assert (np.delete(found.alignment, place) == Alignment.ALIGNED).all()


def test_text_never_becomes_a_special_token(tokenizers: dict[str, TokenBytes]) -> None:
    """A response that spells out the end token, letter by letter, does not end for the teacher."""
    student, teacher = tokenizers["byte_level"], tokenizers["sentencepiece"]
    ids = student.encode(f"say {END} aloud")
    assert end_of(student) not in ids
    found = plan(student, teacher, ids)
    assert end_of(teacher) not in found.token_ids.tolist()
    # The control: the tokenizers library by itself makes the token of it.
    teacher._tokenizer.encode_special_tokens = False
    assert end_of(teacher) in teacher.encode(f"say {END} aloud")
    teacher._tokenizer.encode_special_tokens = True


def test_the_last_chunk_of_a_response_that_was_cut_off_is_masked(
    tokenizers: dict[str, TokenBytes],
) -> None:
    student, teacher = tokenizers["byte_level"], tokenizers["sentencepiece"]
    ids = student.encode("the other things are there")
    cut = plan(student, teacher, ids)
    assert cut.alignment[-1] == Alignment.CUT_OFF
    assert (cut.alignment == Alignment.ALIGNED).any()
    whole = plan(student, teacher, [*ids, end_of(student)])
    assert (whole.alignment == Alignment.ALIGNED).all()


def test_what_is_too_long_for_the_teacher_is_left_out(tokenizers: dict[str, TokenBytes]) -> None:
    student, teacher = tokenizers["byte_level"], tokenizers["sentencepiece"]
    ids = [*student.encode(TEXTS["chinese"]), end_of(student)]
    whole = plan(student, teacher, ids)
    assert len(whole.token_ids) > 2 * len(ids)
    for limit in (1, 7, 40, len(whole.token_ids) - 1):
        part = whole.within(limit)
        assert 1 <= len(part.token_ids) <= limit
        num_aligned = int((part.alignment == Alignment.ALIGNED).sum())
        assert set(part.alignment[num_aligned:].tolist()) == {Alignment.TOO_LONG}
        theirs, brought = scored(part, len(ids))
        # Whole chunks: what is asked for is what is used, and nothing more.
        assert num_aligned == 0 or brought.sum() == pytest.approx(theirs.sum(), rel=1e-5)
    assert whole.within(len(whole.token_ids)) is whole
    assert whole.within(1).alignment[0] == Alignment.TOO_LONG
    # A first chunk without any token of the teacher's.
    unknown = plan(student, teacher, [99_999, *ids]).within(1)
    assert len(unknown.token_ids) == len(unknown.forward(np.full(len(ids) + 1, -1.0))) == 1
    assert unknown.is_text().tolist() == [False]


def test_ids_without_a_token_are_masked(tokenizers: dict[str, TokenBytes]) -> None:
    """An embedding may have more rows than its tokenizer has tokens."""
    student, teacher = tokenizers["byte_level"], tokenizers["sentencepiece"]
    found = plan(student, teacher, [99_999, end_of(student)])
    assert found.alignment.tolist() == [Alignment.OTHER_TEXT, Alignment.ALIGNED]
    alone = plan(student, teacher, [99_999])
    assert len(alone.token_ids) == 1
    assert alone.bring_back(np.array([-1.0]), np.array([-1.0])).tolist() == [0.0]


def test_a_tokenizer_whose_tokens_are_no_pieces_is_refused(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]")).save(
        str(tmp_path / "tokenizer.json")
    )
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast"}'
    )
    with pytest.raises(DataError, match="WordPiece"):
        TokenBytes(tmp_path)
