"""Documents come in order, each with its place; what cannot be read is counted, named and skipped."""

import gzip
import json

import pyarrow as pa
import pytest
from pyarrow import parquet

from melayer.data.corpus import Corpus, Document, LeftOut
from melayer.errors import InputError


def all_of(corpus: Corpus, **options):
    return list(corpus.documents(**options))


def rows(path, *values):
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return str(path)


def test_lines_of_a_text_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\n\n  \ntwo\nthree")
    found = all_of(Corpus(str(path)))
    assert found == [Document(0, "one", ""), Document(1, "two", ""), Document(2, "three", "")]
    assert Corpus(str(path)).count() == 3
    assert all_of(Corpus(str(path)), mine=lambda index: index % 2 == 1) == [Document(1, "two", "")]
    assert all_of(Corpus(str(path)), stop=1) == [Document(0, "one", "")]
    (whole,) = all_of(Corpus(str(path), whole_file=True))
    assert whole.text.splitlines()[-1] == "three"


def compressed(suffix, content):
    return gzip.compress(content) if suffix == "gz" else pa.compress(content, codec="zstd", asbytes=True)


def test_compressed_is_the_same(tmp_path):
    for name, content in (("a.txt", b"one\ntwo\n"), ("a.jsonl", b'{"text": "one"}\n{"text": "two"}\n')):
        (tmp_path / name).write_bytes(content)
        for suffix in ("gz", "zst"):
            (tmp_path / f"{name}.{suffix}").write_bytes(compressed(suffix, content))
            assert all_of(Corpus(str(tmp_path / name))) == all_of(Corpus(str(tmp_path / f"{name}.{suffix}")))
    both = tmp_path / "both.txt.gz"  # as `cat` makes it
    both.write_bytes(gzip.compress(b"one\n") + gzip.compress(b"two\n"))
    assert [item.text for item in all_of(Corpus(str(both)))] == ["one", "two"]


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_a_compressed_file_that_is_cut_off(tmp_path, suffix):
    path = tmp_path / f"a.txt.{suffix}"
    path.write_bytes(compressed(suffix, "".join(f"line {n * n}\n" for n in range(5000)).encode())[:-20])
    with pytest.raises(InputError, match=r"cannot be read to its end: .*Copy or download it again"):
        all_of(Corpus(str(path)))


def test_bad_lines_are_named_and_skipped(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'{"text": "good"}\n{"text": \n{"text": "\xff"}\n[1]\n{"text": 3}\n{"text": " "}\n{"other": "x"}\n'
        b'{"text": "end"}'
    )
    found = all_of(Corpus(str(path)))
    assert [item.index for item in found] == list(range(8))
    reasons = [item.reason for item in found if isinstance(item, LeftOut)]
    assert [reason.split(":")[0] for reason in reasons] == [
        "not JSON", "not UTF-8 at byte 10", "no object with columns", "its text is no string", "has no text",
        "has only the columns other",
    ]  # fmt: skip
    assert [item.text for item in found if isinstance(item, Document)] == ["good", "end"]


def test_columns_are_named_or_found(tmp_path):
    path = rows(tmp_path / "a.jsonl", {"body": "x", "kind": "k"}, {"body": "y", "kind": 2})
    assert all_of(Corpus(path)) == [Document(0, "x", ""), Document(1, "y", "")]
    assert [item.category for item in all_of(Corpus(path, category="kind"))] == ["k", "2"]
    with pytest.raises(InputError, match=r"has the columns body, kind, not 'words'. Name .* --column body"):
        Corpus(path, column="words").check()
    with pytest.raises(InputError, match=r"has the columns body, kind, not 'topic'"):
        Corpus(path, category="topic").check()
    other = rows(tmp_path / "b.jsonl", {"x": "1"})
    with pytest.raises(InputError, match=r"has the columns x, not one of text, content"):
        Corpus(other).check()
    (tmp_path / "c.txt").write_text("a\n")
    with pytest.raises(InputError, match=r"has no columns, so there is no category 'kind'"):
        Corpus(str(tmp_path / "c.txt"), category="kind").check()


def test_only_a_text_file_is_one_document(tmp_path):
    for source in (rows(tmp_path / "a.jsonl", {"text": "x"}), table(tmp_path / "a.parquet"), "owner/name"):
        with pytest.raises(InputError, match=r"takes a text file as one document, and .* is none"):
            all_of(Corpus(source, whole_file=True))


def test_there_must_be_a_corpus(tmp_path):
    with pytest.raises(InputError, match=r"There is no corpus 'nothing': not a file here, and not a hub id"):
        Corpus("nothing").check()
    with pytest.raises(InputError, match=r"There is no corpus .*missing.txt"):
        Corpus(str(tmp_path / "missing.txt")).check()
    with pytest.raises(InputError, match=r"is not a corpus; expected files that end in"):
        Corpus(str(tmp_path)).check()
    with pytest.raises(InputError, match=r"nothing\*.jsonl is not a corpus; expected files that end in"):
        Corpus(str(tmp_path / "nothing*.jsonl")).check()
    (tmp_path / "a.csv").write_text("text\n")
    with pytest.raises(InputError, match=r"a.csv is not a corpus; expected files that end in"):
        Corpus(str(tmp_path / "a*")).check()


def table(path, groups: int = 3, **columns):
    values = columns or {"text": [f"document {place}" for place in range(12)], "kind": ["a", "b"] * 6}
    parquet.write_table(pa.table(values), path, row_group_size=12 // groups, compression="none")
    return str(path)


def test_parquet(tmp_path):
    path = table(tmp_path / "a.parquet")
    found = all_of(Corpus(path, category="kind"))
    assert [item.text for item in found] == [f"document {place}" for place in range(12)]
    assert [item.category for item in found] == ["a", "b"] * 6
    assert Corpus(path).count() == 12
    assert [item.index for item in all_of(Corpus(path), mine=lambda index: index % 5 == 2, stop=8)] == [2, 7]
    with pytest.raises(InputError, match=r"has the columns text, kind, not 'words'"):
        Corpus(path, column="words").check()


def test_a_corrupt_row_group_is_skipped_and_the_rest_is_read(tmp_path):
    path = tmp_path / "a.parquet"
    table(path)
    content = bytearray(path.read_bytes())
    group = parquet.ParquetFile(path).metadata.row_group(1).column(0)
    start = group.dictionary_page_offset or group.data_page_offset
    content[start : start + 40] = b"\xff" * 40
    path.write_bytes(content)
    found = all_of(Corpus(str(path)))
    bad = [item for item in found if isinstance(item, LeftOut)]
    assert [item.index for item in bad] == [4, 5, 6, 7]
    assert all(item.reason.startswith("row group 1 of a.parquet is corrupt: ") for item in bad)
    assert [item.index for item in found if isinstance(item, Document)] == [0, 1, 2, 3, 8, 9, 10, 11]
    mine = all_of(Corpus(str(path)), mine=lambda index: index % 4 == 0)
    assert [(item.index, isinstance(item, LeftOut)) for item in mine] == [(0, False), (4, True), (8, False)]


def test_no_parquet_at_all(tmp_path):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(InputError, match=r"cannot be read as parquet: "):
        Corpus(str(path)).check()


def test_a_data_set_of_the_hub_is_streamed(tmp_path, monkeypatch):
    import datasets

    asked = []

    def load_dataset(name, split, streaming):
        asked.append((name, split, streaming))
        return iter([{"text": "one"}, {"text": None}, {"text": "three"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = all_of(Corpus("owner/name", split="test"))
    assert asked == [("owner/name", "test", True)]
    assert [item.index for item in found] == [0, 1, 2]
    assert isinstance(found[1], LeftOut)
    assert Corpus("owner/name").count() is None

    def refuse(*given, **options):
        raise ConnectionError("no network\nand more")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(InputError, match=r"cannot be had from the hub: no network Check the spelling"):
        all_of(Corpus("owner/name"))


def test_a_stream_of_datasets_itself(tmp_path, monkeypatch):
    """Not the hub, which tests cannot reach, but what its client streams."""
    import datasets

    for shard in range(2):
        rows(
            tmp_path / f"{shard}.jsonl", *({"text": f"{shard} {place}", "kind": "ab"[place % 2]} for place in range(3))
        )
    original = datasets.load_dataset
    files = [str(tmp_path / f"{shard}.jsonl") for shard in range(2)]

    def of_files(name, split, streaming):
        assert (name, split) == ("owner/name", "test")
        return original("json", data_files={"test": files}, split=split, streaming=streaming)

    monkeypatch.setattr(datasets, "load_dataset", of_files)
    corpus = Corpus("owner/name", split="test", category="kind")
    texts = [f"{shard} {place}" for shard in range(2) for place in range(3)]
    assert [item.text for item in all_of(corpus)] == texts
    assert [item.category for item in all_of(corpus)] == list("abaaba")
    assert [item.index for item in all_of(corpus, mine=lambda index: index % 2 == 1, stop=5)] == [1, 3]
    with pytest.raises(InputError, match=r"has the columns text, kind, not 'words'"):
        all_of(Corpus("owner/name", split="test", column="words"))
    (tmp_path / "1.jsonl").write_text('{"text": \n')
    with pytest.raises(
        InputError, match=r"owner/name cannot be read on from document 3: .* goes on from what was kept"
    ):
        all_of(corpus)


def test_many_files_are_one_corpus_in_the_order_of_their_names(tmp_path):
    directory = tmp_path / "shards"
    directory.mkdir()
    for shard in (1, 0, 2):
        rows(directory / f"{shard}.jsonl", *({"text": f"{shard} {place}"} for place in range(3)))
    texts = [f"{shard} {place}" for shard in range(3) for place in range(3)]
    for source in (directory, directory / "*.jsonl", tmp_path / "**" / "[012].jsonl"):
        corpus = Corpus(str(source))
        corpus.check()
        assert [item.text for item in all_of(corpus)] == texts
        assert [item.index for item in all_of(corpus)] == list(range(9))
        assert corpus.count() == 9
        for stop in range(10):
            assert [item.text for item in all_of(corpus, stop=stop)] == texts[:stop]
            odd = all_of(corpus, mine=lambda index: index % 2 == 1, stop=stop)
            assert [item.text for item in odd] == texts[1:stop:2]


def test_many_parquet_files_and_one_without_the_column(tmp_path):
    table(tmp_path / "0.parquet")
    table(tmp_path / "1.parquet", words=[f"more {place}" for place in range(12)])
    table(tmp_path / "2.parquet", text=[f"end {place}" for place in range(12)], other=["x"] * 12)
    corpus = Corpus(str(tmp_path))
    found = all_of(corpus)
    assert [item.index for item in found] == list(range(36))
    assert corpus.count() == 36
    assert all(item.reason == "1.parquet has only the columns words" for item in found[12:24])
    assert [item.text for item in found[24:]] == [f"end {place}" for place in range(12)]
    mine = all_of(corpus, mine=lambda index: index % 7 == 3, stop=30)
    assert [(item.index, isinstance(item, LeftOut)) for item in mine] == [
        (3, False), (10, False), (17, True), (24, False),
    ]  # fmt: skip
    (tmp_path / "3.parquet").write_bytes(b"nothing of the kind")
    with pytest.raises(InputError, match=r"3.parquet cannot be read as parquet: "):
        corpus.check()


def test_rows_of_a_group_come_in_batches(tmp_path, monkeypatch):
    monkeypatch.setattr("melayer.data.corpus._ROWS", 3)
    path = table(tmp_path / "a.parquet", groups=1)
    assert [item.text for item in all_of(Corpus(path))] == [f"document {place}" for place in range(12)]
    assert [item.index for item in all_of(Corpus(path), mine=lambda index: index % 5 == 2, stop=8)] == [2, 7]


def test_a_directory_of_several_kinds_is_refused(tmp_path):
    rows(tmp_path / "a.jsonl", {"text": "x"})
    (tmp_path / "README.md").write_text("about it\n")
    with pytest.raises(InputError, match=r"holds files of several kinds \(.jsonl, .md\)"):
        Corpus(str(tmp_path)).check()
    assert [item.text for item in all_of(Corpus(str(tmp_path / "*.jsonl")))] == ["x"]


def test_each_text_file_of_a_directory_may_be_one_document(tmp_path):
    for name in ("b.txt", "a.txt"):
        (tmp_path / name).write_text(f"{name}\nand more\n")
    corpus = Corpus(str(tmp_path), whole_file=True)
    assert [item.text for item in all_of(corpus)] == ["a.txt\nand more", "b.txt\nand more"]
    assert corpus.count() == 2


def test_json_may_be_lines_and_is_refused_if_it_is_not(tmp_path):
    path = tmp_path / "part-0.json.gz"
    path.write_bytes(gzip.compress(b'{"text": "one"}\n{"text": "two"}\n'))
    assert [item.text for item in all_of(Corpus(str(path)))] == ["one", "two"]
    (tmp_path / "a.json").write_text('[\n {"text": "one"}\n]\n')
    with pytest.raises(InputError, match=r"does not begin with a line that is a JSON object"):
        Corpus(str(tmp_path / "a.json")).check()
