"""Whatever others raise becomes one sentence of ours."""

import json

import pytest
import tokenizers

from melayer.errors import InputError, MelayerError, ModelError, border, reason


def encoded(error: BaseException) -> str:
    with pytest.raises(ModelError) as raised, border("It cannot be read", "Give another.", error=ModelError):
        raise error
    return str(raised.value)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("first\nsecond"), "first"),
        (ValueError(), "ValueError"),
        (KeyError("heads"), "KeyError: 'heads'"),
        (FileNotFoundError(2, "No such file or directory"), "No such file or directory"),
        (RecursionError("maximum recursion depth exceeded"), "it is nested too deeply"),
        (MemoryError(), "it does not fit into memory"),
        (OverflowError("too large."), "too large"),
        (ValueError("x" * 1000), "x" * 299 + "…"),
    ],
)
def test_each_error_is_a_sentence(error: Exception, said: str) -> None:
    assert encoded(error) == f"It cannot be read: {said}. Give another."


def test_encodings() -> None:
    with pytest.raises(UnicodeEncodeError) as of_encoding:
        "a\ud800".encode()
    with pytest.raises(UnicodeDecodeError) as of_decoding:
        b"a\xff".decode()
    assert reason(of_encoding.value) == r"'\ud800' is no character that can be written as utf-8"
    assert reason(of_decoding.value) == "byte 1 is not utf-8"


def test_a_panic_of_another_language_is_an_error() -> None:
    panic = type("PanicException", (BaseException,), {})
    assert encoded(panic("index out of bounds")) == "It cannot be read: index out of bounds. Give another."


def test_a_lone_surrogate_in_a_tokenizer() -> None:
    """What tokenizers says of it is not for people; it is one sentence all the same."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    with (
        pytest.raises(InputError, match=r"^Row 3 cannot be tokenised: .+\. Leave it out\.$"),
        border("Row 3 cannot be tokenised", "Leave it out."),
    ):
        tokenizer.encode("\ud800")


def test_deep_json() -> None:
    with pytest.raises(InputError, match=r"nested too deeply"), border("It cannot be read", "Give another."):
        json.loads("[" * 100_000)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_what_stops_a_program_passes(error: type[BaseException]) -> None:
    with pytest.raises(error), border("It cannot be read", "Give another."):
        raise error


def test_what_is_ours_passes_as_it_is() -> None:
    ours = MelayerError("ours")
    with pytest.raises(MelayerError) as raised, border("It cannot be read", "Give another."):
        raise ours
    assert raised.value is ours
