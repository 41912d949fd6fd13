"""Is every data set the one that was meant, by its content, wherever it is found?"""

import errno
import gzip
import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pytest

from plw_mlflow.data import sources
from plw_mlflow.data.sources import NAMED, Pinned
from plw_mlflow.environment import disk
from tests.stores import ROOT

ROWS = [{"instruction": f"Add {number} and 1.", "output": str(number + 1)} for number in range(3)]
CONTENT = json.dumps(ROWS).encode()
SHA256 = hashlib.sha256(CONTENT).hexdigest()
LINES = "\n".join(map(json.dumps, ROWS)).encode()
COMMIT = "c0ffee" * 6 + "c0ff"


@contextmanager
def server(answers):
    """An HTTP server on this machine that knows some paths; yields its address and the paths it was asked for."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            content = answers.get(self.path.partition("?")[0])
            status = content if isinstance(content, int) else 404 if content is None else 200
            content = None if isinstance(content, int) else content
            self.send_response(status)
            self.send_header("Content-Length", str(len(content or b"")))
            self.send_header("ETag", '"0"')
            self.send_header("X-Repo-Commit", COMMIT)
            if status == 404:
                self.send_header("X-Error-Code", "EntryNotFound")
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content or b"")

        do_HEAD = do_GET

        def log_message(self, *arguments):
            pass

    listening = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listening.server_port}", asked
    finally:
        listening.shutdown()
        listening.server_close()


def pin(monkeypatch, url, *, sha256=SHA256, blob=""):
    """Let AlpacaData and AlpacaDataShort mean a file of the tests."""
    pinned = Pinned(url, sha256, blob, "CC BY-NC 4.0")
    for name in ("AlpacaData", "AlpacaDataShort"):
        monkeypatch.setitem(NAMED, name, pinned)


def test_a_named_data_set_is_downloaded_once(tmp_path, monkeypatch):
    with server({"/a/alpaca_data.json": CONTENT}) as (address, asked):
        pin(monkeypatch, address + "/a/alpaca_data.json")
        for _ in range(2):
            found = sources.find("AlpacaData", tmp_path)
            assert list(found.rows()) == ROWS
    assert asked == ["/a/alpaca_data.json"]
    assert (found.name, found.prefix) == ("AlpacaData", "alpaca_data.json")
    assert found.sha256 == SHA256
    assert (found.licence, found.is_noncommercial, found.inverted) == ("CC BY-NC 4.0", True, False)


def test_the_short_one_is_the_second_inverted(tmp_path, monkeypatch):
    assert NAMED["AlpacaDataShort"] is NAMED["AlpacaDataCleaned"]
    (tmp_path / "alpaca_data.json").write_bytes(CONTENT)
    pin(monkeypatch, "http://127.0.0.1:9/alpaca_data.json")
    assert sources.find("AlpacaDataShort", tmp_path / "cache", tmp_path).inverted


def test_another_content_is_refused_and_not_kept(tmp_path, monkeypatch):
    with server({"/alpaca_data.json": CONTENT + b" "}) as (address, asked):
        pin(monkeypatch, address + "/alpaca_data.json")
        for _ in range(2):
            with pytest.raises(ValueError, match=r"is not AlpacaData: its content has the SHA-256"):
                sources.find("AlpacaData", tmp_path)
    assert len(asked) == 2


def test_a_download_writes_through_no_link(tmp_path, monkeypatch):
    cache, other = tmp_path / "cache", tmp_path / "other"
    other.write_text("the user's")
    folder = cache / "sources" / SHA256[:16]
    folder.mkdir(parents=True)
    (folder / "part").symlink_to(other)
    with server({"/alpaca_data.json": CONTENT}) as (address, _):
        pin(monkeypatch, address + "/alpaca_data.json")
        assert sources.find("AlpacaData", cache).sha256 == SHA256
        (folder / "alpaca_data.json").unlink()
        (folder / "lock").unlink()
        (folder / "lock").symlink_to(other)
        with pytest.raises(ValueError, match=r"the cache .* cannot be written to"):
            sources.find("AlpacaData", cache)
    assert other.read_text() == "the user's"


def test_what_was_downloaded_is_read_where_nobody_may_write(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EROFS, "Read-only file system")

    with server({"/alpaca_data.json": CONTENT}) as (address, _):
        pin(monkeypatch, address + "/alpaca_data.json")
        sources.find("AlpacaData", tmp_path)
        monkeypatch.setattr(disk, "FileLock", refuse)
        monkeypatch.setattr(os, "mkdir", refuse)
        assert sources.find("AlpacaData", tmp_path).sha256 == SHA256
        with pytest.raises(ValueError, match=r"the cache .* cannot be written to .*Read-only file system"):
            sources.find("AlpacaData", tmp_path / "other")


def test_a_full_disk_leaves_no_part_of_a_download(tmp_path, monkeypatch):
    def fill(answer, file):
        file.write(answer.read(10))
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sources.shutil, "copyfileobj", fill)
    with server({"/alpaca_data.json": CONTENT}) as (address, _):
        pin(monkeypatch, address + "/alpaca_data.json")
        with pytest.raises(ConnectionError, match=r"cannot be downloaded .*No space left"):
            sources.find("AlpacaData", tmp_path)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["lock"]


@pytest.mark.parametrize("folder", ["", "instruct"])
@pytest.mark.parametrize(
    ("ending", "pack"),
    [("", bytes), (".gz", gzip.compress), (".zst", lambda content: pa.compress(content, "zstd", asbytes=True))],
)
def test_a_local_copy_is_taken_packed_or_not(tmp_path, monkeypatch, folder, ending, pack):
    pin(monkeypatch, "http://127.0.0.1:9/alpaca_data.json")  # where nobody answers
    (tmp_path / folder).mkdir(exist_ok=True)
    (tmp_path / folder / f"alpaca_data.json{ending}").write_bytes(pack(CONTENT))
    found = sources.find("AlpacaData", tmp_path / "cache", tmp_path)
    assert list(found.rows()) == ROWS
    assert found.location == str(tmp_path / folder / f"alpaca_data.json{ending}")
    assert found.sha256 == SHA256


def test_a_local_copy_must_be_the_right_one(tmp_path, monkeypatch):
    pin(monkeypatch, "http://127.0.0.1:9/alpaca_data.json")
    (tmp_path / "alpaca_data.json").write_bytes(CONTENT[:-1])
    with pytest.raises(ValueError, match=r"alpaca_data.json is not AlpacaData"):
        sources.find("AlpacaData", tmp_path / "cache", tmp_path)


def test_a_git_blob_can_be_the_pin(tmp_path, monkeypatch):
    """Checked against git's own id of a blob, of which only the start need be known."""
    (tmp_path / "alpaca_data.json").write_bytes(CONTENT)
    hash_object = ["git", "hash-object", "--no-filters", tmp_path / "alpaca_data.json"]
    blob = subprocess.run(hash_object, capture_output=True, text=True, check=True).stdout.strip()
    for known in (blob, blob[:8]):
        pin(monkeypatch, "http://127.0.0.1:9/alpaca_data.json", sha256="", blob=known)
        assert list(sources.find("AlpacaData", tmp_path / "cache", tmp_path).rows()) == ROWS
    pin(monkeypatch, "http://127.0.0.1:9/alpaca_data.json", sha256="", blob="0" + blob[:7])
    with pytest.raises(ValueError, match=f"git blob id {blob}"):
        sources.find("AlpacaData", tmp_path / "cache", tmp_path)


def test_without_a_network_the_way_out_is_told_in_one_line(tmp_path, monkeypatch):
    pin(monkeypatch, "http://127.0.0.1:9/alpaca_data.json")
    with pytest.raises(ConnectionError, match=r"AlpacaData cannot be downloaded .*--data-dir") as raised:
        sources.find("AlpacaData", tmp_path)
    assert "\n" not in str(raised.value)


def test_a_file_is_known_by_its_unpacked_content(tmp_path, monkeypatch):
    path = tmp_path / "mine.json.gz"
    path.write_bytes(gzip.compress(CONTENT))
    found = sources.find(str(path), tmp_path)
    assert (found.location, found.prefix, found.licence) == (str(path), "mine.json.gz", "")
    assert found.sha256 == SHA256
    pin(monkeypatch, "http://127.0.0.1:9/alpaca_data.json")
    assert sources.find(str(path), tmp_path).licence == "CC BY-NC 4.0"  # the same bytes under another name


def test_the_file_of_the_study_is_known(shared, tmp_path):
    found = sources.find("AlpacaData", tmp_path, shared / "data")
    assert found.location.endswith("alpaca_data.json.gz")
    assert found.is_noncommercial


def test_a_toy_set_is_the_same_every_time(tmp_path):
    first, second = (sources.find("toy-short", tmp_path) for _ in range(2))
    assert first.sha256 == second.sha256 != sources.find("toy-long", tmp_path).sha256
    assert list(first.rows()) == list(first.rows()) == list(second.rows())


@pytest.mark.parametrize("dataset", ["toy-shorter", "no/such/file.json", "folder/missing.jsonl.gz", "a b/c", "a\0b"])
def test_an_unknown_data_set_is_refused_by_name(dataset, tmp_path):
    with pytest.raises(ValueError, match=r"is neither a file, nor a hub id .*, nor one of toy-short") as raised:
        sources.find(dataset, tmp_path)
    assert repr(dataset) in str(raised.value)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working folder, with a few files in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for name in ("data/mine.jsonl", "data/.hidden", "data/notes.md", "data/more.csv.gz", "sums.tsv"):
        (tmp_path / name).write_text("some")
    (tmp_path / "data/empty.json").touch()
    (tmp_path / "table.xlsx").write_bytes(b"PK\x03\x04...")
    os.mkfifo(tmp_path / "pipe")
    return tmp_path


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [
        ("data", r"'data' is a folder; name one file in it \(empty.json, mine.jsonl, more.csv.gz\)"),
        ("./data/", "is a folder; name one file in it"),
        (".", r"is a folder; name one file in it \(sums.tsv, table.xlsx\)"),
        ("data/min.jsonl", r"did you mean '?data/mine.jsonl'?\?"),
        ("data/mine.json", r"did you mean '?data/mine.jsonl'?\?"),
        (
            "data/mine",
            r"is no file; did you mean '?data/mine.jsonl'?\? The data set of this name on the hub needs its @REV",
        ),
        ("sums", r"did you mean '?sums.tsv'?( or '?toy-short'?)?\?|did you mean '?sums.tsv'?\?"),
        ("mine.jsonl", r"did you mean '?data/mine.jsonl'?\?"),  # in --data-dir
        ("alpacadatashort", "did you mean '?AlpacaDataShort'?"),
        ("toyshort", r"did you mean '?toy-short'?\?"),
        ("dolly", r"did you mean '?Dolly'?\?"),
        ("dta/mine.jsonl", "there is no folder dta$"),
        ("data/empty.json", "data/empty.json is empty$"),
        ("table.xlsx", "table.xlsx is a ZIP archive, as Excel's .xlsx files are; unpack it, or save the table as CSV$"),
        ("pipe", "is no regular file"),
        ("https://example.org/a.json", "is an address; download the file"),
        ("a" * 300, "cannot be read: File name too long$"),
    ],
)
def test_what_cannot_be_a_data_set_is_refused_before_anything_is_read(folder, dataset, expected):
    for refuse in (
        lambda: sources.check(dataset, Path("data")),
        lambda: sources.find(dataset, folder / "cache", Path("data")),
    ):
        with pytest.raises(ValueError, match=expected) as raised:
            refuse()
        assert dataset in str(raised.value)
        assert "\n" not in str(raised.value)
    assert not (folder / "cache").exists()


@pytest.mark.parametrize(
    "dataset", ["toy-long", "AlpacaData", "data/mine.jsonl", "sums.tsv", "me/sums", "data/mine@main"]
)
def test_what_can_be_one_is_not(folder, dataset):
    sources.check(dataset)


def test_checking_imports_nothing_large():
    """It comes before everything, so that a typo is told at once."""
    code = "import sys; from plw_mlflow.data import sources; sources.check('toy-short'); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "datasets", "pyarrow", "numpy", "pandas", "mlflow"} & {*done.stdout.split()}


# The hub: a small one on this machine. Its client reads its address when it is imported, hence the processes.

READ = """
import json, sys
from pathlib import Path
from plw_mlflow.data import sources

try:
    found = sources.find(sys.argv[1], Path("unused"))
    print(json.dumps([found.location, found.sha256, found.licence, found.prefix, list(found.rows())]))
except (ValueError, ConnectionError) as error:
    print(json.dumps([type(error).__name__, str(error)]))
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A function that looks a data set up on a hub with one data set, whose `main` is COMMIT."""
    info = {"id": "me/sums", "sha": COMMIT, "siblings": [{"rfilename": "data.jsonl"}], "tags": [], "private": False}
    info |= {"gated": False, "disabled": False, "downloads": 0, "likes": 0, "cardData": {"license": "cc-by-nc-4.0"}}
    tree = [{"type": "file", "path": "data.jsonl", "size": len(LINES), "oid": "0" * 40}]
    answers = {f"/api/datasets/me/sums/tree/{COMMIT}": json.dumps(tree).encode()}
    answers[f"/datasets/me/sums/resolve/{COMMIT}/data.jsonl"] = LINES
    for path in ("", "/revision/main", f"/revision/{COMMIT}"):
        answers[f"/api/datasets/me/sums{path}"] = json.dumps(info).encode()
    answers |= {f"/api/datasets/me/busy/revision/{revision}": 500 for revision in ("main", COMMIT)}
    home = tmp_path_factory.mktemp("hub")

    with server(answers) as (address, _):

        def look_up(dataset, **more):
            environment = os.environ | {"HF_ENDPOINT": address, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"} | more
            command = [sys.executable, "-c", READ, dataset]
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
            assert done.returncode == 0, done.stderr
            return json.loads(done.stdout)

        yield look_up


def test_a_revision_on_the_hub_is_resolved_to_its_commit(hub):
    location = f"hf://datasets/me/sums@{COMMIT}"
    expected = [location, hashlib.sha256(location.encode()).hexdigest(), "cc-by-nc-4.0", "me/sums", ROWS]
    assert hub("me/sums@main") == hub("me/sums") == expected
    # What has been downloaded is found again without the hub, if the commit is given.
    assert hub(f"me/sums@{COMMIT}", HF_HUB_OFFLINE="1") == [*expected[:2], "", *expected[3:]]


@pytest.mark.parametrize(
    ("dataset", "environment", "expected"),
    [
        ("me/none", {}, ["UserError", "the hub has no data set me/none"]),
        ("me/sums@other", {}, ["UserError", "the hub has no data set me/sums@other"]),
        ("me/busy@main", {}, ["Unreachable", "the hub cannot be asked for me/busy@main"]),
        (f"me/busy@{COMMIT}", {}, ["UserError", f"data set me/busy at {COMMIT} cannot be read"]),  # as it went on
        ("me/sums@main", {"HF_HUB_OFFLINE": "1"}, ["Unreachable", "the hub cannot be asked for me/sums@main"]),
        ("me/sums@main", {"HF_ENDPOINT": "http://127.0.0.1:9"}, ["Unreachable", "the hub cannot be asked for"]),
    ],
)
def test_what_the_hub_does_not_give_is_told_in_one_line(hub, dataset, environment, expected):
    kind, message = hub(dataset, **environment)
    assert kind == expected[0]
    assert message.startswith(expected[1])
    assert "\n" not in message
