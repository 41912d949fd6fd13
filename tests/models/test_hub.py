"""Does the hub's own answer say what is wrong with a name, in one line, and is nothing asked that need not be?"""

import http.server
import threading

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from plw_mlflow.errors import Unreachable
from plw_mlflow.models import hub

COMMIT = "0123456789" * 4
CODES = {"none": "RepoNotFound", "gated": "GatedRepo", "empty": "EntryNotFound"}


class Hub(http.server.BaseHTTPRequestHandler):
    """A hub with the model me/whole, whose one revision is main; the other names say what is wrong with them."""

    def do_HEAD(self):
        _, _, name, _, revision, _ = self.path.split("/")
        code = CODES.get(name) or ("RevisionNotFound" if revision != "main" else None)
        self.send_response({None: 200, "GatedRepo": 403}.get(code, 404))
        if code is not None:
            self.send_header("X-Error-Code", code)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", "content")
        self.send_header("Content-Length", "2")
        self.end_headers()

    def do_GET(self):
        self.do_HEAD()
        self.wfile.write(b"{}")

    def log_message(self, *_):
        pass


@pytest.fixture
def answering(monkeypatch, tmp_path):
    """A hub that answers, and a machine that has downloaded nothing."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    yield
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("kind", "name", "expected"),
    [
        ("model", "me/none", "the hub has no model 'me/none' for you"),
        ("tokenizer", "me/none@main", "the hub has no tokenizer 'me/none' for you"),
        ("model", "me/gated", "the hub gives model 'me/gated' only to those who have accepted its terms"),
        ("model", "me/whole@other", "the hub's model 'me/whole' has no revision 'other'"),
        ("model", "me/empty", "'me/empty' on the hub holds no model: it has no config.json"),
        ("model", "me/two--dashes", "model 'me/two--dashes' cannot be had from the hub"),
    ],
)
def test_what_the_hub_does_not_give_is_told_in_one_line(answering, kind, name, expected):
    with pytest.raises(ValueError, match="^" + expected) as told:
        hub.check(kind, name)
    assert "\n" not in str(told.value)


def test_what_the_hub_has_passes_and_is_downloaded_once(answering, monkeypatch):
    hub.check("model", "me/whole")
    hub.check("tokenizer", "me/empty")  # some have no tokenizer_config.json
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub.check("model", "me/whole")


def test_what_lies_on_this_machine_is_not_asked_for(monkeypatch, tmp_path):
    def ask(*_, **__):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", ask)
    for name in ("toy", str(tmp_path)):
        hub.check("model", name)


def test_a_hub_that_cannot_be_asked_is_no_fault_of_the_name(answering, monkeypatch):
    def refuse(*_, **__):
        raise LocalEntryNotFoundError("not there") from ConnectionError("Connection refused")

    with monkeypatch.context() as patched:
        patched.setattr("huggingface_hub.hf_hub_download", refuse)
        with pytest.raises(Unreachable, match=r"'me/whole' is not among .* cannot be asked: Connection refused"):
            hub.check("model", "me/whole")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"'me/whole' is not among .* not to be asked \(HF_HUB_OFFLINE\)"):
        hub.check("model", "me/whole")
