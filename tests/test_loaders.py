"""Files of texts and prompts: what is read, and what each error says."""

from __future__ import annotations

import csv
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emocircuits.data.loaders import LabelledText, load_prompts, load_texts
from emocircuits.errors import InputError


@pytest.fixture
def file(tmp_path):
    """Writes a file and returns its path."""

    def write(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


class TestTexts:
    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("a.csv", 'id,text,label\n1,"Oh, no",fear\n2,Yes,joy\n'),
            ("a.TSV", "id\ttext\tlabel\r\n1\tOh, no\tfear\r\n2\tYes\tjoy\r\n"),
            ("a.csv", b"\xef\xbb\xbf" + b'id,text,label\n1,"Oh, no",fear\n2,Yes,joy'),
            ("a.jsonl", '{"id": "1", "text": "Oh, no", "label": "fear"}\n'
                        '{"id": "2", "text": "Yes", "label": "joy"}'),
        ],
    )  # fmt: skip
    def test_formats_read_alike(self, file, name, content):
        first, second = load_texts(file(name, content))
        assert (first.text, first.label, first.extra) == ("Oh, no", "fear", {"id": "1"})
        assert (second.text, second.label, second.extra) == ("Yes", "joy", {"id": "2"})
        assert second.line == first.line + 1

    def test_other_columns_and_no_labels(self, file):
        path = file("a.csv", "body,emotion\nhello,joy\n")
        assert load_texts(path, "body", "emotion") == [LabelledText("hello", "joy", 2)]
        assert load_texts(path, "body", None) == [LabelledText("hello", None, 2, {"emotion": "joy"})]

    def test_lines_count_blank_lines_and_line_breaks_in_quotes(self, file):
        path = file("a.csv", 'text,label\n"one\ntwo",joy\n\nthree,fear\n')
        assert [(t.text, t.line) for t in load_texts(path)] == [("one\ntwo", 2), ("three", 5)]

    def test_whole_numbers_are_labels(self, file):
        assert load_texts(file("a.jsonl", '{"text": "x", "label": 3}'))[0].label == "3"

    @given(st.lists(st.tuples(st.text(), st.text()), min_size=1))
    def test_whatever_csv_writes_comes_back(self, tmp_path_factory, pairs):
        def plain(text):
            return "".join(c for c in text if c.isprintable()) + "."

        pairs = [(plain(text), plain(label).strip()) for text, label in pairs]
        path = tmp_path_factory.mktemp("csv") / "a.csv"
        with path.open("w", encoding="utf-8", newline="") as out:
            csv.writer(out).writerows([("text", "label"), *pairs])
        assert [(t.text, t.label) for t in load_texts(path)] == pairs

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("a.csv", "body,label\nx,joy\n", "line 2: unknown column 'text'; choose from body, label"),
            ("a.jsonl", '{"text": "x", "label": "joy"}\n\n{"text": "y"}', "line 3: unknown column 'label'"),
            ("a.csv", "text,label\nx,joy\nOh, no,fear\n", "line 3: 3 cells where the header has 2"),
            ("a.csv", "text,label\nx\n", "line 2: 1 cells"),
            ("a.csv", 'text,label\nx,joy\n"y,fear\n', "line 3: broken row"),
            ("a.csv", "text,text\nx,y\n", "'text' appears twice"),
            ("a.csv", "text,label\n  ,joy\n", "line 2: 'text' is empty"),
            ("a.csv", "text,label\nx,\n", "line 2: 'label' is empty"),
            ("a.csv", "text,label\n", "has no rows"),
            ("a.csv", "", "has no rows"),
            ("a.jsonl", '{"text": "x", "label": "joy"}\n{"text": ', "line 2: not JSON"),
            ("a.jsonl", '["x", "joy"]', "line 1: each line must be a JSON object, got list"),
            ("a.jsonl", '{"text": 5, "label": "joy"}', "line 1: 'text' must be text, got 5"),
            ("a.jsonl", '{"text": "x", "label": null}', "line 1: 'label' must be text, got None"),
            ("a.jsonl", '{"text": "x", "label": true}', "line 1: 'label' must be text"),
            ("a.csv", b"text,label\nx,joy\n\xff\xfe,joy\n", "line 3: not UTF-8"),
            ("a.xlsx", "x", r"unknown file type 'a.xlsx'; choose from \.csv, \.tsv"),
        ],
    )
    def test_errors_say_where_and_what(self, file, name, content, message):
        with pytest.raises(InputError, match=message):
            load_texts(file(name, content))

    def test_missing_file_and_folder(self, tmp_path):
        with pytest.raises(InputError, match="cannot read .*No such file"):
            load_texts(tmp_path / "none.csv")
        (tmp_path / "d.csv").mkdir()
        with pytest.raises(InputError, match="cannot read"):
            load_texts(tmp_path / "d.csv")


class TestPrompts:
    def test_every_key_is_kept(self, file):
        rows = [{"prompt": "Hi", "id": 7, "tags": ["a"]}, {"prompt": "Bye \u2028 now", "emotion": None}]
        content = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n"
        assert load_prompts(file("p.jsonl", content)) == rows

    def test_csv_works_too(self, file):
        assert load_prompts(file("p.csv", "prompt,id\nHi,1\n")) == [{"prompt": "Hi", "id": "1"}]

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("", "has no rows"),
            ("\n \n", "has no rows"),
            ('{"prompt": "Hi"}\n{"text": "Bye"}', "line 2: unknown column 'prompt'; choose from text"),
            ('{"prompt": ""}', "line 1: 'prompt' is empty"),
            ('{"prompt": ["Hi"]}', "line 1: 'prompt' must be text"),
            ("{}", "line 1: unknown column 'prompt'"),
        ],
    )
    def test_errors(self, file, content, message):
        with pytest.raises(InputError, match=message):
            load_prompts(file("p.jsonl", content))
