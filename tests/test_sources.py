from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest

from minimoe.config import SourceConfig
from minimoe.data.formats import Counts, left_aside, read_documents
from minimoe.data.rows import BadRow, Row
from minimoe.data.sources import fingerprint, list_files, read_rows
from minimoe.data.text_files import cut_text
from minimoe.errors import UserError

SAMPLES = Path(__file__).parents[1] / "data" / "samples"


def rows_of(path, **values):
    return list(read_rows(SourceConfig(path=str(path), **values)))


def texts_of(path, **values):
    return [row.values["text"] for row in rows_of(path, **values)]


def write_parquet(path: Path, columns: dict) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def test_every_kind_of_file_gives_the_same_rows(tmp_path):
    import pyarrow

    rows = [{"text": "the cat"}, {"text": 'a "quoted", line'}]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "b.json").write_text(json.dumps(rows, indent=2))
    (tmp_path / "c.json").write_text(lines)
    (tmp_path / "d.csv").write_text('text\nthe cat\n"a ""quoted"", line"\n')
    (tmp_path / "e.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    write_parquet(tmp_path / "f.parquet", {"text": [row["text"] for row in rows]})
    (tmp_path / "g.json").write_text(json.dumps(rows[0], indent=2) + "\n" + json.dumps(rows[1], indent=2))
    (tmp_path / "h.jsonl").write_text(json.dumps(rows) + "\n")
    (tmp_path / "i.tsv").write_text('text\nthe cat\n"a ""quoted"", line"\n')
    with pyarrow.CompressedOutputStream(str(tmp_path / "j.jsonl.zst"), "zstd") as file:
        file.write(lines.encode())
    table = pyarrow.Table.from_pylist(rows)
    for name, writer in (("k.arrow", pyarrow.ipc.new_stream), ("l.arrow", pyarrow.ipc.new_file)):
        with writer(tmp_path / name, table.schema) as file:
            file.write_table(table)
    for path in sorted(tmp_path.iterdir()):
        assert [row.values for row in rows_of(path)] == rows, path
    assert texts_of(tmp_path) == ["the cat", 'a "quoted", line'] * 12
    assert len(rows_of(tmp_path / "*.json")) == 6


def test_rows_carry_their_file_and_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": "b"}\n')
    assert [row.place for row in rows_of(path)] == [f"{path}:1", f"{path}:3"]


def test_a_txt_file_is_one_document_and_separator_lines_split_it(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\ntwo\n")
    assert texts_of(path) == ["one\ntwo\n"]
    path.write_text("one\n<|endoftext|>\ntwo <|endoftext|> still two\n<|endoftext|>\n")
    assert texts_of(path) == ["one\n", "two <|endoftext|> still two\n"]
    assert rows_of(path, text_column="story")[0].values == {"story": "one\n"}


def test_a_long_txt_file_is_cut_at_line_breaks_and_nothing_is_lost(tmp_path):
    path = tmp_path / "a.txt"
    text = "".join(f"line {number} of a long book\n" for number in range(20_000))
    path.write_text(text)
    pieces = texts_of(path)
    assert "".join(pieces) == text
    assert len(pieces) > 5
    assert all(len(piece) <= 64 * 1024 and piece.endswith("\n") for piece in pieces)


@pytest.mark.parametrize("text", ["", "short", "a b " * 100, "x" * 95, "é\n" * 50, "\n" * 30, " " * 30 + "\n" * 7])
def test_cut_pieces_join_to_the_text_and_respect_the_limit(text):
    pieces = list(cut_text(text, 10))
    assert "".join(pieces) == text
    assert all(len(piece) <= 10 for piece in pieces)


def test_byte_order_mark_crlf_and_nul_are_read(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\0\r\n")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n{"text": "two\\u0000"}\r\n')
    (tmp_path / "c.csv").write_bytes(b"\xef\xbb\xbftext\r\none\r\n")
    assert texts_of(tmp_path) == ["one\ntwo\0\n", "one", "two\0", "one"]


def test_a_line_of_ten_megabytes_is_read(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "word " * 2_000_000}) + "\n")
    assert len(texts_of(path)[0]) == 10_000_000


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits the address space")
def test_a_line_of_ten_megabytes_is_tokenised_in_bounded_memory(tmp_path, tiny_tokenizer_dir):
    """In 600 MB of address space, with a byte order mark, CRLF and NUL."""
    path, text = tmp_path / "a.jsonl", ("word" * 500 + "\0\r\n") * 5_000
    with path.open("wb") as file:
        file.write(b"\xef\xbb\xbf")
        file.write(json.dumps({"text": text}).encode() + b"\r\n")
    code = (
        "import resource, sys, torch\n"
        "from pathlib import Path\n"
        "from minimoe.config import DataConfig\n"
        "from minimoe.data.shards import prepare\n"
        "from minimoe.tokenizer import encode_text, load_tokenizer\n"
        "tokenizer = load_tokenizer(sys.argv[1]); encode_text(tokenizer, 'warm up')\n"
        "mapped = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (mapped + 600_000_000,) * 2)\n"
        "data = DataConfig(train=sys.argv[2], cache_dir=sys.argv[3], num_processes=1)\n"
        "print(prepare(data.train[0], data, tokenizer, 'pretrain').counts['bytes'])"
    )
    words = [sys.executable, "-c", code, str(tiny_tokenizer_dir), str(path), str(tmp_path / "cache")]
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) == len(text)


@pytest.mark.parametrize(
    ("name", "content", "what", "line"),
    [
        (
            "a.jsonl",
            b'{"text": "a"}\n{"text": "\xff"}\n{"text": "b"}\n',
            "invalid UTF-8: byte 0xff at column 11",
            2,
        ),
        ("a.jsonl", b'{"text": "a"}\n{"text": "b\n{"text": "b"}\n', "malformed JSON", 2),
        ("a.jsonl", b'{"text": "a"}\n[1, 2]\n{"text": "b"}\n', "expected a JSON object, not list", 2),
        ("a.jsonl", b'{"text": "a"}\n' + b"[" * 100_000 + b'\n{"text": "b"}\n', "malformed JSON", 2),
        ("a.jsonl", b'{"text": "a"}\n{"text": "b"} {"text": "c"}\n{"text": "b"}\n', "more than one value", 2),
        ("a.jsonl", b'{"text": "a"}\n{"text": "b", "text": "c"}\n{"text": "b"}\n', "the key 'text' twice", 2),
        ("a.csv", b"text\na\nb,c\nb\n", "more fields", 3),
        ("a.csv", b"text\na\n\xe9\nb\n", "invalid UTF-8: byte 0xe9", 3),
        ("a.tsv", b'text\na\nb\n"c', "malformed TSV", 4),
        ("a.csv", b'text\na\nb\n"c', "malformed CSV", 4),
        ("a.txt", b"a\n\xffb\nc\n", "invalid UTF-8", 2),
    ],
)
def test_a_bad_row_names_its_line_and_the_others_are_read(tmp_path, name, content, what, line):
    path = tmp_path / name
    path.write_bytes(content)
    rows = rows_of(path)
    (bad,) = [row for row in rows if isinstance(row, BadRow)]
    assert what in bad.what
    assert bad.place == f"{path}:{line}"
    assert sum(isinstance(row, Row) for row in rows) == (1 if name == "a.txt" else 2)


def test_a_column_that_a_header_has_twice_is_refused_and_empty_ones_are_not(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text,,\na,,\n")
    assert texts_of(path) == ["a"]
    path.write_text("text,text\na,b\n")
    assert [row.what for row in rows_of(path)] == ["the header has the column 'text' twice"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "missing.jsonl", "no such file"),
        (lambda folder: folder / "*.jsonl", "no such file"),
        (lambda folder: folder, "no data files"),
        (lambda folder: folder / "a.bin", "unknown kind"),
        (lambda folder: folder / "a.parquet.x", "unknown kind"),
        (lambda folder: folder / "deep" / "bad.parquet", "cannot read"),
        (lambda folder: folder / "deep" / "bad.jsonl.gz", "cannot read"),
        (lambda folder: folder / "deep" / "bad.jsonl.zst", "cannot read"),
        (lambda folder: folder / "deep" / "bad.arrow", "cannot read"),
    ],
)
def test_an_unusable_path_is_a_user_error(tmp_path, make, message):
    for name in ("a.bin", "a.parquet.x"):
        (tmp_path / name).write_text("x")
    if "deep" in str(make(tmp_path)):
        (tmp_path / "deep").mkdir()
        make(tmp_path).write_bytes(b"no such thing")
    with pytest.raises(UserError, match=message):
        rows_of(make(tmp_path))


def test_a_folder_of_too_many_files_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("minimoe.data.sources.MAX_ENTRIES", 3)
    for number in range(4):
        (tmp_path / f"{number}.txt").write_text("x")
    for path in (tmp_path, tmp_path / "*.txt"):
        with pytest.raises(UserError, match="more than 3 files"):
            list_files(str(path))


def test_hidden_files_of_a_folder_are_left_out(tmp_path):
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "a.txt").write_text("x")
    (tmp_path / "b.txt").write_text("x")
    assert list_files(str(tmp_path)) == [tmp_path / "b.txt"]


def test_what_a_folder_holds_beside_its_data_files_is_listed(tmp_path, saved):
    folder = tmp_path / "mixed"
    folder.mkdir()
    for name in ("b.txt", "notes.md", "more.md", "LICENSE", ".hidden.pdf"):
        (folder / name).write_text("x")
    unread = {"ignored columns": "id (3 rows)", "files not read": "2 .md, 1 without suffix"}
    assert left_aside([SourceConfig(path=str(folder)), SourceConfig(hub="a/b")], {"id": 3}) == unread
    assert left_aside([SourceConfig(path=str(folder / "b.txt")), SourceConfig(path=str(saved / "train"))], {}) == {}


def test_the_fingerprint_follows_the_content_and_not_the_place(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.txt").write_text("the cat")
    first, second = (SourceConfig(path=str(tmp_path / name)) for name in ("a", "b"))
    assert fingerprint(first) == fingerprint(second)
    (tmp_path / "b" / "x.txt").write_text("the hat")
    assert fingerprint(first) != fingerprint(second)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_hub_dataset_gives_its_rows(monkeypatch, streaming):

    asked = []

    def load_dataset(path, **values):
        asked.append((path, values))
        dataset = datasets.Dataset.from_dict({"text": ["a", "b"]})
        return dataset.to_iterable_dataset() if streaming else dataset

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_, **__: SimpleNamespace(sha="commit"))
    source = SourceConfig(hub="org/stories", subset="small", split="test", streaming=streaming)
    rows = list(read_rows(source))
    assert [row.values["text"] for row in rows] == ["a", "b"]
    assert rows[1].place == "org/stories/small/test, row 2"
    assert asked == [("org/stories", {"name": "small", "split": "test", "streaming": streaming})]
    assert fingerprint(source) == fingerprint(source)


def test_an_unknown_hub_dataset_is_a_user_error(monkeypatch):

    def fail(*_, **__):
        raise FileNotFoundError("Dataset 'org/none' doesn't exist")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UserError, match="org/none"):
        list(read_rows(SourceConfig(hub="org/none")))


def test_all_samples_are_read():
    assert {path.name for path in list_files(str(SAMPLES))} == {path.name for path in SAMPLES.iterdir()}
    assert all(isinstance(row, Row) for row in rows_of(SAMPLES))


def test_nulls_that_arrow_adds_to_objects_are_not_the_rows(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [
        {"messages": [{"role": "user", "content": "q"}], "score": None},
        {
            "messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"x": 0, "text": None}}]}],
            "score": 1,
        },
        {"messages": [{"role": "assistant", "tool_calls": [{"name": "g", "arguments": {"text": "t"}}]}], "score": 2},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    read = [row.values for row in read_rows(SourceConfig(path=str(tmp_path / "a.parquet")))]
    assert read[0] == {"messages": [{"role": "user", "content": "q"}], "score": None}
    assert read[1]["messages"][0]["tool_calls"][0]["arguments"] == {"x": 0}
    assert read[2]["messages"][0]["tool_calls"][0]["arguments"] == {"text": "t"}


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_json_that_is_read_whole_and_broken_is_named_with_its_line(tmp_path, name):
    path = tmp_path / name
    path.write_text('{\n  "text": "a"\n}\n{\n  "text": b\n}\n')
    with pytest.raises(UserError, match="malformed JSON: Expecting value at column 11") as caught:
        rows_of(path)
    assert caught.value.where == f"{path}:5"


@pytest.mark.parametrize("codec", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_another_unicode_encoding_is_refused_with_what_converts_it(tmp_path, codec):
    lines = '{"text": "Once upon a time"}\n{"text": "the cat"}\n'
    (tmp_path / "a.jsonl").write_bytes(lines.encode(codec))
    with pytest.raises(UserError, match="not UTF-8") as caught:
        rows_of(tmp_path / "a.jsonl")
    assert subprocess.run(caught.value.fix, shell=True, check=False).returncode == 0
    assert (tmp_path / "a.utf8.jsonl").read_text(encoding="utf-8-sig") == lines


@pytest.mark.parametrize(
    ("codec", "text"), [("cp1252", "ein gr\xfcner Fr\xfchling"), ("gb18030", "\u4f60\u597d\uff0c\u4e16\u754c")]
)
@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.jsonl", "a.json", "a.txt.gz"])
def test_any_other_encoding_is_guessed_with_what_converts_it(tmp_path, data_config, codec, text, name):
    content = {"csv": f"text\n{text}\n", "jsonl": f'{{"text": "{text}"}}\n', "json": f'[{{"text": "{text}"}}]'}
    raw = content.get(name.split(".")[1], text).encode(codec)
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith("gz") else raw)
    with pytest.raises(UserError, match="invalid UTF-8") as caught:
        list(read_documents(SourceConfig(path=str(tmp_path / name)), data_config("x"), Counts()))
    command = caught.value.fix.partition("convert it: ")[2]
    assert subprocess.run(command, shell=True, check=False).returncode == 0
    assert text in (tmp_path / name.replace(".", ".utf8.", 1).removesuffix(".gz")).read_text(encoding="utf-8")


ROWS = [{"text": "a", "more": {"x": 1}}, {"text": "b", "more": "y"}, {"text": "c", "more": {"z": None}}]


@pytest.fixture
def saved(tmp_path) -> Path:
    """What `save_to_disk` makes of two splits, with a cache of `map` beside the data."""
    import datasets

    train, test = (datasets.Dataset.from_list(rows, on_mixed_types="use_json") for rows in (ROWS, ROWS[:1]))
    datasets.DatasetDict({"train": train, "test": test}).save_to_disk(
        tmp_path / "saved", num_shards={"train": 2, "test": 1}
    )
    (tmp_path / "saved" / "train" / "cache-0123.arrow").write_bytes(b"what map left")
    return tmp_path / "saved"


def test_a_saved_dataset_gives_the_rows_of_its_split(saved):
    assert [row.values for row in rows_of(saved / "train")] == ROWS
    assert [row.values for row in rows_of(saved / "train" / "*")] == ROWS
    assert [row.values for row in rows_of(saved / "test")] == ROWS[:1]
    for several in (saved, saved.parent, saved / "*"):
        with pytest.raises(UserError, match="holds the splits train, test"):
            rows_of(several)


def test_a_saved_dataset_without_one_of_its_files_is_refused(saved):
    (saved / "train" / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(UserError, match=r"data-00001-of-00002\.arrow is missing"):
        rows_of(saved / "train")


def test_json_files_that_are_called_like_those_of_a_saved_dataset_are_data(tmp_path):
    for name in ("state.json", "dataset_info.json"):
        (tmp_path / name).write_text('{"text": "Ohio"}')
    assert texts_of(tmp_path) == ["Ohio", "Ohio"]


@pytest.mark.parametrize("name", ["a.arrow", "a.jsonl.zst"])
def test_a_file_that_was_cut_is_refused(tmp_path, name):
    import pyarrow

    path = tmp_path / name
    table = pyarrow.table({"text": [f"number {i}" for i in range(1000)]})
    if name.endswith("arrow"):
        with pyarrow.ipc.new_stream(path, table.schema) as file:
            file.write_table(table)
    else:
        with pyarrow.CompressedOutputStream(str(path), "zstd") as file:
            file.write("".join(f'{{"text": "number {i}"}}\n' for i in range(1000)).encode())
    assert len(rows_of(path)) == 1000
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(UserError, match="cannot read"):
        rows_of(path)
