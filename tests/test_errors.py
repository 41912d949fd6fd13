"""Are errors one line, and does no password leave the process in them?"""

import io
import socket

import pytest
import requests

from plw_mlflow import errors
from plw_mlflow.errors import first_line, reason, without_passwords


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("http://me:secret@host:5000/x", "http://me:***@host:5000/x"),
        ("no answer from 'https://me:secret@host', twice", "no answer from 'https://me:***@host', twice"),
        ("postgresql+psycopg2://me:se%40cret@host:5432/db", "postgresql+psycopg2://me:***@host:5432/db"),
        ("http://me:se@cret@host/a@b", "http://me:***@host/a@b"),
        ("mysql://me:se/cret@host/db", "mysql://me:***@host/db"),
        ("http://me:se#cret@host", "http://me:***@host"),
        ("mysql://me:1234@host", "mysql://me:***@host"),
        ("mysql://me:12345/x@host/db", "mysql://me:***@host/db"),
        ("postgresql://me:se@cr/et@host/db", "postgresql://me:***@host/db"),
        ("mysql+pymysql://me:se cret@host/db", "mysql+pymysql://me:***@host/db"),
        ("Authorization: Bearer sk-secret", "Authorization: Bearer ***"),
        ("redis://:secret@host", "redis://:***@host"),
        ("https://secret@github.com/a/b", "https://***@github.com/a/b"),
        ("a http://u:secret@x b http://v:secret@y c", "a http://u:***@x b http://v:***@y c"),
        ("http://host/v1?token=secret&limit=3", "http://host/v1?token=***&limit=3"),
        ("postgresql://host/db?user=me&password=secret", "postgresql://host/db?user=me&password=***"),
        ("https://b.s3/k?X-Amz-Date=1&X-Amz-Signature=secret", "https://b.s3/k?X-Amz-Date=1&X-Amz-Signature=***"),
        ("https://a.blob.core.windows.net/c?sv=2&sig=secret", "https://a.blob.core.windows.net/c?sv=2&sig=***"),
        ("mssql+pyodbc:///?odbc_connect=PWD%3Dsecret", "mssql+pyodbc:///?odbc_connect=***"),
        ("https://host/#access_token=secret", "https://host/#access_token=***"),
    ],
)
def test_no_secret_of_an_address_is_shown(text, expected):
    assert without_passwords(text) == without_passwords(expected) == expected


@pytest.mark.parametrize(
    "text",
    [
        "http://127.0.0.1:5000/#/models/plw-toy@best",
        "http://[::1]:5000/a@b",
        "sqlite:////home/me/a@b/mlflow.db",
        "models:/plw-toy-toy-short@best",
        "meta-llama/Llama-2-7b-hf@0123abc",
        "abfss://container@account.dfs.core.windows.net/mlflow",
        "see http://host:80/a and write to me@host",
        "http://host/a?max_tokens=3&b=c@d",
    ],
)
def test_what_is_no_secret_stays(text):
    assert without_passwords(text) == text


def test_the_first_line_holds_no_password():
    assert first_line(ValueError("no http://me:secret@host\nand more")) == "no http://me:***@host"
    assert first_line(KeyError()) == "KeyError"


def test_the_reason_is_what_the_network_says():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody listens there
        with pytest.raises(requests.ConnectionError) as error:
            requests.get(f"http://me:secret@127.0.0.1:{taken.getsockname()[1]}/a", timeout=5)
    assert "Max retries exceeded" in str(error.value)
    assert reason(error.value) == "Connection refused"


def test_the_reason_of_a_databases_error_is_what_the_database_says():
    text = (
        "(raised as a result of Query-invoked autoflush; consider ...)\n(sqlite3.OperationalError) database is locked"
    )
    assert reason(ValueError(text)) == "(sqlite3.OperationalError) database is locked"
    assert reason(ValueError()) == "ValueError"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\x1b[2Jb\rc\x07", "a\\x1b[2Jb\\rc\\x07"),
        ("two\nlines\tand a tab", "two\nlines\tand a tab"),
        ("\u202egpj.exe", "\\u202egpj.exe"),  # which turns the direction of writing
        ("\ud800 \ufdd0", "\\ud800 \\ufdd0"),
        ("日本 naïve\u00a0espace 👩\u200d🔬 نمی\u200cخواهم", "日本 naïve\u00a0espace 👩\u200d🔬 نمی\u200cخواهم"),
    ],
)
def test_what_strangers_write_drives_no_terminal(text, expected):
    assert errors.printable(text) == expected


def test_colours_of_our_own_stay():
    stream = io.StringIO()
    print("\x1b[32mgreen\x1b[0m \x1b]0;title\x07 \x1b[8mhidden", file=errors.PrintableStream(stream))
    errors.PrintableStream(stream).writelines(["\x1b[2J"])
    assert stream.getvalue() == "\x1b[32mgreen\x1b[0m \\x1b]0;title\\x07 \\x1b[8mhidden\n\\x1b[2J"
