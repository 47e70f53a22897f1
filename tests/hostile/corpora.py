"""Texts and rows as hostile and unlucky people give them, made by code: each builder writes one and says where.

`TEXTS` are for `--file` and `--data` of every command that reads texts; `ROWS` for the data of `tune`; `BENCHMARKS` for
the directory that `eval --data` takes. Each is a function of an empty directory and returns the path to hand over.
`GOOD` says of each how many good texts (or rows) it holds: 0 means that the input is refused as a whole.
"""

import csv
import gzip
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import small_benchmarks

Builder = Callable[[Path], Path]

WORDS = "w1 w2 X w3 w4 w5 w6 w7 w8 w9 w10 w11"
"""A text that toy tokenizers know, long enough to vote."""
DEEP = "[" * 100_000 + "]" * 100_000
HUGE_INTEGER = "1" * 5_000

TEXTS: dict[str, Builder] = {}
ROWS: dict[str, Builder] = {}
BENCHMARKS: dict[str, Builder] = {}
GOOD: dict[str, int] = {}


def of(kind: dict[str, Builder], good: int) -> Callable[[Builder], Builder]:
    """Keeps a builder under the name of its function."""

    def kept(builder: Builder) -> Builder:
        kind[builder.__name__] = builder
        GOOD[builder.__name__] = good
        return builder

    return kept


def texts(n: int = 4) -> list[str]:
    return [f"{WORDS} w{20 + place}" for place in range(n)]


def lines(*values: Any) -> bytes:
    """JSON lines; what is bytes already stands as it is."""
    return b"".join((value if isinstance(value, bytes) else json.dumps(value).encode()) + b"\n" for value in values)


def bad_lines(good: dict[str, Any], column: str) -> list[Any]:
    """Every kind of bad row as a line."""
    return [
        b"null",
        b"3",
        b'"a string"',
        b"[1, 2]",
        b"{}",
        b"{",
        b"\x00\x00\x00",
        DEEP.encode(),
        b'{"%s": %s}' % (column.encode(), DEEP.encode()),
        b'{"%s": "w1 \\ud800 w2"}' % column.encode(),
        b'{"%s": "w1 \xff w2"}' % column.encode(),
        b'{"%s": "caf\xe9"}' % column.encode(),
        b'{"n": %s, "%s": 1}' % (HUGE_INTEGER.encode(), column.encode()),
        b'{"%s": NaN}' % column.encode(),
        b'{"%s": 1e999}' % column.encode(),
        {**good, column: None},
        {**good, column: 3},
        {**good, column: []},
        {**good, column: {"a": 1}},
        {**good, column: ""},
        {**good, column: "  \n"},
        {"other": "w1"},
    ]


# --- texts: what one reader has to tell apart ------------------------------------------------------------------------


@of(TEXTS, 4)
def json_lines(directory: Path) -> Path:
    path = directory / "c.jsonl"
    path.write_bytes(lines(*({"text": text, "kind": "a"} for text in texts())))
    return path


@of(TEXTS, 4)
def json_lines_called_txt(directory: Path) -> Path:
    path = directory / "c.txt"
    path.write_bytes(lines(*({"text": text} for text in texts())))
    return path


@of(TEXTS, 4)
def plain_text_called_jsonl(directory: Path) -> Path:
    path = directory / "c.jsonl"
    path.write_text("\n".join(texts()))
    return path


@of(TEXTS, 4)
def json_lines_without_a_suffix(directory: Path) -> Path:
    path = directory / "corpus"
    path.write_bytes(lines(*({"content": text} for text in texts())))
    return path


@of(TEXTS, 4)
def json_list_of_objects(directory: Path) -> Path:
    path = directory / "c.json"
    path.write_text(json.dumps([{"text": text} for text in texts()], indent=2))
    return path


@of(TEXTS, 4)
def json_list_of_strings(directory: Path) -> Path:
    path = directory / "c.json"
    path.write_text(json.dumps(texts()))
    return path


@of(TEXTS, 0)
def json_list_cut_off(directory: Path) -> Path:
    path = directory / "c.json"
    path.write_text(json.dumps([{"text": text} for text in texts()], indent=2)[:-60])
    return path


@of(TEXTS, 0)
def json_lines_of_unknown_columns(directory: Path) -> Path:
    path = directory / "c.jsonl"
    path.write_bytes(lines(*({"this": text, "that": 1} for text in texts())))
    return path


@of(TEXTS, 2)
def json_lines_with_every_bad_row(directory: Path) -> Path:
    path = directory / "c.jsonl"
    good = [{"text": text, "kind": "a"} for text in texts(2)]
    path.write_bytes(lines(good[0], *bad_lines(good[0], "text"), good[1]))
    return path


@of(TEXTS, 2)
def a_first_row_that_is_bad(directory: Path) -> Path:
    path = directory / "c.jsonl"
    path.write_bytes(lines(b'{"text": "w1 \\ud800"}', b"null", *({"text": text} for text in texts(2))))
    return path


@of(TEXTS, 0)
def json_lines_all_bad(directory: Path) -> Path:
    path = directory / "c.jsonl"
    path.write_bytes(lines(*bad_lines({"text": "w1"}, "text")))
    return path


@of(TEXTS, 0)
def a_hundred_thousand_brackets(directory: Path) -> Path:
    path = directory / "c.jsonl"
    path.write_text(DEEP + "\n")
    return path


@of(TEXTS, 8)
def categories_that_are_odd(directory: Path) -> Path:
    """All are texts but the row with the integer; under `--category kind` names are asked for."""
    path = directory / "c.jsonl"
    odd = [b'"a\\ud800"', b"null", b"[1]", b'{"a": 1}', b"1e999", b'"\\u0000"', HUGE_INTEGER.encode()]
    rows = [b'{"text": "w1 w2 w3 w4 w5 w6 w7 w8 w9", "kind": %s}' % kind for kind in odd]
    path.write_bytes(lines(*rows, *({"text": text, "kind": "a"} for text in texts(2))))
    return path


@of(TEXTS, 2)
def a_row_with_a_column_twice(directory: Path) -> Path:
    path = directory / "c.jsonl"
    path.write_bytes(lines({"text": texts(2)[0]}, b'{"text": "w1 w2 w3", "text": "w4 w5 w6"}'))
    return path


# --- texts: encodings and what ends a line ----------------------------------------------------------------------------


def _encoded(encoding: str, mark: bytes = b"") -> Builder:
    def builder(directory: Path) -> Path:
        path = directory / "c.txt"
        path.write_bytes(mark + "\n".join([*texts(3), "w1 naïve 清 w2 w3 w4 w5 w6 w7"]).encode(encoding))
        return path

    return builder


for _name, _encoding, _mark in (
    ("utf8_with_a_mark", "utf-8", b"\xef\xbb\xbf"),
    ("utf16_le_with_a_mark", "utf-16-le", b"\xff\xfe"),
    ("utf16_be_with_a_mark", "utf-16-be", b"\xfe\xff"),
    ("utf32_le_with_a_mark", "utf-32-le", b"\xff\xfe\0\0"),
    ("utf32_be_with_a_mark", "utf-32-be", b"\0\0\xfe\xff"),
):
    TEXTS[_name] = _encoded(_encoding, _mark)
    GOOD[_name] = 4
for _name, _encoding in (("utf16_le_without_a_mark", "utf-16-le"), ("utf16_be_without_a_mark", "utf-16-be")):
    TEXTS[_name] = _encoded(_encoding)
    GOOD[_name] = 0


@of(TEXTS, 0)
def latin_1(directory: Path) -> Path:
    path = directory / "c.txt"
    path.write_bytes("\n".join(f"café {text}" for text in texts()).encode("latin-1"))
    return path


@of(TEXTS, 3)
def one_line_that_is_not_utf8(directory: Path) -> Path:
    path = directory / "c.txt"
    path.write_bytes(b"\n".join([*(text.encode() for text in texts(3)), b"w1 \xff\xfe w2"]))
    return path


@of(TEXTS, 4)
def other_separators(directory: Path) -> Path:
    """None of these ends a line: U+2028, U+2029, U+0085, form feed, vertical tab, the separators FS, GS and RS."""
    path = directory / "c.txt"
    odd = "\u2028\u2029\x85\x0c\x0b\x1c\x1d\x1e"
    path.write_text("\n".join(f"{text} {odd} w1" for text in texts()), encoding="utf-8")
    return path


@of(TEXTS, 4)
def lines_end_in_crlf(directory: Path) -> Path:
    path = directory / "c.txt"
    path.write_bytes("\r\n".join(texts()).encode())
    return path


@of(TEXTS, 1)
def lone_carriage_returns(directory: Path) -> Path:
    path = directory / "c.txt"
    path.write_bytes("\r".join(texts()).encode())
    return path


@of(TEXTS, 4)
def blank_lines(directory: Path) -> Path:
    path = directory / "c.txt"
    path.write_text("\n\n  \n\t\n".join(["", *texts(), ""]))
    return path


@of(TEXTS, 0)
def only_blank_lines(directory: Path) -> Path:
    path = directory / "c.txt"
    path.write_text("\n \n\t\n\r\n")
    return path


@of(TEXTS, 0)
def empty(directory: Path) -> Path:
    path = directory / "c.txt"
    path.touch()
    return path


@of(TEXTS, 0)
def a_mark_and_nothing_else(directory: Path) -> Path:
    path = directory / "c.txt"
    path.write_bytes(b"\xef\xbb\xbf")
    return path


@of(TEXTS, 0)
def zero_bytes_alone(directory: Path) -> Path:
    path = directory / "c.txt"
    path.write_bytes(bytes(100_000))
    return path


@of(TEXTS, 3)
def a_line_with_zero_bytes(directory: Path) -> Path:
    path = directory / "c.txt"
    path.write_text("\n".join([*texts(3), "w1 \0 w2"]))
    return path


@of(TEXTS, 0)
def binary(directory: Path) -> Path:
    path = directory / "c.txt"
    path.write_bytes(bytes((7 * place * place + 13 * place) % 256 for place in range(50_000)))
    return path


@of(TEXTS, 0)
def an_archive(directory: Path) -> Path:
    import zipfile

    path = directory / "c.txt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "\n".join(texts()))
    return path


@of(TEXTS, 0)
def a_checkpoint(directory: Path) -> Path:
    path = directory / "model.safetensors"
    header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    return path


@of(TEXTS, 3)
def a_line_of_five_megabytes(directory: Path) -> Path:
    path = directory / "c.txt"
    path.write_text("\n".join([*texts(2), "w7 w8 " * 800_000]))
    return path


# --- texts: compressed and parquet -----------------------------------------------------------------------------------


@of(TEXTS, 4)
def gzip_of_json_lines(directory: Path) -> Path:
    path = directory / "c.jsonl.gz"
    path.write_bytes(gzip.compress(lines(*({"text": text} for text in texts()))))
    return path


@of(TEXTS, 4)
def gzip_called_txt(directory: Path) -> Path:
    path = directory / "c.txt"
    path.write_bytes(gzip.compress("\n".join(texts()).encode()))
    return path


@of(TEXTS, 4)
def plain_text_called_gz(directory: Path) -> Path:
    path = directory / "c.txt.gz"
    path.write_text("\n".join(texts()))
    return path


@of(TEXTS, 0)
def gzip_cut_off(directory: Path) -> Path:
    path = directory / "c.txt.gz"
    path.write_bytes(
        gzip.compress("\n".join(f"{text} {place}" for place in range(500) for text in texts()).encode())[:-40]
    )
    return path


@of(TEXTS, 0)
def gzip_of_two_hundred_megabytes_of_nothing(directory: Path) -> Path:
    path = directory / "c.txt.gz"
    with gzip.open(path, "wb") as file:
        for _ in range(200):
            file.write(bytes(2**20))
    return path


@of(TEXTS, 0)
def gzip_in_gzip(directory: Path) -> Path:
    path = directory / "c.gz"
    path.write_bytes(gzip.compress(gzip.compress("\n".join(texts()).encode())))
    return path


@of(TEXTS, 4)
def zstandard(directory: Path) -> Path:
    import pyarrow

    path = directory / "c.jsonl.zst"
    content = lines(*({"text": text} for text in texts()))
    path.write_bytes(pyarrow.compress(content, codec="zstd", asbytes=True))
    return path


def _parquet(path: Path, **columns: Any) -> Path:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), path)
    return path


@of(TEXTS, 4)
def parquet(directory: Path) -> Path:
    return _parquet(directory / "c.parquet", text=texts(), kind=["a", "b", "a", "b"])


@of(TEXTS, 4)
def parquet_called_txt(directory: Path) -> Path:
    return _parquet(directory / "c.txt", text=texts())


@of(TEXTS, 0)
def text_called_parquet_with_its_mark(directory: Path) -> Path:
    path = directory / "c.parquet"
    path.write_bytes(b"PAR1" + "\n".join(texts()).encode())
    return path


@of(TEXTS, 0)
def parquet_cut_off(directory: Path) -> Path:
    path = _parquet(directory / "c.parquet", text=texts())
    path.write_bytes(path.read_bytes()[:-30])
    return path


@of(TEXTS, 2)
def parquet_with_nulls_and_dates_beyond_time(directory: Path) -> Path:
    import pyarrow

    when = pyarrow.array([0, 2**62, -(2**62), 1], pyarrow.timestamp("ms"))
    return _parquet(directory / "c.parquet", text=[texts()[0], texts()[1], None, " "], kind=when, when=when)


@of(TEXTS, 3)
def parquet_with_text_that_is_not_utf8(directory: Path) -> Path:
    import pyarrow

    raw = pyarrow.array([*(text.encode() for text in texts(3)), b"w1 \xff w2"], pyarrow.binary())
    # A view: pyarrow does not look whether the bytes are UTF-8.
    return _parquet(directory / "c.parquet", text=raw.view(pyarrow.string()))


@of(TEXTS, 0)
def parquet_with_lists(directory: Path) -> Path:
    return _parquet(directory / "c.parquet", text=[["w1", "w2"], ["w3"]])


# --- texts: paths that are no files ----------------------------------------------------------------------------------


@of(TEXTS, 0)
def a_pipe_that_nobody_writes(directory: Path) -> Path:
    path = directory / "c.txt"
    os.mkfifo(path)
    return path


@of(TEXTS, 0)
def an_endless_device(directory: Path) -> Path:
    path = directory / "c.txt"
    path.symlink_to("/dev/zero")
    return path


@of(TEXTS, 0)
def a_socket(directory: Path) -> Path:
    import socket

    path = directory / "s"
    server = socket.socket(socket.AF_UNIX)
    here = Path.cwd()
    os.chdir(directory)  # the names of sockets are short
    try:
        server.bind("s")
    finally:
        os.chdir(here)
        server.close()
    return path


@of(TEXTS, 0)
def an_empty_directory(directory: Path) -> Path:
    path = directory / "c"
    path.mkdir()
    return path


@of(TEXTS, 0)
def a_directory_called_jsonl(directory: Path) -> Path:
    path = directory / "c.jsonl"
    path.mkdir()
    return path


@of(TEXTS, 0)
def a_link_to_nothing(directory: Path) -> Path:
    path = directory / "c.txt"
    path.symlink_to(directory / "missing")
    return path


@of(TEXTS, 0)
def a_link_to_itself(directory: Path) -> Path:
    path = directory / "c.txt"
    path.symlink_to(path)
    return path


@of(TEXTS, 0)
def a_name_of_three_hundred_characters(directory: Path) -> Path:
    return directory / ("n" * 300)


@of(TEXTS, 0)
def a_home_of_nobody(directory: Path) -> Path:
    return Path("~nosuchuser/c.txt")


@of(TEXTS, 0)
def below_a_file(directory: Path) -> Path:
    path = directory / "c.txt"
    path.write_text("w1")
    return path / "more.txt"


@of(TEXTS, 0)
def missing(directory: Path) -> Path:
    return directory / "missing.txt"


@of(TEXTS, 4)
def a_name_that_is_not_utf8(directory: Path) -> Path:
    path = Path(os.fsdecode(os.fsencode(directory) + b"/c\xff.txt"))
    path.write_text("\n".join(texts()))
    return path


@of(TEXTS, 4)
def a_name_with_marks_of_patterns(directory: Path) -> Path:
    path = directory / "c[1]*?.txt"
    path.write_text("\n".join(texts()))
    return path


# --- rows to train on ------------------------------------------------------------------------------------------------


def _answer(place: int = 0) -> dict[str, Any]:
    return {"prompt": f"X w1 w{2 + place}", "response": f"w3 w4 w{5 + place}"}


@of(ROWS, 4)
def rows_good(directory: Path) -> Path:
    path = directory / "rows.jsonl"
    path.write_bytes(lines(*map(_answer, range(4))))
    return path


@of(ROWS, 4)
def rows_with_null_lines(directory: Path) -> Path:
    path = directory / "rows.jsonl"
    path.write_bytes(lines(b"null", *map(_answer, range(4)), b"null"))
    return path


@of(ROWS, 4)
def rows_with_every_bad_row(directory: Path) -> Path:
    path = directory / "rows.jsonl"
    bad = [*bad_lines(_answer(), "prompt"), *bad_lines(_answer(), "response")]
    path.write_bytes(lines(*map(_answer, range(2)), *bad, *map(_answer, range(2, 4))))
    return path


@of(ROWS, 0)
def rows_all_bad(directory: Path) -> Path:
    path = directory / "rows.jsonl"
    path.write_bytes(lines(*bad_lines(_answer(), "prompt")))
    return path


@of(ROWS, 4)
def rows_as_a_list(directory: Path) -> Path:
    path = directory / "rows.json"
    path.write_text(json.dumps([*map(_answer, range(2)), None, 3, *map(_answer, range(2, 4))]))
    return path


@of(ROWS, 4)
def rows_as_csv(directory: Path) -> Path:
    path = directory / "rows.csv"
    with path.open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["prompt", "response"])
        out.writerows([*(list(_answer(place).values()) for place in range(4)), ["only one"], ["", ""]])
    return path


@of(ROWS, 4)
def rows_called_txt(directory: Path) -> Path:
    path = directory / "rows.txt"
    path.write_bytes(lines(*map(_answer, range(4))))
    return path


@of(ROWS, 4)
def rows_in_utf16(directory: Path) -> Path:
    path = directory / "rows.jsonl"
    path.write_bytes(lines(*map(_answer, range(4))).decode().encode("utf-16"))
    return path


@of(ROWS, 4)
def rows_with_odd_messages(directory: Path) -> Path:
    """Good chats beside those whose turns are of every wrong type."""
    path = directory / "rows.jsonl"
    good = [{"role": "user", "content": "X w1 w2"}, {"role": "assistant", "content": "w3 w4"}]
    bad: list[Any] = [None, 3, "a", [], [None], [3], [{"role": []}], [{"role": "judge", "content": "w1"}]]
    bad += [
        [{"role": "user", "content": 3}],
        [good[0]],
        [good[1]],
        [{"role": {"a": 1}, "content": {}}],
        {"role": "user"},
    ]
    path.write_bytes(lines(*({"messages": turns} for turns in [good, good, *bad, good, good])))
    return path


@of(ROWS, 0)
def rows_from_a_directory(directory: Path) -> Path:
    path = directory / "rows.jsonl"
    path.mkdir()
    return path


@of(ROWS, 0)
def rows_from_a_pipe_that_nobody_writes(directory: Path) -> Path:
    path = directory / "rows.jsonl"
    os.mkfifo(path)
    return path


@of(ROWS, 4)
def rows_parquet_with_dates_beyond_time(directory: Path) -> Path:
    import pyarrow

    when = pyarrow.array([0, 2**62, -(2**62), 1], pyarrow.timestamp("ms"))
    rows = [_answer(place) for place in range(4)]
    return _parquet(
        directory / "rows.parquet",
        prompt=[row["prompt"] for row in rows],
        response=[row["response"] for row in rows],
        when=when,
    )


# --- benchmarks: a directory for `eval --data` ------------------------------------------------------------------------


def _benchmarks(directory: Path) -> Path:
    data = directory / "data"
    data.mkdir()
    return small_benchmarks.write(data, n=4)


def _and(file: str, content: bytes) -> Builder:
    """All benchmarks, and more behind the rows of one of them."""

    def builder(directory: Path) -> Path:
        data = _benchmarks(directory)
        with (data / file).open("ab") as out:
            out.write(content)
        return data

    return builder


_BAD_ROWS = {
    "gsm8k/test.jsonl": bad_lines({"question": "w1 ?", "answer": "w2\n#### 3"}, "question"),
    "math500/test.jsonl": bad_lines({"problem": "w1 ?", "solution": "w2", "answer": "3"}, "problem"),
    "aime24/train.jsonl": bad_lines({"Problem": "w1 ?", "Answer": 3}, "Problem"),
    "mmlu/test.jsonl": [
        *bad_lines(
            {"subject": "anatomy", "question": "w1 ?", "choices": ["a", "b", "c", "d"], "answer": 1}, "question"
        ),
        {"subject": "anatomy", "question": "w1 ?", "choices": ["a", "b", "c", "d"], "answer": 9},
        {"subject": "anatomy", "question": "w1 ?", "choices": ["a", "b", "c", "d"], "answer": "B"},
        {"subject": "anatomy", "question": "w1 ?", "choices": "abcd", "answer": 1},
        {"subject": "anatomy", "question": "w1 ?", "choices": [1, 2, 3, 4], "answer": 1},
        {"subject": 3, "question": "w1 ?", "choices": ["a", "b", "c", "d"], "answer": True},
    ],
    "ifeval/input_data.jsonl": [
        *bad_lines({"key": 9, "prompt": "w1", "instruction_id_list": [], "kwargs": []}, "prompt"),
        {"key": 9, "prompt": "w1", "instruction_id_list": ["no:such_rule"], "kwargs": [{}]},
        {"key": 9, "prompt": "w1", "instruction_id_list": ["punctuation:no_comma"], "kwargs": []},
        {"key": 9, "prompt": "w1", "instruction_id_list": "punctuation:no_comma", "kwargs": {}},
    ],
}
for _file, _rows in _BAD_ROWS.items():
    _name = f"{_file.partition('/')[0]}_with_every_bad_row"
    BENCHMARKS[_name] = _and(_file, lines(*_rows))
    GOOD[_name] = 4

BENCHMARKS["xstest_with_unknown_labels"] = _and(
    "xstest/xstest_prompts.csv", b'9,"w1 ?",x,Safe\n10,"w2 ?",x,maybe\n11,"w3 ?",x,\n12,,x,safe\n13\n'
)
GOOD["xstest_with_unknown_labels"] = 4


@of(BENCHMARKS, 0)
def xstest_with_no_known_label(directory: Path) -> Path:
    data = _benchmarks(directory)
    (data / "xstest" / "xstest_prompts.csv").write_text("id,prompt,type,label\n1,w1 ?,x,fine\n")
    return data


@of(BENCHMARKS, 0)
def benchmarks_that_are_directories(directory: Path) -> Path:
    data = directory / "data"
    for file in ("gsm8k/test.jsonl", "gsm8k/train.jsonl", "xstest/xstest_prompts.csv", "wikitext2/wiki.test.raw"):
        (data / file).mkdir(parents=True)
    return data


@of(BENCHMARKS, 0)
def benchmarks_that_are_pipes(directory: Path) -> Path:
    data = directory / "data"
    for file in ("gsm8k/test.jsonl", "gsm8k/train.jsonl", "xstest/xstest_prompts.csv", "wikitext2/wiki.test.raw"):
        (data / file).parent.mkdir(parents=True, exist_ok=True)
        os.mkfifo(data / file)
    return data


@of(BENCHMARKS, 4)
def benchmarks_in_utf16(directory: Path) -> Path:
    data = _benchmarks(directory)
    for file in data.rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_text(encoding="utf-8").encode("utf-16"))
    return data
